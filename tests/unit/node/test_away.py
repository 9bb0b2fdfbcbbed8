"""What only a server has of a checkpoint, as an agent sees it. Server, files and records are real."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest

from serverless_llm.demo.tasks import ADD, checkpoint_dir
from serverless_llm.domain import ModelSpec
from serverless_llm.errors import TransientError
from serverless_llm.loader import disk_tier, download, filling, manifest
from serverless_llm.loader.announce import announce, announced
from serverless_llm.loader.disk_tier import PARTIAL, DiskTier
from serverless_llm.loader.leases import Lease
from serverless_llm.node import admin
from serverless_llm.node.away import Away
from tests.dead_mount import dead
from tests.range_server import RangeServer


@pytest.fixture
def tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DiskTier:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return disk_tier.tier()


@pytest.fixture
def server() -> Iterator[RangeServer]:
    with RangeServer({f"m/{path.name}": path.read_bytes() for path in checkpoint_dir(ADD.name).iterdir()}) as running:
        yield running


@pytest.fixture
def lease(server: RangeServer, tier: DiskTier) -> Iterator[Lease]:
    with announce(tier, f"{server.url}/m", quiet) as held:
        yield held


def quiet(name: str, done: int, total: int) -> None:
    """Nobody wants to know."""


def came(directory: Path, name: str, start: int, stop: int) -> None:
    """These bytes of a file are in the disk tier."""
    _, _, files = announced(directory) or pytest.fail()
    (number,) = (number for number, file in enumerate(files) if file.name == name)
    partial = directory.parent.with_name(directory.parent.name + PARTIAL)
    if not partial.exists():
        partial.mkdir()
        download.prepare(partial, files)
    data = (checkpoint_dir(ADD.name) / name).read_bytes()[start:stop]
    with (partial / manifest.CHECKPOINT / name).open("r+b") as file:
        file.seek(start)
        file.write(data)
    with (partial / download.RECORD).open("a") as record:
        record.write(download.line(download.Piece(number, start, stop, crc32(data))))


async def seen(away: Away) -> dict[str, int]:
    """After the look that is under way, or that this begins."""
    away.bytes()
    if away._look is not None:
        await away._look
    return away.bytes()


def test_less_and_less_is_away_until_the_tier_is_whole(server: RangeServer, tier: DiskTier, lease: Lease) -> None:
    async def story() -> None:
        away, directory = Away(), lease.directory
        assert await seen(away) == {}
        nbytes = manifest.build(directory).file_bytes
        away.watch("c", directory, nbytes)
        away.watch("plain", checkpoint_dir(ADD.name), 1)
        assert (away.share("c"), away.share("of no load")) == (1, 0)  # nobody has looked yet
        assert await seen(away) == {"c": nbytes, "plain": 0}
        came(directory, "config.json", 0, 2)  # no weights
        came(directory, manifest.SINGLE, 4096, 10_000)
        assert admin.footprint(ModelSpec("m", str(directory))).remote_bytes == nbytes - 5904
        assert (await seen(away))["c"] == nbytes - 5904
        assert away.share("c") == 1 - 5904 / nbytes
        tier.bring(f"{server.url}/m", quiet).close()
        assert (await seen(away))["c"] == 0
        assert away.share("c") == 0
        look = away._look
        assert await seen(away) == {"c": 0, "plain": 0}
        assert away._look is look  # nobody looks any more
        away.forget("c")
        assert await seen(away) == {"plain": 0}
        away.close()

    asyncio.run(story())


@pytest.mark.parametrize("which", ["note", "record"])
def test_what_cannot_be_read_for_a_while_is_looked_at_again(tier: DiskTier, lease: Lease, which: str) -> None:
    async def story() -> None:
        away, directory = Away(), lease.directory
        place = directory.parent
        partial = place.with_name(place.name + PARTIAL)
        read = place / manifest.REMOTE if which == "note" else partial / download.RECORD
        away.watch("c", directory, 1)
        came(directory, manifest.SINGLE, 0, 4096)
        before = await seen(away)
        came(directory, manifest.SINGLE, 4096, 8192)
        read.rename(tier.root / "aside")
        read.mkdir()  # no bytes of it can be had
        with pytest.raises(TransientError, match=f"^{read}: Is a directory$"):
            filling.lacking(directory)
        assert await seen(away) == before
        read.rmdir()
        (tier.root / "aside").rename(read)
        assert await seen(away) == {"c": before["c"] - 4096}

    asyncio.run(story())


def test_what_is_forgotten_during_a_look_stays_so(lease: Lease) -> None:
    async def story() -> None:
        away = Away()
        away.watch("c", lease.directory, 1)
        away.bytes()
        away.forget("c")
        assert await seen(away) == {}
        away.watch("c", lease.directory, 1)
        away.bytes()
        away.close()  # while it looks
        assert away._look is not None
        with pytest.raises(asyncio.CancelledError):
            await away._look

    asyncio.run(story())


def test_what_a_head_tells_of_is_believed_to_be_whole_and_nothing_else(
    server: RangeServer, tier: DiskTier, lease: Lease
) -> None:
    async def looked(away: Away, *directories: Path) -> dict[str, int]:
        away.look({str(number): str(directory) for number, directory in enumerate(directories)})
        assert away._first is not None
        await away._first
        return away.bytes()

    async def story() -> None:
        away = Away()
        damaged = tier.root / "version" / manifest.CHECKPOINT
        damaged.parent.mkdir()
        (damaged.parent / manifest.REMOTE).write_text("")
        assert await looked(away, damaged, lease.directory) == {}
        assert away._look is None  # nobody watches what no load reads
        tier.bring(f"{server.url}/m", quiet).close()
        assert await looked(away, damaged, lease.directory) == {"1": 0}

    asyncio.run(story())


def test_a_disk_that_never_answers_a_head_holds_up_no_load_and_no_end(lease: Lease) -> None:
    async def story() -> None:
        away = Away()
        with dead(lease.directory.parent / manifest.REMOTE):
            looks = []
            for name in ("plain", "again"):  # a head, and the next one
                away.look({"hung": str(lease.directory)})
                looks.append(away._first or pytest.fail())
                away.watch(name, checkpoint_dir(ADD.name), 1)
                assert (await seen(away))[name] == 0
            away.close()
            assert [type(one) for one in await asyncio.gather(*looks, return_exceptions=True)] == [
                asyncio.CancelledError
            ] * 2

    asyncio.run(story())


def test_a_damaged_note_is_told_once_and_not_believed(lease: Lease, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        away = Away()
        away.watch("c", lease.directory, 1)
        (lease.directory.parent / manifest.REMOTE).write_text("")
        assert await seen(away) == await seen(away) == {}

    with caplog.at_level(logging.WARNING):
        asyncio.run(story())
    (said,) = (one for one in caplog.messages if "is damaged" in one)
    assert said.endswith("serverless-llm pull its URL")
