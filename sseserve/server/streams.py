"""SSE over a transport, which is a connection of HTTP/1.1 or a stream of HTTP/2.

Over HTTP/1.1 what is sent at once is a chunk (RFC 9112, section 7.1), encoded once for all clients. A
response that is complete ends with the last chunk, so that a client or proxy can tell that another one was
cut off. HTTP/1.0 has no chunks: there the response ends with its connection. So does every connection with
its stream: what the client has sent meanwhile was dropped. Over HTTP/2 a complete response ends with
END_STREAM, and another one is reset.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import trio

from ..dialects import Encoding
from ..errors import SseserveError
from ..http.admission import Admission, ReadPages, WatchRequest
from ..http.messages import (
    STREAM_HEADERS,
    Headers,
    Request,
    Response,
    error_response,
    log_response,
    response_head,
)
from ..http.open_streams import OpenStream
from ..http.routing import Match
from ..live.broker import Broker
from ..live.bundle_join import join_bundle
from ..live.push_subscriber import PushSubscriber, send_pages
from ..live.resume import join
from ..live.subscriber import TOO_SLOW
from ..live.transport import DISCONNECTED, LINGER, Transport
from ..model import EndReason
from ..progress.tracker import Tracker
from .http2_stream import EventStreamTransport

__all__ = ["EventStreams"]

log = logging.getLogger(__name__)

AnyTransport = Transport | EventStreamTransport

MAX_HEADS = 64  # an ``Origin`` is what a client says it is


class EventStreams:
    """Serves event streams.

    Args:
        tracker: has the logs.
        broker: delivers the events.
        admission: decides who may watch.
        read_pages: returns what a stream sends that is not one of sessions.
        nursery: runs what drains the buffers of slow clients.
        finish: adds the headers that every response has, and logs it.
        retry_ms: the reconnection time that every stream asks for, in milliseconds; None: none.
        send_timeout: how long one write may take, in seconds.
    """

    def __init__(
        self,
        tracker: Tracker,
        broker: Broker,
        admission: Admission,
        read_pages: ReadPages,
        nursery: trio.Nursery,
        *,
        finish: Callable[[Request, Response], Response],
        retry_ms: int | None,
        send_timeout: float,
    ) -> None:
        self._tracker = tracker
        self._broker = broker
        self._admission = admission
        self._read_pages = read_pages
        self._nursery = nursery
        self._finish = finish
        self._retry_ms = retry_ms
        self._send_timeout = send_timeout
        # What stands before and behind the ids in the heads of this second, by what else they depend on.
        self._heads: dict[tuple[str | None, bool], tuple[bytes, bytes]] = {}
        self._heads_date = ""

    async def serve(self, transport: AnyTransport, request: Request, match: Match, date: str) -> None:
        """Stream to the end of the session or of the client, and close the transport.

        ``date`` is the value of the ``Date`` header.
        """
        # What stays for hours is only what the stream needs, so little is done here.
        opened = await self._open(request, match)
        if isinstance(opened, Response):
            await self.refuse(transport, request, opened, date)
            return
        stream, watch = opened
        with stream:
            encoding = Encoding(watch.dialect, "sse", chunked=request.http_version == "1.1")
            subscriber = _StreamSubscriber(self._broker, encoding, transport, self._nursery)
            if isinstance(transport, EventStreamTransport):
                transport.send_head(200, (*self._headers(request), ("Date", date)))
                subscriber.head = self._retry(encoding)
            else:
                subscriber.head = self._head(request, encoding, date)
            del request, match, date, opened
            stream.attach(subscriber)
            try:
                if watch.reads_pages:
                    subscriber.write_first()
                    pages = self._read_pages(watch, encoding, stream)
                    await _send_while_connected(
                        subscriber, transport, send_pages(subscriber, pages, watch.pages_end)
                    )
                elif watch.bundled:
                    joining = join_bundle(
                        self._tracker.engine,
                        self._broker,
                        subscriber,
                        watch.session_ids,
                        watch.cursor,
                        visible=stream.visible,
                    )
                    await _send_while_connected(subscriber, transport, joining)
                else:
                    await self._join(subscriber, watch, stream)
                    del watch, encoding
                    if await transport.wait_disconnected():
                        subscriber.broken = True
            except DISCONNECTED as error:
                subscriber.fail(error)
            finally:
                subscriber.abort()
        if isinstance(transport, EventStreamTransport):
            transport.end(complete=not subscriber.broken and subscriber.close_code != TOO_SLOW)
        elif not subscriber.broken:
            await transport.aclose_lingering(LINGER)

    async def _join(self, subscriber: _StreamSubscriber, watch: WatchRequest, stream: OpenStream) -> None:
        joining = join(
            self._tracker.engine,
            self._broker,
            subscriber,
            watch.session_ids[0],
            watch.cursor,
            replay=watch.replay,
            visible=stream.visible,
        )
        if self._tracker.engine.immediate:
            await joining  # it waits for nothing but the transport
            return
        with trio.CancelScope() as subscriber.scope:
            await joining
        subscriber.scope = None

    async def _open(self, request: Request, match: Match) -> tuple[OpenStream, WatchRequest] | Response:
        """Open a stream, for the length of the block that begins at once; or return the response."""
        try:
            watch = await self._admission.check_watch_request(request, match)
            return Response(204) if watch.is_complete else (await self._admission.open_stream(watch), watch)
        except SseserveError as error:
            return error_response(error, request)

    def _head(self, request: Request, encoding: Encoding, date: str) -> bytes:
        """Return what the response begins with: but for the ids the same for most streams of a second."""
        if date != self._heads_date or len(self._heads) >= MAX_HEADS:
            self._heads_date, self._heads = date, {}
        ids = "\r\n".join([f"{name}: {value}" for name, value in request.id_headers]).encode("latin-1")
        key = request.headers.get("origin"), encoding.chunked
        if (known := self._heads.get(key)) is not None:
            log_response(request, 200)
            before, after = known
            return before + ids + after
        coding: Headers = (("Transfer-Encoding", "chunked"),) if encoding.chunked else ()
        fields = (*self._headers(request), *coding, ("Date", date), ("Connection", "close"))
        head = response_head(200, fields) + self._retry(encoding)
        before, _, after = head.partition(ids)
        self._heads[key] = before, after
        return head

    def _headers(self, request: Request) -> Headers:
        return self._finish(request, Response(200, None, STREAM_HEADERS)).headers

    def _retry(self, encoding: Encoding) -> bytes:
        return b"" if self._retry_ms is None else encoding.retry(self._retry_ms)

    async def refuse(self, transport: AnyTransport, request: Request, response: Response, date: str) -> None:
        """Send another response than a stream, and close the transport."""
        response = self._finish(request, response)
        with trio.move_on_after(self._send_timeout):
            if isinstance(transport, EventStreamTransport):
                await transport.send_response(response, date)
            else:
                await transport.send_all(response.encode(close=True, date=date))
        if isinstance(transport, EventStreamTransport):
            transport.end(complete=True)
        else:
            await transport.aclose_lingering(LINGER)


class _StreamSubscriber(PushSubscriber):
    """A subscriber whose connection's task waits for its client, and for nothing else, most of the time.

    So it needs no nursery of its own: what drains its buffer runs in one of all connections, and ends when
    the transport is closed.
    """

    __slots__ = ("scope",)

    def __init__(
        self, broker: Broker, encoding: Encoding, transport: AnyTransport, nursery: trio.Nursery
    ) -> None:
        super().__init__(broker, encoding, transport, nursery)
        self.scope: trio.CancelScope | None = None  # what the connection's task waits in before

    def _complete(self) -> None:
        self._transport.stop_waiting()
        if self.scope is not None:
            self.scope.cancel()

    # A stream is the boundary of an error: the others are not affected.

    async def _drain(self) -> None:
        try:
            await super()._drain()
        except Exception:
            log.exception("sending to %r failed", self)
            self._end_broken()

    def pull(self, limit: int) -> bytes:
        try:
            return super().pull(limit)
        except Exception:
            log.exception("sending to %r failed", self)
            self._end_broken()
            return b""

    def _end_broken(self) -> None:
        self.broken = True
        self.abort(EndReason.ERROR)


async def _send_while_connected(
    subscriber: _StreamSubscriber, transport: AnyTransport, sending: Coroutine[Any, Any, None]
) -> None:
    """Run what sends a stream that waits for more than its client, until all is sent or the client leaves."""

    async def end_when_disconnected() -> None:
        with suppress(*DISCONNECTED):
            if not await transport.wait_disconnected():
                nursery.cancel_scope.cancel()
                return
        subscriber.broken = True
        subscriber.abort()

    async with trio.open_nursery() as nursery:
        subscriber.scope = nursery.cancel_scope
        nursery.start_soon(end_when_disconnected)
        try:
            await sending
            await trio.sleep_forever()  # until what waits is sent
        except DISCONNECTED as error:
            subscriber.fail(error)
        nursery.cancel_scope.cancel()
