"""The accept loop, the limits at the door, and the drain.

Accepting has a nursery of its own inside the connections', so that it can stop first.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import resource
import socket
from collections.abc import Sequence

import trio

from ..context import Context
from ..errors import Unavailable
from ..http.messages import Request, error_answer
from ..live.subscriber import Subscriber
from ..live.transport import Transport
from .connection import serve_connection

__all__ = ["Listener", "open_listeners"]

log = logging.getLogger(__name__)

BACKLOG = 4096
DEAD_PEER_MS = 30_000  # unacknowledged for that long: the peer is dead
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
SPARE_FILES = 64


async def open_listeners(host: str, port: int) -> list[trio.SocketListener]:
    """Listen on every address of ``host``. Port 0 takes a free one, the same for all of them.

    Raises:
        OSError: it cannot.
    """
    listeners = await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
    for listener in listeners:
        # Connections inherit it (tcp(7)).
        listener.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_MS)
        listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    return listeners


class Listener:
    """Serves connections from ``listeners`` until it is told to stop."""

    def __init__(self, context: Context, listeners: Sequence[trio.abc.Listener[trio.abc.Stream]]) -> None:
        self._context = context
        self._listeners = listeners
        self._accepting = trio.CancelScope()
        self._empty = trio.Event()  # stopping, and no connection is left
        self._streams: set[trio.abc.Stream] = set()
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._limit = context.settings.max_connections or max(1, files - SPARE_FILES)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until ``stop``; then drain, and return within ``settings.drain`` seconds."""
        try:
            async with trio.open_nursery() as connections:
                with self._accepting:
                    async with trio.open_nursery() as accepting:
                        for listener in self._listeners:
                            accepting.start_soon(self._accept, listener, connections)
                        task_status.started()
                with trio.CancelScope(shield=True):
                    await self._drain(connections)
        finally:
            # Cancelled from outside there is no drain.
            for listener in self._listeners:
                await trio.aclose_forcefully(listener)

    def stop(self) -> None:
        """Begin the drain."""
        self._accepting.cancel()

    async def _accept(self, listener: trio.abc.Listener[trio.abc.Stream], connections: trio.Nursery) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
                log.error("cannot accept: %s; trying again", error)
                await trio.sleep(0.1)
                continue
            if self._context.connections >= self._limit:
                self._refuse(stream)
            else:
                self._context.connections += 1
                connections.start_soon(self._serve, stream)

    async def _serve(self, stream: trio.abc.Stream) -> None:
        self._streams.add(stream)
        try:
            await serve_connection(self._context, stream)
        finally:
            self._streams.discard(stream)
            self._context.connections -= 1
            self._check_empty()

    def _check_empty(self) -> None:
        if self._context.stopping.is_set() and not self._context.connections:
            self._empty.set()

    def _refuse(self, stream: trio.abc.Stream) -> None:
        """Say that the house is full, without waiting for anything."""
        self._context.refused += 1
        request = Request.make("", "", "", ())
        answer = error_answer(Unavailable(f"the server has {self._limit} connections already"), request)
        data = answer.encode(request=request, more=(("Retry-After", "5"),), close=True)
        with contextlib.suppress(trio.BrokenResourceError):
            Transport(stream).try_send(data)
        if isinstance(stream, trio.SocketStream):
            stream.socket.close()

    def _dismiss(self, slot: float, subscriber: Subscriber) -> None:
        """Tell a client to come back: ``slot``, from 0 to 1, is its time within the drain's length."""
        subscriber.dismiss(500 + int(self._context.settings.drain * 1000 * slot))

    async def _drain(self, connections: trio.Nursery) -> None:
        """Let everybody go, in order; at the deadline cancel who has not."""
        context = self._context
        deadline = trio.current_time() + context.settings.drain
        # 1. No new connections: accepting has been cancelled. /ready says 503 from now on.
        context.stopping.set()
        self._check_empty()
        for listener in self._listeners:
            await listener.aclose()
        # 2. Every stream is told to come back, each at its own time.
        subscribers = context.broker.drain(lambda late: self._dismiss(random.random(), late))  # noqa: S311 - no secret
        log.info("stopping: %d connections, %d streams", context.connections, len(subscribers))
        random.shuffle(subscribers)
        for number, subscriber in enumerate(subscribers):
            self._dismiss(number / len(subscribers), subscriber)
            if number % 64 == 63:
                await trio.lowlevel.checkpoint()
        # 3. Running requests end; long-polls at once, idle keep-alive connections too.
        context.broker.wake()
        context.dismiss()
        await context.gateway.worker.terminated.set()
        with trio.move_on_at(deadline - 0.25):
            await self._empty.wait()
        # 4. Who is left is cancelled; Hypercorn's shielded sends end with their sockets.
        if context.connections:
            log.info("cancelling %d connections at the deadline", context.connections)
        connections.cancel_scope.cancel()
        with trio.move_on_at(deadline - 0.1):
            await self._empty.wait()
        for stream in list(self._streams):
            await trio.aclose_forcefully(stream)
