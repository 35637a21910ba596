"""Hypercorn's WebSocket over HTTP/2 (RFC 8441), with its defects worked around."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hypercorn.protocol.events import Body, Data, EndBody, EndData, Event, Request, StreamClosed
from hypercorn.protocol.ws_stream import ASGIWebsocketState, FrameTooLargeError, WSStream
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection, Message, Ping
from wsproto.events import Event as WebSocketEvent
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError

__all__ = ["WebSocketStream"]


class WebSocketStream(WSStream):
    """A WebSocket that ends whenever its client cannot go on with it. In Hypercorn it stays open

    - after a message that is too large,
    - after a handshake that is refused, or data that the client sends before its response,
    - after the client's END_STREAM, which is the end of its connection (RFC 8441, section 5).

    A frame that breaks the protocol gets a close frame (RFC 6455, section 7.1.7), in Hypercorn none. What the
    reader of the connection sends is not waited for: the window that it needs is read by the reader. Neither
    is the application: watchers have nothing to send, so their messages are dropped.

    Args:
        queue: ``Output.queue``.
        arguments: Hypercorn's.
    """

    def __init__(self, queue: Callable[..., None], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._queue = queue

    async def handle(self, event: Event) -> None:
        match event:
            case Request():
                await super().handle(event)
                if self.closed:
                    self.closed = False  # the handshake was refused
                    await self._end()
            case Body() | Data() if not self.handshake.accepted:
                self.closed = True  # for the application, which may be about to respond
                if self.state is ASGIWebsocketState.HANDSHAKE:
                    await self._send_error_response(400)
                self.closed = False
                await self._end()
            case EndBody() | EndData():
                await self._end()
            case _:
                await super().handle(event)

    async def _handle_events(self) -> None:
        for event in self.connection.events():
            match event:
                case Message():
                    try:
                        self.buffer.extend(event)
                    except FrameTooLargeError:
                        await self._end(CloseConnection(code=CloseReason.MESSAGE_TOO_BIG))
                        return
                    if event.message_finished:
                        self.buffer.clear()
                case Ping():
                    self._queue(self.stream_id, self.connection.send(event.response()), may_drop=True)
                case CloseConnection():
                    is_answer = self.connection.state is ConnectionState.REMOTE_CLOSING
                    await self._end(event.response() if is_answer else CloseConnection(code=event.code))
                    return

    async def _end(self, close: WebSocketEvent | None = None) -> None:
        """End the stream, with a close frame if one can still be sent, and the application with it."""
        data = b""
        if close is not None:
            with suppress(LocalProtocolError):
                data = self.connection.send(close)
        self._queue(self.stream_id, data, ends=True)
        await self.send(StreamClosed(stream_id=self.stream_id))
