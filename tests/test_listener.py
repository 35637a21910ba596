"""Accepting connections: in batches, with options that they inherit, and without losing what waits."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from typing import Any

import pytest
import trio
from harness import ServerHarness
from raw_client import request_bytes

import sseserve
from sseserve.config import Settings
from sseserve.live.transport import Transport
from sseserve.server import listener as listener_module
from sseserve.server.drain import Drain
from sseserve.server.listener import BATCH, Listener, adopt
from sseserve.server.sockets import open_sockets


@contextmanager
def waiting_clients(port: int, number: int) -> Iterator[list[socket.socket]]:
    """Connect clients without letting any task run, so that all of them wait to be accepted."""
    with ExitStack() as clients:
        yield [clients.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(number)]


class AcceptOnly:
    """A listener whose connections do nothing; ``accepted`` are their transports."""

    def __init__(self, harness: ServerHarness, *, max_connections: int = 10_000) -> None:
        self.accepted: list[Transport] = []
        self._harness = harness
        self._max_connections = max_connections

    async def start(self, nursery: trio.Nursery) -> int:
        """Listen; return the port."""
        app = self._harness.app
        drain: Any = app._drain
        assert isinstance(drain, Drain)
        sockets = await open_sockets(Settings(port=0))
        listeners = list(map(adopt, sockets.listen()))
        self.listener = Listener(
            listeners,
            self._serve,
            drain,
            app.counters,
            max_connections=self._max_connections,
            max_per_address=None,
            limited=lambda address: address,
        )
        await nursery.start(self.listener.run)
        return sockets.port

    async def _serve(self, transport: Transport) -> None:
        self.accepted.append(transport)
        try:
            await trio.sleep_forever()
        finally:
            transport.close_socket()


@pytest.fixture
async def accepting(nursery) -> AcceptOnly:
    return AcceptOnly(ServerHarness(nursery))


async def wait_for(accepting: AcceptOnly, number: int) -> list[int]:
    """Wait until so many connections are accepted; return how many there were at each turn of a task."""
    counts = [accepting._harness.app.counters.connections]
    while counts[-1] < number:
        await trio.lowlevel.checkpoint()
        counts.append(accepting._harness.app.counters.connections)
    return counts


async def test_connections_are_accepted_in_batches(accepting, nursery):
    """All that wait are accepted in a few turns, and other tasks run between two batches."""
    port = await accepting.start(nursery)
    with waiting_clients(port, 4 * BATCH):
        counts = await wait_for(accepting, 4 * BATCH)
    steps = [after - before for before, after in pairwise(counts) if after != before]
    # Between two turns of one task there may be two of another: their order is random.
    assert max(steps) <= 2 * BATCH
    assert len(steps) <= 4


async def test_a_stop_accepts_in_batches_too(accepting, nursery):
    """What waits is accepted before the listener is closed, and other tasks run meanwhile."""
    port = await accepting.start(nursery)
    with waiting_clients(port, 4 * BATCH):
        accepting.listener.stop()
        counts = await wait_for(accepting, 4 * BATCH)
    assert max(after - before for before, after in pairwise(counts)) <= 2 * BATCH


async def test_accepted_sockets_inherit_their_options(accepting, nursery):
    """None is set for each connection: the listening socket has what Trio's streams have."""
    port = await accepting.start(nursery)
    with waiting_clients(port, 1):
        await wait_for(accepting, 1)
        await trio.testing.wait_all_tasks_blocked()
        (transport,) = accepting.accepted
        accepted = transport.socket
        assert isinstance(accepted, socket.socket)  # Trio, which sets them, has not seen it
        assert not accepted.getblocking()
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 16 * 1024
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
        assert transport.peer == "127.0.0.1"


async def test_connections_over_the_limit_of_one_batch_are_refused(nursery):
    """The limit holds within a batch: its connections count although their tasks have not run."""
    accepting = AcceptOnly(ServerHarness(nursery), max_connections=10)
    port = await accepting.start(nursery)
    with waiting_clients(port, 15) as clients:
        await wait_for(accepting, 10)
        await trio.testing.wait_all_tasks_blocked()
        refused = []
        for client in clients:
            client.setblocking(False)
            with suppress(BlockingIOError):
                refused.append(client.recv(12))
        assert refused == [b"HTTP/1.1 503"] * 5
        assert len(accepting.accepted) == 10


@pytest.mark.parametrize(
    ("number", "logged"), [(errno.ECONNABORTED, 0), (errno.EMFILE, 1)], ids=["lost", "no files"]
)
async def test_errors_of_accept(autojump_clock, accepting, nursery, monkeypatch, caplog, number, logged):
    """One that was lost while it waited is skipped; without file descriptors accepting is retried."""
    failures = [OSError(number, "no")]

    class Failing(socket.socket):
        def accept(self):
            if failures:
                raise failures.pop()
            return super().accept()

    def duplicate(listener):
        failing = Failing(fileno=socket.dup(listener.socket.fileno()))
        failing.setblocking(False)
        return failing

    monkeypatch.setattr(listener_module, "_duplicate", duplicate)
    port = await accepting.start(nursery)
    with caplog.at_level(logging.ERROR), waiting_clients(port, 3):
        while len(accepting.accepted) < 3:
            await trio.sleep(0.05)
    assert not failures
    assert [record.levelname for record in caplog.records] == ["ERROR"] * logged


async def test_nothing_listens_after_the_stop():
    """No duplicate of the listening socket is left: the next connection is refused at once."""
    async with sseserve.serve(port=0) as server:
        with waiting_clients(server.port, 1) as (client,):
            client.sendall(request_bytes("GET", "/health"))
            client.setblocking(False)
            await trio.lowlevel.wait_readable(client)
        server.stop()
        await server.app.stopping.wait()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))
