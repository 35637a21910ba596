"""SSE over a transport.

The response is delimited by the connection's end (RFC 9112, section 6.3), so that the bytes of an event
are the same for every client and can go out without any framing of their own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing, nullcontext, suppress

import trio

from ..context import Context
from ..dialects import Encoding
from ..http.admission import cursor_of, opening, replay_of, sessions_of, user_of
from ..http.messages import STREAM_HEADERS, Request, cors, head, log_answer
from ..http.routes import Match
from ..live.broker import PushSubscriber
from ..live.bundle import Bundle
from ..live.resume import join
from ..live.transport import Transport

__all__ = ["serve_stream"]

LINGER = 1.0
NO_SEAT = nullcontext()
GONE = (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)


async def serve_stream(
    context: Context,
    transport: Transport,
    request: Request,
    found: Match,
    left: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Stream a session to the end of it or of the client, and close the transport.

    ``left`` returns when the client has left, for those whose socket somebody else reads.
    """
    more = cors(context.settings.cors_origins, request)
    peer = transport.peer if context.seats.limited else ""
    answer = await opening(context, request, found, peer)
    log_answer(request, 200 if answer is None else answer.status)
    if answer is not None:
        with trio.move_on_after(context.settings.send_timeout):
            await transport.send_all(answer.encode(request=request, more=more, close=True))
        await transport.aclose_lingering(LINGER)
        return
    headers = (*STREAM_HEADERS, *more, ("X-Request-ID", request.id), ("Connection", "close"))
    first = head(200, headers)
    if context.settings.retry_ms is not None:
        # Not a block of its own: some clients take one without data for a message.
        first += b"retry: %d\n" % context.settings.retry_ms
    encoding = Encoding(found.route.dialect, "sse")
    cursor = cursor_of(request)
    seat = context.seats.take(user_of(context, request, peer)) if context.seats.limited else NO_SEAT
    with seat:
        if "id" not in found.params:
            bundle = Bundle(context.engine, context.broker, encoding, sessions_of(request, found), cursor)
            await _serve_bundle(context, transport, bundle, first, left)
            return
        session_id = found.params["id"]
        replay = replay_of(request, found)
        # What stays for hours is only what the watcher needs.
        del request, found, headers, more, peer
        async with trio.open_nursery() as nursery:
            subscriber = PushSubscriber(context.broker, encoding, transport, nursery)
            try:
                await join(
                    context.engine, context.broker, subscriber, session_id, cursor, first, replay=replay
                )
                del first, cursor, session_id
                await (transport.left() if left is None else left())
                subscriber.broken = True
            except GONE:
                subscriber.broken = True
            finally:
                subscriber.abort()
                nursery.cancel_scope.cancel()
    if not subscriber.broken:
        await transport.aclose_lingering(LINGER)


async def _serve_bundle(
    context: Context,
    transport: Transport,
    bundle: Bundle,
    first: bytes,
    left: Callable[[], Awaitable[None]] | None,
) -> None:
    """Write a bundle's pages at the client's pace."""
    done = False
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            with suppress(*GONE):
                await (transport.left() if left is None else left())
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            with trio.fail_after(context.settings.send_timeout):
                await transport.send_all(first)
            async with aclosing(bundle.pages(context.stopping, context.settings.drain)) as pages:
                async for page in pages:
                    with trio.fail_after(context.settings.send_timeout):
                        await transport.send_all(page)
            done = True
        except GONE:
            pass
        nursery.cancel_scope.cancel()
    if done:
        await transport.aclose_lingering(LINGER)
