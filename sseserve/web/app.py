"""The Quart-Trio application: HTTP/2, and every ASGI server that it is mounted in.

A thin layer: each request becomes the same ``Request`` as over HTTP/1.1, is matched in the same table, and is
served by the same ``Dispatcher``. Streams are pulled from their subscriber instead of being pushed to a
socket: the same bytes, the same rules.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

import msgspec
import trio
from quart import Response as QuartResponse
from quart import request as quart_request
from quart import websocket

from ..dialects import Encoding, read_frames
from ..dialects.encoding import TEXT
from ..errors import BadRequest, SseserveError
from ..http.admission import Admission, ReadPages, WatchRequest
from ..http.limits import BodyDeadline
from ..http.messages import STREAM_HEADERS, Request, Response, check_head, check_query, error_response
from ..http.open_streams import OpenStream
from ..http.proxies import TrustedProxies
from ..http.routing import Kind, Match
from ..live.broker import Broker
from ..live.bundle_join import join_bundle
from ..live.pull_subscriber import PullSubscriber
from ..live.push_subscriber import send_pages
from ..live.resume import join
from ..live.subscriber import UNAUTHORIZED
from ..logs import Line, begin_context
from ..model import EndReason
from ..progress.tracker import Tracker
from ..sse import retry_line
from .dispatch import Dispatcher
from .turns import Turn
from .workarounds import QuartApp

__all__ = ["WebApp"]

log = logging.getLogger(__name__)

# How a response that is complete ends (RFC 6455, section 7.4.1): for good, to reconnect, or with its token.
COMPLETE = frozenset({1000, 1012, UNAUTHORIZED})


class WebApp(QuartApp):
    """The application of one server.

    Args:
        dispatcher: serves the requests that are not streams.
        tracker: has the logs.
        broker: delivers the events.
        admission: decides who may watch.
        proxies: say whose requests they forward.
        read_pages: returns what a stream sends that is not one of sessions.
        nursery: runs the tasks that bring subscribers up to the end of their log.
        retry_ms: the reconnection time that every stream asks for, in milliseconds; None: none.
        max_head: limit of a request's path, query and header fields, in bytes.
        request_timeout: how long the next bytes of a body may take, in seconds.
        ndjson_timeout: how long the next line of NDJSON may take to begin, in seconds.
        send_timeout: how long each message of a response may take, in seconds.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        tracker: Tracker,
        broker: Broker,
        admission: Admission,
        proxies: TrustedProxies,
        read_pages: ReadPages,
        nursery: trio.Nursery,
        *,
        retry_ms: int | None,
        max_head: int,
        request_timeout: float,
        ndjson_timeout: float,
        send_timeout: float,
    ) -> None:
        super().__init__(__name__, static_folder=None)
        self.config.update(
            SEND_TIMEOUT=send_timeout,
            RESPONSE_TIMEOUT=None,  # long-polls and streams end by themselves
            BODY_TIMEOUT=None,  # ``_read_body`` has one
            MAX_CONTENT_LENGTH=None,  # ``read_body`` has one
        )
        self._dispatcher = dispatcher
        self._tracker = tracker
        self._broker = broker
        self._admission = admission
        self._proxies = proxies
        self._read_pages = read_pages
        self._join_nursery = nursery
        self._first_line = b"" if retry_ms is None else retry_line(retry_ms)
        self._max_head = max_head
        self._request_timeout = request_timeout
        self._ndjson_timeout = ndjson_timeout
        self._send_timeout = send_timeout
        # The table of routes is ours, so nothing reaches Quart's own.
        self.before_request(self._serve_request)
        self.before_websocket(self._serve_websocket)

    async def _serve_request(self) -> QuartResponse:
        request = self._proxies.resolve(_request(quart_request.scope))
        begin_context(request)
        try:
            self._check_head(quart_request.scope)
            check_query(request)
        except SseserveError as error:
            return _quart_response(self._dispatcher.finish(request, error_response(error, request)))
        match = self._dispatcher.match(request)
        takes_lines = match is not None and match.route.takes_lines(request)
        between_lines = self._ndjson_timeout if takes_lines else None
        deadline = BodyDeadline(self._request_timeout, between_lines=between_lines)
        async with aclosing(_read_body(deadline)) as body:
            request = msgspec.structs.replace(request, body=body)
            if match is not None and match.route.kind is Kind.STREAM and request.method == "GET":
                return await self._open_stream(request, match)
            turn = Turn()
            quart_request.cleanup.callback(turn.end)  # type: ignore[attr-defined]
            return _quart_response(await self._dispatcher.respond_in_turn(request, match, turn))

    def _check_head(self, scope: Any) -> None:
        target = scope.get("raw_path") or b""
        check_head(self._max_head, target + scope["query_string"], scope["headers"])

    # Event streams

    async def _open_stream(self, request: Request, match: Match) -> QuartResponse:
        try:
            watch = await self._admission.check_watch_request(request, match)
            if watch.is_complete:
                return _quart_response(self._dispatcher.finish(request, Response(204)))
            stream = await self._admission.open_stream(watch)
        except SseserveError as error:
            return _quart_response(self._dispatcher.finish(request, error_response(error, request)))
        # Not in the generator, which may never be started.
        quart_request.cleanup.enter_context(stream)  # type: ignore[attr-defined]
        response = QuartResponse(self._stream(watch, stream, request.id))
        response.timeout = None
        head = self._dispatcher.finish(request, Response(200, None, STREAM_HEADERS))
        for name, value in head.headers:
            response.headers[name] = value
        return response

    async def _stream(
        self, watch: WatchRequest, stream: OpenStream, request_id: str
    ) -> AsyncGenerator[bytes]:
        if self._first_line:
            yield self._first_line
        subscriber = PullSubscriber(self._broker, Encoding(watch.dialect, "sse"))
        async with aclosing(self._pull(subscriber, watch, stream, request_id)) as chunks:
            async for chunk in chunks:
                yield chunk
        if subscriber.close_code not in COMPLETE:
            raise trio.TooSlowError  # ends the response without its last message

    async def _pull(
        self, subscriber: PullSubscriber, watch: WatchRequest, stream: OpenStream, request_id: str
    ) -> AsyncGenerator[bytes]:
        # What is sent may wait for its reader, which is this task, so it needs a task of its own.
        scope = trio.CancelScope()
        self._join_nursery.start_soon(self._send, subscriber, watch, stream, request_id, scope)
        try:
            while data := await subscriber.receive():
                yield data
        finally:
            subscriber.abort()
            scope.cancel()

    async def _send(
        self,
        subscriber: PullSubscriber,
        watch: WatchRequest,
        stream: OpenStream,
        request_id: str,
        scope: trio.CancelScope,
    ) -> None:
        """Send what is not one session's; or bring a subscriber up to the end of the log."""
        try:
            with scope:
                stream.attach(subscriber)
                if watch.reads_pages:
                    pages = self._read_pages(watch, subscriber.encoding, stream)
                    await send_pages(subscriber, pages, watch.pages_end)
                elif watch.bundled:
                    await join_bundle(
                        self._tracker.engine,
                        self._broker,
                        subscriber,
                        watch.session_ids,
                        watch.cursor,
                        visible=stream.visible,
                    )
                else:
                    await join(
                        self._tracker.engine,
                        self._broker,
                        subscriber,
                        watch.session_ids[0],
                        watch.cursor,
                        replay=watch.replay,
                        visible=stream.visible,
                    )
        except trio.TooSlowError:
            subscriber.close_code = 1013  # try again later
            subscriber.abort(EndReason.SEND_TIMEOUT)
        except Exception:
            # The boundary of a request: this task is the server's.
            log.exception(Line("stream failed", request_id=request_id))
            subscriber.close_code = 1011  # internal error (RFC 6455, section 7.4.1)
            subscriber.abort(EndReason.ERROR)

    # WebSockets

    async def _serve_websocket(self) -> QuartResponse:
        request = self._proxies.resolve(_request(websocket.scope))
        begin_context(request)
        match = self._dispatcher.match(request)
        try:
            self._check_head(websocket.scope)
            if match is None or match.route.kind is not Kind.SOCKET:
                raise BadRequest(f"there is no WebSocket at {request.path}")
            watch = await self._admission.check_watch_request(request, match)
            stream = await self._admission.open_stream(watch)
        except SseserveError as error:
            return _quart_response(self._dispatcher.finish(request, error_response(error, request)))
        with stream:
            await websocket.accept(headers=dict(request.id_headers))
            await self._serve_open_websocket(watch, stream, request.id)
        return QuartResponse()  # not sent: the WebSocket was the response

    async def _serve_open_websocket(self, watch: WatchRequest, stream: OpenStream, request_id: str) -> None:
        subscriber = PullSubscriber(self._broker, Encoding(watch.dialect, "ws"))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_discard_messages)
                async with aclosing(self._pull(subscriber, watch, stream, request_id)) as chunks:
                    async for data in chunks:
                        # Pings and the close are the ASGI server's.
                        for opcode, payload in read_frames(data):
                            if opcode == TEXT:
                                with trio.fail_after(self._send_timeout):
                                    await websocket.send(payload.decode())
                nursery.cancel_scope.cancel()
            with trio.fail_after(self._send_timeout):
                await websocket.close(subscriber.close_code, "ended")
        except* trio.TooSlowError:
            pass  # its client does not read


async def _read_body(deadline: BodyDeadline) -> AsyncGenerator[bytes]:
    """Read the body as it arrives; see ``Request.body`` for what it raises."""
    chunks = aiter(quart_request.body)
    while True:
        try:
            with trio.fail_at(deadline.next(trio.current_time())):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except trio.TooSlowError:
            raise BadRequest("the body did not arrive in time", limit="request_timeout") from None
        deadline.count(len(chunk))
        deadline.note(chunk)
        yield chunk


async def _discard_messages() -> None:
    """Read what watchers have no reason to send, so that their close is noticed."""
    while True:
        await websocket.receive()


def _request(scope: Any) -> Request:
    """Create a request from an ASGI scope."""
    raw_path = scope.get("raw_path") or quote(scope["path"]).encode()
    path = raw_path.decode("ascii").removeprefix(scope.get("root_path", ""))
    target = f"{path}?{scope['query_string'].decode('latin-1')}"
    peer = (scope.get("client") or [""])[0]
    return Request.create(
        scope.get("method", "GET"),
        target,
        scope["headers"],
        http_version=scope.get("http_version", "1.1"),
        peer=peer,
    )


def _quart_response(response: Response) -> QuartResponse:
    quart_response = QuartResponse(response.body or b"", response.status)
    quart_response.headers.pop("Content-Type", None)
    for name, value in response.headers:
        quart_response.headers[name] = value
    if response.body is None or response.status in (204, 304):
        quart_response.headers.pop("Content-Length", None)
    return quart_response
