"""What h11 has read of a request: its head, and its body as it arrives, or as it is dropped."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from typing import TypeGuard

import h11
import trio

from ..errors import (
    BadRequest,
    ExpectationFailed,
    HeadTooLarge,
    SseserveError,
    UnknownMethod,
    UnsupportedCoding,
    VersionNotSupported,
)
from ..http.limits import BodyDeadline
from ..http.messages import ClientDisconnected, Request, check_head
from ..live.transport import DISCONNECTED, LINGER, Transport

__all__ = [
    "READ",
    "drop_arrived",
    "drop_body",
    "error_of",
    "is_kept_alive",
    "next_event",
    "read_body",
    "receive_body",
    "wait_disconnected",
]

READ = 64 * 1024
MAX_METHOD = 16  # bytes; none that is known has more
MAX_DROPPED = 2**20  # bytes of a body that nobody reads, which are read to keep the connection

# Where h11's messages begin to repeat what they are about.
_REPEATED = re.compile(r""":? (bytearray\()?b['"]""")

_ERRORS: dict[int, type[SseserveError]] = {
    error.status: error for error in (BadRequest, HeadTooLarge, UnsupportedCoding)
}


def error_of(error: h11.RemoteProtocolError) -> SseserveError:
    """Return the error to respond with to what h11 cannot parse.

    It does not repeat that, as h11 does: it may be a token, and errors are logged.
    """
    kind = _ERRORS.get(error.error_status_hint, BadRequest)
    if kind is HeadTooLarge:
        return kind("the request's head is larger than max_head allows", limit="max_head")
    message = _REPEATED.split(str(error), maxsplit=1)[0]
    return kind(message)


def next_event(parser: h11.Connection, size: int, max_head: int) -> object:
    """Return what comes next, most often the head of a request; ``size`` bytes have been read for it.

    Raises:
        SseserveError: it is malformed or too large, or of another version of HTTP.
    """
    try:
        event = parser.next_event()
    except h11.RemoteProtocolError as error:
        refusal = error_of(error)
        if isinstance(refusal, HeadTooLarge):
            _check_line(bytes(parser.trailing_data[0]), max_head)
        raise refusal from None
    if isinstance(event, h11.Request):
        if size > max_head:
            # h11 limits what is incomplete; one read may have brought the whole head.
            _check_method(event.method)
            check_head(max_head, event.target, event.headers)
        # A higher minor version is served as 1.1 (RFC 9110, section 2.5).
        if not event.http_version.startswith(b"1."):
            raise VersionNotSupported("only HTTP/1.0, HTTP/1.1 and HTTP/2 are supported")
        if event.http_version != b"1.0":
            _check_fields(event)
    return event


def _check_line(head: bytes, max_head: int) -> None:
    """Check the line that a head begins with, of which more than ``max_head`` bytes have come.

    Raises:
        UnknownMethod: it has no end of the method (RFC 9112, section 3).
        TargetTooLong: it has no end of the line.
    """
    line, _, rest = head.partition(b"\r\n")
    method, _, target = line.partition(b" ")
    _check_method(method)
    if not rest:
        check_head(max_head, target, ())


def _check_method(method: bytes) -> None:
    if len(method) > MAX_METHOD:
        raise UnknownMethod("the request's method is known for nothing here")


def _check_fields(head: h11.Request) -> None:
    """Check what h11 does not.

    Raises:
        BadRequest: there is no ``Host``; of HTTP/1.1 itself h11 refuses that.
        ExpectationFailed: nobody here can do what it expects (RFC 9110, section 10.1.1).
    """
    fields = dict(head.headers)
    if b"host" not in fields:
        raise BadRequest("Missing mandatory Host: header")
    if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise ExpectationFailed("only Expect: 100-continue is supported")


def is_kept_alive(parser: h11.Connection, request: Request) -> bool:
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


def drop_arrived(parser: h11.Connection) -> bool:
    """Drop what has arrived of a body that nobody reads any more; returns whether that was all of it."""
    if parser.their_state is h11.DONE:
        return True
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


async def drop_body(transport: Transport, parser: h11.Connection) -> bool:
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


def receive_body(parser: h11.Connection, request: Request) -> tuple[bytes, bool]:
    """Return what has arrived of a body with a known length, and whether that is all of it.

    Most bodies are small and arrive with their head.
    """
    headers = request.headers
    if "content-length" not in headers or "transfer-encoding" in headers:
        return b"", False
    if parser.they_are_waiting_for_100_continue:
        return b"", False
    received, event = b"", parser.next_event()  # a body with a length cannot be malformed
    if isinstance(event, h11.Data):
        received, event = bytes(event.data), parser.next_event()
    return received, isinstance(event, h11.EndOfMessage)


async def read_body(
    transport: Transport, parser: h11.Connection, deadline: BodyDeadline, received: bytes = b""
) -> AsyncGenerator[bytes]:
    """Read a request's body as it arrives; see ``Request.body`` for what it raises.

    ``received`` is what has been read of it.
    """
    if received:
        deadline.note(received)
        yield received
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
            raise error_of(error) from None
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


def _is_reading(parser: h11.Connection | None) -> TypeGuard[h11.Connection]:
    """Whether more of a body is to come."""
    return parser is not None and parser.their_state is h11.SEND_BODY


async def wait_disconnected(
    transport: Transport, parser: h11.Connection | None, *, has_followers: bool
) -> None:
    """Wait until the client closes its side. A body is dropped, and what follows it is kept for later.

    ``parser`` reads the body; None: it has arrived. ``has_followers``: so has a part of another request.

    Raises:
        h11.RemoteProtocolError: the body is malformed.
    """
    following = b""
    try:
        while True:
            while _is_reading(parser) and parser.next_event() is not h11.NEED_DATA:
                await trio.lowlevel.checkpoint()
            has_followers = has_followers or (parser is not None and bool(parser.trailing_data[0]))
            if len(following) >= READ:
                await trio.sleep_forever()  # it has sent more requests, so it is still there
            data = await transport.receive_some(READ)
            if not data and (following or has_followers):
                await trio.sleep_forever()  # it has closed its side, and waits for its responses
            if not data:
                return
            if _is_reading(parser):
                parser.receive_data(bytes(data))
            else:
                following += data
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
    finally:
        transport.push_back(following)
