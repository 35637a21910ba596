"""A running server: ``serve`` for Trio programs, ``run`` for processes."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Self, Unpack

import trio

from ..auth import open_authenticator
from ..concurrency import raise_single_error, require_trio
from ..config import SettingFields, Settings, ignored_variables, override, service_variables
from ..demo.worker import run_demos
from ..engines import EngineListener, open_engine
from ..errors import ConfigError
from ..extras import required_by
from ..http.admission import Authenticate
from ..http.origins import is_loopback
from ..http.publishing import EventPublisher
from ..http.routing import Route
from ..logs import configure
from ..progress.queue import Runner
from ..progress.tracker import Tracker

with required_by("the server", "server"):
    from ..web.app import WebApp
    from .application import Application
    from .garbage import collect_garbage, tune_collector
    from .listener import Listener, adopt, listen_beside, open_listeners, reserve
    from .supervision import supervise
    from .tls import open_certificates
    from .workers import Worker, check_shared, run_workers

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
        return _url(self.host, self.port, is_tls=self.app.certificates is not None)

    def stop(self) -> None:
        """Begin the drain: streams are asked to reconnect, requests end."""
        self._listener.stop()


class serve(AbstractAsyncContextManager["Server"]):  # noqa: N801 - reads as a verb: async with sseserve.serve(...)
    """Run a server for the length of an ``async with`` block, which gets the ``Server``.

    Args:
        settings: of the server; or their fields by name, which override it. Port 0 takes a free port.
        runner: runs the jobs of ``POST /api/jobs``; None: Demo Mode, which makes a film.
        authenticate: returns the grant of a request, see ``http.auth``; None: its token does, see ``auth``,
            or without a key everybody may do everything.
        routes: rows that are added to the table of routes, such as those of another dialect.

    Leaving the block drains the server. If the server fails, the block is cancelled. An error of the block,
    or the server's, is raised as it is; both together are raised as a group.

    Raises:
        ConfigError: a setting is unknown or invalid, a row of ``routes`` cannot be served, the engine
            cannot be opened, or everybody on other machines could do everything without ``insecure``.
        OSError: the address or the port cannot be listened on.
        RuntimeError: the program does not run on Trio.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        runner: Runner | None = None,
        authenticate: Authenticate | None = None,
        routes: Sequence[Route] = (),
        **fields: Unpack[SettingFields],
    ) -> None:
        settings = override(Settings() if settings is None else _checked(settings), fields)
        for name, function in (("authenticate", authenticate), ("runner", runner)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be an async function, not {function!r}")
        if settings.workers > 1:
            raise ConfigError(
                f"workers = {settings.workers}: a program is one process; several are of the command, "
                "as in sseserve serve --workers 2"
            )
        self._server = _serve(settings, runner, authenticate, routes)

    async def __aenter__(self) -> Server:
        return await self._server.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._server.__aexit__(kind, error, trace)

    def __await__(self) -> Self:
        raise TypeError("use it as: async with sseserve.serve(...) as server")


@asynccontextmanager
async def _serve(
    settings: Settings,
    runner: Runner | None = None,
    authenticate: Authenticate | None = None,
    routes: Sequence[Route] = (),
    *,
    worker: Worker | None = None,
) -> AsyncGenerator[Server]:
    require_trio("sseserve.serve")
    if worker is None:
        _check_access(settings, is_open=authenticate is None)
        listeners = await open_listeners(settings.host, settings.port)
    else:
        listeners = list(map(adopt, worker.listeners))
    port = listeners[0].socket.getsockname()[1]
    try:
        with raise_single_error():
            async with trio.open_nursery() as nursery:
                app = Application(
                    settings,
                    nursery,
                    runner=runner,
                    authenticate=authenticate,
                    routes=routes,
                    worker=None if worker is None else worker.number,
                )
                listener = app.listen(listeners)
                await nursery.start(app.engine.run)
                await nursery.start(app.coordination.run)
                for service in app.background_services():
                    nursery.start_soon(service)
                await nursery.start(listener.run)
                try:
                    yield Server(app, listener, settings.host, port)
                finally:
                    listener.stop()
                    # Bounded by the drain's own deadline.
                    with trio.CancelScope(shield=True):
                        await listener.stopped.wait()
                    nursery.cancel_scope.cancel()
    finally:
        for socket_listener in listeners:
            socket_listener.socket.close()


def _url(host: str, port: int, *, is_tls: bool) -> str:
    return f"{'https' if is_tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def _checked(settings: object) -> Settings:
    if isinstance(settings, Settings):
        return settings
    raise TypeError(
        f"the settings must be a sseserve.Settings, not of type {type(settings).__name__}; "
        "or name them, as in serve(host='127.0.0.1', port=8000)"
    )


def run(settings: Settings, *, with_demo: bool = False) -> None:
    """Run a server until SIGTERM, SIGINT or SIGHUP; returns when it has drained.

    Raises:
        ConfigError: the engine cannot be opened, or cannot be shared by several workers, a key cannot be
            used, or everybody on other machines could do everything without ``insecure``.
        OSError: the address or the port cannot be listened on.
        ChildProcessError: workers cannot be started.
    """
    settings = _checked(settings)
    configure(settings.log_level, settings.log_format)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    tune_collector()
    for sentence in ignored_variables(os.environ):
        log.warning("%s", sentence)
    if names := service_variables(os.environ):
        log.info("%s: not read, they are of Kubernetes Services and no settings", ", ".join(names))
    if settings.workers > 1:
        _run_workers(settings)
    else:
        trio.run(_main, settings, with_demo)
    gc.freeze()  # the process ends: what thousands of cancelled tasks have left need not be collected


def _run_workers(settings: Settings) -> None:
    """Run the workers of a server on one port, which this process reserves."""
    check_shared(settings.engine_url, settings.workers)
    _check_access(settings)
    # Refuse a wrong URL and a wrong key, and import once what each worker needs; nothing is connected.
    open_engine(settings, EngineListener())
    open_authenticator(settings)
    is_tls = open_certificates(settings.tls_cert, settings.tls_key) is not None
    gc.freeze()
    reserved = reserve(settings.host, settings.port)
    url = _url(settings.host, reserved[0].getsockname()[1], is_tls=is_tls)

    def main(worker: Worker) -> None:
        configure(settings.log_level, settings.log_format, worker.number)
        trio.run(_main, settings, False, worker)

    run_workers(
        settings.workers,
        main,
        listen=partial(listen_beside, reserved),
        drain=settings.drain,
        on_serving=lambda: log.info("serving at %s with %d workers", url, settings.workers),
    )


def _check_access(settings: Settings, *, is_open: bool = True) -> None:
    """Raise ConfigError if everybody on other machines could do everything, unless that is wanted."""
    if not is_open or settings.has_token_keys or is_loopback(settings.host.lower()):
        return
    what = f"without authentication everybody who can reach {settings.host!r} may do everything"
    if not settings.insecure:
        raise ConfigError(
            f"{what}: set jwt_key (SSESERVE_JWT_KEY), jwks_url or issuers, listen on 127.0.0.1, "
            "or allow it with insecure = true (--insecure, SSESERVE_INSECURE)"
        )
    log.warning("%s (setting insecure)", what)


async def _main(settings: Settings, with_demo: bool, worker: Worker | None = None) -> None:
    numbers = {signal.SIGTERM}
    if worker is None:
        numbers.add(signal.SIGINT)
        # A closed terminal sends SIGHUP. There is nothing to reload; one started by nohup(1) ignores it.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.add(signal.SIGHUP)
    with trio.open_signal_receiver(*numbers) as signals:
        if worker is not None:
            worker.accept_signals()
        async with _serve(settings, worker=worker) as server:
            server.app.nursery.start_soon(_stop_on_signal, server, signals)
            server.app.nursery.start_soon(collect_garbage, server.app.counters.loop_lag)
            if worker is not None:
                server.app.nursery.start_soon(_stop_with_parent, server, worker)
                worker.report()
            elif with_demo:
                demos = partial(
                    run_demos,
                    server.tracker,
                    server.app.artifacts,
                    instance=server.app.coordination.instance,
                )
                server.app.nursery.start_soon(supervise, "demo", demos, server.app.counters)
                print(f"Watch a job at {server.url}/", flush=True)  # noqa: T201 - the command's output
            else:
                log.info("serving at %s", server.url)
            await server.app.stopping.wait()


async def _stop_on_signal(server: Server, signals: AsyncIterator[int]) -> None:
    # A second signal changes nothing; if nobody received it, it would be delivered after the drain.
    async for number in signals:
        is_stopping = "; the server is already stopping" if server.app.stopping.is_set() else ""
        log.info("got %s%s", signal.Signals(number).name, is_stopping)
        server.stop()


async def _stop_with_parent(server: Server, worker: Worker) -> None:
    await trio.lowlevel.wait_readable(worker.link)
    server.stop()
