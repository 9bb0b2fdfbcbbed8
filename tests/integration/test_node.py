"""Agents, workers and the controller as real processes: what is served, and what survives which death."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.cluster import commands
from serverless_llm.domain import DeviceId, Sampling
from serverless_llm.engine.config import ModelConfig
from serverless_llm.engine.engine import Engine
from serverless_llm.engine.sequence import SequenceStart
from serverless_llm.errors import RequestError
from serverless_llm.loader import manifest
from serverless_llm.node import processes, state
from serverless_llm.node.options import AgentOptions, DeviceOptions
from tests.dead_mount import dead
from tests.integration.cluster import MIB, Cluster, Stream, agent, ended, serving

pytestmark = pytest.mark.slow

PROMPT = [1, 2, 3, 4, 5, 6, 7]
LONG = 500  # tokens; half a second and more


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_checkpoint("tiny-llama", directory, dtype="float32")
    return directory


def story(tell: Callable[[], Awaitable[None]], *agents: AgentOptions) -> None:
    """Runs a test, and ends its agents."""

    async def whole() -> None:
        try:
            await tell()
        finally:
            await ended(*agents)

    asyncio.run(whole())


async def deployed(cluster: Cluster, checkpoint: Path, name: str = "tiny", **options: Any) -> None:
    await cluster.gateway.ask("deploy", name, source=str(checkpoint), **options)


@asynccontextmanager
async def speaking(
    directory: Path, checkpoint: Path, *options: AgentOptions
) -> AsyncIterator[tuple[Cluster, list[int]]]:
    """A cluster that serves `tiny`, and what that says at length."""
    async with serving(directory, *options) as cluster:
        await deployed(cluster, checkpoint)
        yield cluster, await cluster.gateway.generate("tiny", PROMPT, LONG)


async def midstream(cluster: Cluster, expected: list[int]) -> Stream:
    """A stream that has said something and has much left to say."""
    stream = cluster.gateway.start("tiny", PROMPT, len(expected))
    await cluster.gateway.until(lambda: len(stream.log) > 8, "tokens")
    assert not stream.finish
    return stream


def alone(checkpoint: Path, prompt: list[int], max_tokens: int) -> list[int]:
    """What the engine says in this process, fed by safetensors."""
    found = manifest.build(checkpoint)
    entries = {name: (one.dtype, one.shape) for name, (_, one) in found.tensors().items()}
    engine = Engine(budget=16 * MIB)
    engine.place(1, ModelConfig.parse(found.config), entries, 0)
    engine.activate(1, load_file(checkpoint / "model.safetensors"))
    start = np.array(prompt, np.int32), np.array([], np.int32)
    engine.add(SequenceStart(1, 1, 1, *start, Sampling(temperature=0, max_tokens=max_tokens)))
    said: list[int] = []
    while engine.runnable:
        said += [token for emission in engine.step().tokens for token in emission.tokens]
    return said


def forkserver_of(agent_pid: int) -> int:
    (child,) = psutil.Process(agent_pid).children()
    return child.pid


@pytest.mark.parametrize("weights", ["view", "copy"])
def test_streams_survive_every_death_below_the_head(tmp_path: Path, checkpoint: Path, weights: str) -> None:
    options = agent(tmp_path, weights=weights, stuck_after=3.0)

    async def tell() -> None:
        async with speaking(tmp_path, checkpoint, options) as (cluster, expected):
            gateway = cluster.gateway
            assert len(expected) == LONG
            assert expected[:64] == await asyncio.to_thread(alone, checkpoint, PROMPT, 64)

            async def disturbed(pid: int, number: int) -> None:
                stream = await midstream(cluster, expected)
                os.kill(pid, number)
                assert await gateway.finished(stream) == expected
                assert stream.attaches == 2

            (device,) = await gateway.devices()
            await disturbed(device["worker_pid"], signal.SIGKILL)
            (device,) = await gateway.devices()
            assert device["incarnation"] == 2
            await disturbed(device["worker_pid"], signal.SIGSTOP)
            (device,) = await gateway.devices()
            assert device["incarnation"] == 3
            await disturbed(forkserver_of(device["agent_pid"]), signal.SIGKILL)
            await disturbed(device["agent_pid"], signal.SIGKILL)
            (after,) = await gateway.devices()
            assert after["agent_pid"] != device["agent_pid"]

    story(tell, options)


def descriptors(agent_pid: int) -> list[int]:
    """How many the agent and its forkserver hold."""
    return [psutil.Process(pid).num_fds() for pid in (agent_pid, forkserver_of(agent_pid))]


def next_worker(incarnation: int) -> Callable[[list[dict[str, Any]]], bool]:
    return lambda devices: bool(devices[0]["worker_pid"]) and devices[0]["incarnation"] > incarnation


def test_a_killed_worker_is_back_in_a_moment(tmp_path: Path) -> None:
    options = agent(tmp_path)

    async def tell() -> None:
        async with serving(tmp_path, options) as cluster:
            (device,) = await cluster.gateway.devices()
            held = descriptors(device["agent_pid"])
            took = []
            for incarnation in range(1, 6):
                (device,) = await cluster.gateway.devices()
                assert device["incarnation"] == incarnation
                began = time.monotonic()
                if incarnation < 5:
                    os.kill(device["worker_pid"], signal.SIGKILL)
                else:
                    cluster.head.controller.perform(commands.KillWorker(DeviceId("node0", 0), incarnation))
                await cluster.gateway.seen(next_worker(incarnation), "the next worker")
                took.append(time.monotonic() - began)
            assert sorted(took)[2] < 0.3, took
            assert descriptors(device["agent_pid"]) == held

    story(tell, options)


def test_a_link_that_is_cut_costs_a_stream_nothing(tmp_path: Path, checkpoint: Path) -> None:
    options = agent(tmp_path)

    async def tell() -> None:
        async with speaking(tmp_path, checkpoint, options) as (cluster, expected):
            (before,) = await cluster.gateway.devices()
            stream = await midstream(cluster, expected)
            cluster.head.controller.peers["node0"].link.close("cut by the test")
            assert await cluster.gateway.finished(stream) == expected
            (after,) = await cluster.gateway.devices()
            assert after["worker_pid"] == before["worker_pid"]
            assert after["replicas"][0]["replica"] == before["replicas"][0]["replica"]

    story(tell, options)


def test_a_new_head_adopts_what_the_old_one_left(tmp_path: Path, checkpoint: Path) -> None:
    options = agent(tmp_path)

    async def tell() -> None:
        async with speaking(tmp_path, checkpoint, options) as (cluster, expected):
            (before,) = await cluster.gateway.devices()
            await midstream(cluster, expected)  # its gateway dies with the head
        async with serving(tmp_path, options) as cluster:
            (device,) = await cluster.gateway.devices()
            assert device["worker_pid"] == before["worker_pid"]
            assert [one["replica"] for one in device["replicas"]] == [before["replicas"][0]["replica"]]
            assert await cluster.gateway.generate("tiny", PROMPT, LONG) == expected
            assert cluster.gateway.decisions == []
            await cluster.gateway.seen(lambda now: not now[0]["sequences"] and now[0]["kv_used"] == 0, "no KV in use")

    story(tell, options)


def test_an_orphan_frees_everything(tmp_path: Path) -> None:
    options = agent(tmp_path, orphan_grace=0.3)

    async def tell() -> None:
        async with serving(tmp_path, options) as cluster:
            (device,) = await cluster.gateway.devices()
            forkserver = forkserver_of(device["agent_pid"])
        async with asyncio.timeout(10):
            for pid in (device["agent_pid"], forkserver, device["worker_pid"]):
                await processes.exit_of(pid)
        assert state.holder(options.lock_path) is None

    story(tell, options)


def test_a_stopped_server_ends_its_agents(tmp_path: Path) -> None:
    options = [agent(tmp_path, f"node{number}") for number in range(2)]

    async def tell() -> None:
        async with serving(tmp_path, *options) as cluster:
            devices = await cluster.gateway.seen(
                lambda now: len(now) == 2 and all(one["worker_pid"] for one in now) and now, "two nodes"
            )
            assert (await cluster.gateway.ask("drain", "node1"))["drained"]
            assert [one["drained"] for one in (await cluster.gateway.ask("nodes"))["nodes"]] == [False, True]
            await cluster.abandon()
            await cluster.head.shut_down()
            assert not any(psutil.pid_exists(device["agent_pid"]) for device in devices if not zombie(device))
            assert [state.holder(one.lock_path) for one in options] == [None, None]

    story(tell, *options)


def zombie(device: dict[str, Any]) -> bool:
    """The agents are this test's children, which it never reaps."""
    return bool(psutil.Process(device["agent_pid"]).status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("weights", ["view", "copy"])
def test_two_devices_share_one_read_and_caps_hold(tmp_path: Path, checkpoint: Path, weights: str) -> None:
    size = (checkpoint / "model.safetensors").stat().st_size
    options = agent(tmp_path, devices=2, weights=weights, disk_rate=size / 1.0, budget=MIB)  # one replica fits

    async def tell() -> None:
        async with serving(tmp_path, options) as cluster:
            gateway = cluster.gateway
            await gateway.seen(lambda now: all(one["worker_pid"] for one in now), "two workers")
            began = time.monotonic()
            await deployed(cluster, checkpoint, min_replicas=2, max_replicas=2)
            await gateway.until(lambda: len(outcomes(cluster)) == 2, "two replicas")
            assert 0.8 < time.monotonic() - began < 3
            assert [one.phases.disk_bytes + one.phases.cache_bytes for one in outcomes(cluster)] == [size, size]
            status = await gateway.ask("status")
            devices = status["nodes"][0]["devices"]
            assert [len(device["replicas"]) for device in devices] == [1, 1]
            peer = cluster.head.controller.peers["node0"]
            await gateway.seen(lambda _: peer.resident_bytes, "a heartbeat")
            assert peer.resident_bytes == MIB  # one slot

    story(tell, options)


@pytest.mark.parametrize("budget", [16 * MIB, 0], ids=["stated", "asked"])
@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU")
def test_who_wants_a_device_that_cannot_come_up_is_told_why(tmp_path: Path, checkpoint: Path, budget: int) -> None:
    options = msgspec.structs.replace(agent(tmp_path), devices=(DeviceOptions("cuda", budget, "copy"),))

    async def tell() -> None:
        async with serving(tmp_path, options, ready=False) as cluster:
            gateway = cluster.gateway
            await deployed(cluster, checkpoint)
            stream = gateway.start("tiny", PROMPT, 5)
            await gateway.until(lambda: stream.rejected, "a refusal", 30)
            assert stream.rejected is not None
            assert stream.rejected.status == 503
            assert "node0/0 is not up (3 boots failed): " in stream.rejected.message
            assert "CUDA" in stream.rejected.message or "NVIDIA" in stream.rejected.message
            (device,) = await gateway.devices()
            assert device["failed_boots"] >= 3
            assert gateway.catalog.problems == [device["problem"]]

    story(tell, options)


def outcomes(cluster: Cluster) -> list[commands.Outcome]:
    return [one for one in cluster.gateway.decisions if isinstance(one, commands.Outcome)]


@pytest.mark.parametrize("weights", ["view", "copy"])
def test_a_load_can_be_taken_back_and_begun_anew(tmp_path: Path, checkpoint: Path, weights: str) -> None:
    size = (checkpoint / "model.safetensors").stat().st_size
    options = agent(tmp_path, weights=weights, disk_rate=size / 0.6, upload_rate=size / 0.1)

    async def tell() -> None:
        async with serving(tmp_path, options) as cluster:
            gateway = cluster.gateway
            await deployed(cluster, checkpoint)
            await gateway.ask("load", "tiny")
            await gateway.seen(lambda now: any(one["done"] for one in now[0]["replicas"]), "some bytes")
            (node,) = (await gateway.ask("nodes"))["nodes"]
            assert node["limits"] == {"disk": size / 0.6, "upload": size / 0.1}
            await gateway.ask("delete", "tiny")
            await gateway.seen(lambda now: not now[0]["replicas"], "no replica")
            await deployed(cluster, checkpoint)
            assert await gateway.generate("tiny", PROMPT, 8) == await asyncio.to_thread(alone, checkpoint, PROMPT, 8)
            await gateway.ask("delete", "tiny")
            peer = cluster.head.controller.peers["node0"]
            await gateway.seen(lambda _: not peer.resident_bytes, "an empty DRAM tier")

    story(tell, options)


def test_a_dead_mount_keeps_no_other_model_from_loading(tmp_path: Path, checkpoint: Path) -> None:
    make_checkpoint("tiny-llama", tmp_path / "hung", dtype="float32")

    async def tell() -> None:
        async with serving(tmp_path, agent(tmp_path)) as cluster:
            gateway = cluster.gateway
            await deployed(cluster, checkpoint)
            await deployed(cluster, tmp_path / "hung", "hung")
            with dead(tmp_path / "hung" / "config.json"):
                for _ in range((os.cpu_count() or 1) + 5):  # one more than an executor has threads
                    await gateway.ask("load", "hung")
                    await gateway.seen(
                        lambda now: [one["state"] for one in now[0]["replicas"]] == ["loading"], "a load"
                    )
                    await gateway.ask("unload", "hung")
                    await gateway.seen(lambda now: not now[0]["replicas"], "no load")
                async with asyncio.timeout(20):
                    await gateway.generate("tiny", PROMPT, 8)
                    await ended(agent(tmp_path))

    story(tell, agent(tmp_path))


def test_a_damaged_checkpoint_fails_alone(tmp_path: Path, checkpoint: Path) -> None:
    bad = tmp_path / "bad"
    make_checkpoint("tiny-llama", bad, dtype="float32", seed=1)
    options = agent(tmp_path / "state")

    async def tell() -> None:
        async with serving(tmp_path / "state", options) as cluster:
            gateway = cluster.gateway
            await deployed(cluster, checkpoint)
            await deployed(cluster, bad, "bad")
            (bad / "model.safetensors").write_bytes(b"gone")
            stream = gateway.start("bad", PROMPT, 8)
            await gateway.until(lambda: stream.rejected, "a refusal")
            assert stream.rejected is not None
            assert "model.safetensors" in stream.rejected.message
            assert (await gateway.ask("show", "bad"))["state"] == "failed"
            assert len(await gateway.generate("tiny", PROMPT, 8)) == 8
            with pytest.raises(RequestError, match=r"model\.safetensors"):
                await deployed(cluster, bad, "bad")

    story(tell, options)


def test_strangers_do_not_join(tmp_path: Path) -> None:
    options = agent(tmp_path)

    async def tell() -> None:
        import aiohttp

        async with serving(tmp_path, ready=False), aiohttp.ClientSession() as session:
            head = state.read_head(tmp_path)
            assert head is not None
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(f"{head.agents}/agents/connect", headers={"Authorization": "Bearer guess"})
            assert refused.value.status == 401

    story(tell, options)
