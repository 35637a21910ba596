"""Worker processes that run commands received over a pipe: the base of the watchers and the publishers.

Both sides of the load run outside the controller and outside the server, so that each has its own
interpreter, its own file descriptor limit, and CPU time that is measured separately from the server's.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

__all__ = ["BenchmarkError", "WorkerProcess", "raise_file_limit", "serve_commands"]


class BenchmarkError(Exception):
    """A measurement is invalid: a server or a worker process failed, or did not respond in time."""


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard limit and return it; child processes inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def serve_commands(pipe: Connection, commands: dict[str, Callable[..., Any]]) -> None:
    """Run commands from the pipe until it is closed; send back the result or the error of each.

    Garbage collection is disabled: the loops create no reference cycles, and a collection pause would be
    counted as server latency.
    """
    raise_file_limit()
    gc.disable()
    while True:
        try:
            name, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            outcome = (True, commands[name](**arguments))
        except (BenchmarkError, OSError) as error:
            outcome = (False, f"{type(error).__name__}: {error}")
        except (EOFError, KeyboardInterrupt):  # the controller has closed the pipe, or was interrupted
            return
        pipe.send(outcome)


class WorkerProcess:
    """The controller's handle of a worker process. Leaving the context stops the process."""

    def __init__(self, main: Callable[[Connection], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, worker_pipe = context.Pipe()
        self._name = main.__name__
        self._process = context.Process(target=main, args=(worker_pipe,), daemon=True)
        self._process.start()
        worker_pipe.close()

    def __enter__(self) -> WorkerProcess:
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
        """Send a command without waiting for its result."""
        self.pipe.send((name, arguments))

    def result(self, timeout: float = 60.0) -> Any:
        """Wait at most ``timeout`` seconds for the result of a started command.

        Raises:
            BenchmarkError: the command failed or timed out, or the process exited.
        """
        if not self.pipe.poll(timeout):
            raise BenchmarkError(f"{self._name} did not respond within {timeout:g} s")
        try:
            succeeded, value = self.pipe.recv()
        except EOFError:
            raise BenchmarkError(f"{self._name} exited unexpectedly") from None
        if not succeeded:
            raise BenchmarkError(value)
        return value

    def call(self, name: str, timeout: float = 60.0, **arguments: Any) -> Any:
        """Send a command and wait at most ``timeout`` seconds for its result; errors as in :meth:`result`."""
        self.start(name, **arguments)
        return self.result(timeout)
