"""WebSocket over a transport: trio-websocket does the handshake and reads, the broker writes.

Our frames do not pass through trio-websocket: a server's frames are not masked (RFC 6455, section 5.1),
so one encoded frame serves every client. Neither does the client's handshake: it is validated here, and
trio-websocket gets one that holds nothing but the key, as it raises many kinds of error for other bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio
from trio_websocket import ConnectionClosed, wrap_server_stream

from ..dialects import Encoding
from ..errors import SseserveError
from ..http.admission import Admission, WatchRequest, validate_handshake
from ..http.messages import Request, Response, error_response, log_response
from ..http.routing import Match
from ..live.broker import Broker
from ..live.resume import join
from ..live.subscriber import PushSubscriber
from ..live.transport import DISCONNECTED, LINGER, Transport
from ..progress.tracker import Tracker

__all__ = ["WebSockets"]

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: -\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n\r\n"
)
_CLOSE_FRAME = b"\x88"  # how an unmasked one begins
MAX_MESSAGE = 4096  # bytes; watchers have nothing to send


class WebSockets:
    """Serves WebSockets.

    Args:
        tracker: has the logs.
        broker: delivers the events.
        admission: decides who may watch.
        finish: adds the headers that every response has, and logs it.
        handshake_timeout: how long the handshake may take, in seconds.
        send_timeout: how long one write may take, in seconds.
    """

    def __init__(
        self,
        tracker: Tracker,
        broker: Broker,
        admission: Admission,
        *,
        finish: Callable[[Request, Response], Response],
        handshake_timeout: float,
        send_timeout: float,
    ) -> None:
        self._tracker = tracker
        self._broker = broker
        self._admission = admission
        self._finish = finish
        self._handshake_timeout = handshake_timeout
        self._send_timeout = send_timeout

    async def serve(self, transport: Transport, request: Request, match: Match, date: str) -> None:
        """Serve to the end of the session or of the client, and close the transport.

        The request's head has been read from the transport. ``date`` is the value of the ``Date`` header.
        """
        checked = await self._check(request, match)
        if isinstance(checked, Response):
            response = self._finish(request, checked)
            with trio.move_on_after(self._send_timeout):
                await transport.send_all(response.encode(close=True, date=date))
            await transport.aclose_lingering(LINGER)
            return
        log_response(request, 101)
        transport.push_back(HANDSHAKE % request.headers["sec-websocket-key"].encode())
        watch = checked
        extra_headers = [(name.lower().encode(), value.encode()) for name, value in request.id_headers]
        # What stays for hours is only what the WebSocket needs.
        del request, match, date, checked
        async with trio.open_nursery() as nursery:
            subscriber = PushSubscriber(self._broker, Encoding(watch.dialect, "ws"), transport, nursery)
            try:
                with trio.fail_after(self._handshake_timeout):
                    stream = _LibraryStream(transport, subscriber)
                    handshake = await wrap_server_stream(
                        nursery, stream, message_queue_size=1, max_message_size=MAX_MESSAGE
                    )
                    socket = await handshake.accept(extra_headers=extra_headers)
                del handshake, stream, extra_headers
                await join(
                    self._tracker.engine,
                    self._broker,
                    subscriber,
                    watch.session_ids[0],
                    watch.cursor,
                    replay=watch.replay,
                )
                while True:
                    await socket.get_message()
            except (ConnectionClosed, *DISCONNECTED):
                subscriber.broken = True
            finally:
                subscriber.abort()
                nursery.cancel_scope.cancel()
        if not subscriber.broken:
            # Closing our side before the client's close frame would look like a lost connection to it.
            with trio.move_on_after(LINGER), suppress(*DISCONNECTED):
                while (data := await transport.receive_some(4096)) and not _ends_with_close(data):
                    pass

    async def _check(self, request: Request, match: Match) -> WatchRequest | Response:
        """Return what is to be watched, or the response if it cannot be.

        A client that has seen everything gets a WebSocket that closes at once: it has no 204.
        """
        try:
            watch = await self._admission.check_watch_request(request, match)
        except SseserveError as error:
            return error_response(error, request)
        return validate_handshake(request) or watch


class _LibraryStream(trio.abc.Stream):
    """The transport as trio-websocket has it, for its handshake, pongs and close frames.

    After a close frame nothing may be sent (RFC 6455, section 5.5.1), so one that trio-websocket sends ends
    what the broker sends.
    """

    __slots__ = ("_subscriber", "_transport")

    def __init__(self, transport: Transport, subscriber: PushSubscriber) -> None:
        self._transport = transport
        self._subscriber = subscriber

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if data[:1] == _CLOSE_FRAME:
            self._subscriber.stop()
        await self._transport.send_all(data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._transport.receive_some(max_bytes)

    async def wait_send_all_might_not_block(self) -> None:
        await self._transport.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._transport.aclose()


def _ends_with_close(data: bytes | bytearray) -> bool:
    """Whether a masked close frame (RFC 6455, section 5.5.1) is at the end; it is a client's last."""
    sizes = range(min(126, len(data) - 5))
    return any(data[-6 - size :][:2] == bytes((0x88, 0x80 | size)) for size in sizes)
