"""The live layer without a server: engine, tracker, broker and watchers; and faulty stream wrappers."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import msgspec
import trio
import trio.testing
from raw_client import ChunkReader
from trio.testing import memory_stream_pair, wait_all_tasks_blocked
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Ping, TextMessage

from sseserve.config import Settings
from sseserve.dialects import Dialect, Encoding
from sseserve.dialects.sessions import SESSIONS
from sseserve.engines import EngineListener, Page
from sseserve.engines.memory import MemoryEngine
from sseserve.http.routes import ROUTES
from sseserve.live.broker import Broker
from sseserve.live.heartbeats import Heartbeats
from sseserve.live.pull_subscriber import PullSubscriber
from sseserve.live.push_subscriber import PushSubscriber
from sseserve.live.resume import deleted_message, join
from sseserve.live.subscriber import Subscriber
from sseserve.live.transport import Transport
from sseserve.model import Event, Receipt, Session
from sseserve.progress.tracker import Tracker
from sseserve.sse import Decoder

DISCONNECTED = (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)
HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


# Streams


class StreamWrapper(trio.abc.HalfCloseableStream):
    """Forwards every call to the wrapped stream."""

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
    """Sends nothing while it is stalled."""

    def __init__(self, stream: trio.StapledStream) -> None:
        super().__init__(stream)
        self._unstalled = trio.Event()
        self._unstalled.set()

    def stall(self) -> None:
        if self._unstalled.is_set():
            self._unstalled = trio.Event()

    def unstall(self) -> None:
        self._unstalled.set()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._unstalled.wait()
        await super().send_all(data)


class TornStream(StreamWrapper):
    """Breaks after ``length`` bytes have been sent, possibly in the middle of a write."""

    def __init__(self, stream: trio.StapledStream, length: int) -> None:
        super().__init__(stream)
        self._remaining = length

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await super().send_all(data[: self._remaining])
        self._remaining -= min(len(data), self._remaining)
        if not self._remaining:
            raise trio.BrokenResourceError("torn")


class DelayingStream(StreamWrapper):
    """Sends each write in two halves, ``seconds`` apart."""

    def __init__(self, stream: trio.StapledStream, seconds: float) -> None:
        super().__init__(stream)
        self._seconds = seconds

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        half = len(data) // 2
        await super().send_all(data[:half])
        await trio.sleep(self._seconds)
        await super().send_all(data[half:])


def socket_streams(buffer: int = 1) -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two ends of a real socket pair, with send buffers of ``buffer`` bytes or the kernel's minimum."""
    pair = socket.socketpair()
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    server, client = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in pair)
    return server, client


# Messages as a client reads them


class ParsedMessage(NamedTuple):
    """A message read over any protocol; ``id`` is None if the message has no id of its own."""

    event: str | None
    id: str | None
    data: Any

    @property
    def seq(self) -> int:
        assert self.id is not None
        return int(self.id.rpartition("-")[2])


class SSEReader:
    """Parses an event stream, with the decoder that test_sse.py tests against the standard.

    ``complete`` is whether its last chunk has arrived, None if it is not ``chunked``.
    """

    def __init__(self, *, chunked: bool = False, head: bytes = b"") -> None:
        self._decoder = Decoder()
        self._chunks = ChunkReader() if chunked else None
        self._last_id = ""
        self._head = head  # what comes before the stream
        self.raw = b""

    @property
    def complete(self) -> bool | None:
        return None if self._chunks is None else self._chunks.complete

    def feed(self, data: bytes) -> list[ParsedMessage]:
        head, data = data[: len(self._head)], data[len(self._head) :]
        assert self._head.startswith(head), head
        self._head = self._head[len(head) :]
        if self._chunks is not None:
            data = self._chunks.feed(data)
        self.raw += data
        messages = []
        for event in self._decoder.feed(data):
            own_id = None if event.id == self._last_id else event.id
            self._last_id = event.id
            messages.append(ParsedMessage(event.event, own_id, msgspec.json.decode(event.data)))
        return messages

    @property
    def cursor(self) -> str | None:
        return self._decoder.last_event_id or None

    @property
    def heartbeats(self) -> int:
        return self.raw.count(b": heartbeat\n")


class _TextReader:
    """Parses the JSON messages of WebSocket clients."""

    def __init__(self) -> None:
        self.cursor: str | None = None
        self.heartbeats = 0
        self.complete: bool | None = None

    def _message(self, text: str) -> ParsedMessage:
        message = msgspec.json.decode(text)
        self.cursor = message["id"] or self.cursor
        return ParsedMessage(message["event"], message["id"], message["data"])


class SocketReader(_TextReader):
    """Parses WebSocket frames with wsproto, an independent implementation."""

    def __init__(self) -> None:
        super().__init__()
        self._websocket = Connection(ConnectionType.CLIENT)
        self._text = ""
        self.closed: CloseConnection | None = None

    def feed(self, data: bytes) -> list[ParsedMessage]:
        self._websocket.receive_data(data)
        messages = []
        for event in self._websocket.events():
            match event:
                case TextMessage():
                    self._text += event.data
                    if event.message_finished:
                        messages.append(self._message(self._text))
                        self._text = ""
                case Ping():
                    self.heartbeats += 1
                case CloseConnection():
                    self.closed = event
                case _:
                    raise AssertionError(f"unexpected event: {event!r}")
        return messages


def make_reader(encoding: Encoding, head: bytes = b"") -> Any:
    """Return what reads an encoding, after the head."""
    return SocketReader() if encoding.protocol == "ws" else SSEReader(chunked=encoding.chunked, head=head)


# The harness


class Relay(EngineListener):
    """Passes what an engine delivers to a broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def deliver(self, session: Session, events: Sequence[Event]) -> None:
        self._broker.publish(session, events)


class LiveHarness:
    """An engine, a tracker and a broker; the clock is Trio's, so a virtual one in most tests."""

    def __init__(self, nursery: trio.Nursery, *, start: float = 1_000_000.0, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.nursery = nursery
        heartbeats = Heartbeats(interval=self.settings.heartbeat)
        self.broker = Broker(nursery, self.settings, heartbeats)
        self.memory = MemoryEngine(self.settings, Relay(self.broker))
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
        """From now on watchers read through an engine that yields, as one on a disk or a network does."""
        self.engine = YieldingEngine(self.memory)

    async def delete(self, session_id: str) -> None:
        """Delete a session as the server does."""
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
        connection: str = "socket",
        stalled: bool = False,
        dialect: Dialect = SESSIONS,
    ) -> Watcher:
        """Start a watcher; return it when all tasks are blocked."""
        watcher = Watcher(self, session_id, cursor, protocol, connection, dialect)
        if stalled:
            watcher.stall()
        self.nursery.start_soon(watcher.run)
        await wait_all_tasks_blocked()
        return watcher


class YieldingEngine:
    """An engine that yields to other tasks before and after each operation."""

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
        replaces: str | None = None,
    ) -> None:
        await trio.lowlevel.checkpoint()
        await self._engine.append(session, list(events), receipt=receipt, replaces=replaces)

    async def read(self, session_id: str, after: int, limit: int) -> Page | None:
        await trio.lowlevel.checkpoint()
        page = await self._engine.read(session_id, after, limit)
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        return page

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class Watcher:
    """A client of one session on one connection, and the server's side of that connection.

    ``connection`` is a ``socket`` (a real one, with ``try_send``), a ``stream`` (without ``try_send``, as
    with TLS), or ``pull`` (a response that another server writes). ``received`` are the messages read so far.
    """

    def __init__(
        self,
        harness: LiveHarness,
        session_id: str,
        cursor: str | None,
        protocol: str,
        connection: str,
        dialect: Dialect = SESSIONS,
    ) -> None:
        self._harness = harness
        self._session_id = session_id
        self.initial_cursor = cursor
        self._connection = connection
        # As the server does it: whoever writes a pulled response frames it.
        self._encoding = encoding(protocol, dialect, chunked=protocol == "sse" and connection != "pull")
        self.reader = make_reader(self._encoding, self.head)
        self.received: list[ParsedMessage] = []
        self.raw = b""
        self.ended = False  # the connection was closed, by either side
        self.subscriber: Subscriber | None = None
        self._unstalled = trio.Event()
        self._unstalled.set()
        self._receiving = trio.CancelScope()
        self._scope = trio.CancelScope()
        self._server_stream: Any = None
        self._client_stream: Any = None
        if connection == "socket":
            self._server_stream, self._client_stream = socket_streams()
        elif connection == "stream":
            server, self._client_stream = memory_stream_pair()
            self._server_stream = StallingStream(server)

    def __repr__(self) -> str:
        return f"<Watcher {self._connection}, {self.cursor}, ended={self.ended}, {self.subscriber!r}>"

    @property
    def cursor(self) -> str | None:
        return self.reader.cursor or self.initial_cursor

    @property
    def head(self) -> bytes:
        return HEAD if self._encoding.protocol == "sse" else b""

    @property
    def complete(self) -> bool | None:
        """Whether the last chunk of the response has arrived; None if it has no chunks."""
        return self.reader.complete  # type: ignore[no-any-return]

    @property
    def names(self) -> list[str | None]:
        return [message.event for message in self.received]

    @property
    def events(self) -> list[ParsedMessage]:
        """The messages with an id: logged events and snapshots."""
        return [message for message in self.received if message.id is not None]

    @property
    def seqs(self) -> list[int]:
        return [message.seq for message in self.events]

    def stall(self) -> None:
        """Read nothing until ``unstall``."""
        if self._connection == "stream":
            self._server_stream.stall()
        elif self._unstalled.is_set():
            self._unstalled = trio.Event()
            self._receiving.cancel()

    def unstall(self) -> None:
        if self._connection == "stream":
            self._server_stream.unstall()
        self._unstalled.set()

    def disconnect(self) -> None:
        """Close the connection without a closing handshake."""
        self._scope.cancel()

    async def run(self) -> None:
        try:
            await self._run()
        finally:
            self.ended = True

    async def _run(self) -> None:
        if self._connection == "pull":
            with self._scope:
                await self._pull()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve)
            try:
                with self._scope:
                    await self._read(self._client_stream.receive_some)
            finally:
                await trio.aclose_forcefully(self._client_stream)

    async def _serve(self) -> None:
        """The server's side, as server/streams.py does it."""
        harness, transport = self._harness, Transport(self._server_stream)
        try:
            async with trio.open_nursery() as nursery:
                subscriber = PushSubscriber(harness.broker, self._encoding, transport, nursery)
                self.subscriber = subscriber
                try:
                    await self._join(subscriber)
                    while await transport.receive_some(4096):
                        pass
                except DISCONNECTED:
                    pass
                finally:
                    subscriber.abort()
                    nursery.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(transport)

    async def _join(self, subscriber: Subscriber) -> None:
        harness = self._harness
        subscriber.head = self.head
        await join(
            harness.engine,
            harness.broker,
            subscriber,
            self._session_id,
            self.initial_cursor,
            replay=self._encoding.dialect.replays_log,
        )

    async def _pull(self) -> None:
        """The server's side of a response that another server writes, as web/app.py does it."""
        harness = self._harness
        subscriber = self.subscriber = PullSubscriber(harness.broker, self._encoding)

        async def join_session() -> None:
            try:
                await self._join(subscriber)
            except trio.TooSlowError:
                subscriber.abort()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(join_session)
            try:
                await self._read(subscriber.receive)
            finally:
                subscriber.abort()
                nursery.cancel_scope.cancel()

    async def _read(self, receive: Callable[[], Any]) -> None:
        while True:
            await self._unstalled.wait()
            data = None
            with trio.CancelScope() as self._receiving, suppress(trio.BrokenResourceError):
                data = await receive()
            if data is None:
                continue
            if not data:
                return
            self.raw += data
            self.received += self.reader.feed(bytes(data))


def encoding(protocol: Any = "sse", dialect: Dialect = SESSIONS, *, chunked: bool = False) -> Encoding:
    return Encoding(dialect, protocol, chunked)


def run(main: Callable[..., Any], *args: Any) -> None:
    """Run an async function on a new virtual clock: for the examples of a property test."""
    trio.run(partial(main, *args), clock=trio.testing.MockClock(autojump_threshold=0))
