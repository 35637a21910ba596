"""Serves HTTP/2: event streams as over HTTP/1.1, and the web app with Hypercorn's parts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.utils import filter_pseudo_headers

from ..concurrency import visit
from ..errors import SseserveError
from ..http.messages import Request, check_head, check_query, error_response, http_date
from ..http.proxies import TrustedProxies
from ..http.routing import Kind, Match, Routes
from ..live.transport import Transport
from ..logs import begin_context
from ..web.app import WebApp
from .http2 import Http2Connection
from .http2_frames import DataFrames
from .http2_stream import EventStreamTransport
from .streams import EventStreams

__all__ = ["Http2Gateway"]

# A larger list of header fields ends its connection: it cannot be dropped, as it changes the state of the
# compression (RFC 9113, section 10.5.1). A smaller one that is still too large gets a response.
MAX_HEADER_LIST = 64 * 1024
MARGIN = 4  # times the limit of a head
MAX_MESSAGE = 4096  # bytes of a WebSocket message; watchers have nothing to send


class Http2Gateway:
    """Serves HTTP/2 connections.

    Args:
        app: the application, for all but event streams.
        streams: serves event streams.
        routes: the table.
        proxies: say whose requests they forward.
        max_head: limit of a request's head, in bytes; the application responds to what is larger.
        keep_alive: how long a connection may be idle, in seconds.
        request_timeout: how long the head of a request may take, in seconds.
        send_timeout: how long one write may take, in seconds.
        ping_interval: after how many seconds a WebSocket gets its next ping.
        clock: returns POSIX seconds.
    """

    def __init__(
        self,
        app: WebApp,
        streams: EventStreams,
        routes: Routes,
        proxies: TrustedProxies,
        *,
        max_head: int,
        keep_alive: float,
        request_timeout: float,
        send_timeout: float,
        ping_interval: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._app = ASGIWrapper(app)
        self._streams = streams
        self._routes = routes
        self._proxies = proxies
        self._max_head = max_head
        self._clock = clock
        self._frames = DataFrames()
        self._request_timeout = request_timeout
        self._keep_alive = keep_alive
        self._send_timeout = send_timeout
        self._config = Config()
        self._config.include_server_header = False
        self._config.errorlog = logging.getLogger("sseserve.hypercorn")
        self._config.h2_max_header_list_size = max(MAX_HEADER_LIST, MARGIN * max_head)
        self._config.websocket_max_message_size = MAX_MESSAGE
        self._config.websocket_ping_interval = ping_interval
        self._worker = WorkerContext(None)
        self._connections: set[Http2Connection] = set()
        self._is_stopping = False

    async def serve(self, transport: Transport) -> None:
        """Serve a connection to its end; what was read of it has been pushed back."""
        connection = Http2Connection(
            self._app,
            self._config,
            self._worker,
            self._find_event_stream,
            self._frames,
            transport,
            keep_alive=self._keep_alive,
            request_timeout=self._request_timeout,
            send_timeout=self._send_timeout,
        )
        if self._is_stopping:
            connection.drain()
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)

    def _find_event_stream(
        self, method: bytes, path: bytes, headers: list[tuple[bytes, bytes]], transport: Transport
    ) -> Callable[[EventStreamTransport], Coroutine[Any, Any, None]] | None:
        if method != b"GET":
            return None
        match = self._routes.match("GET", path.partition(b"?")[0].decode("ascii"))
        if match is None or match.route.kind is not Kind.STREAM:
            return None
        fields = filter_pseudo_headers(headers)
        target = path.decode("latin-1")
        request = Request.create("GET", target, fields, http_version="2", peer=transport.peer)
        return partial(self._serve_event_stream, self._proxies.resolve(request), match, path, fields)

    def _serve_event_stream(
        self,
        request: Request,
        match: Match,
        target: bytes,
        fields: list[tuple[bytes, bytes]],
        transport: EventStreamTransport,
    ) -> Coroutine[Any, Any, None]:
        """Return what serves an event stream; its task keeps nothing else of the request."""
        context = begin_context(request)
        date = http_date(int(self._clock()))
        try:
            check_head(self._max_head, target, fields)
            check_query(request)
        except SseserveError as error:
            return self._streams.refuse(transport, request, error_response(error, request), date)
        context.subject = request.ids
        return self._streams.serve(transport, request, match, date)

    async def stop(self) -> None:
        """Close the idle connections, and the others after their requests; let other tasks run in between."""
        self._is_stopping = True
        await visit(self._connections, Http2Connection.drain)
