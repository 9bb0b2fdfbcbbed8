import random

import pytest

from serverless_llm.demo.examples import IGNORED, WARM, WINDOW, batch
from serverless_llm.demo.tasks import COUNT, NAMES, TASKS, Task
from serverless_llm.demo.tokenizer import ASSISTANT, END, chat_tokens


def prompts_of(rows: list[list[int]]) -> list[str]:
    return [bytes(row[1 : row.index(END)]).decode() for row in rows]


@pytest.mark.parametrize("task", TASKS.values(), ids=NAMES)
def test_whole_examples_teach_the_answer_and_its_end_on_the_training_side(task: Task) -> None:
    tokens, positions, labels = (field.tolist() for field in batch(task, random.Random(0), 64, whole=True))
    for prompt, row, places, wanted in zip(prompts_of(tokens), tokens, positions, labels, strict=True):
        assert not task.is_test(prompt)
        answer = [*task.answer(prompt).encode(), END]
        asked = chat_tokens(prompt)
        length = len(asked) + len(answer) - 1
        assert row[:length] == asked + answer[:-1]
        assert places[:length] == list(range(length))
        assert [label for label in wanted if label != IGNORED] == answer
        assert wanted[row.index(ASSISTANT)] == answer[0]


def test_windows_are_pieces_of_whole_examples() -> None:
    tokens, positions, labels = (field.tolist() for field in batch(COUNT, random.Random(0), 256, whole=False))
    ends = 0
    for prompt, row, places, wanted in zip(prompts_of(tokens), tokens, positions, labels, strict=True):
        whole = [*chat_tokens(prompt), *COUNT.answer(prompt).encode(), END]
        length = len([place for place in places if place]) + 1
        assert length <= len(chat_tokens(prompt)) + WINDOW
        assert row[:length] == [whole[place] for place in places[:length]]
        taught = [index for index in range(length) if wanted[index] != IGNORED]
        assert [wanted[index] for index in taught] == [whole[places[index] + 1] for index in taught]
        assert len(taught) >= 1
        first_gap = next((i for i in range(1, length) if places[i] != places[i - 1] + 1), None)
        assert first_gap is None or taught[0] == first_gap + WARM
        ends += wanted[taught[-1]] == END
    assert 40 < ends < 220
