"""Owns one connection, and serves every HTTP/1.1 request of it, one after another.

A handler returns a response; a stream or a WebSocket takes the transport over and ends the connection. A
connection that begins with the HTTP/2 preface (RFC 9113, section 3.4) is handed over as a whole.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

import h11
import trio

from ..errors import BadRequest
from ..http.limits import MAX_HEAD_BYTES
from ..http.messages import ClientDisconnected, Request, Response, error_response, http_date
from ..http.publishing import NDJSON
from ..http.routes import Kind, Match
from ..live.transport import DISCONNECTED, LINGER, Transport
from ..web.dispatch import Dispatcher
from .drain import IdleConnections
from .streams import EventStreams
from .websockets import WebSockets

__all__ = ["ConnectionServer"]

log = logging.getLogger(__name__)

READ = 64 * 1024
WRITE = 64 * 1024  # bytes of a response that may take the send timeout
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# What serves a connection from here on, and the id of the request that it serves.
_Takeover = tuple[Coroutine[Any, Any, None], str]


class ConnectionServer:
    """Serves connections.

    Args:
        dispatcher: serves the requests that are not streams.
        streams, websockets: take a connection over.
        serve_http2: serves a connection that speaks HTTP/2.
        idle: knows the connections without a request.
        stopping: is set when the server begins to stop.
        keep_alive: how long a connection may be idle, in seconds.
        request_timeout: how long a request's head, or the next bytes of its body, may take, in seconds.
        send_timeout: how long one write may take, in seconds.
        clock: returns POSIX seconds.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        streams: EventStreams,
        websockets: WebSockets,
        serve_http2: Callable[[Transport], Coroutine[Any, Any, None]],
        idle: IdleConnections,
        *,
        stopping: trio.Event,
        keep_alive: float,
        request_timeout: float,
        send_timeout: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._dispatcher = dispatcher
        self._streams = streams
        self._websockets = websockets
        self._serve_http2 = serve_http2
        self._idle = idle
        self._stopping = stopping
        self._keep_alive = keep_alive
        self._request_timeout = request_timeout
        self._send_timeout = send_timeout
        self._clock = clock

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve a connection to its end. Whatever goes wrong with it stays with it."""
        transport = Transport(stream)
        request_id = ""
        try:
            if (takeover := await self._serve_requests(transport)) is not None:
                serving, request_id = takeover
                del takeover
                await serving
        except (*DISCONNECTED, ClientDisconnected):
            pass
        except Exception:
            # The boundary of a connection: the others are not affected.
            log.exception("connection failed%s", request_id and f" in request {request_id}")
        finally:
            await trio.aclose_forcefully(transport)

    async def _serve_requests(self, transport: Transport) -> _Takeover | None:
        """Serve requests to the end of the connection, or to one that takes it over."""
        peer, received, is_first = transport.peer, b"", True
        while True:
            parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
            head = await self._read_head(transport, parser, received, is_first=is_first)
            if head is None:
                return None
            if isinstance(head, bytes):
                transport.push_back(head)
                return self._serve_http2(transport), ""
            raw_path, _, query_string = head.target.decode("ascii").partition("?")
            body = _read_body(transport, parser, self._body_timeout(head))
            method = head.method.decode("ascii")
            request = Request.create(method, raw_path, query_string, head.headers, peer=peer, body=body)
            match = self._dispatcher.match(request)
            if (serve := self._takes_over(request, match)) is not None and match is not None:
                transport.push_back(bytes(parser.trailing_data[0]))
                return serve(transport, request, match, self._date()), request.id
            try:
                if not await self._serve_request(transport, parser, request, match):
                    return None
            finally:
                await body.aclose()
            received, is_first = bytes(parser.trailing_data[0]), False
            if received:
                await trio.lowlevel.checkpoint()  # one read may hold many pipelined requests

    def _takes_over(
        self, request: Request, match: Match | None
    ) -> Callable[[Transport, Request, Match, str], Coroutine[Any, Any, None]] | None:
        """Return what serves the connection from this request on."""
        if match is None or request.method != "GET":
            return None
        if match.route.kind is Kind.STREAM:
            return self._streams.serve
        if match.route.kind is Kind.SOCKET and request.headers.get("upgrade", "").lower() == "websocket":
            return self._websockets.serve
        return None

    def _body_timeout(self, head: h11.Request) -> float:
        """Return how long the next bytes of a body may take; NDJSON lines come when there is news."""
        content_type = next((value for name, value in head.headers if name == b"content-type"), b"")
        media_type = content_type.decode("latin-1").partition(";")[0].strip().lower()
        return math.inf if media_type in NDJSON else self._request_timeout

    async def _read_head(
        self, transport: Transport, parser: h11.Connection, received: bytes, *, is_first: bool
    ) -> h11.Request | bytes | None:
        """Read a request's head.

        Returns None if there is none: the client left, was too slow, or sent malformed data. If the
        connection begins with the HTTP/2 preface, returns what was read of it.
        """
        if not received and self._stopping.is_set():
            return None
        preface = b"" if is_first else None  # what was read while it may be the HTTP/2 preface
        parser_has_data = bool(received)
        if received:
            parser.receive_data(received)
        with trio.move_on_after(self._request_timeout if received else self._keep_alive) as scope:
            while True:
                if parser_has_data:
                    try:
                        event = parser.next_event()
                    except h11.RemoteProtocolError as error:
                        await self._refuse(transport, error)
                        return None
                    if isinstance(event, h11.Request):
                        return event
                    if event is not h11.NEED_DATA:
                        return None
                if parser_has_data or preface:
                    data = await transport.receive_some(READ)
                else:
                    with self._idle.add(scope):
                        data = await transport.receive_some(READ)
                    scope.deadline = trio.current_time() + self._request_timeout
                if not data:
                    return None
                if preface is not None:
                    preface += data
                    if preface.startswith(PREFACE):
                        return preface
                    if PREFACE.startswith(preface):
                        continue
                    data, preface = preface, None
                parser.receive_data(bytes(data))
                parser_has_data = True
        return None

    async def _refuse(self, transport: Transport, error: h11.RemoteProtocolError) -> None:
        """Respond to what cannot be parsed, and close."""
        request = Request.create("", "")
        response = self._dispatcher.finish(request, error_response(BadRequest(str(error)), request))
        await self._send(transport, response.encode(close=True, date=self._date()))
        await transport.aclose_lingering(LINGER)

    async def _serve_request(
        self, transport: Transport, parser: h11.Connection, request: Request, match: Match | None
    ) -> bool:
        """Respond to a request. Returns whether the connection can serve another one."""
        respond = self._dispatcher.respond(request, match)
        if match is not None and match.route.may_wait and "wait" in request.query:
            response = await _unless_disconnected(respond, transport, parser)
        else:
            response = await respond
        close = self._stopping.is_set() or not _is_complete(parser) or not _is_kept_alive(parser, request)
        head_only = request.method == "HEAD"
        await self._send(transport, response.encode(head_only=head_only, close=close, date=self._date()))
        if close:
            await transport.aclose_lingering(LINGER)
        return not close

    def _date(self) -> str:
        return http_date(int(self._clock()))

    async def _send(self, transport: Transport, data: bytes) -> None:
        if len(data) <= WRITE and transport.try_send(data):
            if not transport.pending:
                return
            data = b""  # the tail is sent first
        for at in range(0, len(data) or 1, WRITE):
            with trio.fail_after(self._send_timeout):
                await transport.send_all(data[at : at + WRITE])


def _is_kept_alive(parser: h11.Connection, request: Request) -> bool:
    """Whether the client keeps the connection open (RFC 9112, section 9.3)."""
    return (
        parser.their_http_version != b"1.0" and "close" not in request.headers.get("connection", "").lower()
    )


def _is_complete(parser: h11.Connection) -> bool:
    """Read what has arrived of a request that nobody reads on; returns whether that was all of it."""
    try:
        while parser.their_state is h11.SEND_BODY:
            if parser.next_event() is h11.NEED_DATA:
                return False
    except h11.RemoteProtocolError:
        return False
    return parser.their_state is not h11.ERROR


async def _read_body(transport: Transport, parser: h11.Connection, timeout: float) -> AsyncGenerator[bytes]:
    """Read a request's body as it arrives; see ``Request.body`` for what it raises."""
    if parser.they_are_waiting_for_100_continue:
        with trio.fail_after(timeout):
            await transport.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
    chunks = 0
    while True:
        try:
            event = parser.next_event()
        except h11.RemoteProtocolError as error:
            raise BadRequest(str(error)) from None
        if isinstance(event, h11.Data):
            yield bytes(event.data)
            chunks += 1
            if chunks % 64 == 0:
                await trio.lowlevel.checkpoint()  # one read may hold many chunks of one byte
        elif event is h11.NEED_DATA:
            parser.receive_data(await _receive(transport, timeout))
        else:
            return


async def _receive(transport: Transport, timeout: float) -> bytes:
    try:
        with trio.fail_after(timeout):
            data = await transport.receive_some(READ)
    except trio.TooSlowError:
        raise BadRequest("the body did not arrive in time") from None
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise ClientDisconnected from None
    if not data:
        raise ClientDisconnected
    return bytes(data)


async def _unless_disconnected(
    respond: Awaitable[Response], transport: Transport, parser: h11.Connection
) -> Response:
    """Wait for a response that may come much later, unless the client leaves.

    Raises:
        ClientDisconnected: it has left.
    """
    response: Response | None = None
    async with trio.open_nursery() as nursery:

        async def wait_disconnected() -> None:
            await _wait_disconnected(transport, parser)
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait_disconnected)
        response = await respond
        nursery.cancel_scope.cancel()
    if response is None:
        raise ClientDisconnected
    return response


async def _wait_disconnected(transport: Transport, parser: h11.Connection) -> None:
    """Wait until the client closes its side. A body is dropped, and what follows is kept for later."""
    following = b""
    try:
        while True:
            while parser.their_state is h11.SEND_BODY and parser.next_event() is not h11.NEED_DATA:
                await trio.lowlevel.checkpoint()
            if len(following) >= READ:
                await trio.sleep_forever()  # it has much to say: it is still there
            data = await transport.receive_some(READ)
            if not data:
                return
            if parser.their_state is h11.SEND_BODY:
                parser.receive_data(bytes(data))
            else:
                following += data
    except h11.RemoteProtocolError:
        await trio.sleep_forever()  # the response closes the connection
    except DISCONNECTED:
        return
    finally:
        transport.push_back(following)
