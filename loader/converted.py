"""Tensors that a device holds otherwise than their files do: converted out of the pool, and compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from serverless_llm.loader.digest import BLOCK, Due, key_of
from serverless_llm.loader.held import Held, digest
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.sharing import NOTHING
from serverless_llm.loader.tasks import Flight, Progress, Stored, Task
from serverless_llm.loader.views import view
from serverless_llm.loader.ways import HERE

if TYPE_CHECKING:
    from serverless_llm.loader.upload import Uploader


class Converted(Held):
    """What one conversion wrote, in parts of tensors, each of which counts to the block that it begins in.

    Args:
        stored: where the tensors are; more than are wanted may be there.
        targets: by name, contiguous, as many numbers as are stored, in the type that is wanted, on any device.
        longest: bytes of a part; a multiple of every type's.
        due: as of `Held`; None: nothing is compared.

    Attributes:
        parts: what is to be written; instead of an offset in the pool each has the number of its tensor.
    """

    def __init__(
        self, stored: Iterable[Stored], targets: Mapping[str, torch.Tensor], longest: int, due: Due | None
    ) -> None:
        super().__init__(due or (lambda key: False), again=True)
        self._pairs = [(one, targets[one.entry.name].view(-1)) for one in stored if one.entry.name in targets]
        self.parts = [
            Landed(file, start, min(longest, entry.end - start), number)
            for number, ((file, entry, _), _) in enumerate(self._pairs)
            for start in range(entry.start, entry.end, longest)
        ]

    def write(self, part: Landed) -> None:
        """To its place, for the first time."""
        source, target = self._source(part), self._target(part)
        if self._due(key_of(part)):
            source = source.to(target.dtype)
            self.noted[part] = digest([source])
            self.owed += target.nbytes
        target.copy_(source)

    def forget(self) -> None:
        """Refers to no tensor any more. Idempotent."""
        self._pairs.clear()

    def _send(self, part: Landed) -> None:
        target = self._target(part)
        target.copy_(self._source(part).to(target.dtype))

    def _arrived(self, part: Landed) -> bytes:
        return digest([self._target(part)])

    def _size(self, part: Landed) -> int:
        return self._target(part).nbytes

    def _source(self, part: Landed) -> torch.Tensor:
        """Its numbers, as they are stored."""
        (_, entry, buffer), target = self._pairs[part.pool_offset]
        shape, end = (part.length * target.numel() // entry.nbytes,), part.offset + part.length
        return view(buffer, entry._replace(shape=shape, start=part.offset, end=end))

    def _target(self, part: Landed) -> torch.Tensor:
        (_, entry, _), target = self._pairs[part.pool_offset]
        first, count = (nbytes * target.numel() // entry.nbytes for nbytes in (part.offset - entry.start, part.length))
        return target[first : first + count]


class Conversion(Task):
    """Begins when all the tensors are in the pool, where they stay until it is closed; arguments as of `Converted`."""

    def __init__(
        self,
        uploader: Uploader,
        stored: Iterable[Stored],
        targets: Mapping[str, torch.Tensor],
        on_progress: Progress,
        due: Due | None,
    ) -> None:
        super().__init__(uploader, (), on_progress, NOTHING)
        self._converted = Converted(stored, targets, min(BLOCK, uploader.longest), due)
        self.held = self._converted if due else None
        self.total = sum(part.length for part in self._converted.parts)
        assert self.total
        for part in self._converted.parts:
            uploader.put(self, part)

    def close(self) -> None:
        """When it returns nothing is read or written any more. Idempotent."""
        self._stop()
        self._converted.forget()

    def crosses(self, part: Landed) -> int:
        """None: its bytes crossed when they were mapped."""
        return 0

    def _begin(self, part: Landed) -> Flight:
        if part in self._converted.noted:
            return Flight(0, self._converted.compare(part), HERE)
        self._converted.write(part)
        return Flight(0, part.length, HERE)
