"""Serves the web app over HTTP/2, with Hypercorn's parts."""

from __future__ import annotations

import logging

from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext

from ..concurrency import visit
from ..live.transport import Transport
from ..web.app import WebApp
from .http2 import Http2Connection

__all__ = ["Http2Gateway"]

# A larger list of header fields ends its connection: it cannot be dropped, as it changes the state of the
# compression (RFC 9113, section 10.5.1). A smaller one that is still too large gets a response.
MAX_HEADER_LIST = 64 * 1024
MARGIN = 4  # times the limit of a head
MAX_MESSAGE = 4096  # bytes of a WebSocket message; watchers have nothing to send


class Http2Gateway:
    """Serves HTTP/2 connections.

    Args:
        app: the application.
        max_head: limit of a request's head, in bytes; the application responds to what is larger.
        keep_alive: how long a connection may be idle, in seconds.
        request_timeout: how long the head of a request may take, in seconds.
        send_timeout: how long one write may take, in seconds.
        ping_interval: after how many seconds a WebSocket gets its next ping.
    """

    def __init__(
        self,
        app: WebApp,
        *,
        max_head: int,
        keep_alive: float,
        request_timeout: float,
        send_timeout: float,
        ping_interval: float,
    ) -> None:
        self._app = ASGIWrapper(app)
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
            transport,
            keep_alive=self._keep_alive,
            request_timeout=self._request_timeout,
            send_timeout=self._send_timeout,
        )
        if self._is_stopping:
            connection.stop()
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)

    async def stop(self) -> None:
        """Close the idle connections, and the others after their requests; let other tasks run in between."""
        self._is_stopping = True
        await visit(self._connections, Http2Connection.stop)
