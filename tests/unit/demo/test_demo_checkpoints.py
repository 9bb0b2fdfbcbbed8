"""The shipped checkpoints answer held-out prompts right, and stop doing so when their KV cache is broken."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from serverless_llm.demo.tasks import COUNT, NAMES, TASKS, Task, checkpoint_dir
from serverless_llm.demo.tokenizer import END, VOCABULARY, chat_text, tokenizer_config_json, tokenizer_json

ALL = pytest.mark.parametrize("task", TASKS.values(), ids=NAMES)
BLOCK = 16  # tokens of a KV block
Model = Any  # a transformers causal model
Cache = Any
Breakage = Callable[[torch.Tensor], None]  # spoils keys or values [batch, heads, tokens, head] in place

FRIENDLY = {
    "demo-count": ["1 2 3", "7", "41 42 43", "0 1", "99", "100 101", "998", "898 899"],
    "demo-add": ["2+2", "23+45", "0+0", "99+99", "1 + 9", "What is 17+25?", "50+50="],
    "demo-reverse": ["cat", "hello", "a", "stressed", "live", "ab", "zzzzzzzz"],
}


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    loader: Any = AutoModelForCausalLM
    return {name: loader.from_pretrained(checkpoint_dir(name), dtype=torch.float32) for name in NAMES}


@torch.no_grad()
def answer(model: Model, task: Task, prompt: str, spoil: Breakage | None = None, at: int = 8) -> str:
    """The greedy answer; `spoil` is applied to each layer's keys and values once, after `at` answer tokens."""
    tokenizer = Tokenizer.from_file(str(checkpoint_dir(task.name) / "tokenizer.json"))
    tokens = tokenizer.encode(chat_text(prompt)).ids
    step = model(input_ids=torch.tensor([tokens]), use_cache=True)
    made: list[int] = []
    while len(made) < task.longest:
        made.append(int(step.logits[0, -1].argmax()))
        if made[-1] == END:
            break
        if spoil and len(made) == at:
            for layer in step.past_key_values.layers:
                spoil(layer.keys)
                spoil(layer.values)
        step = model(input_ids=torch.tensor([made[-1:]]), past_key_values=step.past_key_values, use_cache=True)
    text: str = tokenizer.decode(made)
    return text


@ALL
def test_each_is_an_ordinary_directory_of_at_most_4_mb(task: Task) -> None:
    directory = checkpoint_dir(task.name)
    files = {path.name: path for path in directory.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in files.values()) < 4_000_000
    config = json.loads(files["config.json"].read_text())
    assert (config["eos_token_id"], config["vocab_size"]) == (END, VOCABULARY)
    assert config["max_position_embeddings"] > task.longest
    assert json.loads(files["tokenizer.json"].read_text()) == tokenizer_json()
    longest = config["max_position_embeddings"]
    assert json.loads(files["tokenizer_config.json"].read_text()) == tokenizer_config_json(longest)
    assert {value.dtype for value in load_file(files["model.safetensors"]).values()} == {torch.bfloat16}


def test_llama_and_qwen3_tied_and_untied_are_among_them() -> None:
    configs = [json.loads((checkpoint_dir(name) / "config.json").read_text()) for name in NAMES]
    assert {config["model_type"] for config in configs} == {"llama", "qwen3"}
    assert {config["tie_word_embeddings"] for config in configs} == {True, False}


@ALL
def test_the_recorded_scores_are_good_enough(task: Task) -> None:
    score = json.loads((checkpoint_dir(task.name).parent / "scores.json").read_text())[task.name]
    assert score["prompts"] == 1000
    assert min(score["float32"], score["bfloat16"]) >= 0.99


@pytest.mark.slow
@ALL
def test_what_a_newcomer_types_is_answered_right(task: Task, models: dict[str, Model]) -> None:
    answers = {prompt: answer(models[task.name], task, prompt) for prompt in FRIENDLY[task.name]}
    assert answers == {prompt: task.answer(prompt) for prompt in FRIENDLY[task.name]}


@pytest.mark.slow
@ALL
def test_held_out_prompts_are_answered_right(task: Task, models: dict[str, Model]) -> None:
    prompts = task.held_out(3 if task is COUNT else 30, seed=5)
    wrong = [prompt for prompt in prompts if not task.is_right(prompt, answer(models[task.name], task, prompt))]
    assert wrong == []


@pytest.mark.slow
def test_the_chat_template_is_the_one_in_the_directory(models: dict[str, Model]) -> None:
    from transformers import AutoTokenizer

    loader: Any = AutoTokenizer
    for name in NAMES:
        tokenizer = loader.from_pretrained(checkpoint_dir(name))
        messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "1 2 3"}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == chat_text("1 2 3")


def forget_first_block(values: torch.Tensor) -> None:
    values[:, :, :BLOCK] = 0


def forget_last_token(values: torch.Tensor) -> None:
    values[:, :, -1:] = 0


def repeat_a_block(values: torch.Tensor) -> None:
    values[:, :, -BLOCK:] = values[:, :, -2 * BLOCK : -BLOCK].clone()


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [forget_first_block, forget_last_token, repeat_a_block])
def test_a_broken_kv_cache_gives_wrong_counts(spoil: Breakage, models: dict[str, Model]) -> None:
    prompts = ["41 42 43", "7", "250 251", "600 601 602 603"]
    model = models[COUNT.name]
    wrong = [prompt for prompt in prompts if not COUNT.is_right(prompt, answer(model, COUNT, prompt, spoil, at=101))]
    assert wrong == prompts


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [forget_first_block, forget_last_token])
def test_a_broken_kv_cache_gives_wrong_words(spoil: Breakage, models: dict[str, Model]) -> None:
    task = TASKS["demo-reverse"]
    prompts = ["stressed", "drawer", "hello", "live"]
    wrong = [p for p in prompts if not task.is_right(p, answer(models[task.name], task, p, spoil, at=1))]
    assert wrong == prompts
