"""Hypercorn 0.18 and Quart-Trio 0.12, worked around. Nothing else in the package depends on their internals.

Each class names what it works around; ``tests/test_workarounds.py`` reproduces each defect without us, and
fails when a new version has mended it: then the work-around can go.
"""

from __future__ import annotations

import contextlib
from typing import Any

import trio
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, Data, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, ConnectionState
from hypercorn.utils import parse_socket_addr
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers import TrioRequest
from quart_trio.wrappers.request import TrioBody

from ..live.transport import LINGER, Transport

__all__ = ["Http2Server", "QuartApp"]

MAX_UNREAD = 64 * 1024  # bytes of a body that wait for their handler
HIGH_WATER = 32 * 1024  # bytes of an HTTP/2 stream that may wait for its client's window


# Quart-Trio


class PacedBody(TrioBody):
    """A request's body, of which at most one message beyond ``MAX_UNREAD`` is kept.

    Quart keeps all that has arrived, however slow the handler is, and all that nobody is going to read.
    """

    def __init__(self, *lengths: int | None) -> None:
        super().__init__(*lengths)
        self._is_dropped = False
        self._taken = trio.Event()

    async def __anext__(self) -> bytes:
        data = await super().__anext__()
        self._taken.set()
        return data

    def append(self, data: bytes) -> None:
        if not self._is_dropped:
            super().append(data)

    async def wait_for_capacity(self) -> None:
        """Wait until the handler has read what has arrived."""
        while len(self._data) >= MAX_UNREAD:
            self._taken = trio.Event()
            await self._taken.wait()

    def drop(self) -> None:
        """Keep nothing from now on: nobody is going to read it."""
        self._is_dropped = True
        self.clear()
        self._taken.set()


class _Request(TrioRequest):
    body_class: type[PacedBody] = PacedBody
    body: PacedBody


class BoundedConnection(TrioASGIHTTPConnection):
    """One request, whose response is sent within a timeout for each message.

    - The last message is shielded: Hypercorn queues ``http.disconnect`` inside it, Quart-Trio takes that for
      a client that has left, and would cancel the task before Hypercorn has closed the stream.
    - A body is read at the pace of its handler. Only while the handler is slower is it not noticed that
      the client leaves: what comes after an unread body is not known. So the bodies of methods that have
      none are dropped, and so is the rest of one that got its response early.
    - ``request.cleanup`` is an ``ExitStack`` that is closed when the response is over, however it ends: a
      response's own generator may never be started.
    """

    _body: PacedBody

    async def handle_messages(  # type: ignore[override]  # as the class above does
        self, nursery: trio.Nursery, request: _Request, receive: ASGIReceiveCallable
    ) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.request":
                request.body.append(message.get("body", b""))
                if not message.get("more_body", False):
                    request.body.set_complete()
                await request.body.wait_for_capacity()
            elif message["type"] == "http.disconnect":
                break
        nursery.cancel_scope.cancel()

    async def handle_request(  # type: ignore[override]  # as the class above does
        self, nursery: trio.Nursery, request: _Request, send: ASGISendCallable
    ) -> None:
        self._body = request.body
        if request.method != "POST":
            self._body.drop()
        with contextlib.ExitStack() as cleanup:
            request.cleanup = cleanup  # type: ignore[attr-defined]
            await super().handle_request(nursery, request, send)

    async def _send_response(self, send: ASGISendCallable, response: Any) -> None:
        timeout = self.app.config["SEND_TIMEOUT"]

        async def send_bounded(message: ASGISendEvent) -> None:
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            with trio.fail_after(timeout, shield=is_last):
                await send(message)

        self._body.drop()
        with contextlib.suppress(trio.TooSlowError):
            await super()._send_response(send_bounded, response)


class QuartApp(QuartTrio):
    """A Quart-Trio application with the work-arounds of this module.

    Its configuration has ``SEND_TIMEOUT``, in seconds, for each message of a response.
    """

    asgi_http_class = BoundedConnection
    request_class = _Request


# Hypercorn


class Http2Server(TCPServer):
    """Hypercorn's connection over our transport, for HTTP/2 with prior knowledge or by ALPN.

    - A send to a client that stalls is bounded: Hypercorn shields it without a timeout, which pins the
      connection's tasks and blocks the shutdown.
    - A client that closes an idle connection is let go at once. Hypercorn keeps it until the keep-alive
      timeout.
    - A request that begins in the moment in which idle connections are closed is still served.
    """

    def __init__(self, app: Any, config: Any, worker: Any, transport: Transport, send_timeout: float) -> None:
        super().__init__(app, config, worker, {}, transport)  # type: ignore[arg-type]  # duck-typed
        self._send_timeout = send_timeout
        self._is_busy = False
        self._client_closed = False
        self._reader: trio.lowlevel.Task | None = None
        self._reading_ended = trio.Event()

    async def run(self) -> None:
        try:
            client, server = _addresses(self.stream)
            async with TaskGroup() as task_group:
                self._task_group = task_group
                state = ConnectionState(self.state)
                arguments = (task_group, state, False, client, server, self.protocol_send)
                self.protocol = _Http2Protocol(self.app, self.config, self.context, *arguments)  # type: ignore[assignment]  # no wrapper is needed
                await self.protocol.initiate()
                await self.idle_task.restart(task_group, self._idle_timeout)
                self._reader = trio.lowlevel.current_task()
                await self._read_data()
                self._reading_ended.set()
                self._client_closed = True
                await self.idle_task.stop()
        except OSError:
            pass
        finally:
            await trio.aclose_forcefully(self.stream)

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated):
            self._is_busy = not event.idle
            if event.idle and self._client_closed:
                return
        if isinstance(event, Closed):
            await self._close_lingering()
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
        if not self._is_busy:
            with trio.CancelScope(shield=True):
                await self._initiate_server_close()

    async def _close_lingering(self) -> None:
        if trio.lowlevel.current_task() is self._reader:
            await self.stream.aclose_lingering(LINGER)
            return
        # The reader is running: it reads what still arrives, and notices when the client closes.
        closed = (trio.BrokenResourceError, trio.ClosedResourceError)
        with trio.move_on_after(LINGER), contextlib.suppress(*closed):
            await self.stream.send_eof()
            await self._reading_ended.wait()
        await trio.aclose_forcefully(self.stream)


class _Http2Protocol(H2Protocol):
    """Hypercorn's HTTP/2.

    - What a client sends on a stream that has got its response is dropped. In Hypercorn it is a KeyError,
      and the connection fails.
    - A stream waits for its client's window. In Hypercorn any write lets it continue, so that a client
      that gives no window costs memory without bound.
    - The end of a stream is sent before the GOAWAY of a shutdown. In Hypercorn it may be overtaken.
    - When the connection closes, the tasks that wait for a stream to be sent are woken. In Hypercorn they
      wait for ever, and keep the connection.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.streams = _Streams()
        self._sent: dict[int, trio.Event] = {}  # set when something of a stream has been sent

    async def handle(self, event: Event) -> None:
        await super().handle(event)
        if isinstance(event, Closed):
            for buffer in self.stream_buffers.values():
                await buffer.close()
            for sent in self._sent.values():
                sent.set()
            self._sent.clear()

    async def _send_data(self, stream_id: int) -> None:
        await super()._send_data(stream_id)
        if (sent := self._sent.pop(stream_id, None)) is not None:
            sent.set()

    async def _wait_sent(self, stream_id: int) -> None:
        await self._sent.setdefault(stream_id, trio.Event()).wait()

    async def stream_send(self, event: StreamEvent) -> None:
        stream_id = event.stream_id
        if isinstance(event, StreamClosed):
            with trio.move_on_after(LINGER):
                while not self.closed and (buffer := self.stream_buffers.get(stream_id)) and buffer.complete:
                    await self._wait_sent(stream_id)
        await super().stream_send(event)
        if isinstance(event, Body | Data):
            while not self.closed and self._is_full(stream_id):
                await self._wait_sent(stream_id)

    def _is_full(self, stream_id: int) -> bool:
        buffer = self.stream_buffers.get(stream_id)
        return buffer is not None and len(buffer.buffer) >= HIGH_WATER


class _Streams(dict[int, Any]):
    """The streams of a connection; one that is over accepts and drops what its client still sends."""

    def __missing__(self, number: int) -> _EndedStream:
        return _EndedStream()


class _EndedStream:
    async def handle(self, event: object) -> None:
        """Drop it."""


def _addresses(stream: Any) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """Return the addresses of both ends; None where the stream is not a socket."""
    try:
        socket = stream.socket
    except AttributeError:
        return None, None
    family = socket.family
    return parse_socket_addr(family, socket.getpeername()), parse_socket_addr(family, socket.getsockname())
