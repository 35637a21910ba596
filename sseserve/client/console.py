"""Run a command of the client: interrupts, and pipes that are its input or output."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import trio

from .errors import unwrap_exception_group

__all__ = ["discard_output", "read_lines", "run", "while_output_is_read"]

T = TypeVar("T")


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run ``work`` in Trio and return its result. Ctrl-C cancels it.

    Raises:
        KeyboardInterrupt: it was cancelled so.
    """

    async def main() -> T:
        with trio.CancelScope() as scope, _handle_interrupt(scope):
            return await work()
        raise KeyboardInterrupt

    with unwrap_exception_group():
        return trio.run(main)


@contextmanager
def _handle_interrupt(scope: trio.CancelScope) -> Iterator[None]:
    """Make the first Ctrl-C cancel ``scope``; a second one raises KeyboardInterrupt, whatever blocks.

    Raised at once, a KeyboardInterrupt may come between any two instructions, those of a cleanup included,
    and then connections and generators are left open and complain on standard error.
    """
    # Signal handlers belong to the main thread, and a program that was started to ignore Ctrl-C ignores it.
    if threading.current_thread() is not threading.main_thread() or (
        (previous := signal.getsignal(signal.SIGINT)) is signal.SIG_IGN
    ):
        yield
        return
    token = trio.lowlevel.current_trio_token()

    def interrupt(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, previous)
        token.run_sync_soon(scope.cancel)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


async def while_output_is_read(work: Callable[[], Awaitable[int]]) -> int:
    """Return the result of ``work``, or 0 as soon as nobody reads standard output any more.

    Otherwise a program whose output is a pipe would notice that only when it next writes.
    """
    status = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_when_closed, nursery.cancel_scope)
        status = await work()
        nursery.cancel_scope.cancel()
    return status


async def _cancel_when_closed(scope: trio.CancelScope) -> None:
    with suppress(OSError, ValueError):  # standard output is no file
        fd = sys.stdout.fileno()
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            # There is never anything to read from this end of a pipe, so this waits for its error state.
            await trio.lowlevel.wait_readable(fd)
            scope.cancel()


def discard_output() -> None:
    """Let what is written to standard output from now on, and at exit, go nowhere instead of failing."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


async def read_lines(fd: int) -> AsyncGenerator[bytes]:
    """Yield lines as they are written to the file descriptor ``fd``, without their line breaks.

    Files and terminals have no asynchronous read, so a thread reads, and is abandoned on cancellation.
    It reads ``fd`` and not ``sys.stdin``: an abandoned thread that holds the lock of ``sys.stdin`` would
    block the interpreter's exit.
    """
    rest = b""
    while chunk := await trio.to_thread.run_sync(os.read, fd, 65536, abandon_on_cancel=True):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest
