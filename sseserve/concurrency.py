"""What this package adds to Trio: long loops in slices, one error out of a nursery's group, and a clear error
outside Trio."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import trio

__all__ = ["SLICE", "VISIT", "is_cancelled", "raise_single_error", "require_trio", "select", "visit"]

SLICE = 512  # items of a loop that only looks at them, between two switches to other tasks
VISIT = 64  # items that are ended, or written to

T = TypeVar("T")


async def select(items: Sequence[T], matches: Callable[[T], bool]) -> list[T]:
    """Return the items that match, and let other tasks run every ``SLICE`` items."""
    selected: list[T] = []
    for start in range(0, len(items), SLICE):
        if start:
            await trio.lowlevel.checkpoint()
        selected += filter(matches, items[start : start + SLICE])
    return selected


async def visit(items: Iterable[T], function: Callable[[T], object]) -> None:
    """Call a function with each of some items, and let other tasks run every ``VISIT`` items.

    They are those of the moment of the call; nothing here holds one that it has been called with.
    """
    left = list(items)
    del items
    left.reverse()
    while left:
        for _ in range(min(VISIT, len(left))):
            function(left.pop())  # those that end meanwhile are freed one by one, not all with the list
        if left:
            await trio.lowlevel.checkpoint()


def require_trio(name: str) -> None:
    """Raise a RuntimeError if this is not a Trio program. ``name`` is what needs Trio."""
    if not trio.lowlevel.in_trio_run():
        raise RuntimeError(
            f"{name} runs on Trio, and this program does not: start it with trio.run(main); "
            "a program on asyncio can use the HTTP API of a server started with: sseserve serve"
        )


@contextmanager
def raise_single_error() -> Iterator[None]:
    """Raise the only error of the nursery in this block without the group that the nursery put it into.

    ``Cancelled`` does not count, since another error caused it. Two or more errors stay a group; so does a
    group that is itself the only error.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        errors = [error for error in group.exceptions if not is_cancelled(error)]
        if len(errors) != 1:
            raise
        context = errors[0].__context__
        try:
            raise errors[0]
        finally:
            errors[0].__context__ = context  # raise has set it to the group
            del errors, context


def is_cancelled(error: BaseException) -> bool:
    """Return whether an error is ``Cancelled``, or a group of nothing else."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)
