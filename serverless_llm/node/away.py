"""Which bytes of checkpoints behind a URL only their servers have; less and less, while the disk tier fills."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from serverless_llm.domain import CheckpointId
from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.loader import filling
from serverless_llm.node.threads import apart

log = logging.getLogger(__name__)


class _Watched(NamedTuple):
    directory: Path
    nbytes: int


class Away:
    """Of the checkpoints that an agent has read from servers, or its head tells of. All runs on the agent's loop."""

    def __init__(self) -> None:
        self._known: dict[CheckpointId, int] = {}
        self._watched: dict[CheckpointId, _Watched] = {}
        self._look: asyncio.Task[None] | None = None
        self._first: asyncio.Task[None] | None = None

    def look(self, directories: Mapping[CheckpointId, str]) -> None:
        """Of these only their servers had bytes when they were deployed: a disk that has all by now is believed.

        One look at each, since loads watch the rest, and apart from those that are watched: a disk may never answer.
        """
        if self._first is not None:
            self._first.cancel()
        self._first = asyncio.ensure_future(self._see_whole(directories))

    def watch(self, checkpoint: CheckpointId, directory: Path, nbytes: int) -> None:
        """A load reads this from its server, or the rest of it; its weights have `nbytes`."""
        self._watched[checkpoint] = _Watched(directory, nbytes)

    def forget(self, checkpoint: CheckpointId) -> None:
        self._known.pop(checkpoint, None)
        self._watched.pop(checkpoint, None)

    def bytes(self) -> dict[CheckpointId, int]:
        """As they were seen last; has the disk looked at anew, as long as it lacks something."""
        if self._watched and (self._look is None or self._look.done()):
            self._look = asyncio.ensure_future(self._see(dict(self._watched)))
        return dict(self._known)

    def share(self, checkpoint: CheckpointId) -> float:
        """That of its bytes as they were seen last; all of what was not seen yet, none of what no load has watched."""
        watched = self._watched.get(checkpoint)
        return self._known.get(checkpoint, watched.nbytes) / watched.nbytes if watched else 0.0

    def close(self) -> None:
        for task in (self._look, self._first):
            if task is not None:
                task.cancel()

    async def _see_whole(self, directories: Mapping[CheckpointId, str]) -> None:
        for checkpoint, directory in directories.items():
            with contextlib.suppress(CheckpointError):  # a load will tell
                if not await apart(partial(filling.lacking, Path(directory))):
                    self._known.setdefault(checkpoint, 0)

    async def _see(self, watched: dict[CheckpointId, _Watched]) -> None:
        """A disk may never answer: then what was seen last stays."""
        for checkpoint, (directory, _) in watched.items():
            try:
                lacking = await apart(partial(filling.lacking, directory))
            except TransientError:  # what was seen last stays until the next look
                continue
            except CheckpointError as error:
                log.warning("%s", error)
                self._watched.pop(checkpoint, None)
                continue
            if checkpoint in self._watched:  # else it was forgotten meanwhile
                self._known[checkpoint] = lacking
                if not lacking:
                    del self._watched[checkpoint]
