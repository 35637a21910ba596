"""Event streams as bytes: their chunks over HTTP/1.1, and blocks that every client reads in the same way."""

from __future__ import annotations

import pytest
import trio
from harness import HTTP2Client, ServerHarness
from raw_client import RawConnection, request_bytes
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from sseserve.dialects import Encoding
from sseserve.http.routes import ROUTES
from sseserve.http.routing import Kind
from sseserve.live.subscriber import Subscriber

STREAM = "/api/sessions/a/status/stream"
BUNDLE = "/api/streams?session=a&session=b"


async def deleted(harness):
    await harness.tracker.delete("a")
    await harness.tracker.delete("b")


async def succeeded(harness):
    await harness.tracker.update("a", status="done")
    await harness.tracker.update("b", status="done")


async def asked_to_reconnect(harness):
    harness.app.stopping.set()
    for subscriber in harness.broker.subscribers():
        subscriber.ask_to_reconnect(500)
    harness.broker.notify_all()


async def cut(harness):
    for subscriber in harness.broker.subscribers():
        subscriber.cut("too slow")


async def read(connection: RawConnection) -> bytes:
    """Read a stream to its end."""
    await connection.events()
    return connection.raw


@pytest.fixture
async def watched(autojump_clock, nursery):
    harness = ServerHarness(nursery, retry_ms=50)
    await harness.tracker.update("a", progress=1)
    await harness.tracker.update("b", progress=1)
    return harness


@pytest.mark.parametrize("end", [succeeded, deleted, asked_to_reconnect])
@pytest.mark.parametrize("target", [STREAM, BUNDLE])
async def test_an_intended_end_completes_the_response(watched, target, end):
    """It ends with the last chunk (RFC 9112, section 7.1), and the connection with it."""
    stream = await watched.stream(target)
    assert stream.response.headers["transfer-encoding"] == "chunked"
    assert stream.response.headers["connection"] == "close"
    await stream.next()
    await end(watched)
    await stream.read_to_end()
    assert stream.connection.chunks.complete
    assert stream.connection.ended == "eof"


async def test_a_late_watcher_gets_a_complete_response(watched):
    """So does one that comes with an old cursor."""
    await succeeded(watched)
    for cursor in (None, "unknown-1"):
        stream = await watched.stream(STREAM, cursor)
        assert (await stream.read_to_end())[-1].event == "complete"
        assert stream.connection.chunks.complete


async def test_a_cut_client_gets_an_incomplete_response(watched):
    """It learns the reason, and that there is more: it resumes."""
    stream = await watched.stream(STREAM)
    await stream.next()
    await cut(watched)
    assert [message.event for message in await stream.read_to_end()] == ["overflow"]
    assert not stream.connection.chunks.complete
    assert stream.connection.ended == "eof"


@pytest.mark.parametrize("target", [STREAM, BUNDLE])
async def test_a_cancelled_connection_leaves_an_incomplete_response(watched, target):
    """As at the deadline of a shutdown."""
    client, server = memory_stream_pair()
    connection = RawConnection(client)
    async with trio.open_nursery() as connections:
        connections.start_soon(watched.app.connections.serve, server)
        await connection.send(request_bytes("GET", target))
        await connection.read_head()
        await connection.event()
        connections.cancel_scope.cancel()
    assert len(await connection.events()) == (target == BUNDLE)  # the other snapshot
    assert not connection.chunks.complete


async def test_a_failed_replay_leaves_an_incomplete_response(watched, monkeypatch):
    """An error in the middle of a long replay is not an end."""
    for number in range(300):
        await watched.tracker.emit("a", "x", number)
    original = watched.app.engine.read

    async def fail(session_id, after, limit):
        if after > 100:
            raise RuntimeError("the disk is gone")
        return await original(session_id, after, limit)

    monkeypatch.setattr(watched.app.engine, "read", fail)
    stream = await watched.stream(STREAM, str((await watched.tracker.get("a")).cursor).split("-")[0] + "-1")
    assert len(await stream.read_to_end()) == 129
    assert not stream.connection.chunks.complete


async def test_http_1_0_gets_no_chunks(autojump_clock, watched):
    """There the response ends with its connection (RFC 9112, section 6.3); the stream is the same."""
    http10, http11 = watched.connect(), await watched.stream(STREAM)
    await http10.send(request_bytes("GET", STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
    response = await http10.read_head()
    assert "transfer-encoding" not in response.headers
    assert response.headers["connection"] == "close"
    await watched.tracker.emit("a", "x", "№ 1\n")
    await trio.sleep(20)  # a heartbeat
    await succeeded(watched)
    assert await read(http10) == await read(http11.connection)
    assert http10.raw.startswith(b"retry: 50\nevent: progress\ndata: ")
    assert b"\n\n: heartbeat\nevent: complete\n" in http10.raw
    assert http10.ended == "eof"


async def test_http_2_gets_no_chunks(watched):
    """It has frames of its own (RFC 9113, section 8.2.2)."""
    client, http11 = HTTP2Client(watched.connect()), await watched.stream(STREAM)
    (number,) = await client.request(STREAM)
    await client.read_until(lambda: client.bodies[number])
    await wait_all_tasks_blocked()
    await watched.tracker.emit("a", "x", 1)
    await succeeded(watched)
    await client.read_until(lambda: client.ended)
    assert client.bodies[number] == await read(http11.connection)


@pytest.mark.parametrize(("end", "resets"), [(succeeded, 0), (asked_to_reconnect, 0), (cut, 1)])
async def test_a_cut_client_of_http_2_gets_a_reset(watched, end, resets, caplog):
    """Its stream is incomplete too (RFC 9113, section 8.1); the others of the connection go on."""
    client = HTTP2Client(watched.connect())
    (number,) = await client.request(STREAM)
    await client.read_until(lambda: client.bodies[number])
    await wait_all_tasks_blocked()
    await end(watched)
    await client.read_until(lambda: client.ended)
    assert len(client.resets) == resets
    assert client.messages(number)[-1].event == (
        "overflow" if resets else "complete" if end is succeeded else "progress"
    )
    (number,) = await client.request("/health")
    await client.read_until(lambda: number in client.ended)
    assert client.statuses[number] == 200
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


async def test_clients_of_one_version_share_the_encoded_bytes(watched, monkeypatch):
    """Each event is encoded once, as one chunk; without chunks only if there is a client for that."""
    encoded: list[Encoding] = []
    offered = []
    encode, offer = Encoding.event, Subscriber.offer

    def count(self, session_id, epoch, event):
        encoded.append(self)
        return encode(self, session_id, epoch, event)

    def record(self, events):
        offered.append(events.data)
        offer(self, events)

    monkeypatch.setattr(Encoding, "event", count)
    monkeypatch.setattr(Subscriber, "offer", record)
    streams = [await watched.stream(STREAM) for _ in range(5)]
    await watched.tracker.emit("a", "x", 1)
    await wait_all_tasks_blocked()
    assert [encoding.chunked for encoding in encoded] == [True]
    assert len(offered) == 5
    assert all(data is offered[0] for data in offered)
    assert offered[0].count(b"\r\n") == 2
    http10 = watched.connect()
    await http10.send(request_bytes("GET", STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
    await wait_all_tasks_blocked()
    encoded.clear()
    await watched.tracker.emit("a", "x", 2)
    await wait_all_tasks_blocked()
    assert sorted(encoding.chunked for encoding in encoded) == [False, True]
    # retry, the snapshot, and each event are a chunk.
    await streams[0].take(3)
    assert len(streams[0].connection.chunks.sizes) == 4


# Blocks

STREAMS = [route for route in ROUTES if route.kind is Kind.STREAM and route.name != "diagnose_stream"]


@pytest.mark.parametrize("cursor", [None, "unknown-1"])
@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("route", STREAMS, ids=lambda route: route.name)
async def test_no_empty_message(autojump_clock, nursery, route, progress, cursor):
    """Every empty line ends a block with data: some clients make a message of any other, too."""
    harness = ServerHarness(nursery, retry_ms=50)
    await harness.tracker.emit("a", "x", 1)
    if progress:
        await harness.tracker.update("a", progress=1, stage="tts")
    stream = await harness.stream(route.path.replace("{id}", "a") + "?session=a", cursor)
    await trio.sleep(100)
    await harness.tracker.emit("a", "x", 2)
    await trio.sleep(100)
    await asked_to_reconnect(harness)
    await stream.read_to_end()
    *blocks, rest = stream.raw.decode().split("\n\n")
    assert blocks
    assert all("\ndata: " in "\n" + block for block in blocks), blocks
    assert rest.split("\n")[-2].startswith("retry: ")
    if route.name != "list_stream":  # is never idle
        assert "\n: " in stream.raw.decode()
