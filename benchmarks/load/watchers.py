"""The watching side: thousands of streams in one epoll loop of one process, which check what they get.

It shares the machine with the server that it measures, so each read does little work: one ``recv_into`` into
a shared buffer, and a look-up of these bytes in the position of the client.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from .events import Position, stamp
from .process import BenchmarkError, serve_commands

__all__ = ["watcher_main"]

OPEN_TIMEOUT = 90.0
DRAIN_TIMEOUT = 8.0
QUIET_PERIOD = 0.25  # if no bytes arrive for this long, the streams are quiet
SOURCE_ADDRESSES = 4  # source addresses of the clients; each has its own range of ephemeral ports
PROCESS_ADDRESSES = 8  # source addresses that a watching process reserves
QUANTILES = 100  # parts of a distribution, as it is stored


class Watchers:
    """The clients of one server that one process has. What they have is in lists by file descriptor."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._buffer = bytearray(512 * 1024)
        self._view = memoryview(self._buffer)
        self._socks: dict[int, socket.socket] = {}
        self._channels: dict[int, int] = {}  # the index of each client's channel
        self._stalled: list[socket.socket] = []
        self._poll = select.epoll()

    def commands(self) -> dict[str, Callable[..., Any]]:
        """Return the commands that the controller may send."""
        return {
            "open": self.open,
            "replay": self.replay,
            "discard_pending": self.discard_pending,
            "collect": self.collect,
            "read_stream": self.read_stream,
            "drain_stalled": self.drain_stalled,
            "close": self.close,
        }

    def open(
        self,
        *,
        port: int,
        requests: Sequence[tuple[int, bytes]],
        status: bytes,
        source: int = 0,
        concurrency: int = 64,
        stalled: bool = False,
    ) -> dict[str, float]:
        """Open streams, ``concurrency`` at a time.

        A stream is open once the head of the response and the first bytes of the body have arrived.
        ``stalled`` clients read no further. They set the segment size of Ethernet and a small receive buffer:
        with loopback's 64 KB segments the kernel would buffer more than a megabyte for each of them, and no
        client would ever stall.

        Args:
            port: TCP port of the server on 127.0.0.1.
            requests: for each stream, the index of its channel and the bytes of the request.
            status: the expected beginning of the response.
            source: number of the watching process, which has source addresses of its own.
            concurrency: how many streams may be connecting at the same time.
            stalled: open clients that do not read.

        Returns:
            The time until all streams were open (``seconds``), and the CPU time (``cpu``).

        Raises:
            BenchmarkError: a response was not the expected one, or not all streams were open in time.
        """
        began, cpu = time.monotonic(), time.process_time()
        opened = _Opening(port, status, source, concurrency, stalled).run(requests)
        elapsed = time.monotonic() - began
        for channel, sock, _ in opened:
            if stalled:
                self._stalled.append(sock)
            else:
                self._socks[sock.fileno()] = sock
                self._channels[sock.fileno()] = channel
                self._poll.register(sock.fileno(), select.EPOLLIN)
        return {"seconds": elapsed, "cpu": time.process_time() - cpu}

    def replay(
        self,
        *,
        port: int,
        requests: Sequence[tuple[int, bytes]],
        status: bytes,
        source: int = 0,
        concurrency: int,
        run: int,
        events: int,
    ) -> dict[str, Any]:
        """Open streams that begin with a replay, of ``events`` events of sequence 0 to each.

        Returns:
            The seconds until the last client had everything, the quantiles of the seconds that a client
            waited for it, the CPU seconds, and the faults.

        Raises:
            BenchmarkError: as :meth:`open`.
        """
        began, cpu = time.monotonic(), time.process_time()
        opening = _Opening(port, status, source, concurrency, False, Position(run, (0,)), events)
        opened = opening.run(requests)
        elapsed = time.monotonic() - began
        self._socks.update((sock.fileno(), sock) for _, sock, _ in opened)
        faults = _describe_faults(opening.positions, {0: events})
        waits = _quantiles(sorted(seconds for _, _, seconds in opened))
        return {"seconds": elapsed, "waits": waits, "cpu": time.process_time() - cpu, "faults": faults}

    def discard_pending(self) -> None:
        """Read and discard pending bytes until the streams are quiet.

        Raises:
            BenchmarkError: a stream ended.
        """
        deadline = time.monotonic() + OPEN_TIMEOUT
        while (ready := self._poll.poll(QUIET_PERIOD)) and time.monotonic() < deadline:
            for fd, _ in ready:
                if not self._socks[fd].recv_into(self._buffer):
                    raise BenchmarkError("a stream ended before the measurement began")

    def read_stream(self) -> bytes:
        """Return what the first client has received, once its stream is quiet."""
        data = b""
        fd = next(iter(self._socks))
        while any(ready == fd for ready, _ in self._poll.poll(QUIET_PERIOD)):
            data += self._socks[fd].recv(65536)
        return data

    def collect(self, *, run: int, sequences: int | None, latency: bool, patience: float) -> dict[str, Any]:
        """Take events until all have arrived, or none has arrived for ``patience`` seconds.

        When the publishers have finished, the controller sends the number of publishes of each sequence over
        the pipe.

        Args:
            run: number of the run.
            sequences: how many each client gets, from 0; None: the one with the index of its channel.
            latency: whether to record how old each event is when it is read.
            patience: in seconds. What is missing then is lost.

        Returns:
            ``delivered`` (events), ``faults``, ``last`` (the monotonic time of the last event), ``cpu`` in
            seconds, and the quantiles of ``latencies`` in milliseconds.
        """
        shared = None if sequences is None else Position(run, range(sequences))
        positions: list[Any] = [None] * (max(self._socks) + 1)
        receive: list[Any] = [None] * len(positions)
        for fd, sock in self._socks.items():
            positions[fd] = shared or Position(run, (self._channels[fd],))
            receive[fd] = sock.recv_into
        buffer, view, poll, now = self._buffer, self._view, self._poll.poll, stamp
        ages: list[int] = []
        control = self._pipe.fileno()
        self._poll.register(control, select.EPOLLIN)
        sent: dict[int, int] | None = None
        disconnected = 0
        total, target = 0, -1
        cpu = time.process_time()
        last = time.monotonic()
        while True:
            # After the last event, wait one more quiet period for duplicates.
            ready = poll(QUIET_PERIOD if total == target else patience, 4096)
            if not ready and sent is not None:
                break
            before = total
            for fd, _ in ready:
                if fd == control:
                    sent = self._pipe.recv()
                    target = sum(_expected(positions[client], sent) for client in self._socks)
                    continue
                try:
                    size = receive[fd](buffer)
                except ConnectionResetError:
                    size = 0
                if not size:
                    disconnected += 1
                    self._poll.unregister(fd)
                    continue
                data = bytes(view[:size])
                position = positions[fd]
                following = position.following.get(data) or position.advance(data)
                positions[fd] = following
                if following.gained:
                    total += following.gained
                    if latency:
                        moment = now()
                        ages += [moment - due for due in following.times]
            if total != before:
                last = time.monotonic()
            elif sent is not None and total != target and time.monotonic() - last > patience:
                break
        self._poll.unregister(control)
        assert sent is not None
        faults = _describe_faults([positions[fd] for fd in self._socks], sent)
        if disconnected:
            faults.append(f"streams ended by the server: {disconnected}")
        return {
            "clients": len(self._socks),
            "delivered": total,
            "faults": faults,
            "last": last,
            "cpu": time.process_time() - cpu,
            "latencies": _quantiles([age / 1000 for age in sorted(ages)]),
        }

    def drain_stalled(self) -> dict[str, int]:
        """Read from the stalled clients for at most ``DRAIN_TIMEOUT`` seconds.

        A server that disconnects no client may have a large backlog, which need not be read to the end.

        Returns:
            How many clients were disconnected (``cut``).
        """
        poll = select.epoll()
        receive = {sock.fileno(): sock.recv_into for sock in self._stalled}
        for sock in self._stalled:
            poll.register(sock.fileno(), select.EPOLLIN)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        disconnected = 0
        deadline = time.monotonic() + DRAIN_TIMEOUT
        while (ready := poll.poll(2 * QUIET_PERIOD)) and time.monotonic() < deadline:
            for fd, _ in ready:
                try:
                    size = receive[fd](self._buffer)
                except ConnectionResetError:
                    size = 0
                if not size:
                    poll.unregister(fd)
                    disconnected += 1
        poll.close()
        return {"cut": disconnected}

    def close(self) -> None:
        """Reset all connections, so that no port stays in TIME_WAIT during the next round."""
        for sock in [*self._socks.values(), *self._stalled]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
        self._socks.clear()
        self._channels.clear()
        self._stalled.clear()


class _Opening:
    """Opens streams. With a position and a number of events, a stream is open when it has got so many."""

    def __init__(
        self,
        port: int,
        status: bytes,
        source: int,
        concurrency: int,
        stalled: bool,
        position: Position | None = None,
        events: int = 0,
    ) -> None:
        self._port, self._status = port, status
        self._source = source * PROCESS_ADDRESSES + 1
        self._concurrency, self._stalled = concurrency, stalled
        self._position, self._events = position, events
        self.positions: list[Position] = []  # of the open streams
        self._poll = select.epoll()
        self._clients: dict[int, tuple[int, bytes, socket.socket, float]] = {}
        self._heads: dict[int, bytes] = {}
        self._replayed: dict[int, tuple[Position, int]] = {}

    def run(self, requests: Sequence[tuple[int, bytes]]) -> list[tuple[int, socket.socket, float]]:
        """Open all; return for each its channel, its socket and the seconds that it took."""
        opened: list[tuple[int, socket.socket, float]] = []
        waiting = iter(enumerate(requests))
        started = 0
        deadline = time.monotonic() + OPEN_TIMEOUT
        try:
            while len(opened) < len(requests):
                while started < len(requests) and len(self._clients) < self._concurrency:
                    self._connect(*next(waiting))
                    started += 1
                ready = self._poll.poll(1.0)
                if (now := time.monotonic()) > deadline:
                    raise BenchmarkError(
                        f"only {len(opened)} of {len(requests)} streams were open after {OPEN_TIMEOUT:g} s"
                    )
                for fd, event in ready:
                    channel, request, sock, began = self._clients[fd]
                    if event == select.EPOLLOUT:
                        sock.send(request)
                        self._poll.modify(fd, select.EPOLLIN)
                    elif self._is_open(fd, sock.recv(65536)):
                        self._poll.unregister(fd)
                        del self._clients[fd]
                        opened.append((channel, sock, now - began))
        except BaseException:
            for _, sock, _ in opened:
                sock.close()
            for _, _, sock, _ in self._clients.values():
                sock.close()
            raise
        finally:
            self._poll.close()
        return opened

    def _connect(self, index: int, item: tuple[int, bytes]) -> None:
        channel, request = item
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
        if self._stalled:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
        sock.bind((f"127.0.0.{index % SOURCE_ADDRESSES + self._source}", 0))
        began = time.monotonic()
        sock.connect_ex(("127.0.0.1", self._port))
        try:
            sock.send(request)  # on loopback the connection is usually established at once
            event = select.EPOLLIN
        except BlockingIOError:
            event = select.EPOLLOUT
        self._clients[sock.fileno()] = (channel, request, sock, began)
        self._poll.register(sock.fileno(), event)

    def _is_open(self, fd: int, data: bytes) -> bool:
        """Take bytes of a response; return whether the stream is open now."""
        replayed = self._replayed.get(fd)
        if replayed is None:
            if not data:
                raise BenchmarkError(
                    f"a stream ended while it was opened: {self._heads.get(fd, b'')[:300]!r}"
                )
            head = self._heads[fd] = self._heads.get(fd, b"") + data
            if not head.startswith(self._status[: len(head)]):
                raise BenchmarkError(f"unexpected response to a watch request: {head[:300]!r}")
            data = head.partition(b"\r\n\r\n")[2]
            if not data:
                return False
            del self._heads[fd]
            if self._position is None:
                return True
            replayed = (self._position, 0)
        elif not data:
            raise BenchmarkError(f"a stream ended after {replayed[1]} of {self._events} events")
        position, count = replayed
        position = position.following.get(data) or position.advance(data)
        count += position.gained
        self._replayed[fd] = (position, count)
        if count < self._events:
            return False
        self.positions.append(position)
        return True


def _expected(position: Position, sent: dict[int, int]) -> int:
    """Return how many events a client is to get, if so many of each sequence were published."""
    return sum(sent.get(sequence, 0) for sequence in position.nexts)


def _describe_faults(positions: list[Position], sent: dict[int, int]) -> list[str]:
    """Return what is wrong with what the clients have got: how many events at how many clients."""
    counts = {
        "lost": [position.lost(sent) for position in positions],
        "doubled": [position.doubled for position in positions],
        "reordered": [position.reordered for position in positions],
        "of another channel": [position.foreign for position in positions],
    }
    return [
        f"events {what}: {sum(each)}, at {sum(map(bool, each))} of {len(each)} clients"
        for what, each in counts.items()
        if any(each)
    ]


def _quantiles(values: list[float]) -> list[float]:
    """Return the quantiles 0, 0.01... 1 of sorted values; none if there are no values."""
    last = len(values) - 1
    return (
        [values[min(part * len(values) // QUANTILES, last)] for part in range(QUANTILES + 1)]
        if values
        else []
    )


def watcher_main(pipe: Connection) -> None:
    """Run the commands of a watching process."""
    serve_commands(pipe, Watchers(pipe).commands())
