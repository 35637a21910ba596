"""A running server: ``serve`` for Trio programs, ``run`` for processes."""

from __future__ import annotations

import gc
import logging
import resource
import signal
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import msgspec
import trio

from ..config import Settings
from ..context import Context
from ..demo.worker import forever
from ..events import Events
from ..http.auth import Authenticate
from ..logs import configure
from ..progress.queue import Runner
from ..progress.tracker import Tracker
from .hypercorn import Gateway
from .listener import Listener, open_listeners

__all__ = ["Server", "run", "serve"]

log = logging.getLogger(__name__)


class Server:
    """A server that is up. ``tracker`` is where work in this process publishes."""

    def __init__(self, context: Context, listener: Listener, host: str, port: int) -> None:
        self.context = context
        self.host = host
        self.port = port
        self._listener = listener

    @property
    def tracker(self) -> Tracker:
        """The rules and the log: ``await server.tracker.update("job-1", progress=40)``."""
        return self.context.tracker

    @property
    def events(self) -> Events:
        """Typed events: ``await server.events.publish("session-1", "transcription", {"text": "..."})``."""
        return self.context.events

    @property
    def url(self) -> str:
        """Where it answers, without a slash at the end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def stop(self) -> None:
        """Begin the drain: streams are told to come back, requests end."""
        self._listener.stop()


class serve:  # noqa: N801 - reads as a verb: async with sseserve.serve(...) as server
    """Run a server for the length of an ``async with`` block, which gets the ``Server``.

    Takes ``Settings``, or their fields by name; port 0 takes a free port. ``runner`` is what runs the jobs
    of ``POST /api/jobs``, instead of Demo Mode; ``authenticate`` says who makes a request, see ``auth``,
    instead of letting everybody do everything. Leaving the block drains.

    Raises:
        ConfigError: a setting is unknown or makes no sense.
        OSError: the port cannot be had.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        runner: Runner | None = None,
        authenticate: Authenticate | None = None,
        **fields: Any,
    ) -> None:
        from ..config import load

        self._runner = runner
        self._authenticate = authenticate
        self._settings = load(environ={}, flags=fields) if settings is None else settings
        if settings is not None and fields:
            self._settings = msgspec.structs.replace(settings, **fields)

    async def __aenter__(self) -> Server:
        listeners = await open_listeners(self._settings.host, self._settings.port)
        self._manager = trio.open_nursery()
        nursery = await self._manager.__aenter__()
        context = Context(self._settings, nursery, self._runner, self._authenticate)
        context.gateway = Gateway(context)
        self._listener = Listener(context, listeners)
        self._done = trio.Event()
        self._nursery = nursery
        nursery.start_soon(context.broker.tick)
        nursery.start_soon(context.sweep)
        await nursery.start(self._run)
        port = listeners[0].socket.getsockname()[1]
        return Server(context, self._listener, self._settings.host, port)

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
        # Without the block's own error, which so comes out as it is and not in a group.
        await self._manager.__aexit__(None, None, None)
        return None

    def __await__(self) -> Self:
        raise TypeError("use it as: async with sseserve.serve(...) as server")


def run(settings: Settings, *, with_demo: bool = False) -> None:
    """Run a server until SIGTERM or SIGINT; returns when it has drained.

    Raises:
        OSError: the port cannot be had.
    """
    configure(settings.log_level, settings.log_format)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Thousands of parked tasks are long-lived; looking at all of them often is what costs tail latency.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    if settings.redis_host is not None:
        log.warning("redis_host is set, but this version keeps its logs in memory: instances do not meet")
    trio.run(_main, settings, with_demo)


async def _main(settings: Settings, with_demo: bool) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with serve(settings) as server:
            if with_demo:
                server.context.nursery.start_soon(forever, server.tracker, server.context.artifacts)
                print(f"Watch a job at {server.url}/", flush=True)  # noqa: T201 - the command's output
            else:
                log.info("serving at %s", server.url)
            async for number in signals:
                log.info("got %s", signal.Signals(number).name)
                break
            # A second one changes nothing; if nobody took it, it would be delivered when we are done.
            server.context.nursery.start_soon(_ignore, signals)


async def _ignore(signals: AsyncIterator[int]) -> None:
    async for number in signals:
        log.info("got %s; stopping already", signal.Signals(number).name)
