"""The requests of one HTTP/2 connection that are no event streams: Hypercorn's streams make ASGI of them."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

import trio
from hypercorn.config import Config
from hypercorn.protocol.events import (
    Body,
    Data,
    EndBody,
    EndData,
    Event,
    InformationalResponse,
    Request,
    Response,
    StreamClosed,
)
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.task_group import TaskGroup, _handle
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import filter_pseudo_headers, parse_socket_addr

from ..live.transport import Transport
from .http2_output import Outgoing, Output
from .request_body import RequestBody
from .websocket_stream import WebSocketStream

__all__ = ["AppRequests", "RequestTasks"]


class _AppWithBody(NamedTuple):
    """An application, and where it gets the body of its request from."""

    app: AppWrapper
    body: RequestBody


class RequestTasks(TaskGroup):
    """Hypercorn's, without a queue of messages for a request: what ends its body ends the request, too."""

    async def spawn_app(self, app: Any, config: Config, scope: Any, send: Any) -> Any:
        if not isinstance(app, _AppWithBody):
            return await super().spawn_app(app, config, scope, send)
        threads = trio.to_thread.run_sync, trio.from_thread.run
        self.spawn(_handle, app.app, config, scope, app.body.receive, send, *threads)
        return _drop


async def _drop(_message: object) -> None:
    pass


class AppRequests:
    """Serves requests by calls of an ASGI application.

    Args:
        app, config, worker: Hypercorn's.
        tasks: run the calls.
        transport: of the connection.
        output: of the connection.
        release: is called with the number of a stream, and how many bytes its client may send again.
        end: is called with the number of a stream that has ended.
    """

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        worker: WorkerContext,
        tasks: RequestTasks,
        transport: Transport,
        output: Output,
        *,
        release: Callable[[int, int], None],
        end: Callable[[int], Awaitable[None]],
    ) -> None:
        self._app = app
        self._config = config
        self._worker = worker
        self._tasks = tasks
        self._transport = transport
        self._output = output
        self._release = release
        self._end = end
        self._streams: dict[int, HTTPStream | WebSocketStream] = {}
        self._bodies: dict[int, RequestBody] = {}  # of HTTP requests

    async def open(
        self, outgoing: Outgoing, method: bytes, path: bytes, headers: list[tuple[bytes, bytes]]
    ) -> None:
        """Begin to serve a request; that of a WebSocket has the method CONNECT (RFC 8441, section 4)."""
        number = outgoing.number
        arguments: tuple[Any, ...] = (
            *(self._config, self._worker, self._tasks, False),
            *_addresses(self._transport),
            *(self._send, number),
        )
        stream: HTTPStream | WebSocketStream
        if method == b"CONNECT":
            stream = WebSocketStream(self._output.queue, self._app, *arguments)
        else:
            body = self._bodies[number] = RequestBody(partial(self._release, number))
            app: Any = _AppWithBody(self._app, body)  # which only ``RequestTasks`` uses
            stream = HTTPStream(app, *arguments)
        self._streams[number] = stream
        self._output.open(outgoing)
        await stream.handle(
            Request(
                stream_id=number,
                headers=filter_pseudo_headers(headers),
                http_version="2",
                method=method.decode("ascii").upper(),
                raw_path=path,
                state=ConnectionState({}),
            )
        )

    async def receive(self, number: int, data: bytes, size: int) -> None:
        """Take what has arrived of a request; with its padding it took ``size`` bytes of the window."""
        if (body := self._bodies.get(number)) is not None:
            body.append(data, size)
            return
        if (stream := self._streams.get(number)) is not None:
            await stream.handle(Body(stream_id=number, data=data))
        self._release(number, size)

    async def receive_end(self, number: int) -> None:
        """Note that all of a request has arrived."""
        if (body := self._bodies.get(number)) is not None:
            body.end()
        elif (stream := self._streams.get(number)) is not None:
            await stream.handle(EndBody(stream_id=number))

    async def close(self, number: int) -> None:
        """Note that a stream has ended."""
        if (body := self._bodies.pop(number, None)) is not None:
            body.close()
        if (stream := self._streams.pop(number, None)) is not None:
            await stream.handle(StreamClosed(stream_id=number))

    async def _send(self, event: Event) -> None:
        """Send an event of one of Hypercorn's streams, and wait until more can be sent."""
        if self._output.is_open(event.stream_id):
            try:
                await self._send_event(event)
            except trio.TooSlowError:
                await self._end(event.stream_id)

    async def _send_event(self, event: Event) -> None:
        number, output = event.stream_id, self._output
        match event:
            case Response() | InformationalResponse():
                status = (b":status", b"%d" % event.status_code)
                output.send_head(number, [status, *event.headers, *self._config.response_headers("h2")])
            case Body() | Data():
                await output.send(number, event.data)
            case EndBody() | EndData():
                await output.send_end(number)
            case StreamClosed():
                # Cancelled here is only a connection that ends: thousands of resets are not written any more.
                if trio.current_effective_deadline() > -math.inf:
                    await self._end(number)


def _addresses(transport: Transport) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """Return the addresses of client and server; None if the stream is no socket, or is reset already."""
    try:
        socket = transport.socket
        names = socket.getpeername(), socket.getsockname()
    except (AttributeError, OSError):
        return None, None
    port = names[0][1] if isinstance(names[0], tuple) else 0
    return transport.client or (transport.peer, port), parse_socket_addr(socket.family, names[1])
