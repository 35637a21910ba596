"""Several instances of the server, and the engine that they share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import trio

from sseserve.errors import ConfigError

from .clients import Wire
from .instances import Instance

__all__ = ["Cluster", "MemoryStore", "SQLiteStore", "Store"]

SETTINGS = {"drain": 0.6, "send_timeout": 5.0, "heartbeat": 1.0}

START = 20.0  # seconds in which an instance must have started
RESTART = 0.01  # seconds between two attempts to start an instance


class Store(Protocol):
    """What the instances share, and its faults. An action that it does not know is none of its own."""

    def url(self, instance: int) -> str:
        """The engine of an instance."""

    async def open(self, nursery: trio.Nursery) -> None:
        """Begin, without any data."""

    async def apply(self, action: str, who: int, how: str) -> None:
        """Do what a step says."""

    async def before_kill(self, instance: int) -> None:
        """Take from an instance that is killed the means to say goodbye."""

    async def after_kill(self, instance: int) -> None:
        """Give it back to its successor."""

    async def heal(self) -> None:
        """End all faults."""


class MemoryStore:
    """One instance, which keeps everything itself."""

    def url(self, instance: int) -> str:
        return "memory:"

    async def open(self, nursery: trio.Nursery) -> None:
        pass

    async def apply(self, action: str, who: int, how: str) -> None:
        pass

    async def before_kill(self, instance: int) -> None:
        pass

    after_kill = before_kill

    async def heal(self) -> None:
        pass


class SQLiteStore(MemoryStore):
    """One instance with a file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0

    def url(self, instance: int) -> str:
        return f"sqlite:{self._folder / f'log{self._number}.db'}"

    async def open(self, nursery: trio.Nursery) -> None:
        self._number += 1


class Cluster:
    """The instances and their store.

    Args:
        nursery: runs the instances.
        store: that they share.
        instances: the servers, which do not run yet.
        settings: of each.
    """

    def __init__(
        self, nursery: trio.Nursery, store: Store, instances: Sequence[Instance], **settings: Any
    ) -> None:
        self._nursery = nursery
        self._store = store
        self._instances = instances
        self._settings = {**SETTINGS, **settings}
        self._starting: set[int] = set()

    def __len__(self) -> int:
        return len(self._instances)

    @property
    def conflated(self) -> int:
        """How many progress events the instances have dropped."""
        return sum(instance.conflated for instance in self._instances)

    async def open(self) -> None:
        """Start everything."""
        await self._store.open(self._nursery)
        async with trio.open_nursery() as nursery:
            for number in range(len(self)):
                nursery.start_soon(self._start, number)

    async def _start(self, number: int) -> None:
        """Start an instance, again and again if its engine cannot be opened, as a service manager does."""
        instance = self._instances[number]
        settings = {**self._settings, "engine": self._store.url(number)}
        with trio.fail_after(START):
            while not instance.is_up:
                await instance.stopped.wait()
                try:
                    await self._nursery.start(partial(instance.run, settings))
                except* ConfigError:
                    await trio.sleep(RESTART)

    def _start_soon(self, number: int) -> None:
        if number not in self._starting:
            self._starting.add(number)
            self._nursery.start_soon(self._start_again, number)

    async def _start_again(self, number: int) -> None:
        if self._instances[number].is_draining:
            await self._instances[number].stopped.wait()
        await self._start(number)
        self._starting.discard(number)

    async def connect(self, number: int) -> Wire:
        """Open a connection to an instance.

        Raises:
            ConnectionEnded: it does not run.
        """
        return Wire(await self._instances[number].connect())

    async def apply(self, action: str, who: int, how: str) -> None:
        """Do what a step says to an instance or to the store."""
        number = who % len(self)
        instance = self._instances[number]
        match action:
            case "kill":
                if instance.is_up:
                    await self._store.before_kill(number)
                    instance.kill()
                    await instance.stopped.wait()
                    await self._store.after_kill(number)
            case "start":
                self._start_soon(number)
            case "drain":
                if instance.is_up:
                    instance.drain()
                    self._start_soon(number)
            case _:
                await self._store.apply(action, who, how)

    async def heal(self) -> None:
        """End all faults."""
        await self._store.heal()
        for number in range(len(self)):
            self._start_soon(number)
        while self._starting:
            await trio.sleep(RESTART)
