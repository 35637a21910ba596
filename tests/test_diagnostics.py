"""/api/diagnostics: what the server tells of requests, and what its diagnostic streams cost."""

from __future__ import annotations

import json

import pytest
import trio
from harness import START, HTTP2Client, ServerHarness, logged
from raw_client import HANDSHAKE, RawWebSocket, chunk, request_bytes
from tokens import SECRET, make_token
from trio.testing import wait_all_tasks_blocked


@pytest.fixture
def harness(nursery):
    return ServerHarness(nursery)


async def test_a_request_as_the_server_sees_it(autojump_clock, harness):
    """Its version, its host, its address, what proxies add; the names of all fields."""
    headers = [("Via", "1.1 varnish"), ("X-Forwarded-For", "192.0.2.1"), ("X-Request-ID", "one")]
    seen = (await harness.get("/api/diagnostics", headers)).json
    assert (seen["id"], seen["http_version"], seen["host"]) == ("one", "1.1", "localhost")
    assert seen["time"] == START
    assert seen["fields"] == {"via": "1.1 varnish", "x-forwarded-for": "192.0.2.1"}
    assert seen["names"] == ["host", "via", "x-forwarded-for", "x-request-id"]
    assert seen["heartbeat"] == 30.0
    assert (seen["proxy"], seen["is_open"]) == ("", False)


async def test_no_secret_is_told(autojump_clock, nursery):
    """Of fields that may hold one there are the names only."""
    harness = ServerHarness(nursery, jwt_key=SECRET)
    token = make_token(now=int(START), sub="ann")
    headers = [("Authorization", f"Bearer {token}"), ("Cookie", "a=secret"), ("X-Api-Key", "secret")]
    body = (await harness.get("/api/diagnostics", headers)).body.decode()
    assert {"authorization", "cookie", "x-api-key"} <= set(json.loads(body)["names"])
    assert token not in body
    assert "secret" not in body


async def test_a_stream_says_when_its_events_were_sent(autojump_clock, harness):
    """The request, the events, silence, and the end; without a heartbeat."""
    stream = await harness.stream("/api/diagnostics/stream?events=3&interval=2&size=5&quiet=100&name=n")
    request, *probes, end = await stream.read_to_end()
    assert (request.event, request.data["is_open"]) == ("request", True)
    assert [probe.data for probe in probes] == [
        {"number": number, "time": START + 2 * number, "text": "....."} for number in (1, 2, 3)
    ]
    assert (end.event, end.data) == ("end", {"time": START + 106})
    assert stream.comments == []
    assert stream.connection.chunks.complete


async def test_by_websocket(autojump_clock, harness):
    """The same messages; pings are answered meanwhile, and the end is a normal closure."""
    connection = harness.connect()
    await connection.send(request_bytes("GET", "/api/diagnostics/ws?events=2&interval=2", headers=HANDSHAKE))
    assert (await connection.read_head()).status == 101
    socket = RawWebSocket(connection)
    assert (await socket.message())["event"] == "request"
    await socket.send(0x9, b"hello")
    assert await socket.frame() == (0xA, b"hello")
    messages, (code, _) = await socket.messages()
    assert [message["event"] for message in messages] == ["probe", "probe", "end"]
    assert code == 1000


async def test_over_http2(autojump_clock, harness):
    """As over HTTP/1.1."""
    client = HTTP2Client(harness.connect())
    [number] = await client.request("/api/diagnostics/stream?events=2&interval=1")
    await client.read_until(lambda: number in client.ended)
    messages = client.messages(number)
    assert [message.event for message in messages] == ["request", "probe", "probe", "end"]
    assert messages[0].data["http_version"] == "2"


@pytest.mark.parametrize("path", ["stream", "ws"])
@pytest.mark.parametrize(
    "query", ["events=51", "interval=10.1", "size=16385", "quiet=3601", "events=x", "events=-1", "size=nan"]
)
async def test_limits_of_a_stream(autojump_clock, harness, path, query):
    """It cannot be made to send much, or to last for ever."""
    response = await harness.get(f"/api/diagnostics/{path}?{query}", HANDSHAKE if path == "ws" else ())
    assert response.status == 422
    assert response.error["message"].startswith(query.partition("=")[0])


@pytest.mark.parametrize("target", ["/api/diagnostics/stream?quiet=9", "/api/diagnostics?wait=9"])
async def test_streams_and_polls_are_counted(autojump_clock, nursery, target):
    """As all streams are, and given back."""
    harness = ServerHarness(nursery, max_streams=1)
    first = harness.start_get(target.replace("/stream?quiet", "?wait")) if "wait" in target else None
    stream = None if first is not None else await harness.stream(target)
    await wait_all_tasks_blocked()
    assert (await harness.get(target)).status == 429
    if stream is not None:
        await stream.read_to_end()
    await trio.sleep(10)
    assert harness.app.open_streams.total == 0


async def test_who_leaves_is_noticed(autojump_clock, harness):
    """The name of a stream is known as long as it is open."""
    streams = [await harness.stream("/api/diagnostics/stream?quiet=99&name=n") for _ in "ab"]

    async def is_open() -> bool:
        await wait_all_tasks_blocked()
        return (await harness.get("/api/diagnostics?name=n")).json["is_open"]

    assert await is_open()
    await streams[0].disconnect()
    assert await is_open()
    await streams[1].disconnect()
    assert not await is_open()


async def test_when_the_parts_of_a_body_arrive(autojump_clock, harness):
    """Each with its time and its size."""
    connection = harness.connect()
    head = request_bytes("POST", "/api/diagnostics", None, [("Transfer-Encoding", "chunked")])
    await connection.send(head)
    for data in (b"one\n", b"three\n"):
        await trio.sleep(2)
        await connection.send(chunk(data))
    await connection.send(b"0\r\n\r\n")
    assert (await connection.read_response()).json["parts"] == [[2.0, 4], [4.0, 6]]
    assert (await harness.post("/api/diagnostics", b"ab")).json["parts"] == [[0.0, 2]]


async def test_limits_of_a_body(autojump_clock, harness):
    """Neither many bytes nor many parts."""
    assert (await harness.post("/api/diagnostics", b"a" * 65_537)).status == 413
    connection = harness.connect()
    head = request_bytes("POST", "/api/diagnostics", None, [("Transfer-Encoding", "chunked")])
    await connection.send(head)
    for _ in range(101):
        await wait_all_tasks_blocked()
        await connection.send(chunk(b"a"))
    assert (await connection.read_response()).status == 413


@pytest.mark.parametrize("query", ["quiet=3600", "events=50&interval=10"])
async def test_a_server_that_stops(autojump_clock, harness, query):
    """It asks the client to reconnect, and does not wait for the end."""
    stream = await harness.stream(f"/api/diagnostics/stream?{query}")
    waiting = harness.start_get("/api/diagnostics?wait=60")
    await wait_all_tasks_blocked()
    harness.app.stopping.set()
    messages = await stream.read_to_end()
    assert [message.event for message in messages] == ["request"]
    assert stream.retry is not None
    await wait_all_tasks_blocked()
    assert waiting[0].status == 200


@pytest.mark.parametrize("path", ["stream", "ws"])
async def test_the_end_in_the_log(autojump_clock, harness, caplog, path):
    """It has ended; the server does not stop."""
    caplog.set_level("INFO")
    connection = harness.connect()
    headers = HANDSHAKE if path == "ws" else ()
    await connection.send(request_bytes("GET", f"/api/diagnostics/{path}?events=1", headers=headers))
    await connection.read_head()
    if path == "ws":
        await RawWebSocket(connection).messages()
    else:
        await connection.events()
    await connection.stream.aclose()
    await wait_all_tasks_blocked()
    (line,) = logged(caplog, "stream ended")
    assert line["reason"] == "ended"
