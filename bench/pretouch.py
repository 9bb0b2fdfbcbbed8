"""Memory that the host of a virtual machine has given to it: `python -m bench.pretouch BYTES`.

A machine that tells its host which memory is free gets that back page by page, at a fraction of any disk's speed. What
was touched and freed is there for two seconds, or longer: then the telling begins, a part every two seconds or so.
"""

from __future__ import annotations

import mmap
import sys

PAGE = 4096
TOLD = 30.0  # seconds in which a host is told of what was freed, in bursts that slow the machine down


def pretouch(nbytes: int) -> None:
    """Takes so many bytes and gives them back."""
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, nbytes, PAGE):
            memory[at] = 1


if __name__ == "__main__":
    pretouch(int(sys.argv[1]))
