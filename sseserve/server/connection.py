"""Owns one connection: its first request decides who serves it.

A stream, a WebSocket or a publish is served right here on the transport. Anything else goes to Hypercorn,
with the bytes already read pushed back; from then on Hypercorn owns the connection. Publishes may follow
each other; the first request that is none goes to Hypercorn in the same way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import h11
import trio

from ..context import Context
from ..errors import BadRequest, SseserveError
from ..http.admission import authorize
from ..http.messages import Answer, Request, cors, error_answer, log_answer
from ..http.publishing import NDJSON
from ..http.routes import Kind, Match, match
from ..live.transport import Transport
from .hypercorn import serve_web
from .streams import serve_stream
from .websockets import serve_socket

__all__ = ["serve_connection"]

log = logging.getLogger(__name__)

MAX_HEAD = 32 * 1024
READ = 64 * 1024
LINGER = 1.0
GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class _Head:
    """A request whose head has been read: ``raw`` is every byte of it, and of what came along."""

    __slots__ = ("connection", "match", "raw", "request")

    def __init__(self, raw: bytes, connection: h11.Connection, event: h11.Request) -> None:
        self.raw = raw
        self.connection = connection
        path, _, query_string = event.target.decode("ascii").partition("?")
        method = event.method.decode("ascii")
        self.request = Request.make(method, path, query_string, event.headers)
        self.match = match(method, path)


async def serve_connection(context: Context, stream: trio.abc.Stream) -> None:
    """Serve a connection to its end. Whatever goes wrong with it stays with it."""
    transport = Transport(stream)
    request_id = ""
    try:
        rest = b""
        while True:
            head = await _read_head(context, transport, rest)
            if head is None:
                return
            request_id = head.request.id
            if head.match is None or head.match.route.kind is not Kind.PUBLISH:
                break
            done = await _publish(context, transport, head, head.match)
            if done is None:
                return
            rest = done
            if rest:
                await trio.lowlevel.checkpoint()  # pipelined requests are many to a read
        serving = _serve(context, transport, head)
        # What stays for hours is only what the watcher needs.
        del head, rest
        await serving
    except GONE:
        pass  # the peer has left in the middle of something
    except Exception:
        # The boundary of a connection: nobody else notices.
        log.exception("connection failed%s", request_id and f" in request {request_id}")
    finally:
        await trio.aclose_forcefully(transport)


def _serve(context: Context, transport: Transport, head: _Head) -> Coroutine[Any, Any, None]:
    """Choose who serves a request that is no publish, and what follows on its connection."""
    found = head.match
    if found is not None and found.route.kind is Kind.STREAM:
        return serve_stream(context, transport, head.request, found)
    if found is not None and found.route.kind is Kind.SOCKET and _is_upgrade(head.request):
        transport.push_back(bytes(head.connection.trailing_data[0]))
        return serve_socket(context, transport, head.request, found)
    transport.push_back(head.raw)
    return serve_web(context, transport)


async def _read_head(context: Context, transport: Transport, raw: bytes) -> _Head | None:
    """Read a request's head. None if there is none: the peer left, was too slow, or talked rubbish."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    settings = context.settings
    if raw:
        connection.receive_data(raw)
    elif context.stopping.is_set():
        return None
    with trio.move_on_after(settings.request_timeout if raw else settings.keep_alive) as scope:
        while True:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError as error:
                await _refuse(context, transport, error)
                return None
            if isinstance(event, h11.Request):
                return _Head(raw, connection, event)
            if event is not h11.NEED_DATA:
                return None
            if raw:
                data = await transport.receive_some(READ)
            else:
                with context.idling(scope):
                    data = await transport.receive_some(READ)
                scope.deadline = trio.current_time() + settings.request_timeout
            if not data:
                return None
            raw += data
            connection.receive_data(bytes(data))
    return None


async def _refuse(context: Context, transport: Transport, error: h11.RemoteProtocolError) -> None:
    """Answer what cannot be read."""
    request = Request.make("", "", "", ())
    await _answer(context, transport, request, error_answer(BadRequest(str(error)), request), close=True)
    await transport.aclose_lingering(LINGER)


def _is_upgrade(request: Request) -> bool:
    """Whether it asks for a WebSocket (RFC 6455, section 4.2.1); else the web app says what is missing."""
    return request.headers.get("upgrade", "").lower() == "websocket"


async def _answer(
    context: Context, transport: Transport, request: Request, answer: Answer, *, close: bool
) -> None:
    log_answer(request, answer.status)
    data = answer.encode(request=request, more=cors(context.settings.cors_origins, request), close=close)
    if not transport.try_send(data) or transport.pending:
        sent = transport.pending
        with trio.fail_after(context.settings.send_timeout):
            await transport.send_all(b"" if sent else data)


async def _publish(context: Context, transport: Transport, head: _Head, found: Match) -> bytes | None:
    """Serve a publish. Returns the bytes behind it, None if the connection is at its end."""
    request, connection = head.request, head.connection
    # The lines of a batch come when there is something to say.
    timeout = math.inf if request.media_type in NDJSON else context.settings.request_timeout
    body = _body(transport, connection, timeout)
    try:
        await authorize(context, request, found)
        answer = await context.publishing.handle(found, request, body)
    except SseserveError as error:
        answer = error_answer(error, request)
    except trio.TooSlowError:
        answer = error_answer(BadRequest("the body did not come in time"), request)
    except h11.RemoteProtocolError as error:
        answer = error_answer(BadRequest(str(error)), request)
    except GONE:
        raise
    except Exception as error:  # noqa: BLE001 - the boundary of a request: logged there, with its id
        answer = error_answer(error, request)
    finally:
        await body.aclose()
    complete = connection.their_state is h11.DONE
    close = not complete or context.stopping.is_set() or not _keep_alive(request, head)
    await _answer(context, transport, request, answer, close=close)
    if close:
        await transport.aclose_lingering(LINGER)
        return None
    return bytes(connection.trailing_data[0])


def _keep_alive(request: Request, head: _Head) -> bool:
    """RFC 9112, section 9.3."""
    tokens = request.headers.get("connection", "").lower()
    http_1_0 = head.connection.their_http_version == b"1.0"
    return "close" not in tokens and not http_1_0


async def _body(transport: Transport, connection: h11.Connection, timeout: float) -> AsyncGenerator[bytes]:
    """Read the request's body as it comes.

    Raises:
        trio.TooSlowError: nothing came for too long.
        trio.BrokenResourceError: the peer left in the middle.
    """
    if connection.they_are_waiting_for_100_continue:
        with trio.fail_after(timeout):
            await transport.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
    pieces = 0
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Data):
            yield bytes(event.data)
            pieces += 1
            if pieces % 64 == 0:
                await trio.lowlevel.checkpoint()  # chunks of one byte are many to a read
        elif isinstance(event, h11.EndOfMessage):
            return
        elif event is h11.NEED_DATA:
            with trio.fail_after(timeout):
                data = await transport.receive_some(READ)
            if not data:
                raise trio.BrokenResourceError("the peer left in the middle of a body")
            connection.receive_data(bytes(data))
        else:
            raise trio.BrokenResourceError("the peer left in the middle of a body")
