"""Hands a connection that speaks HTTP/2 to Hypercorn, which runs the web app."""

from __future__ import annotations

import logging

from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext

from ..live.transport import Transport
from ..web.app import WebApp
from ..web.workarounds import Http2Server

__all__ = ["Http2Gateway"]

MAX_MESSAGE = 4096  # bytes of a WebSocket message; watchers have nothing to send


class Http2Gateway:
    """Serves HTTP/2 connections.

    Args:
        app: the application.
        keep_alive: how long a connection may be idle, in seconds.
        send_timeout: how long one write may take, in seconds.
    """

    def __init__(self, app: WebApp, *, keep_alive: float, send_timeout: float) -> None:
        self._app = ASGIWrapper(app)
        self._send_timeout = send_timeout
        self._config = Config()
        self._config.keep_alive_timeout = keep_alive
        self._config.include_server_header = False
        self._config.errorlog = logging.getLogger("sseserve.hypercorn")
        self._config.websocket_max_message_size = MAX_MESSAGE
        self._worker = WorkerContext(None)

    async def serve(self, transport: Transport) -> None:
        """Serve a connection to its end; what was read of it has been pushed back."""
        await Http2Server(self._app, self._config, self._worker, transport, self._send_timeout).run()

    async def stop(self) -> None:
        """Close the idle connections, and the others after their requests."""
        await self._worker.terminated.set()
