"""Builds the parts of one server, and hands each what it needs.

Nothing gets the ``Application`` itself but ``serve``: what a part uses is in its constructor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import trio

from ..config import Settings
from ..demo.artifacts import ArtifactStore
from ..demo.worker import DEMO, DemoRunner
from ..dialects import Encoding, RedisChannel
from ..engines import ALL, Engine, EngineListener, open_coordination, open_engine
from ..errors import ConfigError
from ..http.admission import Admission, Authenticate, WatchRequest
from ..http.auth import Policy
from ..http.open_streams import OpenStream, OpenStreams
from ..http.origins import Origins
from ..http.proxies import TrustedProxies
from ..http.publishing import EventPublisher, Publishing
from ..http.refreshes import Refreshes
from ..http.revocations import Revocation, Revocations
from ..http.routes import ROUTES
from ..http.routing import Kind, Route, Routes
from ..http.stream_ends import describe_end, log_end, trace_end
from ..http.tickets import Tickets
from ..live.broker import Broker
from ..live.deliveries import Deliveries
from ..live.heartbeats import Heartbeats
from ..live.resume import deleted_message
from ..live.session_list import SessionList
from ..metrics import Counters, Histogram
from ..model import Event, Session
from ..progress.queue import DEFAULT_RUNNER, JobQueue, Runner
from ..progress.tracker import Tracker
from ..tracing import find_tracing
from ..version import package_version
from ..web.app import WebApp
from ..web.asyncapi import AsyncApiHandlers
from ..web.diagnostics import DiagnosticsHandlers
from ..web.dispatch import Dispatcher
from ..web.jobs import JobHandlers
from ..web.metrics import Metrics
from ..web.openapi import OpenApiHandlers
from ..web.operations import OperationsHandlers
from ..web.pages import PageHandlers
from ..web.pubsub import PubsubHandlers
from ..web.sessions import SessionHandlers
from ..web.tokens import TokenHandlers
from .connection import ConnectionServer
from .drain import Drain, IdleConnections
from .hypercorn import Http2Gateway
from .listener import Listener, default_connections
from .streams import EventStreams
from .supervision import EngineTasks, supervise
from .tls import open_certificates
from .token_keys import TokenKeys
from .websockets import WebSockets

if TYPE_CHECKING:
    from ..channels import Channels

__all__ = ["Application", "wanted_channels"]

log = logging.getLogger(__name__)

SWEEP = 1.0  # seconds between two checks of leases and retention times
REST = 4.0  # times as long as a check of leases has taken nothing is checked
STREAMS = 0.9  # of the connections, so that there are some left for publishers
SUSPENDED = 5.0  # seconds; a check that is later than that means that this process was suspended


class _Relay(EngineListener):
    """Passes on what the engine tells."""

    def __init__(self, broker: Broker, redis_lag: Histogram, clock: Callable[[], float]) -> None:
        self._broker = broker
        self._redis_lag = redis_lag
        self._clock = clock
        self.session_list: SessionList | None = None
        self.channels: Channels | None = None

    def deliver(self, session: Session, events: Sequence[Event]) -> None:
        self._broker.publish(session, events)

    def received(self, events: Sequence[Event]) -> None:
        if events:
            self._redis_lag.observe(max(self._clock() - events[0].at, 0.0))

    def removed(self, session: Session, *, own: bool = True) -> None:
        if own and self.channels is not None:
            self.channels.removed(session)
        self._broker.close(session.id, deleted_message())
        if self.session_list is not None:
            self.session_list.note_removed(session)

    def resync(self, session_id: str) -> None:
        if self.session_list is not None:
            self.session_list.resync()
        if session_id != ALL:
            self._broker.resync(session_id)

    def availability_changed(self, problem: str | None) -> None:
        self._broker.set_problem(problem)


def wanted_channels(
    settings: Settings, routes: Iterable[Route]
) -> tuple[dict[str, RedisChannel], dict[str, RedisChannel]]:
    """Return the Redis channels of other systems that are read, and those that are written, by their names.

    Raises:
        ConfigError: there is no such channel, or no Redis is named.
    """
    known = {route.dialect.name: route.dialect.redis_channel for route in routes}
    channels = {name: channel for name, channel in known.items() if channel is not None}
    read, written = settings.redis_channels, settings.redis_publish
    if read is None:
        read = () if settings.channels_url is None else tuple(channels)
    for setting, names in (("redis_channels", read), ("redis_publish", written)):
        if unknown := set(names) - channels.keys():
            raise ConfigError(
                f"{setting} cannot have {min(unknown)!r}: there are {', '.join(sorted(channels))}"
            )
    if (read or written) and settings.channels_url is None:
        raise ConfigError("redis_channels and redis_publish need a Redis: name it with redis_url")
    return {name: channels[name] for name in read}, {name: channels[name] for name in written}


class Application:
    """The parts of one server.

    Args:
        settings: of the server.
        nursery: runs the broker's tasks and the jobs; it is cancelled when the server has stopped.
        runner: runs the queued jobs; None: demonstrations.
        authenticate: returns the grant of a request; None: its token does, if the settings have a key.
        routes: rows that are added to the table.
        clock: returns POSIX seconds.
        make_engine: returns the engine; None: the one that the settings name.
        worker: the number of this process, if it is one of several on the port.
        hosts: the addresses that it listens on, none if it is a unix socket; None: the setting ``host``.
    """

    def __init__(
        self,
        settings: Settings,
        nursery: trio.Nursery,
        *,
        runner: Runner | None = None,
        authenticate: Authenticate | None = None,
        routes: Sequence[Route] = (),
        clock: Callable[[], float] = time.time,
        make_engine: Callable[[Settings, EngineListener], Engine] | None = None,
        worker: int | None = None,
        hosts: Sequence[str] | None = None,
    ) -> None:
        self.settings = settings
        self.nursery = nursery
        self.listener: Listener | None = None
        self.stopping = trio.Event()
        self.counters = Counters()
        self.routes = Routes((*ROUTES, *routes))

        # Sessions and their watchers
        self.heartbeats = Heartbeats(
            interval=settings.heartbeat, max_age=settings.max_age, idle_timeout=settings.idle_timeout
        )
        self.broker = Broker(
            nursery,
            settings,
            self.heartbeats,
            throttle=settings.throttle,
            deliveries=Deliveries(clock),
        )
        relay = _Relay(self.broker, self.counters.redis_lag, clock)
        self.engine = (make_engine or open_engine)(settings, relay)
        self.broker.attach(self.engine)
        self.coordination = open_coordination(settings, self.engine, self.broker.count_watchers, clock)
        self.broker.watchers.on_watcher = self.coordination.note_watchers
        self._engine_tasks = EngineTasks(self.engine)
        self.tracker = Tracker(
            self.engine,
            auto_create=settings.auto_create,
            max_sessions=settings.max_sessions,
            max_event=settings.max_event,
            reserved=self.routes.reserved_events,
            clock=clock,
        )
        self.tracker.on_record = self._note_record

        # Jobs
        if runner is not None and settings.job_workers == "remote":
            raise ConfigError("a runner cannot be combined with job_workers = 'remote': nothing would run it")
        self.artifacts = ArtifactStore()
        demo = DemoRunner(self.artifacts, settings.demo_seconds)
        runners: dict[str, Runner] = {DEMO: demo}
        if settings.job_workers == "server":
            runners[DEFAULT_RUNNER] = runner or demo
        self.queue = JobQueue(
            self.tracker,
            nursery,
            runners,
            self.coordination,
            stopping=self.stopping,
            max_running=settings.max_running_jobs,
            max_waiting=settings.max_waiting_jobs,
        )

        # Requests
        self._token_keys = TokenKeys(
            settings, nursery, self.counters, by_program=authenticate is not None, clock=clock
        )
        reader = self._token_keys.authenticator
        authenticate = authenticate or reader
        special: dict[str, Authenticate] = {}
        if self._token_keys.push is not None:
            special["pubsub"] = self._token_keys.push
        self.revocations = Revocations()
        policy = self._policy = Policy(settings.roles)
        self._proxies = TrustedProxies(settings.trusted_proxies, settings.proxy_header)
        self.open_streams = OpenStreams(
            self.coordination,
            policy,
            self.revocations,
            settings,
            max_streams=_max_streams(settings),
            clock=clock,
            find=self.engine.load,
            trusts=None if reader is None else reader.trusts,
        )
        self.open_streams.on_end = self._note_stream_end
        self.coordination.on_revocation = self._note_revocation
        self.refreshes = Refreshes(self.open_streams, self.coordination)
        tickets = Tickets(self.coordination, self.open_streams.check, clock=clock)
        origins = self._origins = Origins(
            [settings.host] if hosts is None else hosts,
            allowed_hosts=settings.allowed_hosts,
            cors_origins=settings.cors_origins,
        )
        self.admission = Admission(
            self.tracker,
            self.open_streams,
            origins,
            tickets,
            authenticate=authenticate,
            special=special,
            enable_sse=settings.enable_sse,
            limits=settings,
        )
        publishing = Publishing(
            self.tracker,
            self.broker,
            max_body=settings.max_body,
            auto_create=settings.auto_create,
            policy=policy,
            pace=self.admission.pace,
        )
        self.channels = relay.channels = self._open_channels(settings, publishing)
        self.events = EventPublisher(publishing, self.routes["interact"])
        self._reconnect_within = settings.drain  # seconds, when the server stops
        version = package_version()
        operations = OperationsHandlers(
            version,
            self.coordination.instance,
            self.tracker,
            self.broker,
            self.counters,
            Metrics(self.counters, self.broker, self.open_streams.opened, self.queue, self.tracker, worker),
            stopping=self.stopping,
            shows_ids=lambda: self.admission.is_open,
        )
        self.session_list = relay.session_list = SessionList(self.engine, self.broker, operations.describe)
        max_body = settings.max_body
        sessions = SessionHandlers(
            self.tracker,
            self.broker,
            self.queue,
            self.coordination,
            policy,
            max_body=max_body,
            buffer_bytes=settings.buffer_bytes,
            stopping=self.stopping,
        )
        jobs = JobHandlers(
            self.tracker,
            self.queue,
            policy,
            max_body=max_body,
            stopping=self.stopping,
            open_poll=self.admission.open_poll,
        )
        tokens = self._tokens = TokenHandlers(
            self.admission,
            tickets,
            self.refreshes,
            self.coordination,
            wait_revoked=self.open_streams.wait_revoked,
            max_lifetime=settings.max_token_lifetime,
            max_body=max_body,
            clock=clock,
        )
        self.diagnostics = DiagnosticsHandlers(
            version,
            self.coordination.instance,
            heartbeat=max(self.heartbeats.interval(r.dialect) for r in self.routes if r.kind is Kind.STREAM),
            proxy_header=settings.proxy_header if settings.trusted_proxies else "",
            stopping=self.stopping,
            drain=settings.drain,
            clock=clock,
        )
        pubsub = PubsubHandlers(self.tracker, publishing, self.counters, max_body=max_body)
        self._tracing = find_tracing()
        dispatcher = self._dispatcher = Dispatcher(
            self.routes,
            {
                **sessions.handlers(),
                **jobs.handlers(),
                **pubsub.handlers(),
                **tokens.handlers(),
                **self.diagnostics.handlers(),
                **PageHandlers(self.tracker, demo).handlers(),
                **operations.handlers(),
                **OpenApiHandlers(self.routes, version).handlers(),
                **AsyncApiHandlers(self.routes, version).handlers(),
            },
            publishing=publishing,
            admission=self.admission,
            counters=self.counters,
            cors_origins=settings.cors_origins,
        )
        if self._tracing is not None:
            dispatcher.tracing = self.tracker.tracing = self.queue.tracing = self._tracing
            self.broker.trace(self._tracing)

        # Connections
        self.certificates = open_certificates(settings.tls_cert, settings.tls_key)
        self.web = WebApp(
            dispatcher,
            self.tracker,
            self.broker,
            self.admission,
            self._proxies,
            self._read_pages,
            nursery,
            retry_ms=settings.retry_ms,
            max_head=settings.max_head,
            request_timeout=settings.request_timeout,
            ndjson_timeout=settings.ndjson_timeout,
            send_timeout=settings.send_timeout,
        )
        streams = EventStreams(
            self.tracker,
            self.broker,
            self.admission,
            self._read_pages,
            nursery,
            finish=dispatcher.finish,
            retry_ms=settings.retry_ms,
            send_timeout=settings.send_timeout,
        )
        sockets = [route.dialect for route in self.routes if route.kind is Kind.SOCKET]
        self.http2 = Http2Gateway(
            self.web,
            streams,
            self.routes,
            self._proxies,
            max_head=settings.max_head,
            keep_alive=settings.keep_alive,
            request_timeout=settings.request_timeout,
            send_timeout=settings.send_timeout,
            ping_interval=min(map(self.heartbeats.interval, sockets)),
            clock=clock,
        )
        self.idle = IdleConnections(settings.keep_alive)
        self.connections = ConnectionServer(
            dispatcher,
            streams,
            WebSockets(
                self.tracker,
                self.broker,
                self.admission,
                self._read_pages,
                finish=dispatcher.finish,
                send_timeout=settings.send_timeout,
            ),
            self.http2.serve,
            self.idle,
            self._proxies,
            self.certificates,
            self.broker.flush,
            stopping=self.stopping,
            max_head=settings.max_head,
            keep_alive=settings.keep_alive,
            request_timeout=settings.request_timeout,
            ndjson_timeout=settings.ndjson_timeout,
            send_timeout=settings.send_timeout,
            clock=clock,
        )
        self._drain = Drain(
            settings.drain,
            stopping=self.stopping,
            broker=self.broker,
            idle=self.idle,
            counters=self.counters,
            stop_http2=self.http2.stop,
        )

    def _note_revocation(self, message: bytes) -> None:
        """Take note of a revocation, which any instance has stored."""
        try:
            revocation = msgspec.msgpack.decode(message, type=Revocation)
        except msgspec.DecodeError:
            log.error("a revocation cannot be read; has another version of this program stored it?")
            return
        self.revocations.add(revocation)

    def _note_record(self, session: Session, event: Event) -> None:
        """Count what this instance has recorded. The engine need not deliver that as its own."""
        self.counters.events += 1
        if (progress := event.progress) is not None and progress.state.terminal:
            started_at = progress.started_at or progress.updated_at
            self.counters.count_end(progress.state.value, max(progress.updated_at - started_at, 0))
        if self.channels is not None:
            self.channels.recorded(session, event)

    def _note_stream_end(self, stream: OpenStream, error: BaseException | None) -> None:
        """Count and log a stream that has ended."""
        if (end := describe_end(stream, error, is_stopping=self.stopping.is_set())) is not None:
            self.counters.count_stream(end.transport, end.dialect, end.reason.value, end.seconds)
            log_end(end)
            if self._tracing is not None:
                trace_end(self._tracing, end)

    def _open_channels(self, settings: Settings, publishing: Publishing) -> Channels | None:
        """Return what reads and writes the Redis channels that the settings name; None: they name none."""
        read, written = wanted_channels(settings, self.routes)
        url = settings.channels_url
        if url is None or not (read or written):
            return None
        # They need coredis, which is optional.
        from ..channels import Channels
        from ..engines.redis.client import client_for

        opened = Channels(
            client_for(url, self.engine),
            read,
            written,
            publishing=publishing,
            tracker=self.tracker,
            counters=self.counters,
            max_body=settings.max_body,
            instance=self.coordination.instance,
            is_shared=settings.is_shared,
        )
        self.broker.watchers.on_change = opened.note_watchers
        self.tracker.find_elsewhere = opened.find
        return opened

    def _read_pages(
        self, watch: WatchRequest, encoding: Encoding, stream: OpenStream
    ) -> AsyncGenerator[bytes]:
        """Return what a stream sends that is not one of sessions."""
        if watch.probe is not None:
            return self.diagnostics.pages(watch.probe, encoding)
        if watch.unavailable is not None:
            interval = self.heartbeats.interval(encoding.dialect)
            return self.broker.availability.pages(
                encoding, watch.unavailable, interval, self.stopping, self._reconnect_within
            )
        return self.session_list.pages(encoding, stream.visible_now, self.stopping, self._reconnect_within)

    def listen(self, listeners: Sequence[trio.abc.Listener[trio.abc.Stream]]) -> Listener:
        """Return what serves the connections of ``listeners``."""
        self.listener = Listener(
            listeners,
            self.connections.serve,
            self._drain,
            self.counters,
            max_connections=_max_connections(self.settings),
            max_per_address=self.settings.max_connections_per_address,
            limited=self._limited_connection,
            speaks_tls=self.certificates is not None,
        )
        return self.listener

    def _limited_connection(self, address: str) -> str | None:
        """Return by which name the connections of an address are counted; those of a proxy are not."""
        return None if self._proxies.trusts(address) else self.admission.limited(address)

    def background_services(self) -> list[Callable[[], Awaitable[None]]]:
        """Return the tasks that run as long as the server does."""
        services: dict[str, Callable[[], Awaitable[None]]] = {
            "heartbeats": self.heartbeats.run,
            "idle connections": self.idle.run,
            "leases": self._check_leases,
            "retention": self._expire,
            "jobs": self.queue.run,
            "tokens": self.open_streams.run,
            "refreshes": self.refreshes.run,
        }
        if self.certificates is not None:
            services["certificates"] = self.certificates.run
        if self.channels is not None:
            services["channels"] = self.channels.run
        supervised = [partial(supervise, name, service, self.counters) for name, service in services.items()]
        return supervised + self._token_keys.services()

    def reload(self, settings: Settings) -> None:
        """Go on with other settings. Open streams go on, unless their tokens or roles do not allow them now.

        Args:
            settings: differ from those of this server only where a running server can take them.

        Raises:
            ConfigError: a key or a certificate cannot be used. Nothing has changed then.
        """
        if self.certificates is not None:
            self.certificates.reload()
        if (reader := self._token_keys.replace(settings)) is not None:
            self.admission.authenticate = reader
            self.open_streams.trusts = reader.trusts
        self._policy.set_roles(settings.roles)
        self._origins.reload(allowed_hosts=settings.allowed_hosts, cors_origins=settings.cors_origins)
        self._dispatcher.cors_origins = settings.cors_origins
        self.admission.set_limits(settings)
        self.open_streams.set_limits(settings, max_streams=_max_streams(settings))
        self._tokens.max_lifetime = settings.max_token_lifetime
        if self.listener is not None:
            self.listener.max_connections = _max_connections(settings)
            self.listener.max_per_address = settings.max_connections_per_address
        self.settings = settings
        self.nursery.start_soon(self.open_streams.judge)

    async def _check_leases(self) -> None:
        """Judge the leases, for ever, while this instance leads and producers can publish."""
        has_judged, took = self.coordination.is_leader, 0.0
        while True:
            due = trio.current_time() + max(SWEEP, REST * took)
            await trio.sleep_until(due)
            began = trio.current_time()
            restart = not has_judged or trio.current_time() > due + SUSPENDED
            has_judged = False
            if self.coordination.is_leader and self.engine.problem is None:
                has_judged = await self._engine_tasks.attempt(
                    "leases", self.tracker.check_leases(restart=restart)
                )
            else:
                self.tracker.forget_leases()
            took = trio.current_time() - began

    async def _expire(self) -> None:
        """Delete the sessions whose retention time is over, for ever."""
        while True:
            await trio.sleep(SWEEP)
            await self._engine_tasks.attempt("retention", self.engine.expire(self.broker.is_watched))


def _max_connections(settings: Settings) -> int:
    return settings.max_connections or default_connections()


def _max_streams(settings: Settings) -> int:
    return settings.max_streams or max(1, int(_max_connections(settings) * STREAMS))
