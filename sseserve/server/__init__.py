"""A running server: ``serve`` for Trio programs, ``run`` for processes."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec
import trio

from ..config import Settings, ignored_variables
from ..demo.worker import run_demos
from ..errors import ConfigError
from ..http.admission import Authenticate
from ..http.publishing import EventPublisher
from ..http.routing import Route
from ..logs import configure
from ..progress.queue import Runner
from ..progress.tracker import Tracker
from ..web.app import WebApp
from .application import Application
from .listener import Listener, open_listeners

__all__ = ["Server", "run", "serve"]

log = logging.getLogger(__name__)


class Server:
    """A server that is up. ``tracker`` is where work in this process publishes."""

    def __init__(self, app: Application, listener: Listener, host: str, port: int) -> None:
        self.app = app
        self.host = host
        self.port = port
        self._listener = listener

    @property
    def tracker(self) -> Tracker:
        """The rules and the log: ``await server.tracker.update("job-1", progress=40)``."""
        return self.app.tracker

    @property
    def events(self) -> EventPublisher:
        """Typed events: ``await server.events.publish("session-1", "transcription", {"text": "..."})``."""
        return self.app.events

    @property
    def asgi_app(self) -> WebApp:
        """The ASGI application (for Trio), to be mounted in a server of one's own."""
        return self.app.web

    @property
    def url(self) -> str:
        """The base URL, without a slash at the end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def stop(self) -> None:
        """Begin the drain: streams are asked to reconnect, requests end."""
        self._listener.stop()


class serve:  # noqa: N801 - reads as a verb: async with sseserve.serve(...) as server
    """Run a server for the length of an ``async with`` block, which gets the ``Server``.

    Args:
        settings: of the server; or their fields by name. Port 0 takes a free port.
        runner: runs the jobs of ``POST /api/jobs``; None: Demo Mode, which makes a film.
        authenticate: returns the grant of a request, see ``http.auth``; None: everybody may do everything.
        routes: rows that are added to the table of routes, such as those of another dialect.

    Leaving the block drains the server.

    Raises:
        ConfigError: a setting is unknown or invalid, or a row of ``routes`` cannot be served.
        OSError: the address or the port cannot be listened on.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        runner: Runner | None = None,
        authenticate: Authenticate | None = None,
        routes: Sequence[Route] = (),
        **fields: Any,
    ) -> None:
        from ..config import load

        self._runner = runner
        self._authenticate = authenticate
        self._routes = routes
        self._settings = load(environ={}, flags=fields) if settings is None else settings
        if settings is not None and fields:
            self._settings = msgspec.structs.replace(settings, **fields)

    async def __aenter__(self) -> Server:
        listeners = await open_listeners(self._settings.host, self._settings.port)
        self._manager = trio.open_nursery()
        nursery = await self._manager.__aenter__()
        try:
            app = Application(
                self._settings,
                nursery,
                runner=self._runner,
                authenticate=self._authenticate,
                routes=self._routes,
            )
        except ConfigError:
            for listener in listeners:
                await trio.aclose_forcefully(listener)
            await self._manager.__aexit__(None, None, None)
            raise
        self._listener = app.listen(listeners)
        self._done = trio.Event()
        self._nursery = nursery
        for service in app.background_services():
            nursery.start_soon(service)
        await nursery.start(self._run)
        port = listeners[0].socket.getsockname()[1]
        return Server(app, self._listener, self._settings.host, port)

    async def _run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            await self._listener.run(task_status=task_status)
        finally:
            self._done.set()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._listener.stop()
        # Bounded by the drain's own deadline.
        with trio.CancelScope(shield=True):
            await self._done.wait()
        self._nursery.cancel_scope.cancel()
        # Without the block's own error, which is then raised as it is and not in a group.
        await self._manager.__aexit__(None, None, None)
        return None

    def __await__(self) -> Self:
        raise TypeError("use it as: async with sseserve.serve(...) as server")


def run(settings: Settings, *, with_demo: bool = False) -> None:
    """Run a server until SIGTERM or SIGINT; returns when it has drained.

    Raises:
        OSError: the address or the port cannot be listened on.
    """
    configure(settings.log_level, settings.log_format)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Thousands of waiting tasks are long-lived; a collector that often visits all of them costs tail latency.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    if settings.redis_host is not None:
        log.warning(
            "redis_host is set, but this version keeps its logs in memory: instances do not share them"
        )
    for sentence in ignored_variables(os.environ):
        log.warning("%s", sentence)
    trio.run(_main, settings, with_demo)


async def _main(settings: Settings, with_demo: bool) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with serve(settings) as server:
            if with_demo:
                server.app.nursery.start_soon(run_demos, server.tracker, server.app.artifacts)
                print(f"Watch a job at {server.url}/", flush=True)  # noqa: T201 - the command's output
            else:
                log.info("serving at %s", server.url)
            async for number in signals:
                log.info("got %s", signal.Signals(number).name)
                break
            # A second signal changes nothing; if nobody received it, it would be delivered after the drain.
            server.app.nursery.start_soon(_ignore, signals)


async def _ignore(signals: AsyncIterator[int]) -> None:
    async for number in signals:
        log.info("got %s; the server is already stopping", signal.Signals(number).name)
