"""HTTP/2 through Hypercorn with our work-arounds: bodies, windows, idle and stalled connections, shutdown."""

from __future__ import annotations

import json
import logging
import socket
from contextlib import suppress

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import hpack
import hyperframe.frame
import pytest
import trio
from h2.settings import SettingCodes
from http2_harness import PIECE, Client, Server, closed
from live_harness import StreamWrapper, socket_streams
from trio.testing import lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from sseserve import Grant


@pytest.fixture
async def server(nursery):
    return Server(nursery)


# Idle connections


@pytest.mark.parametrize(
    "path", [None, "/health", "/api/sessions/none/status", "/api/sessions/a/status/stream"]
)
async def test_an_idle_connection_is_closed_after_the_keep_alive_time(autojump_clock, server, path):
    """It is idle from the start, and again when its requests have got their responses."""
    await server.tracker.update("a", status="done")
    client = await server.connect()
    await client.flush()
    if path is not None:
        number = await client.request("GET", path)
        await client.until(lambda: number in client.ended)
    start = trio.current_time()
    while await client.read():
        pass
    assert trio.current_time() - start == pytest.approx(75, abs=1)
    await closed(server)


async def test_a_client_that_closes_an_idle_connection_is_let_go_at_once(autojump_clock, server):
    """Not after the keep-alive time, whether it has asked for something or not."""
    for path in (None, "/health"):
        client = await server.connect()
        await client.flush()
        if path is not None:
            await client.request("GET", path)
            while not client.ended:
                await client.read()
        await client.stream.aclose()
        start = trio.current_time()
        await closed(server)
        assert trio.current_time() - start < 2


async def test_a_client_that_leaves_a_stream_is_let_go_at_once(autojump_clock, server):
    """Its watcher is gone, and so is the connection."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    number = await client.request("GET", "/api/sessions/a/status/stream")
    await client.until(lambda: client.body[number])
    await client.stream.aclose()
    start = trio.current_time()
    await closed(server)
    assert trio.current_time() - start < 2
    assert server.app.broker.subscribers() == []


# Bodies


async def test_a_body_arrives_at_the_pace_of_its_handler(autojump_clock, server):
    """While the handler waits the client's window is used up, so little of the body is kept."""
    go = trio.Event()

    async def authenticate(_request):
        await go.wait()
        return Grant("a", "admin")

    server.app.admission.authenticate = authenticate
    client = await server.connect()
    number = await client.request(
        "POST", "/api/sessions/a/events", [("content-type", "application/x-ndjson")], end=False
    )
    assert await client.send_body(number, 400) < 2**20
    go.set()
    # The rest is read now: it is a line that is too long.
    await client.send_body(number, 400)
    await client.until(lambda: number in client.ended)
    assert client.status[number] == "413"


async def test_the_body_of_a_get_is_dropped(autojump_clock, server):
    """Nobody reads it, so it costs nothing, and it is noticed that its client resets the request."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    number = await client.request("GET", "/api/sessions/a/status?wait=50", end=False)
    assert await client.send_body(number, 100) == 100 * len(PIECE)
    topic = server.app.broker._topics["a"]
    assert topic.waiters
    client.h2.reset_stream(number, h2.errors.ErrorCodes.CANCEL)
    await client.flush()
    start = trio.current_time()
    while topic.waiters:
        await trio.sleep(0.01)
    assert trio.current_time() - start < 1


async def test_the_rest_of_a_body_that_got_its_response_is_dropped(autojump_clock, server):
    """415 before the body; what the client still sends stops nothing else on its connection."""
    client = await server.connect()
    number = await client.request(
        "POST", "/api/sessions/a/progress", [("content-type", "application/xml")], end=False
    )
    await client.until(lambda: number in client.status)
    assert client.status[number] == "415"
    other = await client.request("POST", "/api/sessions/a/events", [("content-type", "text/csv")], end=False)
    for stream in (number, other):
        with suppress(h2.exceptions.StreamClosedError):
            await client.send_body(stream, 50)
    health = await client.request("GET", "/health")
    await client.until(lambda: health in client.ended)
    assert client.status[health] == "200"


async def test_a_response_frees_a_connection_that_a_body_has_filled(autojump_clock, server):
    """What has arrived of a body that nobody reads any more does not block what follows it."""
    go = trio.Event()

    async def authenticate(request):
        if request.method == "POST":
            await go.wait()
        return Grant("a", "admin")

    server.app.admission.authenticate = authenticate
    client = await server.connect()
    number = await client.request(
        "POST", "/api/sessions/a/progress", [("content-type", "application/xml")], end=False
    )
    assert 0 < await client.send_body(number, 400) < 400 * len(PIECE)
    go.set()
    await client.until(lambda: number in client.status)
    health = await client.request("GET", "/health")
    await client.until(lambda: health in client.ended)
    assert client.status[health] == "200"


@pytest.mark.parametrize("path", ["/api/sessions/a/progress", "/api/sessions/a/events"])
async def test_a_handler_that_does_not_read_its_body_holds_up_no_other_stream(autojump_clock, server, path):
    """Neither their responses, which need windows from the client, nor their bodies."""
    go = trio.Event()

    async def authenticate(request):
        if request.path == path:
            await go.wait()
        return Grant("a", "admin")

    server.app.admission.authenticate = authenticate
    await server.tracker.update("b", progress=1, data="x" * 250_000)
    client = await server.connect()
    large = await client.request("GET", "/api/sessions/b/status")
    unread = await client.request("POST", path, [("content-type", "application/x-ndjson")], end=False)
    assert len(PIECE) < await client.send_body(unread, 400) < 2**18
    start = trio.current_time()
    await client.until(lambda: large in client.ended)
    other = await client.request("POST", "/api/sessions/c/progress", end=False)
    await client.send_body(other, 40)  # not JSON, and more than the window of the connection
    await client.until(lambda: other in client.ended)
    assert (client.status[large], client.status[other]) == ("200", "400")
    await client.reset(unread)
    health = await client.request("GET", "/health")
    await client.until(lambda: health in client.ended)
    assert trio.current_time() - start < 1
    go.set()


async def test_a_claim_with_a_body_whose_client_leaves_takes_no_job(autojump_clock, nursery):
    """A body is not expected, but must not hide that its client has gone."""
    server = Server(nursery, job_workers="remote")
    client = await server.connect()
    number = await client.request("POST", "/api/claims?wait=60", end=False)
    await client.send_body(number, 20)
    await client.reset(number)
    await wait_all_tasks_blocked()
    created = await client.request("POST", "/api/jobs")
    await client.until(lambda: created in client.ended)
    assert server.app.queue.waiting == 1
    claimed = await client.request("POST", "/api/claims")
    await client.until(lambda: claimed in client.ended)
    assert client.status[claimed] == "200"


async def test_windows_are_released_with_their_padding(autojump_clock, server):
    """However the bodies are cut, and whether anybody reads them."""
    client = await server.connect()
    for path, status in (("/api/sessions/a/progress", "202"), ("/api/nothing", "404")):
        for _ in range(4):
            number = await client.request("POST", path, end=False)
            pieces = [b'{"progress":', *[b" "] * 300, b"1}"]
            for piece in pieces:
                while client.h2.local_flow_control_window(number) < 256 + len(piece):
                    assert await client.read()
                if number in client.ended:
                    break
                client.h2.send_data(number, piece, pad_length=255)
                await client.flush()
            client.h2.end_stream(number)
            await client.flush()
            await client.until(lambda number=number: number in client.ended)
            assert client.status[number] == status


async def test_the_table_of_the_header_compression_is_bounded(autojump_clock, server, monkeypatch):
    """A client may allow 4 GiB of it, but it is searched for every header field of every response."""
    sizes = []
    encode = hpack.Encoder.encode

    def measure(encoder, *arguments, **options):
        data = encode(encoder, *arguments, **options)
        sizes.append(sum(len(name) + len(value) + 32 for name, value in encoder.header_table.dynamic_entries))
        return data

    monkeypatch.setattr(hpack.Encoder, "encode", measure)
    client = await server.connect()
    client.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: 2**31})
    for number in range(60):
        request = await client.request("GET", "/health", {"x-request-id": f"{number:100}".replace(" ", "-")})
        await client.until(lambda request=request: request in client.ended)
        assert client.headers[request]["x-request-id"].endswith(f"-{number}")
    assert 0 < max(sizes) <= 4096


# Stalled clients


async def test_a_connection_that_is_not_read_is_closed(autojump_clock, nursery):
    """After the send timeout, whatever is open on it."""
    server = Server(nursery, send_timeout=20)
    await server.tracker.update("a", progress=1)
    client = await server.connect(lockstep_stream_pair)
    nursery.start_soon(client.request, "GET", "/api/sessions/a/status/stream")
    start = trio.current_time()
    await closed(server)
    assert trio.current_time() - start == pytest.approx(20, abs=2)


async def test_a_slow_client_gets_a_large_response(autojump_clock, server):
    """The send timeout is that of 64 KiB, as over HTTP/1.1."""
    await server.tracker.update("a", progress=1, data="x" * 250_000)
    client = await server.connect()
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    number = await client.request("GET", "/api/sessions/a/status")
    await client.until(lambda: number in client.status)
    while number not in client.ended:
        with suppress(h2.exceptions.StreamClosedError):
            client.h2.increment_flow_control_window(10_000, number)
        client.h2.increment_flow_control_window(10_000)
        await client.flush()
        size = len(client.body[number])
        await client.until(lambda size=size: len(client.body[number]) > size or number in client.ended)
        await trio.sleep(2)  # 5,000 bytes per second
    assert not client.reset_with
    assert json.loads(client.body[number])["data"] == "x" * 250_000


async def test_a_response_without_a_window_is_given_up(autojump_clock, server):
    """A client that gives no window for a response costs its bound for the send timeout, then its stream."""
    await server.tracker.update("a", progress=1, data="x" * 250_000)
    client = await server.connect()
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    await client.request("GET", "/api/sessions/a/status")
    start = trio.current_time()
    with trio.move_on_after(60):
        while await client.read():
            pass
    health = await client.request("GET", "/health")
    await client.until(lambda: health in client.status)
    assert client.status[health] == "200"
    assert trio.current_time() - start < 75


async def test_a_protocol_error_is_explained_before_the_connection_is_closed(server):
    """The client can still read the GOAWAY, although what it has sent behind its error is not read."""
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.app.connections.serve, ours)
        client = Client(theirs)
        await client.flush()
        with suppress(trio.BrokenResourceError):
            await theirs.send_all(b"\0\0\1\x09\0\0\0\0\1x" + b"junk" * 200_000)  # CONTINUATION of nothing
        data = b""
        with trio.fail_after(5):
            while chunk := await theirs.receive_some():
                data += chunk
        await theirs.aclose()
    types = []
    while data:
        types.append(data[3])
        data = data[9 + int.from_bytes(data[:3], "big") :]
    assert 7 in types  # GOAWAY (RFC 9113, section 6.8)


# Shutdown


async def test_the_end_of_a_stream_is_sent_before_the_goaway(autojump_clock, nursery, server):
    """A stream that a shutdown ends has its end before the connection has its own."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    numbers = [await client.request("GET", "/api/sessions/a/status/stream") for _ in range(3)]
    await client.until(lambda: all(client.body[number] for number in numbers))
    listener = server.app.listen([])
    await nursery.start(listener.run)
    listener.stop()
    while await client.read():
        pass
    assert client.goaway_after == set(numbers)
    assert all(b"retry: " in client.body[number] for number in numbers)


async def test_an_idle_connection_whose_client_does_not_close(autojump_clock, server, caplog):
    """It has had its GOAWAY, and gets no other; the server does not wait for it for long."""
    client = await server.connect()
    await client.flush()
    await wait_all_tasks_blocked()
    await server.app.http2.stop()
    await trio.sleep(10)
    with suppress(trio.BrokenResourceError):  # what it sends
        while await client.read():
            pass
    await closed(server)
    assert client.last_streams == [0]
    assert "failed" not in caplog.text


async def test_an_idle_connection_is_closed_by_a_shutdown(autojump_clock, nursery, server):
    """At once, and a request that is being served is not."""
    await server.tracker.update("a", progress=1)
    idle, busy = [await server.connect() for _ in range(2)]
    await idle.flush()
    health = await idle.request("GET", "/health")
    await idle.until(lambda: health in idle.ended)
    go = trio.Event()

    async def authenticate(_request):
        await go.wait()
        return Grant("a", "admin")

    server.app.admission.authenticate = authenticate
    number = await busy.request("GET", "/api/sessions/a/status")
    await wait_all_tasks_blocked()
    listener = server.app.listen([])
    await nursery.start(listener.run)
    start = trio.current_time()
    listener.stop()
    while await idle.read():
        pass
    assert trio.current_time() - start < 1
    go.set()
    await busy.until(lambda: number in busy.ended)
    assert busy.status[number] == "200"


# What a reset must not leave behind


@pytest.mark.parametrize("path", ["/health", "/api/sessions/a/events", "/api/sessions/a/status/stream"])
async def test_a_connection_that_is_reset_during_a_response_is_let_go(autojump_clock, server, path):
    """Wherever in the response that is: the tasks that wait to send are woken."""
    await server.tracker.update("a", progress=1, data="x" * 100_000)
    for turns in range(30):
        client = await server.connect()
        await client.request("GET", path)
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        await client.stream.aclose()
    start = trio.current_time()
    await closed(server)
    assert trio.current_time() - start < 2


async def test_a_reset_changes_the_headers_of_no_other_response(autojump_clock, server):
    """Requests are reset while the socket is full: the header compression is common to all (RFC 7541)."""
    for number in range(40):
        await server.tracker.update(f"s{number}", progress=number)
    await server.tracker.update("big", progress=1, data="x" * 200_000)
    client = await server.connect(lambda: reversed(socket_streams()))
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**20})
    client.h2.increment_flow_control_window(2**20)
    big = await client.request("GET", "/api/sessions/big/status")
    await wait_all_tasks_blocked()
    reset = [
        await client.request("GET", f"/api/sessions/s{n}/status", [("x-request-id", f"reset-{n}")])
        for n in range(3)
    ]
    await wait_all_tasks_blocked()
    for number in reset:
        await client.reset(number)
    await wait_all_tasks_blocked()
    await client.until(lambda: big in client.ended)
    for n in range(40):
        number = await client.request("GET", f"/api/sessions/s{n}/status", [("x-request-id", f"id-{n}")])
        await client.until(lambda: number in client.ended)  # noqa: B023 - awaited in this turn
        session = await server.tracker.get(f"s{n}")
        headers = client.headers[number]
        assert (headers["x-request-id"], headers["etag"]) == (f"id-{n}", f'"{session.cursor}"')
    await client.stream.aclose()


async def test_a_response_that_cannot_be_encoded_ends_the_connection(autojump_clock, server, monkeypatch):
    """The part of its header block that was encoded is lost, and with it the state of the compression."""
    from sseserve.web import operations

    async def health(_handlers, _request, _match):
        return operations.json_response(200, {}, (("X-Valid", "1"), ("TE", "gzip")))

    monkeypatch.setattr(operations.OperationsHandlers, "health", health)
    other = Server(server._nursery)
    client = await other.connect()
    await client.request("GET", "/health")
    while await client.read():
        pass
    assert client.goaway_after == set()


@pytest.mark.parametrize("transport", ["stream", "ws"])
async def test_a_connection_is_idle_after_its_stream_was_reset(autojump_clock, server, transport):
    """It is closed after the keep-alive time."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    path = f"/api/sessions/a/status/{transport}"
    number = await (client.websocket(path) if transport == "ws" else client.request("GET", path))
    await client.until(lambda: client.body[number])
    await client.reset(number)
    start = trio.current_time()
    while await client.read():
        pass
    assert trio.current_time() - start == pytest.approx(75, abs=1)
    assert client.goaway_after is not None
    await closed(server)


async def test_the_streams_of_a_client_go_on_after_its_goaway(autojump_clock, server, caplog):
    """RFC 9113, section 6.8: it opens no more of them; after the last one the connection is closed."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    watched = await client.request("GET", "/api/sessions/a/status/stream")
    await client.until(lambda: b"progress" in client.body[watched])
    goaway = hyperframe.frame.GoAwayFrame(0)
    numbers = [await client.request("GET", "/health") for _ in range(9)]
    await client.stream.send_all(goaway.serialize())
    await client.until(lambda: set(numbers) <= client.ended)
    assert {client.status[number] for number in numbers} == {"200"}
    await server.tracker.update("a", status="done")
    await client.until(lambda: watched in client.ended)
    assert b"event: complete" in client.body[watched]
    start = trio.current_time()
    while await client.read():
        pass
    await client.stream.aclose()
    await closed(server)
    assert trio.current_time() - start < 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_goaway_with_an_error_ends_the_connection(autojump_clock, server, caplog):
    """Whatever is open on it; its responses are dropped without a word in the log."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    await client.request("GET", "/api/sessions/a/status/stream")
    await client.request("GET", "/health")
    goaway = hyperframe.frame.GoAwayFrame(0, error_code=1)
    await client.stream.send_all(goaway.serialize())
    await closed(server)
    assert trio.current_time() < 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_small_frames_are_decoded_a_few_at_a_time(autojump_clock, server, monkeypatch):
    """64 KB of small frames take a tenth of a second, in which nobody else is served."""
    counts = []
    receive_data = h2.connection.H2Connection.receive_data

    def count(connection, data):
        events = receive_data(connection, data)
        counts.append(len(events))
        return events

    client = await server.connect()
    number = await client.request("POST", "/api/sessions/a/progress", end=False)
    monkeypatch.setattr(h2.connection.H2Connection, "receive_data", count)
    for _ in range(6000):
        client.h2.send_data(number, b"x")
    await client.flush()
    await wait_all_tasks_blocked()
    assert sum(counts) >= 6000
    assert max(counts) < 250


async def test_a_connection_serves_any_number_of_requests(autojump_clock, server):
    """A stream beside them goes on. Hypercorn ends a connection after a thousand."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    stream = await client.request("GET", "/api/sessions/a/status/stream")
    for _ in range(1100):
        number = await client.request("GET", "/nothing")
        await client.until(lambda: number in client.ended)  # noqa: B023 - awaited in this turn
    await server.tracker.update("a", status="done")
    await client.until(lambda: stream in client.ended)
    assert b"event: complete" in client.body[stream]


async def test_a_response_is_one_write(autojump_clock, server):
    """Its head, its body and its end: a small write may wait for the peer to acknowledge the one before."""
    writes = []

    class Recorder(StreamWrapper):
        async def send_all(self, data):
            writes.append(bytes(data))
            await super().send_all(data)

    def pair():
        client, ours = memory_stream_pair()
        return client, Recorder(ours)

    client = await server.connect(pair)
    await client.flush()
    await client.read()
    await wait_all_tasks_blocked()
    writes.clear()
    number = await client.request("GET", "/health")
    await client.until(lambda: number in client.ended)
    assert len(writes) == 1


# Malformed requests

PLAIN = {":method": "GET", ":path": "/health", ":scheme": "http", ":authority": "localhost"}


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(PLAIN | {":path": "/caf\xe9"}, id="path not ASCII"),
        pytest.param(PLAIN | {":path": ""}, id="empty path"),
        pytest.param(PLAIN | {":path": "?a=1"}, id="only a query"),
        pytest.param(PLAIN | {":path": "http://a/health"}, id="absolute form"),
        pytest.param(PLAIN | {":path": "/a b"}, id="space"),
        pytest.param(PLAIN | {":method": "G\xc9T"}, id="method not ASCII"),
        pytest.param(PLAIN | {":method": "G T"}, id="method with a space"),
        pytest.param({":method": "CONNECT", ":authority": "localhost"}, id="CONNECT"),
        pytest.param(PLAIN | {":method": "CONNECT"}, id="CONNECT with a path"),
        pytest.param(PLAIN | {":method": "CONNECT", ":protocol": "tcp"}, id="another protocol"),
        pytest.param({name: PLAIN[name] for name in (":method", ":path", ":scheme")}, id="no authority"),
        pytest.param({name: PLAIN[name] for name in (":path", ":scheme", ":authority")}, id="no method"),
        pytest.param(PLAIN | {"connection": "close"}, id="connection header"),
        pytest.param(PLAIN | {"X-Upper": "1"}, id="upper case"),
        pytest.param(PLAIN | {"x": "a\nb"}, id="line feed"),
        pytest.param(PLAIN | {":other": "1"}, id="unknown pseudo-header"),
    ],
)
async def test_a_malformed_request_ends_its_stream_only(autojump_clock, server, caplog, head):
    """A stream error (RFC 9113, section 8.1.1): the streams beside it go on, and nothing is logged."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    stream = await client.request("GET", "/api/sessions/a/status/stream")
    await client.until(lambda: client.body[stream])
    number = await client.send_head(head, end=True)
    await client.until(lambda: number in client.ended)
    assert client.reset_with[number] == h2.errors.ErrorCodes.PROTOCOL_ERROR
    await server.tracker.update("a", status="done")
    await client.until(lambda: stream in client.ended)
    assert b"event: complete" in client.body[stream]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_query_that_is_not_ascii_is_a_bad_request(autojump_clock, server, caplog):
    """As over HTTP/1.1: 400 in the shape of every error."""
    client = await server.connect()
    number = await client.request("GET", "/health?a=caf\xe9")
    await client.until(lambda: number in client.ended)
    assert client.status[number] == "400"
    error = json.loads(client.body[number])["error"]
    assert error["code"] == "bad_request"
    assert error["request_id"] == client.headers[number]["x-request-id"]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_priorities_are_ignored(autojump_clock, server, caplog):
    """RFC 9113, section 5.3.2: more than streams may be open, for streams that there will never be."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    stream = await client.request("GET", "/api/sessions/a/status/stream")
    await client.until(lambda: client.body[stream])
    for number in range(250):
        client.h2.prioritize(number * 2 + 101, weight=10)
    await client.flush()
    await server.tracker.update("a", status="done")
    await client.until(lambda: stream in client.ended)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# A window that stays closed


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("kind", ["status", "status/stream", "events", "ws"])
async def test_a_closed_window_holds_neither_tasks_nor_a_shutdown(autojump_clock, server, kind, leaves):
    """A client that leaves is let go at once; one that stays is cut at the end of the drain."""
    await server.tracker.update("a", progress=1, data="x" * 100_000)
    for _ in range(10):
        await server.tracker.emit("a", "note", "x" * 10_000)
    await server.listen()
    await wait_all_tasks_blocked()
    tasks = trio.lowlevel.current_statistics().tasks_living
    clients = [await server.connect() for _ in range(5)]
    for client in clients:
        client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
        for _ in range(20):
            await (client.websocket() if kind == "ws" else client.request("GET", f"/api/sessions/a/{kind}"))
    await wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().tasks_living > tasks + 100
    start = trio.current_time()
    if leaves:
        for client in clients:
            await client.stream.aclose()
        while server.app.counters.connections:
            await trio.sleep(0.01)
        assert trio.current_time() - start < 1
        assert trio.lowlevel.current_statistics().tasks_living <= tasks + 1
    assert await server._listener.stop() <= 4


@pytest.mark.parametrize("turns", range(0, 40, 3))
async def test_a_client_that_leaves_during_a_response_does_not_hold_a_shutdown(autojump_clock, server, turns):
    """Between the head and the end of it too."""
    await server.tracker.update("a", progress=1, data="x" * 100_000)
    listener = await server.listen()
    client = await server.connect()
    await client.request("GET", "/api/sessions/a/status")
    for _ in range(turns):
        await trio.lowlevel.checkpoint()
    await client.stream.aclose()
    assert await listener.stop() < 0.5


# WebSockets


def masked(opcode: int, payload: bytes) -> bytes:
    """A client's frame, masked with zeros (RFC 6455, section 5.2)."""
    size = bytes([0x80 | len(payload)]) if len(payload) <= 125 else b"\xfe" + len(payload).to_bytes(2)
    return bytes([0x80 | opcode]) + size + bytes(4) + payload


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        pytest.param(masked(1, b"x" * 5000), 1009, id="too large"),
        pytest.param(masked(1, b"\xff"), 1007, id="not UTF-8"),
        pytest.param(masked(3, b""), 1002, id="reserved opcode"),
        pytest.param(b"\x81\x01x", 1002, id="not masked"),
        pytest.param(masked(8, b"\x03\xe8"), 1000, id="close"),
        pytest.param(masked(8, b"\x00\x01"), 1002, id="invalid close code"),
    ],
)
@pytest.mark.parametrize("window", [65535, 0])
async def test_a_websocket_that_cannot_go_on_is_closed(autojump_clock, server, caplog, frame, code, window):
    """With a close frame if the client's window allows it; its stream and its watcher end."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
    number = await client.websocket()
    await client.until(lambda: number in client.status)
    await wait_all_tasks_blocked()
    assert server.app.broker.subscribers()
    await client.send(number, frame)
    await client.until(lambda: number in client.ended)
    if window:
        assert number not in client.reset_with
        assert client.body[number][-4:-2] == b"\x88\x02"
        assert int.from_bytes(client.body[number][-2:]) == code
    await wait_all_tasks_blocked()
    assert server.app.broker.subscribers() == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("opens", [False, True])
async def test_a_websocket_ends_with_the_stream_of_its_client(autojump_clock, server, opens):
    """END_STREAM is the end of the connection (RFC 8441, section 5), at any time."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    number = await client.websocket()
    if opens:
        await client.until(lambda: client.body[number])
    await client.send(number, b"", end=True)
    await client.until(lambda: number in client.ended)
    await wait_all_tasks_blocked()
    assert server.app.broker.subscribers() == []


async def test_a_frame_before_the_response_to_the_handshake(autojump_clock, server, caplog):
    """It is refused, and its stream ends."""

    async def authenticate(_request):
        await trio.sleep(1)
        return Grant("a", "admin")

    server.app.admission.authenticate = authenticate
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    number = await client.websocket()
    await client.send(number, masked(1, b"x"))
    await client.until(lambda: number in client.ended)
    assert client.status[number] == "400"
    await trio.sleep(2)
    assert server.app.broker.subscribers() == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_refused_handshake_ends_its_stream(autojump_clock, server):
    """So that the connection is idle afterwards."""
    client = await server.connect()
    number = await client.websocket(**{"sec-websocket-version": "12"})
    await client.until(lambda: number in client.ended)
    assert client.status[number] == "400"
    start = trio.current_time()
    while await client.read():
        pass
    assert trio.current_time() - start == pytest.approx(75, abs=1)


async def test_a_quiet_websocket_gets_pings(autojump_clock, server):
    """As often as over HTTP/1.1, so that a proxy does not close it."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    number = await client.websocket()
    await client.until(lambda: client.body[number])
    for _ in range(10):
        size = len(client.body[number])
        with trio.fail_after(15.1):
            await client.until(lambda: len(client.body[number]) > size)  # noqa: B023 - awaited in this turn
    assert client.body[number].endswith(b"\x89\x00" * 9)


@pytest.mark.parametrize("session_id", ["a", "done", "none"])
async def test_a_websocket_without_a_window_is_given_up(autojump_clock, server, caplog, session_id):
    """Whether it has events, ends or is refused: its stream is reset, and the connection is idle."""
    await server.tracker.update("done", status="done", data="x" * 100_000)
    await server.tracker.update("a", progress=1, data="x" * 100_000)
    client = await server.connect()
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    number = await client.websocket(f"/api/sessions/{session_id}/status/ws")
    start = trio.current_time()
    await client.until(lambda: number in client.ended)
    assert number in client.reset_with
    assert trio.current_time() - start <= 40  # a message and the close, 20 s each
    start = trio.current_time()
    while await client.read():
        pass
    assert trio.current_time() - start == pytest.approx(75, abs=1)
    assert server.app.broker.subscribers() == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_websocket_is_not_flooded_with_pongs(autojump_clock, server):
    """A client that sends pings and gives no window costs its bound."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    number = await client.websocket()
    await client.until(lambda: number in client.status)
    for _ in range(1000):
        await client.until(lambda: client.h2.local_flow_control_window(number) > 1000)
        await client.send(number, masked(9, b"x" * 125) * 7)
    await wait_all_tasks_blocked()
    (connection,) = server.app.http2._connections
    assert len(connection._output._outgoing[number].buffer) < 40_000


async def test_a_websocket_to_another_route_is_refused(autojump_clock, server):
    """A 2xx would open the WebSocket (RFC 8441, section 5)."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    for path in ("/health", "/metrics", "/nothing", "/api/sessions/a/status/stream"):
        number = await client.websocket(path)
        await client.until(lambda: number in client.status)  # noqa: B023 - awaited in this turn
        assert client.status[number] == "400"


async def test_a_websocket_over_http2(autojump_clock, server):
    """Extended CONNECT: the messages, and the close."""
    await server.tracker.update("a", status="done")
    client = await server.connect()
    assert await client.websocket() == 1
    await client.until(lambda: 1 in client.ended)
    assert client.status[1] == "200"
    assert b'"event":"complete"' in client.body[1]
    assert client.body[1].endswith(b"\x88\x07\x03\xe8ended")


async def test_clients_that_reset_at_once_leave_nothing(autojump_clock, nursery, caplog):
    """Neither a stream slot nor a traceback, wherever in its response a stream is reset."""
    server = Server(nursery, max_streams_per_user=1, limit_loopback=True)
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    for turns in range(60):
        number = await client.request("GET", "/api/sessions/a/status/stream")
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        await client.reset(number)
        await wait_all_tasks_blocked()
    number = await client.request("GET", "/api/sessions/a/status/stream")
    await client.until(lambda: client.body[number])
    assert client.status[number] == "200"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_client_that_does_not_read_is_not_read(autojump_clock, server):
    """What it makes the server write, as the responses to pings, does not pile up."""
    client = await server.connect(lambda: reversed(socket_streams()))
    await client.flush()
    pings = b"\0\0\x08\6\0\0\0\0\0" + bytes(8)
    sent = 0
    with trio.move_on_after(5):
        while sent < 20 * 2**20:
            await client.stream.send_all(pings * 1000)
            sent += 1000 * len(pings)
    (connection,) = server.app.http2._connections
    assert len(connection._h2._data_to_send) < 300_000
    assert sent < 2**20
    await client.stream.aclose()
