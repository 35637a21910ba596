"""For those who run the server: health, readiness and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice

import msgspec
import trio

from ..errors import Unavailable
from ..http.messages import Request, Response, json_response
from ..http.routing import Match
from ..http.schemas import Health, Ready
from ..live.broker import Broker
from ..metrics import Counters
from ..progress.tracker import Tracker
from .dispatch import Handler
from .metrics import Metrics

__all__ = ["OperationsHandlers"]

MOST_WATCHED = 100  # sessions whose watchers are counted
COUNT_TIMEOUT = 0.5  # seconds to wait for the number of sessions: probes give up after one


class OperationsHandlers:
    """The handlers of operations.

    Args:
        version: of this package.
        instance: the id of this instance, as in the counts of a session's watchers.
        tracker: counts the sessions.
        broker: counts the watchers.
        counters: of connections.
        metrics: writes the samples.
        stopping: is set when the server begins to stop.
        shows_ids: returns whether everybody may know which sessions are watched.
    """

    def __init__(
        self,
        version: str,
        instance: str,
        tracker: Tracker,
        broker: Broker,
        counters: Counters,
        metrics: Metrics,
        *,
        stopping: trio.Event,
        shows_ids: Callable[[], bool],
    ) -> None:
        self._version = version
        self._instance = instance
        self._tracker = tracker
        self._broker = broker
        self._counters = counters
        self._metrics = metrics
        self._stopping = stopping
        self._shows_ids = shows_ids
        self._started_at = time.monotonic()
        self._sessions: int | None = None  # as of the last time that the engine could say

    def handlers(self) -> dict[str, Handler]:
        """The handlers by the names that the table of routes has for them."""
        return {"health": self.health, "ready": self.ready, "metrics": self.metrics}

    async def describe(self) -> Health:
        """Return what the process is doing, without any session's id."""
        watchers = self._broker.watchers
        streams = sum(n for encoding, n in watchers.by_encoding.items() if encoding.protocol == "sse")
        return Health(
            version=self._version,
            instance=self._instance,
            uptime=round(time.monotonic() - self._started_at, 1),
            connections=self._counters.connections,
            streams=streams,
            sockets=watchers.total - streams,
            sessions=await self._count_sessions(),
        )

    async def _count_sessions(self) -> int | None:
        """Return how many sessions there are, or were when the engine could last say."""
        with trio.move_on_after(COUNT_TIMEOUT), suppress(Unavailable):
            self._sessions = await self._tracker.engine.count()
        return self._sessions

    async def health(self, _request: Request, _match: Match) -> Response:
        health = await self.describe()
        if self._shows_ids():
            watched = dict(islice(self._broker.watchers.most_watched(), MOST_WATCHED))
            health = msgspec.structs.replace(health, connections_per_job=watched)
        return json_response(200, health)

    async def ready(self, _request: Request, _match: Match) -> Response:
        if self._stopping.is_set():
            raise Unavailable("the server is shutting down")
        if (problem := self._tracker.engine.problem) is not None:
            raise Unavailable(problem)
        return json_response(200, Ready())

    async def metrics(self, _request: Request, _match: Match) -> Response:
        media_type = "text/plain; version=0.0.4; charset=utf-8"
        return Response(200, self._metrics.render(), (("Content-Type", media_type),))
