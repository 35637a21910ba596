"""Run workers that do nothing but what a test needs: ``python tests/worker_mains.py MAIN COUNT DRAIN``."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import signal
import sys
from collections.abc import Callable

from sseserve.config import Settings
from sseserve.errors import ConfigError
from sseserve.logs import configure
from sseserve.server import workers
from sseserve.server.sockets import open_sockets_blocking
from sseserve.server.workers import Worker, Workers

PR_SET_CHILD_SUBREAPER = 36

starts = mmap.mmap(-1, 1)  # shared by all processes


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def serve(worker: Worker) -> None:
    """Serve until the link ends."""
    say(f"worker {worker.number} is process {os.getpid()}")
    worker.report()
    select.select([worker.link], (), ())
    say(f"worker {worker.number} has drained")


def stall_once(worker: Worker) -> None:
    """Accept nothing; but as a replacement accept one connection and respond to it."""
    starts[0] += 1
    worker.report()
    if starts[0] == 1:
        signal.pause()
    connection, _ = worker.listeners[0].accept()
    connection.sendall(b"accepted")
    select.select([worker.link], (), ())


def drain_for_ever(worker: Worker) -> None:
    """Stop accepting when the link ends, but do not end."""
    serve(worker)
    for listener in worker.listeners:
        listener.close()
    say(f"worker {worker.number} accepts nothing")
    while True:
        signal.pause()


def hang(worker: Worker) -> None:
    """Serve for ever."""
    worker.report()
    while True:
        signal.pause()


def end_soon(worker: Worker) -> None:
    """Serve for a moment."""
    worker.report()


def end_later(worker: Worker) -> None:
    """Serve for as long as makes a worker count as one that served well."""
    worker.report()


def end_second(worker: Worker) -> None:
    """Serve, but fail as the second worker."""
    if worker.number == 2:
        raise ConfigError("no more memory")
    serve(worker)


def refuse(_worker: Worker) -> None:
    """Refuse the settings."""
    raise ConfigError("no Redis at 127.0.0.1:1")


def fail(_worker: Worker) -> None:
    """Fail before serving."""
    raise RuntimeError("a defect")


def be_killed(_worker: Worker) -> None:
    """End by a signal before serving."""
    os.kill(os.getpid(), signal.SIGKILL)


def orphan(worker: Worker) -> None:
    """Leave a process without a parent, as the first process of a container inherits them; then serve."""
    if (child := os.fork()) == 0:
        if os.fork() == 0:
            say(f"orphan {os.getpid()}")
        os._exit(0)
    os.waitpid(child, 0)
    serve(worker)


def serve_once_forked(worker: Worker) -> None:
    """Serve; the system cannot fork a second time."""
    serve(worker)


def fork_once(fork: Callable[[], int] = os.fork) -> int:
    os.fork = refuse_to_fork
    return fork()


def refuse_to_fork() -> int:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


MAINS: dict[str, Callable[[Worker], None]] = {
    main.__name__: main
    for main in (
        serve,
        hang,
        end_soon,
        end_later,
        end_second,
        refuse,
        fail,
        be_killed,
        orphan,
        serve_once_forked,
        stall_once,
        drain_for_ever,
    )
}


if __name__ == "__main__":
    _, name, count, drain = sys.argv
    configure("info", "text", in_background=False)
    workers.FIRST_DELAY = workers.GRACE = 0.2
    if name == "end_later":
        workers.STABLE = 0.0
    if name == "serve_once_forked":
        os.fork = fork_once
    if name == "orphan":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    sockets = open_sockets_blocking(Settings(port=0))
    say(f"listening on {sockets.port}")
    try:
        Workers(
            int(count),
            MAINS[name],
            listen=sockets.listen_beside,
            drain=float(drain),
            on_serving=lambda: say("all workers serve"),
        ).run()
    except (ConfigError, ChildProcessError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
