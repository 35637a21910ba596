"""Measure how long the event loop is kept busy at a time by a server with many sessions and streams.

    python -m benchmarks event-loop [--sessions 100000] [--streams 20000]

While a task runs up to its next switch, a step, no other task runs. The server is in this process, on a
virtual clock; its streams have no sockets. It gets each request that looks at many sessions or streams, and
meets all that its background services do with many at once. For each of these the longest step is printed,
in milliseconds of CPU time, and its task; then how long collections of cyclic garbage take.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import math
import sys
import time
from types import FrameType
from typing import Any, NamedTuple

import msgspec
import trio
import trio.testing
from trio.testing import MemoryReceiveStream, MemorySendStream, MockClock, memory_stream_pair

from sseserve.config import Settings
from sseserve.dialects import Encoding
from sseserve.dialects.sessions import SESSIONS
from sseserve.http.auth import Grant
from sseserve.http.messages import Request
from sseserve.http.open_streams import OpenStream
from sseserve.http.revocations import Revocation
from sseserve.live.pull_subscriber import PullSubscriber
from sseserve.live.resume import join
from sseserve.model import Event, Progress, Session, State
from sseserve.server.application import Application
from sseserve.server.garbage import tune_collector

from ..load.process import BenchmarkError

START = 1_767_322_800.0  # POSIX seconds at which the virtual clock starts
UNLIMITED = 10**9
TARGETS = (
    *("/health", "/ready", "/metrics", "/dashboard", "/api/jobs", "/openapi.json"),
    *("/api/sessions?limit=100", "/api/sessions?limit=1000", "/api/sessions?state=running"),
    f"/api/sessions?after={START + 50},s50000",
    *("/api/sessions/s0/watchers", "/api/sessions/s0/status", "/api/sessions/s0/events"),
)

__all__ = ["CpuMeter", "Crowd", "LineMeter", "Meter", "Step", "exercise"]


class Step(NamedTuple):
    """The longest step of what was measured under a name."""

    cost: float
    task: str


class Meter(trio.abc.Instrument):
    """Keeps the longest step under each name."""

    def __init__(self) -> None:
        self.name = ""  # what is measured now
        self.longest: dict[str, Step] = {}

    def note(self, cost: float, task: trio.lowlevel.Task) -> None:
        """Take note of a step."""
        if cost > self.longest.get(self.name, (0, ""))[0]:
            self.longest[self.name] = Step(cost, task.name)


class CpuMeter(Meter):
    """Measures milliseconds of this thread's CPU time; ``collection``: see ``measure_collection``."""

    def __init__(self) -> None:
        super().__init__()
        self.collection = (0.0, 0)
        self._began = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - Trio's
        self._began = time.thread_time_ns()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._began:
            self.note((time.thread_time_ns() - self._began) / 1e6, task)


class LineMeter(Meter):
    """Counts the lines of Python that are run: the same number each time, on any machine.

    Every pass of a loop or a comprehension counts, and every call of a function in Python. What C does in one
    call does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines = 0

    def _trace(self, _frame: FrameType, _event: str, _argument: object) -> Any:
        self._lines += 1
        return self._trace

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - Trio's
        self._lines = 0
        sys.settrace(self._trace)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        sys.settrace(None)
        self.note(self._lines, task)


class _Listener(trio.abc.Listener[trio.abc.Stream]):
    def __init__(self, accepted: trio.MemoryReceiveChannel[trio.abc.Stream]) -> None:
        self._accepted = accepted

    async def accept(self) -> trio.abc.Stream:
        return await self._accepted.receive()

    async def aclose(self) -> None:
        self._accepted.close()


class Crowd:
    """A server with many sessions and streams, without sockets.

    Half of the streams watch one session, with one token, ann's. The others watch a session each, with tokens
    of their own, bob's and dan's by turns. One session of four has ended, one of eight has a lease.

    Args:
        nursery: runs it.
        sessions: how many.
        streams: how many; at most as many as sessions.
    """

    def __init__(self, nursery: trio.Nursery, sessions: int, streams: int) -> None:
        self._nursery = nursery
        self._sessions = sessions
        self._streams = streams
        settings = Settings(
            **dict.fromkeys(
                (
                    *("max_connections", "max_streams", "max_streams_per_user", "max_streams_per_session"),
                    *("max_streams_per_address", "max_sessions", "max_sessions_per_owner", "max_log_bytes"),
                    *("connect_rate", "publish_rate"),
                ),
                UNLIMITED,
            ),
            heartbeat=10.0,
            ttl=8.0,
            idle_ttl=16.0,
        )
        self.app = Application(
            settings,
            nursery,
            authenticate=self._authenticate,
            clock=lambda: START + trio.current_time(),
        )
        self._connections, accepted = trio.open_memory_channel[trio.abc.Stream](math.inf)
        self.listener = self.app.listen([_Listener(accepted)])
        self._grants = {
            "root": Grant("root", "admin"),
            "ann": Grant("ann", "patient", issued_at=START, expires_at=START + 1000),
        }

    async def _authenticate(self, request: Request) -> Grant:
        return self._grants[request.headers["x-user"]]

    async def fill(self) -> None:
        """Create the sessions and open the streams."""
        for number in range(self._sessions):
            has_ended = number % 4 == 0
            progress = Progress(
                status="succeeded" if has_ended else "running",
                state=State.SUCCEEDED if has_ended else State.RUNNING,
                percent=50,
                message="rendering frame 1200 of 4800",
                started_at=START,
                updated_at=START,
            )
            session = Session(
                id=f"s{number}",
                epoch=f"{number:08x}",
                seq=1,
                producer_seq=1,
                owner=("ann", "bob", "bob", "dan")[number % 4],
                title=f"Film {number}",
                created_at=START + number * 1e-3,
                lease=5.0 if number % 8 == 3 else None,
                progress=progress,
            )
            await self.app.engine.append(session, [Event(1, "progress", progress, START)])
        shared = self._grants["ann"] = Grant("ann", "admin", issued_at=START, expires_at=START + 1000)
        for number in range(self._streams // 2):
            await self._open("s1", shared)
            user, lifetime = ("bob", 1000) if number % 2 else ("dan", 31)
            grant = Grant(user, "admin", token_id=str(number), issued_at=START, expires_at=START + lifetime)
            await self._open(f"s{4 * number + 2}", grant)
        self._grants["ann"] = Grant("ann", "patient")

    async def _open(self, session_id: str, grant: Grant) -> None:
        stream = await self.app.open_streams.open(grant, "192.0.2.1", (session_id,))
        subscriber = PullSubscriber(self.app.broker, Encoding(SESSIONS, "sse"))
        stream.attach(subscriber)
        await join(self.app.engine, self.app.broker, subscriber, session_id, None, visible=stream.visible)
        self._nursery.start_soon(self._read, stream, subscriber)

    async def _read(self, stream: OpenStream, subscriber: PullSubscriber) -> None:
        with stream:
            while await subscriber.receive():
                pass

    def _connect(self) -> trio.StapledStream[MemorySendStream, MemoryReceiveStream]:
        client, server = memory_stream_pair()
        self._connections.send_nowait(server)
        return client

    async def request(self, method: str, target: str, user: str, body: bytes = b"") -> None:
        """Send a request, and read its response to the end."""
        async with self._connect() as client:
            head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nX-User: {user}\r\nConnection: close\r\n"
            await client.send_all(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            response = b"".join([bytes(data) async for data in client])
        if not response.startswith(b"HTTP/1.1 2"):
            raise BenchmarkError(f"{method} {target}: {response[:300]!r}")

    # What is measured

    async def requests(self) -> None:
        """Send the requests that look at many sessions or streams."""
        for user, target in itertools.product(("root", "ann"), TARGETS):
            await self.request("GET", target, user)
        await self.request("POST", "/api/sessions", "root", b'{"session_id": "new"}')
        await self.request("POST", "/api/sessions/new/progress", "root", b'{"status": "done"}')
        await self.request("DELETE", "/api/sessions/new", "root")

    async def publish(self) -> None:
        """Publish to the session that half of the streams watch."""
        await self.request("POST", "/api/sessions/s1/progress", "root", b'{"progress": 60}')

    async def watch_the_list(self) -> None:
        """Watch the list of the sessions, as an admin and as a user, while many of them change."""

        async def watch(user: str) -> None:
            client = self._connect()
            head = f"GET /api/streams/sessions HTTP/1.1\r\nHost: localhost\r\nX-User: {user}\r\n\r\n"
            await client.send_all(head.encode())
            while await client.receive_some():
                pass

        async with trio.open_nursery() as nursery:
            for user in ("root", "ann"):
                nursery.start_soon(watch, user)
                await trio.sleep(1.5)
            for count in (900, 1900):
                for number in range(count):
                    await self.app.tracker.update(f"s{4 * number + 2}", progress=60)
                await trio.sleep(1.5)
            nursery.cancel_scope.cancel()

    async def long_polls(self) -> None:
        """Publish to a session that is long-polled by as many as there are streams."""
        woken = 0

        async def poll() -> None:
            nonlocal woken
            with self.app.broker.wakeup("s3") as wakeup:
                await wakeup.wait()
            woken += 1

        async with trio.open_nursery() as nursery:
            for number in range(self._streams):
                nursery.start_soon(poll)
                if number % 100 == 0:
                    await trio.lowlevel.checkpoint()
            await trio.sleep(0.1)
            await self.app.tracker.update("s3", progress=70)
        assert woken == self._streams

    async def engine_problem(self) -> None:
        """Tell all streams that the engine is unavailable, and that it is back."""
        self.app.broker.set_problem("the disk is full")
        await trio.sleep(0.5)
        self.app.broker.set_problem(None)
        await trio.sleep(0.5)

    async def extend(self) -> None:
        """Extend the streams of one user."""
        grant = Grant("ann", "admin", token_id="new", issued_at=START, expires_at=START + 2000)
        await self.app.open_streams.extend(grant)

    async def revoke(self) -> None:
        """Revoke the tokens of a user."""
        revocation = Revocation(subject="bob", at=START + 1000, until=START + 2000)
        await self.app.coordination.store_revocation(msgspec.msgpack.encode(revocation), revocation.until)
        await self.app.open_streams.wait_revoked()

    async def wait(self) -> None:
        """Heartbeats; the expiry of many tokens; leases that run out; the end of retention."""
        await trio.sleep(27)
        assert await self.app.engine.count() <= self._streams

    async def drain(self) -> None:
        """Stop the server, with the streams that are left and idle connections."""
        for number in range(self._streams // 4):
            self._connect()
            if number % 100 == 0:
                await trio.lowlevel.checkpoint()
        await trio.sleep(0.1)
        streams = self.app.open_streams.total
        assert streams > self._streams / 3
        self.listener.stop()
        await self.listener.stopped.wait()
        assert not self.app.open_streams.total


async def exercise(meter: Meter, sessions: int, streams: int) -> None:
    """Measure a crowd; ``meter.longest`` has the longest step of each part."""
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery, sessions, streams)
        await crowd.fill()
        for service in crowd.app.background_services():
            nursery.start_soon(service)
        await nursery.start(crowd.listener.run)
        await trio.testing.wait_all_tasks_blocked()
        if isinstance(meter, CpuMeter):
            meter.collection = measure_collection()
        trio.lowlevel.add_instrument(meter)
        for part in (
            crowd.requests,
            crowd.publish,
            crowd.watch_the_list,
            crowd.long_polls,
            crowd.engine_problem,
            crowd.extend,
            crowd.revoke,
            crowd.wait,
            crowd.drain,
        ):
            meter.name = part.__name__.replace("_", " ")
            await trio.lowlevel.checkpoint()
            await part()
            await trio.lowlevel.checkpoint()
        trio.lowlevel.remove_instrument(meter)
        sys.settrace(None)  # that of this step
        nursery.cancel_scope.cancel()


def measure_collection() -> tuple[float, int]:
    """Collect all cyclic garbage; return how many milliseconds that took, and of how many objects."""
    gc.collect()
    count = len(gc.get_objects())
    began = time.thread_time_ns()
    gc.collect()
    return (time.thread_time_ns() - began) / 1e6, count


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks event-loop", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--sessions", type=int, default=100_000)
    parser.add_argument("--streams", type=int, default=20_000)
    options = parser.parse_args()
    logging.disable()
    tune_collector()
    gc.disable()  # each is measured by itself
    meter = CpuMeter()
    trio.run(exercise, meter, options.sessions, options.streams, clock=MockClock(autojump_threshold=0))
    print(f"{options.sessions} sessions, {options.streams} streams")
    for name, step in meter.longest.items():
        print(f"{step.cost:8.1f} ms  {name:20} {step.task}")
    cost, objects = meter.collection
    print(f"{cost:8.1f} ms  a full collection of cyclic garbage: {objects} objects")
    return 0
