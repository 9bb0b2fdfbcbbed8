"""One flipped bit in each tier of a real agent: what a verified model's next start makes of it."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from serverless_llm.demo.tasks import ADD, checkpoint_dir
from serverless_llm.loader import disk_tier
from serverless_llm.loader.announce import announce
from serverless_llm.node import state
from serverless_llm.node.options import AgentOptions
from tests.integration.cluster import MIB, Cluster, agent, ended, serving
from tests.integration.test_node import PROMPT, deployed, story
from tests.range_server import RangeServer

pytestmark = pytest.mark.slow

WHOLE = checkpoint_dir(ADD.name)
TOKENS = 8
PLACE = -1001  # of a byte to be flipped, from the file's end


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of three blocks to be damaged, unlike the demo in the last bit of one weight."""
    source = Path(shutil.copytree(WHOLE, tmp_path / "source"))
    flip_on_disk(source, PLACE - 31)
    return source


def flip_on_disk(source: Path, place: int = PLACE) -> None:
    """One bit that no stamp tells of."""
    path = source / "model.safetensors"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    with path.open("r+b") as file:  # in place: a new file might be on another inode
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_in_dram(options: AgentOptions, content: bytes) -> None:
    """One bit of the pool, at the same place as on disk; `content`: of the file, from its last block on."""
    pid = state.holder(options.lock_path)
    pool = next(one for one in Path(f"/proc/{pid}/fd").iterdir() if one.stat().st_size == options.dram)
    with pool.open("r+b") as memory:
        place = memory.read(options.dram).find(content[PLACE - 64 :])
        assert place >= 0
        memory.seek(place + 64)
        (old,) = memory.read(1)
        memory.seek(place + 64)
        memory.write(bytes([old ^ 1]))


async def node_of(cluster: Cluster) -> dict[str, Any]:
    (node,) = (await cluster.gateway.ask("status"))["nodes"]
    return dict(node)


async def unloaded(cluster: Cluster, name: str = "tiny") -> None:
    await cluster.gateway.ask("unload", name)
    await cluster.gateway.seen(
        lambda devices: all(one["model"] != name for device in devices for one in device["replicas"]), "the unload"
    )


async def told(cluster: Cluster, **tally: int) -> dict[str, Any]:
    """The node, when a heartbeat has told of these."""
    async with asyncio.timeout(20):
        while not tally.items() <= (node := await node_of(cluster))["verified"].items():
            await asyncio.sleep(0.01)
    return node


@pytest.mark.parametrize(("weights", "dtype"), [("view", "auto"), ("copy", "bfloat16")], ids=["views", "converted"])
def test_a_flipped_bit_is_caught_in_each_tier_and_costs_nobody_else(
    tmp_path: Path, source: Path, weights: str, dtype: str
) -> None:
    options = agent(tmp_path, weights=weights, budget=32 * MIB)

    async def tell() -> None:
        async with serving(tmp_path, options) as cluster:
            gateway = cluster.gateway
            await deployed(cluster, WHOLE, "other", dtype=dtype)
            await deployed(cluster, source, verify="full", dtype=dtype)
            said = await gateway.generate("other", PROMPT, TOKENS)
            assert await gateway.generate("tiny", PROMPT, TOKENS) == said  # learns
            file = source / "model.safetensors"
            content, size = file.read_bytes(), file.stat().st_size

            await unloaded(cluster)
            flip_in_dram(options, content)
            assert await gateway.generate("tiny", PROMPT, TOKENS) == said

            await unloaded(cluster)
            flip_on_disk(source)
            assert await gateway.generate("tiny", PROMPT, TOKENS) == said  # from DRAM, which is whole
            await unloaded(cluster)
            flip_in_dram(options, content)
            stream = gateway.start("tiny", PROMPT, TOKENS)
            await gateway.until(lambda: stream.finish or stream.rejected, "the end")
            assert stream.rejected is not None
            assert f"{file}: bytes " in stream.rejected.message
            assert "not what they were at the first load" in stream.rejected.message
            node = await told(cluster, dram=1, disk=1)
            held = 1.25 * size if weights == "copy" else 0  # half of it on the device, compared each time, no header
            assert node["verified"]["bytes"] > 4 * size + held  # learned, compared three times, what differed once more
            assert (await gateway.ask("show", "tiny"))["state"] == "failed"

            assert await gateway.generate("other", PROMPT, TOKENS) == said
            flip_on_disk(source)  # restored
            await deployed(cluster, source, verify="full", dtype=dtype)
            assert await gateway.generate("tiny", PROMPT, TOKENS) == said

    story(tell, options)


def test_a_flipped_bit_in_the_disk_tier_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = agent(tmp_path)

    async def tell() -> None:
        with (
            RangeServer({f"m/{path.name}": path.read_bytes() for path in WHOLE.iterdir()}) as server,
            announce(disk_tier.tier(), f"{server.url}/m", lambda name, done, total: None) as lease,
        ):
            async with serving(tmp_path, options) as cluster:
                gateway, source = cluster.gateway, lease.directory
                await deployed(cluster, source, verify="full")
                said = await gateway.generate("tiny", PROMPT, TOKENS)  # from the network: learns
                async with asyncio.timeout(20):
                    while not disk_tier.is_whole(source.parent):
                        await asyncio.sleep(0.01)
                sent = server.sent
                await unloaded(cluster)
                flip_in_dram(options, (source / "model.safetensors").read_bytes())
                flip_on_disk(source)
                stream = gateway.start("tiny", PROMPT, TOKENS)
                await gateway.until(lambda: stream.finish or stream.rejected, "the end")
                assert stream.rejected is not None
                assert f"{source / 'model.safetensors'}: bytes " in stream.rejected.message
                assert "not what they were at the first load" in stream.rejected.message
                await told(cluster, disk=1)
                flip_on_disk(source)  # restored
                await deployed(cluster, source, verify="full")
                assert await gateway.generate("tiny", PROMPT, TOKENS) == said
                assert server.sent == sent

    story(tell, options)


def test_digests_outlive_the_agent_and_what_is_off_is_read_once(tmp_path: Path, source: Path) -> None:
    options, size = agent(tmp_path), (source / "model.safetensors").stat().st_size

    async def tell() -> None:
        async with serving(tmp_path, options) as cluster:
            gateway = cluster.gateway
            await deployed(cluster, source)
            said = await gateway.generate("tiny", PROMPT, TOKENS)
            assert (await node_of(cluster))["verified"].get("bytes", 0) == 0
            assert not options.digests.exists()
            await deployed(cluster, source, verify="sample")
            await unloaded(cluster)
            assert await gateway.generate("tiny", PROMPT, TOKENS) == said
            async with asyncio.timeout(20):
                while not (await node_of(cluster))["digests"]:
                    await asyncio.sleep(0.01)
            assert (await node_of(cluster))["verified"] == {"bytes": size, "device": 0, "dram": 0, "disk": 0}
            assert (await node_of(cluster))["link_bytes"]["disk"] <= size
            await cluster.abandon()
        await ended(options)
        flip_on_disk(source)
        async with serving(tmp_path, options) as cluster:
            gateway = cluster.gateway
            assert gateway.catalog.models[0].verify == "sample"
            await deployed(cluster, source, verify="full")
            stream = gateway.start("tiny", PROMPT, TOKENS)
            await gateway.until(lambda: stream.finish or stream.rejected, "the end")
            assert stream.rejected is not None
            assert "not what they were" in stream.rejected.message
            await told(cluster, disk=1)

    story(tell, options)


def test_what_passes_through_a_ring_is_verified_too(tmp_path: Path, source: Path) -> None:
    options = agent(tmp_path, weights="copy", dram=2 * MIB, budget=32 * MIB)  # less than the checkpoint

    async def tell() -> None:
        async with serving(tmp_path, options) as cluster:
            gateway = cluster.gateway
            await deployed(cluster, source, verify="full")
            said = await gateway.generate("tiny", PROMPT, TOKENS)  # learns
            await unloaded(cluster)
            assert await gateway.generate("tiny", PROMPT, TOKENS) == said
            await unloaded(cluster)
            flip_on_disk(source)
            stream = gateway.start("tiny", PROMPT, TOKENS)
            await gateway.until(lambda: stream.finish or stream.rejected, "the end")
            assert stream.rejected is not None
            assert "differ from the first load: the next start reads them again" in stream.rejected.message

    story(tell, options)
