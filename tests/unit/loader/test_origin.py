"""Loads from a server straight into the pool, while the disk tier fills behind. Servers, files and locks are real."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from serverless_llm.errors import CapacityError, CheckpointError, TransientError
from serverless_llm.loader import announce as announcing
from serverless_llm.loader import (
    disk_tier,
    download,
    filling,
    leases,
    load_checkpoint,
    load_file,
    manifest,
    origin,
    reader,
)
from serverless_llm.loader.disk_tier import DiskTier
from serverless_llm.loader.leases import Lease
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.pacer import Pacer
from serverless_llm.loader.remote import RemoteFile
from serverless_llm.loader.repack import repack
from serverless_llm.loader.source import Came
from tests.range_server import RangeServer
from tests.serving import until
from tests.unit.loader.checkpoints import Node, spoil
from tests.unit.loader.origins import TOKENIZER, announce, check, fetch, forget, held, silent, whole, writers


def pull(tier: DiskTier, url: str) -> Lease:
    return tier.bring(url, silent)


def nest(server: RangeServer, folder: str) -> str:
    """The last file of weights lies in a folder from now on; its name."""
    last = "model-00002-of-00002.safetensors"
    server.files[f"m/{folder}/{last}"] = server.files.pop(f"m/{last}")
    index = json.loads(server.files[f"m/{manifest.INDEX}"])
    index["weight_map"] = {key: name.replace(last, f"{folder}/{last}") for key, name in index["weight_map"].items()}
    server.files[f"m/{manifest.INDEX}"] = json.dumps(index).encode()
    return last


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
        (tmp_path / "link").symlink_to(lease.directory)
        (tmp_path / "file").symlink_to(lease.directory / found.files[0].name)
        for refused in (
            lambda: load_checkpoint(tmp_path / "link"),
            lambda: load_file(tmp_path / "link" / found.files[0].name),
            lambda: load_file(tmp_path / "file"),
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


def test_headers_alone_are_refused_below_their_directory_too(
    server: RangeServer, tier: DiskTier, tmp_path: Path
) -> None:
    last = nest(server, "sub")
    with announce(tier, f"{server.url}/m") as lease:
        (tmp_path / "link").symlink_to(lease.directory / "sub")
        for path in (lease.directory / "sub" / last, tmp_path / "link" / last):
            with pytest.raises(CheckpointError, match=f"^{lease.directory} holds headers alone"):
                load_file(path)
    with tier.bring(f"{server.url}/m", silent) as lease:
        assert load_file(lease.directory / "sub" / last)


def test_what_cannot_be_announced(server: RangeServer, tier: DiskTier) -> None:
    with pytest.raises(CheckpointError, match="/m has no vocabulary"):
        announce(tier, f"{server.url}/m", "config.json", "vocabulary")
    assert server.gets == ["m/model.safetensors.index.json"]
    server.files["m/model-00002-of-00002.safetensors"] = b"<html>Welcome to our hotel</html>" * 100
    with pytest.raises(CheckpointError, match=r"/m/model-00002-of-00002\.safetensors: "):
        announce(tier, f"{server.url}/m")
    assert list(tier.root.glob("*/*")) == []
    server.files["m/model-00002-of-00002.safetensors"] = server.files["m/model-00001-of-00002.safetensors"]
    with pytest.raises(CheckpointError, match=r"^http[^ ]*/m/[^/ ]*index\.json: tensor '1.0' is in model-00001"):
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
    monkeypatch.setattr(announcing, "MAX_TEXT", 19_999)
    with pytest.raises(CheckpointError, match=f"{url}/tokenizer.json is larger than 19999 bytes"):
        announce(tier, url)
    assert not {"m/config.json", "m/tokenizer.json"} & {*server.gets}
    assert list(tier.root.glob("*/*")) == []


def test_the_headers_that_deploying_reads_are_bounded_together(
    server: RangeServer, tier: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing, "MAX_HEADERS", 100)
    with pytest.raises(CheckpointError, match=f"^{server.url}/m: the headers of a checkpoint's files have more than "):
        announce(tier, f"{server.url}/m")
    assert list(tier.root.glob("*/*")) == []


def test_deploying_keeps_what_came_of_its_version(server: RangeServer, tier: DiskTier) -> None:
    server.faults.fails_after = 3_000_000
    with pytest.raises(TransientError, match="500"):
        tier.bring(f"{server.url}/m", silent)
    server.faults.fails_after = None
    announce(tier, f"{server.url}/m").close()
    assert sorted(path.suffix for path in tier.root.glob("*/*")) == ["", disk_tier.PARTIAL]


@pytest.mark.parametrize("bring", [announce, pull])
def test_what_a_server_had_last_is_taken_also_after_it_went_back(
    server: RangeServer, tier: DiskTier, bring: Callable[[DiskTier, str], Lease]
) -> None:
    url, places = f"{server.url}/m", []
    first, second = server.files["m/config.json"], b'{"model_type": "other"}'
    for config in (first, second, first):
        server.files["m/config.json"] = config
        with bring(tier, url) as lease:
            places.append(lease.directory)
    assert places[0] == places[2] != places[1]
    server.faults.statuses = dict.fromkeys(server.files, 503)
    with bring(tier, url) as lease, tier.latest(url, Path.exists) or pytest.fail() as latest:
        assert lease.offline
        assert lease.directory == latest.directory == places[0]


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
@pytest.mark.parametrize("before", [announce, pull], ids=["announced", "whole"])
@pytest.mark.parametrize("again", [announce, pull], ids=["announce", "pull"])
def test_what_is_damaged_leaves_and_is_brought_anew(
    server: RangeServer,
    tier: DiskTier,
    before: Callable[[DiskTier, str], Lease],
    again: Callable[[DiskTier, str], Lease],
    how: str,
    name: str,
) -> None:
    url = f"{server.url}/m"
    with before(tier, url) as used:
        path = used.directory / name
        spoil(path, 1, how)
        with pytest.raises(CheckpointError) as raised:
            again(tier, url)
        assert str(raised.value) == (
            f"{path} is gone or not as long as that of {url}, and {used.directory.parent} is in use: "
            f"end what uses it, then serverless-llm pull {url}"
        )
    with again(tier, url) as lease:
        assert lease.directory == used.directory
        assert whole(lease.directory) == (again is pull)
        assert {file: len(data) for file, data in held(lease.directory).items()} == {
            file: len(data) for file, data in server.files.items()
        }
    with pull(tier, url) as lease:
        assert held(lease.directory) == server.files
    assert [path.suffix for path in tier.root.glob("*/*")] == [""]


def test_an_announcement_that_was_killed_at_its_end_is_begun_anew(server: RangeServer, tier: DiskTier) -> None:
    with announce(tier, f"{server.url}/m") as lease:
        place = lease.directory.parent
    place.rename(place.with_name(place.name + disk_tier.HEADS))
    with announce(tier, f"{server.url}/m") as again:
        assert again.directory == lease.directory
    assert [path.suffix for path in tier.root.glob("*/*")] == [""]


@pytest.mark.parametrize("bring", [announce, pull])
def test_a_machine_without_threads_is_told(
    server: RangeServer, tier: DiskTier, monkeypatch: pytest.MonkeyPatch, bring: Callable[[DiskTier, str], Lease]
) -> None:
    def exhausted(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", exhausted)
        with pytest.raises(TransientError, match=f"no threads to ask {server.url}/m with: can't start new thread"):
            bring(tier, f"{server.url}/m")
    bring(tier, f"{server.url}/m").close()


@pytest.mark.parametrize("bring", [announce, pull])
def test_all_of_a_version_is_synced_before_it_takes_its_name(
    server: RangeServer, tier: DiskTier, monkeypatch: pytest.MonkeyPatch, bring: Callable[[DiskTier, str], Lease]
) -> None:
    nest(server, "a/b")
    before: set[int] = set()
    after: set[int] = set()

    def fsync(descriptor: int) -> None:
        named = any(not place.suffix for place in tier.root.glob("*/*"))
        (after if named else before).add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    with bring(tier, f"{server.url}/m") as lease:
        place = lease.directory.parent
    needed = {tier.root, place.parent, place, *place.rglob("*")} - {place / leases.LOCK}
    assert {path for path in needed if path.stat().st_ino not in before} == set()
    assert place.parent.stat().st_ino in after


@pytest.mark.parametrize("bring", [announce, pull])
@pytest.mark.parametrize("left", ["", "http://127.0.0.1/other", None])
def test_what_a_version_was_brought_from_is_written_anew(
    server: RangeServer, tier: DiskTier, bring: Callable[[DiskTier, str], Lease], left: str | None
) -> None:
    url = f"{server.url}/m"
    with bring(tier, url) as lease:
        note = lease.directory.parent / disk_tier.URL
    note.unlink()
    if left is not None:
        note.write_text(left)
    assert disk_tier.url_of(lease.directory) == ""
    with bring(tier, f"{url}/") as again:
        assert again.directory == lease.directory
    assert disk_tier.url_of(lease.directory) == url


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
    for number, source in enumerate(where.sources(found, pacer, origin.Writers())):
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


def test_abandoned_headers_leave(server: RangeServer, tier: DiskTier) -> None:
    announce(tier, f"{server.url}/m").close()
    (place,) = tier.root.glob("*/*")
    place.rename(place.with_suffix(disk_tier.HEADS))  # as of a process that was killed
    tier.bring(f"{server.url}/m", silent).close()
    assert [path.suffix for path in tier.root.glob("*/*")] == [""]
