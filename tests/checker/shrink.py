"""Reduces a failing list of steps (delta debugging, Zeller and Hildebrandt 2002). Knows nothing of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

__all__ = ["shrink"]

T = TypeVar("T")


async def shrink(
    steps: Sequence[T],
    fails: Callable[[list[T]], Awaitable[bool]],
    *,
    until: Callable[[], bool] = lambda: False,
) -> list[T]:
    """Return a shorter list that still fails, of which no step can be left out.

    Args:
        steps: a list that fails.
        fails: runs a list; as time matters, it may have to run it more than once.
        until: the shortest list so far is returned as soon as this is true.
    """
    steps = list(steps)
    size = len(steps) // 2
    while size and not until():
        reduced = False
        start = 0
        while start < len(steps) and not until():
            shorter = steps[:start] + steps[start + size :]
            if await fails(shorter):
                steps, reduced = shorter, True
            else:
                start += size
        if not reduced or size > len(steps):
            size = min(size // 2, len(steps))
        # Else again with parts of this size: what was left out may have needed another part.
    return steps
