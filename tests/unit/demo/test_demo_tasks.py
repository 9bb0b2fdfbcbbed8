import random
import subprocess
import sys
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverless_llm.demo import tasks
from serverless_llm.demo.tasks import ADD, COUNT, NAMES, REVERSE, TASKS, Task

ALL = pytest.mark.parametrize("task", TASKS.values(), ids=NAMES)


@pytest.mark.parametrize(
    ("task", "prompt", "answer"),
    [
        (COUNT, "998", "999"),
        (COUNT, "950 951", " ".join(map(str, range(952, 1000)))),
        (COUNT, "1 2 3", " ".join(map(str, range(4, 200)))),
        (COUNT, "99 100 101", " ".join(map(str, range(102, 200)))),
        (COUNT, "100", " ".join(map(str, range(101, 300)))),
        (ADD, "2+2", "4"),
        (ADD, "23 + 45", "68"),
        (ADD, "99+99=", "198"),
        (ADD, "What is 7+30?", "37"),
        (REVERSE, "cat", "tac"),
        (REVERSE, "a", "a"),
    ],
)
def test_answers(task: Task, prompt: str, answer: str) -> None:
    assert task.answer(prompt) == answer
    assert task.is_right(prompt, answer)
    assert not task.is_right(prompt, answer + " ")
    assert task.is_right_so_far(prompt, answer[:-1])
    assert not task.is_right_so_far(prompt, "x")


@given(st.integers(0, 2**32))
def test_a_count_ends_within_200_numbers_and_by_999(seed: int) -> None:
    prompt = COUNT.draw(random.Random(seed))
    numbers = [int(word) for word in f"{prompt} {COUNT.answer(prompt)}".split()]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert len(numbers) <= 200
    assert numbers[-1] == 999 or (numbers[-1] % 100 == 99 and numbers[-1] // 100 == numbers[0] // 100 + 1)


@ALL
def test_no_answer_is_empty_or_longer_than_its_task_says(task: Task) -> None:
    rng = random.Random(0)
    prompts = [task.draw(rng) for _ in range(2000)]
    assert all(0 < len(task.answer(prompt)) < task.longest for prompt in prompts)


@ALL
def test_the_sides_are_disjoint_and_one_key_in_five_is_held_out(task: Task) -> None:
    train = set(islice(task.prompts(random.Random(1), test=False), 2000))
    test = set(islice(task.prompts(random.Random(1), test=True), 2000))
    assert not train & test
    rng = random.Random(2)
    drawn = [task.draw(rng) for _ in range(4000)]
    assert 0.15 < sum(map(task.is_test, drawn)) / len(drawn) < 0.25


def test_all_spellings_of_a_sum_are_on_one_side() -> None:
    sides = {ADD.is_test(form.format(*pair)) for form in tasks.SUM_SPELLINGS for pair in ((23, 45), (45, 23))}
    assert len(sides) == 1


SPLIT = (
    ("demo-count", ["7", "1 2 3", "41 42 43", "100", "500 501", "997", "10 11"]),
    ("demo-add", ["2+2", "1+1", "23+45", "99+99", "7+30", "0+0", "50+50"]),
    ("demo-reverse", ["cat", "hello", "a", "stressed", "live", "drawer", "z"]),
)


def test_the_split_never_changes() -> None:
    sides = {name: "".join(str(int(TASKS[name].is_test(prompt))) for prompt in prompts) for name, prompts in SPLIT}
    assert sides == {"demo-count": "0000010", "demo-add": "0000001", "demo-reverse": "0100000"}


@ALL
def test_held_out_prompts_are_distinct_and_the_same_every_time(task: Task) -> None:
    prompts = task.held_out(1000)
    assert len(set(prompts)) == 1000
    assert all(map(task.is_test, prompts))
    assert prompts == task.held_out(1000)
    assert prompts[:10] == task.held_out(10)
    assert prompts != task.held_out(1000, seed=1)


def test_the_tasks_need_only_the_standard_library() -> None:
    heavy = "import sys, serverless_llm.demo.tasks; print(sorted({'torch', 'numpy', 'click'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_an_unknown_checkpoint_is_a_key_error() -> None:
    assert tasks.checkpoint_dir("demo-add").name == "demo-add"
    with pytest.raises(KeyError):
        tasks.checkpoint_dir("demo-divide")
