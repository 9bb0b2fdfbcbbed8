"""Where each tensor of a model lies on a device. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from serverless_llm.engine.architectures.description import Shape
from serverless_llm.engine.config import Buffer, Entries, ModelConfig, numel
from serverless_llm.loader.dest import Dest


def stored_buffers(config: ModelConfig, entries: Entries, weights: str) -> Iterator[Buffer]:
    """The buffers that the arena must hold: all in `copy` mode, in `view` mode those that need a conversion or
    are packed.
    """
    for buffer in config.buffers():
        if weights == "copy" or buffer.packed or any(config.needs_conversion(name, entries) for name in buffer.tensors):
            yield buffer


def layout(
    config: ModelConfig, shapes: Mapping[str, Shape], buffers: list[Buffer], places: list[int]
) -> dict[str, int]:
    """Tensor -> byte offset in the arena, in the served dtype, the buffers beginning at `places`."""
    offsets: dict[str, int] = {}
    for buffer, place in zip(buffers, places, strict=True):
        at = place
        for name in buffer.tensors:
            offsets[name] = at
            at += numel(shapes[name]) * config.item_bytes
    return offsets


def dests(config: ModelConfig, shapes: Mapping[str, Shape], offsets: dict[str, int]) -> list[Dest]:
    """One copy per tensor, for a checkpoint stored in the served dtype."""
    return [Dest(name, 0, numel(shapes[name]) * config.item_bytes, offset) for name, offset in offsets.items()]
