"""Shutdown in four steps, within a deadline.

1. Stop accepting; ``/ready`` responds with 503.
2. Ask every stream to reconnect, each at a time of its own within the drain.
3. Let running requests end; long-polls and idle connections end at once, heads that are incomplete soon.
4. At the deadline, cancel what is left.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Awaitable, Callable

import trio

from ..concurrency import visit
from ..live.broker import Broker
from ..live.subscriber import Subscriber, reconnect_delay
from ..live.transport import Transport
from ..metrics import Counters

__all__ = ["HEAD_TIME", "Drain", "IdleConnections"]

log = logging.getLogger(__name__)


GOLDEN_RATIO = (1 + 5**0.5) / 2
HEAD_TIME = 1.0  # seconds for a request's head, or the rest of it, when the server stops


class _Idle:
    """That a connection is idle, for the length of a ``with`` block; cheaper than a generator."""

    __slots__ = ("_scope", "_scopes", "_transport")

    def __init__(
        self, scopes: dict[trio.CancelScope, Transport], scope: trio.CancelScope, transport: Transport
    ) -> None:
        self._scopes = scopes
        self._scope = scope
        self._transport = transport

    def __enter__(self) -> None:
        self._scopes[self._scope] = self._transport

    def __exit__(self, *_exception: object) -> None:
        del self._scopes[self._scope]


class IdleConnections:
    """The connections that wait for a request, or for the rest of one's head; a shutdown does not.

    Args:
        keep_alive: how long a connection may wait for a request, in seconds.
    """

    def __init__(self, keep_alive: float) -> None:
        self._keep_alive = keep_alive
        self._deadlines: dict[Transport, float] = {}  # in their order
        self._scopes: dict[trio.CancelScope, Transport] = {}
        self._heads: dict[trio.CancelScope, Transport] = {}

    @property
    def waiting(self) -> int:
        """How many connections have neither a request nor the beginning of one."""
        return len(self._deadlines) + len(self._scopes)

    async def run(self) -> None:
        """Close the connections that wait for too long."""
        while True:
            now = trio.current_time()
            while self._deadlines and (first := next(iter(self._deadlines.items())))[1] <= now:
                self._close(first[0])
            await trio.sleep_until(next(iter(self._deadlines.values()), now + self._keep_alive))

    def _close(self, transport: Transport) -> None:
        del self._deadlines[transport]
        transport.close_socket()  # ends the wait

    def begin(self, transport: Transport) -> None:
        """Close the connection, over a socket, unless ``end`` is called in time.

        That costs less than a cancel scope. Whoever waits for the request gets a ``ClosedResourceError``.
        """
        self._deadlines[transport] = trio.current_time() + self._keep_alive

    def end(self, transport: Transport) -> None:
        """Note that a connection has its request, or is closed."""
        self._deadlines.pop(transport, None)

    def add(self, scope: trio.CancelScope, transport: Transport, *, has_begun: bool = False) -> _Idle:
        """Mark a connection as idle for the length of a ``with`` block; ``close_all`` cancels ``scope``.

        ``has_begun``: a part of a head has arrived, so ``close_all`` leaves it ``HEAD_TIME`` for the rest.
        """
        return _Idle(self._heads if has_begun else self._scopes, scope, transport)

    async def close_all(self) -> None:
        """Close the connections that are idle now, and let other tasks run in between."""

        def close_waiting(transport: Transport) -> None:
            # Unless its request has arrived meanwhile.
            if transport in self._deadlines and not transport.is_readable():
                self._close(transport)

        def close(scope: trio.CancelScope) -> None:
            transport = self._scopes.get(scope)
            if transport is not None and not transport.is_readable():
                scope.cancel()
            elif transport is not None or scope in self._heads:
                # A request has arrived meanwhile, or a part of its head.
                scope.deadline = min(scope.deadline, trio.current_time() + HEAD_TIME)

        await visit([*self._deadlines], close_waiting)
        await visit([*self._scopes, *self._heads], close)


class Drain:
    """Ends a server's connections.

    Args:
        seconds: from the start of the drain to its deadline.
        stopping: is set at its start.
        broker: has the streams.
        idle: the connections without a request.
        counters: says how many connections are left.
        stop_http2: closes the idle HTTP/2 connections, and the others after their requests.
    """

    def __init__(
        self,
        seconds: float,
        *,
        stopping: trio.Event,
        broker: Broker,
        idle: IdleConnections,
        counters: Counters,
        stop_http2: Callable[[], Awaitable[None]],
    ) -> None:
        self._seconds = seconds
        self._stopping = stopping
        self._broker = broker
        self._idle = idle
        self._counters = counters
        self._stop_http2 = stop_http2
        self._no_connections = trio.Event()
        self._is_closed = False  # the listeners are: no connection is added

    def connection_closed(self) -> None:
        """Note that a connection has ended."""
        if self._is_closed and not self._counters.connections:
            self._no_connections.set()

    async def run(self, close_listeners: Callable[[], Awaitable[None]], connections: trio.Nursery) -> None:
        """Run the four steps; returns when all connections have ended, or at the deadline."""
        deadline = trio.current_time() + self._seconds
        # 1. Accepting has been cancelled already.
        self._stopping.set()
        await close_listeners()
        self._is_closed = True
        self.connection_closed()
        # 2. The streams.
        await self._ask_to_reconnect()
        # 3. The requests.
        self._broker.notify_all()
        await self._idle.close_all()
        await self._stop_http2()
        # Cancelling thousands of streams takes a while.
        with trio.move_on_at(deadline - max(0.25, self._seconds / 8)):
            await self._no_connections.wait()
        # 4. The rest.
        if self._counters.connections:
            log.info("cancelling %d connections at the deadline", self._counters.connections)
        connections.cancel_scope.cancel()
        with trio.move_on_at(deadline - 0.1):
            await self._no_connections.wait()

    async def _ask_to_reconnect(self) -> None:
        def ask(slot: float, subscriber: Subscriber) -> None:
            subscriber.ask_to_reconnect(reconnect_delay(self._seconds, slot))

        def ask_late(subscriber: Subscriber) -> None:
            ask(random.random(), subscriber)  # noqa: S311 - no secret

        streams = self._broker.watchers.total
        log.info("stopping; open connections: %d, streams: %d", self._counters.connections, streams)
        self._broker.begin_drain(ask_late)
        # Multiples of the golden ratio are evenly spread, however many there are (Weyl's theorem).
        slots = itertools.count(0, GOLDEN_RATIO)
        await self._broker.visit_subscribers(lambda subscriber: ask(next(slots) % 1, subscriber))
