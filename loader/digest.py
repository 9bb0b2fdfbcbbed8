"""Digests of a checkpoint's blocks: which blocks are whole in the pool, which are due, what differs. Pure.

A block is `BLOCK` bytes of a file from its first byte on, the last one of a file shorter. Slots of the pool are whole
multiples of it, so a block that has landed lies in one piece. `Hasher` computes the digests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple
from zlib import crc32

from serverless_llm.domain import CheckpointId
from serverless_llm.loader.manifest import FileEntry
from serverless_llm.loader.plan import Landed

BLOCK = 1 << 20
DIGEST = 16  # bytes of one digest, xxh3-128
SAMPLE = 64  # one block in so many is compared by `sample`; arbitrary
NAMED = 3  # tensors in a message
FORMAT = "serverless-llm digests 1 xxh3-128"


class Key(NamedTuple):
    """A block: the number of its file, and its own there."""

    file: int
    number: int


Digests = Mapping[Key, bytes]
Due = Callable[[Key], bool]  # whether a block is compared


def key_of(block: Landed) -> Key:
    return Key(block.file, block.offset // BLOCK)


def count(sizes: Iterable[int]) -> int:
    """Blocks of files of these sizes."""
    return sum(-(-size // BLOCK) for size in sizes)


class Blocks:
    """Cuts the spans of one load into parts of blocks, and tells when a block is whole.

    Args:
        sizes: bytes of the files.
        only: blocks that are wanted; None: all.
    """

    def __init__(self, sizes: Sequence[int], only: Collection[Key] | None = None) -> None:
        self._sizes = sizes
        self._only = only
        self._there: dict[Key, int] = {}  # bytes of blocks that are not whole

    def parts(self, spans: Iterable[Landed]) -> Iterator[Landed]:
        """What of the wanted blocks these spans have, in order, each part of one block."""
        for span in spans:
            start, stop = span.offset, span.offset + span.length
            while start < stop:
                end = min(stop, start - start % BLOCK + BLOCK)
                part = Landed(span.file, start, end - start, span.pool_offset + start - span.offset)
                if self._only is None or key_of(part) in self._only:
                    yield part
                start = end

    def completed(self, part: Landed) -> Landed | None:
        """The block that this part, which overlaps no earlier one, makes whole."""
        key, ahead = key_of(part), part.offset % BLOCK
        start = part.offset - ahead
        there = self._there.pop(key, 0) + part.length
        if there == min(BLOCK, self._sizes[part.file] - start):
            return Landed(part.file, start, there, part.pool_offset - ahead)
        self._there[key] = there
        return None


def joined(parts: Iterable[Landed], slot_bytes: int) -> list[Landed]:
    """The same bytes in the same order, as few spans as possible, none of two slots: workers map by them."""
    spans: list[Landed] = []
    for part in parts:
        if part.offset % slot_bytes and spans and _follows(spans[-1], part):
            spans[-1] = spans[-1]._replace(length=spans[-1].length + part.length)
        else:
            spans.append(part)
    return spans


def _follows(span: Landed, part: Landed) -> bool:
    ends = span.file, span.offset + span.length, span.pool_offset + span.length
    return ends == (part.file, part.offset, part.pool_offset)


def every(key: Key) -> bool:
    """What a full comparison compares."""
    return True


def sampled(checkpoint: CheckpointId, sizes: Sequence[int], start: int) -> Due:
    """What one start compares: one block in `SAMPLE`, and each block within as many starts in a row.

    Args:
        start: how many starts there were before, from any number on.
    """
    first = [count(sizes[:number]) for number in range(len(sizes))]
    period = max(1, min(SAMPLE, count(sizes)))
    shift = crc32(checkpoint.encode()) + start
    return lambda key: (first[key.file] + key.number + shift) % period == 0


def encode(checkpoint: CheckpointId, sizes: Sequence[int], digests: Digests) -> bytes:
    """The digests of all blocks, as they are stored."""
    body = _head(checkpoint, sizes) + b"".join(digests[key] for key in _keys(sizes))
    return body + _seal(body)


def decode(checkpoint: CheckpointId, sizes: Sequence[int], raw: bytes) -> Digests | None:
    """What was stored; None where it is damaged, or of something else."""
    head, body = _head(checkpoint, sizes), raw[:-DIGEST]
    keys = _keys(sizes)
    if not body.startswith(head) or len(body) != len(head) + DIGEST * len(keys) or raw[-DIGEST:] != _seal(body):
        return None
    return {key: body[at : at + DIGEST] for key, at in zip(keys, range(len(head), len(body), DIGEST), strict=True)}


def _head(checkpoint: CheckpointId, sizes: Sequence[int]) -> bytes:
    return f"{FORMAT} {BLOCK} {checkpoint} {list(sizes)}\n".encode()


def _keys(sizes: Sequence[int]) -> list[Key]:
    return [Key(file, number) for file, size in enumerate(sizes) for number in range(count([size]))]


def _seal(body: bytes) -> bytes:
    return blake2b(body, digest_size=DIGEST).digest()


def described(files: Sequence[FileEntry], differing: Collection[Landed]) -> str:
    """The first of the blocks that differ, and what is in it: for those who have to mend the file."""
    first = min(differing)
    file, stop = files[first.file], first.offset + first.length
    names = ["the header"] if first.offset < file.data_offset else []
    names += [repr(one.name) for one in file.header.tensors if one.start < stop and one.end > first.offset]
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    rest = len(differing) - 1
    others = f" (and {rest} other block{'s' if rest > 1 else ''})" if rest else ""
    return f"{file.path}: bytes {first.offset} ... {stop - 1}{others}, in them {', '.join(names[:NAMED] + more)}"
