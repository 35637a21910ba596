"""One instance of the server, in this process or in one of its own, that can be killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import trio
from ports import free_port

from sseserve.config import Settings, load
from sseserve.engines import Engine, EngineListener
from sseserve.errors import ConfigError
from sseserve.server.application import Application

from .clients import ConnectionEnded

__all__ = ["Instance", "LocalInstance", "MakeEngine", "ProcessInstance"]

SEND_BUFFER = 4 * 1024  # bytes that the kernel holds for a client, so that one that stalls is noticed

MakeEngine = Callable[[Settings, EngineListener], Engine]


class Instance(Protocol):
    """A server. ``conflated`` counts the progress events that it has dropped."""

    is_up: bool
    is_draining: bool
    stopped: trio.Event

    @property
    def conflated(self) -> int: ...

    async def run(self, settings: dict[str, Any], *, task_status: trio.TaskStatus[None]) -> None:
        """Run it to its end, with settings by their names."""

    async def connect(self) -> trio.SocketStream:
        """Open a connection.

        Raises:
            ConnectionEnded: it does not run.
        """

    def kill(self) -> None:
        """End it at once."""

    def drain(self) -> None:
        """Ask it to end."""


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


class LocalInstance:
    """An instance in this process, on socket pairs.

    It is killed by cancelling all its tasks. Its connections to the store have to be reset before, so that
    it cannot say goodbye.

    Args:
        make_engine: returns its engine; None: the one that its settings name.
    """

    def __init__(self, make_engine: MakeEngine | None = None) -> None:
        self._make_engine = make_engine
        self._pairs = _PairListener()
        self._app: Application | None = None
        self._conflated = 0  # by those that have ended
        self.is_up = self.is_draining = False
        self._scope = trio.CancelScope()
        self._drain: Callable[[], None] = lambda: None
        self.stopped = trio.Event()
        self.stopped.set()

    @property
    def conflated(self) -> int:
        return self._conflated + (0 if self._app is None else self._app.broker.statistics().conflated)

    async def connect(self) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        if not self.is_up:
            raise ConnectionEnded
        return self._pairs.connect()

    async def run(self, settings: dict[str, Any], *, task_status: trio.TaskStatus[None]) -> None:
        self.stopped = trio.Event()
        self._pairs = pairs = _PairListener()
        try:
            with trio.CancelScope() as self._scope:
                async with trio.open_nursery() as nursery:
                    self._app = app = Application(
                        load(environ={}, flags=settings), nursery, make_engine=self._make_engine
                    )
                    listener = app.listen([pairs])
                    await nursery.start(app.engine.run)
                    await nursery.start(app.coordination.run)
                    for service in app.background_services():
                        nursery.start_soon(service)
                    await nursery.start(listener.run)
                    self._drain = listener.stop
                    self.is_up = True
                    task_status.started()
                    await listener.stopped.wait()
                    nursery.cancel_scope.cancel()
        finally:
            self.is_up = self.is_draining = False
            self._conflated, self._app = self.conflated, None
            with trio.CancelScope(shield=True):
                await pairs.aclose()
            self.stopped.set()

    def kill(self) -> None:
        self.is_up = False
        self._scope.cancel()

    def drain(self) -> None:
        self.is_draining = True
        self._drain()


class ProcessInstance:
    """An instance in a process of its own, on a port of its own.

    Args:
        log: the file that gets its output.
        prefix: words before the command, such as those that run it in a network namespace.
        host: where it listens.
    """

    conflated = 0  # its buffers are not small

    def __init__(self, log: Path, prefix: Sequence[str] = (), host: str = "127.0.0.1") -> None:
        self._log = log
        self._prefix = prefix
        self._address = host, free_port()
        self._process: trio.Process | None = None
        self.is_up = self.is_draining = False
        self.stopped = trio.Event()
        self.stopped.set()

    async def connect(self) -> trio.SocketStream:
        try:
            return await trio.open_tcp_stream(*self._address)
        except OSError:
            raise ConnectionEnded from None

    async def run(self, settings: dict[str, Any], *, task_status: trio.TaskStatus[None]) -> None:
        self.stopped = trio.Event()
        host, port = self._address
        settings = {**settings, "host": host, "port": port}
        environ = {f"SSESERVE_{name.upper()}": str(value) for name, value in settings.items()}
        command = [*self._prefix, sys.executable, "-m", "sseserve", "serve"]
        with self._log.open("ab") as output:
            self._process = await trio.lowlevel.open_process(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **environ},
            )
        try:
            while True:
                try:
                    stream = await self.connect()
                    break
                except ConnectionEnded:
                    if self._process.poll() is not None:
                        raise ConfigError(self._log.read_text()[-1000:]) from None
                    await trio.sleep(0.01)
            await trio.aclose_forcefully(stream)
            self.is_up = True
            task_status.started()
            await self._process.wait()
        finally:
            self.is_up = self.is_draining = False
            self._process.kill()
            with trio.CancelScope(shield=True):
                await self._process.wait()
            self.stopped.set()

    def kill(self) -> None:
        assert self._process is not None
        self.is_up = False
        self._process.kill()

    def drain(self) -> None:
        assert self._process is not None
        self.is_draining = True
        self._process.send_signal(signal.SIGTERM)
