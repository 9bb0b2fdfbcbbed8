"""The shipped checkpoints answer held-out prompts right, and stop doing so when their KV cache is broken."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from serverless_llm.demo.tasks import COUNT, NAMES, TASKS, Task, checkpoint_dir
from serverless_llm.demo.tokenizer import (
    END,
    VOCABULARY,
    chat_text,
    chat_tokens,
    tokenizer_config_json,
    tokenizer_json,
)

ALL = pytest.mark.parametrize("task", TASKS.values(), ids=NAMES)
BLOCK = 16  # tokens of a KV block
Model = Any  # a transformers causal model
Cache = Any
Breakage = Callable[[torch.Tensor], None]  # spoils keys or values [batch, heads, tokens, head] in place

FRIENDLY = {
    "demo-count": ["1 2 3", "7", "998"],
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
def answer(model: Model, task: Task, prompt: str) -> str:
    """The greedy answer, token by token through the KV cache."""
    tokenizer = Tokenizer.from_file(str(checkpoint_dir(task.name) / "tokenizer.json"))
    step = model(input_ids=torch.tensor([tokenizer.encode(chat_text(prompt)).ids]), use_cache=True)
    made: list[int] = []
    while len(made) < task.longest:
        made.append(int(step.logits[0, -1].argmax()))
        if made[-1] == END:
            break
        step = model(input_ids=torch.tensor([made[-1:]]), past_key_values=step.past_key_values, use_cache=True)
    text: str = tokenizer.decode(made)
    return text


@torch.no_grad()
def goes_on_right(model: Model, task: Task, prompt: str, at: int, spoil: Breakage) -> bool:
    """Whether the answer stays right to its end when all keys and values are spoiled after `at` of its tokens.

    Greedy decoding goes wrong where the likeliest token first differs, which one pass over the right answer shows.
    """
    tokens = [*chat_tokens(prompt), *task.answer(prompt).encode(), END]
    now = len(chat_tokens(prompt)) + at
    cache = model(input_ids=torch.tensor([tokens[:now]]), use_cache=True).past_key_values
    for layer in cache.layers:
        spoil(layer.keys)
        spoil(layer.values)
    rest = model(input_ids=torch.tensor([tokens[now:-1]]), past_key_values=cache).logits[0].argmax(-1)
    return bool(rest.tolist() == tokens[now + 1 :])


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
    assert {value.dtype for value in load_file(files["model.safetensors"]).values()} == {torch.float32}


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
    prompts = task.held_out(2 if task is COUNT else 30, seed=5)
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


def keep(values: torch.Tensor) -> None:
    del values


def forget_first_block(values: torch.Tensor) -> None:
    values[:, :, :BLOCK] = 0


def forget_last_block(values: torch.Tensor) -> None:
    values[:, :, -BLOCK:] = 0


def forget_history(values: torch.Tensor) -> None:
    values[:, :, :-BLOCK] = 0


def repeat_a_block(values: torch.Tensor) -> None:
    values[:, :, -BLOCK:] = values[:, :, -2 * BLOCK : -BLOCK].clone()


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [keep, forget_last_block, forget_history, repeat_a_block])
def test_a_broken_kv_cache_gives_wrong_counts(spoil: Breakage, models: dict[str, Model]) -> None:
    prompts = ["41 42 43", "7", "250 251", "600 601 602 603"]
    right = {prompt: goes_on_right(models[COUNT.name], COUNT, prompt, 300, spoil) for prompt in prompts}
    assert right == dict.fromkeys(prompts, spoil is keep)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [keep, forget_first_block])
def test_a_broken_kv_cache_gives_wrong_words(spoil: Breakage, models: dict[str, Model]) -> None:
    task = TASKS["demo-reverse"]
    prompts = ["stressed", "drawer", "hello", "live"]
    right = {prompt: goes_on_right(models[task.name], task, prompt, 1, spoil) for prompt in prompts}
    assert right == dict.fromkeys(prompts, spoil is keep)
