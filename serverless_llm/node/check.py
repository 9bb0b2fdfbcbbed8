"""Between a load and its replica: a worker is told of bytes when they are what they were at the first load.

The first load of a checkpoint only learns. Everything runs on the agent's loop; the hasher's thread only posts to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from serverless_llm.loader.digest import Blocks, Digests, Due, Key, every, joined, key_of
from serverless_llm.loader.hasher import Hasher
from serverless_llm.loader.plan import Landed

AT_ONCE = 64  # blocks of one order to the hasher: others wait for so many
IN_A_TURN = (
    1024  # parts of blocks, about 3 ms: a hundred gigabytes in DRAM are told of at once, and the loop has others
)
Post = Callable[[Callable[[], None]], object]  # loop.call_soon_threadsafe


@dataclass(slots=True)
class Tally:
    """What the checks of a node found, since its start.

    Attributes:
        bytes: hashed.
        device: copies of blocks that differed from what was sent to a device.
        dram: blocks that differed, and no more when they were read again.
        disk: blocks that differed when they were read again, too.
    """

    bytes: int = 0
    device: int = 0
    dram: int = 0
    disk: int = 0


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Who is told what a check finds.

    Attributes:
        passed: of spans that are good, all of them once, in the order in which they landed; the last call says so.
        learned: of the digests of all blocks, where none were known; before the last `passed`.
        again: of blocks that differ. They are read again and come through `landed` once more, or the check is
            cancelled.
        failed: of blocks that differ again; nothing follows.
    """

    passed: Callable[[Sequence[Landed], bool], None]
    learned: Callable[[Digests], None]
    again: Callable[[Sequence[Landed]], None]
    failed: Callable[[Sequence[Landed]], None]


@dataclass(slots=True)
class _Round:
    """One reading of the checkpoint, or of what differed in it.

    Attributes:
        arrived: spans that were not cut into parts of blocks yet.
        held: parts of blocks that were not passed on, in the order in which they landed.
        waiting: whole blocks for the hasher.
        flying: it has an order.
        good: blocks that are what they were.
        differing: those that are not.
        last: all has landed.
    """

    blocks: Blocks
    arrived: deque[Landed] = field(default_factory=deque)
    held: deque[Landed] = field(default_factory=deque)
    waiting: deque[Landed] = field(default_factory=deque)
    flying: bool = False
    good: set[Key] = field(default_factory=set)
    differing: dict[Key, Landed] = field(default_factory=dict)
    last: bool = False


class Check:
    """One replica's. `landed` is told of spans as `Load.on_landed`.

    Args:
        sizes: bytes of the checkpoint's files.
        known: their digests; None: they are learned.
        due: whether a block is compared.
        hasher: of the pool that they land in.
        post: runs a callable on the owner's thread.
        verdicts: who is told.
        tally: of the node.
        suspect: blocks that differed in an earlier load: if any do now, that is for good.
        hasty: a difference is told before all has landed: what is behind it would be held, and the rest not come.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        known: Digests | None,
        due: Due,
        hasher: Hasher,
        post: Post,
        verdicts: Verdicts,
        tally: Tally,
        suspect: AbstractSet[Key] = frozenset(),
        hasty: bool = False,
    ) -> None:
        self._sizes = sizes
        self._known = known
        self._due = every if suspect or known is None else due
        self._hasher = hasher
        self._post = post
        self._verdicts = verdicts
        self._tally = tally
        self._suspect = suspect
        self._hasty = hasty
        self._learned: dict[Key, bytes] = {}
        self._round = _Round(Blocks(sizes))
        self._cancelled = False

    def landed(self, spans: Sequence[Landed], last: bool) -> None:
        """These are in the pool, and stay there until the verdict."""
        self._round.arrived += spans
        self._round.last |= last
        self._go_on()

    def cancel(self) -> None:
        """Nothing is told any more. The hasher may still read what it has in hand. Idempotent."""
        self._cancelled = True

    def _go_on(self) -> None:
        now = self._round
        if self._cancelled:
            return
        self._take()
        self._pass()
        if now.flying:
            return
        if now.waiting:
            order = [now.waiting.popleft() for _ in range(min(AT_ONCE, len(now.waiting)))]
            now.flying = True
            self._hasher.hash(order, lambda digests: self._post(lambda: self._hashed(order, digests)))
        elif self._hasty and now.differing:
            self._conclude()
        elif now.arrived:
            self._post(self._go_on)
        elif now.last:
            self._conclude()

    def _take(self) -> None:
        """Cuts what has arrived, as much as the next order and this turn of the loop want."""
        now, most = self._round, len(self._round.held) + IN_A_TURN
        while now.arrived and len(now.waiting) < AT_ONCE and len(now.held) < most:
            for part in now.blocks.parts([now.arrived.popleft()]):
                now.held.append(part)
                if self._due(key_of(part)) and (block := now.blocks.completed(part)):
                    now.waiting.append(block)

    def _hashed(self, blocks: Sequence[Landed], digests: Sequence[bytes]) -> None:
        if self._cancelled:
            return
        now = self._round
        now.flying = False
        for block, found in zip(blocks, digests, strict=True):
            key = key_of(block)
            self._tally.bytes += block.length
            if self._known is None:
                self._learned[key] = found
            elif self._known[key] != found:
                now.differing[key] = block
                continue
            now.good.add(key)
        self._go_on()

    def _pass(self) -> None:
        """Tells of what is good, up to the first part of a block that nothing is known of."""
        now, good = self._round, []
        while now.held:
            key = key_of(now.held[0])
            if key in now.good or not self._due(key):
                good.append(now.held.popleft())
            elif key in now.differing and not self._hasty:
                now.held.popleft()
            else:
                break
        if good:
            self._verdicts.passed(joined(good, self._hasher.pool.slot_bytes), False)

    def _conclude(self) -> None:
        differing = self._round.differing
        if differing and not self._suspect:
            self._suspect, self._due = differing.keys(), every
            self._round = _Round(Blocks(self._sizes, differing.keys()))
            self._verdicts.again(list(differing.values()))
            return
        self._tally.dram += len(self._suspect - differing.keys())
        self._tally.disk += len(differing)
        if differing:
            self._verdicts.failed(list(differing.values()))
            return
        if self._known is None:
            self._verdicts.learned(self._learned)
        self._verdicts.passed((), True)
