"""Clients that are slow, silent, reset or vanish: they end, nothing of them is left, and others go on.

``python -m benchmarks hostile`` measures what they cost. A peer that vanishes is in a network namespace,
whose link goes down: that needs root and ip(8).
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import os
import random
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.lowlevel
from raw_client import HANDSHAKE, RawConnection, connect, frame, post, request_bytes, reset
from test_http2_floods import PREFACE, STREAM
from test_http2_floods import frame as http2_frame

import sseserve
from sseserve.server import listener

STREAM_REQUEST = request_bytes("GET", "/api/sessions/a/status/stream")
SOCKET_REQUEST = request_bytes("GET", "/api/sessions/a/status/ws", headers=HANDSHAKE)
EVENT = request_bytes("POST", "/api/sessions/a/events", b'{"type": "x", "data": 1}')
HTTP2_STREAM = PREFACE + http2_frame(4) + http2_frame(1, 5, 1, STREAM)


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@asynccontextmanager
async def undisturbed(**settings) -> AsyncIterator[sseserve.Server]:
    """Run a server with a watcher; after the block all others have left, and the watcher has every event."""
    async with sseserve.serve(port=0, **settings) as server:
        await server.tracker.update("a", progress=1)
        await server.tracker.update("honest", progress=1)
        watcher = await connect(server.port)
        async with watcher.stream:
            await watcher.watch("honest")
            await watcher.event()
            await trio.testing.wait_all_tasks_blocked(0.01)
            before = tasks(), files()
            yield server
            with trio.move_on_after(10):
                while server.app.counters.connections > 1 or (tasks(), files()) != before:
                    await trio.sleep(0.01)
            assert (tasks(), files()) == before
            assert server.app.broker.statistics().subscribers == 1
            for number in range(3):
                response = await post(
                    server.port, "/api/sessions/honest/events", {"type": "n", "data": number}
                )
                assert response.status == 202
                event = await watcher.event()
                assert (event.event, event.data) == ("n", str(number))


def no_errors(caplog) -> bool:
    messages = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return [message for message in messages if "(setting insecure)" not in message] == []


async def test_clients_that_reset_at_random_bytes(caplog):
    """Of the request, or of the response."""
    rng = random.Random(9)
    requests = [STREAM_REQUEST, SOCKET_REQUEST + frame(9), EVENT * 3, HTTP2_STREAM]
    async with undisturbed() as server:
        for _ in range(200):
            request = rng.choice(requests)
            connection = await connect(server.port, receive_buffer=2048)
            await connection.send(request[: rng.randint(0, len(request))])
            if rng.random() < 0.5:
                with trio.move_on_after(0.001):
                    await connection.stream.receive_some(rng.randint(1, 400))
            reset(connection)
    assert no_errors(caplog)


@pytest.mark.parametrize(
    "data",
    [b"", b"GET /api", EVENT[:-5], PREFACE, HTTP2_STREAM[:60]],
    ids=["nothing", "half a head", "half a body", "HTTP/2 without a request", "half a head of HTTP/2"],
)
async def test_silent_clients_are_closed_in_time(caplog, data):
    """By the server: the clients never close, and never read."""
    timeouts = {"keep_alive": 0.3, "request_timeout": 0.3}
    async with undisturbed(**timeouts) as server:
        connections = [await connect(server.port) for _ in range(100)]
        for connection in connections:
            await connection.send(data)
        while server.app.counters.connections < 101:
            await trio.lowlevel.checkpoint()
        with trio.fail_after(20):
            while server.app.counters.connections > 1:
                await trio.sleep(0.01)
        for connection in connections:
            await connection.stream.aclose()
    assert no_errors(caplog)


async def test_publishers_that_never_read_are_not_read(caplog):
    """The server stops reading from those whose responses it cannot send, and closes them."""
    async with undisturbed(send_timeout=0.5) as server:
        # The kernel would close them as well, after DEAD_PEER_MS.
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:

                async def publish() -> None:
                    connection = await connect(server.port, receive_buffer=2048)
                    async with connection.stream:
                        with suppress(trio.BrokenResourceError):
                            while True:
                                await connection.send(EVENT * 100)

                for _ in range(5):
                    nursery.start_soon(publish)
        # All five were closed by the server.
        assert server.app.counters.connections <= 6
    assert no_errors(caplog)


async def test_readers_that_never_read_are_cut(caplog):
    """What waits for them is bounded; the events go on for the others."""
    async with undisturbed(send_timeout=0.5, buffer_bytes=32_768) as server:
        slow = [await connect(server.port, receive_buffer=2048) for _ in range(20)]
        for number, connection in enumerate(slow):
            await connection.send(STREAM_REQUEST if number % 2 else HTTP2_STREAM)
        while server.app.broker.statistics().subscribers < 21:
            await trio.lowlevel.checkpoint()
        with trio.fail_after(30):
            while server.app.broker.statistics().subscribers > 1:
                await server.tracker.emit("a", "x", "y" * 5000)
                await trio.sleep(0.001)
        for connection in slow:
            await connection.stream.aclose()
    assert no_errors(caplog)


# A peer that vanishes

ADDRESS, PEER = "10.254.77.1", "10.254.77.2"


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=10)


_numbers = itertools.count()


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace with a link to this one; its end has the name of the namespace."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a network namespace needs root and ip(8)")
    name = f"sse{os.getpid() % 1_000_000}-{next(_numbers)}"
    ours = f"{name}h"
    try:
        run("ip", "netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode()}")
    try:
        try:
            run("ip", "link", "add", ours, "type", "veth", "peer", "name", name, "netns", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"links between network namespaces cannot be made here: {error.stderr.decode()}")
        run("ip", "address", "add", f"{ADDRESS}/30", "dev", ours)
        run("ip", "link", "set", ours, "up")
        run("ip", "-n", name, "address", "add", f"{PEER}/30", "dev", name)
        run("ip", "-n", name, "link", "set", name, "up")
        yield name
        run("ip", "link", "delete", ours)
    finally:
        run("ip", "netns", "delete", name)


def socket_in(namespace: str) -> socket.socket:
    """Make a socket in a network namespace (setns(2)); a thread of its own is moved there."""
    made: list[socket.socket] = []

    def make() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{namespace}") as file:
            if libc.setns(file.fileno(), 0) == 0:
                made.append(socket.socket())

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


VANISHING = {
    "SSE": STREAM_REQUEST,
    "WebSocket": SOCKET_REQUEST,
    "HTTP/2": HTTP2_STREAM,
    "half a body": EVENT[:-5],
}


@pytest.mark.parametrize("kind", VANISHING)
async def test_a_peer_that_vanishes(namespace, monkeypatch, caplog, kind):
    """Its packets are dropped from now on: neither a FIN nor a reset ever arrives."""
    monkeypatch.setattr(listener, "DEAD_PEER_MS", 1000)
    async with undisturbed(host="0.0.0.0", insecure=True, request_timeout=2) as server:
        sock = trio.socket.from_stdlib_socket(socket_in(namespace))
        await sock.connect((ADDRESS, server.port))
        peer = RawConnection(trio.SocketStream(sock))
        async with peer.stream:
            await peer.send(VANISHING[kind])
            if kind != "half a body":
                assert await peer.receive()
            while server.app.counters.connections < 2:
                await trio.lowlevel.checkpoint()
            run("ip", "-n", namespace, "link", "set", namespace, "down")
            await server.tracker.emit("a", "x", 1)
            with trio.fail_after(20):
                while server.app.counters.connections > 1:
                    await trio.sleep(0.05)
    assert no_errors(caplog)
