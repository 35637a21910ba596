"""WebSocket over a transport: trio-websocket shakes hands and reads, the broker writes.

Our frames do not pass through trio-websocket: a server's frames are not masked (RFC 6455, section 5.1),
so one encoded frame serves every client. Neither does the client's handshake: it is checked here, and
trio-websocket reads one that holds nothing but the key, as it raises all sorts of things for other bytes.
"""

from __future__ import annotations

from contextlib import suppress

import trio
from trio_websocket import ConnectionClosed, wrap_server_stream

from ..context import Context
from ..dialects import Encoding
from ..http.admission import cursor_of, opening, shaking
from ..http.messages import Request, foreign, log_answer
from ..http.routes import Match
from ..live.broker import PushSubscriber
from ..live.resume import join
from ..live.transport import Transport
from .streams import GONE, LINGER

__all__ = ["serve_socket"]

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: -\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n\r\n"
)
MAX_MESSAGE = 4096  # watchers have nothing to say


async def serve_socket(context: Context, transport: Transport, request: Request, found: Match) -> None:
    """Serve a WebSocket to the end of the session or of the client, and close the transport.

    The transport stands behind the head of ``request``.
    """
    refused = foreign(context.settings.cors_origins, request) if context.authenticate is not None else None
    answer = refused or await opening(context, request, found)
    if answer is None or answer.status == 204:
        answer = shaking(request)
    log_answer(request, 101 if answer is None else answer.status)
    if answer is not None:
        with trio.move_on_after(context.settings.send_timeout):
            await transport.send_all(answer.encode(request=request, close=True))
        await transport.aclose_lingering(LINGER)
        return
    transport.push_back(HANDSHAKE % request.headers["sec-websocket-key"].encode())
    encoding = Encoding(found.route.dialect, "ws")
    async with trio.open_nursery() as nursery:
        subscriber = PushSubscriber(context.broker, encoding, transport, nursery)
        try:
            with trio.fail_after(context.settings.request_timeout):
                handshake = await wrap_server_stream(
                    nursery, transport, message_queue_size=1, max_message_size=MAX_MESSAGE
                )
                extra = [(b"x-request-id", request.id.encode())]
                socket = await handshake.accept(extra_headers=extra)
            await join(context.engine, context.broker, subscriber, found.params["id"], cursor_of(request))
            while True:
                await socket.get_message()
        except (ConnectionClosed, *GONE):
            subscriber.broken = True
        finally:
            subscriber.abort()
            nursery.cancel_scope.cancel()
    if not subscriber.broken:
        # Our end before its close frame would make the client take the close for an accident.
        with trio.move_on_after(LINGER), suppress(*GONE):
            while (data := await transport.receive_some(4096)) and not _closes(data):
                pass


def _closes(data: bytes | bytearray) -> bool:
    """Whether a masked close frame (RFC 6455, section 5.5.1) stands at the end; it is a client's last."""
    sizes = range(min(126, len(data) - 5))
    return any(data[-6 - size :][:2] == bytes((0x88, 0x80 | size)) for size in sizes)
