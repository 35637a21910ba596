"""Channels of Redis that stay subscribed to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import aclosing
from typing import Any

import trio
from coredis import exceptions
from coredis.connection import BaseConnection

from ...errors import EngineUnavailable
from . import client as client_module
from . import connection as connection_module
from .client import BACKOFF, RedisClient
from .connection import Location
from .faults import LOST, reason

__all__ = ["Subscriptions"]

MAX_CHANNELS = 1000  # in one command

log = logging.getLogger(__name__)


class Subscriptions:
    """A set of channels and patterns, on a connection of its own; in a Cluster on one for each node.

    When a connection breaks or hangs all are subscribed to again. What is published in between is lost, so
    ``on_subscribed`` is to find that out.

    Args:
        client: runs, and says where Redis is.
        receive: is called with each message: its channel and its payload. It must not wait.
        on_subscribed: is called with those that are subscribed to from now on, again after each interruption.
        on_lost: is called when none is subscribed to any more.
    """

    def __init__(
        self,
        client: RedisClient,
        receive: Callable[[str, bytes], None],
        on_subscribed: Callable[[Collection[str]], None],
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._receive = receive
        self._on_subscribed = on_subscribed
        self._on_lost = on_lost
        self._kinds: dict[str, str] = {}  # SUBSCRIBE, SSUBSCRIBE or PSUBSCRIBE, of those that are wanted
        self._subscribed: dict[str, tuple[str, BaseConnection]] = {}
        self._changed = trio.Event()
        self._reopening: trio.CancelScope | None = None
        self._connections: dict[Location | None, BaseConnection] = {}

    def add(self, name: str, *, sharded: bool = False, pattern: bool = False) -> None:
        """Subscribe to a channel, or to those that match a pattern.

        ``sharded``: it is published to with SPUBLISH, if this is a Cluster.
        """
        is_sharded = sharded and self._client.is_cluster
        self._kinds[name] = "PSUBSCRIBE" if pattern else "SSUBSCRIBE" if is_sharded else "SUBSCRIBE"
        self._changed.set()

    def remove(self, name: str) -> None:
        """Subscribe to it no more."""
        self._kinds.pop(name, None)
        self._changed.set()

    def is_subscribed(self, name: str) -> bool:
        """Return whether all that is published to a channel arrives."""
        return name in self._subscribed

    def reopen(self) -> None:
        """Close the connections and subscribe again: Redis may be another server now."""
        if self._reopening is not None:
            self._reopening.cancel()

    async def run(self) -> None:
        """Keep them subscribed to, until cancelled."""
        failures = 0
        while True:
            try:
                async with trio.open_nursery() as nursery:
                    self._reopening = nursery.cancel_scope
                    await self._serve(nursery)
            except* (exceptions.RedisError, EngineUnavailable, *LOST) as group:
                log.debug("the subscriptions to Redis are interrupted: %s", reason(group))
                failures += 1
            else:
                failures = 0
            finally:
                for connection in self._connections.values():
                    connection.invalidate()
                self._connections.clear()
                self._subscribed.clear()
                self._on_lost()
            await trio.sleep(BACKOFF.delay(failures))

    async def _serve(self, nursery: trio.Nursery) -> None:
        while True:
            self._changed = trio.Event()
            await self._subscribe(nursery, [name for name in self._kinds if name not in self._subscribed])
            for name in [name for name in self._subscribed if name not in self._kinds]:
                kind, connection = self._subscribed.pop(name)
                connection.send_command(kind.replace("SUB", "UNSUB").encode(), name)
            with trio.move_on_after(client_module.CHECK) as quiet:
                await self._changed.wait()
            if quiet.cancelled_caught:
                await self._ping(self._connections.values())

    async def _subscribe(self, nursery: trio.Nursery, names: list[str]) -> None:
        for start in range(0, len(names), MAX_CHANNELS):
            part: dict[str, tuple[str, BaseConnection]] = {}
            for name in names[start : start + MAX_CHANNELS]:
                if (kind := self._kinds.get(name)) is not None:
                    location = await self._client.location_of(name if kind == "SSUBSCRIBE" else "")
                    part[name] = kind, await self._connection(nursery, location)
            together: dict[tuple[str, BaseConnection], list[str]] = {}
            for name, (kind, connection) in part.items():
                if kind == "SSUBSCRIBE":  # those in one command would have to be in one slot
                    connection.send_command(b"SSUBSCRIBE", name)
                else:
                    together.setdefault((kind, connection), []).append(name)
            for (kind, connection), members in together.items():
                connection.send_command(kind.encode(), *members)
            # It is executed after them; if one of them is refused, that is its response.
            await self._ping({connection for _, connection in part.values()})
            self._subscribed.update(part)
            self._on_subscribed(list(part))

    async def _connection(self, nursery: trio.Nursery, location: Location | None) -> BaseConnection:
        if location not in self._connections:
            connection = self._connections[location] = await self._client.connect(location)
            nursery.start_soon(self._read, connection)
        return self._connections[location]

    async def _ping(self, connections: Collection[BaseConnection]) -> None:
        for connection in connections:
            with trio.fail_after(connection_module.COMMAND_TIMEOUT):
                await connection.create_request(b"PING")

    async def _read(self, connection: BaseConnection) -> None:
        message: Any
        async with aclosing(connection.push_messages) as messages:
            async for message in messages:
                match message:
                    case [b"message" | b"smessage", name, payload] | [b"pmessage", _, name, payload]:
                        self._receive(name.decode(errors="backslashreplace"), payload)
                    case [b"sunsubscribe", bytes(name), _] if name.decode() in self._subscribed:
                        raise exceptions.ClusterDownError("the node does not serve this channel any more")
