"""Fakes and stream wrappers: a house without sockets at its door, watchers that stall, streams that break."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import msgspec
import trio
import trio.testing
from trio.testing import memory_stream_pair, wait_all_tasks_blocked
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Ping, TextMessage

from sseserve.config import Settings
from sseserve.dialects import Dialect, Encoding
from sseserve.dialects.sessions import SESSIONS
from sseserve.engines import Page
from sseserve.engines.memory import MemoryEngine
from sseserve.http.routes import ROUTES
from sseserve.live.broker import Broker
from sseserve.live.heartbeats import Heartbeats
from sseserve.live.resume import deleted_message, join
from sseserve.live.subscriber import PullSubscriber, PushSubscriber, Subscriber
from sseserve.live.transport import Transport
from sseserve.model import Event, Receipt, Session
from sseserve.progress.tracker import Tracker
from sseserve.sse import Decoder

GONE = (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)
HEAD = b": the head of the response\n\n"


# Streams


class StreamWrapper(trio.abc.HalfCloseableStream):
    """Passes everything on."""

    def __init__(self, stream: trio.StapledStream) -> None:
        self.stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    async def aclose(self) -> None:
        await self.stream.aclose()


class StallingStream(StreamWrapper):
    """Takes nothing while it is stalled."""

    def __init__(self, stream: trio.StapledStream) -> None:
        super().__init__(stream)
        self._flowing = trio.Event()
        self._flowing.set()

    def stall(self) -> None:
        if self._flowing.is_set():
            self._flowing = trio.Event()

    def unstall(self) -> None:
        self._flowing.set()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._flowing.wait()
        await super().send_all(data)


class TornStream(StreamWrapper):
    """Breaks when ``length`` bytes have been sent, in the middle of a write if need be."""

    def __init__(self, stream: trio.StapledStream, length: int) -> None:
        super().__init__(stream)
        self._left = length

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await super().send_all(data[: self._left])
        self._left -= min(len(data), self._left)
        if not self._left:
            raise trio.BrokenResourceError("torn")


class DelayingStream(StreamWrapper):
    """Takes ``seconds`` for every write, a byte now and a byte then."""

    def __init__(self, stream: trio.StapledStream, seconds: float) -> None:
        super().__init__(stream)
        self._seconds = seconds

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        half = len(data) // 2
        await super().send_all(data[:half])
        await trio.sleep(self._seconds)
        await super().send_all(data[half:])


def socket_streams(buffer: int = 1) -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two ends of a real socket pair; the kernel keeps as little between them as it can."""
    pair = socket.socketpair()
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in pair)
    return ours, theirs


# What a client sees


class Seen(NamedTuple):
    """One message, as every protocol shows it; ``id`` is None where there is none of its own."""

    event: str | None
    id: str | None
    data: Any

    @property
    def seq(self) -> int:
        assert self.id is not None
        return int(self.id.rpartition("-")[2])


class SSEReader:
    """Reads an event stream back, with the decoder that test_sse.py holds against the standard."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._last = ""
        self.raw = b""

    def feed(self, data: bytes) -> list[Seen]:
        self.raw += data
        seen = []
        for event in self._decoder.feed(data):
            fresh = None if event.id == self._last else event.id
            self._last = event.id
            seen.append(Seen(event.event, fresh, msgspec.json.decode(event.data)))
        return seen

    @property
    def cursor(self) -> str | None:
        return self._decoder.last_event_id or None

    @property
    def heartbeats(self) -> int:
        return self.raw.count(b": heartbeat\n\n")


class _TextReader:
    """Reads the JSON messages that WebSocket clients get."""

    def __init__(self) -> None:
        self.cursor: str | None = None
        self.heartbeats = 0

    def _message(self, text: str) -> Seen:
        message = msgspec.json.decode(text)
        self.cursor = message["id"] or self.cursor
        return Seen(message["event"], message["id"], message["data"])


class SocketReader(_TextReader):
    """Reads WebSocket frames with wsproto, an implementation that is not ours."""

    def __init__(self) -> None:
        super().__init__()
        self._connection = Connection(ConnectionType.CLIENT)
        self._text = ""
        self.closed: CloseConnection | None = None

    def feed(self, data: bytes) -> list[Seen]:
        self._connection.receive_data(data)
        seen = []
        for event in self._connection.events():
            match event:
                case TextMessage():
                    self._text += event.data
                    if event.message_finished:
                        seen.append(self._message(self._text))
                        self._text = ""
                case Ping():
                    self.heartbeats += 1
                case CloseConnection():
                    self.closed = event
                case _:
                    raise AssertionError(f"a client has no use for {event!r}")
        return seen


READERS: dict[str, Callable[[], Any]] = {"sse": SSEReader, "ws": SocketReader}


# The house


class House:
    """An engine, a tracker and a broker, and a clock that is Trio's (so a virtual one)."""

    def __init__(self, nursery: trio.Nursery, *, start: float = 1_000_000.0, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.nursery = nursery
        heartbeats = Heartbeats(interval=self.settings.heartbeat)
        self.broker = Broker(nursery, self.settings, heartbeats)
        self.memory = MemoryEngine(self.settings, self.broker.publish)
        self.engine: Any = self.memory
        self.stopping = trio.Event()
        self.tracker = Tracker(
            self.engine,
            auto_create=self.settings.auto_create,
            max_sessions=self.settings.max_sessions,
            reserved=ROUTES.reserved_events,
            clock=lambda: start + trio.current_time(),
        )

    def slow_engine(self) -> None:
        """From here on watchers read through an engine that waits, as one on a disk or a network does."""
        self.engine = YieldingEngine(self.memory)

    async def delete(self, session_id: str) -> None:
        """Forget a session as the server does."""
        session = await self.tracker.delete(session_id)
        self.broker.close(session.id, deleted_message())

    async def log(self, session_id: str) -> list[Event]:
        page = await self.memory.read(session_id, 0, 1_000_000)
        assert page is not None
        return page.events

    async def watch(
        self,
        session_id: str = "s",
        cursor: str | None = None,
        *,
        protocol: str = "sse",
        over: str = "socket",
        stalled: bool = False,
        dialect: Dialect = SESSIONS,
    ) -> Watcher:
        """Let a client join; returns when everything has come to rest."""
        watcher = Watcher(self, session_id, cursor, protocol, over, dialect)
        if stalled:
            watcher.stall()
        self.nursery.start_soon(watcher.run)
        await wait_all_tasks_blocked()
        return watcher


class YieldingEngine:
    """An engine that waits before and after it answers."""

    def __init__(self, engine: MemoryEngine) -> None:
        self._engine = engine

    async def load(self, session_id: str) -> Session | None:
        await trio.lowlevel.checkpoint()
        return await self._engine.load(session_id)

    async def append(
        self,
        session: Session,
        events: Iterable[Event],
        *,
        receipt: tuple[str, Receipt] | None = None,
    ) -> None:
        await trio.lowlevel.checkpoint()
        await self._engine.append(session, list(events), receipt=receipt)

    async def read(self, session_id: str, after: int, limit: int) -> Page | None:
        await trio.lowlevel.checkpoint()
        page = await self._engine.read(session_id, after, limit)
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        return page

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class Watcher:
    """One client on one connection, and the server's side of that connection.

    ``over`` a ``socket`` (a real one, with ``try_send``), a ``stream`` (none, as TLS), or a ``pull``
    (a response that another server writes).
    """

    def __init__(
        self,
        house: House,
        session_id: str,
        cursor: str | None,
        protocol: str,
        over: str,
        dialect: Dialect = SESSIONS,
    ) -> None:
        self._house = house
        self._session_id = session_id
        self.given = cursor
        self._over = over
        self._encoding = encoding(protocol, dialect)
        self.reader = READERS[protocol]()
        self.seen: list[Seen] = []
        self.raw = b""
        self.over = False  # the connection has ended, whoever ended it
        self.subscriber: Subscriber | None = None
        self._flowing = trio.Event()
        self._flowing.set()
        self._receiving = trio.CancelScope()
        self._scope = trio.CancelScope()
        self._ours: Any = None
        self._theirs: Any = None
        if over == "socket":
            self._ours, self._theirs = socket_streams()
        elif over == "stream":
            ours, self._theirs = memory_stream_pair()
            self._ours = StallingStream(ours)

    def __repr__(self) -> str:
        return f"<Watcher over {self._over}, {self.cursor}, over={self.over}, {self.subscriber!r}>"

    @property
    def cursor(self) -> str | None:
        return self.reader.cursor or self.given

    @property
    def head(self) -> bytes:
        return HEAD if self._encoding.protocol == "sse" else b""

    @property
    def names(self) -> list[str | None]:
        return [seen.event for seen in self.seen]

    @property
    def events(self) -> list[Seen]:
        """What has an id: events of the log, or snapshots."""
        return [seen for seen in self.seen if seen.id is not None]

    @property
    def seqs(self) -> list[int]:
        return [seen.seq for seen in self.events]

    def stall(self) -> None:
        """Take nothing from now on."""
        if self._over == "stream":
            self._ours.stall()
        elif self._flowing.is_set():
            self._flowing = trio.Event()
            self._receiving.cancel()

    def unstall(self) -> None:
        if self._over == "stream":
            self._ours.unstall()
        self._flowing.set()

    def leave(self) -> None:
        """Go without a word."""
        self._scope.cancel()

    async def run(self) -> None:
        try:
            await self._run()
        finally:
            self.over = True

    async def _run(self) -> None:
        if self._over == "pull":
            with self._scope:
                await self._pull()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve)
            try:
                with self._scope:
                    await self._read(self._theirs.receive_some)
            finally:
                await trio.aclose_forcefully(self._theirs)

    async def _serve(self) -> None:
        """The server's side, as server/streams.py has it."""
        house, transport = self._house, Transport(self._ours)
        try:
            async with trio.open_nursery() as nursery:
                subscriber = PushSubscriber(house.broker, self._encoding, transport, nursery)
                self.subscriber = subscriber
                try:
                    await self._join(subscriber)
                    while await transport.receive_some(4096):
                        pass
                except GONE:
                    pass
                finally:
                    subscriber.abort()
                    nursery.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(transport)

    async def _join(self, subscriber: Subscriber) -> None:
        house = self._house
        await join(house.engine, house.broker, subscriber, self._session_id, self.given, self.head)

    async def _pull(self) -> None:
        """The server's side, as web/watch.py has it."""
        house = self._house
        subscriber = self.subscriber = PullSubscriber(house.broker, self._encoding)

        async def bring() -> None:
            try:
                await self._join(subscriber)
            except trio.TooSlowError:
                subscriber.abort()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(bring)
            try:
                await self._read(subscriber.receive)
            finally:
                subscriber.abort()
                nursery.cancel_scope.cancel()

    async def _read(self, receive: Callable[[], Any]) -> None:
        while True:
            await self._flowing.wait()
            data = None
            with trio.CancelScope() as self._receiving, suppress(trio.BrokenResourceError):
                data = await receive()
            if data is None:
                continue
            if not data:
                return
            self.raw += data
            self.seen += self.reader.feed(bytes(data))


def encoding(protocol: Any = "sse", dialect: Dialect = SESSIONS) -> Encoding:
    return Encoding(dialect, protocol)


def run(main: Callable[..., Any], *args: Any) -> None:
    """Run an async test body on a virtual clock of its own: one for each example of a property test."""
    trio.run(partial(main, *args), clock=trio.testing.MockClock(autojump_threshold=0))
