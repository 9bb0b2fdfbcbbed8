"""What of a checkpoint gets slots of its own in the DRAM tier, and what passes through a ring.

No I/O, like the tier's books: `divide` decides by them, and takes back in them slots that a ring needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.plan import Piece
from serverless_llm.loader.residency import Tier

RING = 256 << 20  # bytes of a ring, at most: some calls of every reader thread; a larger one gains nothing


class Division(NamedTuple):
    """Pieces with a slot of their own, those that pass through a ring, and its slots: 0 where none do."""

    kept: list[Piece]
    passing: list[Piece]
    width: int


def least(manifest: Manifest, pieces: Sequence[Piece], ring: bool) -> int:
    """Slots without which the checkpoint cannot be loaded, `ring`: where it may pass through one."""
    return min(len(pieces), len(_heads(manifest, pieces)) + 1) if ring else len(pieces)


def divide(tier: Tier, manifest: Manifest, pieces: list[Piece], ring: bool, reading: bool) -> Division:
    """For headers others are evicted: nothing can be copied before all of them are there. Of the rest as much is kept
    as finds a place in half of the slots beside the ring, and each time in half of those that are free as long as
    as many as the ring has are left: those are for the next load.

    Args:
        pieces: all of the checkpoint's.
        ring: whether any may pass through one; the tier may shed some of the checkpoint's slots for it.
        reading: others read the checkpoint, and wait for what has a slot now: no more gets one.

    Raises:
        CapacityError: it does not fit beside what is leased.
    """
    homeless = tier.homeless(manifest.checkpoint, pieces)
    free, most = tier.room(manifest.checkpoint)
    heads = len(_heads(manifest, homeless))
    if len(homeless) <= most and not (reading and homeless):
        return Division(pieces, [], 0)
    width = max(1, min(RING // tier.slot_bytes, (most + len(pieces) - len(homeless) - heads) // 2))
    if ring and most < heads + width:
        homeless = _shed(tier, manifest, pieces, heads + width - most)
        free, most = tier.room(manifest.checkpoint)
    if not ring or most <= heads:
        raise tier.short(len(homeless), most)
    width, own = min(width, most - heads), len(pieces) - len(homeless)
    half = (free + own - width) // 2 - own
    more = min((free - width) // 2, free - 2 * width)
    passing = homeless[0 if reading else max(heads, half, more) :]
    apart = set(passing)
    return Division([piece for piece in pieces if piece not in apart], passing, width)


def _shed(tier: Tier, manifest: Manifest, pieces: list[Piece], count: int) -> list[Piece]:
    """So many of the checkpoint's last slots are free if nothing refers to them; its pieces that have none then."""
    passed = {*tier.homeless(manifest.checkpoint, pieces), *_heads(manifest, pieces)}
    own = [piece for piece in pieces if piece not in passed]
    tier.shed(manifest.checkpoint, own[-count:])
    return tier.homeless(manifest.checkpoint, pieces)


def _heads(manifest: Manifest, pieces: Sequence[Piece]) -> list[Piece]:
    return [piece for piece in pieces if piece.offset < manifest.files[piece.file].data_offset]
