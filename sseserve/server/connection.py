"""Owns one connection, and serves every HTTP/1.1 request of it, one after another.

A handler returns a response; a stream or a WebSocket takes the transport over and ends the connection. A
connection that begins with the HTTP/2 preface (RFC 9113, section 3.4) is handed over as a whole.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import h11
import msgspec
import trio

from ..errors import (
    BadRequest,
    HeadTooLarge,
    PayloadTooLarge,
    RequestTimeout,
    SseserveError,
    UnsupportedCoding,
)
from ..http.limits import BodyDeadline
from ..http.messages import (
    ClientDisconnected,
    Request,
    Response,
    check_head,
    error_response,
    http_date,
)
from ..http.proxies import TrustedProxies
from ..http.routing import Kind, Match
from ..live.transport import DISCONNECTED, LINGER, Transport
from ..web.dispatch import Dispatcher
from ..web.turns import Turn
from .drain import HEAD_TIME, IdleConnections
from .proxy_protocol import read_proxy_header
from .streams import EventStreams
from .websockets import WebSockets

__all__ = ["ConnectionServer"]

log = logging.getLogger(__name__)

READ = 64 * 1024
MAX_DROPPED = 2**20  # bytes of a body that nobody reads, which are read to keep the connection
WRITE = 64 * 1024  # bytes of a response that may take the send timeout
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# Statuses after which the rest of a body is not worth reading.
_BODY_ERRORS = frozenset({BadRequest.status, PayloadTooLarge.status})

# Where h11's messages begin to repeat what they are about.
_REPEATED = re.compile(r""":? (bytearray\()?b['"]""")

# What serves a connection from here on, and the id of the request that it serves.
_Takeover = tuple[Coroutine[Any, Any, None], str]


class ConnectionServer:
    """Serves connections.

    Args:
        dispatcher: serves the requests that are not streams.
        streams, websockets: take a connection over.
        serve_http2: serves a connection that speaks HTTP/2.
        idle: knows the connections without a request.
        proxies: say whose requests they forward.
        stopping: is set when the server begins to stop.
        max_head: limit of a request's line and header fields, in bytes.
        keep_alive: how long a connection may be idle, in seconds.
        request_timeout: how long a request's head, or the next bytes of its body, may take, in seconds.
        ndjson_timeout: how long the next line of NDJSON may take to begin, in seconds.
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
        proxies: TrustedProxies,
        *,
        stopping: trio.Event,
        max_head: int,
        keep_alive: float,
        request_timeout: float,
        ndjson_timeout: float,
        send_timeout: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._dispatcher = dispatcher
        self._streams = streams
        self._websockets = websockets
        self._serve_http2 = serve_http2
        self._idle = idle
        self._proxies = proxies
        self._stopping = stopping
        self._max_head = max_head
        self._keep_alive = keep_alive
        self._request_timeout = request_timeout
        self._ndjson_timeout = ndjson_timeout
        self._send_timeout = send_timeout
        self._clock = clock

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve a connection to its end. Whatever goes wrong with it stays with it."""
        transport = Transport(stream)
        request_id = ""
        try:
            if self._proxies.begins_with_header(transport.peer):
                is_late = self._stopping.is_set()
                timeout = HEAD_TIME if is_late else self._request_timeout
                if not await read_proxy_header(transport, self._idle, timeout=timeout, is_late=is_late):
                    return
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
            parser = h11.Connection(h11.SERVER, max_incomplete_event_size=self._max_head)
            head = await self._read_head(transport, parser, received, is_first=is_first)
            if head is None:
                return None
            if isinstance(head, bytes):
                transport.push_back(head)
                return self._serve_http2(transport), ""
            request = self._proxies.resolve(
                Request.create(
                    head.method.decode("ascii"),
                    head.target.decode("ascii"),
                    head.headers,
                    http_version=head.http_version.decode("ascii"),
                    peer=peer,
                )
            )
            match = self._dispatcher.match(request)
            if (serve := self._takes_over(request, match)) is not None and match is not None:
                transport.push_back(bytes(parser.trailing_data[0]))
                return serve(transport, request, match, self._date()), request.id
            if not await self._serve_request(transport, parser, request, match):
                return None
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

    async def _read_head(
        self, transport: Transport, parser: h11.Connection, received: bytes, *, is_first: bool
    ) -> h11.Request | bytes | None:
        """Read a request's head.

        Returns None if there is none: the client left, was too slow, or sent malformed data. If the
        connection begins with the HTTP/2 preface, returns what was read of it.
        """
        # Accepted when the server began to stop: the client has connected in order to send a request now.
        is_late = is_first and self._stopping.is_set()
        if not received and self._stopping.is_set() and not is_late:
            return None
        preface = b"" if is_first else None  # what was read while it may be the HTTP/2 preface
        parser_has_data = bool(received)
        if received:
            parser.receive_data(received)
        timeout = HEAD_TIME if is_late else self._request_timeout if received else self._keep_alive
        size = len(received)
        error: SseserveError | None = None
        with trio.move_on_after(timeout) as scope:
            while True:
                if parser_has_data:
                    try:
                        event = _next_event(parser, size, self._max_head)
                    except SseserveError as caught:
                        error = caught
                        break
                    if event is not h11.NEED_DATA:
                        return event if isinstance(event, h11.Request) else None
                has_begun = parser_has_data or bool(preface)
                with self._idle.add(scope, transport, has_begun=has_begun or is_late):
                    data = await transport.receive_some(READ)
                if not has_begun and not self._stopping.is_set():
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
                size += len(data)
        if scope.cancelled_caught and parser_has_data and not self._stopping.is_set():
            reason = f"the request's head did not arrive within request_timeout = {self._request_timeout:g} s"
            error = RequestTimeout(reason, limit="request_timeout")
        if error is not None:
            await self._refuse(transport, error)
        return None

    async def _refuse(self, transport: Transport, error: SseserveError) -> None:
        """Respond to what cannot be parsed, and close."""
        request = Request.create("", "")
        response = self._dispatcher.finish(request, error_response(error, request))
        await self._send(transport, response.encode(close=True, date=self._date()))
        await transport.aclose_lingering(LINGER)

    async def _serve_request(
        self, transport: Transport, parser: h11.Connection, request: Request, match: Match | None
    ) -> bool:
        """Respond to a request. Returns whether the connection can serve another one."""
        turn = Turn()
        try:
            if match is not None and match.route.may_wait and "wait" in request.query:
                response = await self._respond_unless_disconnected(transport, parser, request, match, turn)
            else:
                takes_lines = match is not None and match.route.takes_lines(request)
                between_lines = self._ndjson_timeout if takes_lines else None
                deadline = BodyDeadline(self._request_timeout, between_lines=between_lines)
                body = _read_body(transport, parser, deadline)
                try:
                    request = msgspec.structs.replace(request, body=body)
                    response = await self._dispatcher.respond_in_turn(request, match, turn)
                finally:
                    await body.aclose()
            close = self._stopping.is_set() or not _is_kept_alive(parser, request)
            has_arrived = _has_arrived(parser)
            if not close and not has_arrived:
                # The rest of a wrong body is not worth reading, and one that waits for a 100 never comes.
                close = (
                    response.status in _BODY_ERRORS
                    or parser.their_state is h11.ERROR
                    or parser.they_are_waiting_for_100_continue
                )
            data = response.encode(head_only=request.method == "HEAD", close=close, date=self._date())
            del response  # its body is in the data
            await self._send(transport, data)
        finally:
            turn.end()
        if close or not (has_arrived or await _drop_body(transport, parser)):
            await transport.aclose_lingering(LINGER)
            return False
        return True

    async def _respond_unless_disconnected(
        self, transport: Transport, parser: h11.Connection, request: Request, match: Match, turn: Turn
    ) -> Response:
        """Wait for a response that may come much later, unless the client leaves.

        Raises:
            ClientDisconnected: it has left.
        """
        response: Response | None = None
        async with trio.open_nursery() as nursery:

            async def wait_disconnected() -> None:
                nonlocal response
                try:
                    await _wait_disconnected(transport, parser)
                except h11.RemoteProtocolError as error:
                    refusal = error_response(_error_of(error), request)
                    response = self._dispatcher.finish(request, refusal)
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_disconnected)
            response = await self._dispatcher.respond_in_turn(request, match, turn)
            nursery.cancel_scope.cancel()
        if response is None:
            raise ClientDisconnected
        return response

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


_ERRORS: dict[int, type[SseserveError]] = {
    error.status: error for error in (BadRequest, HeadTooLarge, UnsupportedCoding)
}


def _error_of(error: h11.RemoteProtocolError) -> SseserveError:
    """Return the error to respond with to what h11 cannot parse.

    It does not repeat that, as h11 does: it may be a token, and errors are logged.
    """
    kind = _ERRORS.get(error.error_status_hint, BadRequest)
    if kind is HeadTooLarge:
        return kind("the request's head is larger than max_head allows", limit="max_head")
    message = _REPEATED.split(str(error), maxsplit=1)[0]
    return kind(message)


def _next_event(parser: h11.Connection, size: int, max_head: int) -> object:
    """Return what comes next, most often the head of a request; ``size`` bytes have been read for it.

    Raises:
        SseserveError: it is malformed or too large, or of another version of HTTP.
    """
    try:
        event = parser.next_event()
    except h11.RemoteProtocolError as error:
        raise _error_of(error) from None
    if isinstance(event, h11.Request):
        if size > max_head:
            # h11 limits what is incomplete; one read may have brought the whole head.
            check_head(max_head, event.target, event.headers)
        if event.http_version not in (b"1.0", b"1.1"):
            raise BadRequest("only HTTP/1.0, HTTP/1.1 and HTTP/2 are supported")
    return event


def _is_kept_alive(parser: h11.Connection, request: Request) -> bool:
    """Whether the connection stays open after the response.

    The client decides that (RFC 9112, section 9.3). Where it has sent two lengths of the body, a proxy may
    have taken the other one, and what follows may be part of the body (section 6.1).
    """
    if parser.their_http_version == b"1.0":
        return False
    if "transfer-encoding" in request.headers and "content-length" in request.headers:
        return False
    if (connection := request.headers.get("connection")) is None:
        return True
    return "close" not in [token.strip() for token in connection.lower().split(",")]


def _has_arrived(parser: h11.Connection) -> bool:
    """Drop what has arrived of a body that nobody reads any more; returns whether that was all of it."""
    try:
        _drop_received_body(parser)
    except h11.RemoteProtocolError:
        return False
    return parser.their_state not in (h11.SEND_BODY, h11.ERROR)


def _drop_received_body(parser: h11.Connection) -> int:
    """Drop what has arrived of a body; returns how many bytes that was."""
    dropped = 0
    while parser.their_state is h11.SEND_BODY and (event := parser.next_event()) is not h11.NEED_DATA:
        dropped += len(event.data) if isinstance(event, h11.Data) else 0
    return dropped


async def _drop_body(transport: Transport, parser: h11.Connection) -> bool:
    """Drop the rest of a body, if it is not too long; returns whether that was all of it."""
    dropped = 0
    with trio.move_on_after(LINGER):
        try:
            while parser.their_state is h11.SEND_BODY and dropped <= MAX_DROPPED:
                if not (data := await transport.receive_some(READ)):
                    return False
                parser.receive_data(bytes(data))
                dropped += _drop_received_body(parser)
        except h11.RemoteProtocolError:
            return False
    return parser.their_state not in (h11.SEND_BODY, h11.ERROR)


async def _read_body(
    transport: Transport, parser: h11.Connection, deadline: BodyDeadline
) -> AsyncGenerator[bytes]:
    """Read a request's body as it arrives; see ``Request.body`` for what it raises."""
    if parser.they_are_waiting_for_100_continue:
        try:
            with trio.fail_at(deadline.next(trio.current_time())):
                await transport.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        except DISCONNECTED:
            raise ClientDisconnected from None
        parser.send(h11.InformationalResponse(status_code=100, headers=[]))
    chunks = 0
    while True:
        try:
            event = parser.next_event()
        except h11.RemoteProtocolError as error:
            raise _error_of(error) from None
        if isinstance(event, h11.Data):
            deadline.note(event.data)
            yield bytes(event.data)
            chunks += 1
            if chunks % 64 == 0:
                await trio.lowlevel.checkpoint()  # one read may hold many chunks of one byte
        elif event is h11.NEED_DATA:
            data = await _receive(transport, deadline.next(trio.current_time()))
            deadline.count(len(data))
            parser.receive_data(data)
        else:
            return


async def _receive(transport: Transport, deadline: float) -> bytes:
    try:
        with trio.fail_at(deadline):
            data = await transport.receive_some(READ)
    except trio.TooSlowError:
        raise BadRequest("the body did not arrive in time", limit="request_timeout") from None
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise ClientDisconnected from None
    if not data:
        raise ClientDisconnected
    return bytes(data)


async def _wait_disconnected(transport: Transport, parser: h11.Connection) -> None:
    """Wait until the client closes its side. A body is dropped, and what follows it is kept for later.

    Raises:
        h11.RemoteProtocolError: the body is malformed.
    """
    following = b""
    try:
        while True:
            while parser.their_state is h11.SEND_BODY and parser.next_event() is not h11.NEED_DATA:
                await trio.lowlevel.checkpoint()
            if len(following) >= READ:
                await trio.sleep_forever()  # it has sent more requests, so it is still there
            data = await transport.receive_some(READ)
            if not data and (following or parser.trailing_data[0]):
                await trio.sleep_forever()  # it has closed its side, and waits for its responses
            if not data:
                return
            if parser.their_state is h11.SEND_BODY:
                parser.receive_data(bytes(data))
            else:
                following += data
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
    finally:
        transport.push_back(following)
