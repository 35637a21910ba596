"""Streams and sockets that arrive through Hypercorn: HTTP/2, and upgrades on a used connection.

Over HTTP/1.1 a stream is served on the transport itself (see ``server/hypercorn.py``). Here a handler
pulls from its subscriber what the direct path would have pushed: same bytes, same rules.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

import trio
from quart import Response, request, websocket
from quart.wrappers import Response as QuartResponse

from ..context import Context
from ..dialects import Encoding
from ..errors import UpgradeRequired
from ..http.admission import cursor_of, opening, replay_of, sessions_of, shaking, user_of
from ..http.messages import STREAM_HEADERS, Answer, Request, error_answer, foreign
from ..http.routes import ROUTES, Kind, Match
from ..live.broker import PullSubscriber
from ..live.bundle import Bundle
from ..live.resume import join
from ..live.transport import Transport

__all__ = ["HANDLERS", "socket"]

log = logging.getLogger(__name__)


PING = b"\x89\x00"  # RFC 6455, section 5.5.2


class _Lines(PullSubscriber):
    """A subscriber whose reader frames lines of JSON by itself; an empty one is a heartbeat."""

    __slots__ = ()

    def beat(self, data: bytes) -> bool:  # noqa: ARG002 - there is none in JSON
        return super().beat(b"\n")


class _Pull:
    """A subscriber and the task that joins it: what a response reads from."""

    def __init__(self, context: Context, match: Match, asked: Request, encoding: Encoding) -> None:
        self._context = context
        self._session_id = match.params["id"]
        self._cursor = cursor_of(asked)
        self._replay = replay_of(asked, match)
        self._id = asked.id
        kind = _Lines if encoding.protocol == "text" else PullSubscriber
        self.subscriber = kind(context.broker, encoding)

    async def join(self, head: bytes = b"") -> None:
        """Bring the subscriber up to the log's end; a reader that stalls meanwhile is given up."""
        context = self._context
        try:
            await join(
                context.engine,
                context.broker,
                self.subscriber,
                self._session_id,
                self._cursor,
                head,
                replay=self._replay,
            )
        except trio.TooSlowError:
            self.subscriber.abort()
        except Exception:
            # The boundary of a request: the task belongs to the server.
            log.exception("request %s failed", self._id)
            self.subscriber.close_code = 1011
            self.subscriber.abort()


async def stream(context: Context, match: Match, asked: Request) -> Answer | QuartResponse:
    """Watch by SSE over HTTP/2; a HEAD learns the headers."""
    peer = request.remote_addr or ""
    answer = await opening(context, asked, match, peer)
    if answer is not None:
        return answer
    if asked.method == "HEAD":
        return Answer(200, headers=STREAM_HEADERS)
    head = b"" if context.settings.retry_ms is None else b"retry: %d\n" % context.settings.retry_ms
    pages = _bundled(context, match, asked) if "id" not in match.params else _pulled(context, match, asked)

    # Not in the body: others may be admitted before that is asked for, and it may never be.
    request.held.enter_context(context.seats.take(user_of(context, asked, peer)))  # type: ignore[attr-defined]

    async def body() -> AsyncGenerator[bytes]:
        if head:
            yield head
        async with aclosing(pages) as chunks:
            async for chunk in chunks:
                yield chunk

    response = Response(body())
    response.timeout = None
    for name, value in STREAM_HEADERS:
        response.headers[name] = value
    return response


def _bundled(context: Context, match: Match, asked: Request) -> AsyncGenerator[bytes]:
    encoding = Encoding(match.route.dialect, "sse")
    named = sessions_of(asked, match)
    bundle = Bundle(context.engine, context.broker, encoding, named, cursor_of(asked))
    return bundle.pages(context.stopping, context.settings.drain)


async def _pulled(context: Context, match: Match, asked: Request) -> AsyncGenerator[bytes]:
    pull = _Pull(context, match, asked, Encoding(match.route.dialect, "sse"))
    # The join may wait for its reader, which is us, so it needs a task of its own.
    context.nursery.start_soon(pull.join)
    try:
        while data := await pull.subscriber.receive():
            yield data
    finally:
        pull.subscriber.abort()


async def upgrade(context: Context, match: Match, asked: Request) -> Answer:
    """A plain GET where a WebSocket lives (RFC 9110, section 15.5.22)."""
    answer = await opening(context, asked, match)
    if answer is not None and answer.status != 204:
        return answer
    return shaking(asked) or error_answer(UpgradeRequired("this is a WebSocket"), asked)


async def socket(context: Context, match: Match, asked: Request) -> Answer | None:
    """Watch by WebSocket behind Hypercorn. Returns the answer that refuses it, None when it is over."""
    if context.authenticate is not None and (refused := foreign(context.settings.cors_origins, asked)):
        return refused
    answer = await opening(context, asked, match)
    if answer is not None and answer.status != 204:
        return answer
    await websocket.accept(headers={"X-Request-ID": asked.id})
    pull = _Pull(context, match, asked, Encoding(match.route.dialect, "text"))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read)
            nursery.start_soon(pull.join)
            while data := await pull.subscriber.receive():
                # Only this ends a message: JSON may hold what else Python takes for the end of a line.
                for text in data.decode().removesuffix("\n").split("\n"):
                    with trio.fail_after(context.settings.send_timeout):
                        await (websocket.send(text) if text else _ping())
            nursery.cancel_scope.cancel()
    finally:
        pull.subscriber.abort()
    await websocket.close(pull.subscriber.close_code, "ended")
    return None


async def _ping() -> None:
    """Ping the client on the transport itself; over HTTP/2 a frame of ours cannot be written there."""
    if websocket.http_version == "1.1":
        transport: Transport = websocket.scope["state"]["transport"]
        # Who is gone is noticed by its reader.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await transport.send_all(PING)


async def _read() -> None:
    """Read what watchers have no reason to say, so that their close is seen."""
    while True:
        await websocket.receive()


HANDLERS = {route.name: stream for route in ROUTES if route.kind is Kind.STREAM} | {"socket": upgrade}
