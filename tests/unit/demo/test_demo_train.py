import json
import sys
from pathlib import Path

import pytest
import torch

from serverless_llm.demo.tasks import ADD, COUNT, NAMES

train = pytest.importorskip("serverless_llm.demo.train", reason="training needs transformers")
pytestmark = pytest.mark.slow


def few_steps(name: str) -> object:
    shape = train.RECIPES[name].shape | {"num_hidden_layers": 1}
    return train.Recipe(shape, (train.Phase(2, 4, 1e-3, whole=False), train.Phase(1, 2, 1e-3)))


def test_a_run_writes_loadable_checkpoints_and_adds_their_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "RECIPES", {name: few_steps(name) for name in NAMES})
    monkeypatch.setattr(train, "SCORED_PROMPTS", 3)
    for name in (COUNT.name, ADD.name):
        monkeypatch.setattr(sys, "argv", ["train", name, "--out", str(tmp_path), "--threads", "1"])
        train.main()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == {COUNT.name, ADD.name}
    assert scores[ADD.name]["prompts"] == 3
    assert scores[ADD.name]["float32"] == 0.0
    assert (tmp_path / ADD.name / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert "demo-add wrong: " in capsys.readouterr().out


def test_training_is_deterministic_and_ends_in_bfloat16_values() -> None:
    first, second = (train.train(ADD, few_steps(ADD.name)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(value, value.to(torch.bfloat16).float()) for value in first.values())


def test_all_recipes_are_small_and_differ_in_architecture() -> None:
    shapes = [recipe.shape for recipe in train.RECIPES.values()]
    assert set(train.RECIPES) == set(NAMES)
    assert {shape["model_type"] for shape in shapes} == {"llama", "qwen3"}
