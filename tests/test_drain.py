"""The end of a server: everybody is told, nobody holds it up, and the exit status is 0."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest
import trio
from raw_client import RawWebSocket, chunk, connect, get, request_bytes

from sseserve.server import serve

LONG = 600.0  # a drain that nobody should have to wait for
PATIENCE = 15.0  # to fail a test that waits for what does not come; no test needs it


@asynccontextmanager
async def a_server(**settings):
    """A server in a task of its own: ``stopped`` is set when it has drained."""
    stopped = trio.Event()

    async def run(*, task_status):
        async with serve(port=0, **settings) as server:
            task_status.started(server)
            # Until somebody calls server.stop, as a signal does.
            await server.app.stopping.wait()
        stopped.set()

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            server = await nursery.start(run)
            server.stopped = stopped
            yield server
            server.stop()
            await stopped.wait()


async def settled(server, *, watchers):
    while len(server.app.broker.subscribers()) != watchers:
        await trio.lowlevel.checkpoint()


async def idle(server, count):
    """Wait until so many connections have no request under way, nor the beginning of one."""
    while len(server.app.idle._scopes) != count:
        await trio.lowlevel.checkpoint()


async def begun(server):
    """Wait until the drain has told everybody."""
    await server.app.stopping.wait()
    await settled(server, watchers=0)


async def test_an_open_connection_learns_that_the_server_is_not_ready():
    """``/ready`` says 503 to who has begun to ask, then the connection ends."""
    async with a_server(drain=LONG) as server:
        assert (await get(server.port, "/ready")).status == 200
        request = request_bytes("GET", "/ready")
        connection = await connect(server.port)
        async with connection.stream:
            await idle(server, 1)
            await connection.send(request[:10])
            await idle(server, 0)
            server.stop()
            await server.app.stopping.wait()
            assert not server.stopped.is_set()
            await connection.send(request[10:])
            response = await connection.read_response()
            assert (response.status, response.error["code"]) == (503, "unavailable")
            assert await connection.read_to_end() == b""
        await server.stopped.wait()


async def test_new_connections_are_refused():
    """Nobody is let in any more, while who is inside is still served."""
    async with a_server(drain=LONG) as server:
        connection = await connect(server.port)
        async with connection.stream:
            await idle(server, 1)
            await connection.send(request_bytes("GET", "/health")[:10])
            await idle(server, 0)
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


@pytest.mark.parametrize("behind", [False, True], ids=["direct", "behind"])
async def test_every_stream_is_told_to_come_back(behind):
    """Each with a time of its own inside the drain window, and a clean end."""
    drain = 20
    async with a_server(drain=drain) as server:
        await server.tracker.update("a", progress=1)
        connections = [await connect(server.port) for _ in range(40)]
        for connection in connections:
            if behind:
                await connection.request("GET", "/health")
            await connection.watch("a")
        await settled(server, watchers=40)
        server.stop()
        slots = []
        for connection in connections:
            events = await connection.events()
            assert [e.event for e in events] == ["progress"]
            assert connection.ended == "eof"
            assert connection.raw.endswith(b"\n\nretry: %d\n\n" % connection.decoder.retry)
            slots.append(connection.decoder.retry)
            await connection.stream.aclose()
        assert len(set(slots)) == 40
        assert min(slots) >= 500
        assert max(slots) <= 500 + drain * 1000
        # Nobody is left, so nobody waits for the window to pass.
        await server.stopped.wait()


@pytest.mark.parametrize("behind", [False, True], ids=["direct", "behind"])
async def test_every_socket_is_closed_with_service_restart(behind):
    """1012, behind everything that was published before."""
    async with a_server(drain=LONG) as server:
        await server.tracker.update("a", progress=1)
        sockets = []
        for _ in range(10):
            connection = await connect(server.port)
            if behind:
                await connection.request("GET", "/health")
            sockets.append(await RawWebSocket.open(connection, "a"))
        await settled(server, watchers=10)
        for number in range(50):
            await server.tracker.emit("a", "x", number)
        server.stop()
        for socket in sockets:
            messages, close = await socket.messages()
            assert close[0] == 1012
            if not behind:
                assert [m["data"] for m in messages[1:]] == list(range(50))
            await socket.connection.stream.aclose()
        await server.stopped.wait()


async def test_running_requests_end():
    """A publish, a batch and a page that are under way get their answers, then their connections end."""
    async with a_server(drain=LONG) as server:
        publish, batch, create = [await connect(server.port) for _ in range(3)]
        await idle(server, 3)
        request = request_bytes("POST", "/api/sessions/a/progress", b'{"progress": 1}')
        await publish.send(request[:-3])
        headers = [("Content-Type", "application/x-ndjson"), ("Transfer-Encoding", "chunked")]
        await batch.send(request_bytes("POST", "/api/sessions/b/events", b"", headers))
        await batch.send(chunk(b'{"type": "x"}\n'))
        made = request_bytes("POST", "/api/sessions", b'{"session_id": "c"}')
        await create.send(made[:-3])
        await idle(server, 0)
        server.stop()
        await server.app.stopping.wait()
        await publish.send(request[-3:])
        await batch.send(chunk(b'{"type": "x"}\n') + chunk(b""))
        await create.send(made[-3:])
        responses = [await c.read_response() for c in (publish, batch, create)]
        assert [r.status for r in responses] == [202, 202, 201]
        assert responses[1].json["applied"] == 2
        for connection in (publish, batch, create):
            assert await connection.read_to_end() == b""
            await connection.stream.aclose()
        await server.stopped.wait()


async def test_long_polls_end_at_once():
    """With an answer that is an answer: nothing new, and where to go on."""
    async with a_server(drain=LONG) as server:
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


async def test_idle_connections_hold_nobody_up():
    """Fresh ones, a publisher's and a browser's are ended at once."""
    async with a_server(drain=LONG) as server:
        fresh, publisher, browser = [await connect(server.port) for _ in range(3)]
        await publisher.request("POST", "/api/sessions/a/progress", b"{}")
        await browser.request("GET", "/health")
        await idle(server, 3)
        server.stop()
        for connection in (fresh, publisher, browser):
            assert await connection.read_to_end() == b""
            await connection.stream.aclose()
        await server.stopped.wait()


@pytest.mark.parametrize("kind", ["stream", "ws", "stream behind", "ws behind", "page", "silent", "batch"])
async def test_a_stalled_client_does_not_hold_the_deadline(kind, caplog):
    """Who takes nothing, says nothing or never ends is cancelled at the deadline, whatever serves it."""
    caplog.set_level("INFO")
    settings = {"drain": 0.6, "buffer_bytes": 2**24, "buffer_events": 10**6, "send_timeout": 120}
    async with a_server(**settings) as server:
        await server.tracker.update("a", progress=1)
        connection = await connect(server.port, receive_buffer=4096)
        await idle(server, 1)
        if kind.endswith("behind"):
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
        await idle(server, 0)
        server.stop()
        await server.stopped.wait()
        await connection.stream.aclose()
        assert server.app.counters.connections == 0
    assert "cancelling 1 connections" in caplog.text or kind in ("stream", "stream behind")
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


async def test_a_drain_may_begin_twice_and_work_may_go_on():
    """Stopping again changes nothing, and what is published meanwhile by the process itself is no error."""
    async with a_server(drain=LONG) as server:
        await server.tracker.update("a", progress=1)
        connection = await connect(server.port)
        await connection.watch("a")
        await settled(server, watchers=1)
        server.stop()
        server.stop()
        await begun(server)
        await server.tracker.update("a", progress=2)
        assert [e.event for e in await connection.events()] == ["progress"]
        await connection.stream.aclose()
        await server.stopped.wait()


async def test_leaving_the_block_drains():
    """In a program of one's own the end of the block is the signal."""
    with trio.fail_after(PATIENCE):
        async with serve(port=0, drain=5) as server:
            await server.tracker.update("a", progress=1)
            connection = await connect(server.port)
            await connection.watch("a")
            await settled(server, watchers=1)
        assert [e.event for e in await connection.events()] == ["progress"]
        assert connection.decoder.retry >= 500
        await connection.stream.aclose()


async def test_a_cancellation_is_not_held_up():
    """Cancelled from outside a server ends at once, whoever is connected."""
    with trio.fail_after(PATIENCE), trio.CancelScope() as scope:
        async with serve(port=0, drain=LONG) as server:
            await server.tracker.update("a", progress=1)
            connection = await connect(server.port)
            await connection.watch("a")
            await settled(server, watchers=1)
            scope.cancel()
            await trio.sleep_forever()
    assert [e.event for e in await connection.events()] == ["progress"]
    await connection.stream.aclose()


# The process


@asynccontextmanager
async def a_process(*arguments):
    """A server process: its own, and the port that it says it has."""
    command = [sys.executable, "-m", "sseserve", *arguments]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = b""
    try:
        with trio.fail_after(PATIENCE):
            while not (found := re.search(rb"http://127\.0\.0\.1:(\d+)", said)):
                chunk = await process.stdout.receive_some()
                assert chunk, said
                said += chunk
            process.port = int(found[1])
            yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdout.aclose()


async def output(process):
    """Read what it still says, to its end."""
    said = b""
    while chunk := await process.stdout.receive_some():
        said += chunk
    return said.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_a_process_with_two_hundred_streams_ends_with_status_0(number):
    """Each stream is told to come back; nothing is left on the screen that looks like an accident."""
    async with a_process("serve", "--port", "0") as process:
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
        said = await output(process)
        assert await process.wait() == 0, said
        assert "200 streams" in said
        assert "Traceback" not in said
        assert "ERROR" not in said


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_a_second_signal_breaks_nothing(second):
    """Who is impatient gets the same end."""
    async with a_process("serve", "--port", "0") as process:
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
        said = await output(process)
        assert await process.wait() == 0, said
        assert "Traceback" not in said


async def test_the_demonstration_ends_with_status_0():
    """In the middle of its job."""
    async with a_process("demo") as process:
        connection = await connect(process.port)
        async with connection.stream:
            await connection.watch("demo-1")
            await connection.event()
            process.send_signal(signal.SIGTERM)
            await connection.events()
        said = await output(process)
        assert await process.wait() == 0, said
        assert "Traceback" not in said


async def test_a_port_that_is_taken_is_said_in_one_line():
    """Exit status 1, and no traceback."""
    async with serve(port=0, drain=0.1) as server:
        command = [sys.executable, "-m", "sseserve", "serve", "--port", str(server.port)]
        done = await trio.run_process(command, capture_stderr=True, check=False)
    assert done.returncode == 1
    assert done.stderr.decode().count("\n") == 1
    assert str(server.port) in done.stderr.decode()
