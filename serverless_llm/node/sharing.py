"""Which tensors of a node's checkpoints are equal: learned in the background, kept on disk, used by later loads.

Digests are computed from a checkpoint's bytes in DRAM, with the least priority and only while nothing is loaded. That
takes no lease. Slots are given to others by loads only, so what was hashed counts if none has begun meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from serverless_llm.loader import plan, sharing
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.pipeline import Pipeline
from serverless_llm.loader.pool import Pool
from serverless_llm.loader.sharing import Known, Loan, Part
from serverless_llm.node.digests import Coding, DigestStore
from serverless_llm.node.threads import apart

if TYPE_CHECKING:
    from blake3 import blake3

PORTION = 32 << 20  # bytes hashed in one go; who closes the pool waits for so many
PAUSE = 1.0  # seconds between two looks whether nothing is loaded
LEAST_PRIORITY = 19  # of a thread, setpriority(2): steps of replicas on the same cores go first


def _count(manifest: Manifest) -> int:
    return sum(1 for _ in sharing.tensors(manifest.files))


TENSORS: Coding[Sequence[bytes]] = Coding(
    lambda manifest, digests: sharing.encode(manifest.checkpoint, digests),
    lambda manifest, raw: sharing.decode(manifest.checkpoint, _count(manifest), raw),
)


class Sharing:
    """Used on the agent's loop only.

    Args:
        directory: where digests are kept.
        idle: whether no replica is on its way.
    """

    def __init__(
        self, pool: Pool, pipeline: Pipeline, directory: Path, idle: Callable[[], bool], pause: float = PAUSE
    ) -> None:
        self._pool = pool
        self._pipeline = pipeline
        self._store = DigestStore(directory, TENSORS)
        self._idle = idle
        self._pause = pause
        self._known: dict[str, Known] = {}
        self._unknown: dict[str, Manifest] = {}
        self._task: asyncio.Task[None] | None = None
        self._hashing = threading.Lock()  # held while the pool is read
        self._closed = False
        self._own: dict[str, int] = {}
        self._lent: dict[str, int] = {}
        self._lent_of: object = None  # as the tier was

    async def meet(self, found: Manifest) -> None:
        """The checkpoint is to be loaded: finds its digests, or notes that they are to be learned."""
        if found.checkpoint in self._known or not sharing.worthwhile(found.files):
            return
        digests = await apart(lambda: self._store.read(found)) if found.checkpoint in self._store.known else None
        if digests is None:
            self._unknown[found.checkpoint] = found
        else:
            self._know(found, digests)

    def loan(self, found: Manifest) -> Loan | None:
        """What a load of the checkpoint need not read, as the tier is now."""
        mine = self._known.get(found.checkpoint)
        others = [one for one in self._known.values() if one is not mine]
        return self._pipeline.lending.find(mine, others) if mine and others else None

    def twins(self, checkpoint: str, others: Mapping[int, str]) -> list[tuple[int, int, int, int]]:
        """The replicas of `others`, each with its checkpoint, that have tensors of this one: as of `sharing.twins`.

        Of so many runs only that a message bears them.
        """
        mine, found = self._known.get(checkpoint), list[tuple[int, int, int, int]]()
        for replica, other in others.items():
            if mine and other in self._known and len(found) < sharing.MOST:
                found += [(replica, *run) for run in sharing.twins(mine, self._known[other])]
        return found[: sharing.MOST]

    def own_bytes(self) -> dict[str, int]:
        """Of each checkpoint with known digests, the bytes that no other of them has."""
        return self._own

    def lent_bytes(self) -> dict[str, int]:
        """Of checkpoints with known digests, bytes that a load would not read now: others have them in DRAM."""
        if self._pipeline.settling:  # it would be another with every piece
            return self._lent
        now = self._pipeline.tier.residents()
        if now != self._lent_of:
            self._lent, self._lent_of = self._pipeline.lending.lent_bytes([*self._known.values()]), now
        return self._lent

    def learn(self) -> None:
        """Learns what is whole in DRAM, as soon as nothing is loaded. Returns at once."""
        if self._unknown and (self._task is None or self._task.done()):
            self._task = asyncio.ensure_future(self._learn())

    def forget(self, checkpoint: str) -> None:
        """No model names the checkpoint any more."""
        self._unknown.pop(checkpoint, None)
        if self._known.pop(checkpoint, None):
            self._compare()

    def close(self) -> None:
        """Before the pool is closed: waits for the portion in hand."""
        if self._task is not None:
            self._task.cancel()
        with self._hashing:
            self._closed = True

    def _know(self, found: Manifest, digests: Sequence[bytes]) -> None:
        self._known[found.checkpoint] = Known(found.checkpoint, found.files, digests)
        self._compare()

    def _compare(self) -> None:
        self._own = sharing.own_bytes(self._known.values())
        self._lent_of = None

    async def _learn(self) -> None:
        while True:
            await self._calm()
            found = next((one for one in self._unknown.values() if self._whole(one)), None)
            if found is None:
                return
            digests = await self._digests(found)
            if digests is not None and self._unknown.pop(found.checkpoint, None) is not None:
                self._know(found, digests)
                await apart(lambda found=found, digests=digests: self._store.write(found, digests))  # type: ignore[misc]

    async def _calm(self) -> None:
        while not (self._idle() and self._pipeline.quiet):
            await asyncio.sleep(self._pause)

    def _whole(self, found: Manifest) -> bool:
        pieces = plan.pieces(found.files, (), self._pool.slot_bytes)
        return not self._pipeline.tier.missing(found.checkpoint, pieces)

    async def _digests(self, found: Manifest) -> list[bytes] | None:
        """Those of all tensors; None where the bytes went before it was done."""
        digests: list[bytes] = []
        state = None
        for order in sharing.orders(found.files, self._pool.slot_bytes, PORTION):
            step = None
            while step is None:
                await self._calm()
                if not self._whole(found):
                    return None
                step = await self._step(found, order, state)
            state, more = step
            digests += more
        return digests

    async def _step(
        self, found: Manifest, order: Sequence[Part], state: blake3 | None
    ) -> tuple[blake3 | None, list[bytes]] | None:
        """One portion: the unfinished digest, and the finished ones; None where it does not count."""
        loads, slots = self._pipeline.loads, self._pipeline.tier.landed(found.checkpoint)
        sizes = [file.size for file in found.files]
        homes = [plan.home(part.span, sizes[part.span.file], self._pool.slot_bytes) for part in order]
        offsets = [
            self._pool.offset(slots[home]) + part.span.offset - home.offset
            for part, home in zip(order, homes, strict=True)
        ]
        step = await apart(lambda: self._hash(order, offsets, state))
        return step if loads == self._pipeline.loads and self._whole(found) else None

    def _hash(
        self, order: Sequence[Part], offsets: Sequence[int], state: blake3 | None
    ) -> tuple[blake3 | None, list[bytes]]:
        """On a thread of its own."""
        from blake3 import blake3

        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)
        digests: list[bytes] = []
        hasher = state.copy() if state else None
        with self._hashing:
            for part, offset in zip(order, offsets, strict=True):
                if self._closed:
                    break
                if part.first:
                    hasher = blake3(sharing.head(part.entry))
                assert hasher is not None
                hasher.update(self._pool.range(offset, part.span.length))
                if part.last:
                    digests.append(hasher.digest())
        return hasher, digests
