"""The manifests of what an agent is asked to load, read from disk when they are needed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Container
from functools import partial
from pathlib import Path

from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.loader.manifest import Manifest
from serverless_llm.node import identity
from serverless_llm.node.threads import apart

SHARED_S = 60.0  # a reading of headers is shared for so long: a dead mount costs a thread a minute, and no more loads


class Manifests:
    """By checkpoint. Everything runs on the agent's loop, but for the reading."""

    def __init__(self) -> None:
        self._known: dict[str, Manifest] = {}
        self._reading: dict[tuple[str, str], tuple[float, asyncio.Future[Manifest]]] = {}

    def forget(self, checkpoint: str) -> None:
        """It is read again when it is needed next."""
        self._known.pop(checkpoint, None)

    async def of(self, source: str, checkpoint: str, here: Container[str]) -> Manifest:
        """The checkpoint's manifest, read again unless it is among those whose bytes are `here`, or written anew.

        Raises:
            TransientError: it is gone, or cannot be read now.
            CheckpointError: it is damaged, or no longer what was deployed.
        """
        self._known = {known: one for known, one in self._known.items() if known in here}
        found = self._known.get(checkpoint)
        if found is None or await apart(partial(identity.written_anew, found)):
            try:
                found = await asyncio.shield(self._read(source, checkpoint))
            except TransientError as error:
                raise TransientError(f"{error}; mend that, and it is served again within a minute") from error
            except CheckpointError as error:  # it was whole when it was deployed
                raise CheckpointError(f"{error}; mend that and deploy it again") from error
            if found.checkpoint != checkpoint:
                raise CheckpointError(f"{source} was changed after it was deployed: deploy it again")
            self._known[checkpoint] = found
        return found

    def _read(self, source: str, checkpoint: str) -> asyncio.Future[Manifest]:
        """One reading for all who want it: on a dead mount it goes on when they have given up.

        It may never return, though the mount is back: after a while another one is begun in its place.
        """
        key, now = (source, checkpoint), time.monotonic()
        began, reading = self._reading.get(key, (-math.inf, None))
        if reading is not None and now - began < SHARED_S:
            return reading

        def forget(done: asyncio.Future[Manifest]) -> None:
            if key in self._reading and self._reading[key][1] is done:
                del self._reading[key]

        reading = apart(lambda: identity.read(Path(source)))
        self._reading[key] = now, reading
        reading.add_done_callback(forget)
        return reading
