"""What is read of a machine and its control groups, both versions, from trees of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from serverless_llm.loader.headroom import available_memory, headroom

GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Of a machine with 4 GiB available, and no control groups."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4194304 kB\n")
    return proc


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


def test_available_memory_is_the_tightest_limit(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    assert available_memory(proc, groups) == 4 * GIB
    (proc / "self" / "cgroup").write_text("0::/outer/inner\n4:memory:/box\n")
    group(groups / "outer" / "inner", memory_max="max")
    assert available_memory(proc, groups) == 4 * GIB
    (groups / "outer" / "memory.max").write_text(f"{2 * GIB}\n")
    assert available_memory(proc, groups) == 2 * GIB
    group(groups / "memory" / "box", memory_limit_in_bytes=GIB)
    assert available_memory(proc, groups) == GIB
    (groups / "outer" / "inner" / "memory.high").write_text(f"{GIB // 2}\n")
    assert available_memory(proc, groups) == GIB // 2


def test_headroom_is_what_the_tightest_group_has_left(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    assert headroom(proc, groups) == 4 * GIB
    (proc / "self" / "cgroup").write_text("0::/outer/inner\n")
    group(groups / "outer" / "inner", memory_max="max", memory_current=300 * MIB)
    group(groups / "outer" / "other", memory_max=1, memory_current=1)
    assert headroom(proc, groups) == 4 * GIB
    (groups / "outer" / "memory.max").write_text(f"{GIB}\n")
    (groups / "outer" / "memory.current").write_text(f"{900 * MIB}\n")
    assert headroom(proc, groups) == 124 * MIB
    (groups / "outer" / "inner" / "memory.high").write_text(f"{310 * MIB}\n")
    assert headroom(proc, groups) == 10 * MIB


def test_what_the_page_cache_would_give_back_is_left(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/box\n")
    stat = f"anon 5\nfile {700 * MIB}\nactive_file {100 * MIB}\ninactive_file {200 * MIB}"  # 400 MiB are shared memory
    group(tmp_path / "cgroup" / "box", memory_max=GIB, memory_current=GIB, memory_stat=stat)
    assert headroom(proc, tmp_path / "cgroup") == 300 * MIB


def test_headroom_of_a_group_of_version_1(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("5:cpu:/elsewhere\n4:memory:/outer/box\n")
    stat = f"inactive_file 7\ntotal_inactive_file {8 * MIB}\ntotal_active_file {2 * MIB}"
    memory = tmp_path / "cgroup" / "memory"
    group(memory / "outer" / "box", memory_limit_in_bytes=GIB, memory_usage_in_bytes=GIB, memory_stat=stat)
    assert headroom(proc, tmp_path / "cgroup") == 10 * MIB


def test_who_cannot_tell_knows_no_end(tmp_path: Path) -> None:
    assert headroom(tmp_path, tmp_path) > GIB


def test_this_machine_has_memory() -> None:
    assert headroom() > 0
    assert available_memory() > 0
