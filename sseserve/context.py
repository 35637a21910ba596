"""What one running server is made of: an argument of all in ``server/`` and ``web/``, never a global."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

import msgspec
import trio

from .config import Settings
from .demo.artifacts import ArtifactStore
from .demo.worker import work
from .engines import open_engine
from .events import Events
from .http.auth import Authenticate
from .http.limits import Seats
from .http.publishing import Publishing
from .http.routes import RESERVED_EVENTS
from .live.broker import Broker
from .live.resume import deleted
from .metrics import Metrics
from .progress.queue import JobQueue, Runner
from .progress.tracker import Tracker

if TYPE_CHECKING:
    from .server.hypercorn import Gateway

__all__ = ["Context"]

SWEEP = 1.0  # seconds between two looks for leases and sessions whose time is over


class Context:
    """One server: its settings, its tracker over an engine, its broker, and a few counts.

    ``nursery`` holds the broker's tasks and the demonstration jobs; it is cancelled when the server is done.
    """

    version = version("sseserve")
    gateway: Gateway  # set by the server that this is the context of

    def __init__(
        self,
        settings: Settings,
        nursery: trio.Nursery,
        runner: Runner | None = None,
        authenticate: Authenticate | None = None,
    ) -> None:
        self.settings = settings
        self.nursery = nursery
        self.authenticate = authenticate  # None: everybody may do everything
        self.broker = Broker(
            nursery,
            settings,
            heartbeat=settings.heartbeat,
            max_age=settings.max_age,
            throttle=settings.throttle,
        )
        self.engine = open_engine("memory:", settings, self.broker.publish)
        self.tracker = Tracker(
            self.engine,
            auto_create=settings.auto_create,
            max_sessions=settings.max_sessions,
            reserved=RESERVED_EVENTS,
            on_removed=lambda session: self.broker.close(session.id, deleted()),
        )
        self.publishing = Publishing(
            self.tracker, self.broker, max_body=settings.max_body, auto_create=settings.auto_create
        )
        self.artifacts = ArtifactStore()
        self.jobs = JobQueue(
            self.tracker,
            nursery,
            self.demo_mode if runner is None else runner,
            running=settings.max_running_jobs,
            waiting=settings.max_waiting_jobs,
        )
        self.events = Events(self.tracker, self.broker)
        self.bad_messages = 0  # from a Pub/Sub subscription
        self.seats = Seats(settings.max_streams_per_user)
        self.stopping = trio.Event()
        self.connections = 0
        self._idle: set[trio.CancelScope] = set()
        self.refused = 0
        self._started_at = time.monotonic()
        self.metrics = Metrics(self)

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_at

    @contextmanager
    def idling(self, scope: trio.CancelScope) -> Iterator[None]:
        """Mark a connection on which no request is under way; ``dismiss`` cancels ``scope``."""
        self._idle.add(scope)
        try:
            yield
        finally:
            self._idle.discard(scope)

    def dismiss(self) -> None:
        """End the connections on which no request is under way."""
        for scope in self._idle:
            scope.cancel()

    async def demo_mode(self, tracker: Tracker, session_id: str, data: msgspec.Raw) -> None:
        """Run a job as a demonstration: make a film. The same request makes the same film."""
        seed = int.from_bytes(hashlib.blake2b(bytes(data), digest_size=4).digest())
        pace = self.settings.demo_seconds
        await work(tracker, session_id, seed=seed, pace=pace, store=self.artifacts)

    async def sweep(self) -> None:
        """Look for silent producers, and forget the sessions whose time is over, for ever."""
        while True:
            await trio.sleep(SWEEP)
            await self.tracker.check_leases()
            await self.tracker.expire(self.broker.watched)
