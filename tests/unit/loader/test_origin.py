"""Loads from a server straight into the pool, while the disk tier fills behind. Servers, files and locks are real."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from serverless_llm.errors import CapacityError, CheckpointError, TransientError
from serverless_llm.loader import announce as announcing
from serverless_llm.loader import (
    behind,
    disk_tier,
    download,
    filling,
    load_checkpoint,
    load_file,
    manifest,
    origin,
    reader,
    remote,
)
from serverless_llm.loader.disk_tier import DiskTier, Lease
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.pacer import Pacer
from serverless_llm.loader.repack import repack
from serverless_llm.loader.source import Came
from serverless_llm.quantities import size
from tests.range_server import RangeServer
from tests.serving import until
from tests.unit.loader import checkpoints
from tests.unit.loader.checkpoints import Device, Node, Told

TOKENIZER = b'{"version": "1.0"}'


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY", {"max_retries": 0})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    directory = checkpoints.write(tmp_path / "m", checkpoints.random(2.5, 1), checkpoints.random(1.5, 2))
    files = {f"m/{path.name}": path.read_bytes() for path in directory.iterdir()} | {"m/tokenizer.json": TOKENIZER}
    with RangeServer(files) as running:
        yield running


@pytest.fixture
def tier(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path / "tier")


@pytest.fixture
def lease(server: RangeServer, tier: DiskTier) -> Iterator[Lease]:
    with announce(tier, f"{server.url}/m") as held:
        server.sent = 0
        server.gets.clear()
        yield held


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    until(lambda: not writers(), "what came to be written")
    node.close()


def silent(name: str, done: int, total: int) -> None:
    """Nobody wants to know."""


def announce(tier: DiskTier, url: str, *needed: str) -> Lease:
    return announcing.announce(tier, url, silent, needed)


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "behind"]


def begin(node: Node, found: Manifest) -> Told:
    told = Told()
    where = origin.of(found.directory)
    assert where is not None
    told.load = node.pipeline.load(found, 1, told.landed, told.failures.append, origin=where)
    told.load.start()
    return told


def fetch(node: Node, found: Manifest) -> Told:
    """Loads it, and ends the lease on its slots."""
    told = begin(node, found)
    while not told.over:
        node.turn()
    if told.failures:
        told.load.cancel()
    node.pipeline.release(found.checkpoint, 1)
    return told


def check(node: Node, found: Manifest, told: Told, server: RangeServer) -> None:
    assert told.failures == []
    for number, file in enumerate(found.files):
        assert node.bytes_of(told, number, file.size) == server.files[f"m/{file.name}"]


def held(directory: Path) -> dict[str, bytes]:
    return {f"m/{path.name}": path.read_bytes() for path in directory.iterdir()}


def whole(directory: Path) -> bool:
    return disk_tier.is_whole(directory.parent)


def test_an_announced_checkpoint_is_known_by_its_headers(server: RangeServer, tier: DiskTier, tmp_path: Path) -> None:
    url = f"{server.url}/m"
    with announce(tier, f"{url}/") as lease:
        assert server.sent < 4000 < sum(map(len, server.files.values()))
        found, there = manifest.build(lease.directory), manifest.build(tmp_path / "m")
        assert [file.header for file in found.files] == [file.header for file in there.files]
        assert (lease.directory / "tokenizer.json").read_bytes() == TOKENIZER
        assert tier.cached(url) is None
        with pytest.raises(CheckpointError, match="holds headers alone until its model is loaded: serverless-llm pull"):
            load_checkpoint(lease.directory)
        for refused in (
            lambda: repack(lease.directory, tmp_path / "r", 1 << 30, silent),
            lambda: load_file(lease.directory / found.files[0].name),
        ):
            with pytest.raises(CheckpointError, match="holds headers alone"):
                refused()
        server.sent = 0
        with announce(tier, url) as again:
            assert (again.directory, again.offline) == (lease.directory, "")
            assert server.sent == len(server.files[f"m/{manifest.INDEX}"])
        server.faults.statuses = dict.fromkeys(server.files, 503)
        with announce(tier, url) as offline:
            assert offline.directory == lease.directory
            assert "503" in offline.offline
        with pytest.raises(TransientError, match="503"):
            announce(DiskTier(tmp_path / "other"), url)


def test_what_cannot_be_announced(server: RangeServer, tier: DiskTier) -> None:
    with pytest.raises(CheckpointError, match="/m has no vocabulary"):
        announce(tier, f"{server.url}/m", "config.json", "vocabulary")
    assert server.gets == ["m/model.safetensors.index.json"]
    server.files["m/model-00002-of-00002.safetensors"] = b"<html>Welcome to our hotel</html>" * 100
    with pytest.raises(CheckpointError, match=r"/m/model-00002-of-00002\.safetensors: "):
        announce(tier, f"{server.url}/m")
    assert list(tier.root.glob("*/*")) == []
    server.files["m/model-00002-of-00002.safetensors"] = server.files["m/model-00001-of-00002.safetensors"]
    with pytest.raises(CheckpointError, match=r"^http[^ ]*/m: tensor '1.0' is in model-00001"):
        announce(tier, f"{server.url}/m")


def test_what_deploying_writes_is_bounded(
    server: RangeServer, tier: DiskTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, config = f"{server.url}/m", server.files["m/config.json"]
    server.files["m/config.json"] = bytes(manifest.MAX_CONFIG + 1)
    with pytest.raises(CheckpointError, match=f"{url}/config.json is larger than {manifest.MAX_CONFIG} bytes"):
        announce(tier, url)
    server.files |= {"m/config.json": config, "m/tokenizer.json": bytes(20_000)}
    with pytest.raises(CapacityError, match=f"what deploying {url} reads has .*, the disk tier 10.0 KB at most: set "):
        announce(DiskTier(tier.root, "10KB"), url)
    monkeypatch.setattr(announcing, "MAX_INDEX", 19_999)
    with pytest.raises(CheckpointError, match=f"{url}/tokenizer.json is larger than 19999 bytes"):
        announce(tier, url)
    assert not {"m/config.json", "m/tokenizer.json"} & {*server.gets}
    assert list(tier.root.glob("*/*")) == []


def test_deploying_keeps_what_came_of_its_version(server: RangeServer, tier: DiskTier) -> None:
    server.faults.fails_after = 3_000_000
    with pytest.raises(TransientError, match="500"):
        tier.bring(f"{server.url}/m", silent)
    server.faults.fails_after = None
    announce(tier, f"{server.url}/m").close()
    assert sorted(path.suffix for path in tier.root.glob("*/*")) == ["", disk_tier.PARTIAL]


def test_what_a_store_tells_digests_of_is_compared_before_it_is_used(
    server: RangeServer, tier: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.s3.items():
        monkeypatch.setenv(name, value)
    with announce(tier, "s3://bucket/m") as lease:
        assert not whole(lease.directory)
    server.faults.metadata = {"x-amz-meta-sha256": 64 * "0"}
    server.faults.etag = "2"
    with pytest.raises(CheckpointError, match="what came has another sha256"):
        announce(tier, "s3://bucket/m")


def test_what_tells_of_the_server_is_not_believed_when_it_is_damaged(lease: Lease) -> None:
    note = lease.directory.parent / manifest.REMOTE
    url, files = json.loads(note.read_text())
    assert origin.of(lease.directory) is not None
    for text in ("", "[1]", "[1, [[2]]]", json.dumps([url, [["x", *files[0][1:]], *files[1:]]])):
        note.write_text(text)
        with pytest.raises(CheckpointError, match="is damaged: serverless-llm pull its URL"):
            origin.of(lease.directory)
    note.unlink()
    assert origin.of(lease.directory) is None
    assert origin.of(lease.directory.parent) is None


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
    for number, source in enumerate(where.sources(found, pacer)):
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


def _record(lease: Lease, found: Manifest) -> list[download.Range]:
    partial = lease.directory.parent.with_suffix(disk_tier.PARTIAL)
    return download.recorded((partial / download.RECORD).read_text(), [1 << 30] * 9)


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


@pytest.mark.parametrize("obstacle", ["full", "bound", "slow", "taken"])
def test_a_disk_that_takes_nothing_fails_no_load(
    server: RangeServer,
    lease: Lease,
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    obstacle: str,
) -> None:
    found = manifest.build(lease.directory)
    partial = lease.directory.parent.with_suffix(disk_tier.PARTIAL)
    taken = -1
    if obstacle == "full":
        partial.write_text("in the way")
    elif obstacle == "bound":
        monkeypatch.setenv(disk_tier.VARIABLE, "1MB")
    elif obstacle == "slow":
        monkeypatch.setattr(behind, "WAITING", 1)
    else:
        partial.mkdir()
        taken = os.open(partial / disk_tier.LOCK, os.O_CREAT | os.O_RDWR)
        fcntl.flock(taken, fcntl.LOCK_EX)
    for _ in range(2):
        told = fetch(node, found)
        check(node, found, told, server)
        node.pipeline.forget(found.checkpoint)
        until(lambda: not writers(), "its writer to end")  # it holds the version: the next load would have none
    assert server.sent == 2 * found.file_bytes
    assert not whole(lease.directory)
    lacks = f"{server.url}/m: {size(found.file_bytes)} are not on the disk"
    lines = [record for record in caplog.records if record.getMessage().startswith(lacks)]
    assert len(lines) == {"slow": 2, "bound": 2}.get(obstacle, 0)
    if taken >= 0:
        os.close(taken)


@pytest.mark.parametrize("full", [False, True])
def test_what_does_not_reach_the_disk_is_told_with_what_brings_it(
    lease: Lease, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, full: bool
) -> None:
    found = manifest.build(lease.directory)
    url, files = announcing.announced(lease.directory) or ("", ())
    number = next(number for number, file in enumerate(files) if file.name == found.files[0].name)
    lacks = found.file_bytes
    writer = behind.Behind(filling.Filling(lease.directory, remote.Remote(url), files))
    if full:
        monkeypatch.setenv(disk_tier.VARIABLE, "1MB")
        writer.put(number, 0, memoryview(bytes(1_000_000)))  # and nothing comes after it was refused
    else:
        monkeypatch.setattr(behind, "WAITING", 1_000_000)
        writer.put(number, 0, memoryview(bytes(1_000_000)))
        writer.put(number, 1_000_000, memoryview(bytes(1_000_001)))
        lacks -= 1_000_000
    writer.close()
    until(lambda: not writers(), "its writer to end")
    lines = [record.getMessage() for record in caplog.records if "are not on the disk" in record.getMessage()]
    assert lines == [
        f"{url}: {size(lacks)} are not on the disk, which failed or was slower than the network; "
        f"the next start asks for them, and serverless-llm pull {url} brings them"
    ]
    assert filling.lacking(lease.directory) == lacks


def test_what_never_came_is_not_told_as_what_the_disk_did_not_take(
    lease: Lease, caplog: pytest.LogCaptureFixture
) -> None:
    url, files = announcing.announced(lease.directory) or ("", ())
    behind.Behind(filling.Filling(lease.directory, remote.Remote(url), files)).close()
    until(lambda: not writers(), "its writer to end")
    assert not caplog.records


def test_a_load_that_is_cancelled_waits_for_no_disk(server: RangeServer, lease: Lease, node: Node) -> None:
    found = manifest.build(lease.directory)
    partial = lease.directory.parent.with_suffix(disk_tier.PARTIAL)
    partial.mkdir()
    os.mkfifo(partial / download.RECORD)  # which nobody reads to its end while it is open here
    told = begin(node, found)
    with (partial / download.RECORD).open("w"):
        (partial / download.RECORD).unlink()
        cancelling = threading.Thread(target=told.load.cancel)
        cancelling.start()
        cancelling.join(5)
        waits = cancelling.is_alive()
    cancelling.join()
    assert not waits
    while node.pipeline._fills:
        node.turn()
    node.pipeline.release(found.checkpoint, 1)
    until(lambda: not writers(), "its writer to end")
    lock = disk_tier.lock_of(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert lock is not None
    os.close(lock)


def test_a_version_that_was_half_put_in_place_is_finished(
    server: RangeServer, tier: DiskTier, lease: Lease, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = manifest.build(lease.directory)
    real, done = Path.rename, []

    def crash(self: Path, target: Path) -> Path:
        if self.name == disk_tier.LINK:
            done.append(target)
            if len(done) == 3:
                raise OSError(5, "the process died here")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", crash)
    check(node, found, fetch(node, found), server)
    until(lambda: len(done) == 3 and not writers(), "the end of the first")
    monkeypatch.setattr(Path, "rename", real)
    assert not whole(lease.directory)
    assert manifest.build(lease.directory).checkpoint == found.checkpoint
    server.sent = 0
    node.pipeline.forget(found.checkpoint)
    told = fetch(node, found)
    check(node, found, told, server)
    assert (server.sent, told.load.came) == (0, Came(disk=found.file_bytes))
    until(lambda: whole(lease.directory), "the disk tier to be whole")
    assert held(lease.directory) == server.files


def is_locked(place: Path) -> bool:
    lock = disk_tier.lock_of(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if lock is not None:
        os.close(lock)
    return lock is None


def test_a_disk_tier_that_fails_is_locked_no_longer(server: RangeServer, lease: Lease, node: Node) -> None:
    partial = lease.directory.parent.with_suffix(disk_tier.PARTIAL)
    (partial / download.RECORD).mkdir(parents=True)
    found = manifest.build(lease.directory)
    check(node, found, fetch(node, found), server)
    until(lambda: not writers(), "its writer to end")
    assert not is_locked(partial)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_writer_keeps_no_lock(
    server: RangeServer, lease: Lease, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "sync", lambda path: 1 / 0)
    found = manifest.build(lease.directory)
    check(node, found, fetch(node, found), server)
    until(lambda: not writers(), "its writer to end")
    partial = lease.directory.parent.with_suffix(disk_tier.PARTIAL)
    assert not is_locked(partial)


def test_abandoned_headers_leave(server: RangeServer, tier: DiskTier) -> None:
    announce(tier, f"{server.url}/m").close()
    (place,) = tier.root.glob("*/*")
    place.rename(place.with_suffix(disk_tier.HEADS))  # as of a process that was killed
    tier.bring(f"{server.url}/m", silent).close()
    assert [path.suffix for path in tier.root.glob("*/*")] == [""]


def test_what_passes_through_a_ring_fills_the_disk_tier_too(server: RangeServer, lease: Lease) -> None:
    node = Node(4)  # of five
    found, device, where = manifest.build(lease.directory), Device(node.pool), origin.of(lease.directory)
    device.load = node.pipeline.load(found, 1, device.landed, device.failures.append, ring=True, origin=where)
    assert device.load.ringed
    device.load.start()
    while not device.over:
        node.turn()
        device.copy(device.waiting)
    assert {number: bytes(content) for number, content in device.content.items()} == {
        number: server.files[f"m/{file.name}"] for number, file in enumerate(found.files)
    }
    assert server.sent == found.file_bytes
    node.pipeline.release(found.checkpoint, 1)
    until(lambda: whole(lease.directory), "the disk tier to be whole")
    assert held(lease.directory) == server.files
    while node.tier._lent:
        node.turn()
    node.close()
