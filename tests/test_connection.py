"""One connection over memory streams and a virtual clock: requests, timeouts, errors, slow readers."""

from __future__ import annotations

import json
import random
from contextlib import suppress

import h2.config
import h2.connection
import h2.errors
import h2.events
import pytest
import trio
import trio.testing
from harness import HTTP2Client
from raw_client import HANDSHAKE, RawConnection, RawWebSocket, chunk, frame, request_bytes
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from sseserve.config import load
from sseserve.live.transport import LINGER, Transport
from sseserve.server.application import Application

PROGRESS = request_bytes("POST", "/api/sessions/a/progress", b'{"progress": 7}')
EVENT = request_bytes("POST", "/api/sessions/a/events", b'{"type": "x", "data": 1}')
STATUS = request_bytes("GET", "/api/sessions/a/status")
STREAM = request_bytes("GET", "/api/sessions/a/status/stream")
SOCKET = request_bytes("GET", "/api/sessions/a/status/ws", headers=HANDSHAKE)
BATCH = [("Content-Type", "application/x-ndjson"), ("Transfer-Encoding", "chunked")]

every_kind = pytest.mark.parametrize(
    "request_", [PROGRESS, STATUS, STREAM, SOCKET], ids=["publish", "web", "sse", "ws"]
)


class BrokenStream(trio.abc.HalfCloseableStream):
    """The server's end of a stream that breaks when ``budget`` bytes have been sent."""

    def __init__(self, stream, budget):
        self.stream = stream
        self.budget = budget

    async def send_all(self, data):
        if len(data) > self.budget:
            await self.stream.send_all(data[: self.budget])
            self.budget = 0
            await self.stream.aclose()
            raise trio.BrokenResourceError("connection reset by peer")
        self.budget -= len(data)
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self):
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes=None):
        return await self.stream.receive_some(max_bytes)

    async def send_eof(self):
        await self.stream.send_eof()

    async def aclose(self):
        await self.stream.aclose()


class ConnectionHarness:
    """A server without a listener. ``connect`` opens a connection to it; ``open`` counts the open ones."""

    def __init__(self, nursery, **settings):
        self.app = Application(load(environ={}, flags=settings), nursery, clock=lambda: 0.0)
        self.tracker = self.app.tracker
        self.open = 0
        self._nursery = nursery

    def connect(self, *, budget=None, pair=memory_stream_pair):
        client, server = pair()
        self.open += 1
        self._nursery.start_soon(self._serve, server if budget is None else BrokenStream(server, budget))
        return RawConnection(client)

    async def _serve(self, stream):
        await self.app.connections.serve(stream)
        self.open -= 1

    @property
    def watchers(self):
        return len(self.app.broker.subscribers())

    async def seq(self, session_id="a"):
        return sum(s.seq for s in await self.tracker.sessions() if s.id == session_id)


@pytest.fixture
async def harness(nursery):
    return ConnectionHarness(nursery)


async def wait_until(condition):
    """Wait, in virtual time, until a condition holds."""
    while not condition():
        await trio.sleep(0.01)


# Timeouts


async def test_idle_connection_is_closed_after_the_keep_alive_time(autojump_clock, harness):
    """A connection without a request is closed without a response."""
    start = trio.current_time()
    assert await harness.connect().read_to_end() == b""
    assert trio.current_time() - start == pytest.approx(75)


@pytest.mark.parametrize("step", [5.0, None], ids=["slow-loris", "silence"])
async def test_incomplete_request_head_times_out(autojump_clock, harness, nursery, step):
    """From its first byte on the whole head may take the request timeout, however slowly it arrives."""
    connection = harness.connect()
    start = trio.current_time()

    async def trickle():
        for byte in PROGRESS[:60] if step else ():
            await trio.sleep(step)
            await connection.send(bytes((byte,)))

    await connection.send(b"P")
    if step:
        nursery.start_soon(trickle)
        assert (await connection.read_response()).status == 408
    else:
        # It may be the preface of HTTP/2.
        assert await connection.read_to_end() == b""
    assert trio.current_time() - start == pytest.approx(10)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("target", ["/api/sessions/a/progress", "/api/sessions"])
async def test_incomplete_body_times_out(autojump_clock, harness, target):
    """Half a body and then nothing gets 400; nothing changes, and the connection ends."""
    connection = harness.connect()
    await connection.send(request_bytes("POST", target, b'{"progress": 7}')[:-5])
    response = await connection.read_response()
    assert (response.status, response.error["code"]) == (400, "bad_request")
    assert await connection.read_to_end() == b""
    assert await harness.tracker.sessions() == []


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
async def test_body_that_trickles_times_out(nursery, autojump_clock, harness, http2):
    """A byte now and then does not keep a request open: a body has a minimum rate."""
    connection = harness.connect()
    start = trio.current_time()

    async def trickle(send):
        while True:
            await trio.sleep(1)
            await send(b" ")

    if http2:
        client = HTTP2Client(connection)
        number = await client.begin_post("/api/sessions", b"{", "application/json")
        nursery.start_soon(trickle, lambda data: client.send_data(number, data))
        await client.read_until(lambda: number in client.ended)
        assert client.statuses[number] == 400
    else:
        headers = [("Content-Length", "1000")]
        await connection.send(request_bytes("POST", "/api/sessions", headers=headers) + b"{")
        nursery.start_soon(trickle, connection.send)
        assert (await connection.read_response()).status == 400
    assert trio.current_time() - start == pytest.approx(10, abs=1.5)
    nursery.cancel_scope.cancel()


async def test_large_body_may_take_its_time(autojump_clock, harness):
    """At the minimum rate a body may take longer than the request timeout."""
    connection = harness.connect()
    body = b'{"data": "%s"}' % (b"x" * 100_000)
    request = request_bytes("POST", "/api/sessions/a/progress", body)
    for at in range(0, len(request), 8192):
        await connection.send(request[at : at + 8192])
        await trio.sleep(7)
    assert (await connection.read_response()).status == 202
    assert trio.current_time() > 80


async def test_ndjson_lines_may_be_almost_an_hour_apart(autojump_clock, harness):
    """Each line is applied when it arrives; the response comes at the end of the body."""
    connection = harness.connect()
    await connection.send(request_bytes("POST", "/api/sessions/a/events", b"", BATCH))
    for number in range(1, 4):
        line = b'{"progress": %d}' % number
        await connection.send(chunk(line[:5]))
        await wait_all_tasks_blocked()
        assert await harness.seq() == number - 1
        await connection.send(chunk(line[5:] + b"\n"))
        await wait_all_tasks_blocked()
        assert await harness.seq() == number
        await trio.sleep(3599)
        assert connection.buffer == b""
    await connection.send(chunk(b'{"type": "x"}') + chunk(b""))
    response = await connection.read_response()
    assert (response.status, response.json["applied"]) == (202, 4)
    assert (await connection.request("POST", "/api/sessions/a/progress", b'{"progress": 9}')).status == 202


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
async def test_silent_ndjson_is_refused(nursery, autojump_clock, http2):
    """After an hour, or ``ndjson_timeout`` seconds, without a byte; the lines before stand."""
    harness = ConnectionHarness(nursery, ndjson_timeout=60)
    connection = harness.connect()
    target = "/api/sessions/a/events"
    start = trio.current_time()
    if http2:
        client = HTTP2Client(connection)
        number = await client.begin_post(target, b'{"progress": 1}\n\n', "application/x-ndjson")
        await client.read_until(lambda: number in client.ended)
        assert client.statuses[number] == 400
        error = json.loads(client.bodies[number])["error"]
    else:
        await connection.send(request_bytes("POST", target, b"", BATCH) + chunk(b'{"progress": 1}\n\n'))
        response = await connection.read_response()
        assert response.status == 400
        error = response.error
    assert trio.current_time() - start == pytest.approx(60, abs=1)
    assert (error["line"], error["applied"]) == (3, 1)
    assert await harness.seq() == 1


async def test_keep_alive_time_restarts_after_each_request(autojump_clock, harness):
    """A publisher may wait for almost the keep-alive time between two requests."""
    connection = harness.connect()
    for percent in (1, 2, 3):
        body = b'{"progress": %d}' % percent
        assert (await connection.request("POST", "/api/sessions/a/progress", body)).status == 202
        await trio.sleep(74)
    start = trio.current_time()
    assert await connection.read_to_end() == b""
    assert trio.current_time() - start == pytest.approx(1)


@pytest.mark.parametrize("data", [b"", b"GET /hea"], ids=["silence", "slow-loris"])
async def test_idle_connection_after_a_response_is_closed(autojump_clock, harness, data):
    """After a response neither silence nor half a request head keeps the connection open."""
    connection = harness.connect()
    assert (await connection.request("GET", "/health")).status == 200
    start = trio.current_time()
    if data:
        await connection.send(data)
        assert (await connection.read_response()).status == 408
    assert await connection.read_to_end() == b""
    assert trio.current_time() - start <= 75
    await wait_until(lambda: not harness.open)


async def test_idle_http_2_connection_is_closed(autojump_clock, harness):
    """A client that sends only the HTTP/2 preface gets SETTINGS, and the end after the keep-alive time."""
    connection = harness.connect()
    await connection.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
    start = trio.current_time()
    assert (await connection.read_to_end())[3] == 4  # a SETTINGS frame
    assert trio.current_time() - start == pytest.approx(75)


@pytest.mark.parametrize("first", [b"", STATUS, PROGRESS], ids=["first", "after status", "after publish"])
async def test_idle_stream_outlives_all_timeouts(autojump_clock, harness, first):
    """A stream without events stays open, as the first and as a later request of its connection."""
    await harness.tracker.update("a", progress=1)
    connection = harness.connect()
    if first:
        await connection.send(first)
        await connection.read_response()
    response = await connection.watch("a")
    assert response.status == 200
    assert (await connection.event()).event == "progress"
    await trio.sleep(100_000)
    await harness.tracker.update("a", status="done")
    assert [e.event for e in await connection.events()] == ["complete"]
    await wait_until(lambda: not harness.open)


async def test_disconnect_from_a_stream_is_noticed_at_once(autojump_clock, harness):
    """On a new and on a reused connection, and without anything being sent."""
    await harness.tracker.update("a", progress=1)
    for first in (None, STATUS):
        connection = harness.connect()
        if first:
            await connection.send(first)
            await connection.read_response()
        await connection.watch("a")
        await wait_all_tasks_blocked()
        assert harness.watchers == 1
        await connection.stream.aclose()
        await wait_all_tasks_blocked()
        assert (harness.watchers, harness.open) == (0, 0)


# Several requests on one connection


async def test_pipelined_publishes_are_answered_in_order(autojump_clock, harness):
    """Pipelined requests are served one after another, in their order."""
    connection = harness.connect()
    bodies = [b'{"progress": %d}' % n for n in range(20)]
    await connection.send(
        b"".join(request_bytes("POST", "/api/sessions/a/progress", body) for body in bodies)
    )
    ids = [(await connection.read_response()).json["id"] for _ in bodies]
    assert [int(cursor.split("-")[1]) for cursor in ids] == list(range(1, 21))


@pytest.mark.parametrize("at_once", [True, False])
async def test_publishing_and_polling_on_one_connection(autojump_clock, harness, at_once):
    """Publish and status requests share a connection, pipelined or one by one."""
    connection = harness.connect()
    requests = [PROGRESS, EVENT, STATUS, EVENT, STATUS]
    responses = []
    if at_once:
        await connection.send(b"".join(requests))
    for request in requests:
        if not at_once:
            await connection.send(request)
        responses.append(await connection.read_response())
    assert [r.status for r in responses] == [202, 202, 200, 202, 200]
    assert [r.json["id"][-1] for r in responses] == list("12233")


@pytest.mark.parametrize("first", [b"", EVENT, STATUS], ids=["first", "after publish", "after status"])
async def test_stream_is_the_same_on_a_reused_connection(autojump_clock, harness, first):
    """A stream's head and body do not depend on the requests before it."""
    harness.tracker._clock = lambda: 0.0
    await harness.tracker.emit("a", "x", 1)
    await harness.tracker.update("a", progress=5)
    connections = [harness.connect(), harness.connect()]
    cursor = str((await harness.tracker.get("a")).cursor)
    await connections[1].send(first)
    if first:
        await connections[1].read_response()
    heads = [await c.watch("a", headers=[("X-Request-ID", "same")]) for c in connections]
    assert heads[0] == heads[1]
    assert heads[0].headers["cache-control"] == "no-cache, no-transform"
    await harness.tracker.update("a", status="failed", error="no")
    bodies = [await c.read_to_end() for c in connections]
    assert bodies[0] == bodies[1]
    resumed = harness.connect()
    await resumed.watch("a", cursor)
    assert (await resumed.event()).event == "resume"


async def test_request_after_a_stream_request_is_ignored(autojump_clock, harness):
    """A stream ends its connection, so a request that was pipelined after it gets no response."""
    connection = harness.connect()
    await harness.tracker.update("a", status="done")
    await connection.send(STREAM + STATUS)
    assert (await connection.read_head()).status == 200
    assert [e.event for e in await connection.events()] == ["complete"]


@pytest.mark.parametrize(
    "request_",
    [
        PROGRESS.replace(b"HTTP/1.1", b"HTTP/1.0"),
        PROGRESS.replace(b"Host", b"Connection: close\r\nHost"),
        STATUS.replace(b"HTTP/1.1", b"HTTP/1.0"),
        STATUS.replace(b"Host", b"Connection: close\r\nHost"),
    ],
)
async def test_connection_close(autojump_clock, harness, request_):
    """A request by HTTP/1.0 or with ``Connection: close`` gets a complete response, then the end."""
    await harness.tracker.update("a", progress=1)
    connection = harness.connect()
    await connection.send(request_)
    assert (await connection.read_response()).status in (200, 202)
    assert await connection.read_to_end() == b""


async def test_100_continue(autojump_clock, harness):
    """A request with ``Expect: 100-continue`` gets 100 before its body is sent."""
    for target, body in (("/api/sessions/a/progress", b'{"progress": 1}'), ("/api/sessions", b"{}")):
        connection = harness.connect()
        request = request_bytes("POST", target, body, [("Expect", "100-continue")])
        await connection.send(request[: -len(body)])
        assert (await connection.read_response()).status == 100
        await connection.send(body)
        assert (await connection.read_response()).status in (201, 202)


async def test_no_100_continue_for_a_refused_request(nursery, autojump_clock):
    """A request that is refused whatever its body gets its error instead of 100."""
    connection = ConnectionHarness(nursery, auto_create=False).connect()
    await connection.send(
        request_bytes("POST", "/api/sessions/a/progress", b"{}", [("Expect", "100-continue")])[:-2]
    )
    assert (await connection.read_response()).status == 404
    assert await connection.read_to_end() == b""


# Broken and malformed requests


@every_kind
async def test_request_in_two_pieces(autojump_clock, harness, request_):
    """A request that is split at any byte is served like a whole one."""
    await harness.tracker.update("a", progress=1)
    for at in range(1, len(request_)):
        connection = harness.connect()
        await connection.send(request_[:at])
        await wait_all_tasks_blocked()
        await connection.send(request_[at:])
        assert (await connection.read_head()).status in (101, 200, 202), at
        await connection.stream.aclose()
    await wait_all_tasks_blocked()
    assert (harness.watchers, harness.open) == (0, 0)


@every_kind
async def test_disconnect_at_any_byte_of_a_request(autojump_clock, harness, request_, caplog):
    """Nothing is applied, nothing is left over, and no warning or error is logged."""
    await harness.tracker.update("a", progress=1)
    for at in range(len(request_)):
        connection = harness.connect()
        await connection.send(request_[:at])
        await wait_all_tasks_blocked(0.0001)
        await connection.stream.aclose()
    await wait_all_tasks_blocked()
    assert (harness.watchers, harness.open, await harness.seq()) == (0, 0, 1)
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


@every_kind
async def test_disconnect_at_any_byte_of_a_response(autojump_clock, harness, request_, caplog):
    """The connection ends, nothing of it is left over, and no warning or error is logged."""
    await harness.tracker.update("a", progress=1)
    connection = harness.connect()
    await connection.send(request_)
    await connection.read_head()
    await wait_all_tasks_blocked()
    await connection.stream.aclose()
    for budget in range(0, 420, 3):
        connection = harness.connect(budget=budget)
        await connection.send(request_)
        await wait_all_tasks_blocked(0.0001)
        await connection.stream.aclose()
    await wait_all_tasks_blocked()
    assert (harness.watchers, harness.open) == (0, 0)
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


async def test_corrupted_requests(autojump_clock, harness, caplog):
    """Each gets a response or the end of its connection, nothing is logged, and the server goes on."""
    rng = random.Random(20)
    await harness.tracker.update("a", progress=1)
    for _ in range(400):
        request = bytearray(
            rng.choice([PROGRESS, STATUS, STREAM, SOCKET, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
        )
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(request))
            request[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        connection = harness.connect()
        await connection.send(bytes(request))
        await wait_all_tasks_blocked(0.0001)
        await connection.stream.aclose()
    await wait_all_tasks_blocked()
    assert (harness.watchers, harness.open) == (0, 0)
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []
    assert (await harness.connect().request("GET", "/health")).status == 200


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\n folded: b\r\nA : b\r\n\r\n", 400),
        (STREAM.replace(b"Host", b"A: " + b"x" * 100_000 + b"\r\nHost"), 431),
        (b"GET /" + b"x" * 100_000, 414),
        (PROGRESS.replace(b"Content-Length: 15", b"Content-Length: 15\r\nContent-Length: 16"), 400),
        (PROGRESS.replace(b"Content-Length: 15", b"Content-Length: -1"), 400),
        (PROGRESS.replace(b"Content-Length: 15", b"Transfer-Encoding: chunked") + b"\r\nzz\r\n", 400),
        (PROGRESS.replace(b"Content-Length: 15", b"Transfer-Encoding: gzip"), 501),
        (PROGRESS.replace(b"Content-Length: 15", b"Transfer-Encoding: gzip, chunked"), 501),
    ],
)
async def test_invalid_http_is_refused(autojump_clock, harness, request_, status):
    """Invalid HTTP gets an error, and then the end."""
    connection = harness.connect()
    await connection.send(request_)
    response = await connection.read_response()
    codes = {400: "bad_request", 414: "target_too_long", 431: "head_too_large", 501: "unsupported_coding"}
    assert (response.status, response.error["code"]) == (status, codes[status])
    assert response.headers["connection"] == "close"
    assert await connection.read_to_end() == b""
    assert await harness.tracker.sessions() == []


@pytest.mark.parametrize("target", ["/health", "/api/sessions/a/status?wait=5", "/api/sessions/a/progress"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_nothing_is_served_after_a_malformed_body(autojump_clock, harness, caplog, method, target):
    """Where a body ends is not known, so what follows may be part of it: the connection ends."""
    await harness.tracker.update("a", progress=1)
    connection = harness.connect()
    headers = [("Transfer-Encoding", "chunked"), ("Content-Type", "application/json")]
    await connection.send(request_bytes(method, target, b"5\r\nhello\r\nzz\r\n", headers) + 2 * STATUS)
    response = await connection.read_response(method)
    assert response.headers["connection"] == "close"
    assert await connection.read_to_end() == b""
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize("lengths", [(b"15", b"chunked"), (b"0", b"chunked"), (b"15", b"Chunked")])
async def test_two_lengths_end_the_connection(autojump_clock, harness, lengths):
    """With Content-Length and Transfer-Encoding the latter counts; the connection ends (RFC 9112, 6.1)."""
    both = b"Content-Length: %b\r\nTransfer-Encoding: %b" % lengths
    head = PROGRESS.replace(b"Content-Length: 15", both).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    connection = harness.connect()
    await connection.send(head + chunk(b'{"progress": 7}') + chunk(b"") + STATUS)
    response = await connection.read_response()
    assert (response.status, response.headers["connection"]) == (202, "close")
    assert await connection.read_to_end() == b""


# HTTP/2


class StallingHTTP2Client:
    """An HTTP/2 client that never extends a flow-control window by itself."""

    def __init__(self, connection):
        self.connection = connection
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.status = {}
        self.body = {}
        self.ended = set()

    async def flush(self):
        await self.connection.send(self.h2.data_to_send())

    async def request(self, target, method="GET", body=b""):
        number = self.h2.get_next_available_stream_id()
        names = {":method": method, ":path": target, ":scheme": "http", ":authority": "[::1]"}
        self.h2.send_headers(number, list(names.items()), end_stream=not body)
        if body:
            self.h2.send_data(number, body, end_stream=True)
        self.body[number] = b""
        await self.flush()
        return number

    async def read_until(self, condition):
        while not condition():
            assert await self.connection.receive()
            for event in self.h2.receive_data(self.connection.buffer):
                if isinstance(event, h2.events.ResponseReceived):
                    self.status[event.stream_id] = dict(event.headers)[":status"]
                elif isinstance(event, h2.events.DataReceived):
                    self.body[event.stream_id] += event.data
                elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                    self.ended.add(event.stream_id)
            self.connection.buffer = b""
            await self.flush()


async def test_cancelling_an_http_2_stream(autojump_clock, harness):
    """RST_STREAM ends that watcher at once; the connection's other stream goes on."""
    await harness.tracker.update("a", progress=1)
    client = StallingHTTP2Client(harness.connect())
    one, two = [await client.request("/api/sessions/a/status/stream") for _ in range(2)]
    await client.read_until(lambda: client.body[one] and client.body[two])
    assert harness.watchers == 2
    client.h2.reset_stream(one, h2.errors.ErrorCodes.CANCEL)
    await client.flush()
    await wait_until(lambda: harness.watchers == 1)
    await harness.tracker.update("a", status="done")
    await client.read_until(lambda: two in client.ended)
    assert b"event: complete" in client.body[two]
    assert b"event: complete" not in client.body[one]
    await wait_until(lambda: not harness.watchers)


async def test_stalled_http_2_stream(nursery, autojump_clock):
    """A stream without flow-control window keeps to its buffer limit and is cut; its connection goes on."""
    harness = ConnectionHarness(nursery, buffer_events=8)
    await harness.tracker.update("a", progress=1)
    client = StallingHTTP2Client(harness.connect())
    stalled = await client.request("/api/sessions/a/status/stream")
    await client.read_until(lambda: client.body[stalled])
    (subscriber,) = harness.app.broker.subscribers()
    for number in range(100):
        await harness.tracker.emit("a", "x", [number, "y" * 10_000])
        assert subscriber.backlog[0] <= 8
        await wait_all_tasks_blocked()
    assert harness.app.broker.statistics().cut == 1
    assert harness.watchers == 0
    # The connection's window is used up too; extend it for the next request.
    client.h2.increment_flow_control_window(200_000)
    client.h2.increment_flow_control_window(10**6, stalled)
    await client.flush()
    await client.read_until(lambda: stalled in client.ended)
    assert b"event: overflow" in client.body[stalled]
    status = await client.request("/api/sessions/a/status")
    await client.read_until(lambda: status in client.ended)
    assert client.status[status] == "200"


async def test_rest_of_a_refused_http_2_body_is_discarded(autojump_clock, harness, caplog):
    """DATA frames that arrive after the response to their request cause no error."""
    client = StallingHTTP2Client(harness.connect())
    names = {":method": "POST", ":path": "/api/sessions/a/progress", ":scheme": "http", ":authority": "[::1]"}
    client.h2.send_headers(1, [*names.items(), ("content-type", "application/xml")])
    client.body[1] = b""
    await client.flush()
    await client.read_until(lambda: 1 in client.ended)
    assert client.status[1] == "415"
    client.h2.send_data(1, b"x" * 1000)
    client.h2.send_data(1, b"x" * 1000, end_stream=True)
    health = await client.request("/health")
    await client.read_until(lambda: health in client.ended)
    assert client.status[health] == "200"
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


# Slow readers


async def test_stalled_reader_is_cut_with_a_reason(nursery, autojump_clock):
    """It keeps to its buffer limit, other clients get everything, and it can resume when it reads again."""
    harness = ConnectionHarness(nursery, buffer_events=8)
    await harness.tracker.update("a", progress=0)
    stalled, reading = harness.connect(pair=trio.testing.lockstep_stream_pair), harness.connect()
    for connection in (stalled, reading):
        await connection.watch("a")
        assert (await connection.event()).event == "progress"
    subscriber = harness.app.broker.subscribers()[0]
    max_buffered = 0
    for number in range(40):
        await harness.tracker.emit("a", "x", number)
        await wait_all_tasks_blocked()
        max_buffered = max(max_buffered, subscriber.backlog[0])
        event = await reading.event()
        assert (event.event, event.data) == ("x", str(number))
    assert 0 < max_buffered <= 8
    assert harness.watchers == 1
    events = await stalled.events()
    assert events[-1].event == "overflow"
    assert "cursor" in json.loads(events[-1].data)["reason"]
    assert [e.data for e in events[:-1]] == [str(n) for n in range(len(events) - 1)]
    # It resumes without a gap.
    resumed = harness.connect()
    await resumed.watch("a", events[-1].id)
    assert json.loads((await resumed.event()).data) == {"status": "ok", "missed": 0}
    missed = [(await resumed.event()).data for _ in range(len(events) - 1, 40)]
    assert missed == [str(n) for n in range(len(events) - 1, 40)]


@pytest.mark.parametrize("kind", ["stream", "ws"])
async def test_stalled_reader_is_closed_after_the_send_timeout(nursery, autojump_clock, kind):
    """A client that never reads again is disconnected, and nothing of it is left over."""
    harness = ConnectionHarness(nursery, buffer_events=8)
    await harness.tracker.update("a", progress=0)
    connection = harness.connect(pair=trio.testing.lockstep_stream_pair)
    if kind == "stream":
        await connection.watch("a")
    else:
        await RawWebSocket.open(connection, "a")
    await wait_all_tasks_blocked()
    start = trio.current_time()
    for number in range(40):
        await harness.tracker.emit("a", "x", number)
    await wait_until(lambda: not harness.open)
    assert trio.current_time() - start == pytest.approx(20, abs=2)
    assert harness.watchers == 0


@pytest.mark.parametrize(
    "request_",
    [
        PROGRESS,
        STATUS,
        request_bytes("GET", "/nothing"),
        request_bytes("GET", "/api/sessions/nobody/status/stream"),
        request_bytes("POST", "/api/sessions/a/progress", b"", [*BATCH, ("Expect", "100-continue")]),
        b"no HTTP\r\n\r\n",
    ],
    ids=["publish", "status", "unknown path", "unknown session", "100-continue", "malformed"],
)
async def test_client_that_does_not_read_its_response(nursery, autojump_clock, caplog, request_):
    """It is disconnected after the send timeout, which is no error of the server."""
    harness = ConnectionHarness(nursery, send_timeout=7, request_timeout=7)
    await harness.tracker.update("a", progress=0)
    connection = harness.connect(pair=trio.testing.lockstep_stream_pair)
    start = trio.current_time()
    await connection.send(request_)
    await wait_until(lambda: not harness.open)
    assert trio.current_time() - start == pytest.approx(7, abs=LINGER + 0.1)
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


async def test_progress_is_conflated_for_a_slow_reader(nursery, autojump_clock):
    """Of waiting progress updates only the newest is sent; no other event is dropped."""
    harness = ConnectionHarness(nursery, buffer_events=16)
    await harness.tracker.update("a", progress=0)
    connection = harness.connect(pair=trio.testing.lockstep_stream_pair)
    await connection.watch("a")
    assert (await connection.event()).event == "progress"
    for percent in range(1, 91):
        await harness.tracker.update("a", progress=percent)
        if percent % 30 == 0:
            await harness.tracker.emit("a", "x", percent)
        await wait_all_tasks_blocked()
    await harness.tracker.update("a", status="done")
    events = await connection.events()
    assert len(events) < 40
    assert [json.loads(e.data) for e in events if e.event == "x"] == [30, 60, 90]
    assert events[-1].event == "complete"
    numbers = [int(e.id.split("-")[1]) for e in events]
    assert numbers == sorted(set(numbers))


# Internal errors


async def test_exception_in_a_publish(autojump_clock, harness, monkeypatch, caplog):
    """500 with the request's ID, which is in the log too; this connection and others go on."""

    async def broken(*_args, **_more):
        raise RuntimeError("a bug")

    other = harness.connect()
    await harness.tracker.update("a", progress=1)
    await other.watch("a")
    connection = harness.connect()
    with monkeypatch.context() as patch:
        patch.setattr(harness.tracker, "apply", broken)
        headers = [("X-Request-ID", "it-was-me")]
        response = await connection.request("POST", "/api/sessions/a/progress", b"{}", headers)
    assert (response.status, response.error["code"], response.error["request_id"]) == (
        500,
        "internal_error",
        "it-was-me",
    )
    assert "a bug" not in response.body.decode()
    assert "it-was-me" in caplog.text
    assert "a bug" in caplog.text
    assert (await connection.request("POST", "/api/sessions/a/events", b'{"type": "x"}')).status == 202
    assert [(await other.event()).event, (await other.event()).event] == ["progress", "x"]


@pytest.mark.parametrize("target", ["/api/sessions/a/status", "/api/sessions/a/events", "/health"])
async def test_exception_in_a_get(autojump_clock, harness, monkeypatch, caplog, target):
    """500 with the request's ID, which is in the log too; the connection stays open."""

    async def broken(*_args, **_more):
        raise RuntimeError("a bug")

    connection = harness.connect()
    with monkeypatch.context() as patch:
        for name in ("load", "read", "count"):
            patch.setattr(harness.app.engine, name, broken)
        response = await connection.request("GET", target, headers=[("X-Request-ID", "it-was-me")])
    assert (response.status, response.error["request_id"]) == (500, "it-was-me")
    assert "it-was-me" in caplog.text
    assert (await connection.request("GET", "/health")).status == 200


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("request_", [STREAM, SOCKET], ids=["sse", "ws"])
async def test_exception_in_a_stream(autojump_clock, harness, monkeypatch, caplog, request_, reused):
    """The stream ends, the request's ID is in the log, and other streams go on."""
    await harness.tracker.update("a", progress=1)
    other, connection = harness.connect(), harness.connect()
    await other.watch("a")
    assert (await other.event()).event == "progress"
    if reused:
        assert (await connection.request("GET", "/health")).status == 200

    async def broken(*_args, **_more):
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(harness.app.engine, "read", broken)
        await connection.send(request_.replace(b"Host", b"X-Request-ID: it-was-me\r\nHost"))
        await connection.read_to_end()
    await wait_until(lambda: harness.open == 1)
    assert "it-was-me" in caplog.text
    assert harness.watchers == 1
    await harness.tracker.emit("a", "x")
    assert (await other.event()).event == "x"


# Shutdown


async def test_drain_closes_idle_connections(autojump_clock, harness):
    """Connections without a request are closed at once; half a request is waited for."""
    fresh, kept, browser, half = (harness.connect() for _ in range(4))
    await kept.send(PROGRESS)
    await kept.read_response()
    await half.send(PROGRESS[:20])
    await wait_all_tasks_blocked()
    harness.app.stopping.set()
    await harness.app.idle.close_all()
    assert [await c.read_to_end() for c in (fresh, kept, browser)] == [b"", b"", b""]
    assert harness.open == 1
    await half.send(PROGRESS[20:])
    response = await half.read_response()
    assert (response.status, response.headers["connection"]) == (202, "close")
    assert await half.read_to_end() == b""


async def test_stream_ended_before_its_head_is_sent(autojump_clock, harness, monkeypatch):
    """The response's head is sent before everything else, however slow the engine is."""
    await harness.tracker.update("a", progress=1)
    reading, go = trio.Event(), trio.Event()
    read = harness.app.engine.read

    async def slow(*args, **more):
        reading.set()
        await go.wait()
        return await read(*args, **more)

    monkeypatch.setattr(harness.app.engine, "read", slow)
    connection = harness.connect()
    await connection.send(STREAM)
    await reading.wait()
    (subscriber,) = harness.app.broker.subscribers()
    subscriber.ask_to_reconnect(700)
    go.set()
    assert (await connection.read_head()).status == 200
    assert await connection.read_to_end() == b"retry: 700\n"


# WebSocket


async def test_pongs_between_messages(autojump_clock, harness):
    """Pongs, which the reader of a connection sends, and the server's messages never mix within a frame."""
    await harness.tracker.update("a", progress=1)
    socket = await RawWebSocket.open(harness.connect(), "a")
    assert (await socket.message())["event"] == "progress"
    frames = []
    for number in range(50):
        await harness.tracker.emit("a", "x", number)
        await socket.send(9, b"%d" % number)
        await harness.tracker.emit("a", "x", number)
        frames += [await socket.frame() for _ in range(3)]
    assert [payload for opcode, payload in frames if opcode == 10] == [b"%d" % n for n in range(50)]
    texts = [json.loads(payload)["data"] for opcode, payload in frames if opcode == 1]
    assert texts == [n for n in range(50) for _ in range(2)]


async def test_messages_of_a_watcher_are_ignored(autojump_clock, harness):
    """Text, binary and fragmented messages are read and ignored; the stream goes on."""
    await harness.tracker.update("a", progress=1)
    socket = await RawWebSocket.open(harness.connect(), "a")
    await socket.message()
    await socket.send(1, b"hello")
    await socket.send(2, bytes(range(256)))
    await socket.send(1, b"a frag", final=False)
    await socket.send(9, b"in between")
    await socket.send(0, b"ment")
    assert await socket.frame() == (10, b"in between")
    await harness.tracker.emit("a", "x", 1)
    assert (await socket.message())["event"] == "x"


@pytest.mark.parametrize("close_payload", [b"", b"\x03\xe8", b"\x03\xe8" + b"x" * 123, None])
async def test_server_waits_for_the_close_frame(autojump_clock, harness, close_payload):
    """After its close frame the server waits up to a second for the client's, whatever comes before that."""
    await harness.tracker.update("a", progress=1)
    socket = await RawWebSocket.open(harness.connect(), "a")
    await socket.message()
    await harness.tracker.update("a", status="done")
    assert (await socket.message())["event"] == "complete"
    assert (await socket.frame())[0] == 8
    start = trio.current_time()
    for _ in range(5):
        await socket.send(1, b"still talking")
        await trio.sleep(0.1)
        assert harness.open == 1
    if close_payload is not None:
        await socket.send(8, close_payload)
    assert await socket.connection.read_to_end() == b""
    assert trio.current_time() - start == pytest.approx(1 if close_payload is None else 0.5)


@pytest.mark.parametrize("fragments", [1, 3])
async def test_message_that_is_too_large_is_closed_with_1009(autojump_clock, harness, fragments):
    """More than 4 KiB, in one frame or in several, is too much from a client that has nothing to send."""
    await harness.tracker.update("a", progress=1)
    socket = await RawWebSocket.open(harness.connect(), "a")
    await socket.message()
    for number in range(fragments):
        last = number == fragments - 1
        await socket.send(1 if number == 0 else 0, b"x" * (6000 // fragments), final=last)
    opcode, payload = await socket.frame()
    assert (opcode, int.from_bytes(payload[:2], "big")) == (8, 1009)
    assert await socket.connection.read_to_end() == b""


async def test_corrupted_frames(autojump_clock, harness, caplog):
    """They are ignored or end the connection, and no warning or error is logged."""
    rng = random.Random(21)
    await harness.tracker.update("a", progress=1)
    for _ in range(200):
        socket = await RawWebSocket.open(harness.connect(), "a")
        for _ in range(rng.randint(1, 4)):
            junk = bytearray(
                frame(rng.choice([0, 1, 2, 8, 9, 10]), rng.randbytes(rng.choice([0, 1, 2, 20, 200])))
            )
            for _ in range(rng.randint(0, 3)):
                junk[rng.randrange(len(junk))] = rng.randrange(256)
            try:
                await socket.connection.send(bytes(junk))
            except trio.BrokenResourceError:
                break
        await wait_all_tasks_blocked(0.0001)
        await socket.connection.stream.aclose()
    await wait_all_tasks_blocked()
    assert (harness.watchers, harness.open) == (0, 0)
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ((b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", b""), 400),
        ((b"dGhlIHNhbXBsZSBub25jZQ==", b"too short"), 400),
        ((b"dGhlIHNhbXBsZSBub25jZQ==", b"\xff\xfe"), 400),
        ((b"Sec-WebSocket-Version: 13\r\n", b""), 426),
        ((b"Version: 13", b"Version: 8"), 426),
        ((b"Connection: Upgrade\r\n", b""), 426),
        ((b"Upgrade: websocket\r\n", b""), 426),
    ],
)
async def test_invalid_handshake_is_refused(autojump_clock, harness, caplog, change, status):
    """400 or 426 in the common error format, at once; 426 has the headers that were expected."""
    await harness.tracker.update("a", progress=1)
    connection = harness.connect()
    await connection.send(SOCKET.replace(*change))
    response = await connection.read_response()
    assert response.status == status
    assert response.error["code"] == {400: "bad_request", 426: "upgrade_required"}[status]
    if status == 426:
        assert (response.headers["upgrade"], response.headers["sec-websocket-version"]) == ("websocket", "13")
    await connection.stream.aclose()
    await wait_all_tasks_blocked()
    assert harness.open == 0
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize(
    "extra",
    [
        b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n",
        b"Sec-WebSocket-Protocol: chat, \xff\xfe\r\n",
        b"Sec-WebSocket-Extensions: \xff=\xff;;;\r\n",
        b"X-Anything: \xe4\r\n",
    ],
)
async def test_extensions_and_subprotocols_are_ignored(autojump_clock, harness, extra):
    """No extension and no subprotocol is negotiated, and bytes outside ASCII do no harm."""
    await harness.tracker.update("a", progress=1)
    connection = harness.connect()
    await connection.send(SOCKET.replace(b"Host", extra + b"Host"))
    response = await connection.read_head()
    assert response.status == 101
    assert not {"sec-websocket-extensions", "sec-websocket-protocol"} & response.headers.keys()
    assert (await RawWebSocket(connection).message())["event"] == "progress"


async def test_close_frame_of_a_client_is_answered(autojump_clock, harness):
    """A closing handshake that the client begins is completed."""
    await harness.tracker.update("a", progress=1)
    socket = await RawWebSocket.open(harness.connect(), "a")
    await socket.message()
    await socket.send(8, b"\x03\xe8bye")
    opcode, payload = await socket.frame()
    assert (opcode, payload[:2]) == (8, b"\x03\xe8")
    assert await socket.connection.read_to_end() == b""
    await wait_all_tasks_blocked()
    assert (harness.watchers, harness.open) == (0, 0)


async def test_nothing_is_sent_after_the_close_frame(autojump_clock, harness, monkeypatch):
    """Not even what is published before the connection's task knows of the close."""
    await harness.tracker.update("a", progress=1)
    socket = await RawWebSocket.open(harness.connect(), "a")
    await socket.message()
    send_all = Transport.send_all

    async def publish_after(transport, data):
        await send_all(transport, data)
        if data[:1] == b"\x88":
            await harness.tracker.emit("a", "x")
            await wait_all_tasks_blocked()

    monkeypatch.setattr(Transport, "send_all", publish_after)
    await socket.send(8, b"\x03\xe8")
    assert (await socket.frame())[0] == 8
    assert await socket.connection.read_to_end() == b""
    await wait_all_tasks_blocked()
    assert (harness.watchers, harness.open) == (0, 0)


# One path for every request


@pytest.mark.parametrize(
    "target",
    [
        "/api/sessions",
        "/api/jobs",
        "/api/sessions/a/cancel",
        "/api/v1/pubsub/push",
        "/api/sessions/a/progress",
    ],
)
async def test_only_routes_that_take_ndjson_wait_for_a_body(autojump_clock, harness, target):
    """On every other route a body of that content type has the request timeout, as any body."""
    await harness.tracker.update("a", progress=1)
    connection = harness.connect()
    head = request_bytes("POST", target, b"{}", [("Content-Type", "application/x-ndjson")])
    await connection.send(head[:-2])
    start = trio.current_time()
    response = await connection.read_response()
    assert response.status in (204, 400, 415)
    assert trio.current_time() - start <= 10
    assert await connection.read_to_end() == b""


@pytest.mark.parametrize("wait", [False, True])
async def test_client_that_resets_before_the_100_is_no_error(autojump_clock, harness, caplog, wait):
    """``Expect: 100-continue`` and gone: nothing is logged as an error."""
    connection = harness.connect(budget=0)
    await connection.send(request_bytes("POST", "/api/sessions", b"{}", [("Expect", "100-continue")])[:-2])
    if wait:
        await wait_all_tasks_blocked()
    await connection.stream.aclose()
    await wait_until(lambda: not harness.open)
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "http://localhost/health", 200),
        ("GET", "http://localhost", 200),
        ("GET", "https://localhost/api/sessions/a/status?wait=0", 200),
        ("GET", "/%68ealth", 200),
        ("get", "/health", 200),
        ("OPTIONS", "*", 200),
        ("GET", "/api%2Fsessions", 404),
        ("BREW", "/health", 501),
    ],
)
async def test_targets_and_methods(autojump_clock, harness, method, target, status):
    """Absolute form (RFC 9112, section 3.2.2), encoded letters and methods in any case."""
    await harness.tracker.update("a", progress=1)
    assert (await harness.connect().request(method, target)).status == status


@pytest.mark.parametrize("method", ["DELETE", "GET", "PUT", "POST"])
@pytest.mark.parametrize("late", [False, True])
async def test_unread_body_does_not_end_the_connection(autojump_clock, harness, method, late):
    """What a handler has not read is dropped, arrived or not, and the next request is served."""
    connection = harness.connect()
    raw = request_bytes(method, "/api/sessions/none", b"x" * 300_000)
    at = raw.index(b"\r\n\r\n") + 4 + (100 if late else 300_000)
    await connection.send(raw[:at])
    response = await connection.read_response()
    assert "connection" not in response.headers
    await connection.send(raw[at:] + STATUS)
    assert (await connection.read_response()).status == 404


async def test_unread_body_that_is_too_long_ends_the_connection(autojump_clock, harness):
    """A megabyte is read to keep the connection, and no more."""
    connection = harness.connect()
    await connection.send(
        request_bytes("DELETE", "/api/sessions/none", headers=[("Content-Length", "99999999")])
    )
    assert (await connection.read_response()).status == 404
    with suppress(trio.BrokenResourceError):
        for _ in range(100):
            await connection.send(b"x" * 65536)
            await wait_all_tasks_blocked()
    assert await connection.read_to_end() == b""
    await wait_until(lambda: not harness.open)


async def test_client_that_closes_its_side_still_gets_its_responses(autojump_clock, harness):
    """A long-poll with a request behind it, and then nothing more to send: both are served."""
    await harness.tracker.update("a", progress=1)
    connection = harness.connect()
    await connection.send(request_bytes("GET", "/api/sessions/a/status?wait=5") + STATUS)
    await wait_all_tasks_blocked()
    await connection.stream.send_eof()
    assert [(await connection.read_response()).status for _ in range(2)] == [200, 200]
    assert await connection.read_to_end() == b""


async def test_long_poll_ends_when_its_client_leaves(autojump_clock, harness):
    """At once, and not when the time that it waits is over."""
    await harness.tracker.update("a", progress=1)
    connection = harness.connect()
    await connection.send(request_bytes("GET", "/api/sessions/a/events?wait=60&after=x-0"))
    await connection.read_response()
    await connection.send(request_bytes("GET", "/api/sessions/a/status?wait=60"))
    await wait_all_tasks_blocked()
    await connection.stream.aclose()
    start = trio.current_time()
    await wait_until(lambda: not harness.open)
    assert trio.current_time() - start < 1
    assert harness.app.broker.statistics().topics == 0


async def test_malformed_body_of_a_long_poll_is_an_error_at_once(autojump_clock, harness):
    """400, and the connection ends."""
    await harness.tracker.update("a", progress=1)
    connection = harness.connect()
    headers = [("Transfer-Encoding", "chunked")]
    await connection.send(request_bytes("GET", "/api/sessions/a/status?wait=60", headers=headers) + b"zz\r\n")
    start = trio.current_time()
    response = await connection.read_response()
    assert (response.status, response.error["code"]) == (400, "bad_request")
    assert trio.current_time() - start < 1
    assert await connection.read_to_end() == b""


@pytest.mark.parametrize(
    ("first", "line"),
    [
        (b"", b"GET /health HTTP/3.0\r\nHost: a\r\n\r\n"),
        (PROGRESS, b"GET /health HTTP/3.0\r\nHost: a\r\n\r\n"),
        (PROGRESS, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        (b"", b"PRI * HTTP/2.0\r\n\r\nGET / HTTP/1.1\r\n\r\n"),
    ],
)
async def test_other_versions_of_http_are_refused(autojump_clock, harness, first, line):
    """HTTP/2 begins with its whole preface, and with the connection."""
    connection = harness.connect()
    if first:
        await connection.send(first)
        await connection.read_response()
    await connection.send(line)
    assert (await connection.read_response()).status == 505
    assert await connection.read_to_end() == b""


async def test_connection_options_are_tokens(autojump_clock, harness):
    """``Connection: x-disclose`` does not close it (RFC 9110, section 7.6.1)."""
    connection = harness.connect()
    response = await connection.request("GET", "/health", headers=[("Connection", "x-disclose, keep-alive")])
    assert (response.status, "connection" in response.headers) == (200, False)
    assert (await connection.request("GET", "/health")).status == 200


async def test_a_reset_with_a_pipelined_request_leaves_no_connection(autojump_clock, harness):
    """Its place is given back: a thousand of these closed the server to everybody once."""
    await harness.tracker.update("a", progress=1)
    for behind in (b"x", STATUS, PROGRESS, STREAM):
        for budget in (None, 0, 50):
            connection = harness.connect(budget=budget)
            await connection.send(STATUS + behind)
            await connection.stream.aclose()
    await wait_until(lambda: not harness.open)
    assert harness.watchers == 0
