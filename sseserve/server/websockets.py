"""WebSocket over a transport: trio-websocket shakes hands and reads, the broker writes.

Our frames do not pass through trio-websocket: a server's frames are not masked (RFC 6455, section 5.1),
so one encoded frame serves every client.
"""

from __future__ import annotations

import trio
from trio_websocket import ConnectionClosed, wrap_server_stream

from ..admission import cursor_of, opening
from ..broker import PushSubscriber
from ..context import Context
from ..dialects import Encoding
from ..http import Request
from ..routes import Match
from ..transport import Transport
from ..watching import join
from .streams import GONE, LINGER

__all__ = ["serve_socket"]

MAX_MESSAGE = 4096  # watchers have nothing to say


async def serve_socket(context: Context, transport: Transport, request: Request, found: Match) -> None:
    """Serve a WebSocket to the end of the session or of the client, and close the transport."""
    answer = await opening(context, request, found)
    if answer is not None and answer.status != 204:
        with trio.move_on_after(context.settings.send_timeout):
            await transport.send_all(answer.encode(request=request, close=True))
        await transport.aclose_lingering(LINGER)
        return
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
        await transport.aclose_lingering(LINGER, answered=True)
