"""The pool of text processes: real ones, with checkpoints that mean harm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from serverless_llm.demo.tokenizer import chat_tokens, tokenizer_json
from serverless_llm.errors import RequestError
from serverless_llm.gateway import text
from serverless_llm.gateway.text import TextLimits, TextPool
from serverless_llm.gateway.text_process import TextCache
from serverless_llm.gateway.text_wire import Call
from tests.unit.gateway.texts import ENDLESS, chat, checkpoint, hasty, ids

pytestmark = pytest.mark.slow

HUNGRY = "{{ ('x' * 1000000000) | length }}"


def test_many_calls_share_few_processes_and_one_table(tmp_path: Path) -> None:
    async def main() -> None:
        pool = TextPool(2)
        await pool.start()
        call = chat(checkpoint(tmp_path / "a"))
        before = set(pool.pids)
        prompts = await asyncio.gather(*(pool.prompt(call) for _ in range(20)))
        again = await pool.prompt(call)
        assert all(array("i", prompt.ids).tolist() == chat_tokens("Hi") for prompt in prompts)
        assert again.vocabulary is prompts[-1].vocabulary
        assert set(pool.pids) == before
        await pool.close()

    asyncio.run(main())


@pytest.mark.parametrize("template", [ENDLESS, HUNGRY], ids=["endless", "hungry"])
def test_a_hostile_template_fails_its_own_request_only(tmp_path: Path, template: str) -> None:
    async def main() -> None:
        pool = TextPool(1, TextLimits(memory=600 << 20))
        await pool.start()
        bad, good = chat(checkpoint(tmp_path / "bad", template)), chat(checkpoint(tmp_path / "good"))
        with hasty(pool) if template == ENDLESS else contextlib.nullcontext():
            failing = asyncio.create_task(pool.prompt(bad))
            await asyncio.sleep(0)  # it has begun
        answers = await asyncio.gather(failing, ids(pool, good), return_exceptions=True)
        assert isinstance(answers[0], RequestError)
        assert answers[0].status == 500
        assert "'demo'" in answers[0].message
        assert "template" in answers[0].message
        assert answers[1] == chat_tokens("Hi")
        await pool.close()

    asyncio.run(main())


def test_a_hostile_template_takes_one_process_only(tmp_path: Path) -> None:
    async def main() -> None:
        pool = TextPool(2, TextLimits(seconds=3.0))
        await pool.start()
        bad, good = chat(checkpoint(tmp_path / "bad", ENDLESS)), chat(checkpoint(tmp_path / "good"))
        ended = 0

        async def fail() -> None:
            nonlocal ended
            with pytest.raises(RequestError) as failed:
                await pool.prompt(bad)
            ended += failed.value.status == 500  # the others are refused without trying

        running = [asyncio.create_task(fail()) for _ in range(6)]
        await asyncio.sleep(0)  # all of them wait before it
        assert await ids(pool, good) == chat_tokens("Hi")
        assert ended <= 3  # the first two, and one beside which it ran
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert await ids(pool, good) == chat_tokens("Hi")
        await pool.close()

    asyncio.run(main())


def test_several_hostile_templates_together_take_one_process_only(tmp_path: Path) -> None:
    async def main() -> None:
        pool = TextPool(2)
        await pool.start()
        bad = [chat(checkpoint(tmp_path / name, ENDLESS)) for name in ("one", "other")]
        good = chat(checkpoint(tmp_path / "good"))
        with hasty(pool):
            await asyncio.gather(*(pool.prompt(call) for call in bad), return_exceptions=True)
        await asyncio.gather(*pool._tasks)  # both processes are there again
        running = [asyncio.create_task(pool.prompt(call)) for call in bad]
        await asyncio.sleep(0)  # both of them wait before it
        assert await ids(pool, good) == chat_tokens("Hi")
        assert not any(task.done() for task in running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await pool.close()

    asyncio.run(main())


ON_DEMAND = "{% if messages[0].content == 'end' %}" + ENDLESS + "{% endif %}"


def test_a_template_that_ends_processes_now_and_then_is_refused_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good answers in between do not help it; nobody else notices."""

    async def main() -> None:
        pool = TextPool(2)
        await pool.start()
        hostile, good = checkpoint(tmp_path / "hostile", ON_DEMAND), chat(checkpoint(tmp_path / "good"))
        statuses = []
        for content in ["end", "Hi"] * 3:
            try:
                with hasty(pool) if content == "end" else contextlib.nullcontext():
                    await pool.prompt(chat(hostile, content))
            except RequestError as error:
                statuses.append((error.status, error.code))
            assert await ids(pool, good) == chat_tokens("Hi")
        assert statuses == [(500, "engine_error")] * 3 + [(503, "overloaded")]
        before = set(pool.pids)
        with pytest.raises(RequestError, match="ended 3 text processes") as refused:
            await pool.prompt(chat(hostile, "end"))
        assert 0 < (refused.value.retry_after or 0) <= text.REFUSED
        assert set(pool.pids) == before
        monkeypatch.setattr(text, "_now", lambda: asyncio.get_running_loop().time() + text.REFUSED)
        await pool.prompt(chat(hostile, "Hi"))
        with pytest.raises(RequestError, match="limits"), hasty(pool):
            await pool.prompt(chat(hostile, "end"))
        with pytest.raises(RequestError, match="ended 4 text processes") as refused:
            await pool.prompt(chat(hostile, "Hi"))
        assert text.REFUSED < (refused.value.retry_after or 0) <= 2 * text.REFUSED
        later = text.REFUSED * 3 + text.FORGOTTEN
        monkeypatch.setattr(text, "_now", lambda: asyncio.get_running_loop().time() + later)
        await pool.prompt(chat(hostile, "Hi"))
        assert not pool._suspects
        await asyncio.gather(*pool._tasks)
        await pool.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "template",
    ["{{ '\\ud800' }}", "{{ raise_exception('\\ud800') }}", "{{ raise_exception('x' * 30000000) }}"],
    ids=["prompt", "message", "long message"],
)
def test_text_that_no_frame_takes_is_refused(tmp_path: Path, template: str) -> None:
    async def main() -> None:
        pool = TextPool(1)
        await pool.start()
        before = pool.pids
        with pytest.raises(RequestError, match="chat template failed") as refused:
            await pool.prompt(chat(checkpoint(tmp_path / "bad", template)))
        assert (refused.value.status, refused.value.param) == (400, "messages")
        assert len(refused.value.message) < 3000
        assert pool.pids == before
        await pool.close()

    asyncio.run(main())


def test_a_killed_process_is_replaced(tmp_path: Path) -> None:
    async def main() -> None:
        pool = TextPool(1)
        await pool.start()
        (pid,) = pool.pids
        bad = chat(checkpoint(tmp_path / "bad", ENDLESS))
        running = asyncio.create_task(pool.prompt(bad))
        await asyncio.sleep(0)  # the call is on its way
        subprocess.run(["kill", "-9", str(pid)], check=True)
        with pytest.raises(RequestError):
            await running
        assert await ids(pool, chat(checkpoint(tmp_path / "good"))) == chat_tokens("Hi")
        assert pid not in pool.pids
        await pool.close()

    asyncio.run(main())


def test_who_asks_again_at_once_comes_after_all_who_wait(tmp_path: Path) -> None:
    async def main() -> None:
        pool = TextPool(1)
        await pool.start()
        call = chat(checkpoint(tmp_path / "a"))
        order = []

        async def ask(name: str, times: int) -> None:
            for _ in range(times):
                await pool.prompt(call)
                order.append(name)

        await asyncio.gather(ask("many", 4), ask("one", 1), ask("other", 1))
        assert order == ["many", "one", "other", "many", "many", "many"]
        await pool.close()

    asyncio.run(main())


def test_a_process_that_ends_while_it_has_nothing_to_do_costs_no_call(tmp_path: Path) -> None:
    async def main() -> None:
        pool = TextPool(1)
        await pool.start()
        (unused,) = pool._free
        os.kill(unused.pid, signal.SIGKILL)
        await unused._process.wait()
        assert await ids(pool, chat(checkpoint(tmp_path / "good"))) == chat_tokens("Hi")
        assert unused.pid not in pool.pids
        await pool.close()

    asyncio.run(main())


class Undying:
    """A process that a signal does not end, as one that reads from a mount which does not answer."""

    def __init__(self, process: asyncio.subprocess.Process, mount: asyncio.Event) -> None:
        self._process = process
        self._mount = mount

    def __getattr__(self, name: str) -> Any:
        return getattr(self._process, name)

    def kill(self) -> None:
        pass

    async def wait(self) -> int:
        await self._mount.wait()  # its own alarm ended it meanwhile
        return await self._process.wait()


def test_a_process_that_cannot_be_ended_takes_no_place_and_its_checkpoint_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "REAP_SECONDS", 0.01)
    start = asyncio.create_subprocess_exec

    async def main() -> None:
        mount = asyncio.Event()

        async def undying(*arguments: Any, **options: Any) -> Any:
            return Undying(await start(*arguments, **options), mount)

        monkeypatch.setattr(asyncio, "create_subprocess_exec", undying)
        pool = TextPool(1, TextLimits(seconds=3.0))
        await pool.start()
        monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
        bad, good = chat(checkpoint(tmp_path / "bad", ENDLESS)), chat(checkpoint(tmp_path / "good"))
        with pytest.raises(RequestError, match="limits"), hasty(pool):
            await pool.prompt(bad)
        async with asyncio.timeout(10):
            assert await ids(pool, good) == chat_tokens("Hi")
        for _ in range(5):
            with pytest.raises(RequestError, match="does not answer") as refused:
                await pool.prompt(bad)
            told = refused.value
            assert (told.status, told.code, told.retry_after) == (503, "overloaded", text.REFUSED)
        mount.set()
        (waiting,) = pool._tasks
        await waiting
        monkeypatch.setattr(text, "REAP_SECONDS", 60.0)  # the others do go
        with pytest.raises(RequestError, match="limits"), hasty(pool):
            await pool.prompt(bad)
        await pool.close()

    asyncio.run(main())


def test_a_process_that_does_not_start_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, python = tmp_path / "tried", tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ -e {tried} ] || {{ : > {tried}; exit 1; }}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)

    async def main() -> None:
        pool = TextPool(1)
        await pool.start()
        monkeypatch.setattr(sys, "executable", str(python))
        subprocess.run(["kill", "-9", *map(str, pool.pids)], check=True)
        good = chat(checkpoint(tmp_path / "good"))
        with pytest.raises(RequestError):
            await pool.prompt(good)
        assert await ids(pool, good) == chat_tokens("Hi")
        assert tried.exists()
        assert len(pool.pids) == 1
        await pool.close()

    asyncio.run(main())


def test_a_process_that_is_never_ready_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 100\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(text, "START_SECONDS", 0.05)

    async def main() -> None:
        pool = TextPool(1)
        with pytest.raises(TimeoutError):
            await pool.start()
        assert pool.pids == []
        await pool.close()

    asyncio.run(main())


def test_what_cannot_be_sent_costs_no_process(tmp_path: Path) -> None:
    async def main() -> None:
        pool = TextPool(1)
        await pool.start()
        before = pool.pids
        good = chat(checkpoint(tmp_path / "good"))
        with pytest.raises(OverflowError):
            await pool.prompt(msgspec.structs.replace(good, variables={"a": 2**64}))
        assert await ids(pool, good) == chat_tokens("Hi")
        assert pool.pids == before
        await pool.close()

    asyncio.run(main())


def test_a_cancelled_call_leaves_no_answer_for_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        pool = TextPool(1)
        await pool.start()
        good = checkpoint(tmp_path / "good")
        first = asyncio.create_task(pool.prompt(chat(good, "first")))
        waiting = asyncio.create_task(pool.prompt(chat(good, "waiting")))
        last = asyncio.create_task(ids(pool, chat(good, "last")))
        await asyncio.sleep(0)
        first.cancel()
        waiting.cancel()
        assert await last == chat_tokens("last")
        await pool.close()

    asyncio.run(main())


def test_a_decoder_without_a_table(tmp_path: Path) -> None:
    async def main() -> None:
        pool = TextPool(1, TextLimits(tables=1))
        await pool.start()
        odd = {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteLevel", **dict.fromkeys(("trim_offsets", "use_regex"), True), "add_prefix_space": True}
            ],
        }
        first = await pool.prompt(chat(checkpoint(tmp_path / "odd", decoder=odd)))
        detokeniser = first.vocabulary.detokeniser()
        assert detokeniser.feed([*"é".encode()]) + detokeniser.finish() == "é"
        await pool.prompt(chat(checkpoint(tmp_path / "other")))  # over the budget of tables: the first one leaves
        assert (await pool.prompt(chat(tmp_path / "odd"))).vocabulary is not first.vocabulary
        await pool.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "contents", "status"),
    [
        ("tokenizer.json", "{}", 500),
        ("tokenizer.json", "nonsense", 500),
        ("tokenizer_config.json", "nonsense", 500),
        ("chat_template.jinja", "{% if %}", 400),
    ],
)
def test_a_broken_file_is_named_with_its_model(tmp_path: Path, name: str, contents: str, status: int) -> None:
    async def main() -> None:
        pool = TextPool(1)
        await pool.start()
        directory = checkpoint(tmp_path / "broken")
        (directory / name).write_text(contents)
        with pytest.raises(RequestError, match="model 'demo'") as caught:
            await pool.prompt(chat(directory))
        assert caught.value.status == status
        await pool.close()

    asyncio.run(main())


NESTED = "{% if 1 %}" * 5000
DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize(
    ("name", "contents", "says"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{}", "broken/tokenizer.json cannot be used"),
        ("tokenizer.json", json.dumps(tokenizer_json() | {"decoder": DOUBLING}), "decoder is not supported"),
        ("tokenizer_config.json", "nonsense", "cannot be used"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "cannot be used"),
        ("chat_template.jinja", "{% if %}", "template does not compile"),
        ("chat_template.jinja", NESTED, "template does not compile"),
    ],
    ids=["missing", "no json", "decoder", "settings", "tokens", "template", "nested"],
)
def test_what_no_request_could_use_is_found_by_the_check(
    tmp_path: Path, name: str, contents: str | None, says: str
) -> None:
    async def main() -> None:
        pool = TextPool(1)
        await pool.start()
        directory = checkpoint(tmp_path / "broken")
        assert await pool.check("demo", str(directory), "whole")  # it has a chat template
        (directory / name).unlink(missing_ok=True)
        if contents is not None:
            (directory / name).write_text(contents)
        with pytest.raises(RequestError, match=f"model 'demo'.*{says}") as refused:
            await pool.check("demo", str(directory), "broken")
        assert (refused.value.status, refused.value.code, refused.value.param) == (400, "invalid_checkpoint", "source")
        await pool.close()

    asyncio.run(main())


def test_a_checked_checkpoint_needs_no_template_and_is_ready_for_its_first_request(tmp_path: Path) -> None:
    async def main() -> None:
        pool = TextPool(1)
        await pool.start()
        directory = checkpoint(tmp_path / "plain")
        (directory / "tokenizer_config.json").write_text("{}")
        assert not await pool.check("demo", str(directory), "c")
        (known,) = pool._vocabularies.values()
        assert (await pool.prompt(Call("demo", str(directory), "c", text="Hi"))).vocabulary is known
        await pool.close()

    asyncio.run(main())


def test_a_checkpoint_that_ends_text_processes_is_not_checked_for_ever(tmp_path: Path) -> None:
    async def main() -> None:
        pool = TextPool(1, TextLimits(seconds=0.05))
        await pool.start()
        directory = checkpoint(tmp_path / "endless", "{{ 9 ** (9 ** 9) }}")  # worked out as it is compiled
        statuses = []
        for _ in range(4):
            with pytest.raises(RequestError) as refused:
                await pool.check("demo", str(directory), "c")
            statuses.append(refused.value.status)
        assert statuses == [400, 400, 400, 503]
        await pool.close()

    asyncio.run(main())


def test_processes_end_with_the_pool_and_with_their_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serverless_llm.gateway.text_process", "5", str(4 << 30), "1000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0


def test_a_text_process_imports_little() -> None:
    script = "import sys, serverless_llm.gateway.text_process; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "aiohttp", "asyncio", "transformers"} & set(output.stdout.split())


def test_the_cache_keeps_the_newest(tmp_path: Path) -> None:
    cache = TextCache(limit=1)
    first = cache.get(str(checkpoint(tmp_path / "a")), "c")
    assert cache.get(str(tmp_path / "a"), "c") is first
    cache.get(str(checkpoint(tmp_path / "b")), "c")
    assert cache.get(str(tmp_path / "a"), "c") is not first
    large = TextCache(limit=1 << 30)
    assert large.get(str(tmp_path / "a"), "old") is not large.get(str(tmp_path / "a"), "new")


@pytest.mark.parametrize("turns", range(12))  # of the loop; each finds the beginnings at another place
def test_a_pool_that_is_closed_while_it_begins_leaves_nothing_open(turns: int) -> None:
    """As that of a server which finds at once that it cannot serve: its loop must close, or that is what it says."""

    async def main() -> None:
        pool = TextPool()
        starting = asyncio.ensure_future(pool.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await pool.close()

    uvloop.run(main())
