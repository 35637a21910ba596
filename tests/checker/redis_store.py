"""Redis as the store of several instances, each behind a TCP proxy of its own, and its faults."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import trio
from redis_server import RedisServer

from sseserve.engines.redis import client, connection, coordination, engine, feed
from sseserve.live import availability

__all__ = ["RedisStore", "shorten_timeouts"]

# Seconds. What is bounded in the product is bounded sooner here, so that a fault of 50 ms is a long one.
_TIMEOUTS: dict[ModuleType, dict[str, float]] = {
    connection: {"CONNECT_TIMEOUT": 0.3, "COMMAND_TIMEOUT": 0.3},
    client: {"DEADLINE": 0.4, "CHECK": 0.1},
    coordination: {"LEAVE_TIMEOUT": 0.05, "RETRY_DELAY": 0.1, "ANSWER_TIMEOUT": 0.2},
    engine: {"PROBE": 0.1},
    feed: {"FOLLOW_TIMEOUT": 0.5, "RETRY": 0.02},
    availability: {"RETRY": 0.05, "LONGEST_RETRY": 0.1},
}


@contextmanager
def shorten_timeouts() -> Iterator[None]:
    """Have the instances of this process give up sooner."""
    with ExitStack() as stack:
        for module, values in _TIMEOUTS.items():
            stack.enter_context(patch.multiple(module, **values))
        yield


class _Link:
    """A TCP proxy to a server, which can cut all connections or hold back what passes.

    Args:
        port: of the server; it may change.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self._listener: trio.SocketListener | None = None
        self._streams: set[trio.SocketStream] = set()
        self._is_cut = False
        self._open = {"requests": trio.Event(), "responses": trio.Event()}
        self.heal()

    @property
    def port(self) -> int:
        assert self._listener is not None
        port: int = self._listener.socket.getsockname()[1]
        return port

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        (self._listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._serve, [self._listener])
            task_status.started()

    def cut(self) -> None:
        """Reset all connections, and new ones, until ``heal``."""
        self._is_cut = True
        self.reset()

    def reset(self) -> None:
        """Reset all connections; new ones are possible."""
        for stream in self._streams:
            _reset(stream)

    def block(self, direction: str) -> None:
        """Hold back ``requests``, ``responses`` or ``both`` until ``heal``; all connections stay open."""
        for name in self._open if direction == "both" else [direction]:
            if self._open[name].is_set():
                self._open[name] = trio.Event()

    def heal(self) -> None:
        """Let everything pass, also what was held back."""
        self._is_cut = False
        for event in self._open.values():
            event.set()

    async def _serve(self, client: trio.SocketStream) -> None:
        if self._is_cut:
            _reset(client)
            return
        try:
            server = await trio.open_tcp_stream("127.0.0.1", self.target)
        except OSError:
            _reset(client)
            return
        self._streams |= {client, server}
        try:
            async with client, server, trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, client, server, "requests")
                nursery.start_soon(self._pump, server, client, "responses")
        finally:
            self._streams -= {client, server}

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream, direction: str) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                # What has arrived before the block may still pass, as on a real link.
                await self._open[direction].wait()
                data = await source.receive_some(65536)
                await self._open[direction].wait()
                if not data:
                    break
                await sink.send_all(data)
        for stream in (source, sink):
            await trio.aclose_forcefully(stream)


def _reset(stream: trio.SocketStream) -> None:
    with suppress(OSError):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # Its tasks wake up with ClosedResourceError.
    stream.socket.close()


class RedisStore:
    """A redis-server, and a second one that can take its place.

    Args:
        folder: for their files.
        instances: how many there are of the server.
        loses: nothing is written to disk but by a save, and there is a replica that can be promoted.
    """

    def __init__(self, folder: Path, instances: int, *, loses: bool = False) -> None:
        self._loses = loses
        options = {"repl_diskless_sync_delay": 0} if loses else {"appendonly": "yes"}
        self._servers = [RedisServer(folder / f"redis{number}", **options) for number in range(1 + loses)]
        self._links = [_Link(0) for _ in range(instances)]
        self._replication = _Link(0)
        self._is_up = self._is_paused = self._is_followed = False

    @property
    def _primary(self) -> RedisServer:
        return self._servers[0]

    def close(self) -> None:
        """End the servers."""
        for server in self._servers:
            server.kill()

    def url(self, instance: int) -> str:
        return f"redis://127.0.0.1:{self._links[instance].port}/0"

    async def open(self, nursery: trio.Nursery) -> None:
        for link in (*self._links, self._replication):
            await nursery.start(link.run)
            link.heal()
        await self._start()
        self._primary.flush()
        self._is_followed = False
        if self._loses:
            await self._save()

    async def _start(self) -> None:
        if not self._is_up:
            await trio.to_thread.run_sync(self._primary.start)
            self._is_up = True
        for link in (*self._links, self._replication):
            link.target = self._primary.port

    async def _follow(self) -> None:
        """Let the second server be a replica of the first."""
        replica = self._servers[1]
        if self._is_followed or not self._is_up or self._is_paused:
            return
        self._is_followed = True
        self._replication.heal()
        if replica._process is None:
            await trio.to_thread.run_sync(replica.start)
        replica.command("REPLICAOF", "127.0.0.1", self._replication.port)
        with trio.fail_after(10):
            while b"master_link_status:up" not in replica.command("INFO", "replication"):
                await trio.sleep(0.01)

    async def _save(self) -> None:
        # It is refused while a replica is being synchronized.
        while (response := self._primary.command("SAVE")) != b"+OK\r\n":
            assert b"in progress" in response, response
            await trio.sleep(0.01)

    async def before_kill(self, instance: int) -> None:
        self._links[instance].cut()

    async def after_kill(self, instance: int) -> None:
        self._links[instance].heal()

    async def apply(self, action: str, who: int, how: str) -> None:
        link = self._links[who % len(self._links)]
        match action:
            case "kill redis":
                self._continue()
                self._primary.kill()
                self._is_up = False
            case "start redis":
                await self._start()
            case "pause redis":
                if self._is_up and not self._is_paused:
                    self._primary.pause()
                    self._is_paused = True
            case "continue redis":
                self._continue()
            case "cut":
                link.cut()
            case "block":
                link.block(how)
            case "heal":
                link.heal()
            case "drop pubsub":
                if self._is_up and not self._is_paused:
                    self._primary.command("CLIENT", "KILL", "TYPE", "pubsub")
            case "save":
                if self._is_up and not self._is_paused:
                    await self._save()
            case "lag":
                await self._follow()
                self._replication.block("both")
            case "catch up replica":
                self._replication.heal()
            case "lose":
                await self._lose(how)
            case _:
                raise ValueError(f"unknown action {action!r}")

    def _continue(self) -> None:
        if self._is_paused:
            self._primary.resume()
            self._is_paused = False

    async def _lose(self, how: str) -> None:
        self._continue()
        await self._start()
        if how == "fail over":
            await self._follow()
        self._primary.kill()
        self._is_up = self._is_followed = False
        self._replication.reset()
        if how == "all":
            (self._primary.folder / "dump.rdb").unlink(missing_ok=True)
        elif how == "fail over":
            self._servers.reverse()
            self._is_up = True
            assert self._primary.command("REPLICAOF", "NO", "ONE") == b"+OK\r\n"
        await self._start()

    async def heal(self) -> None:
        self._continue()
        for link in (*self._links, self._replication):
            link.heal()
        await self._start()
