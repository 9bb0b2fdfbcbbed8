"""What a device holds of a checkpoint, compared with what was sent there.

The digest of each part is taken before it is copied, and once more of the copies when all of them have arrived.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from serverless_llm.loader.copies import Copies
from serverless_llm.loader.digest import Blocks, Due, Key, key_of
from serverless_llm.loader.plan import Landed


class Held:
    """The copies of one upload. Used by the uploader's thread; the attributes by others when all was compared.

    Args:
        copies: where the bytes go.
        pool, arena: [bytes] uint8, from where and to where.
        sizes: bytes of the checkpoint's files.
        due: which of their blocks are compared.
        again: what differs may be copied once more: the bytes stay in the pool until all was compared.

    Attributes:
        noted: parts of blocks whose copies are to be compared.
        nbytes: of copies that were compared.
        mended: blocks that differed, and no more when they were copied again.
        differing: parts of blocks that differ.
    """

    def __init__(
        self, copies: Copies, pool: torch.Tensor, arena: torch.Tensor, sizes: Iterable[int], due: Due, again: bool
    ) -> None:
        self._copies = copies
        self._pool = pool
        self._arena = arena
        self._blocks = Blocks(tuple(sizes))
        self._due = due
        self._again = again
        self.noted: dict[Landed, bytes] = {}
        self.nbytes = 0
        self.mended: set[Key] = set()
        self.differing: list[Landed] = []

    def note(self, span: Landed) -> int:
        """To be called before the span is copied; returns bytes of copies to be compared."""
        noted = 0
        for part in self._blocks.parts([span]):
            if self._due(key_of(part)) and (nbytes := sum(copy.length for copy in self._copies.of(part))):
                self.noted[part] = self._digest(part, arrived=False)
                noted += nbytes
        return noted

    def compare(self, part: Landed) -> int:
        """Compares the copies of one of the `noted`; returns their bytes."""
        digest, copies = self.noted.pop(part), list(self._copies.of(part))
        if self._digest(part, arrived=True) != digest:
            for source, target, length in copies if self._again else ():
                self._arena[target : target + length].copy_(self._pool[source : source + length])
            if self._again and self._digest(part, arrived=True) == digest:
                self.mended.add(key_of(part))
            else:
                self.differing.append(part)
        nbytes = sum(copy.length for copy in copies)
        self.nbytes += nbytes
        return nbytes

    def _digest(self, part: Landed, arrived: bool) -> bytes:
        """Of the part's bytes that are copied, where they come from or where they have arrived."""
        from xxhash import xxh3_128

        found = xxh3_128()
        for source, target, length in self._copies.of(part):
            memory, start = (self._arena, target) if arrived else (self._pool, source)
            found.update(memory[start : start + length].cpu().numpy().data)
        return found.digest()
