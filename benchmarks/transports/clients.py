"""The process of the clients: all connections of a round in one epoll loop.

What can be read is read at once and its time taken; it is parsed when nothing else can be read. So the speed
of the parsers, which differs, is no part of the latencies, as long as the process keeps up: its share of a
core is measured.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ..load.process import BenchmarkError, serve_commands
from .connection import Address, ClientConnection
from .protocols import CHANNELS, HTTP2, Polling, Refused
from .watcher import Recorder, Watcher, quantiles

__all__ = ["RECONNECT", "clients_main"]

OPEN_TIMEOUT = 60.0
CONCURRENCY = 64  # connections that may be opening at the same time
RECONNECT = 1.0  # seconds after which a client that was cut tries again, and again
QUIET = 0.3  # seconds to wait for events that come twice
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST
GOLDEN = 0.618034


class Clients:
    """The connections of a round, and the loop that they run in."""

    def __init__(self) -> None:
        self._reset(0)

    def _reset(self, interval: int) -> None:
        self._poll = select.epoll()
        self._connections: list[ClientConnection] = []
        self._by_fd: dict[int, ClientConnection] = {}
        self._unparsed: deque[tuple[ClientConnection, bytes, int]] = deque()
        self._timers: list[tuple[float, int, ClientConnection]] = []  # to wake, or to connect again
        self._order = itertools.count()
        self._recorder = Recorder(interval)
        self._refused: dict[int, str] = {}
        self._cuts = 0
        self._keeps_cursor = True
        self._arrived = self._offline_until = 0.0

    def commands(self) -> dict[str, Callable[..., Any]]:
        """Return the commands that the controller may send."""
        return {"open": self.open, "watch": self.watch, "cut": self.cut, "close": self.close}

    def open(
        self,
        *,
        transport: str,
        address: Address,
        session: str,
        watchers: int,
        interval: float = 0.0,
        keeps_cursor: bool = True,
        waits: bool = True,
    ) -> dict[str, Any]:
        """Connect ``watchers`` clients; return when each has an event.

        Args:
            transport: one of ``CHANNELS``.
            address: where to.
            session: its id.
            watchers: how many.
            interval: seconds between two events, which tells the ages of those that are skipped.
            keeps_cursor: a client that was cut resumes with its cursor; else it begins afresh.
            waits: for the first events; else return when all connections are open.

        Returns:
            The milliseconds from the beginning of each connection to its first event (``first``), and the
            bytes ``sent`` and ``received`` by then. ``refused`` is the status, if the transport is refused.

        Raises:
            BenchmarkError: not all had an event in time.
        """
        self.close()
        self._reset(int(interval * 1e9))
        self._keeps_cursor = keeps_cursor
        make = CHANNELS[transport]
        started = 0
        pending: list[ClientConnection] = []
        deadline = time.monotonic() + OPEN_TIMEOUT
        remaining = watchers
        while remaining or pending:
            while remaining and len(pending) < CONCURRENCY:
                number = min(remaining, make.capacity)
                channel = make(
                    f"{address.host}:{address.port}",
                    session,
                    [Watcher(self._recorder) for _ in range(number)],
                )
                if isinstance(channel, Polling):
                    channel.phase = started * GOLDEN % 1  # spreads the clients over the interval
                if isinstance(channel, HTTP2) and address.tls:
                    channel.scheme = "https"
                connection = ClientConnection(address, channel, started * GOLDEN % 1)
                self._connections.append(connection)
                pending.append(connection)
                self._connect(connection)
                remaining -= number
                started += 1
            self._step(1.0)
            if self._refused:
                return {"refused": next(iter(self._refused.values()))}
            pending = [connection for connection in pending if not connection.is_open(waits)]
            if time.monotonic() > deadline:
                raise BenchmarkError(
                    f"{transport}: {len(pending)} connections had no event after {OPEN_TIMEOUT:g} s"
                )
        return {"first": self._first(), **self._traffic()}

    def _first(self) -> list[float]:
        return [
            (watcher.arrivals[0][1] - connection.opened) / 1e6
            for connection in self._connections
            for watcher in connection.channel.watchers
            if watcher.arrivals
        ]

    def watch(
        self,
        *,
        until: int = 0,
        patience: float = 6.0,
        seconds: float | None = None,
        cut_after: float | None = None,
        offline: float = 0.0,
    ) -> dict[str, Any]:
        """Read until each watcher has event number ``until``, or nothing has come for ``patience`` seconds.

        Args:
            until: the number of the last event.
            patience: in seconds.
            seconds: read for so long, whatever comes.
            cut_after: ``cut`` after so many seconds.
            offline: as in ``cut``.

        Returns:
            What the clients got. ``load`` is the share of a core that this process used, ``back`` the time
            when they could connect again after a cut, in nanoseconds.
        """
        before = self._traffic()
        cpu, began = time.process_time(), time.monotonic()
        self._arrived = began
        quiet_since = None
        while True:
            now = time.monotonic()
            if cut_after is not None and now >= began + cut_after:
                cut_after = None
                self.cut(offline=offline)
            if seconds is not None:
                if now >= began + seconds:
                    break
                limit = began + seconds - now
            elif len(self._refused) == len(self._connections):
                break
            else:
                if self._have(until):
                    quiet_since = quiet_since or now
                    if now > quiet_since + QUIET:
                        break
                elif now > max(self._arrived, self._offline_until) + patience:
                    break
                limit = QUIET
            self._step(limit if cut_after is None else max(min(limit, began + cut_after - now), 0))
        elapsed = time.monotonic() - began
        after = self._traffic()
        watchers = [watcher for c in self._connections for watcher in c.channel.watchers]
        for watcher in watchers:
            if seconds is None:
                watcher.missing.update(range(watcher.last + 1, until + 1))
        return {
            "watchers": len(watchers),
            "received": self._recorder.received,
            "last": [max(watcher.last, 0) for watcher in watchers],
            "missed": [len(watcher.missing) for watcher in watchers],
            "doubled": [watcher.doubled for watcher in watchers],
            "reordered": [watcher.reordered for watcher in watchers],
            "told": sorted({status for watcher in watchers for status in watcher.told}),
            "latency": quantiles(self._recorder.ages),
            "ages": _thin([age / 1e6 for age in sorted(self._recorder.ages)]),
            "cuts": self._cuts,
            "first": self._first(),
            "back": int(self._offline_until * 1e9),
            "arrivals": [watcher.arrivals for watcher in watchers] if len(watchers) <= 100 else [],
            "refused": sorted(set(self._refused.values())),
            "sent": after["sent"] - before["sent"],
            "received_bytes": after["received"] - before["received"],
            "load": (time.process_time() - cpu) / elapsed,
            "elapsed": elapsed,
        }

    def close(self) -> None:
        """Reset all connections, so that no port stays in TIME_WAIT during the next round."""
        for connection in self._connections:
            self._disconnect(connection)
        self._connections.clear()
        self._poll.close()
        gc.collect()

    def _traffic(self) -> dict[str, int]:
        return {
            "sent": sum(connection.sent for connection in self._connections),
            "received": sum(connection.received for connection in self._connections),
        }

    def _have(self, number: int) -> bool:
        return all(watcher.last >= number for c in self._connections for watcher in c.channel.watchers)

    def cut(self, *, offline: float = 0.0) -> None:
        """Reset all connections, as when a device changes its network.

        The clients try to connect again while they ``watch``; for ``offline`` seconds without success.
        """
        self._offline_until = time.monotonic() + offline
        for connection in self._connections:
            if connection.sock is not None:
                self._lose(connection)

    # The loop

    def _step(self, timeout: float) -> None:
        """Do what is to be done now; wait at most ``timeout`` seconds for it."""
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            due, _, connection = heapq.heappop(self._timers)
            self._handle_timer(connection, due, now)
        if self._timers:
            timeout = min(timeout, max(self._timers[0][0] - now, 0))
        ready = self._poll.poll(0 if self._unparsed else timeout)
        for fd, event in ready:
            connection = self._by_fd[fd]
            if not connection.is_connected and event & select.EPOLLOUT and not event & select.EPOLLERR:
                self._begin(connection)
                continue
            if event & ~select.EPOLLOUT:
                self._read(connection)
            if event & select.EPOLLOUT and connection.sock is not None:
                self._flush(connection)
        if not ready and self._unparsed:
            self._parse(*self._unparsed.popleft())

    def _handle_timer(self, connection: ClientConnection, due: float, now: float) -> None:
        if due != connection.due:
            return  # it has been cut since then
        connection.due = None
        if connection.sock is None and now < self._offline_until:
            self._set_timer(connection, now + RECONNECT)
        elif connection.sock is None:
            self._connect(connection)
        else:
            connection.channel.wake()
            self._flush(connection)

    def _set_timer(self, connection: ClientConnection, due: float) -> None:
        connection.due = due
        heapq.heappush(self._timers, (due, next(self._order), connection))

    def _connect(self, connection: ClientConnection) -> None:
        try:
            fd = connection.connect().fileno()
        except OSError:  # the network is unreachable
            self._lose(connection)
            return
        self._by_fd[fd] = connection
        self._poll.register(fd, select.EPOLLIN | select.EPOLLOUT)

    def _begin(self, connection: ClientConnection) -> None:
        connection.is_connected = True
        if connection.tls is None:
            connection.channel.begin()
        self._flush(connection)

    def _flush(self, connection: ClientConnection) -> None:
        assert connection.sock is not None
        try:
            is_empty = connection.flush()
        except OSError:
            self._lose(connection)
            return
        if connection.sock.fileno() in self._by_fd:  # else the peer has closed it, which is not parsed yet
            self._poll.modify(connection.sock, select.EPOLLIN | (0 if is_empty else select.EPOLLOUT))

    def _read(self, connection: ClientConnection) -> None:
        assert connection.sock is not None
        try:
            data = connection.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        connection.received += len(data)
        self._unparsed.append((connection, data, time.monotonic_ns()))
        if not data:
            self._poll.unregister(connection.sock)  # until that is parsed
            del self._by_fd[connection.sock.fileno()]

    def _parse(self, connection: ClientConnection, data: bytes, at: int) -> None:
        if connection.sock is None:
            return  # it was cut in the meantime
        self._arrived = at / 1e9
        channel = connection.channel
        try:
            connection.parse(data, at)
        except Refused as refusal:
            self._refused[id(connection)] = str(refusal)
            self._disconnect(connection)
            return
        if channel.ended or not data:
            self._lose(connection)
            return
        if channel.due is not None and channel.due != connection.due:
            self._set_timer(connection, channel.due)
        if channel.output or connection.tls is not None:
            self._flush(connection)

    def _disconnect(self, connection: ClientConnection) -> None:
        if connection.sock is not None:
            if self._by_fd.pop(connection.sock.fileno(), None) is not None:
                self._poll.unregister(connection.sock)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            connection.sock.close()
            connection.sock = None

    def _lose(self, connection: ClientConnection) -> None:
        """The connection has ended: open it again in a while."""
        self._disconnect(connection)
        self._cuts += 1
        for watcher in connection.channel.watchers:
            if not self._keeps_cursor:
                watcher.cursor = ""
        # As clients that are cut together try again at different times.
        self._set_timer(connection, time.monotonic() + RECONNECT * (0.5 + connection.phase))


def _thin(values: list[float], count: int = 200) -> list[float]:
    """Return at most ``count`` of sorted values, evenly spaced, the first and the last among them."""
    if len(values) <= count:
        return values
    return [values[index * (len(values) - 1) // (count - 1)] for index in range(count)]


def clients_main(pipe: Connection) -> None:
    """Run the commands of the process of the clients."""
    serve_commands(pipe, Clients().commands())
