"""A checkpoint on a server: announced by its headers, or pulled whole. Servers, files and locks are real."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from serverless_llm.errors import CapacityError, CheckpointError, TransientError
from serverless_llm.loader import announce as announcing
from serverless_llm.loader import (
    disk_tier,
    leases,
    load_checkpoint,
    load_file,
    manifest,
)
from serverless_llm.loader.disk_tier import DiskTier
from serverless_llm.loader.leases import Lease
from serverless_llm.loader.repack import repack
from tests.range_server import RangeServer
from tests.unit.loader.checkpoints import spoil
from tests.unit.loader.origins import TOKENIZER, announce, held, silent, whole


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


def test_abandoned_headers_leave(server: RangeServer, tier: DiskTier) -> None:
    announce(tier, f"{server.url}/m").close()
    (place,) = tier.root.glob("*/*")
    place.rename(place.with_suffix(disk_tier.HEADS))  # as of a process that was killed
    tier.bring(f"{server.url}/m", silent).close()
    assert [path.suffix for path in tier.root.glob("*/*")] == [""]
