"""What a device holds of a checkpoint, compared with what was sent there.

The digest of each part is taken before it is sent, and once more of what has arrived when all of it has.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from serverless_llm.loader.copies import Copies
from serverless_llm.loader.digest import Blocks, Due, Key, key_of
from serverless_llm.loader.plan import Landed


class Held:
    """What one task sent. Used by the uploader's thread; the attributes by others when all was compared.

    Args:
        due: which blocks of the checkpoint's files are compared.
        again: what differs may be sent once more: the bytes stay in the pool until all was compared.

    Attributes:
        noted: parts of blocks that are to be compared.
        owed: their bytes on the device.
        nbytes: on the device, that were compared.
        mended: blocks that differed, and no more when they were sent again.
        differing: parts of blocks that differ.
    """

    def __init__(self, due: Due, again: bool) -> None:
        self._due = due
        self._again = again
        self.noted: dict[Landed, bytes] = {}
        self.owed = 0
        self.nbytes = 0
        self.mended: set[Key] = set()
        self.differing: list[Landed] = []

    def compare(self, part: Landed) -> int:
        """Compares one of the `noted`; returns its bytes on the device."""
        digest = self.noted.pop(part)
        if self._arrived(part) != digest:
            if self._again:
                self._send(part)
            if self._again and self._arrived(part) == digest:
                self.mended.add(key_of(part))
            else:
                self.differing.append(part)
        nbytes = self._size(part)
        self.owed -= nbytes
        self.nbytes += nbytes
        return nbytes

    def _send(self, part: Landed) -> None:
        raise NotImplementedError

    def _arrived(self, part: Landed) -> bytes:
        """The digest of what the device has of it."""
        raise NotImplementedError

    def _size(self, part: Landed) -> int:
        """Bytes that the device has of it."""
        raise NotImplementedError


class Copied(Held):
    """The copies of one upload.

    Args:
        copies: where the bytes go.
        pool, arena: [bytes] uint8, from where and to where.
        sizes: bytes of the checkpoint's files.
        due, again: as of `Held`.
    """

    def __init__(
        self, copies: Copies, pool: torch.Tensor, arena: torch.Tensor, sizes: Iterable[int], due: Due, again: bool
    ) -> None:
        super().__init__(due, again)
        self._copies = copies
        self._pool = pool
        self._arena = arena
        self._blocks = Blocks(tuple(sizes))

    def note(self, span: Landed) -> None:
        """To be called before the span is copied."""
        for part in self._blocks.parts([span]):
            if self._due(key_of(part)) and (nbytes := self._size(part)):
                self.noted[part] = digest(
                    self._pool[source : source + length] for source, _, length in self._copies.of(part)
                )
                self.owed += nbytes

    def _send(self, part: Landed) -> None:
        for source, target, length in self._copies.of(part):
            self._arena[target : target + length].copy_(self._pool[source : source + length])

    def _arrived(self, part: Landed) -> bytes:
        return digest(self._arena[target : target + length] for _, target, length in self._copies.of(part))

    def _size(self, part: Landed) -> int:
        return sum(length for _, _, length in self._copies.of(part))


def digest(tensors: Iterable[torch.Tensor]) -> bytes:
    """Of the bytes of contiguous tensors of one dimension, on any device."""
    from xxhash import xxh3_128

    found = xxh3_128()
    for tensor in tensors:
        found.update(tensor.cpu().view(torch.uint8).numpy().data)
    return found.digest()
