import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

from serverless_llm.cli import make_checkpoint as module
from serverless_llm.cli.make_checkpoint import make_checkpoint, make_checkpoint_command
from serverless_llm.demo.shapes import SHAPES, shape_of, tensors_of
from serverless_llm.engine.config import ModelConfig
from serverless_llm.errors import CapacityError

TINY = [name for name in SHAPES if name.startswith("tiny-")]

# What the hub's model pages say.
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "olmo-2-7b": 7_298_617_344,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "phi-3-mini-4k": 3_821_079_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize(("like", "parameters"), PUBLISHED.items(), ids=PUBLISHED)
def test_real_shapes_have_the_published_number_of_parameters(like: str, parameters: int) -> None:
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors_of(SHAPES[like])) == parameters


@pytest.mark.parametrize("like", SHAPES)
def test_every_shape_can_be_served(like: str) -> None:
    ModelConfig.parse(SHAPES[like], "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("like", TINY)
def test_transformers_finds_each_tensor_that_it_wants_and_no_other(like: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make_checkpoint(like, tmp_path, shards=2)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert model.config.eos_token_id == 257
    ours = ModelConfig.parse(SHAPES[like])
    if ours.rope:
        rope = model.config.rope_parameters
        rope = rope["full_attention"] if ours.local_rope else rope
        assert (rope["rope_theta"], rope["rope_type"]) == (ours.rope.theta, ours.rope.kind)


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)],
)
def test_weights_are_normal_and_norms_are_one(dtype: str, torch_dtype: torch.dtype, tmp_path: Path) -> None:
    make_checkpoint("tiny-qwen3", tmp_path, dtype=dtype)
    weights = load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    assert {value.dtype for value in weights.values()} == {torch_dtype}
    for name, value in weights.items():
        if "norm" in name:
            assert bool((value == 1).all())
        else:
            assert abs(value.float().std().item() / 0.125 - 1) < 0.1
            assert abs(value.float().mean().item()) < 0.02


def test_norms_that_add_one_to_their_weight_begin_at_zero(tmp_path: Path) -> None:
    make_checkpoint("tiny-gemma2", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(bool((value == 0).all()) for name, value in weights.items() if "norm" in name)


def test_bfloat16_is_rounded_as_torch_rounds(tmp_path: Path) -> None:
    make_checkpoint("tiny-llama", tmp_path / "wide", dtype="float32")
    make_checkpoint("tiny-llama", tmp_path / "narrow")
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "narrow"))
    assert all(torch.equal(wide[name].to(torch.bfloat16), narrow[name]) for name in wide)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_checkpoint("tiny-llama", tmp_path / name, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert {name for name in a if a[name] != c[name]} == {"model.safetensors"}


def test_shards_hold_the_same_tensors_and_the_index_finds_them(tmp_path: Path) -> None:
    make_checkpoint("tiny-llama", tmp_path / "one")
    make_checkpoint("tiny-llama", tmp_path / "three", shards=3)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "three" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "three" / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), whole[name])


@pytest.mark.parametrize("shards", [1, 2, 5, 21])
def test_shards_are_about_equal_and_never_empty(shards: int) -> None:
    groups = module.split(tensors_of(SHAPES["tiny-llama"]), shards, "bfloat16")
    assert len(groups) == shards
    assert all(groups)
    assert [tensor for group in groups for tensor in group] == tensors_of(SHAPES["tiny-llama"])


def test_a_large_model_splits_evenly() -> None:
    groups = module.split(tensors_of(SHAPES["llama-3.1-8b"]), 4, "bfloat16")
    sizes = [sum(int(np.prod(tensor.shape)) for tensor in group) for group in groups]
    assert max(sizes) < 1.15 * min(sizes)


def test_tensors_longer_than_the_random_block_wrap_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_VALUES", 1009)
    make_checkpoint("tiny-llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"].flatten()
    assert torch.equal(embedding[:1009], embedding[1009:2018])
    layers = [weights[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1)]
    assert not torch.equal(*layers)


def test_the_data_begins_on_a_multiple_of_8_bytes(tmp_path: Path) -> None:
    make_checkpoint("tiny-qwen3", tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0


def test_layers_and_tokenizer(tmp_path: Path) -> None:
    make_checkpoint("tiny-llama-tied", tmp_path, layers=1)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert {name.split(".")[2] for name in weights if ".layers." in name} == {"0"}
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("hi").ids == list(b"hi")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"like": "llama3.1-8b"}, "no shape is called 'llama3.1-8b'; the nearest: llama-3.1-8b"),
        ({"like": "?"}, "tiny-llama"),
        ({"like": "tiny-llama", "layers": 0}, "at least one layer, not 0"),
        ({"like": "tiny-llama", "dtype": "int8"}, "no dtype is called 'int8'; there are bfloat16"),
        ({"like": "tiny-llama", "shards": 22}, "21 tensors cannot fill 22 shards"),
        ({"like": "tiny-llama", "shards": 0}, "cannot fill 0 shards"),
    ],
)
def test_impossible_wishes_are_refused_before_anything_is_written(
    arguments: dict[str, str | int], message: str, tmp_path: Path
) -> None:
    write: Callable[..., None] = make_checkpoint
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        write(directory=tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        make_checkpoint("tiny-llama", tmp_path)
    with pytest.raises(FileExistsError, match="not an empty directory"):
        make_checkpoint("tiny-llama", tmp_path / "mine")
    assert contents(tmp_path) == {"mine": b"x"}


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_tokenizer", full)
    with pytest.raises(OSError, match="No space"):
        make_checkpoint("tiny-llama", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_the_disk_cannot_hold_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 20, 1 << 20, 1000))
    with pytest.raises(CapacityError, match=r"out needs .* [KM]B, 1.0 KB are free there"):
        make_checkpoint("tiny-llama", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "model"
    arguments = [str(directory), "--like", "tiny-qwen3", "--layers", "3", "--shards", "2", "--dtype", "float16"]
    result = CliRunner().invoke(make_checkpoint_command, arguments)
    assert result.exit_code == 0, result.output
    assert re.match(rf"{re.escape(str(directory))}: [\d.]+ [KM]B in ", result.output)
    assert result.output.endswith("random weights: expect no sense, and often no text\n")
    assert json.loads((directory / "config.json").read_text())["num_hidden_layers"] == 3
    again = CliRunner().invoke(make_checkpoint_command, arguments)
    assert again.exit_code == 1
    assert isinstance(again.exception, FileExistsError)


def test_the_command_is_light_to_import() -> None:
    heavy = "import sys, serverless_llm.cli.make_checkpoint; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_shape_is_a_copy() -> None:
    assert shape_of("tiny-llama", 7)["num_hidden_layers"] == 7
    assert shape_of("tiny-llama")["num_hidden_layers"] == 2


def test_a_place_that_cannot_be_written_is_named_as_it_was_given(tmp_path: Path) -> None:
    place = tmp_path / ("x" * 250)
    with pytest.raises(OSError, match=f"'{place}'$"):
        make_checkpoint("tiny-llama", place)
