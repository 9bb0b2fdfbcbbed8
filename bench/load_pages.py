"""The kinds of pages that a pool may have: each is set up on the machine, as root, and set back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.cold_subjects import WrongTier
from bench.common import row
from bench.load_subjects import Sample, Service

HUGE_PAGE = 2 << 20
TRIES = 3
KINDS = ("hugetlb", "huge", "small")
SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
RESERVED = Path("/proc/sys/vm/nr_hugepages")
SPARE = 2 << 30  # bytes beyond the checkpoint that the server's pool has: see `cold_subjects.options`


@contextlib.contextmanager
def pages(kind: str, nbytes: int) -> Iterator[None]:
    """Has pools that are made meanwhile get pages of this kind.

    Raises:
        OSError: that is not permitted, or there is not so much memory in one piece.
    """
    before = RESERVED.read_text(), SHMEM.read_text().split("[")[1].split("]")[0]
    wanted = -(-int(1.25 * nbytes + SPARE) // HUGE_PAGE) if kind == "hugetlb" else 0
    try:
        RESERVED.write_text(str(wanted))
        SHMEM.write_text("advise" if kind == "huge" else "never")
        if int(RESERVED.read_text()) < wanted:
            raise OSError(f"only {RESERVED.read_text().strip()} of {wanted} huge pages could be reserved")
        yield
    finally:
        RESERVED.write_text(before[0])
        SHMEM.write_text(before[1])


def measure(directory: Path, nbytes: int, limit: Callable[[], float], rounds: int) -> list[dict[str, Any]]:
    """Cold loads of the server with each kind of pages that can be had, against the raw reader of the same round."""
    found = []
    for kind in KINDS:
        try:
            with pages(kind, nbytes), Service(directory) as service:
                samples = [(limit(), cold(service)) for _ in range(rounds)]
                assert service.prefault is not None
                first = service.prefault
        except OSError as error:
            print(f"{kind}: {error}", flush=True)
            continue
        name = ("cold", f"ours-service ({kind})")
        rates = [nbytes / sample.seconds for _, sample in samples]
        shares = [rate / best for rate, (best, _) in zip(rates, samples, strict=True)]
        found += [
            row(*name, "throughput", "GB/s", [rate / 1e9 for rate in rates], limit_ratios=shares),
            row(*name, "cpu_s", "s", [sample.cpu_s for _, sample in samples]),
            row(*name, "prefault_cpu_s", "s", [first.cpu_s]),
        ]
    return found


def cold(service: Service) -> Sample:
    """One whose bytes did not come from the disk is no sample."""
    for _ in range(TRIES):
        with contextlib.suppress(WrongTier):
            return service.sample("cold")
    raise OSError(f"{TRIES} loads in a row were not cold")
