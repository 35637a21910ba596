"""What an idle stream keeps in memory: Python, as tracemalloc counts it, or the process; not the kernel."""

from __future__ import annotations

import gc
import logging
import resource
import signal
import socket
import ssl
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import h2.connection
import h2.events
import httpx
import pytest
import trio
import trio.testing
from certificates import Authority
from processes import Program
from raw_client import HANDSHAKE, request_bytes

import sseserve

STREAMS = 100
EVENT_STREAM = "/api/sessions/s/status/stream"
MAX_WEBSOCKET = 13_000  # bytes, of which the client's socket in this process is 400
STREAMS_OVER_TLS = 300
MAX_TLS = 22_000  # bytes
MAX_HTTP2 = 6_000  # bytes, of 100 streams on a connection


async def open_websockets(port: int, count: int) -> list[socket.socket]:
    """Open that many, one after another; return them when each has its snapshot."""
    head = request_bytes("GET", "/api/sessions/s/status/ws", headers=HANDSHAKE)
    clients = []
    for _ in range(count):
        client = socket.create_connection(("127.0.0.1", port))
        client.setblocking(False)
        client.sendall(head)
        received = b""
        while b'"queued"' not in received:
            await trio.lowlevel.wait_readable(client)
            received += client.recv(4096)
        # A pong, as every client sends one for each ping.
        client.sendall(b"\x8a\x80\0\0\0\0")
        clients.append(client)
    await trio.testing.wait_all_tasks_blocked(0.05)
    return clients


async def open_http2_streams(port: int, count: int) -> list[socket.socket]:
    """Open that many event streams on a connection; return its socket when each has its snapshot."""
    client = socket.create_connection(("127.0.0.1", port))
    client.setblocking(False)
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    for _ in range(count):
        number = connection.get_next_available_stream_id()
        target = {":method": "GET", ":scheme": "http", ":authority": "localhost", ":path": EVENT_STREAM}
        connection.send_headers(number, list(target.items()), end_stream=True)
        client.sendall(connection.data_to_send())
        has_snapshot = False
        while not has_snapshot:
            await trio.lowlevel.wait_readable(client)
            for event in connection.receive_data(client.recv(65536)):
                is_data = isinstance(event, h2.events.DataReceived)
                has_snapshot = has_snapshot or (is_data and event.stream_id == number)
    await trio.testing.wait_all_tasks_blocked(0.05)
    return [client]


@pytest.mark.parametrize(
    ("open_streams", "limit"),
    [(open_websockets, MAX_WEBSOCKET), (open_http2_streams, MAX_HTTP2)],
    ids=["WebSocket", "HTTP/2"],
)
async def test_idle_stream(monkeypatch, open_streams, limit):
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # pytest keeps what is logged
    async with sseserve.serve(port=0) as server:
        await server.tracker.create("s")
        clients = await open_streams(server.port, 20)
        gc.collect()
        tracemalloc.start()
        try:
            clients += await open_streams(server.port, STREAMS)
            gc.collect()
            size, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert server.app.broker.statistics().subscribers == 20 + STREAMS
        for client in clients:
            client.close()
    assert size / STREAMS < limit


def open_tls_streams(port: int, context: ssl.SSLContext, count: int) -> Iterator[ssl.SSLSocket]:
    """Open that many event streams, one after another; yield each when it has its snapshot."""
    for _ in range(count):
        client = context.wrap_socket(
            socket.create_connection(("127.0.0.1", port)), server_hostname="localhost"
        )
        client.sendall(request_bytes("GET", EVENT_STREAM))
        received = b""
        while b'"queued"' not in received:
            received += client.recv(4096)
        yield client


def test_idle_stream_over_tls(tmp_path):
    """Of the whole process: three quarters of it is OpenSSL's."""
    authority = Authority()
    context = ssl.create_default_context(cafile=authority.write(tmp_path))
    cert, key = authority.issue().write(tmp_path)
    serve = (sys.executable, "-m", "sseserve", "serve", "--port", "0", "--tls-cert", cert, "--tls-key", key)
    with Program(*serve) as server, ExitStack() as stack:
        port = int(server.wait_for_output(r"serving at https://127.0.0.1:(\d+)")[1])

        def size_with(count: int) -> int:
            """Open more streams; return the size of the process, in bytes."""
            for client in open_tls_streams(port, context, count):
                stack.enter_context(client)
            statm = Path(f"/proc/{server.pid}/statm").read_text()
            return int(statm.split()[1]) * resource.getpagesize()

        with httpx.Client(verify=context) as client:
            assert client.post(f"https://localhost:{port}/api/sessions", json={"session_id": "s"}).is_success
        before = size_with(50)
        assert (size_with(STREAMS_OVER_TLS) - before) / STREAMS_OVER_TLS < MAX_TLS
        stack.close()
        assert server.wait(signal.SIGTERM) == 0
