"""WebSocket over a transport: wsproto reads, the broker writes.

Our frames do not pass through wsproto: a server's frames are not masked (RFC 6455, section 5.1), so one
encoded frame serves every client. Pongs and answers to close frames do. An idle WebSocket is one task that
waits for its socket: the objects and tasks of trio-websocket would be two thirds of its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import trio
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import CloseConnection, Message, Ping
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import generate_accept_token

from ..dialects import Encoding
from ..errors import SseserveError
from ..http.admission import Admission, ReadPages, WatchRequest, validate_handshake
from ..http.messages import Request, Response, error_response, log_response, response_head
from ..http.open_streams import OpenStream
from ..http.routing import Match
from ..live.broker import Broker
from ..live.push_subscriber import PushSubscriber, send_pages
from ..live.resume import join
from ..live.transport import DISCONNECTED, LINGER, Transport
from ..model import EndReason
from ..progress.tracker import Tracker

__all__ = ["WebSockets"]

MAX_MESSAGE = 4096  # bytes; watchers have nothing to send
MAX_REASON = 123  # bytes of a close frame's reason (RFC 6455, section 5.5)
READ = 4096  # bytes


class WebSockets:
    """Serves WebSockets.

    Args:
        tracker: has the logs.
        broker: delivers the events.
        admission: decides who may watch.
        read_pages: returns what a WebSocket sends that is not one of a session.
        finish: adds the headers that every response has, and logs it.
        send_timeout: how long one write may take, in seconds.
    """

    def __init__(
        self,
        tracker: Tracker,
        broker: Broker,
        admission: Admission,
        read_pages: ReadPages,
        *,
        finish: Callable[[Request, Response], Response],
        send_timeout: float,
    ) -> None:
        self._tracker = tracker
        self._broker = broker
        self._admission = admission
        self._read_pages = read_pages
        self._finish = finish
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
        token = generate_accept_token(request.headers["sec-websocket-key"].encode()).decode()
        switching = (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", token))
        head = response_head(101, (*switching, *request.id_headers))
        # What stays for hours is only what the WebSocket needs.
        del request, token, switching
        is_offence = False
        async with trio.open_nursery() as nursery:
            subscriber = PushSubscriber(self._broker, Encoding(watch.dialect, "ws"), transport, nursery)
            try:
                await self._send(transport, head)
                open_stream.attach(subscriber)
                if watch.reads_pages:
                    nursery.start_soon(self._send_pages, subscriber, watch, open_stream)
                elif self._tracker.engine.immediate and not (watch.cursor or watch.replay):
                    await self._join(subscriber, watch, open_stream)  # a snapshot waits for nothing
                else:
                    # The client is read meanwhile: a replay takes as long as the client likes.
                    nursery.start_soon(self._join, subscriber, watch, open_stream)
                del head, watch
                last = await self._read(transport, subscriber)
                if subscriber.ending:
                    await trio.sleep_forever()  # until the broker's close frame has been sent
                subscriber.broken = True
                if last.close is not None:
                    is_offence = last.is_offence
                    why = EndReason.PROTOCOL_ERROR if is_offence else EndReason.CLIENT_LEFT
                    await subscriber.finish(last.close, why)  # nothing may follow (RFC 6455, section 5.5.1)
            except DISCONNECTED as error:
                subscriber.fail(error)
            finally:
                subscriber.abort()
                nursery.cancel_scope.cancel()
        if is_offence:
            await transport.aclose_lingering(LINGER)
        elif not subscriber.broken:
            # Closing our side before the client's close frame would look like a lost connection to it.
            with trio.move_on_after(LINGER), suppress(*DISCONNECTED):
                while (data := await transport.receive_some(READ)) and not _ends_with_close(data):
                    pass

    async def _send_pages(
        self, subscriber: PushSubscriber, watch: WatchRequest, open_stream: OpenStream
    ) -> None:
        try:
            pages = self._read_pages(watch, subscriber.encoding, open_stream)
            await send_pages(subscriber, pages, watch.pages_end)
        except DISCONNECTED:
            subscriber.broken = True
            subscriber.abort()

    async def _join(self, subscriber: PushSubscriber, watch: WatchRequest, open_stream: OpenStream) -> None:
        try:
            await join(
                self._tracker.engine,
                self._broker,
                subscriber,
                watch.session_ids[0],
                watch.cursor,
                replay=watch.replay,
                visible=open_stream.visible,
            )
        except DISCONNECTED as error:
            subscriber.fail(error)

    async def _send(self, transport: Transport, data: bytes) -> None:
        if not transport.try_send(data):
            with trio.fail_after(self._send_timeout):
                await transport.send_all(data)
        elif transport.pending:
            with trio.fail_after(self._send_timeout):
                await transport.flush()

    async def _read(self, transport: Transport, subscriber: PushSubscriber) -> _Answer:
        """Read until the client closes, breaks the protocol, or disconnects; return the last answer to it."""
        reader = _Reader(subscriber.encoding)
        data: bytes | bytearray | None = transport.try_receive(READ)  # what came with the handshake
        while data != b"":
            if data is not None:
                answer = reader.receive(data)
                if answer.close is not None:
                    return answer
                if answer.pongs and not subscriber.ending:
                    await subscriber.send(answer.pongs)  # after what waits for the client
                del answer
            if transport.immediate:
                data = await transport.receive_later(READ)
            else:
                data = await transport.receive_some(READ)
        return _Answer()

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


class _Answer(NamedTuple):
    """What a client gets for what it has sent. ``close``: the last of it, with the pongs before it.

    ``is_offence``: it is closed for breaking the protocol.
    """

    pongs: bytes = b""
    close: bytes | None = None
    is_offence: bool = False


class _Reader:
    """Reads what a client sends. Watchers have nothing to say, so messages are dropped.

    Args:
        encoding: of what the client gets.
    """

    __slots__ = ("_connection", "_encoding", "_size")

    def __init__(self, encoding: Encoding) -> None:
        self._connection = Connection(ConnectionType.SERVER)
        self._encoding = encoding
        self._size = 0  # of the message that is not complete

    def receive(self, data: bytes | bytearray) -> _Answer:
        """Return the answer to the frames that are complete now, up to a close or an offence."""
        pongs = b""
        self._connection.receive_data(bytes(data))
        for event in self._connection.events():
            match event:
                case Message():
                    self._size += len(event.data)
                    if self._size > MAX_MESSAGE:
                        reason = f"the limit is {MAX_MESSAGE} bytes"
                        return self._fail(CloseReason.MESSAGE_TOO_BIG, reason, pongs)
                    if event.message_finished:
                        self._size = 0
                case Ping():
                    pongs += self._connection.send(event.response())
                case CloseConnection() if self._connection.state is ConnectionState.REMOTE_CLOSING:
                    return _Answer(close=pongs + self._connection.send(event.response()))
                case CloseConnection():
                    return self._fail(event.code, event.reason or "", pongs)
        return _Answer(pongs)

    def _fail(self, code: int, reason: str, pongs: bytes) -> _Answer:
        """Tell the client what it has done wrong (RFC 6455, section 7.1.7)."""
        short = reason.encode()[:MAX_REASON].decode(errors="ignore")
        return _Answer(close=pongs + self._encoding.close(code, short), is_offence=True)


def _ends_with_close(data: bytes | bytearray) -> bool:
    """Whether a masked close frame (RFC 6455, section 5.5.1) is at the end; it is a client's last."""
    sizes = range(min(126, len(data) - 5))
    return any(data[-6 - size :][:2] == bytes((0x88, 0x80 | size)) for size in sizes)
