"""What an idle stream keeps in memory, as tracemalloc counts it: the kernel's part is not in it."""

from __future__ import annotations

import gc
import socket
import tracemalloc

import trio
import trio.testing
from raw_client import HANDSHAKE, request_bytes

import sseserve

STREAMS = 100
MAX_WEBSOCKET = 13_000  # bytes, of which the client's socket in this process is 400


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


async def test_idle_websocket():
    async with sseserve.serve(port=0) as server:
        await server.tracker.create("s")
        clients = await open_websockets(server.port, 20)
        gc.collect()
        tracemalloc.start()
        try:
            clients += await open_websockets(server.port, STREAMS)
            gc.collect()
            size, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert server.app.broker.statistics().subscribers == len(clients)
        for client in clients:
            client.close()
    assert size / STREAMS < MAX_WEBSOCKET
