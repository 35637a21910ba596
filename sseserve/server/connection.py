"""Owns one connection, and serves every HTTP/1.1 request of it, one after another.

A handler returns a response; a stream or a WebSocket takes the transport over and ends the connection. A
connection that begins with the HTTP/2 preface (RFC 9113, section 3.4) is handed over as a whole.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

import h11
import msgspec
import trio

from ..errors import (
    BadRequest,
    PayloadTooLarge,
    RequestTimeout,
    SseserveError,
)
from ..http.limits import BodyDeadline
from ..http.messages import (
    ClientDisconnected,
    ReceivedBody,
    Request,
    Response,
    error_response,
    http_date,
)
from ..http.proxies import TrustedProxies
from ..http.routing import Kind, Match
from ..live.tls import TlsTransport
from ..live.transport import DISCONNECTED, LINGER, Transport
from ..logs import Line, LogContext, begin_context
from ..web.dispatch import Dispatcher
from ..web.turns import Turn
from .drain import HEAD_TIME, IdleConnections
from .h1_fast import read_request
from .h1_requests import (
    READ,
    drop_arrived,
    drop_body,
    error_of,
    is_kept_alive,
    next_event,
    read_body,
    receive_body,
    wait_disconnected,
)
from .proxy_protocol import read_proxy_header
from .streams import EventStreams
from .tls import Certificates, accept_tls
from .websockets import WebSockets

__all__ = ["ConnectionServer"]

log = logging.getLogger(__name__)

WRITE = 64 * 1024  # bytes of a response that may take the send timeout
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# They may precede a request (RFC 9112, section 2.2).
_EMPTY_LINES = re.compile(rb"(?:\r?\n)*")

# Statuses after which the rest of a body is not worth reading.
_BODY_ERRORS = frozenset({BadRequest.status, PayloadTooLarge.status})

_Takeover = Coroutine[Any, Any, None]  # what serves a connection from here on


class ConnectionServer:
    """Serves connections.

    Args:
        dispatcher: serves the requests that are not streams.
        streams, websockets: take a connection over.
        serve_http2: serves a connection that speaks HTTP/2.
        idle: knows the connections without a request.
        proxies: say whose requests they forward.
        certificates: with which each connection begins; None: without TLS.
        flush: delivers what a publish request has deferred until its response is written.
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
        certificates: Certificates | None,
        flush: Callable[[], None],
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
        self._certificates = certificates
        self._flush = flush
        self._stopping = stopping
        self._max_head = max_head
        self._keep_alive = keep_alive
        self._request_timeout = request_timeout
        self._ndjson_timeout = ndjson_timeout
        self._send_timeout = send_timeout
        self._clock = clock

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve a connection to its end. Whatever goes wrong with it stays with it."""
        transport = stream if isinstance(stream, Transport) else Transport(stream)
        del stream
        context = begin_context()
        try:
            if not await self._read_proxy_header(transport):
                return
            if self._certificates is not None:
                if (secured := await self._accept_tls(transport, self._certificates)) is None:
                    return
                transport = secured
                if secured.alpn == "h2":
                    await self._serve_http2(transport)
                    return
                del secured
            if (serving := await self._serve_requests(transport, context)) is not None:
                await serving
        except (*DISCONNECTED, ClientDisconnected):
            pass
        except Exception:
            # The boundary of a connection: the others are not affected.
            log.exception(Line("connection failed"))
        finally:
            if not transport.close_socket():
                await trio.aclose_forcefully(transport)

    async def _read_proxy_header(self, transport: Transport) -> bool:
        """Read the header with which a trusted proxy begins; returns whether the connection may go on."""
        if not self._proxies.begins_with_header(transport.peer):
            return True
        is_late = self._stopping.is_set()
        timeout = HEAD_TIME if is_late else self._request_timeout
        return await read_proxy_header(transport, self._idle, timeout=timeout, is_late=is_late)

    async def _accept_tls(self, transport: Transport, certificates: Certificates) -> TlsTransport | None:
        """Return what replaces the transport; None: the connection is to be closed."""
        is_late = self._stopping.is_set()
        timeout = HEAD_TIME if is_late else self._request_timeout
        try:
            return await accept_tls(transport, certificates, self._idle, timeout=timeout, is_late=is_late)
        except BadRequest as error:
            await self._refuse(transport, error)
            return None

    async def _serve_requests(self, transport: Transport, context: LogContext) -> _Takeover | None:
        """Serve requests to the end of the connection, or to one that takes it over."""
        peer, is_first = transport.peer, True
        # Accepted when the server began to stop: the client has connected in order to send a request now.
        is_late = self._stopping.is_set()
        received = transport.try_receive(READ)
        while True:
            if received is None:
                received = await self._wait_for_request(transport, is_late=is_late)
            if not received:
                return None
            parser: h11.Connection | None = None
            if (arrived := read_request(received, peer, self._max_head)) is not None:
                request, received = arrived
            elif begin := _EMPTY_LINES.match(received).end():  # type: ignore[union-attr]  # it always does
                received = received[begin:] or None
                if received is None and self._stopping.is_set():
                    return None
                continue
            else:
                parser = h11.Connection(h11.SERVER, max_incomplete_event_size=self._max_head)
                head = await self._read_head(transport, parser, received, is_first=is_first, is_late=is_late)
                if head is None:
                    return None
                if isinstance(head, bytes):
                    transport.push_back(head)
                    return self._serve_http2(transport)
                request = _request_of(head, peer)
                received = b""
            request = self._proxies.resolve(request)
            context.subject, context.user, context.began = request, None, time.perf_counter()
            match = self._dispatcher.match(request)
            if (serve := self._takes_over(request, match)) is not None and match is not None:
                transport.push_back(received if parser is None else bytes(parser.trailing_data[0]))
                context.subject = request.ids
                return serve(transport, request, match, self._date())
            if not await self._serve_request(transport, parser, request, match, following=received):
                return None
            if parser is not None:
                received = bytes(parser.trailing_data[0])
            if received:
                await trio.lowlevel.checkpoint()  # one read may hold many pipelined requests
            elif self._stopping.is_set():
                return None
            is_first = is_late = False
            received = received or None

    async def _wait_for_request(self, transport: Transport, *, is_late: bool) -> bytes:
        """Wait for what a request begins with; empty: the client left, or has been idle for too long."""
        if transport.immediate and not is_late:
            self._idle.begin(transport)
            try:
                return await transport.receive_later(READ)
            finally:
                self._idle.end(transport)
        with trio.move_on_after(HEAD_TIME if is_late else self._keep_alive) as scope:
            with self._idle.add(scope, transport, has_begun=is_late):
                return bytes(await transport.receive_some(READ))
        return b""

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
        self,
        transport: Transport,
        parser: h11.Connection,
        received: bytes,
        *,
        is_first: bool,
        is_late: bool,
    ) -> h11.Request | bytes | None:
        """Read a request's head, which begins with what was received.

        Returns None if there is none: the client left, was too slow, or sent malformed data. If the
        connection begins with the HTTP/2 preface, returns what was read of it.
        """
        preface = b"" if is_first else None  # what was read while it may be the HTTP/2 preface
        data, size = received, 0
        timeout = HEAD_TIME if is_late or self._stopping.is_set() else self._request_timeout
        error: SseserveError | None = None
        with trio.move_on_after(timeout) as scope:
            while True:
                if preface is not None:
                    preface += data
                    if preface.startswith(PREFACE):
                        return preface
                    data = preface
                if preface is None or not PREFACE.startswith(preface):
                    preface = None
                    parser.receive_data(bytes(data))
                    size += len(data)
                    try:
                        event = next_event(parser, size, self._max_head)
                    except SseserveError as caught:
                        error = caught
                        break
                    if event is not h11.NEED_DATA:
                        return event if isinstance(event, h11.Request) else None
                with self._idle.add(scope, transport, has_begun=True):
                    data = bytes(await transport.receive_some(READ))
                if not data:
                    return None
        if scope.cancelled_caught and preface is None and not self._stopping.is_set():
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
        self,
        transport: Transport,
        parser: h11.Connection | None,
        request: Request,
        match: Match | None,
        *,
        following: bytes,
    ) -> bool:
        """Respond to a request. Returns whether the connection can serve another one.

        ``parser`` reads its body; None: that has arrived, and ``following`` behind it.
        """
        turn = Turn()
        try:
            if match is not None and match.route.may_wait and "wait" in request.query:
                response = await self._respond_unless_disconnected(
                    transport, parser, request, match, turn, has_followers=bool(following)
                )
            else:
                response = await self._respond(transport, parser, request, match, turn)
            close = self._stopping.is_set() or not (parser is None or is_kept_alive(parser, request))
            has_arrived = parser is None or drop_arrived(parser)
            if parser is not None and not close and not has_arrived:
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
            self._flush()
        if close or not (parser is None or has_arrived or await drop_body(transport, parser)):
            await transport.aclose_lingering(LINGER)
            return False
        return True

    async def _respond(
        self,
        transport: Transport,
        parser: h11.Connection | None,
        request: Request,
        match: Match | None,
        turn: Turn,
    ) -> Response:
        """Respond to a request, whose body is read as far as that needs it."""
        received, is_complete = (b"", True) if parser is None else receive_body(parser, request)
        if parser is None or is_complete:
            if parser is not None:
                request = msgspec.structs.replace(request, body=ReceivedBody(received))
            if request.method != "GET":  # no other response is large
                return await self._dispatcher.respond(request, match)
            return await self._dispatcher.respond_in_turn(request, match, turn)
        takes_lines = match is not None and match.route.takes_lines(request)
        between_lines = self._ndjson_timeout if takes_lines else None
        deadline = BodyDeadline(self._request_timeout, between_lines=between_lines)
        async with aclosing(read_body(transport, parser, deadline, received)) as body:
            request = msgspec.structs.replace(request, body=body)
            return await self._dispatcher.respond_in_turn(request, match, turn)

    async def _respond_unless_disconnected(
        self,
        transport: Transport,
        parser: h11.Connection | None,
        request: Request,
        match: Match,
        turn: Turn,
        *,
        has_followers: bool,
    ) -> Response:
        """Wait for a response that may come much later, unless the client leaves.

        Raises:
            ClientDisconnected: it has left.
        """
        response: Response | None = None
        async with trio.open_nursery() as nursery:

            async def end_when_disconnected() -> None:
                nonlocal response
                try:
                    await wait_disconnected(transport, parser, has_followers=has_followers)
                except h11.RemoteProtocolError as error:
                    refusal = error_response(error_of(error), request)
                    response = self._dispatcher.finish(request, refusal)
                nursery.cancel_scope.cancel()

            nursery.start_soon(end_when_disconnected)
            response = await self._dispatcher.respond_in_turn(request, match, turn)
            nursery.cancel_scope.cancel()
        if response is None:
            raise ClientDisconnected
        return response

    def _date(self) -> str:
        return http_date(int(self._clock()))

    async def _send(self, transport: Transport, data: bytes) -> None:
        sent = len(data) <= WRITE and transport.try_send(data)
        self._flush()
        if sent:
            if not transport.pending:
                return
            data = b""  # the tail is sent first
        for at in range(0, len(data) or 1, WRITE):
            with trio.fail_after(self._send_timeout):
                await transport.send_all(data[at : at + WRITE])


def _request_of(head: h11.Request, peer: str) -> Request:
    return Request.create(
        head.method.decode("ascii"),
        head.target.decode("ascii"),
        head.headers,
        http_version=head.http_version.decode("ascii"),
        peer=peer,
    )
