"""Equal tensors of a node's checkpoints: what need not be read, since another checkpoint has it in DRAM. Pure.

Tensors are equal when their digests are, over dtype, shape and bytes. A piece all of whose bytes belong to such tensors
is spared: it gets no slot and is not read, and the tensors in it are those of the lender, at their own place in the
pool. A tensor that is in pieces which are read anyway comes from there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple

from serverless_llm.domain import CheckpointId
from serverless_llm.loader import plan
from serverless_llm.loader.header import TensorEntry
from serverless_llm.loader.manifest import FileEntry
from serverless_llm.loader.plan import Piece

LEAST = 1 << 20  # bytes of a tensor that is worth a digest; smaller ones beside it get theirs, too
DIGEST = 32  # bytes, blake3: checkpoints are not trusted
SEAL = 16
DEAR = 2  # bytes that stay pinned with lenders for each byte spared, at most
MOST = 4096  # runs of one loan, which must go into a message; equal tensors mostly follow one another
FORMAT = "serverless-llm tensors 1 blake3"


class Known(NamedTuple):
    """A checkpoint with the digests of all its tensors, in the order of its files."""

    checkpoint: CheckpointId
    files: Sequence[FileEntry]
    digests: Sequence[bytes]


class Part(NamedTuple):
    """What of a tensor is in one slot: `span` of its file."""

    span: Piece
    entry: TensorEntry

    @property
    def first(self) -> bool:
        return self.span.offset == self.entry.start

    @property
    def last(self) -> bool:
        return self.span.stop == self.entry.end


class Run(NamedTuple):
    """Whole tensors that follow one another, bytes [start, stop) of a file: they lie from `at` on in file `lender`."""

    file: int
    start: int
    stop: int
    lender: int
    at: int


class Borrowed(NamedTuple):
    """`length` bytes at `offset` of file `lender`, within one slot: that of the lending checkpoint's piece `home`."""

    lender: int
    offset: int
    length: int
    checkpoint: CheckpointId
    home: Piece


class Loan(NamedTuple):
    """What a checkpoint's replica borrows.

    Attributes:
        sizes: bytes of the lenders' files, whose numbers follow those of the borrower's own.
        runs: the borrowed tensors, in order.
        spans: where they are, no byte twice.
        spared: the borrower's pieces that need no slot.
    """

    sizes: list[int]
    runs: list[Run]
    spans: list[Borrowed]
    spared: frozenset[Piece]

    def held(self) -> dict[CheckpointId, set[Piece]]:
        """The pieces of each lender that have it."""
        held: dict[CheckpointId, set[Piece]] = defaultdict(set)
        for span in self.spans:
            held[span.checkpoint].add(span.home)
        return held

    @property
    def dear(self) -> bool:
        """Whether it would keep so much of the lenders in DRAM that reading is cheaper."""
        pinned = sum(piece.length for pieces in self.held().values() for piece in pieces)
        return pinned > DEAR * sum(piece.length for piece in self.spared)


class Lent(NamedTuple):
    """A loan as the borrower's worker is told of it.

    Attributes:
        sizes, runs: as of `Loan`.
        total: bytes that land, lent ones and the borrower's own.
    """

    sizes: Sequence[int]
    runs: Sequence[Run]
    total: int

    def find(self, file: int, entry: TensorEntry) -> tuple[int, TensorEntry]:
        """The number of the file that has this tensor of `file`, and the tensor as it is there."""
        place = bisect_right(self.runs, (file, entry.start), key=lambda run: run[:2]) - 1
        run = self.runs[place] if place >= 0 else None
        if run is None or run.file != file or entry.start >= run.stop or not entry.nbytes:
            return file, entry
        start = run.at + entry.start - run.start
        return run.lender, entry._replace(start=start, end=start + entry.nbytes)


NOTHING = Lent((), (), 0)


class Twins(NamedTuple):
    """`length` tensors of a checkpoint, from the one of number `mine` on, equal to another's from `theirs` on."""

    mine: int
    theirs: int
    length: int


class _Site(NamedTuple):
    """Where a lender has a tensor; `size` is its file's."""

    checkpoint: CheckpointId
    file: int
    size: int
    start: int


def loan(
    borrower: Known,
    lenders: Iterable[Known],
    landed: Mapping[CheckpointId, Collection[Piece]],
    homeless: Iterable[Piece],
    slot_bytes: int,
) -> Loan | None:
    """What the borrower need not read; None where that is nothing, or too little for what would be leased for it.

    Args:
        landed: the pieces of each lender that are in the pool.
        homeless: the borrower's pieces that have no slot.
    """
    sites = _sites(set(borrower.digests), lenders, landed, slot_bytes)
    equal = [
        (Piece(file, entry.start, entry.nbytes), sites[digest])
        for (file, entry), digest in zip(tensors(borrower.files), borrower.digests, strict=True)
        if digest in sites
    ]
    sizes = [file.size for file in borrower.files]
    spared = _spared((tensor for tensor, _ in equal), sizes, homeless, slot_bytes)
    used = [
        (tensor, site)
        for tensor, site in equal
        if any(home in spared for home, _ in _homes(tensor, sizes[tensor.file], slot_bytes))
    ]
    files = sorted({site[:3] for _, site in used})
    numbers = {file: number for number, file in enumerate(files, start=len(sizes))}
    runs = _runs(Run(one.file, one.offset, one.stop, numbers[site[:3]], site.start) for one, site in used)
    if not 0 < len(runs) <= MOST:
        return None
    spans = [
        Borrowed(number, offset, length, checkpoint, plan.home(Piece(file, offset, length), size, slot_bytes))
        for (checkpoint, file, size), number in numbers.items()
        for offset, length in _spans([run for run in runs if run.lender == number], slot_bytes)
    ]
    found = Loan([size for _, _, size in files], runs, spans, spared)
    return None if found.dear else found


def twins(one: Known, other: Known) -> list[Twins]:
    """The tensors of `one` that `other` has, too: that of the same name where several are equal, else the first."""
    names = [entry.name for _, entry in tensors(other.files)]
    first: dict[bytes, int] = {}
    exact: dict[tuple[bytes, str], int] = {}
    for number, (name, digest) in enumerate(zip(names, other.digests, strict=True)):
        first.setdefault(digest, number)
        exact[digest, name] = number
    found: list[Twins] = []
    for mine, ((_, entry), digest) in enumerate(zip(tensors(one.files), one.digests, strict=True)):
        if digest not in first:
            continue
        theirs = exact.get((digest, entry.name), first[digest])
        last = found[-1] if found else None
        if last and (last.mine + last.length, last.theirs + last.length) == (mine, theirs):
            found[-1] = last._replace(length=last.length + 1)
        else:
            found.append(Twins(mine, theirs, 1))
    return found


def lent_bytes(
    checkpoints: Collection[Known],
    landed: Mapping[CheckpointId, Collection[Piece]],
    homeless: Mapping[CheckpointId, Collection[Piece]],
    slot_bytes: int,
) -> dict[CheckpointId, int]:
    """Of each one with homeless pieces, bytes of those that a loan could spare; it may find them too dear.

    Args:
        landed: the pieces of each that are in the pool.
        homeless: the pieces of each that have no slot.
    """
    common = {digest for digest, count in _owners(checkpoints).items() if count > 1}
    there: dict[bytes, set[CheckpointId]] = defaultdict(set)
    for known in checkpoints:
        for digest, _, _ in _offered(known, landed[known.checkpoint], common, slot_bytes):
            there[digest].add(known.checkpoint)
    lent = {}
    for known in checkpoints:
        pairs = zip(tensors(known.files), known.digests, strict=True)
        equal = (
            Piece(file, entry.start, entry.nbytes)
            for (file, entry), digest in pairs
            if there.get(digest, set()) - {known.checkpoint}
        )
        sizes = [file.size for file in known.files]
        spared = _spared(equal, sizes, homeless[known.checkpoint], slot_bytes)
        if spared:
            lent[known.checkpoint] = sum(piece.length for piece in spared)
    return lent


def own_bytes(checkpoints: Collection[Known]) -> dict[CheckpointId, int]:
    """Each one's bytes but for the tensors that another has, too."""
    owners = _owners(checkpoints)
    own = {}
    for known in checkpoints:
        pairs = zip(tensors(known.files), known.digests, strict=True)
        shared = sum(entry.nbytes for (_, entry), digest in pairs if owners[digest] > 1)
        own[known.checkpoint] = sum(file.size for file in known.files) - shared
    return own


def head(entry: TensorEntry) -> bytes:
    """What a tensor's digest covers before its bytes."""
    return f"{entry.dtype} {list(entry.shape)}\n".encode()


def tensors(files: Iterable[FileEntry]) -> Iterator[tuple[int, TensorEntry]]:
    """(number of its file, entry) of each, in the order of their digests."""
    return ((number, entry) for number, file in enumerate(files) for entry in file.header.tensors)


def worthwhile(files: Iterable[FileEntry]) -> bool:
    """Whether there is a tensor to be shared."""
    return any(entry.nbytes >= LEAST for _, entry in tensors(files))


def orders(files: Iterable[FileEntry], slot_bytes: int, portion: int) -> Iterator[list[Part]]:
    """All tensors in order, to be hashed in portions of at most `portion` bytes, which is no less than a slot."""
    order: list[Part] = []
    filled = 0
    for number, entry in tensors(files):
        for span in _cut(number, entry.start, entry.end, slot_bytes) or [Piece(number, entry.start, 0)]:
            if filled + span.length > portion:
                yield order
                order, filled = [], 0
            order.append(Part(span, entry))
            filled += span.length
    if order:
        yield order


def encode(checkpoint: CheckpointId, digests: Sequence[bytes]) -> bytes:
    """The digests of all tensors, as they are stored."""
    body = _title(checkpoint, len(digests)) + b"".join(digests)
    return body + _seal(body)


def decode(checkpoint: CheckpointId, count: int, raw: bytes) -> list[bytes] | None:
    """What was stored; None where it is damaged, or not of so many tensors of this checkpoint."""
    title, body = _title(checkpoint, count), raw[:-SEAL]
    if not body.startswith(title) or len(body) != len(title) + DIGEST * count or raw[-SEAL:] != _seal(body):
        return None
    return [body[at : at + DIGEST] for at in range(len(title), len(body), DIGEST)]


def _title(checkpoint: CheckpointId, count: int) -> bytes:
    return f"{FORMAT} {checkpoint} {count}\n".encode()


def _seal(body: bytes) -> bytes:
    return blake2b(body, digest_size=SEAL).digest()


def _owners(checkpoints: Iterable[Known]) -> Counter[bytes]:
    """How many of them have each tensor."""
    return Counter(digest for known in checkpoints for digest in set(known.digests))


def _spared(
    equal: Iterable[Piece], sizes: Sequence[int], homeless: Iterable[Piece], slot_bytes: int
) -> frozenset[Piece]:
    """The homeless pieces all of whose bytes are in these tensors of files of these sizes."""
    covered = Counter[Piece]()
    for tensor in equal:
        for home, length in _homes(tensor, sizes[tensor.file], slot_bytes):
            covered[home] += length
    return frozenset(piece for piece in homeless if covered[piece] == piece.length)


def _offered(
    known: Known, there: Collection[Piece], wanted: Collection[bytes], slot_bytes: int
) -> Iterator[tuple[bytes, int, TensorEntry]]:
    """The wanted tensors of a checkpoint that are whole in these pieces, with their digests and files."""
    for (file, entry), digest in zip(tensors(known.files), known.digests, strict=True):
        if digest not in wanted:
            continue
        homes = _homes(Piece(file, entry.start, entry.nbytes), known.files[file].size, slot_bytes)
        if homes and all(home in there for home, _ in homes):
            yield digest, file, entry


def _sites(
    wanted: Collection[bytes],
    lenders: Iterable[Known],
    landed: Mapping[CheckpointId, Collection[Piece]],
    slot_bytes: int,
) -> dict[bytes, _Site]:
    """Where these digests' tensors are in the pool: with whom has most of them, so that runs are long."""
    offers = []
    for known in lenders:
        offer, nbytes = {}, 0
        for digest, file, entry in _offered(known, landed[known.checkpoint], wanted, slot_bytes):
            offer[digest] = _Site(known.checkpoint, file, known.files[file].size, entry.start)
            nbytes += entry.nbytes
        offers.append((nbytes, known.checkpoint, offer))
    found: dict[bytes, _Site] = {}
    for _, _, offer in sorted(offers, key=lambda offer: offer[:2]):
        found |= offer
    return found


def _homes(tensor: Piece, size: int, slot_bytes: int) -> list[tuple[Piece, int]]:
    """The pieces of a file of `size` bytes that a tensor is in, with its bytes in each."""
    parts = _cut(tensor.file, tensor.offset, tensor.stop, slot_bytes)
    return [(plan.home(part, size, slot_bytes), part.length) for part in parts]


def _cut(file: int, start: int, stop: int, slot_bytes: int) -> list[Piece]:
    """Bytes [start, stop) of a file, slot by slot."""
    edges = [start, *range(start - start % slot_bytes + slot_bytes, stop, slot_bytes), stop]
    return [Piece(file, one, other - one) for one, other in pairwise(edges) if one < other]


def _runs(tensors: Iterable[Run]) -> list[Run]:
    """The same in as few runs as possible."""
    runs: list[Run] = []
    for one in sorted(tensors):
        last = runs[-1] if runs else None
        if last and _end(last) == (one.file, one.start, one.lender, one.at):
            runs[-1] = last._replace(stop=one.stop)
        else:
            runs.append(one)
    return runs


def _end(run: Run) -> tuple[int, int, int, int]:
    return run.file, run.stop, run.lender, run.at + run.stop - run.start


def _spans(runs: Iterable[Run], slot_bytes: int) -> list[tuple[int, int]]:
    """(offset, bytes) of what runs of one lending file cover together, slot by slot."""
    spans: list[tuple[int, int]] = []
    done = 0
    for start, stop in sorted((run.at, run.at + run.stop - run.start) for run in runs):
        parts = _cut(0, max(start, done), stop, slot_bytes)
        spans += [(part.offset, part.length) for part in parts]
        done = max(done, stop)
    return spans
