"""What the system says of this process's mappings."""

from __future__ import annotations

import re
from pathlib import Path

from serverless_llm.loader.memory import Range

_FLAGS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags:(.*?)$", re.MULTILINE | re.DOTALL)
_AREA = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) .*?^Rss: +([0-9]+) kB", re.MULTILINE | re.DOTALL)


def areas(home: Range) -> list[tuple[int, int]]:
    """(bytes, bytes with a page table entry) of every kernel mapping that lies in the range."""
    found = []
    for start, stop, rss in _AREA.findall(Path("/proc/self/smaps").read_text()):
        if home.address <= int(start, 16) < home.address + home.length:
            found.append((int(stop, 16) - int(start, 16), int(rss) << 10))
    return found


def resident(home: Range) -> int:
    """Bytes that can be read without a page fault."""
    return sum(rss for _, rss in areas(home))


def wanted_huge() -> list[tuple[int, int]]:
    """(start, stop) of every kernel mapping that may have huge pages."""
    areas = _FLAGS.findall(Path("/proc/self/smaps").read_text())
    return [(int(start, 16), int(stop, 16)) for start, stop, flags in areas if " hg " in flags]
