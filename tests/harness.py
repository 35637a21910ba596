"""A complete server without a listener, on memory streams and a virtual clock, and clients for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import h2.connection
import h2.errors
import h2.events
import trio
import trio.testing
from faulty_engine import FaultyEngine
from raw_client import RawConnection, RawResponse, request_bytes
from trio.testing import memory_stream_pair

from sseserve.config import load
from sseserve.http.admission import Authenticate
from sseserve.logs import Line
from sseserve.progress.queue import Runner
from sseserve.progress.tracker import Tracker
from sseserve.server.application import Application
from sseserve.sse import Decoder

__all__ = [
    "START",
    "STREAMS",
    "EventStream",
    "FaultyHarness",
    "HTTP2Client",
    "ServerHarness",
    "StreamMessage",
    "logged",
]

START = 1_767_322_800.0  # 2026-01-02T03:00:00Z: the time at which the virtual clock starts


# Where each dialect's streams are, with a place for the session's id
STREAMS = {
    "sessions": "/api/sessions/{}/status/stream",
    "interaction": "/api/interaction/events/{}",
    "jobs": "/api/jobs/{}/events",
    "jobs_v1": "/api/v1/jobs/{}/events",
    "transcription": "/api/v1/sessions/{}/status/stream",
}


def logged(caplog: Any, message: str) -> list[dict[str, Any]]:
    """Return the fields of the lines with this message, in the order in which they were logged."""
    lines = [record.msg for record in caplog.records if isinstance(record.msg, Line)]
    return [dict(line.fields) for line in lines if line.message == message]


class StreamMessage(NamedTuple):
    """A message of an event stream: the event's name, its data, and its id (a cursor)."""

    event: str
    data: Any
    id: str


class EventStream:
    """An event stream as its client reads it; ``received`` are the messages read so far."""

    def __init__(self, connection: RawConnection, response: RawResponse) -> None:
        self.connection = connection
        self.response = response
        self.received: list[StreamMessage] = []
        self.retry: int | None = None

    @property
    def raw(self) -> bytes:
        return self.connection.raw

    @property
    def comments(self) -> list[str]:
        """The comments read so far."""
        lines = self.connection.raw.decode().split("\n")
        return [line[2:] for line in lines if line.startswith(": ")]

    async def next(self) -> StreamMessage:
        """Read the next message."""
        event = await self.connection.event()
        assert event is not None, "the stream has ended"
        message = StreamMessage(event.event, json.loads(event.data), event.id)
        self.received.append(message)
        return message

    async def take(self, count: int) -> list[StreamMessage]:
        """Read the next ``count`` messages."""
        return [await self.next() for _ in range(count)]

    async def read_to_end(self) -> list[StreamMessage]:
        """Read all messages to the end of the stream."""
        messages = [StreamMessage(e.event, json.loads(e.data), e.id) for e in await self.connection.events()]
        self.retry = self.connection.decoder.retry
        self.received += messages
        return messages

    async def is_silent(self) -> bool:
        """Wait until all tasks are blocked; return whether there is nothing to read."""
        has_data = bool(self.connection.buffer or self.connection._events)

        async def receive() -> None:
            nonlocal has_data
            await self.connection.receive()
            has_data = True

        async with trio.open_nursery() as nursery:
            if not has_data:
                nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        return not has_data

    async def disconnect(self) -> None:
        """Close the connection."""
        await self.connection.stream.aclose()


class ServerHarness:
    """An application with its background services, as ``serve`` runs it. ``settings`` are its settings."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        runner: Runner | None = None,
        authenticate: Authenticate | None = None,
        make_engine: Any = None,
        worker: int | None = None,
        **settings: Any,
    ) -> None:
        self.app = Application(
            load(environ={}, flags=settings),
            nursery,
            runner=runner,
            authenticate=authenticate,
            clock=lambda: START + trio.current_time(),
            make_engine=make_engine,
            worker=worker,
        )
        self.tracker = self.app.tracker
        self.events = self.app.events
        self.broker = self.app.broker
        self._nursery = nursery
        for service in self.app.background_services():
            nursery.start_soon(service)

    def connect(self) -> RawConnection:
        """Open a connection to the server."""
        client, server = memory_stream_pair()
        self._nursery.start_soon(self.app.connections.serve, server)
        return RawConnection(client)

    async def request(self, method: str, target: str, value: Any = None, headers: Any = ()) -> RawResponse:
        """Send a request on a new connection; a ``value`` that is not bytes is encoded as JSON."""
        body = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
        connection = self.connect()
        async with connection.stream:
            return await connection.request(method, target, body, headers)

    async def get(self, target: str, headers: Any = ()) -> RawResponse:
        return await self.request("GET", target, headers=headers)

    def start_get(self, target: str) -> list[RawResponse]:
        """Send a request that may wait; returns a list that gets its response."""
        responses: list[RawResponse] = []

        async def get() -> None:
            responses.append(await self.get(target))

        self.app.nursery.start_soon(get)
        return responses

    async def post(self, target: str, value: Any = None, headers: Any = ()) -> RawResponse:
        return await self.request("POST", target, b"" if value is None else value, headers)

    async def stream(self, target: str, cursor: str | None = None, headers: Any = ()) -> EventStream:
        """Open an event stream, at ``cursor`` if one is given; any other response is a failure."""
        more = list(headers) + ([] if cursor is None else [("Last-Event-ID", cursor)])
        connection = self.connect()
        await connection.send(request_bytes("GET", target, headers=more))
        response = await connection.read_head()
        assert response.status == 200, await connection.read_to_end()
        assert response.headers["content-type"] == "text/event-stream"
        return EventStream(connection, response)

    async def watch(self, target: str, cursor: str | None = None) -> list[StreamMessage]:
        """Open an event stream and read it to its end."""
        stream = await self.stream(target, cursor)
        async with stream.connection.stream:
            return await stream.read_to_end()


class FaultyHarness(ServerHarness):
    """One whose engine may fail, and is appended to by another instance, with the tracker ``elsewhere``."""

    def __init__(self, nursery: trio.Nursery, **options: Any) -> None:
        super().__init__(nursery, make_engine=FaultyEngine, **options)
        self.engine: FaultyEngine = self.app.engine  # type: ignore[assignment]
        self.elsewhere = Tracker(self.engine.elsewhere, clock=self.tracker.clock)  # type: ignore[arg-type]


class HTTP2Client:
    """An HTTP/2 client with prior knowledge (RFC 9113, section 3.3); a request's number is its stream id."""

    def __init__(self, connection: RawConnection) -> None:
        self._connection = connection
        self._h2 = h2.connection.H2Connection()
        self._h2.initiate_connection()
        self.statuses: dict[int, int] = {}
        self.bodies: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.resets: set[int] = set()  # those that were reset, which are ended too
        self.connection_error: h2.errors.ErrorCodes | int | None = None

    async def request(self, *targets: str, cursor: str | None = None, headers: Any = ()) -> list[int]:
        """Send GET requests in a single write; return their numbers."""
        numbers = []
        for target in targets:
            number = self._h2.get_next_available_stream_id()
            fields = [(":method", "GET"), (":scheme", "http"), (":authority", "[::1]"), (":path", target)]
            if cursor is not None:
                fields.append(("last-event-id", cursor))
            self._h2.send_headers(number, [*fields, *headers], end_stream=True)
            self.bodies[number] = b""
            numbers.append(number)
        await self._connection.send(self._h2.data_to_send())
        return numbers

    async def connect(self, target: str, headers: Any = ()) -> int:
        """Send the handshake of a WebSocket (RFC 8441); return its number."""
        await self._connection.send(self._h2.data_to_send())
        await self.read_until(lambda: self._h2.remote_settings.enable_connect_protocol)
        number = self._h2.get_next_available_stream_id()
        fields = {":method": "CONNECT", ":protocol": "websocket", ":path": target, ":scheme": "http"}
        fields |= {":authority": "[::1]", "sec-websocket-version": "13"}
        self._h2.send_headers(number, [*fields.items(), *headers])
        self.bodies[number] = b""
        await self._connection.send(self._h2.data_to_send())
        return number

    async def begin_post(self, target: str, data: bytes, content_type: str) -> int:
        """Send a POST request whose body does not end; return its number."""
        number = self._h2.get_next_available_stream_id()
        headers = [(":method", "POST"), (":scheme", "http"), (":authority", "[::1]"), (":path", target)]
        self._h2.send_headers(number, [*headers, ("content-type", content_type)])
        self._h2.send_data(number, data)
        self.bodies[number] = b""
        await self._connection.send(self._h2.data_to_send())
        return number

    async def send_data(self, number: int, data: bytes) -> None:
        """Send more of a body."""
        self._h2.send_data(number, data)
        await self._connection.send(self._h2.data_to_send())

    async def read_until(self, condition: Callable[[], object]) -> None:
        """Read until a condition holds."""
        while not condition():
            assert await self._connection.receive(), "the connection has ended"
            for event in self._h2.receive_data(self._connection.buffer):
                match event:
                    case h2.events.ResponseReceived():
                        self.statuses[event.stream_id] = int(dict(event.headers)[b":status"])
                    case h2.events.DataReceived():
                        self.bodies[event.stream_id] += event.data
                        self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    case h2.events.ConnectionTerminated():
                        self.connection_error = event.error_code
                    case h2.events.StreamEnded() | h2.events.StreamReset():
                        self.ended.add(event.stream_id)
                        if isinstance(event, h2.events.StreamReset):
                            self.resets.add(event.stream_id)
            self._connection.buffer = b""
            await self._connection.send(self._h2.data_to_send())

    async def send_frames(self, data: bytes) -> None:
        """Send frames that h2 does not know of."""
        await self._connection.send(data)

    async def cancel(self, number: int) -> None:
        """Cancel one request."""
        self._h2.reset_stream(number, h2.errors.ErrorCodes.CANCEL)
        await self._connection.send(self._h2.data_to_send())

    def messages(self, number: int) -> list[StreamMessage]:
        """The messages of an event stream read so far."""
        events = Decoder().feed(self.bodies[number])
        return [StreamMessage(e.event, json.loads(e.data), e.id) for e in events]
