"""A helper process that obeys commands over a pipe; the base of the watchers and the publishers.

Both sides of the load run outside the controller and outside the server, so that each has its own
interpreter, its own file limit, and CPU time that can be told apart from the server's.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

__all__ = ["BenchError", "Remote", "raise_file_limit", "serve_commands"]


class BenchError(Exception):
    """A measurement that cannot be trusted: a server that does not answer, answers wrongly, or too late."""


def raise_file_limit() -> int:
    """Lift the soft limit of open files to the hard one; return it. Children inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def serve_commands(pipe: Connection, commands: dict[str, Callable[..., Any]]) -> None:
    """Run commands from the pipe until it closes, and answer each with its result or its error.

    Garbage collection is off: the loops make no cycles, and a pause would be counted as server latency.
    """
    raise_file_limit()
    gc.disable()
    while True:
        try:
            name, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = (True, commands[name](**arguments))
        except (BenchError, OSError) as error:
            answer = (False, f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:
            return
        pipe.send(answer)


class Remote:
    """The controller's end of a helper process. Leaving the context ends the process, whatever it does."""

    def __init__(self, main: Callable[[Connection], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._name = main.__name__
        self._process = context.Process(target=main, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pipe.close()
        self._process.join(0 if kind else 5)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join(5)

    def start(self, name: str, **arguments: Any) -> None:
        """Send a command and do not wait for its answer."""
        self.pipe.send((name, arguments))

    def answer(self, within: float = 60.0) -> Any:
        """Wait for the answer to a started command.

        Raises:
            BenchError: it failed there, or did not answer within that many seconds.
        """
        if not self.pipe.poll(within):
            raise BenchError(f"{self._name} did not answer within {within:g} s")
        try:
            good, value = self.pipe.recv()
        except EOFError:
            raise BenchError(f"{self._name} has died") from None
        if not good:
            raise BenchError(value)
        return value

    def call(self, name: str, within: float = 60.0, **arguments: Any) -> Any:
        """Send a command and wait for its answer."""
        self.start(name, **arguments)
        return self.answer(within)
