"""The disk tier fills behind a load that reads from a server. Servers, files and locks are real."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serverless_llm.errors import CapacityError, TransientError
from serverless_llm.loader import announce as announcing
from serverless_llm.loader import (
    behind,
    disk_tier,
    download,
    drain,
    filling,
    leases,
    manifest,
    origin,
    remote,
    routes,
)
from serverless_llm.loader.disk_tier import DiskTier
from serverless_llm.loader.leases import Lease
from serverless_llm.loader.pacer import Pacer
from serverless_llm.loader.ranges import Ranges
from serverless_llm.loader.sharing import Loan
from serverless_llm.loader.source import Came, Source
from serverless_llm.quantities import size
from tests.range_server import RangeServer
from tests.serving import until
from tests.unit.loader.checkpoints import Device, Node, random, write
from tests.unit.loader.origins import begin, check, fetch, forget, held, is_locked, whole, writers


@pytest.mark.parametrize("obstacle", ["full", "bound", "taken"])
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
    else:
        partial.mkdir()
        taken = os.open(partial / leases.LOCK, os.O_CREAT | os.O_RDWR)
        fcntl.flock(taken, fcntl.LOCK_EX)
    for _ in range(2):
        told = fetch(node, found)
        check(node, found, told, server)
        forget(node, found)
        until(lambda: not writers(), "its writer to end")  # it holds the version: the next load would have none
    assert server.sent == 2 * found.file_bytes
    assert not whole(lease.directory)
    lacks = f"{server.url}/m: {size(found.file_bytes)} are not on the disk"
    lines = [record for record in caplog.records if record.getMessage().startswith(lacks)]
    assert len(lines) == (2 if obstacle == "bound" else 0)
    if taken >= 0:
        os.close(taken)


@pytest.mark.parametrize("full", [False, True])
def test_what_does_not_reach_the_disk_is_told_with_what_brings_it(
    lease: Lease, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, full: bool
) -> None:
    found = manifest.build(lease.directory)
    _, url, files = announcing.announced(lease.directory) or pytest.fail()
    number = next(number for number, file in enumerate(files) if file.name == found.files[0].name)
    lacks = found.file_bytes
    writer = behind.Behind(filling.Filling(lease.directory, remote.Remote(url), files))
    if full:
        monkeypatch.setenv(disk_tier.VARIABLE, "1MB")
        writer.put(number, 0, memoryview(bytes(1_000_000)), [])  # and nothing comes after it was refused
    else:
        monkeypatch.setattr(behind, "WAITING", 1_000_000)
        writer.put(number, 0, memoryview(bytes(1_000_000)), [])
        writer.put(number, 1_000_000, memoryview(bytes(1_000_001)), [])
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
    _, url, files = announcing.announced(lease.directory) or pytest.fail()
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
    lock = leases.lock_of(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    forget(node, found)
    told = fetch(node, found)
    check(node, found, told, server)
    assert (server.sent, told.load.came) == (0, Came(disk=found.file_bytes))
    until(lambda: whole(lease.directory), "the disk tier to be whole")
    assert held(lease.directory) == server.files


def test_a_disk_tier_that_fails_is_locked_no_longer(server: RangeServer, lease: Lease, node: Node) -> None:
    partial = lease.directory.parent.with_suffix(disk_tier.PARTIAL)
    (partial / download.RECORD).mkdir(parents=True)
    found = manifest.build(lease.directory)
    check(node, found, fetch(node, found), server)
    until(lambda: not writers(), "its writer to end")
    assert not is_locked(partial)


def test_a_writer_that_gets_no_thread_keeps_no_lock(
    server: RangeServer, lease: Lease, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, start = manifest.build(lease.directory), threading.Thread.start

    def exhausted(thread: threading.Thread) -> None:
        if thread.name == "behind":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", exhausted)
    (failure,) = fetch(node, found).failures
    assert "can't start new thread" in str(failure)
    assert isinstance(failure, TransientError)
    monkeypatch.setattr(threading.Thread, "start", start)
    forget(node, found)
    check(node, found, fetch(node, found), server)
    until(lambda: whole(lease.directory), "the disk tier to be filled")


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


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Each write waits for it."""
    goes_on, write = threading.Event(), filling.Filling.write

    def wait(self: filling.Filling, number: int, start: int, data: memoryview) -> None:
        goes_on.wait()
        write(self, number, start, data)

    monkeypatch.setattr(filling.Filling, "write", wait)
    monkeypatch.setattr(behind, "BATCH", 1)
    yield goes_on
    goes_on.set()


def test_however_slow_the_disk_is_it_gets_all_from_dram(
    server: RangeServer, lease: Lease, node: Node, disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behind, "WAITING", 0)
    found = manifest.build(lease.directory)
    told = fetch(node, found)
    node.pipeline.forget(found.checkpoint)
    check(node, found, told, server)
    assert node.tier.used_bytes >= found.file_bytes
    disk.set()
    until(lambda: whole(lease.directory), "the disk tier to be whole")
    assert held(lease.directory) == server.files
    assert server.sent == found.file_bytes
    forget(node, found)
    assert node.tier.used_bytes == 0


def test_others_that_find_no_room_go_before_the_disk(
    server: RangeServer, lease: Lease, node: Node, disk: threading.Event, tmp_path: Path
) -> None:
    found, other = manifest.build(lease.directory), manifest.build(write(tmp_path / "other", random(5.5)))
    fetch(node, found)
    with pytest.raises(CapacityError):
        node.load(other)
    assert node.pipeline.settling
    disk.set()
    forget(node, found)
    assert node.fetch(other).failures == []
    node.pipeline.release(other.checkpoint, 1)
    until(lambda: not writers(), "its writer to end")
    assert not whole(lease.directory)
    there = found.file_bytes - filling.lacking(lease.directory)
    assert there > 0
    server.sent = 0
    check(node, found, fetch(node, found), server)
    assert server.sent == found.file_bytes - there
    until(lambda: whole(lease.directory), "the disk tier to be whole")


def test_the_disk_keeps_its_leases_where_others_would_find_no_room_without(
    server: RangeServer, lease: Lease, node: Node, disk: threading.Event, tmp_path: Path
) -> None:
    found, other = manifest.build(lease.directory), manifest.build(write(tmp_path / "other", random(5.5)))
    told = begin(node, found)
    while not told.over:
        node.turn()
    with pytest.raises(CapacityError):
        node.load(other)  # a replica refers to all that the disk waits for
    assert not node.pipeline.settling
    node.pipeline.release(found.checkpoint, 1)
    with pytest.raises(CapacityError):
        node.pipeline.load(other, 2, told.landed, told.failures.append, loan=Loan([], [], [], frozenset()))
    assert not node.pipeline.settling
    disk.set()
    forget(node, found)
    until(lambda: whole(lease.directory), "the disk tier to be whole")
    assert held(lease.directory) == server.files


def read(source: Source) -> bytes:
    opened, data = source.open(), bytearray(source.size)
    opened.read([memoryview(data)], 0, source.size)
    opened.close()
    return bytes(data)


def test_what_a_load_still_reads_stays_though_its_writer_was_told_to_give_up(
    server: RangeServer, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, there, ended = manifest.build(lease.directory), origin.of(lease.directory), threading.Event()
    assert there is not None
    read(there.sources(found, Pacer(0), Ranges(1 << 20), origin.Writers())[0])
    there.close()
    until(lambda: not writers(), "an earlier start to end")
    where, gone, end = origin.of(lease.directory), threading.Event(), filling.Filling.end

    def told(self: filling.Filling) -> None:
        end(self)
        ended.set()

    monkeypatch.setattr(filling.Filling, "end", told)
    assert where is not None
    where.hold(gone.set)
    first, second = where.sources(found, Pacer(0), Ranges(1 << 20), origin.Writers())
    opened = first.open()
    read(second)
    until(lambda: filling.lacking(lease.directory) == 0, "all to be on the disk")
    where.give_up()
    assert gone.wait(30)
    assert read(first) == server.files[f"m/{found.files[0].name}"]
    assert not ended.is_set()
    where.close()
    opened.close()
    assert ended.wait(30)
    until(lambda: not writers(), "its writer to end")
    assert held(lease.directory) == server.files


def test_no_slot_waits_for_the_check_of_what_was_written(
    lease: Lease, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, end = threading.Event(), filling.Filling.end

    def wait(self: filling.Filling) -> None:
        checked.wait(60)
        end(self)

    monkeypatch.setattr(filling.Filling, "end", wait)
    found = manifest.build(lease.directory)
    fetch(node, found)
    forget(node, found)
    assert not checked.is_set()
    assert node.tier.used_bytes == 0
    assert writers()
    checked.set()
    until(lambda: whole(lease.directory), "the disk tier to be whole")


def go_on_when_given_up(disk: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    give_up = behind.Behind.give_up

    def told(self: behind.Behind) -> None:
        give_up(self)
        disk.set()

    monkeypatch.setattr(behind.Behind, "give_up", told)


@pytest.mark.parametrize("hangs", [False, True])
def test_what_came_before_a_server_failed_is_asked_for_no_more_however_slow_the_disk_is(
    server: RangeServer,
    lease: Lease,
    node: Node,
    disk: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    hangs: bool,
) -> None:
    monkeypatch.setattr(routes, "CONNECTIONS", 1)  # one piece after the other
    if hangs:
        monkeypatch.setattr(behind, "HANDING_S", 0.0)
    else:
        go_on_when_given_up(disk, monkeypatch)
    found = manifest.build(lease.directory)
    server.faults.statuses = {f"m/{found.files[1].name}": 503}
    assert "what came is kept, the next start asks for the rest" in str(fetch(node, found).failures)
    server.faults.statuses, server.sent = {}, 0
    told = fetch(node, found)
    check(node, found, told, server)
    assert told.load.dram_bytes > 0
    assert server.sent == found.file_bytes - told.load.dram_bytes
    disk.set()
    forget(node, found)
    until(lambda: not writers(), "its writer to end")
    assert whole(lease.directory) is not hangs
    if not hangs:
        assert held(lease.directory) == server.files
        assert not [one for one in caplog.messages if "on the disk" in one]


@pytest.mark.parametrize("hangs", [False, True])
def test_the_end_waits_for_one_write_and_for_none_that_hangs(
    lease: Lease, node: Node, disk: threading.Event, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    if not hangs:
        go_on_when_given_up(disk, monkeypatch)
    monkeypatch.setattr(drain, "STUCK_S", 0.1 if hangs else 30)
    fetch(node, manifest.build(lease.directory))
    posted = node.posts.qsize()
    assert node.pipeline.close() is not hangs
    disk.set()
    until(lambda: not writers(), "its writer to end")
    assert node.posts.qsize() == posted  # the loop may be closed by then
    assert not whole(lease.directory)


def pass_through(node: Node, lease: Lease) -> Device:
    """Through a ring, to a device that copies."""
    found, device, where = manifest.build(lease.directory), Device(node.pool), origin.of(lease.directory)
    device.load = node.pipeline.load(found, 1, device.landed, device.failures.append, ring=True, origin=where)
    assert device.load.ringed
    device.load.start()
    while not device.over:
        node.turn()
        device.copy(device.waiting)
    node.pipeline.release(found.checkpoint, 1)
    while node.tier.lent:
        node.turn()
    return device


def test_what_passes_through_a_ring_fills_the_disk_tier_too(server: RangeServer, lease: Lease) -> None:
    node = Node(4)  # of five
    found, device = manifest.build(lease.directory), pass_through(node, lease)
    assert {number: bytes(content) for number, content in device.content.items()} == {
        number: server.files[f"m/{file.name}"] for number, file in enumerate(found.files)
    }
    assert server.sent == found.file_bytes
    until(lambda: whole(lease.directory), "the disk tier to be whole")
    assert held(lease.directory) == server.files
    node.close()


def test_what_a_ring_left_is_gone_on_with_though_the_disk_is_behind(
    server: RangeServer, lease: Lease, disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on_when_given_up(disk, monkeypatch)
    monkeypatch.setattr(routes, "CONNECTIONS", 1)
    node = Node(4)
    found = manifest.build(lease.directory)
    server.faults.fails_after = found.file_bytes // 2
    assert pass_through(node, lease).failures
    server.faults.fails_after, server.sent = None, 0
    device = pass_through(node, lease)
    assert device.failures == []
    assert device.load.dram_bytes > 0
    assert server.sent <= found.file_bytes - device.load.dram_bytes
    until(lambda: whole(lease.directory), "the disk tier to be whole")
    assert held(lease.directory) == server.files
    until(lambda: not writers(), "its writer to end")
    node.close()
