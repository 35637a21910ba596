"""HTTP/2 through Hypercorn with our work-arounds: bodies, windows, idle and stalled connections, shutdown."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import pytest
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Updated
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from trio.testing import lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from sseserve import Grant
from sseserve.config import load
from sseserve.live.transport import Transport
from sseserve.server.application import Application
from sseserve.web.workarounds import Http2Server

PIECE = b"x" * 16_000


class Server:
    """A server without a listener, and how many of its connections are open."""

    def __init__(self, nursery: trio.Nursery, **settings) -> None:
        self.app = Application(load(environ={}, flags=settings), nursery, clock=trio.current_time)
        self.tracker = self.app.tracker
        self.open = 0
        self._nursery = nursery

    async def connect(self, pair: Callable = memory_stream_pair) -> Client:
        """Open a connection that speaks HTTP/2."""
        client, server = pair()
        self.open += 1
        self._nursery.start_soon(self._serve, server)
        return Client(client)

    async def _serve(self, stream) -> None:
        await self.app.connections.serve(stream)
        self.open -= 1


class Client:
    """An HTTP/2 client that reads only when it is told to."""

    def __init__(self, stream) -> None:
        self.stream = stream
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.status: dict[int, str] = {}
        self.body: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.goaway_after: set[int] | None = None  # the streams that had ended when GOAWAY arrived

    async def flush(self) -> None:
        await self.stream.send_all(self.h2.data_to_send())

    async def request(self, method: str, path: str, headers=(), *, end: bool = True) -> int:
        """Send the head of a request; returns the number of its stream."""
        number = self.h2.get_next_available_stream_id()
        head = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "test")]
        self.h2.send_headers(number, [*head, *headers], end_stream=end)
        self.body[number] = b""
        await self.flush()
        return number

    async def read(self) -> bool:
        """Read once; returns False at the end of the connection."""
        if not (data := await self.stream.receive_some()):
            return False
        for event in self.h2.receive_data(data):
            match event:
                case h2.events.ResponseReceived():
                    self.status[event.stream_id] = dict(event.headers)[":status"]
                case h2.events.DataReceived():
                    self.body[event.stream_id] += event.data
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                case h2.events.StreamEnded() | h2.events.StreamReset():
                    self.ended.add(event.stream_id)
                case h2.events.ConnectionTerminated():
                    self.goaway_after = set(self.ended)
        await self.flush()
        return True

    async def until(self, condition: Callable[[], object]) -> None:
        """Read until a condition holds."""
        while not condition():
            assert await self.read(), "the connection has ended"

    async def send_body(self, number: int, pieces: int) -> int:
        """Send a body as far as the windows allow, and return how many bytes that was."""
        sent = 0
        for _ in range(pieces):
            while self.h2.local_flow_control_window(number) < len(PIECE):
                with trio.move_on_after(1) as scope:
                    await self.read()
                if scope.cancelled_caught:
                    return sent
            self.h2.send_data(number, PIECE)
            await self.flush()
            sent += len(PIECE)
        self.h2.end_stream(number)
        await self.flush()
        return sent


@pytest.fixture
async def server(nursery):
    return Server(nursery)


async def closed(server: Server) -> None:
    """Wait, in virtual time, until no connection is open."""
    while server.open:
        await trio.sleep(0.01)


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


async def test_a_response_without_a_window_is_given_up(autojump_clock, server):
    """A client that gives no window for a response costs its bound for the send timeout, then its stream."""
    await server.tracker.update("a", progress=1, data="x" * 500_000)
    client = await server.connect()
    client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
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


# The parts by themselves, where a test over a connection would depend on the order of two tasks


class Protocol:
    """What the connection calls, recorded."""

    def __init__(self) -> None:
        self.handled: list[object] = []

    async def handle(self, event: object) -> None:
        self.handled.append(event)


@pytest.fixture
def connection(autojump_clock):
    _, stream = memory_stream_pair()
    config = Config()
    config.keep_alive_timeout = 5
    connection = Http2Server(None, config, WorkerContext(None), Transport(stream), 1.0)
    connection.protocol = Protocol()
    return connection


@pytest.mark.parametrize("busy", [False, True])
async def test_a_connection_is_closed_only_if_it_is_still_idle(connection, busy):
    """Its time may be over in the moment in which a request begins."""
    await connection.protocol_send(Updated(idle=False)) if busy else None
    await connection._idle_timeout()
    assert [type(event) for event in connection.protocol.handled] == ([] if busy else [Closed])


@pytest.mark.parametrize("client_closed", [False, True])
async def test_a_connection_that_its_client_has_closed_does_not_wait(connection, client_closed):
    """When its last response ends it is not kept for another request."""
    start = trio.current_time()
    async with TaskGroup() as task_group:
        connection._task_group = task_group
        connection._client_closed = client_closed
        await connection.protocol_send(Updated(idle=True))
    assert trio.current_time() - start == pytest.approx(0 if client_closed else 5, abs=0.01)


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


async def test_a_websocket_to_another_route_is_refused(autojump_clock, server):
    """A 2xx would open the WebSocket (RFC 8441, section 5)."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    await client.flush()
    await client.read()
    for path in ("/health", "/metrics", "/nothing", "/api/sessions/a/status/stream"):
        number = client.h2.get_next_available_stream_id()
        head = {":method": "CONNECT", ":protocol": "websocket", ":path": path, ":scheme": "http"}
        head |= {":authority": "test", "sec-websocket-version": "13"}
        client.h2.send_headers(number, list(head.items()))
        client.body[number] = b""
        await client.flush()
        await client.until(lambda: number in client.status)  # noqa: B023 - awaited in this turn
        assert client.status[number] == "400"


async def test_a_websocket_over_http2(autojump_clock, server):
    """Extended CONNECT: the messages, and the close."""
    await server.tracker.update("a", status="done")
    client = await server.connect()
    await client.flush()
    await client.read()
    head = {":method": "CONNECT", ":protocol": "websocket", ":scheme": "http", ":authority": "test"}
    head |= {":path": "/api/sessions/a/status/ws", "sec-websocket-version": "13"}
    client.h2.send_headers(1, list(head.items()))
    client.body[1] = b""
    await client.flush()
    await client.until(lambda: 1 in client.ended)
    assert client.status[1] == "200"
    assert b'"event":"complete"' in client.body[1]
    assert client.body[1].endswith(b"\x88\x07\x03\xe8ended")
