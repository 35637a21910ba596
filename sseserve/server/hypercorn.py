"""Serves the web app over HTTP/2, with Hypercorn's parts."""

from __future__ import annotations

import logging

from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext

from ..live.transport import Transport
from ..web.app import WebApp
from .http2 import Http2Connection

__all__ = ["Http2Gateway"]

MAX_MESSAGE = 4096  # bytes of a WebSocket message; watchers have nothing to send


class Http2Gateway:
    """Serves HTTP/2 connections.

    Args:
        app: the application.
        keep_alive: how long a connection may be idle, in seconds.
        send_timeout: how long one write may take, in seconds.
        ping_interval: after how many seconds a WebSocket gets its next ping.
    """

    def __init__(self, app: WebApp, *, keep_alive: float, send_timeout: float, ping_interval: float) -> None:
        self._app = ASGIWrapper(app)
        self._keep_alive = keep_alive
        self._send_timeout = send_timeout
        self._config = Config()
        self._config.include_server_header = False
        self._config.errorlog = logging.getLogger("sseserve.hypercorn")
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
            send_timeout=self._send_timeout,
        )
        if self._is_stopping:
            connection.stop()
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)

    def stop(self) -> None:
        """Close the idle connections, and the others after their requests."""
        self._is_stopping = True
        for connection in self._connections:
            connection.stop()
