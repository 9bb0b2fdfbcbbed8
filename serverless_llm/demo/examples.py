"""Examples of the demo tasks as tensors: token ids, positions and labels; training batches, which never hold a test
prompt, and whole examples of given prompts.
"""

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


def whole_row(task: tasks.Task, prompt: str) -> Row:
    """A prompt with its whole right answer: every answer token is a label, the end marker included."""
    asked, answer = chat_tokens(prompt), [*task.answer(prompt).encode(), END]
    tokens = asked + answer[:-1]
    return Row(tokens, list(range(len(tokens))), [IGNORED] * (len(asked) - 1) + answer)


def padded(rows: list[Row]) -> Batch:
    """The rows on top of each other, padded on the right."""
    length = max(len(row.tokens) for row in rows)

    def stacked(values: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([value + [filler] * (length - len(value)) for value in values])

    return Batch(
        stacked([row.tokens for row in rows], END),
        stacked([row.positions for row in rows], 0),
        stacked([row.labels for row in rows], IGNORED),
    )


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
    row = whole_row(task, prompt)
    if whole or not counting:
        return row
    return _cut(row, len(chat_tokens(prompt)), _window_start(rng, task.answer(prompt)))


def batch(task: tasks.Task, rng: random.Random, rows: int, *, whole: bool) -> Batch:
    """`rows` training examples; `whole` says that counts are not cut into windows."""
    return padded([_row(task, rng, whole=whole) for _ in range(rows)])
