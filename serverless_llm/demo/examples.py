"""Training batches of the demo tasks: token ids, positions and labels, drawn from the training side only."""

import random
from typing import NamedTuple

import torch

from serverless_llm.demo import tasks
from serverless_llm.demo.tokenizer import END, chat_tokens

IGNORED = -100  # the label that torch's cross entropy leaves out
WINDOW = 40  # answer tokens of a count seen at once in the first phase
WARM = 9  # a window's first tokens lack their context, so that no loss is taken on them


class Batch(NamedTuple):
    """Row-padded int64 tensors, each [rows, length]; `label[i]` is the token that follows `token[i]`."""

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor


class Row(NamedTuple):
    """One example before padding: token ids, their positions and their labels, all of one length."""

    tokens: list[int]
    positions: list[int]
    labels: list[int]


def _labelled(prompt: list[int], answer: list[int]) -> Row:
    """A whole example: every answer token is a label."""
    tokens = prompt + answer[:-1]
    labels = [IGNORED] * (len(prompt) - 1) + answer
    return Row(tokens, list(range(len(tokens))), labels)


def _cut(row: Row, prompt: int, start: int) -> Row:
    """The prompt and one window of the answer at its true positions, as if the model had seen what lies between.

    Where a count stands is known from its last few tokens and where it ends from its prompt, so that a window
    teaches what the whole sequence would at a tenth of the cost.
    """
    first = prompt + start
    if start == 0:
        return Row(*(field[: prompt + WINDOW] for field in row))
    stop = first + WINDOW
    labels = row.labels[first:stop]
    labels[:WARM] = [IGNORED] * min(WARM, len(labels))
    return Row(
        row.tokens[:prompt] + row.tokens[first:stop],
        row.positions[:prompt] + row.positions[first:stop],
        [IGNORED] * prompt + labels,
    )


def _window_start(rng: random.Random, answer: str) -> int:
    """Where a window begins: often where something other than plain counting happens."""
    kind = rng.random()
    last = max(0, len(answer) + 1 - WINDOW)
    if kind < 0.4:
        return 0
    if kind < 0.55:
        return min(last, max(0, answer.find("00 ") - rng.randint(WARM + 3, WINDOW - 8)))
    if kind < 0.75:
        return max(0, len(answer) - rng.randint(WARM + 3, WINDOW - 2))
    return rng.randint(0, last)


def _count_prompt(rng: random.Random) -> str:
    """A training prompt; the few short numbers are drawn more often than their share."""
    while True:
        prompt = tasks.COUNT.draw(rng)
        if rng.random() < 0.3:
            start = rng.randint(0, rng.choice((12, 120)))
            prompt = " ".join(str(start + term) for term in range(prompt.count(" ") + 1))
        if not tasks.COUNT.is_test(prompt):
            return prompt


def _row(task: tasks.Task, rng: random.Random, *, whole: bool) -> Row:
    counting = task is tasks.COUNT
    prompt = _count_prompt(rng) if counting else next(task.prompts(rng, test=False))
    answer = task.answer(prompt)
    tokens = chat_tokens(prompt)
    row = _labelled(tokens, [*answer.encode(), END])
    return row if whole or not counting else _cut(row, len(tokens), _window_start(rng, answer))


def batch(task: tasks.Task, rng: random.Random, rows: int, *, whole: bool) -> Batch:
    """`rows` training examples, padded on the right; `whole` says that counts are not cut into windows."""
    drawn = [_row(task, rng, whole=whole) for _ in range(rows)]
    length = max(len(row.tokens) for row in drawn)

    def padded(values: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([value + [filler] * (length - len(value)) for value in values])

    return Batch(
        padded([row.tokens for row in drawn], END),
        padded([row.positions for row in drawn], 0),
        padded([row.labels for row in drawn], IGNORED),
    )
