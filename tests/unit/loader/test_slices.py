"""Checkpoints cut for several devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serverless_llm.loader import load_checkpoint, load_slices, manifest, save_file
from tests.unit.loader.checkpoints import random, same, write

KINDS = st.tuples(
    st.lists(st.integers(0, 3), min_size=1, max_size=3), st.sampled_from([torch.float32, torch.bfloat16, torch.int8])
)


def llama(name: str) -> int | None:
    """As a Llama is cut: what makes heads by rows, what joins them by columns, norms not at all."""
    if name.endswith("norm.weight"):
        return None
    return 1 if name.split(".")[-2] in ("o_proj", "down_proj") else 0


def bytes_read() -> int:
    """That this process asked the system for, from disk or cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


@pytest.mark.parametrize("count", [2, 4])
def test_slices_join_to_the_whole_and_are_read_once(tmp_path: Path, count: int) -> None:
    layer = {"q_proj": (64, 32), "o_proj": (32, 64), "down_proj": (32, 128), "up_proj": (128, 32)}
    content = {
        f"model.layers.{number}.{name}.weight": torch.randn(64 * shape[0], shape[1]).bfloat16()
        for number in range(4)
        for name, shape in layer.items()
    } | {"model.norm.weight": torch.ones(32)}
    directory = write(tmp_path, dict(list(content.items())[:9]), dict(list(content.items())[9:]))
    nbytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    before = bytes_read()
    slices = load_slices(directory, ["cpu"] * count, llama)
    assert bytes_read() - before <= 1.05 * nbytes
    for name, tensor in content.items():
        dim, parts = llama(name), [mine[name] for mine in slices]
        assert all(part.is_contiguous() for part in parts)
        joined = parts if dim is None else [torch.cat(parts, dim)]
        assert all(same(one, tensor) for one in joined)
        assert dim is None or all(part.numel() * count == tensor.numel() for part in parts)


@settings(max_examples=30, deadline=None)
@given(kinds=st.lists(KINDS, min_size=1, max_size=4), count=st.integers(1, 4), data=st.data())
def test_any_tensors_along_any_dimension(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[tuple[list[int], torch.dtype]],
    count: int,
    data: st.DataObject,
) -> None:
    dims: dict[str, int | None] = {}
    content = {}
    for number, (sizes, dtype) in enumerate(kinds):
        dim = data.draw(st.none() | st.integers(-len(sizes), len(sizes) - 1))
        shape = [size * count if dim is not None and at == dim % len(sizes) else size for at, size in enumerate(sizes)]
        content[f"t{number}"], dims[f"t{number}"] = torch.randint(0, 100, shape).to(dtype), dim
    directory = write(tmp_path_factory.mktemp("slices"), content)
    slices = load_slices(directory, ["cpu"] * count, dims.__getitem__)
    for name, tensor in load_checkpoint(directory).items():
        dim, parts = dims[name], [mine[name] for mine in slices]
        assert all(same(part, tensor) for part in parts) if dim is None else same(torch.cat(parts, dim), tensor)


def test_what_cannot_be_cut_is_named(tmp_path: Path) -> None:
    directory = write(tmp_path, random(0.01, count=1))
    with pytest.raises(ValueError, match=r"tensor '0.0' of shape \[40, 64\] cannot be cut into 3 equal parts"):
        load_slices(directory, ["cpu"] * 3, lambda _: 0)
    with pytest.raises(ValueError, match=r"tensor '0.0' of shape \[40, 64\] has no dimension 2"):
        load_slices(directory, ["cpu"], lambda _: 2)
    with pytest.raises(ValueError, match="no device"):
        load_slices(directory, [], lambda _: None)
    assert (directory / manifest.SINGLE).exists()


def test_pairs_of_4_bit_numbers_are_not_cut(tmp_path: Path) -> None:
    packed = torch.arange(12, dtype=torch.uint8).view(2, 6).view(torch.float4_e2m1fn_x2)
    save_file({"packed": packed}, tmp_path / manifest.SINGLE)
    slices = load_slices(tmp_path, ["cpu"] * 3, lambda _: 1)
    assert same(torch.cat([mine["packed"].view(torch.uint8) for mine in slices], 1), packed.view(torch.uint8))
    with pytest.raises(ValueError, match=r"tensor 'packed' of shape \[2, 6\] cannot be cut into 4 equal parts"):
        load_slices(tmp_path, ["cpu"] * 4, lambda _: 1)
