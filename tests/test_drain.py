"""Graceful shutdown: streams are asked to reconnect, the deadline is kept, and the exit status is 0."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest
import trio
from raw_client import RawWebSocket, chunk, connect, get, request_bytes

from sseserve.client import watch
from sseserve.server import serve

LONG_DRAIN = 600.0  # seconds; no test waits for the end of this drain window
TIMEOUT = 15.0  # seconds; far more than any test takes
# As a terminal starts it, even if the tests were started to ignore these signals.
START = (
    "import os, signal, sys; [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGHUP, signal.SIGINT)]; "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
COMMAND = (sys.executable, "-c", START, "-m", "sseserve")


@asynccontextmanager
async def run_server(**settings):
    """Run a server in a task; its event ``stopped`` is set when it has drained."""
    stopped = trio.Event()

    async def run(*, task_status):
        async with serve(port=0, **settings) as server:
            task_status.started(server)
            # Until a test calls server.stop, as a signal does.
            await server.app.stopping.wait()
        stopped.set()

    with trio.fail_after(TIMEOUT):
        async with trio.open_nursery() as nursery:
            server = await nursery.start(run)
            server.stopped = stopped
            yield server
            server.stop()
            await stopped.wait()


async def wait_for_watchers(server, count):
    """Wait until ``count`` clients watch."""
    while len(server.app.broker.subscribers()) != count:
        await trio.lowlevel.checkpoint()


async def wait_for_idle(server, count):
    """Wait until ``count`` connections have neither a request nor the beginning of one."""
    while server.app.idle.waiting != count:
        await trio.lowlevel.checkpoint()


async def wait_for_drain(server):
    """Wait until all streams have been asked to reconnect."""
    await server.app.stopping.wait()
    await wait_for_watchers(server, 0)


async def test_ready_is_503_during_the_drain():
    """A request to ``/ready`` that had begun before gets 503, and then its connection ends."""
    async with run_server(drain=LONG_DRAIN) as server:
        assert (await get(server.port, "/ready")).status == 200
        request = request_bytes("GET", "/ready")
        connection = await connect(server.port)
        async with connection.stream:
            await wait_for_idle(server, 1)
            await connection.send(request[:10])
            await wait_for_idle(server, 0)
            server.stop()
            await server.app.stopping.wait()
            assert not server.stopped.is_set()
            await connection.send(request[10:])
            response = await connection.read_response()
            assert (response.status, response.error["code"]) == (503, "unavailable")
            assert response.headers["retry-after"] == "5"
            assert await connection.read_to_end() == b""
        await server.stopped.wait()


async def test_requests_that_wait_to_be_accepted_are_served():
    """What the kernel has accepted before the stop is not reset."""
    async with run_server(drain=LONG_DRAIN) as server:
        # Nothing here lets the server's tasks run before it is stopped.
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
        for number, client in enumerate(clients):
            client.sendall(request_bytes("POST", f"/api/sessions/{number}/progress", b"{}"))
        server.stop()
        await server.stopped.wait()
        for client in clients:
            client.settimeout(TIMEOUT)
            assert client.recv(12) == b"HTTP/1.1 202"
            client.close()


async def test_requests_that_come_with_the_stop_are_served(monkeypatch):
    """A kept connection is not closed while a request on it has arrived that nobody has read yet."""
    async with run_server(drain=LONG_DRAIN) as server:
        connections = [await connect(server.port) for _ in range(2)]
        for connection in connections:
            await connection.request("GET", "/health")
        await wait_for_idle(server, 2)
        idle, kept = server.app.idle, connections[0].stream.socket

        async def close_all(close=idle.close_all):
            os.write(kept.fileno(), request_bytes("POST", "/api/sessions/a/progress", b"{}"))
            await close()

        monkeypatch.setattr(idle, "close_all", close_all)
        server.stop()
        assert (await connections[0].read_response()).status == 202
        for connection in connections:
            assert await connection.read_to_end() == b""
            await connection.stream.aclose()
        await server.stopped.wait()


async def test_new_connections_are_refused():
    """During the drain no connection is accepted, while a request that had begun is still served."""
    async with run_server(drain=LONG_DRAIN) as server:
        connection = await connect(server.port)
        async with connection.stream:
            await wait_for_idle(server, 1)
            await connection.send(request_bytes("GET", "/health")[:10])
            await wait_for_idle(server, 0)
            server.stop()
            await server.app.stopping.wait()
            # The listeners are closed one after the other.
            while not all(listener.socket.fileno() == -1 for listener in server._listener._listeners):
                await trio.lowlevel.checkpoint()
            with pytest.raises(OSError):
                await connect(server.port)
            await connection.send(request_bytes("GET", "/health")[10:])
            assert (await connection.read_response()).status == 200
        await server.stopped.wait()


@pytest.mark.parametrize("reused", [False, True], ids=["new connection", "reused connection"])
async def test_streams_are_asked_to_reconnect(reused):
    """Each gets a reconnection time of its own within the drain window, and a clean end."""
    drain = 20
    async with run_server(drain=drain) as server:
        await server.tracker.update("a", progress=1)
        connections = [await connect(server.port) for _ in range(40)]
        for connection in connections:
            if reused:
                await connection.request("GET", "/health")
            await connection.watch("a")
        await wait_for_watchers(server, 40)
        server.stop()
        slots = []
        for connection in connections:
            events = await connection.events()
            assert [e.event for e in events] == ["progress"]
            assert connection.chunks.complete
            assert connection.ended == "eof"
            assert connection.raw.endswith(b"\n\nretry: %d\n" % connection.decoder.retry)
            slots.append(connection.decoder.retry)
            await connection.stream.aclose()
        assert len(set(slots)) == 40
        assert min(slots) >= 500
        assert max(slots) <= 500 + drain * 1000
        # Without clients the server does not wait for the end of the window.
        await server.stopped.wait()


@pytest.mark.parametrize("reused", [False, True], ids=["new connection", "reused connection"])
async def test_websockets_are_closed_with_1012(reused):
    """1012, service restart, comes after everything that was published before."""
    async with run_server(drain=LONG_DRAIN) as server:
        await server.tracker.update("a", progress=1)
        sockets = []
        for _ in range(10):
            connection = await connect(server.port)
            if reused:
                await connection.request("GET", "/health")
            sockets.append(await RawWebSocket.open(connection, "a"))
        await wait_for_watchers(server, 10)
        for number in range(50):
            await server.tracker.emit("a", "x", number)
        server.stop()
        for socket in sockets:
            messages, close = await socket.messages()
            assert close[0] == 1012
            if not reused:
                assert [m["data"] for m in messages[1:]] == list(range(50))
            await socket.connection.stream.aclose()
        await server.stopped.wait()


async def test_running_requests_end():
    """A publish, a batch and a create request in progress get their responses; then their connections end."""
    async with run_server(drain=LONG_DRAIN) as server:
        publish, batch, create = [await connect(server.port) for _ in range(3)]
        await wait_for_idle(server, 3)
        request = request_bytes("POST", "/api/sessions/a/progress", b'{"progress": 1}')
        await publish.send(request[:-3])
        headers = [("Content-Type", "application/x-ndjson"), ("Transfer-Encoding", "chunked")]
        await batch.send(request_bytes("POST", "/api/sessions/b/events", b"", headers))
        await batch.send(chunk(b'{"type": "x"}\n'))
        create_request = request_bytes("POST", "/api/sessions", b'{"session_id": "c"}')
        await create.send(create_request[:-3])
        await wait_for_idle(server, 0)
        server.stop()
        await server.app.stopping.wait()
        await publish.send(request[-3:])
        await batch.send(chunk(b'{"type": "x"}\n') + chunk(b""))
        await create.send(create_request[-3:])
        responses = [await c.read_response() for c in (publish, batch, create)]
        assert [r.status for r in responses] == [202, 202, 201]
        assert responses[1].json["applied"] == 2
        for connection in (publish, batch, create):
            assert await connection.read_to_end() == b""
            await connection.stream.aclose()
        await server.stopped.wait()


async def test_long_polls_end_at_once():
    """Their responses have no new event and the cursor to continue from."""
    async with run_server(drain=LONG_DRAIN) as server:
        cursor = (await server.tracker.update("a", progress=1)).id
        events, status = await connect(server.port), await connect(server.port)
        await events.send(request_bytes("GET", f"/api/sessions/a/events?wait=60&after={cursor}"))
        await status.send(request_bytes("GET", "/api/sessions/a/status?wait=60"))
        while (topic := server.app.broker._topics.get("a")) is None or len(topic.waiters) < 2:
            await trio.lowlevel.checkpoint()
        server.stop()
        page = (await events.read_response()).json
        assert (page["events"], page["next"], page["end"]) == ([], cursor, False)
        assert (await status.read_response()).json["id"] == cursor
        for connection in (events, status):
            assert await connection.read_to_end() == b""
            await connection.stream.aclose()
        await server.stopped.wait()


async def test_idle_connections_are_closed_at_once():
    """A new connection and those of a publisher and a browser end at once."""
    async with run_server(drain=LONG_DRAIN) as server:
        fresh, publisher, browser = [await connect(server.port) for _ in range(3)]
        await publisher.request("POST", "/api/sessions/a/progress", b"{}")
        await browser.request("GET", "/health")
        await wait_for_idle(server, 3)
        server.stop()
        for connection in (fresh, publisher, browser):
            assert await connection.read_to_end() == b""
            await connection.stream.aclose()
        await server.stopped.wait()


@pytest.mark.parametrize(
    ("part", "reused"),
    [
        (b"P", False),
        (b"PRI * HTTP/2.0\r\n\r\nSM", False),
        (b"GET /health HTTP/1.1\r\nHost: a\r\n", False),
        (b"GET /health HTTP/1.1\r\nHost: a\r\n", True),
    ],
)
async def test_incomplete_head_does_not_hold_the_drain(part, reused):
    """The rest of a head, or of the HTTP/2 preface, is not waited for until the deadline."""
    async with run_server(drain=LONG_DRAIN, request_timeout=LONG_DRAIN) as server:
        connection = await connect(server.port)
        if reused:
            await connection.request("GET", "/health")
        await wait_for_idle(server, 1)
        await connection.send(part)
        await wait_for_idle(server, 0)
        server.stop()
        assert await connection.read_to_end() == b""
        await connection.stream.aclose()
        await server.stopped.wait()


@pytest.mark.parametrize("transport", ["sse", "ws", "poll"])
async def test_watching_client_does_not_hold_the_drain(transport, caplog):
    """Whatever it does in the moment of the stop: connecting, reading, or between two polls."""
    caplog.set_level("INFO")
    for steps in range(0, 120, 5):
        async with run_server(drain=LONG_DRAIN) as server, trio.open_nursery() as nursery:
            await server.tracker.update("a", progress=1)

            async def follow(url=server.url):
                async with watch(url, "a", transport=transport) as messages:
                    async for _message in messages:
                        pass

            nursery.start_soon(follow)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            server.stop()
            await server.stopped.wait()
            nursery.cancel_scope.cancel()
    assert "cancelling" not in caplog.text


@pytest.mark.parametrize("kind", ["stream", "ws", "stream reused", "ws reused", "page", "silent", "batch"])
async def test_stalled_client_is_cancelled_at_the_deadline(kind, caplog):
    """A client that reads nothing, or whose request never ends, does not delay the end of the drain."""
    caplog.set_level("INFO")
    settings = {"drain": 0.6, "buffer_bytes": 2**24, "buffer_events": 10**6, "send_timeout": 120}
    async with run_server(**settings) as server:
        await server.tracker.update("a", progress=1)
        connection = await connect(server.port, receive_buffer=4096)
        await wait_for_idle(server, 1)
        if kind.endswith("reused"):
            await connection.request("GET", "/health")
        if kind.startswith("stream"):
            await connection.watch("a")
        elif kind.startswith("ws"):
            await RawWebSocket.open(connection, "a")
        elif kind == "silent":
            await connection.send(request_bytes("POST", "/api/sessions", b"{}")[:-1])
        elif kind == "batch":
            headers = [("Content-Type", "application/x-ndjson"), ("Transfer-Encoding", "chunked")]
            await connection.send(request_bytes("POST", "/api/sessions/a/events", b"", headers))
        for _ in range(120):
            await server.tracker.emit("a", "x", "y" * 30_000)
        if kind == "page":
            await connection.send(request_bytes("GET", "/api/sessions/a/events"))
            await connection.read_exactly(10)
        await wait_for_idle(server, 0)
        server.stop()
        await server.stopped.wait()
        await connection.stream.aclose()
        assert server.app.counters.connections == 0
    assert "cancelling 1 connections" in caplog.text or kind in ("stream", "stream reused")
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


async def test_stopping_twice():
    """A second ``stop`` changes nothing, and publishing in process during the drain is no error."""
    async with run_server(drain=LONG_DRAIN) as server:
        await server.tracker.update("a", progress=1)
        connection = await connect(server.port)
        await connection.watch("a")
        await wait_for_watchers(server, 1)
        server.stop()
        server.stop()
        await wait_for_drain(server)
        await server.tracker.update("a", progress=2)
        assert [e.event for e in await connection.events()] == ["progress"]
        await connection.stream.aclose()
        await server.stopped.wait()


async def test_leaving_the_serve_block_drains():
    """The end of an ``async with serve()`` block drains as a signal does."""
    with trio.fail_after(TIMEOUT):
        async with serve(port=0, drain=5) as server:
            await server.tracker.update("a", progress=1)
            connection = await connect(server.port)
            await connection.watch("a")
            await wait_for_watchers(server, 1)
        assert [e.event for e in await connection.events()] == ["progress"]
        assert connection.decoder.retry >= 500
        await connection.stream.aclose()


async def test_cancelled_server_ends_at_once():
    """A server that is cancelled from outside ends without a drain, even with a client connected."""
    with trio.fail_after(TIMEOUT), trio.CancelScope() as scope:
        async with serve(port=0, drain=LONG_DRAIN) as server:
            await server.tracker.update("a", progress=1)
            connection = await connect(server.port)
            await connection.watch("a")
            await wait_for_watchers(server, 1)
            scope.cancel()
            await trio.sleep_forever()
    assert [e.event for e in await connection.events()] == ["progress"]
    await connection.stream.aclose()


# The process


@asynccontextmanager
async def run_process(*arguments):
    """Run a command that starts a server; its ``port`` is the one that it reports."""
    process = await trio.lowlevel.open_process(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = b""
    try:
        with trio.fail_after(TIMEOUT):
            while not (match := re.search(rb"http://127\.0\.0\.1:(\d+)", output)):
                chunk = await process.stdout.receive_some()
                assert chunk, output
                output += chunk
            process.port = int(match[1])
            yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdout.aclose()


async def read_output(process):
    """Read the rest of a process's output."""
    output = b""
    while chunk := await process.stdout.receive_some():
        output += chunk
    return output.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
async def test_a_process_with_two_hundred_streams_ends_with_status_0(number):
    """On a signal each stream is asked to reconnect; the output has no traceback and no error."""
    async with run_process(*COMMAND, "serve", "--port", "0") as process:
        connections = [await connect(process.port) for _ in range(200)]
        body = b'{"progress": 1}'
        assert (await connections[0].request("POST", "/api/sessions/a/progress", body)).status == 202
        for connection in connections:
            await connection.watch("a")
            assert (await connection.event()).event == "progress"
        process.send_signal(number)
        for connection in connections:
            assert await connection.events() == []
            assert connection.ended == "eof"
            assert connection.decoder.retry >= 500
            await connection.stream.aclose()
        output = await read_output(process)
        assert await process.wait() == 0, output
        assert "streams: 200" in output
        assert "Traceback" not in output
        assert "ERROR" not in output


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_second_signal_changes_nothing(second):
    """Further signals during the drain change neither the responses nor the exit status."""
    async with run_process(*COMMAND, "serve", "--port", "0") as process:
        connection = await connect(process.port)
        await connection.request("POST", "/api/sessions/a/progress", b"{}")
        # Half a request, so that the drain has something to wait for.
        await connection.send(request_bytes("GET", "/health")[:20])
        stream = await connect(process.port)
        await stream.watch("a")
        process.send_signal(signal.SIGTERM)
        await stream.events()
        process.send_signal(second)
        process.send_signal(second)
        await connection.send(request_bytes("GET", "/health")[20:])
        assert (await connection.read_response()).status == 200
        await connection.stream.aclose()
        await stream.stream.aclose()
        output = await read_output(process)
        assert await process.wait() == 0, output
        assert "Traceback" not in output


async def test_demo_ends_with_status_0():
    """A signal in the middle of its job ends the demo without a traceback."""
    async with run_process(*COMMAND, "demo") as process:
        connection = await connect(process.port)
        async with connection.stream:
            await connection.watch("demo-1")
            await connection.event()
            process.send_signal(signal.SIGTERM)
            await connection.events()
        output = await read_output(process)
        assert await process.wait() == 0, output
        assert "Traceback" not in output


async def test_port_in_use_is_reported_in_one_line():
    """Exit status 1, one line on standard error, no traceback."""
    async with serve(port=0, drain=0.1) as server:
        command = [sys.executable, "-m", "sseserve", "serve", "--port", str(server.port)]
        done = await trio.run_process(command, capture_stderr=True, check=False)
    assert done.returncode == 1
    assert done.stderr.decode().count("\n") == 1
    assert str(server.port) in done.stderr.decode()
