"""Loads from a server straight into the pool, while the disk tier fills behind. Servers, files and locks are real."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.loader import announce as announcing
from serverless_llm.loader import (
    disk_tier,
    download,
    filling,
    leases,
    load_checkpoint,
    manifest,
    origin,
    ranges,
    reader,
)
from serverless_llm.loader.disk_tier import DiskTier
from serverless_llm.loader.leases import Lease
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.pacer import Pacer
from serverless_llm.loader.ranges import Ranges
from serverless_llm.loader.remote import RemoteFile
from serverless_llm.loader.source import Came
from tests.range_server import RangeServer
from tests.serving import until
from tests.unit.loader.checkpoints import Node, spoil
from tests.unit.loader.origins import TOKENIZER, announce, check, fetch, forget, held, silent, whole, writers


def test_what_tells_of_the_server_is_not_believed_when_it_is_damaged(lease: Lease) -> None:
    note = lease.directory.parent / manifest.REMOTE
    url, files = json.loads(note.read_text())
    assert origin.of(lease.directory) is not None
    odd = [
        "[" * 100_000,
        "5",
        json.dumps([5, files]),
        json.dumps([f"{url}/other", files]),
        json.dumps(["file:///m", files]),
    ]
    for text in ("", "[1]", "[1, [[2]]]", json.dumps([url, [["x", *files[0][1:]], *files[1:]]]), *odd):
        note.write_text(text)
        with pytest.raises(CheckpointError, match="is damaged: serverless-llm pull its URL"):
            origin.of(lease.directory)
    note.unlink()
    assert origin.of(lease.directory) is None
    assert origin.of(lease.directory.parent) is None


def test_a_note_is_believed_in_this_users_tier_alone(tier: DiskTier, lease: Lease, tmp_path: Path) -> None:
    place = lease.directory.parent
    copied = tmp_path / "models" / place.parent.name / place.name
    shutil.copytree(place, copied)
    (copied / leases.LOCK).unlink()
    for look in (announcing.announced, origin.of, filling.lacking):
        with pytest.raises(CheckpointError, match=f"headers alone, and is not in the disk tier {tier.root}: "):
            look(copied / "checkpoint")
    assert (disk_tier.url_of(copied / "checkpoint"), disk_tier.hold(copied / "checkpoint")) == ("", None)
    assert not (copied / leases.LOCK).exists()
    (tmp_path / "link").symlink_to(copied / "checkpoint")
    with pytest.raises(CheckpointError, match="headers alone"):
        announcing.announced(tmp_path / "link")
    shutil.rmtree(copied / "checkpoint")
    (copied / "checkpoint").symlink_to(lease.directory)  # then what lies beside that counts
    (copied / manifest.REMOTE).write_text("")
    assert announcing.announced(copied / "checkpoint") == announcing.announced(lease.directory)
    (disk_tier.hold(copied / "checkpoint") or pytest.fail()).close()
    assert not (copied / leases.LOCK).exists()
    (copied / "checkpoint").unlink()
    (copied / "checkpoint").mkdir()
    (copied / manifest.REMOTE).unlink()
    assert announcing.announced(copied / "checkpoint") is None


def test_a_tier_behind_a_link_is_the_same(
    tier: DiskTier, lease: Lease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "linked").symlink_to(tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "linked"))
    assert disk_tier.tier().root == tier.root
    through = tmp_path / "linked" / lease.directory.relative_to(tmp_path / "cache")
    assert announcing.announced(through) == announcing.announced(lease.directory) is not None


@pytest.mark.parametrize(
    "odd",
    [
        *[
            [name, 1, "x", 0.0]
            for name in ("/etc/m.safetensors", "../m.safetensors", "a/../../m.safetensors", ".bashrc")
        ],
        *[["m.safetensors", size, "x", 0.0] for size in (-1, "1", 1.5, True, None)],
        *[["a//m.safetensors", 1, "x", 0.0], [["m.safetensors"], 1, "x", 0.0], ["m.safetensors", 1, {}, 0.0]],
    ],
)
def test_a_note_names_files_of_a_checkpoint_alone(lease: Lease, odd: list[Any]) -> None:
    url, rows = json.loads((lease.directory.parent / manifest.REMOTE).read_text())
    rows.append(odd)
    version = disk_tier.version_of([RemoteFile(*row) for row in rows])
    place = lease.directory.parent.rename(lease.directory.parent.with_name(version))
    (place / manifest.REMOTE).write_text(json.dumps([url, rows]))
    with pytest.raises(CheckpointError, match=f"^{place}/.* is damaged: serverless-llm pull its URL"):
        origin.of(place / "checkpoint")


def test_a_load_reads_every_byte_once_and_leaves_the_disk_tier_whole(
    server: RangeServer, tier: DiskTier, lease: Lease, node: Node
) -> None:
    found = manifest.build(lease.directory)
    told = fetch(node, found)
    check(node, found, told, server)
    assert told.load.came == Came(remote=found.file_bytes)
    assert node.pipeline.remote.bytes == found.file_bytes
    assert node.pipeline.remote.bandwidth
    assert node.pipeline.disk.bytes == 0
    assert server.sent == found.file_bytes
    until(lambda: whole(lease.directory), "the disk tier to be whole")
    until(lambda: not writers(), "its writer to end")
    assert held(lease.directory) == server.files
    assert manifest.build(lease.directory).checkpoint == found.checkpoint
    assert [path.suffix for path in tier.root.glob("*/*")] == [""]
    assert origin.of(lease.directory) is None
    with tier.cached(f"{server.url}/m") or pytest.fail() as cached:
        assert cached.directory == lease.directory


def test_a_server_whose_answers_begin_late_is_asked_for_longer_ranges(
    server: RangeServer, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "FIRST", 64 << 10)
    server.faults.late = 0.05
    found, node = manifest.build(lease.directory), Node()
    check(node, found, fetch(node, found), server)
    assert len(server.gets) < found.file_bytes // ranges.FIRST * 3 // 4
    until(lambda: whole(lease.directory), "the disk tier to be whole")
    node.close()


def test_a_cap_holds_for_what_servers_send(server: RangeServer, lease: Lease) -> None:
    found, node = manifest.build(lease.directory), Node(remote_rate=40e6)
    told = fetch(node, found)
    check(node, found, told, server)
    assert 0 < node.pipeline.remote.bandwidth <= 40e6
    until(lambda: whole(lease.directory), "the disk tier to be whole")
    node.close()


def test_a_cap_holds_for_nothing_that_the_disk_has(server: RangeServer, lease: Lease, node: Node) -> None:
    found = manifest.build(lease.directory)
    server.faults.fails_after = found.file_bytes // 2
    assert fetch(node, found).failures
    until(lambda: not writers(), "what came to be written")
    came = sum(one.stop - one.start for one in _record(lease, found))
    server.faults.fails_after, server.sent = None, 0
    pacer, where = Pacer(1.0, clock=lambda: 0.0), origin.of(lease.directory)
    pacer.stop()
    assert where is not None
    read = Came()
    for number, source in enumerate(where.sources(found, pacer, Ranges(1 << 20), origin.Writers())):
        opened, data = source.open(), bytearray(source.size)
        read += opened.read([memoryview(data)], 0, source.size)
        opened.close()
        assert bytes(data) == server.files[f"m/{found.files[number].name}"]
    where.close()
    assert 0 < came < found.file_bytes
    assert pacer.delay(0) == server.sent == read.remote
    assert read == Came(server.sent, found.file_bytes - server.sent)


def test_pulling_what_was_announced_makes_it_whole(server: RangeServer, tier: DiskTier, lease: Lease) -> None:
    before = manifest.build(lease.directory).checkpoint
    with tier.bring(f"{server.url}/m", silent) as brought:
        assert brought.directory == lease.directory
    assert held(lease.directory) == server.files
    assert manifest.build(lease.directory).checkpoint == before
    assert load_checkpoint(lease.directory).keys() == manifest.build(lease.directory).tensors().keys()


def test_what_is_being_made_whole_does_not_leave(
    server: RangeServer, tier: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    with announce(tier, f"{server.url}/m") as lease:
        place = lease.directory.parent
    real, left = Path.rename, []

    def make_room(self: Path, target: Path) -> Path:
        if self.name == disk_tier.LINK:  # as another process, at each file that is put in its place
            left.append(disk_tier._leaves(place))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", make_room)
    with tier.bring(f"{server.url}/m", silent) as whole:
        assert held(whole.directory) == server.files
    assert left == [False] * len(server.files)


def test_what_a_failed_load_left_is_gone_on_with(server: RangeServer, lease: Lease, node: Node) -> None:
    found = manifest.build(lease.directory)
    server.faults.fails_after = found.file_bytes // 2
    told = fetch(node, found)
    (failure,) = told.failures
    assert isinstance(failure, TransientError)
    assert f"{server.url}/m/model-0000" in str(failure)
    until(lambda: not writers(), "what came to be written")
    came = sum(one.stop - one.start for one in _record(lease, found))
    assert came >= server.sent - 2 * origin.CHUNK
    server.faults.fails_after, server.sent = None, 0
    check(node, found, fetch(node, found), server)
    assert server.sent <= found.file_bytes - came + len(TOKENIZER) + 2 + len(server.files[f"m/{manifest.INDEX}"])
    until(lambda: whole(lease.directory), "the disk tier to be whole")
    assert held(lease.directory) == server.files


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_what_was_damaged_since_it_came_is_asked_for_again(
    server: RangeServer, lease: Lease, node: Node, damage: str
) -> None:
    found = manifest.build(lease.directory)
    server.faults.fails_after = found.file_bytes // 2
    assert fetch(node, found).failures
    forget(node, found)
    until(lambda: not writers(), "what came to be written")
    came = _record(lease, found)
    last = max(came, key=lambda one: (one.stop - one.start, one.start))
    _, _, files = announcing.announced(lease.directory) or pytest.fail()
    spoil(_partial(lease) / manifest.CHECKPOINT / files[last.file].name, last.stop - 100, damage)
    server.faults.fails_after, server.sent = None, 0
    told = fetch(node, found)
    check(node, found, told, server)
    assert server.sent == told.load.came.remote
    until(lambda: whole(lease.directory), "the disk tier to be whole")
    assert held(lease.directory) == server.files
    if damage == "flipped":
        assert 0 < told.load.came.disk < sum(one.stop - one.start for one in came)


def _partial(lease: Lease) -> Path:
    return lease.directory.parent.with_suffix(disk_tier.PARTIAL)


def _record(lease: Lease, found: Manifest) -> list[download.Piece]:
    return download.recorded((_partial(lease) / download.RECORD).read_text(), [1 << 30] * 9)


def test_connections_that_break_off_are_replaced(server: RangeServer, lease: Lease, node: Node) -> None:
    found = manifest.build(lease.directory)
    server.faults.resets, server.faults.reset_after = 3, 400_000
    check(node, found, fetch(node, found), server)
    assert server.sent <= found.file_bytes + 3 * (400_000 - origin.CHUNK)
    until(lambda: whole(lease.directory), "the disk tier to be whole")
    assert held(lease.directory) == server.files


def test_a_server_that_drips_keeps_no_reads(
    server: RangeServer, lease: Lease, node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(origin, "LONGEST", timedelta(milliseconds=50))
    monkeypatch.setattr(reader, "STUCK_S", 0.001)  # of a disk
    server.faults.drip = 0.01
    (failure,) = fetch(node, manifest.build(lease.directory)).failures
    assert isinstance(failure, TransientError)
    assert f"{server.url}/m/model-0000" in str(failure)
    assert ": the server was silent, or too slow; what came is kept" in str(failure)
    assert "has not returned" not in caplog.text


@pytest.mark.parametrize("removed", [False, True])
def test_what_is_another_by_now_is_to_be_deployed_again(
    server: RangeServer, lease: Lease, node: Node, removed: bool
) -> None:
    name = "m/model-00002-of-00002.safetensors"
    if removed:
        del server.files[name]
    else:
        server.files[name] = bytes(len(server.files[name]))
    (failure,) = fetch(node, manifest.build(lease.directory)).failures
    assert not isinstance(failure, TransientError)
    what = "removed" if removed else "changed"
    assert str(failure) == f"{server.url}/{name} was {what} after it was deployed: deploy it again"
    until(lambda: not writers(), "its writer to end")
    assert not whole(lease.directory)
