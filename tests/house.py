"""A whole server without a listener, on memory streams and a virtual clock: what its clients see and when."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import h2.connection
import h2.errors
import h2.events
import trio
import trio.testing
from raw_client import RawConnection, RawResponse, request_bytes
from trio.testing import memory_stream_pair

from sseserve.config import load
from sseserve.progress.queue import Runner
from sseserve.server.application import Application
from sseserve.sse import Decoder

__all__ = ["START", "House", "Multiplexed", "Said", "Stream"]

START = 1_767_322_800.0  # 2026-01-02T03:00:00Z: when the virtual clock says 0


class Said(NamedTuple):
    """One message of a stream: the event's name, its data, and the cursor behind it."""

    event: str
    data: Any
    id: str


class Stream:
    """One client's event stream. A watcher of a memory stream is idle when nothing is in it."""

    def __init__(self, connection: RawConnection, response: RawResponse) -> None:
        self.connection = connection
        self.response = response
        self.seen: list[Said] = []
        self.retry: int | None = None

    @property
    def raw(self) -> bytes:
        return self.connection.raw

    @property
    def comments(self) -> list[str]:
        """The comments that were read so far."""
        lines = self.connection.raw.decode().split("\n")
        return [line[2:] for line in lines if line.startswith(": ")]

    async def next(self) -> Said:
        """The next message."""
        event = await self.connection.event()
        assert event is not None, "the stream has ended"
        said = Said(event.event, json.loads(event.data), event.id)
        self.seen.append(said)
        return said

    async def take(self, count: int) -> list[Said]:
        """The next ``count`` messages."""
        return [await self.next() for _ in range(count)]

    async def read_to_end(self) -> list[Said]:
        """All messages up to the stream's end."""
        found = [Said(e.event, json.loads(e.data), e.id) for e in await self.connection.events()]
        self.retry = self.connection.decoder.retry
        self.seen += found
        return found

    async def silent(self) -> bool:
        """Whether nothing is there to be read, now that everybody has come to rest."""
        found = bool(self.connection.buffer or self.connection._events)

        async def look() -> None:
            nonlocal found
            await self.connection.receive()
            found = True

        async with trio.open_nursery() as nursery:
            if not found:
                nursery.start_soon(look)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        return not found

    async def leave(self) -> None:
        await self.connection.stream.aclose()


class House:
    """A server's context with its ticker and its sweep, as ``serve`` has it."""

    def __init__(self, nursery: trio.Nursery, *, runner: Runner | None = None, **settings: Any) -> None:
        self.app = Application(
            load(environ={}, flags=settings),
            nursery,
            runner=runner,
            clock=lambda: START + trio.current_time(),
        )
        self.tracker = self.app.tracker
        self.events = self.app.events
        self.broker = self.app.broker
        self._nursery = nursery
        for service in self.app.background_services():
            nursery.start_soon(service)

    def meet(self) -> RawConnection:
        """A connection to the server."""
        client, server = memory_stream_pair()
        self._nursery.start_soon(self.app.connections.serve, server)
        return RawConnection(client)

    async def request(self, method: str, target: str, value: Any = None, headers: Any = ()) -> RawResponse:
        """Ask on a connection of its own. ``value`` is sent as JSON, bytes as they are."""
        body = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
        connection = self.meet()
        async with connection.stream:
            return await connection.request(method, target, body, headers)

    async def get(self, target: str, headers: Any = ()) -> RawResponse:
        return await self.request("GET", target, headers=headers)

    async def post(self, target: str, value: Any = None, headers: Any = ()) -> RawResponse:
        return await self.request("POST", target, b"" if value is None else value, headers)

    async def stream(self, target: str, cursor: str | None = None, headers: Any = ()) -> Stream:
        """Open an event stream; it must be one."""
        more = list(headers) + ([] if cursor is None else [("Last-Event-ID", cursor)])
        connection = self.meet()
        await connection.send(request_bytes("GET", target, headers=more))
        response = await connection.read_head()
        assert response.status == 200, await connection.read_to_end()
        assert response.headers["content-type"] == "text/event-stream"
        return Stream(connection, response)

    async def watch(self, target: str, cursor: str | None = None) -> list[Said]:
        """Watch to the stream's end."""
        stream = await self.stream(target, cursor)
        async with stream.connection.stream:
            return await stream.read_to_end()


class Multiplexed:
    """A client of HTTP/2 with prior knowledge (RFC 9113, section 3.3): many streams on one connection."""

    def __init__(self, connection: RawConnection) -> None:
        self._connection = connection
        self._h2 = h2.connection.H2Connection()
        self._h2.initiate_connection()
        self.statuses: dict[int, int] = {}
        self.bodies: dict[int, bytes] = {}
        self.ended: set[int] = set()

    async def request(self, *targets: str, cursor: str | None = None) -> list[int]:
        """Send GET requests, all in one write; returns their numbers."""
        numbers = []
        for target in targets:
            number = self._h2.get_next_available_stream_id()
            headers = [(":method", "GET"), (":scheme", "http"), (":authority", "test"), (":path", target)]
            if cursor is not None:
                headers.append(("last-event-id", cursor))
            self._h2.send_headers(number, headers, end_stream=True)
            self.bodies[number] = b""
            numbers.append(number)
        await self._connection.send(self._h2.data_to_send())
        return numbers

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
                    case h2.events.StreamEnded() | h2.events.StreamReset():
                        self.ended.add(event.stream_id)
            self._connection.buffer = b""
            await self._connection.send(self._h2.data_to_send())

    async def leave(self, number: int) -> None:
        """Cancel one request."""
        self._h2.reset_stream(number, h2.errors.ErrorCodes.CANCEL)
        await self._connection.send(self._h2.data_to_send())

    def said(self, number: int) -> list[Said]:
        """The messages of an event stream, as far as it was read."""
        events = Decoder().feed(self.bodies[number])
        return [Said(e.event, json.loads(e.data), e.id) for e in events]
