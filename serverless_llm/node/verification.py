"""What follows from the check of one replica's bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from serverless_llm.loader import digest
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.pipeline import Pipeline
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.waiting import Load
from serverless_llm.node.check import Check, Verdicts
from serverless_llm.node.replica import Replica
from serverless_llm.node.verifier import Verifier

log = logging.getLogger(__name__)

DIFFERS = (
    "%s, are not what they were at the first load, read twice; restore the file, or, if it is right, touch it, and "
    "deploy it again"
)


class Verification:
    """One replica's, once its load has its room.

    Args:
        load: reserves what the replica needs, once more.
        passed: told of the bytes that are good, as in `Verdicts`.
        failed: told why the replica cannot be placed, and whether for good.
    """

    def __init__(
        self,
        verifier: Verifier,
        pipeline: Pipeline,
        found: Manifest,
        replica: Replica,
        load: Callable[[], Load],
        passed: Callable[[Sequence[Landed], bool], None],
        failed: Callable[[str, bool], None],
    ) -> None:
        self._verifier = verifier
        self._pipeline = pipeline
        self._found = found
        self._replica = replica
        self._load = load
        self._passed = passed
        self._failed = failed

    def check(self, known: digest.Digests | None) -> Check:
        """What the bytes pass first. `known`: the checkpoint's digests, None where this load learns them."""
        replica, found = self._replica, self._found
        assert replica.load is not None
        verdicts = Verdicts(
            passed=self._passed,
            learned=lambda digests: self._verifier.learned(found, digests),
            again=self._read_again,
            failed=self._differs,
        )
        return self._verifier.check(found, known, replica.order.verify == "sample", verdicts, replica.load.ringed)

    def _read_again(self, blocks: Sequence[Landed]) -> None:
        """Memory may be at fault: what differs is read once more before the disk is said to be."""
        replica, found = self._replica, self._found
        assert replica.load is not None
        differing = digest.described(found.files, blocks)
        log.warning("%s, differ from the first load and are read again", differing)
        if not self._pipeline.discard(found, blocks) or replica.load.ringed:
            self._verifier.suspect(found.checkpoint, blocks)
            self._failed(f"{differing}, differ from the first load: the next start reads them again", False)
            return
        replica.load = self._load()
        replica.load.start()

    def _differs(self, blocks: Sequence[Landed]) -> None:
        self._pipeline.discard(self._found, blocks)
        self._failed(DIFFERS % digest.described(self._found.files, blocks), True)
