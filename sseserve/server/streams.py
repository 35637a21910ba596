"""SSE over a transport.

What is sent at once is a chunk (RFC 9112, section 7.1), encoded once for all clients. A response that is
complete ends with the last chunk, so that a client or proxy can tell that another one was cut off. HTTP/1.0
has no chunks: there the response ends with its connection. So does every connection with its stream: what the
client has sent meanwhile was dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

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
    response_head,
)
from ..http.open_streams import OpenStream
from ..http.routing import Match
from ..live.broker import Broker
from ..live.bundle_join import join_bundle
from ..live.resume import join
from ..live.subscriber import PushSubscriber, send_pages
from ..live.transport import DISCONNECTED, LINGER, Transport
from ..progress.tracker import Tracker

__all__ = ["EventStreams"]


class EventStreams:
    """Serves event streams.

    Args:
        tracker: has the logs.
        broker: delivers the events.
        admission: decides who may watch.
        read_pages: returns what a stream sends that is not one of sessions.
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
        *,
        finish: Callable[[Request, Response], Response],
        retry_ms: int | None,
        send_timeout: float,
    ) -> None:
        self._tracker = tracker
        self._broker = broker
        self._admission = admission
        self._read_pages = read_pages
        self._finish = finish
        self._retry_ms = retry_ms
        self._send_timeout = send_timeout

    async def serve(self, transport: Transport, request: Request, match: Match, date: str) -> None:
        """Stream to the end of the session or of the client, and close the transport.

        ``date`` is the value of the ``Date`` header.
        """
        # What stays for hours is only what the stream needs, so little is done here.
        opened = await self._open(request, match)
        if isinstance(opened, Response):
            await self._refuse(transport, self._finish(request, opened), date)
            return
        stream, watch = opened
        with stream:
            encoding = Encoding(watch.dialect, "sse", chunked=request.http_version != "1.0")
            head = self._head(request, encoding, date)
            del request, match, date, opened
            async with trio.open_nursery() as nursery:
                subscriber = PushSubscriber(self._broker, encoding, transport, nursery)
                subscriber.head = head
                del head
                stream.attach(subscriber)
                try:
                    if watch.reads_pages:
                        nursery.start_soon(_wait_disconnected, transport, subscriber)
                        subscriber.write_first()
                        await send_pages(subscriber, self._read_pages(watch, encoding, stream))
                        await trio.sleep_forever()  # until what waits is sent
                    if watch.bundled:
                        nursery.start_soon(_wait_disconnected, transport, subscriber)
                        await join_bundle(
                            self._tracker.engine,
                            self._broker,
                            subscriber,
                            watch.session_ids,
                            watch.cursor,
                            visible=stream.visible,
                        )
                        await trio.sleep_forever()  # until what waits is sent
                    await join(
                        self._tracker.engine,
                        self._broker,
                        subscriber,
                        watch.session_ids[0],
                        watch.cursor,
                        replay=watch.replay,
                        visible=stream.visible,
                    )
                    del watch, encoding
                    await transport.wait_disconnected()
                    subscriber.broken = True
                except DISCONNECTED:
                    subscriber.broken = True
                finally:
                    subscriber.abort()
                    nursery.cancel_scope.cancel()
        if not subscriber.broken:
            await transport.aclose_lingering(LINGER)

    async def _open(self, request: Request, match: Match) -> tuple[OpenStream, WatchRequest] | Response:
        """Open a stream, for the length of the block that begins at once; or return the response."""
        try:
            watch = await self._admission.check_watch_request(request, match)
            return Response(204) if watch.is_complete else (await self._admission.open_stream(watch), watch)
        except SseserveError as error:
            return error_response(error, request)

    def _head(self, request: Request, encoding: Encoding, date: str) -> bytes:
        """Return what the response begins with."""
        headers = self._finish(request, Response(200, None, STREAM_HEADERS)).headers
        coding: Headers = (("Transfer-Encoding", "chunked"),) if encoding.chunked else ()
        head = response_head(200, (*headers, *coding, ("Date", date), ("Connection", "close")))
        return head if self._retry_ms is None else head + encoding.retry(self._retry_ms)

    async def _refuse(self, transport: Transport, response: Response, date: str) -> None:
        with trio.move_on_after(self._send_timeout):
            await transport.send_all(response.encode(close=True, date=date))
        await transport.aclose_lingering(LINGER)


async def _wait_disconnected(transport: Transport, subscriber: PushSubscriber) -> None:
    with suppress(*DISCONNECTED):
        await transport.wait_disconnected()
    subscriber.broken = True
    subscriber.abort()
