"""What a publish request, a delivery, a new stream and an idle stream cost: counts, not seconds.

The server runs in the test's process on real TCP sockets, and the clients are plain sockets. While it works,
every system call on a socket or on epoll is counted, every step of a task, and every function call outside
Trio; then what is kept in memory. Trio's clock stands still, so no timer adds to it, and the counts are the
same each time. A bound is a little above what was measured: if a change makes a count higher and is worth it,
raise the bound in the same commit and say why; if it makes one lower, lower the bound.
"""

from __future__ import annotations

import _socket
import gc
import json
import os
import posix
import random
import resource
import select
import socket
import struct
import sys
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from types import FrameType
from typing import Any, NamedTuple

import hpack
import msgspec
import outcome
import pytest
import sortedcontainers
import trio
from raw_client import HANDSHAKE, request_bytes
from trio.testing import wait_all_tasks_blocked

from sseserve import Server, serve
from sseserve.live import fanout

SESSIONS = 300
WATCHERS = 1000
PUBLISHES = 50
OPENED = 128
PAYLOAD = {"text": "x" * 139}  # 150 bytes of JSON


class Bound(NamedTuple):
    """What one operation may cost at most.

    ``system_calls`` on sockets and epoll. ``steps`` of tasks: how often one is switched to. ``encodings`` of
    values as JSON. ``calls`` of functions, in Python and in C, outside Trio: most of the work shows here.
    """

    system_calls: float
    steps: float
    encodings: float
    calls: float


BOUNDS = {
    "publish an event to one watcher": Bound(5.05, 1.05, 3, 258),
    "publish progress to one watcher": Bound(5.05, 1.05, 2, 303),
    "publish to 1,000 watchers, for each": Bound(1.01, 0.01, 0.01, 6.4),
    "publish to 1,000 HTTP/2 connections, for each": Bound(1.01, 0.01, 0.01, 15.4),
    "publish to 10 HTTP/2 connections with 100 streams each, for each stream": Bound(0.03, 0.02, 0.01, 13),
    "open a stream": Bound(6.1, 1.1, 1, 282),
}
BYTES = {  # of Python's memory, and on the wire
    "kept of a published event": 450,
    "allocated at most while 1,000 get an event, for each": 25,
    "idle SSE stream": 4800,
    "idle WebSocket": 10400,
    "around a payload, SSE": 41,
    "around a payload, WebSocket": 46,
}
# Whose function calls do not count: those of Trio, which the task steps stand for, and of this module.
_OUTSIDE = (
    os.path.dirname(trio.__file__),
    os.path.dirname(sortedcontainers.__file__),
    outcome.__file__.removesuffix("__init__.py"),
    random.__file__,
    __file__,
)
_WITHOUT_SYSTEM_CALL = {"fileno", "gettimeout", "detach"}
_OF_FILES = {"write", "writev", "read", "readv", "sendfile", "urandom", "getrandom"}


class Work(trio.abc.Instrument):
    """Counts what this thread does, between ``start`` and ``stop``, without the code of this module."""

    def __init__(self) -> None:
        self.system_calls: Counter[str] = Counter()
        self.steps: Counter[str] = Counter()
        self.encodings: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._own: trio.lowlevel.Task | None = None

    def start(self) -> None:
        self._own = trio.lowlevel.current_task()
        trio.lowlevel.add_instrument(self)
        sys.setprofile(self._profile)

    def stop(self) -> None:
        sys.setprofile(None)
        trio.lowlevel.remove_instrument(self)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is not self._own:
            self.steps[task.name] += 1

    def _profile(self, frame: FrameType, event: str, function: Any) -> None:
        code = frame.f_code
        if code.co_filename == __file__:
            return
        if event == "c_call":
            owner, name = getattr(function, "__self__", None), function.__name__
            if (owner is posix and name in _OF_FILES) or (
                isinstance(owner, (_socket.socket, select.epoll)) and name not in _WITHOUT_SYSTEM_CALL
            ):
                self.system_calls[name] += 1
            elif not code.co_filename.startswith(_OUTSIDE):
                self.calls[function.__qualname__] += 1
                if isinstance(owner, msgspec.json.Encoder) or function is msgspec.json.encode:
                    self.encodings[function.__qualname__] += 1
        elif event == "call" and not code.co_filename.startswith(_OUTSIDE):
            self.calls[code.co_qualname] += 1


class Client:
    """A connection of a client that never waits; ``received`` is what it has read."""

    def __init__(self, port: int) -> None:
        self.socket = socket.socket()
        self.port = port
        self.received = b""

    def connect(self) -> None:
        self.socket.connect(("127.0.0.1", self.port))
        self.socket.setblocking(False)

    def send(self, request: bytes) -> None:
        assert self.socket.send(request) == len(request)

    def close(self) -> None:
        self.socket.close()

    def has(self, text: bytes) -> bool:
        """Read what has come, and return whether the text is in it."""
        try:
            while more := self.socket.recv(65536):
                self.received += more
        except BlockingIOError:
            pass
        return text in self.received

    def count(self, text: bytes) -> int:
        """Read what has come, and return how often the text is in it."""
        self.has(text)
        return self.received.count(text)


def http2_frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def http2_request(streams: int) -> bytes:
    """Return what a client sends that opens a connection and that many event streams of the session s."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    fields = {
        ":method": "GET",
        ":scheme": "http",
        ":authority": "localhost",
        ":path": "/api/sessions/s/status/stream",
    }
    block = encoder.encode(list(fields.items()))
    settings = http2_frame(4, 0, 0, struct.pack("!HI", 4, 2**30)) + http2_frame(4, 1)
    window = http2_frame(8, 0, 0, struct.pack("!I", 2**30))
    requests = [http2_frame(1, 5, number, block) for number in range(1, 2 * streams, 2)]
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + window + b"".join(requests)


async def settle(done: Callable[[], bool]) -> int:
    """Let the server work until all tasks wait and ``done()`` is true; return how often that was tried."""
    tries = 1
    await wait_all_tasks_blocked()
    while not done():
        tries += 1
        await wait_all_tasks_blocked()
    return tries


async def measure(act: Callable[[], object], done: Callable[[], bool]) -> Work:
    """Return what the server does because of an act of clients."""
    work = Work()
    await wait_all_tasks_blocked()
    act()  # the server does not run meanwhile
    work.start()
    try:
        tries = await settle(done)
    finally:
        work.stop()
    work.system_calls["poll"] -= tries  # to see that all tasks wait
    return work


def print_counts(name: str, work: Iterable[Work], count: int) -> Bound:
    """Return the counts of one operation of ``count``, and print what they consist of."""
    totals = []
    print(name)
    for kind in Bound._fields:
        counter: Counter[str] = sum((getattr(each, kind) for each in work), Counter())
        totals.append(counter.total() / count)
        shares = {what: round(number / count, 2) for what, number in counter.most_common()}
        print(f"  {kind}: {totals[-1]:g}: {shares}")
    return Bound(*totals)


def check(name: str, work: Iterable[Work], count: int) -> None:
    measured = print_counts(name, work, count)
    assert all(value <= bound for value, bound in zip(measured, BOUNDS[name], strict=True)), (
        f"{name}: {measured}, more than {BOUNDS[name]}; the output above says what of"
    )


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch) -> Iterator[None]:
    """Fan-out does not look at the clock, no garbage is collected, and many files may be open."""
    monkeypatch.setattr(fanout, "SLICE", 1e9)
    monkeypatch.setattr(fanout, "LONGEST_SLICE", 1e9)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@asynccontextmanager
async def serve_without_time(clock: trio.testing.MockClock) -> AsyncIterator[Server]:
    """Run a server while Trio's clock stands still; it goes on when the server stops."""
    async with serve(port=0, drain=0.1) as server:
        await wait_all_tasks_blocked()
        try:
            yield server
        finally:
            clock.rate = 1.0


@contextmanager
def clients(port: int, count: int, *, connect: bool = True) -> Iterator[list[Client]]:
    with ExitStack() as stack:
        opened = [stack.enter_context(closing(Client(port))) for _ in range(count)]
        if connect:
            for client in opened:
                client.connect()
        yield opened


def watch_request(session: str) -> bytes:
    return request_bytes("GET", f"/api/sessions/{session}/status/stream")


def publish_request(session: str, number: int, kind: str) -> bytes:
    value: dict[str, Any] = {"type": "tick", "data": PAYLOAD | {"n": number}}
    if kind == "progress":
        value = {"progress": number / 10, "message": f"step {number}"}
    return request_bytes("POST", f"/api/sessions/{session}/{kind}", json.dumps(value).encode())


async def open_streams(watchers: list[Client], session: Callable[[int], str]) -> None:
    for number, watcher in enumerate(watchers):
        watcher.send(watch_request(session(number)))
    await settle(lambda: all(watcher.has(b"\r\n\r\n") for watcher in watchers))


@pytest.mark.parametrize("kind", ["event", "progress"])
async def test_publish_to_one_watcher(kind, mock_clock):
    """300 sessions with one watcher each; a publisher publishes to one after the other."""
    name = f"publish {'an event' if kind == 'event' else kind} to one watcher"
    path = "events" if kind == "event" else kind
    async with serve_without_time(mock_clock) as server:
        with clients(server.port, SESSIONS) as watchers, clients(server.port, 1) as (publisher,):
            for number in range(SESSIONS):
                await server.tracker.create(f"s{number}")
            await open_streams(watchers, lambda number: f"s{number}")
            work = []
            for number in range(-5, PUBLISHES):
                watcher = watchers[number]
                watcher.received = publisher.received = b""
                request = publish_request(f"s{number % SESSIONS}", abs(number), path)
                one = await measure(
                    lambda request=request: publisher.send(request),
                    lambda watcher=watcher: watcher.has(b"\n\n") and publisher.has(b"\r\n\r\n{"),
                )
                assert publisher.received.startswith(b"HTTP/1.1 202")
                work += [one] * (number >= 0)  # the first ones fill caches
            check(name, work, PUBLISHES)


async def test_deliver_to_many_watchers(mock_clock):
    async with serve_without_time(mock_clock) as server:
        with clients(server.port, WATCHERS) as watchers, clients(server.port, 1) as (publisher,):
            await server.tracker.create("s")
            await open_streams(watchers, lambda _: "s")
            work = []
            for number in range(-2, 5):
                for client in (publisher, *watchers):
                    client.received = b""
                request = publish_request("s", abs(number), "events")
                one = await measure(
                    lambda request=request: publisher.send(request),
                    lambda: publisher.has(b"{") and all(watcher.has(b"\n\n") for watcher in watchers),
                )
                work += [one] * (number >= 0)
            check("publish to 1,000 watchers, for each", work, 5 * WATCHERS)


@pytest.mark.parametrize(
    ("connections", "streams", "name"),
    [
        (WATCHERS, 1, "publish to 1,000 HTTP/2 connections, for each"),
        (10, 100, "publish to 10 HTTP/2 connections with 100 streams each, for each stream"),
    ],
)
async def test_deliver_over_http2(mock_clock, connections, streams, name):
    """About as much as over HTTP/1.1; where a connection has many streams, a write is for all of them."""
    async with serve_without_time(mock_clock) as server:
        with clients(server.port, connections) as watchers, clients(server.port, 1) as (publisher,):
            await server.tracker.create("s")
            for watcher in watchers:
                watcher.send(http2_request(streams))
            await settle(lambda: all(each.count(b"event: ") == streams for each in watchers))
            work = []
            for number in range(-2, 5):
                for client in (publisher, *watchers):
                    client.received = b""
                request = publish_request("s", abs(number), "events")
                one = await measure(
                    lambda request=request: publisher.send(request),
                    lambda: publisher.has(b"{") and all(each.count(b"\n\n") == streams for each in watchers),
                )
                work += [one] * (number >= 0)
            check(name, work, 5 * connections * streams)


async def test_open_a_stream(mock_clock):
    """128 clients connect at once, each to a session of its own that has some progress."""
    async with serve_without_time(mock_clock) as server:
        for number in range(2 * OPENED):
            await server.tracker.update(f"s{number}", progress=7)
        for begin in (0, OPENED):  # the first ones fill caches
            with clients(server.port, OPENED, connect=False) as watchers:

                def act(begin=begin, watchers=watchers) -> None:
                    for number, watcher in enumerate(watchers, begin):
                        watcher.connect()
                        watcher.send(watch_request(f"s{number}"))

                one = await measure(
                    act, lambda watchers=watchers: all(each.has(b"\n\n") for each in watchers)
                )
            await wait_all_tasks_blocked()
        check("open a stream", [one], OPENED)


def traced() -> int:
    """Return the bytes of Python's memory, without those of this module."""
    gc.collect()
    snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, __file__)])
    return sum(trace.size for trace in snapshot.traces)


@pytest.fixture
def tracing() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def check_bytes(name: str, measured: float) -> None:
    print(f"{name}: {measured:.1f} bytes")
    assert measured <= BYTES[name], f"{name}: {measured:.1f} bytes"


@pytest.mark.parametrize("protocol", ["SSE stream", "WebSocket"])
async def test_memory_of_an_idle_stream(protocol, tracing, mock_clock):
    """What 100 watchers of one session add, once each has got the snapshot."""
    path, headers = ("/stream", ()) if protocol == "SSE stream" else ("/ws", HANDSHAKE)
    async with serve_without_time(mock_clock) as server:
        await server.tracker.update("s", progress=7)
        request = request_bytes("GET", f"/api/sessions/s/status{path}", headers=headers)
        measured = []
        for _ in range(3):  # the first ones fill caches, and once in a while others fill one
            before = traced()
            with clients(server.port, 100, connect=False) as watchers:
                for watcher in watchers:
                    watcher.connect()
                    watcher.send(request)
                await settle(lambda all_=watchers: all(each.has(b'"progress":7') for each in all_))
                measured.append((traced() - before) / 100)
            await wait_all_tasks_blocked()
        check_bytes(f"idle {protocol}", min(measured))


async def test_memory_of_events(tracing, mock_clock):
    """What the log keeps of an event."""
    async with serve_without_time(mock_clock) as server:
        await server.tracker.create("s")
        with clients(server.port, 1) as watchers:
            await open_streams(watchers, lambda _: "s")
            for count in (10, 50):  # the first ones fill caches
                before = traced()
                for _ in range(count):
                    await server.events.publish("s", "tick", PAYLOAD)
                    await wait_all_tasks_blocked()
            check_bytes("kept of a published event", (traced() - before) / count)


async def test_memory_of_a_delivery(tracing, mock_clock):
    """What is allocated at the same time while 1,000 watchers get an event: nothing for each of them."""
    async with serve_without_time(mock_clock) as server:
        await server.tracker.create("s")
        with clients(server.port, WATCHERS) as watchers:
            await open_streams(watchers, lambda _: "s")
            for _ in range(2):  # the first one fills caches
                for watcher in watchers:
                    watcher.received = b""
                before = tracemalloc.get_traced_memory()[0]
                tracemalloc.reset_peak()
                await server.events.publish("s", "tick", PAYLOAD)
                await wait_all_tasks_blocked()
                peak = tracemalloc.get_traced_memory()[1] - before
                await settle(lambda: all(watcher.has(b"\n\n") for watcher in watchers))
    check_bytes("allocated at most while 1,000 get an event, for each", peak / WATCHERS)


@pytest.mark.parametrize("protocol", ["SSE", "WebSocket"])
async def test_bytes_on_the_wire(protocol, mock_clock):
    """What is sent for an event beside its 150 bytes of data: framing, type and cursor."""
    path, headers = ("/stream", ()) if protocol == "SSE" else ("/ws", HANDSHAKE)
    async with serve_without_time(mock_clock) as server:
        await server.tracker.create("s")
        with clients(server.port, 1) as (watcher,):
            watcher.send(request_bytes("GET", f"/api/sessions/s/status{path}", headers=headers))
            await settle(lambda: watcher.has(b"\r\n\r\n"))
            await wait_all_tasks_blocked()
            watcher.has(b"")
            watcher.received = b""
            await server.events.publish("s", "tick", PAYLOAD)
            await settle(lambda: watcher.has(b"x" * 139))
    print(watcher.received)
    check_bytes(f"around a payload, {protocol}", len(watcher.received) - len(json.dumps(PAYLOAD)) + 1)
