"""The disk tier: whole or not there, bounded, shared between processes, gone on with. Servers and files are real."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from serverless_llm.errors import CapacityError, CheckpointError, ConfigurationError, TransientError
from serverless_llm.loader import (
    disk_tier,
    download,
    iterate,
    iterate_async,
    leases,
    library,
    load_checkpoint,
    load_into,
    load_slices,
    remote,
)
from serverless_llm.loader.disk_tier import DiskTier, hold
from serverless_llm.loader.leases import Lease
from serverless_llm.node.processes import environment
from tests.range_server import CHUNK, Faults, RangeServer
from tests.serving import until
from tests.unit.loader import checkpoints
from tests.unit.loader.checkpoints import full

ROOM = "1MB"  # of which each checkpoint takes about 400 kB


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "RETRY", {"max_retries": 0})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def served(folder: Path, *names: str) -> dict[str, bytes]:
    """Checkpoints of other weights each, as a server's files."""
    files: dict[str, bytes] = {}
    for seed, name in enumerate(names):
        directory = checkpoints.write(folder / name, checkpoints.random(0.4, seed))
        files |= {f"{name}/{path.name}": path.read_bytes() for path in directory.iterdir()}
    return files


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    with RangeServer(served(tmp_path, "a", "b", "c")) as running:
        yield running


@pytest.fixture
def tier(_hasty: None) -> DiskTier:
    return DiskTier(disk_tier.tier().root, ROOM)


def silent(name: str, done: int, total: int) -> None:
    """Nobody wants to know."""


def held(lease: Lease) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in lease.directory.iterdir()}


def versions(tier: DiskTier) -> list[str]:
    """Names of what is below the root, without digests."""
    return sorted(path.suffix for path in tier.root.glob("*/*"))


def files_of(server: RangeServer, name: str) -> dict[str, bytes]:
    return {path.removeprefix(f"{name}/"): data for path, data in server.files.items() if path.startswith(f"{name}/")}


def test_what_is_brought_is_the_checkpoint_and_is_read_once(server: RangeServer, tier: DiskTier) -> None:
    url = f"{server.url}/a"
    assert tier.cached(url) is None
    with tier.bring(f"{url}/", silent) as lease:
        assert held(lease) == files_of(server, "a")
    server.gets.clear()
    with tier.bring(url, silent) as again, tier.cached(url) or pytest.fail() as cached:
        assert again.directory == cached.directory == lease.directory
    assert server.gets == []
    assert versions(tier) == [""]
    assert sorted(path.name for path in lease.directory.parent.iterdir()) == ["checkpoint", "lock", "url"]


def test_another_version_comes_beside_the_one_in_use(server: RangeServer, tier: DiskTier) -> None:
    url, before = f"{server.url}/a", files_of(server, "a")
    with tier.bring(url, silent) as old:
        server.files |= {f"a/{name}": data for name, data in files_of(server, "b").items()}
        with tier.bring(url, silent) as new:
            assert (held(old), held(new)) == (before, files_of(server, "b"))
        with tier.cached(url) or pytest.fail() as latest:
            assert latest.directory == new.directory


def test_a_server_that_is_gone_leaves_what_it_gave(server: RangeServer, tier: DiskTier) -> None:
    with tier.bring(f"{server.url}/a", silent) as lease:
        assert lease.offline == ""
    server.faults.statuses = dict.fromkeys(server.files, 503)
    with tier.bring(f"{server.url}/a", silent) as again:
        assert again.directory == lease.directory
        assert "503" in again.offline
    with pytest.raises(TransientError, match="503"):
        tier.bring(f"{server.url}/b", silent)


def test_the_longest_unused_leaves_and_none_in_use(server: RangeServer, tier: DiskTier) -> None:
    a, b, c = (f"{server.url}/{name}" for name in "abc")
    for seconds, url in enumerate((a, b)):
        with tier.bring(url, silent) as lease:
            os.utime(lease.lock, (seconds, seconds))
    (tier.cached(a) or pytest.fail()).close()  # used after b
    tier.bring(c, silent).close()
    assert tier.cached(b) is None
    kept = tier.cached(a) or pytest.fail()
    os.utime(kept.lock, (2, 2))
    tier.bring(b, silent).close()  # a was used before c, but is in use
    assert (tier.cached(c), held(kept)) == (None, files_of(server, "a"))
    with tier.cached(b) or pytest.fail() as lease:
        second = hold(lease.directory) or pytest.fail()
    with pytest.raises(CapacityError, match=r"/c has .*of the disk tier's 1.0 MB, .* are in use"):
        tier.bring(c, silent)
    kept.close()
    second.close()


def test_a_version_is_looked_at_once_it_cannot_leave(server: RangeServer, tier: DiskTier) -> None:
    url, asked = f"{server.url}/a", []

    def stays(place: Path) -> bool:
        asked.append(leases.lock_of(place, fcntl.LOCK_EX | fcntl.LOCK_NB))
        return asked[-1] is None

    tier.bring(url, silent).close()
    with tier.latest(url, stays) or pytest.fail() as lease:
        assert asked == [None]
    assert tier.latest(url, lambda place: False) is None
    with pytest.raises(NotADirectoryError):
        tier.latest(url, lambda place: any((place / "url").iterdir()))
    assert disk_tier._leaves(lease.directory.parent)  # nothing holds it where it is not wanted


READ = """
    import sys
    from pathlib import Path
    from serverless_llm.loader import disk_tier
    with disk_tier.tier().cached(sys.argv[1]) as lease, disk_tier.hold(lease.directory):
        print(lease.directory)
"""


def test_a_tier_on_a_read_only_mount_is_read(server: RangeServer, tier: DiskTier) -> None:
    tier.bring(f"{server.url}/a", silent).close()
    mount = f'mount --bind "{tier.root}" "{tier.root}" && mount -o remount,bind,ro "{tier.root}" && exec "$@"'
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    done = subprocess.run(
        [*alone, sys.executable, "-c", textwrap.dedent(READ), f"{server.url}/a"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (Path(done.stdout.strip()).parent.parent.parent, done.stderr) == (tier.root, "")


def test_what_does_not_fit_is_told_before_it_is_read(server: RangeServer, tier: DiskTier) -> None:
    small = DiskTier(tier.root, "300KB")
    with pytest.raises(
        CapacityError, match=r"/a has .* the disk tier 300\.0 KB at most: set SERVERLESS_LLM_REMOTE_CACHE"
    ):
        small.bring(f"{server.url}/a", silent)
    with pytest.raises(ConfigurationError, match="SERVERLESS_LLM_REMOTE_CACHE: 'much' is no size"):
        DiskTier(tier.root, "much").bring(f"{server.url}/a", silent)
    assert server.gets == []


def test_what_is_needed_and_not_there_is_told_before_it_is_read(server: RangeServer, tier: DiskTier) -> None:
    with pytest.raises(CheckpointError, match=r"/a has no tokenizer\.json"):
        tier.bring(f"{server.url}/a", silent, ("config.json", "tokenizer.json"))
    assert server.gets == []


def test_what_an_error_left_is_gone_on_with(
    server: RangeServer, tier: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "CONNECTIONS", 1)
    server.faults.fails_after = 250_000
    with pytest.raises(TransientError, match="500 Internal"):
        tier.bring(f"{server.url}/a", silent)
    assert (versions(tier), tier.cached(f"{server.url}/a")) == ([".partial"], None)
    server.faults.fails_after, server.sent = None, 0
    with tier.bring(f"{server.url}/a", silent) as lease:
        assert held(lease) == files_of(server, "a")
    assert server.sent < 200_000
    assert versions(tier) == [""]


def test_what_a_version_left_that_is_no_more_leaves(
    server: RangeServer, tier: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "CONNECTIONS", 1)
    server.faults.fails_after = 250_000
    with pytest.raises(TransientError):
        tier.bring(f"{server.url}/a", silent)
    server.faults.fails_after, server.faults.etag = None, "new"
    tier.bring(f"{server.url}/a", silent).close()
    assert versions(tier) == [""]


def test_what_cannot_be_removed_is_told_and_stays_free(server: RangeServer, tier: DiskTier) -> None:
    with tier.bring(f"{server.url}/a", silent) as lease:
        place = lease.directory.parent
    (lease.directory / "model.safetensors").unlink()
    place.with_name(place.name + disk_tier.GONE).write_text("in the way")
    with pytest.raises(TransientError, match=r"cannot be kept in .*: Not a directory"):
        tier.bring(f"{server.url}/a", silent)
    os.close(leases.lock_of(place, fcntl.LOCK_EX | fcntl.LOCK_NB) or pytest.fail())


def test_half_removed_is_not_there_and_is_removed(server: RangeServer, tier: DiskTier) -> None:
    with tier.bring(f"{server.url}/a", silent) as lease:
        place = lease.directory.parent
    place.rename(place.with_name(place.name + disk_tier.GONE))
    assert tier.cached(f"{server.url}/a") is None
    tier.bring(f"{server.url}/b", silent).close()
    assert versions(tier) == [""]


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_a_digest_that_a_store_tells_is_held_against_what_came(
    server: RangeServer, tier: DiskTier, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    for name, value in server.s3.items():
        monkeypatch.setenv(name, value)
    del server.files["a/config.json"]
    server.faults.metadata = {f"x-amz-meta-{algorithm}": hashlib.new(algorithm, b"other").hexdigest()}
    with pytest.raises(CheckpointError, match=f"s3://bucket/a/model.safetensors: what came has another {algorithm}"):
        tier.bring("s3://bucket/a", silent)
    assert versions(tier) == []
    right = hashlib.new(algorithm, server.files["a/model.safetensors"]).hexdigest()
    server.faults.metadata = {f"x-amz-meta-{algorithm}": right}
    with tier.bring("s3://bucket/a", silent) as lease:
        assert held(lease) == files_of(server, "a")


def test_what_is_no_checkpoint_is_refused_and_not_kept(server: RangeServer, tier: DiskTier) -> None:
    server.files["a/model.safetensors"] = b"<html>Welcome to our hotel</html>" * 100
    with pytest.raises(CheckpointError, match=f"^{server.url}/a/model.safetensors: ") as raised:
        tier.bring(f"{server.url}/a", silent)
    assert str(tier.root) not in str(raised.value)
    assert versions(tier) == []


def test_a_disk_that_takes_no_more_is_told(
    server: RangeServer, tier: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "CONNECTIONS", 1)
    url = f"{server.url}/a"
    with full(100_000), pytest.raises(TransientError, match=f"{url} cannot be kept in .*: File too large"):
        tier.bring(url, silent)  # before a byte is read
    assert server.gets == []
    server.faults.fails_after = 100_000
    with pytest.raises(TransientError, match="500"):
        tier.bring(url, silent)
    server.faults.fails_after = None
    with full(300_000), pytest.raises(TransientError, match="File too large; the next try goes on with what came"):
        tier.bring(url, silent)
    assert landed(tier) > 250_000
    server.sent = 0
    tier.bring(url, silent).close()
    assert server.sent < 200_000


def test_memory_that_is_short_is_told_as_of_a_directory(server: RangeServer, tier: DiskTier) -> None:
    url = f"{server.url}/a"
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)) as raised:
        tier.bring(url, silent, memory_for=lambda file: library._allocate(1 << 60))
    assert raised.value.errno == errno.ENOMEM
    tier.bring(url, silent).close()


def test_only_what_a_tier_has_is_held(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    assert hold(tmp_path) is None
    assert hold(tmp_path / "checkpoint") is None


BRING = """
    import sys
    from pathlib import Path
    from serverless_llm.loader.disk_tier import DiskTier
    with DiskTier(Path(sys.argv[1])).bring(sys.argv[2], lambda name, done, total: None) as lease:
        print(lease.directory)
"""


@contextlib.contextmanager
def bringing(tier: DiskTier, url: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that brings it; killed at the end unless it has ended."""
    script = textwrap.dedent(BRING)
    arguments = [sys.executable, "-c", script, str(tier.root), url]
    with subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def landed(tier: DiskTier) -> int:
    """Bytes that records tell of."""
    texts = [path.read_text() for path in tier.root.glob(f"*/*/{download.RECORD}")]
    return sum(one.stop - one.start for text in texts for one in download.recorded(text, [1 << 30] * 9))


@pytest.mark.slow
def test_killed_at_half_it_reads_little_more_than_the_other_half(tmp_path: Path, tier: DiskTier) -> None:
    directory = checkpoints.write(tmp_path / "m", checkpoints.random(24))
    files = {f"m/{path.name}": path.read_bytes() for path in directory.iterdir()}
    total = sum(map(len, files.values()))
    tier = DiskTier(tier.root)
    with RangeServer(files) as server:
        most = server.faults.budget = round(0.52 * total)  # and then nothing is on its way any more
        with bringing(tier, f"{server.url}/m") as process:
            until(lambda: landed(tier) > 0.46 * total and server.sent > most - CHUNK, "half of it")
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert tier.cached(f"{server.url}/m") is None
        server.faults, server.sent = Faults(), 0
        with bringing(tier, f"{server.url}/m") as process:
            found = Path(process.communicate()[0].strip())
        assert {f"m/{path.name}": path.read_bytes() for path in found.iterdir()} == files
        assert 0.45 * total < server.sent <= 0.55 * total


@pytest.mark.slow
def test_two_processes_read_it_once(server: RangeServer, tier: DiskTier) -> None:
    tier = DiskTier(tier.root)
    url, total = f"{server.url}/a", sum(map(len, files_of(server, "a").values()))
    with bringing(tier, url) as one, bringing(tier, url) as other:
        answers = {one.communicate()[0], other.communicate()[0]}
    assert len(answers) == 1
    assert server.sent == total
    assert versions(tier) == [""]


def test_the_library_loads_urls(server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{server.url}/a"
    there = load_checkpoint(tmp_path / "a")
    server.faults.fails_after = 100_000
    with pytest.raises(TransientError, match="500"):
        load_checkpoint(url)
    server.faults.fails_after = None
    with monkeypatch.context() as change:
        change.delattr(library, "OpenFile")  # what came, then and now, is not read from the disk by it
        brought = load_checkpoint(url)
    assert brought.keys() == there.keys()
    assert all(torch.equal(brought[name], tensor) for name, tensor in there.items())
    server.gets.clear()

    async def names() -> list[str]:
        return [name async for name, _ in iterate_async(url)]

    assert [name for name, _ in iterate(url)] == asyncio.run(names()) == list(there)
    (first,) = load_slices(url, ["cpu"], lambda name: None)
    assert all(torch.equal(first[name], tensor) for name, tensor in there.items())
    module = torch.nn.ModuleList([torch.nn.ParameterList([torch.empty_like(tensor) for tensor in there.values()])])
    assert load_into(module, url) == (set(), [])
    assert all(torch.equal(parameter, there[name]) for name, parameter in module.named_parameters())
    assert server.gets == []


def test_what_is_iterated_stays_and_no_longer(server: RangeServer) -> None:
    url, home = f"{server.url}/a", disk_tier.tier()
    iterate(url)  # and never begun
    closed, begun = iterate(url), iterate(url)
    closed.close()  # type: ignore[attr-defined]  # a generator
    next(begun)
    (whole,) = [place for place in home.root.glob("*/*") if not place.suffix]
    assert not disk_tier._leaves(whole)
    del begun
    assert disk_tier._leaves(whole)


@pytest.mark.parametrize(
    "kept",
    [
        b"",
        b"a note",
        b"\xff",
        b"https://user:secret@host/m",
        b"https://host/m?signature=secret",
        b"https://host/m\n",
        b"https://host/m",
    ],
)
def test_what_a_directory_was_brought_from_is_told_of_a_tiers_alone(
    server: RangeServer, tier: DiskTier, kept: bytes
) -> None:
    url = f"{server.url}/a"
    with tier.bring(f"{url}/", silent) as lease:
        directory = lease.directory
        assert disk_tier.url_of(directory) == url
        assert disk_tier.url_of(directory / "deeper") == disk_tier.url_of(directory.with_name("other")) == ""
        (directory.parent / "url").write_bytes(kept)
        assert disk_tier.url_of(directory) == ""
        (directory.parent / "url").unlink()
        assert disk_tier.url_of(directory) == ""
