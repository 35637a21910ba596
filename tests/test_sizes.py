"""How large requests and events may be, and how long they may take to arrive."""

from __future__ import annotations

import json
from typing import Any

import h2.errors
import httpx
import pytest
import trio
from harness import HTTP2Client, ServerHarness
from raw_client import HANDSHAKE, RawConnection, chunk, request_bytes
from trio.testing import wait_all_tasks_blocked

import sseserve
from sseserve.config import Settings
from sseserve.dialects.transcription import TRANSCRIPTION
from sseserve.errors import PayloadTooLarge

STREAM = "/api/sessions/s/status/stream"
NDJSON = "application/x-ndjson"
MAX_HEAD = 16 * 1024
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"


@pytest.fixture
async def harness(nursery) -> ServerHarness:
    return ServerHarness(nursery, max_event=1000)


# Events

TOO_LARGE = "x" * 999  # with its quotes


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/sessions/s/events", {"type": "x", "data": TOO_LARGE}),
        ("/api/sessions/s/progress", {"progress": 1, "data": TOO_LARGE}),
        ("/api/sessions", {"session_id": "s", "data": TOO_LARGE}),
        ("/api/interaction/events/s", {"type": "x", "data": TOO_LARGE}),
        ("/api/jobs", {"prompt": TOO_LARGE}),
        ("/api/v1/jobs", {"prompt": TOO_LARGE}),
        ("/api/v1/sessions/s/status", {"status": "processing", "message": "", "more": TOO_LARGE}),
        ("/api/v1/sessions/s/status", {"status": "processing", "message": TOO_LARGE}),
    ],
)
async def test_data_of_an_event_is_limited(autojump_clock, harness, path, body):
    """Over every path that publishes or creates: 413, and nothing is recorded."""
    refused = await harness.post(path, body)
    assert (refused.status, refused.error["code"]) == (413, "payload_too_large")
    assert "max_event = 1000" in refused.error["message"]
    assert await harness.tracker.sessions() == []
    assert harness.app.counters.refused["max_event"] == 1
    small = {name: value[:500] if value == TOO_LARGE else value for name, value in body.items()}
    assert (await harness.post(path, small)).status in (201, 202)


async def test_the_largest_event(autojump_clock, harness):
    """The limit itself is allowed; white space around the data does not count."""
    body = b'{"type": "x", "data": [%b]}' % (b'"' + b"x" * 996 + b'"')
    assert (await harness.post("/api/sessions/s/events", body)).status == 202
    body = b'{"type": "x", "data": [\n%b"x"]}' % (b" " * 2000)
    assert (await harness.post("/api/sessions/s/events", body)).status == 202


async def test_a_line_with_too_much_data(autojump_clock, harness):
    """It ends the batch; the lines before it stand."""
    lines = [{"type": "x", "data": 1}, {"type": "x", "data": TOO_LARGE}, {"type": "x", "data": 3}]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    refused = await harness.request("POST", "/api/sessions/s/events", body, [("Content-Type", NDJSON)])
    assert (refused.status, refused.error["line"], refused.error["applied"]) == (413, 2, 1)
    assert (await harness.tracker.get("s")).seq == 1


async def test_data_of_this_process(autojump_clock, harness):
    for publish in (
        harness.tracker.update("s", data=TOO_LARGE),
        harness.tracker.emit("s", "x", TOO_LARGE),
        harness.tracker.create("s", data=TOO_LARGE),
        harness.events.publish("s", "x", TOO_LARGE),
    ):
        with pytest.raises(PayloadTooLarge, match="max_event"):
            await publish
    assert await harness.tracker.sessions() == []


async def test_messages_of_channels(autojump_clock, nursery):
    """A message is refused and counted as those over HTTP are."""
    harness = ServerHarness(nursery, max_event=1000, redis_url="redis://127.0.0.1:1", engine="memory:")
    reader, channel = harness.app.channels._reader, TRANSCRIPTION.redis_channel
    payload = json.dumps({"status": "processing", "more": TOO_LARGE}).encode()
    done = reader.receive(nursery, "transcription", channel, "s", payload)
    await done.wait()
    assert await harness.tracker.sessions() == []
    assert harness.app.counters.channel_messages == {("transcription", "refused"): 1}


async def test_a_session_with_data_from_before_the_limit_still_ends(autojump_clock, nursery):
    """The limit holds for what is published, not for what a later event repeats."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("s", data="x" * 5000)
    harness.tracker._max_event = 1000
    assert (await harness.post("/api/sessions/s/progress", {"status": "done"})).status == 202


# Heads


def padded(size: int) -> list[tuple[str, str]]:
    """Header fields of that many bytes, as HTTP/1.1 writes them."""
    return [("x-pad", "x" * (size - len("x-pad: \r\n")))]


@pytest.mark.parametrize("pieces", [1, 2, 100])
@pytest.mark.parametrize("where", ["fields", "target"])
async def test_a_large_head(autojump_clock, nursery, pieces, where):
    """431, or 414 for the target, whether it arrives at once or in pieces; and the connection ends."""
    harness = ServerHarness(nursery)
    too_large = 431 if where == "fields" else 414
    for size, status in ((MAX_HEAD - 300, 200), (MAX_HEAD + 300, too_large), (60_000, too_large)):
        connection = harness.connect()
        if where == "fields":
            data = request_bytes("GET", "/health", headers=padded(size))
        else:
            data = request_bytes("GET", "/health?" + "x" * size)
        for at in range(0, len(data), len(data) // pieces + 1):
            await connection.send(data[at : at + len(data) // pieces + 1])
            await wait_all_tasks_blocked()
        response = await connection.read_response()
        assert response.status == status
        if status == too_large:
            assert response.error["code"] == ("head_too_large" if where == "fields" else "target_too_long")
            assert "max_head" in response.error["message"]
            assert await connection.read_to_end() == b""
    assert harness.app.counters.refused["max_head"] == 2


async def test_a_head_without_an_end(autojump_clock, nursery):
    """No more of it is read than the limit and one read."""
    harness = ServerHarness(nursery)
    connection = harness.connect()
    await connection.send(b"GET / HTTP/1.1\r\nX: " + b"x" * MAX_HEAD)
    assert (await connection.read_response()).status == 431


@pytest.mark.parametrize("kind", ["request", "stream", "socket"])
async def test_a_large_head_over_http2(autojump_clock, nursery, kind):
    """It ends its own stream with 431; what is far too large ends the connection."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("s", progress=1)
    target = {"stream": STREAM, "socket": "/api/sessions/s/status/ws"}.get(kind, "/health")
    client = HTTP2Client(harness.connect())
    (other,) = await client.request(STREAM)
    await client.read_until(lambda: client.messages(other))
    for fields in (padded(MAX_HEAD + 300), [("x", "y" * 100)] * 200):
        if kind == "socket":
            number = await client.connect(target, fields)
        else:
            (number,) = await client.request(target, headers=fields)
        await client.read_until(lambda number=number: number in client.ended)
        assert client.statuses[number] == 431
        assert json.loads(client.bodies[number])["error"]["code"] == "head_too_large"
    (number,) = await client.request(target + "?" + "x" * MAX_HEAD) if kind != "socket" else (number,)
    await client.read_until(lambda: number in client.ended)
    assert client.statuses[number] == (414 if kind != "socket" else 431)
    # The other requests of the connection go on.
    await harness.tracker.update("s", progress=2)
    await client.read_until(lambda: len(client.messages(other)) == 2)
    await client.request("/health", headers=padded(70_000))
    with pytest.raises(AssertionError, match="ended"):
        await client.read_until(lambda: False)
    assert client.connection_error is h2.errors.ErrorCodes.ENHANCE_YOUR_CALM


async def test_a_larger_limit_of_heads(autojump_clock, nursery):
    """It holds over HTTP/2, too."""
    harness = ServerHarness(nursery, max_head=100_000)
    client = HTTP2Client(harness.connect())
    for size, status in ((90_000, 200), (110_000, 431)):
        (number,) = await client.request("/health", headers=padded(size))
        await client.read_until(lambda number=number: number in client.ended)
        assert client.statuses[number] == status


# Times


async def ended_after(connection: RawConnection) -> float:
    """Read to the end of a connection; return how many seconds that took."""
    began = trio.current_time()
    while await connection.receive():
        pass
    return trio.current_time() - began


@pytest.mark.parametrize("step", [None, 0.5])
async def test_a_head_that_is_not_complete_in_time(autojump_clock, nursery, step):
    """408 after ten seconds, also if a byte comes now and then."""
    harness = ServerHarness(nursery)
    connection = harness.connect()
    data = request_bytes("GET", "/health", headers=padded(200))
    began = trio.current_time()

    async def trickle() -> None:
        for byte in data[5:]:
            await connection.send(bytes((byte,)))
            await trio.sleep(step)

    await connection.send(data[:5])
    if step is not None:
        nursery.start_soon(trickle)
    response = await connection.read_response()
    assert trio.current_time() - began == pytest.approx(10, abs=0.1)
    assert (response.status, response.error["code"]) == (408, "request_timeout")
    assert "request_timeout = 10" in response.error["message"]
    assert harness.app.counters.refused["request_timeout"] == 1
    nursery.cancel_scope.cancel()


HEADERS_FRAME = b"\0\0\x01\x01\x01\0\0\0\x01\x82"  # :method GET, without END_HEADERS


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(PREFACE[:10], id="preface"),
        pytest.param(PREFACE, id="no settings"),
        pytest.param(PREFACE + SETTINGS[:4], id="half of the settings"),
        pytest.param(PREFACE + b"\0\0\x08\x06\0\0\0\0\0" + b"x" * 8, id="a ping instead of settings"),
        pytest.param(PREFACE + SETTINGS + b"\0", id="a byte of a frame"),
        pytest.param(PREFACE + SETTINGS + HEADERS_FRAME[:-1], id="half of a head"),
        pytest.param(PREFACE + SETTINGS + HEADERS_FRAME, id="no continuation"),
        pytest.param(
            PREFACE + SETTINGS + HEADERS_FRAME + b"\0\0\x01\x09\0\0\0\0\x01", id="half a continuation"
        ),
    ],
)
@pytest.mark.parametrize("trickles", [False, True])
async def test_a_head_over_http2_that_is_not_complete_in_time(autojump_clock, nursery, data, trickles):
    connection = ServerHarness(nursery).connect()
    size = 5 if trickles else 0
    await connection.send(data[: len(data) - size])
    began = trio.current_time()

    async def trickle() -> None:
        for byte in data[len(data) - size :]:
            await trio.sleep(0.1)
            await connection.send(bytes((byte,)))

    nursery.start_soon(trickle)
    await ended_after(connection)
    assert trio.current_time() - began == pytest.approx(10, abs=1.1)  # and the time to read the GOAWAY


async def test_a_head_that_waits_while_a_stream_is_open(autojump_clock, nursery):
    """The stream does not let its client keep half a head for ever; in the end the connection closes."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("s", progress=1)
    connection = harness.connect()
    client = HTTP2Client(connection)
    (number,) = await client.request(STREAM)
    await client.read_until(lambda: client.messages(number))
    await trio.sleep(100)
    await client.read_until(lambda: True)
    await connection.send(b"\0\0\x01\x01\x01\0\0\0\x03\x82")
    assert await ended_after(connection) == pytest.approx(10, abs=1.1)


async def test_slow_data_over_http2_ends_its_request_only(autojump_clock, nursery):
    """A frame of a body is no head: the request gets 400, and the others of the connection go on."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("s", progress=1)
    client = HTTP2Client(harness.connect())
    (stream,) = await client.request(STREAM)
    number = await client.begin_post("/api/sessions/s/events", b"{", "application/json")
    frame = b"\0\1\0\0\1" + number.to_bytes(4, "big") + b'"type": "x"}'.ljust(256)
    for at in range(0, len(frame), 10):
        await client._connection.send(frame[at : at + 10])
        await trio.sleep(1)
    await client.read_until(lambda: number in client.ended)
    assert client.statuses[number] == 400
    await harness.tracker.update("s", progress=2)
    await client.read_until(lambda: len(client.messages(stream)) == 2)


@pytest.mark.parametrize("http2", [False, True])
async def test_a_line_that_never_ends(autojump_clock, nursery, http2):
    """The next line may be an hour away; one that has begun has the time of a body of its size."""
    harness = ServerHarness(nursery)
    connection = harness.connect()
    target = "/api/sessions/s/events"
    client = HTTP2Client(connection)
    number = 0
    if http2:
        number = await client.begin_post(target, b"", NDJSON)
    else:
        head = request_bytes("POST", target, b"", [("Transfer-Encoding", "chunked")], content_type=NDJSON)
        await connection.send(head)

    async def send(data: bytes) -> None:
        if http2:
            await client.send_data(number, data)
        else:
            await connection.send(chunk(data))

    line = b'{"type": "x"}\n'
    for pause in (3500, 3500, 9):
        await send(line)
        await trio.sleep(pause)
    await send(line + line[:5])
    await trio.sleep(9)
    await send(line[5:] + b"\n\n")
    await trio.sleep(3500)
    began = trio.current_time()

    async def trickle() -> None:
        for _ in range(1000):
            await send(b"[")
            await trio.sleep(0.5)

    if http2:
        for _ in range(22):
            await send(b"[")
            await trio.sleep(0.5)
        await client.read_until(lambda: number in client.statuses and client.bodies[number])
        status, error = client.statuses[number], json.loads(client.bodies[number])["error"]
    else:
        nursery.start_soon(trickle)
        response = await connection.read_response()
        status, error = response.status, response.error
        assert trio.current_time() - began == pytest.approx(10, abs=0.6)
    assert (status, error["line"], error["applied"]) == (400, 8, 5)
    assert "in time" in error["message"]
    nursery.cancel_scope.cancel()


def test_defaults():
    settings = Settings()
    assert (settings.max_head, settings.max_body, settings.max_event) == (2**14, 2**20, 2**18)
    assert settings.request_timeout == 10


async def test_a_large_body(autojump_clock, nursery):
    harness = ServerHarness(nursery, max_body=1000)
    refused = await harness.post("/api/sessions/s/events", {"type": "x", "data": "x" * 1000})
    assert (refused.status, refused.error["code"]) == (413, "payload_too_large")
    assert "max_body = 1000" in refused.error["message"]
    assert harness.app.counters.refused["max_body"] == 1


async def test_a_websocket_with_a_large_head(autojump_clock, nursery):
    harness = ServerHarness(nursery)
    headers: list[Any] = [*HANDSHAKE, *padded(MAX_HEAD)]
    assert (await harness.get("/api/sessions/s/status/ws", headers)).status == 431


async def test_viewers_of_a_session():
    """At most 1,000 of 256 characters each: they are kept with the session, and read with every list."""
    async with sseserve.serve(port=0) as server, httpx.AsyncClient(base_url=server.url) as client:
        for viewers, status in ((["v" * 256] * 1000, 201), (["v"] * 1001, 422), (["v" * 257], 422)):
            body = {"session_id": f"s{status}", "viewers": viewers}
            assert (await client.post("/api/sessions", json=body)).status_code == status
        assert [session.id for session in await server.tracker.sessions()] == ["s201"]
