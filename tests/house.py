"""A whole server without a listener, on memory streams and a virtual clock: what its clients see, and when."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import trio
import trio.testing
from peers import Connection, Reply, request_bytes
from trio.testing import memory_stream_pair

from sseserve.config import load
from sseserve.context import Context
from sseserve.jobs import Runner
from sseserve.server.connection import serve_connection
from sseserve.server.hypercorn import Gateway

__all__ = ["START", "House", "Said", "Stream"]

START = 1_767_322_800.0  # 2026-01-02T03:00:00Z: when the virtual clock says 0


class Said(NamedTuple):
    """One message of a stream: the event's name, its data, and the cursor behind it."""

    event: str
    data: Any
    id: str


class Stream:
    """One client's event stream. A watcher of a memory stream is idle when nothing is in it."""

    def __init__(self, connection: Connection, reply: Reply) -> None:
        self.connection = connection
        self.reply = reply
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

    async def rest(self) -> list[Said]:
        """All messages up to the stream's end."""
        found = [Said(e.event, json.loads(e.data), e.id) for e in await self.connection.events()]
        self.retry = self.connection.decoder.retry
        self.seen += found
        return found

    async def silent(self) -> bool:
        """Whether nothing is there to be read, now that everybody has come to rest."""
        found = False

        async def look() -> None:
            nonlocal found
            await self.connection.receive()
            found = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        return not found

    async def leave(self) -> None:
        await self.connection.stream.aclose()


class House:
    """A server's context with its ticker and its sweep, as ``serve`` has it."""

    def __init__(self, nursery: trio.Nursery, *, runner: Runner | None = None, **settings: Any) -> None:
        self.context = Context(load(environ={}, flags=settings), nursery, runner)
        self.context.gateway = Gateway(self.context)
        self.context.tracker.clock = lambda: START + trio.current_time()
        self.tracker = self.context.tracker
        self.events = self.context.events
        self.broker = self.context.broker
        self._nursery = nursery
        nursery.start_soon(self.broker.tick)
        nursery.start_soon(self.context.sweep)

    def meet(self) -> Connection:
        """A connection to the server."""
        client, server = memory_stream_pair()
        self._nursery.start_soon(serve_connection, self.context, server)
        return Connection(client)

    async def ask(self, method: str, target: str, value: Any = None, headers: Any = ()) -> Reply:
        """Ask on a connection of its own. ``value`` is sent as JSON, bytes as they are."""
        body = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
        connection = self.meet()
        async with connection.stream:
            return await connection.ask(method, target, body, headers)

    async def get(self, target: str, headers: Any = ()) -> Reply:
        return await self.ask("GET", target, headers=headers)

    async def post(self, target: str, value: Any = None, headers: Any = ()) -> Reply:
        return await self.ask("POST", target, b"" if value is None else value, headers)

    async def stream(self, target: str, cursor: str | None = None, headers: Any = ()) -> Stream:
        """Open an event stream; it must be one."""
        more = list(headers) + ([] if cursor is None else [("Last-Event-ID", cursor)])
        connection = self.meet()
        await connection.send(request_bytes("GET", target, headers=more))
        reply = await connection.head()
        assert reply.status == 200, await connection.rest()
        assert reply.headers["content-type"] == "text/event-stream"
        return Stream(connection, reply)

    async def watch(self, target: str, cursor: str | None = None) -> list[Said]:
        """Watch to the stream's end."""
        stream = await self.stream(target, cursor)
        async with stream.connection.stream:
            return await stream.rest()
