"""Checkpoints into modules on the meta device, with transformers as the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM

from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.demo import tasks
from serverless_llm.loader import into, iterate, load_checkpoint, load_into, manifest

DEMO = tasks.checkpoint_dir("demo-count")


def empty(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        told: torch.Tensor = model(torch.arange(40).view(1, 40)).logits
    return told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("task", tasks.NAMES)
def test_a_model_computes_what_from_pretrained_s_does(task: str, dtype: torch.dtype) -> None:
    directory = tasks.checkpoint_dir(task)
    model = empty(directory, dtype)
    assert load_into(model, directory) == (set(), [])
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    assert torch.equal(logits(model), logits(expected))
    assert model.state_dict().keys() == expected.state_dict().keys()


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(4, 3)
        self.head = torch.nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def directory_of(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path / manifest.SINGLE)
    return path


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_parameters_that_are_one_stay_one(tmp_path: Path, name: str) -> None:
    with torch.device("meta"):
        model = Tied()
    weight = torch.randn(4, 3)
    assert load_into(model, directory_of(tmp_path, {name: weight})) == (set(), [])
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, weight)


@pytest.mark.parametrize("factor", [1, 2])
def test_a_head_of_its_own_stays_so(tmp_path: Path, factor: int, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint("tiny-llama-tied", tmp_path)
    tensors = load_checkpoint(tmp_path)
    directory_of(tmp_path, tensors | {"lm_head.weight": factor * tensors["model.embed_tokens.weight"]})
    model = empty(tmp_path)
    assert load_into(model, tmp_path) == (set(), [])
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(model), logits(expected))
    embedding, head = model.get_parameter("model.embed_tokens.weight"), model.get_parameter("lm_head.weight")
    assert (embedding is head) == (factor == 1)
    told = "model.embed_tokens.weight and lm_head.weight differ in the files: they are not tied"
    assert (told in caplog.messages) == (factor == 2)


class Shared(torch.nn.Module):
    """One buffer under six names, the first of which no checkpoint has; and one that none has under any name."""

    def __init__(self) -> None:
        super().__init__()
        scale, angles = torch.zeros(3), torch.zeros(2)
        for name in ("a", "b", "c"):
            child = torch.nn.Module()
            child.register_buffer("scale", scale, persistent=name != "a")
            child.register_buffer("again", scale)
            child.register_buffer("angles", angles, persistent=False)
            self.add_module(name, child)

    def initialize_weights(self) -> None:
        """As transformers' models have it."""
        self.get_buffer("a.angles").copy_(torch.arange(2.0))


@pytest.mark.parametrize("name", ["b.scale", "c.again"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_buffers_that_are_one_stay_one(tmp_path: Path, name: str, device: str) -> None:
    with torch.device(device):
        model = Shared()
    scale = torch.randn(3)
    assert load_into(model, directory_of(tmp_path, {name: scale})) == (set(), [])
    found = [child.get_buffer(leaf) for child in model.children() for leaf in ("scale", "again")]
    assert torch.equal(found[0], scale)
    assert all(one is found[0] for one in found)
    angles = [child.get_buffer("angles") for child in model.children()]
    assert all(one is angles[0] for one in angles)
    assert torch.equal(angles[0], torch.arange(2.0) if device == "meta" else torch.zeros(2))


def test_on_the_cpu_nothing_is_copied_but_for_another_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, torch.Tensor] = {}

    def told(directory: Path, device: str) -> Iterator[tuple[str, torch.Tensor]]:
        read.update(iterate(directory, device))
        return iter(read.items())

    monkeypatch.setattr(into, "iterate", told)
    with torch.device("meta"):
        model = torch.nn.Linear(3, 4, dtype=torch.bfloat16)
    weight, bias = torch.randn(4, 3), torch.randn(4).bfloat16()
    load_into(model, directory_of(tmp_path, {"weight": weight, "bias": bias}))
    assert torch.equal(model.weight, weight.bfloat16())
    assert torch.equal(model.bias, bias)
    assert model.bias.data_ptr() == read["bias"].data_ptr()


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"weight": torch.ones(4, 3)}, r"Linear: missing are \['bias'\]$"),
        ({"weight": torch.ones(4, 3), "bias": torch.ones(4), "x": torch.ones(1)}, r"Linear: unknown \['x'\]$"),
        (
            {"weight": torch.ones(3, 4), "bias": torch.ones(4)},
            r"Linear: of other shapes \['weight: \(3, 4\) in the files, \(4, 3\) in the module'\]$",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    tmp_path: Path, tensors: dict[str, torch.Tensor], fault: str
) -> None:
    model = torch.nn.Linear(3, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=fault):
        load_into(model, directory_of(tmp_path, tensors))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("given", [{}, "path", torch.nn.Linear])
def test_what_is_no_module_is_refused(tmp_path: Path, given: Any) -> None:
    message = f"a torch.nn.Module is needed, then its checkpoint's directory; not {type(given).__name__}$"
    with pytest.raises(TypeError, match=message):
        load_into(given, directory_of(tmp_path, {"weight": torch.ones(4, 3)}))


def test_without_strictness_names_may_differ(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 4)
    found = load_into(model, directory_of(tmp_path, {"weight": torch.ones(4, 3), "x": torch.ones(1)}), strict=False)
    assert found == ({"bias"}, ["x"])
    assert torch.equal(model.weight, torch.ones(4, 3))


@pytest.mark.gpu
def test_what_no_checkpoint_has_moves_along(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 4)
    load_into(model, directory_of(tmp_path, {"weight": torch.ones(4, 3)}), "cuda", strict=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}


class Buffered(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("angles", torch.arange(3.0), persistent=False)


def test_a_buffer_that_nobody_can_make_is_named(tmp_path: Path) -> None:
    directory_of(tmp_path, {"weight": torch.ones(2)})
    with torch.device("meta"):
        model = Buffered()
    with pytest.raises(RuntimeError, match="buffer angles is on the meta device, and no checkpoint has it"):
        load_into(model, tmp_path)
    assert model.weight.is_meta
    real = Buffered()
    load_into(real, tmp_path)
    assert torch.equal(real.get_buffer("angles"), torch.arange(3.0))


@pytest.mark.parametrize("shape", ["tiny-gemma3", "tiny-llama-tied"])
def test_it_may_be_loaded_again(tmp_path: Path, shape: str) -> None:
    make_checkpoint(shape, tmp_path / "one", dtype="bfloat16", shards=2)
    make_checkpoint(shape, tmp_path / "other", dtype="float32", seed=1)
    model = empty(tmp_path / "one", torch.bfloat16)
    for name in ("one", "other"):
        assert load_into(model, tmp_path / name) == (set(), [])
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16).eval()
        assert torch.equal(logits(model), logits(expected))


def test_a_checkpoint_that_transformers_fuses_is_told(tmp_path: Path) -> None:
    make_checkpoint("tiny-mixtral", tmp_path)
    with pytest.raises(
        RuntimeError, match=r"does not fit MixtralForCausalLM: missing are .* and \d+ more, .*state_dict"
    ):
        load_into(empty(tmp_path), tmp_path)
    config, state = AutoConfig.from_pretrained(tmp_path), load_checkpoint(tmp_path)
    model = MixtralForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(expected))
