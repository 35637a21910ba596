"""The defects of Quart-Trio and Hypercorn that we work around, reproduced without us.

A test here fails when a new version has mended its defect. Then remove the work-around that its docstring
names, and the test. ``server/http2.py`` stands in for Hypercorn's connection because of all that follow
"Hypercorn's connection" here; when they are mended, that can be used.
"""

from __future__ import annotations

import socket
from typing import Any

import h2.connection
import h2.events
import priority
import pytest
import trio
import trio.testing
from hypercorn.config import Config
from hypercorn.events import Closed, RawData, Updated
from hypercorn.protocol.events import Body, Data, EndBody, EndData, Request, Response, StreamClosed
from hypercorn.protocol.h2 import H2Protocol, StreamBuffer
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import EventWrapper, WorkerContext
from hypercorn.typing import ConnectionState
from quart_trio import QuartTrio

HTTP = {
    "type": "http",
    "asgi": {"spec_version": "2.1", "version": "3.0"},
    "http_version": "2",
    "method": "POST",
    "scheme": "http",
    "path": "/",
    "raw_path": b"/",
    "query_string": b"",
    "root_path": "",
    "headers": [(b"host", b"test")],
    "client": None,
    "server": None,
    "extensions": {},
}


def quart_app(view: Any) -> QuartTrio:
    app = QuartTrio(__name__)
    app.add_url_rule("/", "view", view, methods=["POST"])
    return app


# Quart-Trio


async def test_quart_reads_a_body_that_nobody_reads(autojump_clock):
    """``PacedBody``: all that a client sends is kept, however slow the handler is."""
    received = 0

    async def view():
        await trio.sleep(10)
        return ""

    async def receive():
        nonlocal received
        received += 1
        if received > 1000:
            await trio.sleep_forever()
        return {"type": "http.request", "body": b"x" * 65536, "more_body": True}

    async def send(message):
        await trio.lowlevel.checkpoint()

    await quart_app(view)(HTTP, receive, send)
    assert received > 1000


async def test_the_last_message_is_cancelled_by_the_disconnect_that_it_causes(autojump_clock):
    """``BoundedConnection``: Hypercorn queues ``http.disconnect`` while it sends the end of a response."""
    disconnect, sent_whole = trio.Event(), False

    async def view():
        return "body"

    async def receive():
        await disconnect.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        nonlocal sent_whole
        if message["type"] == "http.response.body" and not message.get("more_body"):
            disconnect.set()
            await trio.sleep(1)  # Hypercorn still has to close the stream
            sent_whole = True

    await quart_app(view)(HTTP, receive, send)
    assert not sent_whole


@pytest.mark.parametrize("changes", [{"path": ""}, {"headers": [(b"host", b"a..b")]}])
async def test_a_request_fails_before_it_reaches_the_application(autojump_clock, changes):
    """``QuartApp``: one with an empty path, or with a host that cannot be a name of the DNS."""
    app, sent = quart_app(lambda: ""), []
    app.before_request(lambda: "reached")

    async def receive():
        await trio.sleep_forever()

    async def send(message):
        sent.append(message)

    with pytest.raises((IndexError, ExceptionGroup)):
        await app({**HTTP, **changes}, receive, send)
    assert sent == []


# Hypercorn's connection


class StalledStream(trio.abc.HalfCloseableStream):
    """Accepts nothing until it is closed."""

    def __init__(self) -> None:
        self.closed = trio.Event()

    async def send_all(self, data):
        await self.closed.wait()
        raise trio.ClosedResourceError

    async def wait_send_all_might_not_block(self):
        await self.closed.wait()

    async def receive_some(self, max_bytes=None):
        await self.closed.wait()
        return b""

    async def send_eof(self):
        pass

    async def aclose(self):
        self.closed.set()


async def no_app(scope, receive, send, *_more):
    await trio.sleep_forever()


async def test_a_send_to_a_stalled_client_cannot_be_cancelled(autojump_clock, nursery):
    """It is shielded without a timeout."""
    stream = StalledStream()
    server = TCPServer(no_app, Config(), WorkerContext(None), {}, stream)
    server.protocol = type("Protocol", (), {"handle": lambda _self, _event: trio.sleep(0)})()
    done = trio.Event()

    async def send():
        with trio.move_on_after(1):
            await server.protocol_send(RawData(b"x"))
        done.set()

    nursery.start_soon(send)
    with trio.move_on_after(1000):
        await done.wait()
    assert not done.is_set()
    stream.closed.set()
    await done.wait()


async def test_a_client_that_closes_an_idle_connection_is_kept_until_the_timeout(autojump_clock):
    """The reader has ended, and the idle timer goes on."""
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    config = Config()
    config.keep_alive_timeout = 50
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(TCPServer(no_app, config, WorkerContext(None), {}, ours).run)
        await theirs.aclose()
    assert trio.current_time() - start == pytest.approx(50)


async def test_a_request_is_lost_that_begins_while_idle_connections_are_closed(autojump_clock):
    """It closes a connection without looking whether it is still idle."""
    handled = []

    class Protocol:
        idle = False  # a request has begun

        async def handle(self, event):
            handled.append(event)

    worker = WorkerContext(None)
    server = TCPServer(no_app, Config(), worker, {}, StalledStream())
    server.protocol = Protocol()
    await worker.terminated.set()
    await server._idle_timeout()
    assert [type(event) for event in handled] == [Closed]


# Hypercorn's HTTP/2


class Connection:
    """Hypercorn's HTTP/2 with one request, what it has sent, and the client that reads it."""

    def __init__(self, nursery, **settings) -> None:
        self.sent: list[h2.events.Event] = []
        self.client = h2.connection.H2Connection()
        self.client.initiate_connection()
        for name, value in settings.items():
            self.client.update_settings({getattr(h2.settings.SettingCodes, name): value})
        self.client.send_headers(
            1, [(":method", "GET"), (":path", "/"), (":scheme", "http"), (":authority", "a")], end_stream=True
        )
        self.worker = WorkerContext(None)
        self.updates: list[bool] = []
        group = type("Group", (), {"spawn": lambda _self, task: nursery.start_soon(task)})()
        group.spawn_app = self._spawn_app
        self.protocol = H2Protocol(
            no_app, Config(), self.worker, group, ConnectionState({}), False, None, None, self._send
        )

    async def _spawn_app(self, *_more):
        async def put(_message):
            pass

        return put

    async def _send(self, event):
        if isinstance(event, RawData):
            self.sent += self.client.receive_data(event.data)
        elif isinstance(event, Updated):
            self.updates.append(event.idle)

    async def request(self, headers: list[tuple[str, str]]) -> None:
        self.client.send_headers(self.client.get_next_available_stream_id(), headers, end_stream=True)
        await self.protocol.handle(RawData(self.client.data_to_send()))

    async def start(self) -> None:
        await self.protocol.initiate()
        await self.protocol.handle(RawData(self.client.data_to_send()))
        await self.protocol.stream_send(Response(stream_id=1, headers=[], status_code=200))


async def test_data_on_a_stream_that_has_ended_is_an_error(autojump_clock, nursery):
    """What a client still sends after it got its response fails the connection."""
    connection = Connection(nursery)
    await connection.start()
    del connection.protocol.streams[1]
    data = h2.events.DataReceived(stream_id=1, data=b"x", flow_controlled_length=1)
    with pytest.raises(KeyError):
        await connection.protocol._handle_events([data])
    nursery.cancel_scope.cancel()


async def test_a_stream_without_a_window_is_not_waited_for(autojump_clock, nursery):
    """A write that sends nothing lets the writer continue all the same."""
    buffer = StreamBuffer(EventWrapper)

    async def pop():
        while True:
            await trio.sleep(1)
            await buffer.pop(0)  # as the sending task does while the client's window is closed

    nursery.start_soon(pop)
    with trio.fail_after(1000):
        for _ in range(100):
            await buffer.push(b"x" * 65536)
    assert len(buffer.buffer) == 100 * 65536
    nursery.cancel_scope.cancel()


async def test_the_goaway_of_a_shutdown_overtakes_the_end_of_a_stream(autojump_clock, nursery):
    """The stream is closed while its end still waits to be sent."""
    connection = Connection(nursery)
    await connection.start()
    await connection.worker.terminated.set()
    protocol = connection.protocol
    await protocol.stream_send(Body(stream_id=1, data=b"x"))
    await trio.testing.wait_all_tasks_blocked()
    send_data, go = protocol._send_data, trio.Event()

    async def later(stream_id):
        await go.wait()  # the sending task is busy with another stream
        await send_data(stream_id)

    protocol._send_data = later
    await protocol.stream_send(EndBody(stream_id=1))
    await protocol.stream_send(StreamClosed(stream_id=1))
    go.set()
    await trio.testing.wait_all_tasks_blocked()
    kinds = [type(event) for event in connection.sent]
    assert h2.events.ConnectionTerminated in kinds
    assert h2.events.StreamEnded not in kinds[: kinds.index(h2.events.ConnectionTerminated)]
    nursery.cancel_scope.cancel()


async def test_the_end_of_a_response_waits_for_ever_when_the_connection_closes(autojump_clock, nursery):
    """The sending task has ended, and nobody wakes who waits for it."""
    connection = Connection(nursery)
    await connection.start()
    protocol = connection.protocol
    await protocol.handle(Closed())
    await trio.testing.wait_all_tasks_blocked()
    with trio.move_on_after(1000) as scope:
        await protocol.stream_buffers[1].push(b"x")
        await protocol.stream_send(EndBody(stream_id=1))
    assert scope.cancelled_caught
    nursery.cancel_scope.cancel()


async def test_a_cancelled_response_loses_its_header_block(autojump_clock, nursery):
    """It has changed the state of the header compression, and is sent by the task of its request."""
    connection = Connection(nursery)
    await connection.protocol.initiate()
    await connection.protocol.handle(RawData(connection.client.data_to_send()))
    connection.protocol.send = lambda _event: trio.sleep(1)  # as while the socket is full
    with trio.move_on_after(0.5):
        await connection.protocol.stream_send(Response(stream_id=1, headers=[(b"a", b"b")], status_code=200))
    assert connection.protocol.connection.data_to_send() == b""
    nursery.cancel_scope.cancel()


async def test_a_connection_does_not_count_as_idle_after_a_reset(autojump_clock, nursery):
    """Nobody is told that its last stream has ended."""
    connection = Connection(nursery)
    await connection.start()
    connection.client.reset_stream(1)
    await connection.protocol.handle(RawData(connection.client.data_to_send()))
    assert connection.protocol.idle
    assert connection.updates == [False]
    nursery.cancel_scope.cancel()


async def test_a_bad_request_is_an_error_of_the_connection(autojump_clock, nursery):
    """CONNECT, and a path that is not ASCII; in h2, too, what is malformed ends the connection."""
    connection = Connection(nursery)
    await connection.start()
    with pytest.raises(UnboundLocalError):
        await connection.request([(":method", "CONNECT"), (":authority", "a")])
    head = [(":method", "GET"), (":scheme", "http"), (":authority", "a")]
    with pytest.raises(UnicodeDecodeError):
        await connection.request([*head, (":path", "/\xe9")])
    connection.client.config.validate_outbound_headers = False
    await connection.request([*head, (":path", "")])
    assert isinstance(connection.sent[-1], h2.events.ConnectionTerminated)
    nursery.cancel_scope.cancel()


async def test_priorities_are_kept_for_streams_that_are_never_opened(autojump_clock, nursery):
    """At the 1,001st the connection fails."""
    connection = Connection(nursery)
    await connection.start()
    for number in range(1001):
        connection.client.prioritize(number * 2 + 101)
    with pytest.raises(priority.TooManyStreamsError):
        await connection.protocol.handle(RawData(connection.client.data_to_send()))
    nursery.cancel_scope.cancel()


async def test_a_connection_ends_after_a_thousand_requests(autojump_clock, nursery):
    """Also for the streams that are still open."""
    connection = Connection(nursery)
    await connection.start()
    connection.protocol.keep_alive_requests = 1001
    head = [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/")]
    await connection.request(head)
    assert isinstance(connection.sent[-1], h2.events.ConnectionTerminated)
    await connection.protocol.stream_send(Body(stream_id=1, data=b"x"))
    await trio.testing.wait_all_tasks_blocked()
    assert isinstance(connection.sent[-1], h2.events.ConnectionTerminated)
    nursery.cancel_scope.cancel()


# Hypercorn's WebSocket


class WebSocket:
    """Hypercorn's WebSocket over HTTP/2, and what it has sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.received: list[Any] = []

    async def _send(self, event: Any) -> None:
        self.sent.append(event)

    async def open(self, version: bytes = b"13", *, accepted: bool = True) -> WSStream:
        class Group:
            async def spawn_app(_group, _app, _config, _scope, _send):
                async def put(message):
                    self.received.append(message["type"])

                return put

        arguments = (no_app, Config(), WorkerContext(None), Group(), False, None, None, self._send, 1)
        stream = WSStream(*arguments)
        headers = [(b"sec-websocket-version", version)]
        await stream.handle(Request(1, headers, "2", "CONNECT", b"/", ConnectionState({})))
        if accepted:
            await stream.app_send({"type": "websocket.accept"})
        return stream

    @property
    def has_ended(self) -> bool:
        """Whether its stream was ended, or its application told."""
        ends = any(isinstance(event, EndData | StreamClosed) for event in self.sent)
        return ends or "websocket.disconnect" in self.received


async def test_a_websocket_stays_open_after_a_message_that_is_too_large(autojump_clock):
    """``WebSocketStream``: 1009 is sent, and nothing else happens."""
    websocket = WebSocket()
    stream = await websocket.open()
    stream.buffer.max_length = 10
    await stream.handle(Data(1, b"\x81\x8b" + bytes(4) + b"x" * 11))
    assert websocket.sent[-1].data == b"\x88\x02\x03\xf1"
    assert not websocket.has_ended


async def test_a_websocket_gets_no_close_frame_for_what_breaks_the_protocol(autojump_clock):
    """``WebSocketStream``: its stream ends without one."""
    websocket = WebSocket()
    stream = await websocket.open()
    await stream.handle(Data(1, b"\x83\x80" + bytes(4)))
    assert not any(isinstance(event, Data) for event in websocket.sent)
    assert isinstance(websocket.sent[-1], StreamClosed)


async def test_a_websocket_stays_open_without_its_client(autojump_clock):
    """``WebSocketStream``: after END_STREAM, data before the response, and a handshake that is refused."""
    websocket = WebSocket()
    await (await websocket.open()).handle(EndBody(1))
    assert not websocket.has_ended
    websocket = WebSocket()
    await (await websocket.open(accepted=False)).handle(Data(1, b"x"))
    assert not websocket.has_ended
    websocket = WebSocket()
    await websocket.open(b"12", accepted=False)
    assert not websocket.has_ended
