"""Digests on a node's disk: whole or not there, whatever happens."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serverless_llm.loader import manifest
from serverless_llm.loader.digest import Digests, Key, count
from serverless_llm.loader.manifest import Manifest
from serverless_llm.node.digests import BLOCKS, SUFFIX, UNFINISHED, DigestStore, sizes_of
from tests.unit.loader.checkpoints import random, write


@pytest.fixture
def source(tmp_path: Path) -> Manifest:
    return manifest.build(write(tmp_path / "m", random(2.5)))


def digests(source: Manifest) -> Digests:
    return {Key(0, number): b"7" * 16 for number in range(count(sizes_of(source)))}


def test_what_is_kept_is_known_to_the_next_agent(tmp_path: Path, source: Manifest) -> None:
    store = DigestStore(tmp_path / "n0.digests", BLOCKS)
    assert store.read(source) is None
    assert store.known == set()
    store.write(source, digests(source))
    assert store.known == {source.checkpoint}
    later = DigestStore(tmp_path / "n0.digests", BLOCKS)
    assert later.known == {source.checkpoint}
    assert later.read(source) == digests(source)


def test_those_used_last_stay(tmp_path: Path, source: Manifest) -> None:
    store = DigestStore(tmp_path / "n0.digests", BLOCKS, most=2)
    sources = [dataclasses.replace(source, checkpoint=name) for name in "abc"]
    for second, one in enumerate(sources[:2]):
        store.write(one, digests(one))
        os.utime(tmp_path / "n0.digests" / f"{one.checkpoint}{SUFFIX}", (second, second))
    assert store.read(sources[0]) is not None
    store.write(sources[2], digests(source))
    assert store.known == {"a", "c"}
    assert [store.read(one) is not None for one in sources] == [True, False, True]


def test_what_is_damaged_is_thrown_away_with_a_word(
    tmp_path: Path, source: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    store = DigestStore(tmp_path, BLOCKS)
    store.write(source, digests(source))
    path = tmp_path / f"{source.checkpoint}{SUFFIX}"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert store.read(source) is None
    assert f"{path} is damaged and thrown away" in caplog.text
    assert not path.exists()
    assert store.known == set()


def test_a_disk_that_takes_or_gives_nothing_costs_the_digests_only(
    tmp_path: Path, source: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    store = DigestStore(tmp_path / "file" / "n0.digests", BLOCKS)
    store.write(source, digests(source))
    assert store.known == set()
    assert store.read(source) is None
    assert caplog.text.count("Not a directory; digests are learned again") == 2


WRITER = """
import os, signal, sys
from pathlib import Path
from serverless_llm.loader import manifest
from serverless_llm.loader.digest import Key
from serverless_llm.node.digests import BLOCKS, DigestStore
source = manifest.build(Path(sys.argv[1]))
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "fsync":
    os.fsync = die
else:
    Path.rename = die
DigestStore(Path(sys.argv[2]), BLOCKS).write(source, {Key(0, number): b"8" * 16 for number in range(3)})
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_an_agent_that_is_killed_while_it_writes_leaves_what_was_there(
    tmp_path: Path, source: Manifest, step: str
) -> None:
    folder = tmp_path / "n0.digests"
    DigestStore(folder, BLOCKS).write(source, digests(source))
    command = [sys.executable, "-c", WRITER, str(source.directory), str(folder), step]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": "."}, check=False).returncode == -signal.SIGKILL
    assert sorted(path.suffix for path in folder.iterdir()) == [SUFFIX, UNFINISHED]
    store = DigestStore(folder, BLOCKS)
    assert [path.suffix for path in folder.iterdir()] == [SUFFIX]
    assert store.read(source) == digests(source)
