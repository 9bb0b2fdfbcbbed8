"""Makes the checks of a node's replicas: which digests are known, which blocks are due, which were found to differ."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from serverless_llm.loader import digest
from serverless_llm.loader.digest import Digests, Key, key_of
from serverless_llm.loader.hasher import Hasher
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.pool import Pool
from serverless_llm.node.check import Check, Post, Tally, Verdicts
from serverless_llm.node.digests import BLOCKS, DigestStore, sizes_of
from serverless_llm.node.threads import apart


class Verifier:
    """Used on the agent's loop only. `directory`: where digests are kept.

    Attributes:
        tally: what all checks found.
    """

    def __init__(self, pool: Pool, directory: Path, post: Post) -> None:
        self._hasher = Hasher(pool)
        self._store = DigestStore(directory, BLOCKS)
        self._post = post
        self._starts = Counter[str]()  # by checkpoint: each compares another sample
        self._first = random.randrange(digest.SAMPLE)  # else the samples of short-lived agents would be alike
        self._suspects: dict[str, set[Key]] = {}
        self.tally = Tally()

    def known(self) -> list[str]:
        """The checkpoints whose digests are known."""
        return sorted(self._store.known)

    async def digests(self, found: Manifest) -> Digests | None:
        """Those of a checkpoint; None where the next load learns them."""
        return await apart(lambda: self._store.read(found))

    def sample(self, checkpoint: str) -> int:
        """Which sample the next `check` compares, as `start` of `digest.sampled`."""
        return self._first + self._starts[checkpoint]

    def check(self, found: Manifest, known: Digests | None, sample: bool, verdicts: Verdicts, hasty: bool) -> Check:
        """What a replica's bytes pass before its worker is told of them; arguments as of `Check`."""
        sizes, checkpoint = sizes_of(found), found.checkpoint
        due = digest.sampled(checkpoint, sizes, self.sample(checkpoint)) if sample else digest.every
        self._starts[checkpoint] += 1
        suspect = self._suspects.pop(checkpoint, set())
        return Check(sizes, known, due, self._hasher, self._post, verdicts, self.tally, suspect, hasty)

    def suspect(self, checkpoint: str, blocks: Sequence[Landed]) -> None:
        """These differ, and are read again by the next load."""
        self._suspects[checkpoint] = set(map(key_of, blocks))

    def learned(self, found: Manifest, digests: Digests) -> None:
        """Keeps the digests, beside the loop."""
        apart(lambda: self._store.write(found, digests))

    def close(self) -> None:
        """Before the pool is closed."""
        self._hasher.close()
