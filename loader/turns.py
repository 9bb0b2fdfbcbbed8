"""Whose bytes cross a device's link next. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

from serverless_llm.loader.link import Priority
from serverless_llm.loader.plan import Landed


class Ranked(Hashable, Protocol):
    """Whoever waits for bytes; `priority` may change while it waits."""

    @property
    def priority(self) -> Priority: ...


T = TypeVar("T", bound=Ranked)


class Turns(Generic[T]):
    """Spans, taken in parts or whole: of the best priority first, then in the order of their coming.

    The spans of one task stay in order. A better priority goes before the next part.
    """

    def __init__(self) -> None:
        self._spans: dict[T, deque[tuple[int, bool, Landed]]] = {}  # with their numbers, and whether they go whole
        self._count = 0

    def __bool__(self) -> bool:
        return bool(self._spans)

    def put(self, task: T, span: Landed, whole: bool = False) -> None:
        self._count += 1
        self._spans.setdefault(task, deque()).append((self._count, whole, span))

    def take(self, longest: int) -> tuple[T, Landed]:
        """The part whose turn it is, of at most so many bytes if it does not go whole; there must be one."""
        task = min(self._spans, key=lambda one: (one.priority, self._spans[one][0][0]))
        spans = self._spans[task]
        number, whole, span = spans.popleft()
        length = span.length if whole else min(span.length, longest)
        if length < span.length:
            rest = Landed(span.file, span.offset + length, span.length - length, span.pool_offset + length)
            spans.appendleft((number, whole, rest))
        if not spans:
            del self._spans[task]
        return task, span._replace(length=length)

    def drop(self, task: T) -> None:
        """It waits no more."""
        self._spans.pop(task, None)
