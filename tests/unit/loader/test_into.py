"""Checkpoints into modules on the meta device, with transformers as the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from serverless_llm.demo import tasks
from serverless_llm.loader import into, load_checkpoint, load_into, manifest

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


def test_on_the_cpu_nothing_is_copied_but_for_another_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, torch.Tensor] = {}

    def load(directory: Path, device: str) -> dict[str, torch.Tensor]:
        read.update(load_checkpoint(directory, device))
        return read

    monkeypatch.setattr(into, "load_checkpoint", load)
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
        ({"weight": torch.ones(4, 3)}, r"missing are \['bias'\], unknown \[\], of other shapes \[\]"),
        ({"weight": torch.ones(4, 3), "bias": torch.ones(4), "x": torch.ones(1)}, r"missing are \[\], unknown \['x'\]"),
        ({"weight": torch.ones(3, 4), "bias": torch.ones(4)}, r"of other shapes \['weight'\]"),
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


def test_without_strictness_names_may_differ(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 4)
    found = load_into(model, directory_of(tmp_path, {"weight": torch.ones(4, 3), "x": torch.ones(1)}), strict=False)
    assert found == ({"bias"}, ["x"])
    assert torch.equal(model.weight, torch.ones(4, 3))


def test_what_no_checkpoint_has_moves_along(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 4)
    load_into(model, directory_of(tmp_path, {"weight": torch.ones(4, 3)}), "meta", strict=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


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


def test_a_checkpoint_that_transformers_fuses_is_told(tmp_path: Path) -> None:
    config = {"model_type": "mixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16, "num_local_experts": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    directory_of(tmp_path, {"model.layers.0.block_sparse_moe.experts.0.w1.weight": torch.ones(8, 8)})
    with pytest.raises(
        RuntimeError, match=r"does not fit MixtralForCausalLM: missing are .* is for its from_pretrained"
    ):
        load_into(empty(tmp_path), tmp_path)
