"""A running server: ``serve`` for Trio programs, ``run`` for processes."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Self, Unpack

import msgspec
import trio

from ..concurrency import raise_single_error, require_trio
from ..config import SettingFields, Settings, ignored_variables, override, service_variables
from ..demo.worker import run_demos
from ..engines import EngineListener, open_engine
from ..errors import ConfigError
from ..extras import required_by
from ..http.admission import Authenticate
from ..http.publishing import EventPublisher
from ..http.routing import Route
from ..logs import configure, set_levels
from ..progress.queue import Runner
from ..progress.tracker import Tracker
from ..tracing import export_traces

with required_by("the server", "server"):
    from ..web.app import WebApp
    from .application import Application
    from .checks import check_access
    from .garbage import collect_garbage, tune_collector
    from .listener import Listener, adopt
    from .reload import Reloader, Terminal
    from .sockets import Sockets, listening_hosts, open_sockets, open_sockets_blocking
    from .supervision import supervise
    from .systemd import Notifier, inherited_sockets
    from .workers import Worker, Workers, check_shared

__all__ = ["Server", "run", "serve"]

log = logging.getLogger(__name__)


class Server:
    """A server that is up. ``tracker`` is where work in this process publishes.

    ``host`` and ``port`` are where it listens; of a unix socket its path and 0. ``url`` is the base URL,
    without a slash at the end; of a unix socket ``unix:PATH``.
    """

    def __init__(self, app: Application, listener: Listener, sockets: Sockets) -> None:
        self.app = app
        self.host = sockets.host
        self.port = sockets.port
        self.url = sockets.urls[0]
        self.urls = sockets.urls
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
    inherited: Sequence[socket.socket] = (),
    worker: Worker | None = None,
) -> AsyncGenerator[Server]:
    require_trio("sseserve.serve")
    hosts = listening_hosts(settings, inherited)
    if worker is None:
        check_access(settings, hosts, is_open=authenticate is None)
        sockets = await open_sockets(settings, inherited)
    else:
        sockets = Sockets(worker.listeners, is_tls=settings.tls_cert is not None)
    opened: list[socket.socket] = []
    try:
        opened = sockets.listen()
        with raise_single_error():
            async with trio.open_nursery() as nursery:
                app = Application(
                    settings,
                    nursery,
                    runner=runner,
                    authenticate=authenticate,
                    routes=routes,
                    worker=None if worker is None else worker.number,
                    hosts=hosts,
                )
                listener = app.listen(list(map(adopt, opened)))
                await nursery.start(app.engine.run)
                await nursery.start(app.coordination.run)
                for service in app.background_services():
                    nursery.start_soon(service)
                await nursery.start(listener.run)
                try:
                    yield Server(app, listener, sockets)
                finally:
                    listener.stop()
                    # Bounded by the drain's own deadline.
                    with trio.CancelScope(shield=True):
                        await listener.stopped.wait()
                    nursery.cancel_scope.cancel()
    finally:
        for listening in opened:
            listening.close()
        sockets.remove()


def _checked(settings: object) -> Settings:
    if isinstance(settings, Settings):
        return settings
    raise TypeError(
        f"the settings must be a sseserve.Settings, not of type {type(settings).__name__}; "
        "or name them, as in serve(host='127.0.0.1', port=8000)"
    )


def run(settings: Settings, *, with_demo: bool = False, reread: Callable[[], Settings] | None = None) -> None:
    """Run a server until SIGTERM, SIGINT, or its terminal is closed; returns when it has drained.

    On SIGHUP the settings are reloaded: see ``server.reload``.

    Args:
        settings: of the server.
        with_demo: it also runs demonstration jobs.
        reread: reads the settings again; None: they stay, and only files of keys are read again.

    Raises:
        ConfigError: the engine cannot be opened, or cannot be shared by several workers, a key cannot be
            used, or everybody on other machines could do everything without ``insecure``.
        OSError: the address or the port cannot be listened on.
        ChildProcessError: workers cannot be started.
    """
    settings = _checked(settings)
    configure(
        settings.log_level,
        settings.log_format,
        access_log=settings.access_log,
        in_background=settings.workers == 1,  # else this process forks, and logs little
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    tune_collector()
    for sentence in ignored_variables(os.environ):
        log.warning("%s", sentence)
    if names := service_variables(os.environ):
        log.info("Kubernetes sets these for its Services; they are no settings: %s", ", ".join(names))
    inherited = inherited_sockets(os.environ)
    notifier = Notifier(os.environ)
    process = _Process(Reloader(settings, reread), Terminal(), notifier, inherited)
    if settings.workers > 1:
        _run_workers(process)
    else:
        with export_traces(os.environ):
            trio.run(_main, process, with_demo)
    gc.freeze()  # the process ends: what thousands of cancelled tasks have left need not be collected


class _Process(msgspec.Struct):
    """What a process that serves has from outside, and what its service manager is told that it does."""

    reloader: Reloader
    terminal: Terminal
    notifier: Notifier
    inherited: list[socket.socket]
    status: str = ""

    def serves(self, status: str) -> None:
        """Tell the service manager that clients are served, and where."""
        self.status = status
        self.ready()

    def ready(self) -> None:
        """Tell it the same after a reload, which may have come early."""
        if self.status:
            self.notifier.ready(self.status)

    def hang_up(self, stop: Callable[[], None], apply: Callable[[Settings], None]) -> bool:
        """Do what a SIGHUP asks for; returns whether the settings were reloaded."""
        if not self.terminal.was_closed():
            log.info("got SIGHUP; reloading the settings")
            self.notifier.reloading()
            if self.reloader.reload(apply):
                return True
            self.ready()
        elif self.terminal.stops:
            stop()
        else:
            log.info("the terminal was closed; the server goes on, as it was started by nohup")
        return False


def _run_workers(process: _Process) -> None:
    """Run the workers of a server on one port, which this process reserves."""
    settings, inherited, notifier = process.reloader.settings, process.inherited, process.notifier
    check_shared(settings.engine_url, settings.workers)
    check_access(settings, listening_hosts(settings, inherited))
    # Refuse a wrong URL and a wrong key, and import once what each worker needs; nothing is connected.
    open_engine(settings, EngineListener())
    process.reloader.check()
    gc.freeze()
    sockets = open_sockets_blocking(settings, inherited)
    status = f"serving at {', '.join(sockets.urls)} with {settings.workers} workers"

    def main(worker: Worker) -> None:
        sockets.close()  # those of this worker are its own
        current = process.reloader.settings
        configure(current.log_level, current.log_format, worker.number, access_log=current.access_log)
        with export_traces(os.environ):
            trio.run(_main_of_worker, current, bool(inherited), worker)

    def on_serving() -> None:
        log.info("%s", status)
        process.serves(status)

    def on_stopping() -> None:
        sockets.close()  # nobody is to wait for a worker that comes no more
        notifier.stopping()

    def on_hangup(workers: Workers) -> None:
        process.hang_up(
            lambda: workers.stop("SIGHUP"), lambda settings: workers.tell(msgspec.json.encode(settings))
        )

    workers = Workers(
        settings.workers,
        main,
        listen=sockets.listen_beside,
        drain=settings.drain,
        on_serving=on_serving,
        on_stopping=on_stopping,
        on_hangup=on_hangup,
        on_told=process.ready,
        on_alive=notifier.alive,
        watchdog=notifier.watchdog,
    )
    try:
        workers.run()
    finally:
        sockets.remove()


async def _main(process: _Process, with_demo: bool) -> None:
    settings, notifier = process.reloader.settings, process.notifier
    process.reloader.check()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with _serve(settings, inherited=process.inherited) as server:
            nursery, status = server.app.nursery, f"serving at {', '.join(server.urls)}"
            nursery.start_soon(_handle_signals, server, signals, process)
            nursery.start_soon(collect_garbage, server.app.counters.loop_lag)
            if notifier.watchdog is not None:
                # A task: an event loop that hangs says nothing.
                nursery.start_soon(_repeat, notifier.alive, notifier.watchdog / 2)
            if with_demo:
                demos = partial(
                    run_demos,
                    server.tracker,
                    server.app.artifacts,
                    instance=server.app.coordination.instance,
                )
                nursery.start_soon(supervise, "demo", demos, server.app.counters)
                print(f"Watch a job at {server.url}/", flush=True)  # noqa: T201 - the command's output
            else:
                log.info("%s", status)
            process.serves(status)
            await server.app.stopping.wait()
            notifier.stopping()


async def _main_of_worker(settings: Settings, is_activated: bool, worker: Worker) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        worker.accept_signals()
        inherited = worker.listeners if is_activated else ()
        async with _serve(settings, inherited=inherited, worker=worker) as server:
            nursery = server.app.nursery
            nursery.start_soon(_handle_signals, server, signals)
            nursery.start_soon(collect_garbage, server.app.counters.loop_lag)
            nursery.start_soon(_follow_parent, server, worker)
            if worker.watchdog is not None:
                nursery.start_soon(_repeat, worker.report, worker.watchdog / 4)
            worker.report()
            await server.app.stopping.wait()


async def _repeat(function: Callable[[], None], seconds: float) -> None:
    while True:
        function()
        await trio.sleep(seconds)


async def _handle_signals(
    server: Server, signals: AsyncIterator[int], process: _Process | None = None
) -> None:
    # A second signal changes nothing; if nobody received it, it would be delivered after the drain.
    async for number in signals:
        stop = partial(_stop, server, signal.Signals(number).name)
        if number == signal.SIGHUP and process is not None and not server.app.stopping.is_set():
            if process.hang_up(stop, server.app.reload):
                process.ready()
        else:
            stop()


def _stop(server: Server, name: str) -> None:
    is_stopping = "; the server is already stopping" if server.app.stopping.is_set() else ""
    log.info("got %s%s", name, is_stopping)
    server.stop()


async def _follow_parent(server: Server, worker: Worker) -> None:
    """Do what the parent tells this worker, until that is to drain."""
    while True:
        await trio.lowlevel.wait_readable(worker.link)
        if not (message := worker.receive()):
            break
        settings = msgspec.json.decode(message, type=Settings)
        try:
            server.app.reload(settings)
        except ConfigError as error:  # a file has changed since the parent has read it
            log.error("cannot reload the settings, so nothing is changed: %s", error)
        else:
            set_levels(settings.log_level, access_log=settings.access_log)
        worker.report_done()
    server.stop()
