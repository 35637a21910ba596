"""A server with a SQLite file that is killed again and again while clients publish and watch.

The server is a process, and is killed with SIGKILL. It is forked from one that has imported everything, so
that it starts fast. The clients are those of the fault schedules, over TCP.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import msgspec
import trio
from ports import free_port

from .check import Violation, check
from .clients import ConnectionEnded, Publisher, Recorder, Watcher, Wire, request
from .history import History, Message, summarize

__all__ = ["KillRun", "Result", "run_kills"]

ENOUGH = 30.0  # seconds in which the server must have started, or the clients must be done
KINDS = ("note", "progress", "mixed", "mixed", "large")
WAITING = 8  # requests that each publisher always has to send

# Reads the settings of a server from each line, and writes the process id of each.
LAUNCHER = """
import gc, os, signal, sys
import msgspec
from sseserve.config import Settings
from sseserve.server import run
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
gc.freeze()
for line in sys.stdin:
    if not (pid := os.fork()):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        run(msgspec.convert(msgspec.json.decode(line), Settings))
        os._exit(0)
    print(pid, flush=True)
"""


class Result(msgspec.Struct):
    """What a run found. ``counts`` are of all sessions, see ``summarize``."""

    kills: int = 0
    counts: Counter[str] = msgspec.field(default_factory=Counter)
    violations: list[Violation] = []

    def count(self, *rules: str) -> int:
        """Return how often one of these rules was violated."""
        return sum(violation.rule in rules for violation in self.violations)


class _Server:
    """A server that can be killed and started again; use as a context manager."""

    def __init__(self, **settings: Any) -> None:
        # Not one that the kernel gives to clients: one of ours could get it, and connect to itself.
        self.port = free_port()
        self._settings = {"port": self.port, "log_level": "error", **settings}
        self._pid: int | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-c", LAUNCHER]
        self._launcher = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        return self

    def __exit__(self, *_error: object) -> None:
        if self._pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        self._launcher.communicate()

    def start(self) -> None:
        assert self._launcher.stdin is not None
        assert self._launcher.stdout is not None
        self._launcher.stdin.write(msgspec.json.encode(self._settings) + b"\n")
        self._launcher.stdin.flush()
        self._pid = int(self._launcher.stdout.readline())

    async def kill(self) -> None:
        """Kill the server, and wait until the kernel has taken everything from it."""
        assert self._pid is not None
        process = os.pidfd_open(self._pid)
        try:
            os.kill(self._pid, signal.SIGKILL)
            await trio.lowlevel.wait_readable(process)
        finally:
            os.close(process)
        self._pid = None

    async def connect(self, _instance: int) -> Wire:
        try:
            return Wire(await trio.open_tcp_stream("127.0.0.1", self.port))
        except OSError:
            raise ConnectionEnded from None


class KillRun:
    """One run: some sessions, their publishers and watchers, and a server.

    Args:
        nursery: runs the clients.
        server: is killed.
        seed: of all choices.
        sessions: how many there are, each with so many ``publishers`` and ``watchers``.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        server: _Server,
        seed: int,
        *,
        sessions: int,
        publishers: int,
        watchers: int,
    ) -> None:
        self._nursery = nursery
        self._server = server
        self._random = random.Random(f"{seed} kills")
        self._recorder = Recorder()
        names = [f"s{number}" for number in range(sessions)]

        def publisher(name: str, number: int) -> Publisher:
            label = f"{name}p{number}"
            return Publisher(server.connect, 1, name, label, self._recorder, f"{seed} {label}")

        def watcher(name: str, number: int) -> Watcher:
            return Watcher(server.connect, 1, name, self._recorder, f"{seed} {name}w{number}")

        self._publishers = {name: [publisher(name, n) for n in range(publishers)] for name in names}
        self._watchers = {name: [watcher(name, n) for n in range(watchers)] for name in names}

    def _all(self) -> list[Publisher]:
        return [publisher for group in self._publishers.values() for publisher in group]

    def _answered(self) -> int:
        return sum(len(publisher.publishes) for publisher in self._all())

    async def _wait(self, condition: Callable[[], bool], what: str) -> None:
        if not await self._recorder.wait_until(condition, ENOUGH):
            raise RuntimeError(f"{what} within {ENOUGH:g} s")

    async def run(self, kills: int, on_kill: Callable[[int], None]) -> Result:
        """Kill the server so many times, and return what the clients have seen."""
        self._server.start()
        for name in self._publishers:
            await self._create(name)
        for task in (*self._all(), *(w for group in self._watchers.values() for w in group)):
            self._nursery.start_soon(task.run)
        for number in range(kills):
            for publisher in self._all():
                while publisher.waiting < WAITING:
                    publisher.add(self._random.choice(KINDS))
            target = self._answered() + self._random.randint(1, 8 * len(self._all()))
            await self._wait(lambda target=target: self._answered() >= target, "nothing was acknowledged")
            # A moment in a commit, a checkpoint, a delivery or in between.
            await trio.sleep(self._random.uniform(0, 0.02))
            await self._server.kill()
            self._server.start()
            on_kill(number + 1)
        result = Result(kills)
        await self._wait(lambda: not any(p.waiting for p in self._all()), "requests were not acknowledged")
        for name in self._publishers:
            history = await self._finish(name)
            result.violations += check(history)
            result.counts.update(summarize(history))
        return result

    async def _create(self, name: str) -> None:
        body = {"session_id": name, "lease": 5}
        with trio.fail_after(ENOUGH):
            while True:
                with suppress(ConnectionEnded):
                    status, _ = await request(self._server.connect, 0, "POST", "/api/sessions", body)
                    if status in (201, 409):
                        return
                await trio.sleep(0.005)

    async def _finish(self, name: str) -> History:
        """End a session, and return what was seen of it."""
        last, watchers = self._publishers[name][0], self._watchers[name]
        last.add("end")
        await self._wait(lambda: not last.waiting, "the end was not acknowledged")
        end = last.publishes[-1].cursor
        await self._wait(lambda: all(w.place == end for w in watchers), "not all clients have seen the end")
        return History(
            publishes=[publish for publisher in self._publishers[name] for publish in publisher.publishes],
            clients=[watcher.seen for watcher in watchers],
            logs=[await self._read_log(name)],
            history_events=10**6,
            problems=list(self._recorder.problems),
        )

    async def _read_log(self, name: str) -> list[Message]:
        log: list[Message] = []
        after = ""
        while True:
            target = f"/api/sessions/{name}/events?limit=1000{after}"
            _, page = await request(self._server.connect, 0, "GET", target)
            log += [Message(value["event"], value["data"], value["id"]) for value in page["events"]]
            if page["end"]:
                return log
            after = f"&after={page['next']}"


async def run_kills(
    path: Path,
    kills: int,
    seed: int,
    *,
    durability: str = "normal",
    sessions: int = 2,
    publishers: int = 6,
    watchers: int = 3,
    on_kill: Callable[[int], None] = lambda _number: None,
) -> Result:
    """Kill a server on the file ``path`` so many times under load; return what was found."""
    limits = {"history_events": 10**6, "history_bytes": 2**32}
    with _Server(engine=f"sqlite:{path}", durability=durability, **limits) as server:
        async with trio.open_nursery() as nursery:
            run = KillRun(nursery, server, seed, sessions=sessions, publishers=publishers, watchers=watchers)
            result = await run.run(kills, on_kill)
            nursery.cancel_scope.cancel()
    return result
