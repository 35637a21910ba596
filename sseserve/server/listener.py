"""The accept loop, and the limits of connections.

Accepting has a nursery of its own inside the connections', so that it can stop first. All connections that
wait are accepted at once, up to ``BATCH`` of them before other tasks run.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from functools import partial

import trio

from ..errors import SseserveError, TooManyConnections, Unavailable
from ..http.limits import UNIX
from ..http.messages import Request, error_response, finish_response, http_date
from ..live.transport import Transport, peer_address
from ..metrics import Counters
from .drain import Drain
from .sockets import BACKLOG

__all__ = ["Listener", "adopt", "default_connections"]

log = logging.getLogger(__name__)

BATCH = 32  # connections that are accepted, and whose requests are read, before other tasks run
DEAD_PEER_MS = 30_000  # a peer that acknowledges nothing for that long is dead
# Errors of accept(2): the socket cannot be listened on; the connection was lost before it was accepted. All
# others pass, as the want of file descriptors does.
UNUSABLE = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK})
LOST = frozenset(
    {
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENONET,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EPROTO,
    }
)
NOTSENT_LOWAT = 16 * 1024  # bytes, as Trio sets it for each of its streams
SPARE_FILES = 64


def adopt(listening: socket.socket) -> trio.SocketListener:
    """Return a socket that listens as what a ``Listener`` takes, with the options of its connections."""
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
    if listening.family == socket.AF_UNIX:
        return listener
    # Connections inherit these (tcp(7)).
    listener.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_MS)
    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    listener.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT)
    return listener


def _duplicate(listener: trio.SocketListener) -> socket.socket:
    """Return a duplicate of the listening socket: with Trio's each ``accept`` is a task switch."""
    listening = listener.socket
    duplicate = socket.fromfd(listening.fileno(), listening.family, listening.type, listening.proto)
    duplicate.setblocking(False)
    return duplicate


def default_connections() -> int:
    """Return how many connections the limit of open files allows, less a reserve."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES)


class Listener:
    """Serves the connections of ``listeners`` until it is told to stop.

    Args:
        listeners: where clients connect.
        serve: serves one connection to its end.
        drain: ends the connections.
        counters: counts the connections.
        max_connections: one more is refused.
        max_per_address: so is one more of the same address; None: no limit.
        limited: returns by which name an address is counted; None: it is not limited.
        speaks_tls: a connection that is refused is closed only, as it has no keys to respond with yet.
    """

    def __init__(
        self,
        listeners: Sequence[trio.abc.Listener[trio.abc.Stream]],
        serve: Callable[[Transport], Awaitable[None]],
        drain: Drain,
        counters: Counters,
        *,
        max_connections: int,
        max_per_address: int | None,
        limited: Callable[[str], str | None],
        speaks_tls: bool = False,
    ) -> None:
        self._listeners = listeners
        self._serve_connection = serve
        self._drain = drain
        self._counters = counters
        self._accepting = trio.CancelScope()
        self.stopped = trio.Event()  # set when ``run`` ends
        self.max_connections = max_connections
        self.max_per_address = max_per_address
        self._limited = limited
        self._speaks_tls = speaks_tls
        self._addresses: dict[str, int] = {}  # how many connections each has

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until ``stop``; then drain, and return by the drain's deadline."""
        try:
            async with trio.open_nursery() as connections:
                with self._accepting:
                    async with trio.open_nursery() as accepting:
                        for listener in self._listeners:
                            accepting.start_soon(self._accept, listener, connections)
                        task_status.started()
                with trio.CancelScope(shield=True):
                    await self._drain.run(partial(self._close_listeners, connections), connections)
        finally:
            # Cancelled from outside there is no drain.
            self.stopped.set()  # first, as the next line raises when this task is cancelled
            for listener in self._listeners:
                await trio.aclose_forcefully(listener)

    def stop(self) -> None:
        """Begin the drain."""
        self._accepting.cancel()

    async def _close_listeners(self, connections: trio.Nursery) -> None:
        """Accept the connections that the kernel has accepted already, as closing would reset them; close."""
        for listener in self._listeners:
            if isinstance(listener, trio.SocketListener):
                try:
                    with _duplicate(listener) as queue:
                        for _ in range(BACKLOG // BATCH):
                            if not self._accept_waiting(queue, connections):
                                break
                            await trio.lowlevel.checkpoint()
                except OSError as error:
                    log.error("cannot accept: %s", error)
                listener.socket.close()  # no task runs in between
            else:
                await listener.aclose()

    async def _accept(self, listener: trio.abc.Listener[trio.abc.Stream], connections: trio.Nursery) -> None:
        with _duplicate(listener) if isinstance(listener, trio.SocketListener) else nullcontext() as queue:
            while True:
                try:
                    if queue is None:
                        self._start(Transport(await listener.accept()), connections)
                    else:
                        await trio.lowlevel.wait_readable(queue)
                        self._accept_waiting(queue, connections)
                except OSError as error:
                    if error.errno in UNUSABLE:
                        raise
                    log.error("cannot accept: %s; retrying", error)
                    await trio.sleep(0.1)

    def _accept_waiting(self, queue: socket.socket, connections: trio.Nursery) -> bool:
        """Accept a batch of the connections that wait; returns whether there may be more."""
        for _ in range(BATCH):
            try:
                accepted, name = queue.accept()
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno in LOST:
                    continue
                raise
            accepted.setblocking(False)
            # Many connections have the same address, which is kept once.
            peer = sys.intern(peer_address(name)) if isinstance(name, tuple) else UNIX
            self._start(Transport(accepted, peer), connections)
        return True

    def _start(self, transport: Transport, connections: trio.Nursery) -> None:
        address = None if self.max_per_address is None else self._limited(transport.peer)
        if self._counters.connections >= self.max_connections:
            reason = f"max_connections = {self.max_connections} connections are open already"
            self._refuse(transport, Unavailable(reason, limit="max_connections"))
            return
        if address is not None:
            count = self._addresses.get(address, 0)
            if self.max_per_address is not None and count >= self.max_per_address:
                setting = "max_connections_per_address"
                reason = f"{setting} = {count} connections of {address} are open already"
                self._refuse(transport, TooManyConnections(reason, limit=setting))
                return
            self._addresses[address] = count + 1
        self._counters.connections += 1
        connections.start_soon(self._serve, transport, address)

    async def _serve(self, transport: Transport, address: str | None) -> None:
        try:
            await self._serve_connection(transport)
        finally:
            self._counters.connections -= 1
            if address is not None:
                self._addresses[address] -= 1
                if not self._addresses[address]:
                    del self._addresses[address]
            self._drain.connection_closed()

    def _refuse(self, transport: Transport, error: SseserveError) -> None:
        """Respond that a limit is reached, without waiting for anything."""
        assert error.limit is not None
        self._counters.count_refusal(error.limit)
        if self._speaks_tls:
            transport.close_socket()
            return
        request = Request.create("", "")
        response = finish_response(request, error_response(error, request))
        data = response.encode(close=True, date=http_date(int(time.time())))
        with contextlib.suppress(trio.BrokenResourceError):
            transport.try_send(data)
        transport.close_socket()
