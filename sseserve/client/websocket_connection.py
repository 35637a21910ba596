"""Watching over WebSocket."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast
from urllib.parse import quote, urlsplit

import h11
import msgspec
import trio
import trio_websocket
import wsproto.utilities

from .connection import Connection, Place, Terms
from .errors import (
    ConnectionLost,
    InvalidResponse,
    describe_cause,
    error_from_response,
    unwrap_exception_group,
)
from .messages import ReceivedMessage

__all__ = ["open_socket"]

_NORMAL = 1000
_MAX_MESSAGE = 64 * 2**20
_GOODBYE = 0.2  # how long our close frame may take to leave and be answered


@asynccontextmanager
async def open_socket(url: str, place: Place, terms: Terms) -> AsyncGenerator[Connection]:
    """Connect to a session's WebSocket; see ``connection.Open``."""
    target = urlsplit(f"{url}/status/ws")
    resource = target.path + (f"?last_event_id={quote(place.cursor, safe='')}" if place.cursor else "")
    with _rejections():
        tcp = await _dial(target.scheme, target.hostname or "", target.port, terms)
        stream = _Guard(tcp, terms.idle_timeout)
        try:
            async with trio.open_nursery() as nursery:
                host = target.netloc.rpartition("@")[2]
                socket = await _handshake(nursery, stream, host, resource, terms)
                yield _Socket(socket, stream, place)
                with trio.move_on_after(_GOODBYE):
                    await socket.aclose()
                nursery.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(stream)


async def _dial(scheme: str, host: str, port: int | None, terms: Terms) -> trio.abc.Stream:
    try:
        with trio.fail_after(terms.connect_timeout):
            if scheme != "https":
                return await trio.open_tcp_stream(host, port or 80)
            stream = await trio.open_ssl_over_tcp_stream(host, port or 443, https_compatible=True)
            await stream.do_handshake()
            return stream
    except trio.TooSlowError:
        raise ConnectionLost("the connection timed out") from None
    except (OSError, trio.BrokenResourceError) as error:
        raise ConnectionLost(describe_cause(error)) from error


async def _handshake(
    nursery: trio.Nursery, stream: _Guard, host: str, resource: str, terms: Terms
) -> trio_websocket.WebSocketConnection:
    try:
        with trio.fail_after(terms.connect_timeout):
            socket = await trio_websocket.wrap_client_stream(
                nursery,
                # The signature names two classes, the code wants any stream.
                cast("trio.SocketStream", stream),
                host,
                resource,
                extra_headers=[(name.encode(), value.encode()) for name, value in terms.headers.items()],
                max_message_size=_MAX_MESSAGE,
            )
    except trio.TooSlowError:
        raise ConnectionLost("the server did not answer the handshake") from None
    stream.greeted = True
    return socket


@contextmanager
def _rejections() -> Iterator[None]:
    """Turn a handshake that was answered with something else into our own errors."""
    try:
        with unwrap_exception_group():
            yield
    except trio_websocket.ConnectionRejected as error:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in error.headers}
        raise error_from_response(error.status_code, headers, bytes(error.body or b"")) from error
    except (h11.ProtocolError, wsproto.utilities.ProtocolError) as error:
        # trio-websocket answers an offence as a server would, which a client is not allowed to.
        raise ConnectionLost(f"the server does not speak WebSocket: {describe_cause(error)}") from error


class _Guard(trio.abc.Stream):
    """Makes the end of a stream known where trio-websocket would wait on.

    During the handshake it waits for ever when the stream ends, so an error has to end it. After that
    it ends well, but does not notice a peer that has fallen silent.
    """

    def __init__(self, stream: trio.abc.Stream, idle_timeout: float) -> None:
        self._stream = stream
        self._idle_timeout = idle_timeout
        self.greeted = False
        self.silent = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            with trio.fail_after(self._idle_timeout):
                data = await self._stream.receive_some(max_bytes)
        except trio.TooSlowError:
            self.silent = True
            raise trio.BrokenResourceError("silent for too long") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            if self.greeted:
                raise
            raise ConnectionLost("the connection was cut during the handshake") from error
        if not data and not self.greeted:
            raise ConnectionLost("the server hung up during the handshake")
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Text(msgspec.Struct):
    """A text message as the server sends it."""

    id: str | None = None
    event: str | None = None
    data: Any = None
    retry: int | None = None


_decoder = msgspec.json.Decoder(_Text)


class _Socket:
    """A WebSocket that is open."""

    def __init__(self, socket: trio_websocket.WebSocketConnection, stream: _Guard, place: Place) -> None:
        self._socket = socket
        self._stream = stream
        self._place = place

    async def receive(self) -> list[ReceivedMessage] | None:
        try:
            raw = await self._socket.get_message()
        except trio_websocket.ConnectionClosed as closed:
            if closed.reason is not None and closed.reason.code == _NORMAL:
                return None
            raise ConnectionLost(self._describe(closed.reason)) from closed
        try:
            text = _decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise InvalidResponse(f"the server sent a message that is none of ours: {error}") from error
        if text.retry is not None:
            self._place.retry = text.retry
        if text.id is not None:
            self._place.cursor = text.id
        if text.event is None and text.data is None:
            return []
        return [ReceivedMessage(self._place.cursor or None, text.event or "message", text.data)]

    def _describe(self, reason: trio_websocket.CloseReason | None) -> str:
        if self._stream.silent:
            return "timed out waiting for data from the server"
        if reason is None or reason.code == 1006:
            return "the connection was cut"
        return f"the server closed the connection: {reason.code} {reason.reason or reason.name}"
