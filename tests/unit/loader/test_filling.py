"""A version of the disk tier while a load brings it. Servers, files and locks are real."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from serverless_llm.errors import TransientError
from serverless_llm.loader import announce as announcing
from serverless_llm.loader import disk_tier, filling, manifest, remote
from serverless_llm.loader.disk_tier import DiskTier
from serverless_llm.loader.download import RECORD
from serverless_llm.loader.leases import LOCK, Lease
from tests.range_server import RangeServer
from tests.unit.loader.checkpoints import opened, spoil
from tests.unit.loader.origins import held, is_locked, silent, whole


def test_what_was_damaged_and_not_read_makes_no_version_whole(
    server: RangeServer, tier: DiskTier, lease: Lease
) -> None:
    _, url, files = announcing.announced(lease.directory) or pytest.fail()
    *_, first, second = range(len(files))
    for number in (first, second):
        writer = filling.Filling(lease.directory, remote.Remote(url), files)
        writer.begin()
        writer.write(number, 0, memoryview(server.files[f"m/{files[number].name}"]))
        writer.commit()
        if number == first:
            writer.end()
            spoil(
                lease.directory.parent.with_suffix(disk_tier.PARTIAL) / "checkpoint" / files[first].name, 99, "flipped"
            )
        else:
            with pytest.raises(TransientError, match="is damaged: the next start or pull reads that anew"):
                writer.end()
        writer.close()
    assert not whole(lease.directory)
    assert filling.lacking(lease.directory) == files[first].size
    tier.bring(url, silent).close()
    assert held(lease.directory) == server.files


def test_what_was_written_counts_though_its_process_is_killed_before_it_lasts(
    server: RangeServer, lease: Lease
) -> None:
    _, url, files = announcing.announced(lease.directory) or pytest.fail()
    *_, first, second = range(len(files))
    data, weights = memoryview(server.files[f"m/{files[first].name}"]), filling.lacking(lease.directory)
    writer = filling.Filling(lease.directory, remote.Remote(url), files)
    writer.begin()
    half = filling.PIECE_BYTES // 2
    for start in (0, half):
        writer.write(first, start, data[start : start + half])
    assert filling.lacking(lease.directory) == weights - filling.PIECE_BYTES
    writer.write(first, filling.PIECE_BYTES, data[filling.PIECE_BYTES :])
    writer.write(second, 0, memoryview(server.files[f"m/{files[second].name}"])[:10])
    writer.close()
    assert filling.lacking(lease.directory) == weights - files[first].size


def test_a_disk_tier_that_cannot_be_looked_at_is_locked_no_longer(
    lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url, files = announcing.announced(lease.directory) or pytest.fail()
    real = Path.exists

    def fails(self: Path) -> bool:
        if self.name == manifest.REMOTE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "exists", fails)
        with pytest.raises(OSError, match="Input/output error"):
            filling.Filling(lease.directory, remote.Remote(url), files)
    assert not is_locked(lease.directory.parent.with_suffix(disk_tier.PARTIAL))


def test_a_version_of_many_files_takes_few_descriptors(server: RangeServer, lease: Lease) -> None:
    _, url, files = announcing.announced(lease.directory) or pytest.fail()
    writer = filling.Filling(lease.directory, remote.Remote(url), files)
    writer.begin()
    for number, file in enumerate(files):
        writer.write(number, 0, memoryview(server.files[f"m/{file.name}"]))
    partial = lease.directory.parent.with_suffix(disk_tier.PARTIAL)
    assert opened(partial) == [partial / LOCK, partial / RECORD]
    writer.commit()
    writer.end()
    writer.close()
    assert whole(lease.directory)
