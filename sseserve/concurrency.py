"""What this package adds to Trio: one error out of a nursery's group, and a clear error outside Trio."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

__all__ = ["raise_single_error", "require_trio"]


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
        errors = [error for error in group.exceptions if not _is_cancelled(error)]
        if len(errors) != 1:
            raise
        context = errors[0].__context__
        try:
            raise errors[0]
        finally:
            errors[0].__context__ = context  # raise has set it to the group
            del errors, context


def _is_cancelled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)
