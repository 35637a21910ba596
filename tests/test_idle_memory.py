"""What an idle stream keeps in memory, as tracemalloc counts it: the kernel's part is not in it."""

from __future__ import annotations

import gc
import logging
import socket
import tracemalloc

import h2.connection
import h2.events
import pytest
import trio
import trio.testing
from raw_client import HANDSHAKE, request_bytes

import sseserve

STREAMS = 100
EVENT_STREAM = "/api/sessions/s/status/stream"
MAX_WEBSOCKET = 13_000  # bytes, of which the client's socket in this process is 400
MAX_HTTP2 = 24_000  # bytes, of 100 streams on a connection


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
