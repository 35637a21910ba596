"""Watch over WebSocket (RFC 6455)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast
from urllib.parse import quote, urlsplit

import h11
import httpx
import msgspec
import trio
import trio_websocket
import wsproto.utilities

from .connection import Connection, ConnectOptions, Position
from .errors import (
    ConnectionLost,
    InvalidResponse,
    describe_cause,
    error_from_response,
    unwrap_exception_group,
)
from .messages import ReceivedMessage

__all__ = ["open_websocket_connection"]

# Close codes (RFC 6455, section 7.4.1)
_NORMAL_CLOSURE = 1000
_ABNORMAL_CLOSURE = 1006

_MAX_MESSAGE_SIZE = 64 * 2**20  # bytes
_CLOSE_TIMEOUT = 0.2  # seconds for the closing handshake


@asynccontextmanager
async def open_websocket_connection(
    url: str, position: Position, options: ConnectOptions
) -> AsyncGenerator[Connection]:
    """Connect to a session's WebSocket; see ``connection.OpenConnection``."""
    target = urlsplit(f"{url}/status/ws")
    query = f"?last_event_id={quote(position.cursor, safe='')}" if position.cursor else ""
    headers = httpx.Headers(dict(options.headers))
    if options.bearer is not None:
        headers["Authorization"] = await options.bearer.field()
    with _translate_handshake_errors():
        tcp_stream = await _connect(target.scheme, target.hostname or "", target.port, options)
        stream = _MonitoredStream(tcp_stream, options.idle_timeout)
        try:
            async with trio.open_nursery() as nursery:
                host = target.netloc.rpartition("@")[2]
                websocket = await _handshake(nursery, stream, host, target.path + query, headers, options)
                yield _WebSocketConnection(websocket, stream, position)
                with trio.move_on_after(_CLOSE_TIMEOUT):
                    await websocket.aclose()
                nursery.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(stream)


async def _connect(scheme: str, host: str, port: int | None, options: ConnectOptions) -> trio.abc.Stream:
    try:
        with trio.fail_after(options.connect_timeout):
            if scheme != "https":
                return await trio.open_tcp_stream(host, port or 80)
            stream = await trio.open_ssl_over_tcp_stream(
                host, port or 443, https_compatible=True, ssl_context=options.authorities
            )
            try:
                await stream.do_handshake()
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
            return stream
    except trio.TooSlowError:
        raise ConnectionLost("the connection timed out") from None
    except (OSError, trio.BrokenResourceError) as error:
        raise ConnectionLost(describe_cause(error)) from error


async def _handshake(
    nursery: trio.Nursery,
    stream: _MonitoredStream,
    host: str,
    resource: str,
    headers: httpx.Headers,
    options: ConnectOptions,
) -> trio_websocket.WebSocketConnection:
    try:
        with trio.fail_after(options.connect_timeout):
            websocket = await trio_websocket.wrap_client_stream(
                nursery,
                # The annotation names two classes, but any stream works.
                cast("trio.SocketStream", stream),
                host,
                resource,
                extra_headers=[(name.encode(), value.encode()) for name, value in headers.multi_items()],
                max_message_size=_MAX_MESSAGE_SIZE,
            )
    except trio.TooSlowError:
        raise ConnectionLost("the WebSocket handshake timed out") from None
    stream.handshake_completed = True
    return websocket


@contextmanager
def _translate_handshake_errors() -> Iterator[None]:
    """Raise the errors of a failed handshake as ``ClientError``."""
    try:
        with unwrap_exception_group():
            yield
    except trio_websocket.ConnectionRejected as error:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in error.headers}
        raise error_from_response(error.status_code, headers, bytes(error.body or b"")) from error
    except (h11.ProtocolError, wsproto.utilities.ProtocolError) as error:
        # trio-websocket reacts to malformed data by sending an error response, which h11 refuses to a client.
        raise ConnectionLost(f"the server does not speak WebSocket: {describe_cause(error)}") from error


class _MonitoredStream(trio.abc.Stream):
    """Raises where trio-websocket would wait for ever.

    During the handshake trio-websocket ignores the end of the stream, so it is raised as an error. After
    the handshake it handles the end, but does not detect a peer that sends nothing for ``idle_timeout``
    seconds.
    """

    def __init__(self, stream: trio.abc.Stream, idle_timeout: float) -> None:
        self._stream = stream
        self._idle_timeout = idle_timeout
        self.handshake_completed = False
        self.timed_out = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            with trio.fail_after(self._idle_timeout):
                data = await self._stream.receive_some(max_bytes)
        except trio.TooSlowError:
            self.timed_out = True
            raise trio.BrokenResourceError("idle timeout") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            if self.handshake_completed:
                raise
            raise ConnectionLost("the connection was lost during the handshake") from error
        if not data and not self.handshake_completed:
            raise ConnectionLost("the server closed the connection during the handshake")
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


class _TextMessage(msgspec.Struct):
    """A text message as the server sends it."""

    id: str | None = None
    event: str | None = None
    data: Any = None
    retry: int | None = None


_decoder = msgspec.json.Decoder(_TextMessage)


class _WebSocketConnection:
    """An open WebSocket."""

    def __init__(
        self,
        websocket: trio_websocket.WebSocketConnection,
        stream: _MonitoredStream,
        position: Position,
    ) -> None:
        self._websocket = websocket
        self._stream = stream
        self._position = position

    async def receive(self) -> list[ReceivedMessage] | None:
        try:
            payload = await self._websocket.get_message()
        except trio_websocket.ConnectionClosed as closed:
            if closed.reason is not None and closed.reason.code == _NORMAL_CLOSURE:
                return None
            raise ConnectionLost(self._describe_close(closed.reason)) from closed
        try:
            message = _decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise InvalidResponse(f"the server sent an invalid message: {error}") from error
        if message.retry is not None:
            self._position.retry = message.retry
        if message.id is not None:
            self._position.cursor = message.id
        if message.event is None and message.data is None:
            return []
        return [ReceivedMessage(self._position.cursor or None, message.event or "message", message.data)]

    def _describe_close(self, reason: trio_websocket.CloseReason | None) -> str:
        if self._stream.timed_out:
            return "timed out waiting for data from the server"
        if reason is None or reason.code == _ABNORMAL_CLOSURE:
            return "the connection was lost"
        return f"the server closed the connection: {reason.code} {reason.reason or reason.name}"
