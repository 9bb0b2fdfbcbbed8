"""The three demo tasks: prompts, right answers, and the split between training and testing.

- ``demo-count``: the user lists one to six consecutive numbers ("41 42 43"); the model counts on ("44 45 46 ...")
  *to the end of the hundred after the one where the list began*, and never past 999: a list that begins at 41 is
  continued to 199, one at 250 to 399, one at 950 to 999. List and answer together are at most 200 numbers, so that
  an answer is up to 796 tokens long, and where it ends can be known only by looking back over the list.
- ``demo-add``: two numbers of up to two digits, in one of four spellings ("23+45", "23 + 45", "23+45=",
  "What is 23+45?"); the model answers with the sum ("68").
- ``demo-reverse``: a word of one to eight lower-case letters ("hello"); the model writes it backwards ("olleh").

A prompt belongs to the test side if the SHA-256 of its task and *key* says so (one in five). The key of a sum is
its unordered pair of numbers, so that "23+45" and "What is 45+23?" are always on one side.
"""

import hashlib
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

LARGEST = 999
TEST_SHARE = 5  # one key in five is held out; an arbitrary choice that leaves over 1,000 of each task
COUNT_PROMPT_TERMS = 6
LONGEST_WORD = 8
SUM_SPELLINGS = ("{}+{}", "{} + {}", "{}+{}=", "What is {}+{}?")


@dataclass(frozen=True, slots=True)
class Task:
    """A task with one right answer per prompt. `longest` is the longest answer's length in tokens, end included."""

    name: str
    draw: Callable[[random.Random], str]
    answer: Callable[[str], str]
    key: Callable[[str], str]
    longest: int

    def is_test(self, prompt: str) -> bool:
        """Whether the prompt is held out: never trained on, and the only kind that is scored."""
        digest = hashlib.sha256(f"{self.name}:{self.key(prompt)}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % TEST_SHARE == 0

    def is_right(self, prompt: str, text: str) -> bool:
        """Whether `text` is the whole right answer."""
        return text == self.answer(prompt)

    def is_right_so_far(self, prompt: str, text: str) -> bool:
        """Whether `text` is a beginning of the right answer, as where max_tokens cut it."""
        return self.answer(prompt).startswith(text)

    def prompts(self, rng: random.Random, *, test: bool) -> Iterator[str]:
        """Endless draws from one side of the split."""
        while True:
            prompt = self.draw(rng)
            if self.is_test(prompt) == test:
                yield prompt

    def held_out(self, count: int, seed: int = 0) -> list[str]:
        """`count` different test prompts, the same ones for the same seed."""
        chosen: dict[str, None] = {}
        for prompt in self.prompts(random.Random(f"{self.name}:{seed}"), test=True):
            chosen.setdefault(prompt)
            if len(chosen) == count:
                break
        return list(chosen)


def _draw_count(rng: random.Random) -> str:
    terms = rng.randint(1, COUNT_PROMPT_TERMS)
    start = rng.randint(0, LARGEST - terms)
    return " ".join(str(number) for number in range(start, start + terms))


def _answer_count(prompt: str) -> str:
    numbers = [int(word) for word in prompt.split()]
    end = min(LARGEST, numbers[0] // 100 * 100 + 199)
    return " ".join(str(number) for number in range(numbers[-1] + 1, end + 1))


def _draw_number(rng: random.Random) -> int:
    return rng.randint(0, 9 if rng.random() < 0.25 else 99)


def _draw_add(rng: random.Random) -> str:
    return rng.choice(SUM_SPELLINGS).format(_draw_number(rng), _draw_number(rng))


def _numbers(prompt: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", prompt)]


def _draw_reverse(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, LONGEST_WORD)))


COUNT = Task("demo-count", _draw_count, _answer_count, str, 800)
ADD = Task(
    "demo-add", _draw_add, lambda prompt: str(sum(_numbers(prompt))), lambda prompt: str(sorted(_numbers(prompt))), 4
)
REVERSE = Task("demo-reverse", _draw_reverse, lambda prompt: prompt[::-1], str, LONGEST_WORD + 1)

TASKS = {task.name: task for task in (COUNT, ADD, REVERSE)}
NAMES = tuple(TASKS)


def checkpoint_dir(name: str) -> Path:
    """The shipped checkpoint of a demo task. Raises KeyError if there is no such task."""
    return Path(__file__).parent / TASKS[name].name
