"""Links and workers that fail below a head: streams go on with the tokens that they would have had."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.node import state
from tests.dead_mount import dead
from tests.integration.cluster import Cluster, agent, serving
from tests.integration.test_node import LONG, PROMPT, checkpoint, deployed, midstream, speaking, story

__all__ = ["checkpoint"]  # a fixture
pytestmark = pytest.mark.slow


class Wire:
    """A TCP proxy between agents and their head, that a test cuts, holds, or damages."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open = asyncio.Event()
        self._open.set()
        self._left: int | None = None  # bytes that still pass towards the head before the cut
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.links = 0

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.links += 1
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers |= {writer, back}
        ways = self._pump(reader, back, True), self._pump(there, writer)
        pumps = [asyncio.ensure_future(way) for way in ways]
        self._pumps |= set(pumps)
        await asyncio.gather(*pumps, return_exceptions=True)
        for one in (writer, back):
            one.close()
            self._writers.discard(one)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upwards: bool = False) -> None:
        while data := await reader.read(1 << 16):
            await self._open.wait()
            if upwards and self._left is not None:
                data, self._left = data[: self._left], self._left - len(data)
                writer.write(data)
                if self._left <= 0:
                    self._left = None
                    await writer.drain()
                    self.cut()
                    return
            else:
                writer.write(data)
            await writer.drain()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def cut_after(self, count: int) -> None:
        """Cuts the link when this many more bytes went towards the head."""
        self._left = count

    def hold(self) -> None:
        """Nothing arrives any more, and nobody is told: the link is half-open."""
        self._open.clear()

    def release(self) -> None:
        """All that was held arrives now."""
        self._open.set()

    def close(self) -> None:
        self.cut()
        for pump in self._pumps:
            pump.cancel()


@asynccontextmanager
async def through_a_wire(cluster: Cluster, directory: Path) -> AsyncIterator[Wire]:
    """Has the agent of `node0` dial anew, through the wire."""
    head = state.read_head(directory)
    assert head is not None
    wire = Wire(urllib.parse.urlsplit(head.agents).port or 0)
    server = await asyncio.start_server(wire.meet, "127.0.0.1", 0)
    cluster.head.listening(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    cluster.head.controller.peers["node0"].link.close("to be dialled anew")
    async with asyncio.timeout(10):
        while not wire.links or "node0" not in cluster.head.controller.peers:
            await asyncio.sleep(0.01)
    try:
        yield wire
    finally:
        wire.close()
        server.close()


def test_a_link_cut_in_mid_frame_costs_a_stream_nothing(tmp_path: Path, checkpoint: Path) -> None:
    options = agent(tmp_path)

    async def tell() -> None:
        async with (
            speaking(tmp_path, checkpoint, options) as (cluster, expected),
            through_a_wire(cluster, tmp_path) as wire,
        ):
            for count in (1, 7, 40):  # within a WebSocket's header, a frame's, and its body
                stream = await midstream(cluster, expected)
                links = wire.links
                wire.cut_after(count)
                assert await cluster.gateway.finished(stream) == expected
                assert wire.links > links

    story(tell, options)


@pytest.mark.storm
@pytest.mark.parametrize("seconds", [10, 30], ids=["late", "half-open"])
def test_a_link_whose_bytes_come_late_costs_a_stream_nothing(tmp_path: Path, checkpoint: Path, seconds: float) -> None:
    options = agent(tmp_path, orphan_grace=90.0)

    async def tell() -> None:
        async with (
            speaking(tmp_path, checkpoint, options) as (cluster, expected),
            through_a_wire(cluster, tmp_path) as wire,
        ):
            stream = await midstream(cluster, expected)
            wire.hold()
            await asyncio.sleep(seconds)
            assert "node0" not in cluster.head.controller.peers  # it was given up
            wire.release()
            assert await cluster.gateway.finished(stream, 60) == expected
            assert stream.attaches > 1

    story(tell, options)


STUCK = """
import importlib.abc, importlib.machinery, os, sys, time

def hang(engine):
    step = engine.Engine.step
    def hanging(self):
        try:
            os.unlink(os.environ["HANG"])
        except FileNotFoundError:
            return step(self)
        time.sleep(600)  # as a kernel that never returns
    engine.Engine.step = hanging

class Patching(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "serverless_llm.engine.engine":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), hang(module))
        return spec

if "HANG" in os.environ:
    sys.meta_path.insert(0, Patching())
"""


def test_a_step_that_hangs_costs_its_worker_and_no_stream(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stuck").mkdir()
    (tmp_path / "stuck" / "sitecustomize.py").write_text(STUCK)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'stuck'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("HANG", str(tmp_path / "hang"))
    options = agent(tmp_path, stuck_after=3.0)

    async def tell() -> None:
        async with speaking(tmp_path, checkpoint, options) as (cluster, expected):
            stream = await midstream(cluster, expected)
            (tmp_path / "hang").touch()
            assert await cluster.gateway.finished(stream) == expected
            assert stream.attaches == 2
            (device,) = await cluster.gateway.devices()
            assert device["incarnation"] == 2

    story(tell, options)


@pytest.mark.storm
@pytest.mark.parametrize("who", ["worker", "agent"])
def test_a_process_that_is_stopped_for_half_a_minute_costs_a_stream_nothing(
    tmp_path: Path, checkpoint: Path, who: str
) -> None:
    options = [agent(tmp_path, f"node{number}") for number in range(2)]

    async def tell() -> None:
        async with serving(tmp_path, *options) as cluster:
            gateway = cluster.gateway
            await gateway.seen(lambda now: len(now) == 2 and all(one["worker_pid"] for one in now), "two nodes")
            await deployed(cluster, checkpoint)
            expected = await gateway.generate("tiny", PROMPT, LONG)
            (device,) = [one for one in await gateway.devices() if one["replicas"]]
            stream = await midstream(cluster, expected)
            pid = device[f"{who}_pid"]
            os.kill(pid, signal.SIGSTOP)
            began = time.monotonic()
            try:
                if who == "agent":
                    await gateway.seen(lambda now: len(now) == 1, "the loss of its node")
                    assert time.monotonic() - began > 4
                assert await gateway.finished(stream, 29) == expected  # elsewhere, or by its next worker
                await asyncio.sleep(began + 30 - time.monotonic())
                assert psutil.pid_exists(pid) == (who == "agent")  # its agent killed the worker
            finally:
                if psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGCONT)
            await gateway.seen(lambda now: len(now) == 2 and all(one["worker_pid"] for one in now), "two nodes", 60)
            assert await gateway.generate("tiny", PROMPT, LONG) == expected

    story(tell, *options)


@pytest.mark.storm
def test_a_read_that_is_stuck_for_half_a_minute_keeps_no_other_model_waiting(tmp_path: Path, checkpoint: Path) -> None:
    names = ["hung", *(f"other{number}" for number in range(6))]
    for seed, name in enumerate(names):
        make_checkpoint("tiny-llama", tmp_path / name, dtype="float32", seed=seed)
    options = agent(tmp_path / "state")

    async def tell() -> None:
        async with serving(tmp_path / "state", options) as cluster:
            gateway = cluster.gateway
            await deployed(cluster, checkpoint)
            for name in names:
                await deployed(cluster, tmp_path / name, name)
            expected = await gateway.generate("tiny", PROMPT, 8)
            with dead(tmp_path / "hung" / "model.safetensors"):
                waiting = gateway.start("hung", PROMPT, 8)
                until = time.monotonic() + 30
                for name in names[1:]:  # each is read from the disk
                    assert len(await gateway.generate(name, PROMPT, 8)) == 8
                while time.monotonic() < until:
                    assert await gateway.generate("tiny", PROMPT, 8) == expected
                    await asyncio.sleep(0.5)
            await gateway.until(lambda: waiting.finish or waiting.rejected, "its end", 60)
            if waiting.rejected is not None:  # it may have given up; then it is worth another try
                assert waiting.rejected.status == 503
                await gateway.ask("load", "hung")
            assert len(await gateway.generate("hung", PROMPT, 8)) == 8

    story(tell, options)
