"""WebSocket over a transport: trio-websocket does the handshake and reads, the broker writes.

Our frames do not pass through trio-websocket: a server's frames are not masked (RFC 6455, section 5.1),
so one encoded frame serves every client. Neither does the client's handshake: it is validated here, and
trio-websocket gets one that holds nothing but the key, as it raises many kinds of error for other bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio
from trio_websocket import CloseReason, ConnectionClosed, wrap_server_stream

from ..dialects import Encoding
from ..errors import SseserveError
from ..http.admission import Admission, WatchRequest, validate_handshake
from ..http.messages import Request, Response, error_response, log_response
from ..http.open_streams import OpenStream
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
# A frame that breaks the protocol, or text that is not UTF-8, or a message that is too large (section 7.4.1).
OFFENCES = frozenset({1002, 1007, 1009})
_CLOSE_FRAME = b"\x88"  # how an unmasked one begins
MAX_MESSAGE = 4096  # bytes; watchers have nothing to send
MAX_REASON = 123  # bytes of a close frame's reason (RFC 6455, section 5.5)


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
        stream, watch = checked
        with stream:
            await self._serve_open(transport, request, watch, stream)

    async def _serve_open(
        self, transport: Transport, request: Request, watch: WatchRequest, open_stream: OpenStream
    ) -> None:
        handshake_bytes = HANDSHAKE % request.headers["sec-websocket-key"].encode()
        extra_headers = [(name.lower().encode(), value.encode()) for name, value in request.id_headers]
        # What stays for hours is only what the WebSocket needs.
        del request
        has_failed = False
        async with trio.open_nursery() as nursery:
            subscriber = PushSubscriber(self._broker, Encoding(watch.dialect, "ws"), transport, nursery)
            stream = _LibraryStream(transport, subscriber, handshake_bytes)
            try:
                with trio.fail_after(self._handshake_timeout):
                    handshake = await wrap_server_stream(
                        nursery, stream, message_queue_size=1, max_message_size=MAX_MESSAGE
                    )
                    socket = await handshake.accept(extra_headers=extra_headers)
                del handshake, handshake_bytes, extra_headers
                open_stream.attach(subscriber)
                await join(
                    self._tracker.engine,
                    self._broker,
                    subscriber,
                    watch.session_ids[0],
                    watch.cursor,
                    replay=watch.replay,
                    visible=open_stream.visible,
                )
                while True:
                    await socket.get_message()
            except ConnectionClosed as closed:
                if subscriber.ending and not stream.has_sent_close:
                    await trio.sleep_forever()  # until the broker's close frame has been sent
                subscriber.broken = True
                if closed.reason is not None and closed.reason.code in OFFENCES:
                    has_failed = True
                    await self._fail(transport, subscriber, stream, closed.reason)
            except DISCONNECTED:
                subscriber.broken = True
            finally:
                subscriber.abort()
                nursery.cancel_scope.cancel()
        if has_failed:
            await transport.aclose_lingering(LINGER)
        elif not subscriber.broken:
            # Closing our side before the client's close frame would look like a lost connection to it.
            with trio.move_on_after(LINGER), suppress(*DISCONNECTED):
                while (data := await transport.receive_some(4096)) and not _ends_with_close(data):
                    pass

    async def _fail(
        self, transport: Transport, subscriber: PushSubscriber, stream: _LibraryStream, offence: CloseReason
    ) -> None:
        """Tell the client what it has done wrong (RFC 6455, section 7.1.7), unless trio-websocket has."""
        if stream.has_sent_close:
            return
        subscriber.stop()
        reason = (offence.reason or "").encode()[:MAX_REASON].decode(errors="ignore")
        with trio.move_on_after(self._send_timeout), suppress(*DISCONNECTED):
            await transport.send_all(subscriber.encoding.close(offence.code, reason))

    async def _check(self, request: Request, match: Match) -> tuple[OpenStream, WatchRequest] | Response:
        """Open a stream of what is to be watched; return the response if that cannot be.

        A client that has seen everything gets a WebSocket that closes at once: it has no 204.
        """
        try:
            watch = await self._admission.check_watch_request(request, match)
            if (refusal := validate_handshake(request)) is not None:
                return refusal
            return await self._admission.open_stream(watch), watch
        except SseserveError as error:
            return error_response(error, request)


class _LibraryStream(trio.abc.Stream):
    """The transport as trio-websocket has it, for its handshake, pongs and close frames.

    - After a close frame nothing may be sent (RFC 6455, section 5.5.1), so one that trio-websocket sends ends
      what the broker sends.
    - Closing leaves the transport open: if the client breaks the protocol, trio-websocket closes without a
      close frame.
    - What the client sends before the response to its ``handshake`` is read after it: trio-websocket would
      keep it until more comes.
    """

    __slots__ = ("_handshake", "_is_closed", "_responded", "_subscriber", "_transport", "has_sent_close")

    def __init__(self, transport: Transport, subscriber: PushSubscriber, handshake: bytes) -> None:
        self._transport = transport
        self._subscriber = subscriber
        self._handshake = handshake
        self._responded = trio.Event()
        self._is_closed = False
        self.has_sent_close = False

    def _check_open(self) -> None:
        if self._is_closed:
            raise trio.ClosedResourceError("trio-websocket has closed this stream")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._check_open()
        if data[:1] == _CLOSE_FRAME:
            if self._subscriber.ending:
                return  # the broker's is on its way
            self.has_sent_close = True
            self._subscriber.stop()
        await self._transport.send_all(data)
        self._responded.set()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        self._check_open()
        if self._handshake:
            handshake, self._handshake = self._handshake, b""
            return handshake
        await self._responded.wait()
        return await self._transport.receive_some(max_bytes)

    async def wait_send_all_might_not_block(self) -> None:
        await self._transport.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        self._is_closed = True
        await trio.lowlevel.checkpoint()


def _ends_with_close(data: bytes | bytearray) -> bool:
    """Whether a masked close frame (RFC 6455, section 5.5.1) is at the end; it is a client's last."""
    sizes = range(min(126, len(data) - 5))
    return any(data[-6 - size :][:2] == bytes((0x88, 0x80 | size)) for size in sizes)
