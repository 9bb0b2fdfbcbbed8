"""For a process whose reads fail: `python -m tests.unit.loader.reading_faults FILE KIND`. Knows no torch."""

from __future__ import annotations

import os
import queue
import sys
from pathlib import Path

from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.loader import plan
from serverless_llm.loader.plan import Piece
from serverless_llm.loader.pool import Pool
from serverless_llm.loader.reader import Batch, Reader, Transfer
from serverless_llm.loader.source import SourceFile


def read(path: Path, staged: bool) -> CheckpointError | bytes:
    """The file by way of a pool, or why it could not be read. Keeps no descriptor and no thread."""
    before = sorted(Path("/proc/self/fd").iterdir())
    stat, pool, news = path.stat(), Pool(4 << 20), queue.SimpleQueue[Batch]()
    reader = Reader(pool, threads=2, staged=staged)
    pieces = plan.cut(Piece(0, 0, stat.st_size), pool.slot_bytes)
    source = SourceFile(path, stat.st_size, stat.st_mtime_ns)
    slots = {piece: number for number, piece in enumerate(pieces)}
    reader.submit(Transfer([source], slots, pieces, news.put))
    while not (batch := news.get(timeout=30)).last:
        pass
    assert reader.close()
    content = pool.range(0, stat.st_size).tobytes()
    pool.close()
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    return batch.error or content


def main(path: Path, kind: str) -> None:
    fault, size, expected = Path(os.environ["READ_FAULTS"]), path.stat().st_size, path.read_bytes()
    answers = [read(path, staged) for staged in (False, True)]
    if kind == "short":
        assert answers == [expected, expected]
    else:
        assert all(isinstance(answer, TransientError) for answer in answers)
        assert {str(answer) for answer in answers} == {f"{path}, bytes 0 to {size}: Input/output error"}
    fault.unlink()
    assert read(path, staged=False) == expected


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
