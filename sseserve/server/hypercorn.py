"""Hands a connection to Hypercorn; every work-around of Hypercorn and Quart-Trio lives here.

- A send to a reader that stalls is bounded. Hypercorn shields it without a deadline, which pins the
  connection's tasks and blocks the shutdown.
- A connection whose request was refused before its body had come is closed behind the answer, after reading
  for a moment. Hypercorn closes it at once; the reset that follows may overtake the answer.
- A request that begins in the moment in which idle connections are closed is still answered.
- A connection that greets in HTTP/2 and asks for nothing is idle. Hypercorn takes the preface for a request.
- What a client sends on an HTTP/2 stream that has its answer is dropped. In Hypercorn the connection fails.
- Who writes an HTTP/2 stream waits for its client's window. In Hypercorn any other write lets it go on, so
  that a client that gives no window costs without bound.
- The end of an HTTP/2 stream goes out before the GOAWAY of a shutdown. In Hypercorn it may be overtaken.
- A client that closes an idle connection is let go at once. Hypercorn keeps it until the keep-alive timeout.
- The last body message of a response is shielded: Hypercorn queues ``http.disconnect`` inside it,
  Quart-Trio takes that as a departure, and would cancel the task before the socket is closed.
- A stream request that arrives over HTTP/1.1 finds the transport in the ASGI ``state`` and is served on it
  as on the direct path; Hypercorn only reads the socket, so as to tell when the client leaves.
- Addresses are read from the socket only if there is one, so that tests can use memory streams.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.events import Body, Data, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H2CProtocolRequiredError, H2ProtocolAssumedError
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ConnectionState, Scope
from hypercorn.utils import parse_socket_addr

from ..context import Context
from ..http.messages import Request
from ..http.routes import Kind, match
from ..live.transport import Transport
from ..web.app import Web, create_app
from .streams import LINGER, serve_stream

__all__ = ["Gateway", "serve_web"]

log = logging.getLogger(__name__)

MAX_HEAD = 32 * 1024
HIGH_WATER = 32 * 1024  # bytes of an HTTP/2 stream that may wait for its client's window


class Gateway:
    """The ASGI application of one server, and what Hypercorn needs to run it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._app: Web = create_app(context)
        settings = context.settings
        self.config = Config()
        self.config.keep_alive_timeout = settings.keep_alive
        self.config.h11_max_incomplete_size = MAX_HEAD
        self.config.include_server_header = False
        self.config.errorlog = logging.getLogger("sseserve.hypercorn")
        self.config.websocket_max_message_size = 4096
        self.worker = WorkerContext(None)
        self.send_timeout = settings.send_timeout

    async def __call__(
        self,
        scope: Scope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
        _sync_spawn: object,
        _call_soon: object,
    ) -> None:
        """Serve one request: a stream over HTTP/1.1 on the transport itself, all else by the app."""
        if scope["type"] == "http" and scope["method"] == "GET" and scope["http_version"].startswith("1"):
            path = scope["raw_path"].decode("ascii")
            found = match("GET", path)
            if found is not None and found.route.kind is Kind.STREAM:
                request = Request.make("GET", path, scope["query_string"].decode("latin-1"), scope["headers"])

                async def left() -> None:
                    while (await receive())["type"] != "http.disconnect":
                        pass

                transport: Transport = scope["state"]["transport"]
                try:
                    await serve_stream(self._context, transport, request, found, left)
                except Exception:
                    log.exception("connection failed in request %s", request.id)
                # Hypercorn believes that nothing was answered; on a closed transport it cannot say so.
                await trio.aclose_forcefully(transport)
                return
        await self._app(scope, receive, send)


async def serve_web(context: Context, transport: Transport) -> None:
    """Serve a connection, on which a request's head has been pushed back, by Hypercorn, to its end."""
    await _Server(context.gateway, transport).run()


class _Server(TCPServer):
    """Hypercorn's connection over our transport."""

    def __init__(self, gateway: Gateway, transport: Transport) -> None:
        state: dict[str, Any] = {"transport": transport}
        super().__init__(gateway, gateway.config, gateway.worker, state, transport)  # type: ignore[arg-type]  # duck-typed
        self._send_timeout = gateway.send_timeout
        self._busy = True
        self._left = False
        self._reader: trio.lowlevel.Task | None = None
        self._read_over = trio.Event()

    async def run(self) -> None:
        try:
            client, server = _addresses(self.stream)
            async with TaskGroup() as task_group:
                self._task_group = task_group
                self.protocol = _Protocol(
                    self.app,
                    self.config,
                    self.context,
                    task_group,
                    ConnectionState(self.state),
                    False,  # not TLS
                    client,
                    server,
                    self.protocol_send,
                    "http/1.1",
                )
                await self.protocol.initiate()
                self._reader = trio.lowlevel.current_task()
                await self._read_data()
                self._read_over.set()
                # The peer says nothing more, so there is nothing to wait for but the answer under way.
                self._left = True
                await self.idle_task.stop()
        except OSError:
            pass
        finally:
            await trio.aclose_forcefully(self.stream)

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated):
            self._busy = not event.idle
            if event.idle and self._left:
                return
        if isinstance(event, Closed):
            await self._end()
            await self.protocol.handle(event)
            return
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            try:
                with trio.fail_after(self._send_timeout, shield=True):
                    await self.stream.send_all(event.data)
            except trio.TooSlowError:
                await trio.aclose_forcefully(self.stream)
                await self.protocol.handle(Closed())
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                await self.protocol.handle(Closed())

    async def _idle_timeout(self) -> None:
        with trio.move_on_after(self.config.keep_alive_timeout):
            await self.context.terminated.wait()
        if not self._busy:
            with trio.CancelScope(shield=True):
                await self._initiate_server_close()

    async def _end(self) -> None:
        if trio.lowlevel.current_task() is self._reader:
            await self.stream.aclose_lingering(LINGER)
            return
        # The reader is at work; it reads away what comes, and sees the peer's end.
        with trio.move_on_after(LINGER), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self.stream.send_eof()
            await self._read_over.wait()
        await trio.aclose_forcefully(self.stream)


class _Protocol(ProtocolWrapper):
    """Hypercorn's protocols, of which HTTP/1.1 may become HTTP/2."""

    async def handle(self, event: Event) -> None:
        try:
            await self.protocol.handle(event)
        except H2ProtocolAssumedError as error:
            await self._go_over(error.data)
        except H2CProtocolRequiredError as error:
            await self._go_over(error.data, error.headers, error.settings)

    async def _go_over(
        self,
        data: bytes,
        headers: list[tuple[bytes, bytes]] | None = None,
        settings: bytes | None = None,
    ) -> None:
        self.protocol = _Http2(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.state,
            self.ssl,
            self.client,
            self.server,
            self.send,
        )
        await self.protocol.initiate(headers, settings)
        if data:
            await self.protocol.handle(RawData(data=data))
        await self.send(Updated(idle=self.protocol.idle))


class _Http2(H2Protocol):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.streams = _Streams()
        self._moved: dict[int, trio.Event] = {}  # set when something of a stream has been sent

    async def _send_data(self, stream_id: int) -> None:
        await super()._send_data(stream_id)
        if (moved := self._moved.pop(stream_id, None)) is not None:
            moved.set()

    async def _move(self, stream_id: int) -> None:
        await self._moved.setdefault(stream_id, trio.Event()).wait()

    async def stream_send(self, event: StreamEvent) -> None:
        stream_id = event.stream_id
        if isinstance(event, StreamClosed):
            with trio.move_on_after(LINGER):
                while (waiting := self.stream_buffers.get(stream_id)) and waiting.complete:
                    await self._move(stream_id)
        await super().stream_send(event)
        if isinstance(event, Body | Data):
            while (waiting := self.stream_buffers.get(stream_id)) and len(waiting.buffer) >= HIGH_WATER:
                await self._move(stream_id)


class _Streams(dict[int, Any]):
    """The streams of an HTTP/2 connection; one that is over takes what its client still sends."""

    def __missing__(self, number: int) -> _Over:
        return _Over()


class _Over:
    async def handle(self, event: object) -> None:
        """Let it go."""


def _addresses(stream: Any) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    try:
        socket = stream.socket
    except AttributeError:
        return None, None
    family = socket.family
    return parse_socket_addr(family, socket.getpeername()), parse_socket_addr(family, socket.getsockname())
