"""Several instances of the server in this process, on socket pairs, over an engine that they share.

An instance is killed by cancelling all its tasks, with its connections to Redis reset before: it cannot say
goodbye to anybody. What a real kill -9 does beyond that is tested with processes.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import trio

from sseserve.config import Settings, load
from sseserve.server.application import Application

from .clients import ConnectionEnded, Wire

__all__ = ["Cluster", "MemoryStore", "SQLiteStore", "Store"]

SETTINGS = {"drain": 0.6, "send_timeout": 5.0, "heartbeat": 1.0}
SEND_BUFFER = 4 * 1024  # bytes that the kernel holds for a client, so that one that stalls is noticed


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


class _PairListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts what ``connect`` makes."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[trio.SocketStream](1000)
        self.is_open = True

    def connect(self) -> trio.SocketStream:
        """Open a connection; returns the client's end."""
        if not self.is_open:
            raise ConnectionEnded
        client, server = socket.socketpair()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._send.send_nowait(trio.SocketStream(trio.socket.from_stdlib_socket(server)))
        return trio.SocketStream(trio.socket.from_stdlib_socket(client))

    async def accept(self) -> trio.SocketStream:
        return await self._receive.receive()

    async def aclose(self) -> None:
        self.is_open = False
        # Whoever has connected and was not accepted is refused, as by the kernel.
        while True:
            try:
                self._receive.receive_nowait().socket.close()
            except trio.WouldBlock:
                break
        await trio.lowlevel.checkpoint()


class _Instance:
    """One server, which can be started again."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.listener: _PairListener | None = None
        self.app: Application | None = None
        self.conflated = 0  # by those that have ended
        self._scope = trio.CancelScope()
        self._drain: Callable[[], None] = lambda: None
        self.stopped = trio.Event()
        self.stopped.set()

    async def run(self, settings: Settings, *, task_status: trio.TaskStatus[None]) -> None:
        self.stopped = trio.Event()
        pairs = _PairListener()
        try:
            with trio.CancelScope() as self._scope:
                async with trio.open_nursery() as nursery:
                    self.app = app = Application(settings, nursery)
                    listener = app.listen([pairs])
                    await nursery.start(app.engine.run)
                    for service in app.background_services():
                        nursery.start_soon(service)
                    await nursery.start(listener.run)
                    self.listener, self._drain = pairs, listener.stop
                    task_status.started()
                    await listener.stopped.wait()
                    nursery.cancel_scope.cancel()
        finally:
            self.listener = None
            if self.app is not None:
                self.conflated += self.app.broker.conflated
                self.app = None
            with trio.CancelScope(shield=True):
                await pairs.aclose()
            self.stopped.set()

    def kill(self) -> None:
        self.listener = None
        self._scope.cancel()

    def drain(self) -> None:
        self._drain()


class Cluster:
    """The instances and their store.

    Args:
        nursery: runs the instances.
        store: that they share.
        count: how many instances.
        settings: of each.
    """

    def __init__(self, nursery: trio.Nursery, store: Store, count: int, **settings: Any) -> None:
        self._nursery = nursery
        self._store = store
        self._settings = {**SETTINGS, **settings}
        self.instances = [_Instance(number) for number in range(count)]

    @property
    def conflated(self) -> int:
        """How many progress events the instances have dropped."""
        return sum(i.conflated + (i.app.broker.conflated if i.app else 0) for i in self.instances)

    async def open(self) -> None:
        """Start everything."""
        await self._store.open(self._nursery)
        for instance in self.instances:
            await self._start(instance)

    async def _start(self, instance: _Instance) -> None:
        await instance.stopped.wait()
        url = self._store.url(instance.number)
        settings = load(environ={}, flags={**self._settings, "engine": url})

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            await instance.run(settings, task_status=task_status)

        await self._nursery.start(run)

    async def connect(self, number: int) -> Wire:
        """Open a connection to an instance.

        Raises:
            ConnectionEnded: it does not run.
        """
        await trio.lowlevel.checkpoint()
        listener = self.instances[number].listener
        if listener is None:
            raise ConnectionEnded
        return Wire(listener.connect())

    async def apply(self, action: str, who: int, how: str) -> None:
        """Do what a step says to an instance or to the store."""
        instance = self.instances[who % len(self.instances)]
        match action:
            case "kill":
                if instance.listener is not None:
                    await self._store.before_kill(instance.number)
                    instance.kill()
            case "start":
                if instance.listener is None:
                    await self._start(instance)
            case "drain":
                if instance.listener is not None:
                    instance.drain()
                    await instance.stopped.wait()
                    await self._start(instance)
            case _:
                await self._store.apply(action, who, how)

    async def heal(self) -> None:
        """End all faults."""
        await self._store.heal()
        for instance in self.instances:
            if instance.listener is None:
                await self._start(instance)


Apply = Callable[[str, int, str], Awaitable[None]]
