"""Event streams over HTTP/2: windows, stalled clients, fairness, resets, and a shutdown."""

from __future__ import annotations

import json
import logging
import socket

import h2.errors
import hyperframe.frame
import pytest
import trio
from h2.settings import SettingCodes
from http2_harness import Client, Server, closed
from live_harness import socket_streams
from trio.testing import wait_all_tasks_blocked

from sseserve import Grant
from sseserve.live import fanout
from sseserve.live.push_subscriber import PushSubscriber
from sseserve.live.subscriber import EncodedEvents
from sseserve.live.transport import Transport
from sseserve.server.http2_frames import DataFrames
from sseserve.sse import Decoder

STREAM = "/api/sessions/a/status/stream"
LAST_STREAM = 2**31 - 1


@pytest.fixture
async def server(nursery):
    return Server(nursery)


def events(client: Client, number: int) -> list[tuple[str | None, object]]:
    """The type and the data of each event of a stream."""
    return [(event.event, json.loads(event.data)) for event in Decoder().feed(client.body[number])]


async def watch(client: Client, path: str = STREAM, **headers: str) -> int:
    """Open a stream, and read until it has its first event."""
    number = await client.request("GET", path, headers)
    await client.until(lambda: b"event: " in client.body[number])
    return number


async def first_cursor(server: Server) -> str:
    """The cursor of the first event of the session a."""
    session = await server.tracker.get("a")
    return str(session.cursor).rpartition("-")[0] + "-1"


async def close_window(client: Client, *numbers: int) -> None:
    """Have the windows of streams, and of those that follow, be 0: they have sent nothing yet that counts."""
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    await client.flush()
    await wait_all_tasks_blocked()


def open_window(client: Client, number: int, size: int) -> None:
    client.h2.increment_flow_control_window(size, number)


# Windows


async def test_a_stream_without_a_window_costs_its_bound_and_not_the_others(autojump_clock, nursery):
    """Its buffer overflows, and it is cut; each event comes to its connection's other streams at once."""
    server = Server(nursery, buffer_events=8)
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    stalled = await client.request("GET", STREAM)
    await client.until(lambda: stalled in client.status)
    others = [await client.request("GET", STREAM) for _ in range(3)]
    for number in others:
        open_window(client, number, 10**6)
    await client.flush()
    await client.until(lambda: all(client.body[number] for number in others))
    for number in range(40):
        await server.tracker.emit("a", "tick", number)
        await client.until(lambda: all(events(client, n)[-1] == ("tick", number) for n in others))  # noqa: B023
        assert all(subscriber.backlog[0] <= 8 for subscriber in server.app.broker.subscribers())
    assert server.app.broker.statistics().cut == 1
    open_window(client, stalled, 10**6)
    await client.flush()
    await client.until(lambda: stalled in client.ended)
    # What it had got no window for in time is not there, but the reason is; then it is reset, as it is cut.
    assert [name for name, _ in events(client, stalled)] == ["progress", "overflow"]
    assert client.reset_with[stalled] == h2.errors.ErrorCodes.CANCEL
    assert not set(others) & client.ended


async def test_a_stream_without_a_window_is_reset_in_time(autojump_clock, nursery):
    """After the send timeout: its client has left it, for all that is known."""
    server = Server(nursery, send_timeout=5)
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    other = await watch(client)
    await close_window(client)
    open_window(client, other, 10**6)
    stalled = await client.request("GET", STREAM)
    start = trio.current_time()
    await client.until(lambda: stalled in client.ended)
    assert trio.current_time() - start == pytest.approx(5, abs=0.6)
    assert client.reset_with[stalled] == h2.errors.ErrorCodes.CANCEL
    await server.tracker.update("a", status="done")
    await client.until(lambda: other in client.ended)
    assert events(client, other)[-1][0] == "complete"
    assert server.app.broker.subscribers() == []


async def test_progress_is_conflated_while_the_window_is_closed(autojump_clock, nursery):
    """The client gets the newest when it opens it."""
    server = Server(nursery, buffer_events=8)
    await server.tracker.update("a", progress=0)
    client = await server.connect()
    await close_window(client)
    number = await client.request("GET", STREAM)
    await client.until(lambda: number in client.status)
    for percent in range(1, 90):
        await server.tracker.update("a", progress=percent)
    await wait_all_tasks_blocked()
    assert server.app.broker.statistics().conflated > 50
    assert server.app.broker.statistics().cut == 0
    open_window(client, number, 10**6)
    await client.flush()
    await client.until(lambda: b'"progress":89' in client.body[number])
    percents = [data["progress"] for _, data in events(client, number)]
    assert percents == sorted(percents)


async def test_data_waits_for_the_window_of_the_connection(autojump_clock, server):
    """Of which all its streams have a share, in turns."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10**6})
    numbers = [await watch(client) for _ in range(3)]
    received = {number: len(client.body[number]) for number in numbers}
    read = client.h2.acknowledge_received_data
    client.h2.acknowledge_received_data = lambda *_: None  # from now on no window is given back
    for number in range(10):
        await server.tracker.emit("a", "tick", f"{number}" + "x" * 9_000)
    await client.flush()
    with trio.move_on_after(1):
        while await client.read():
            pass
    got = [len(client.body[number]) - received[number] for number in numbers]
    assert 60_000 < sum(got) <= 65_535
    client.h2.acknowledge_received_data = read
    client.h2.increment_flow_control_window(10**6)
    await client.flush()
    await client.until(lambda: all(len(events(client, number)) == 11 for number in numbers))
    assert all([data[0] for _, data in events(client, n)[1:]] == list("0123456789") for n in numbers)


@pytest.mark.parametrize("max_frame", [16_384, 40_000])
async def test_no_frame_is_larger_than_the_client_allows(autojump_clock, server, max_frame):
    """An event of 100 KB comes in several; whoever parses them would refuse a larger one."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    client.h2.update_settings(
        {SettingCodes.INITIAL_WINDOW_SIZE: 10**6, SettingCodes.MAX_FRAME_SIZE: max_frame}
    )
    client.h2.increment_flow_control_window(10**6)
    number = await watch(client)
    await server.tracker.emit("a", "large", "x" * 100_000)
    await client.until(lambda: len(events(client, number)) == 2)
    assert events(client, number)[1] == ("large", "x" * 100_000)


def test_frames_of_the_same_payload_are_the_same():
    """Those of other numbers, payloads and sizes are not."""
    frames = DataFrames()
    payload = b"x" * 100
    first = frames.get(1, payload)
    batch = frames.batch
    assert first == b"\0\0\x64\0\0\0\0\0\1" + payload
    assert frames.get(1, payload) is first
    assert frames.get(3, payload) == b"\0\0\x64\0\0\0\0\0\3" + payload
    assert frames.batch == batch
    frames.get(1, b"y")
    assert frames.batch == batch + 1
    large = b"z" * 40_000
    assert len(frames.get(1, large)) == 40_000 + 3 * 9
    assert frames.get(1, large)[16_384 + 9 :][:9] == b"\0\x40\0\0\0\0\0\0\1"


async def test_heartbeats(autojump_clock, nursery):
    """Each silent stream gets them, but not one without a window, which is not cut for that either."""
    server = Server(nursery, heartbeat=10)
    nursery.start_soon(server.app.broker.heartbeats.run)
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    numbers = [await watch(client) for _ in range(3)]
    first = {number: client.body[number] for number in numbers}
    start = trio.current_time()
    await client.until(lambda: all(client.body[number] != first[number] for number in numbers))
    assert trio.current_time() - start <= 10
    assert [client.body[n].removeprefix(first[n]) for n in numbers] == [b": heartbeat\n"] * 3
    closed = await client.request("GET", STREAM)
    await client.until(lambda: b"event: " in client.body[closed])
    await close_window(client)
    with trio.move_on_after(60):
        while await client.read():
            pass
    assert b"heartbeat" not in client.body[closed]
    assert client.ended == set()
    open_window(client, closed, 10**6)
    await client.flush()
    await client.until(lambda: b"heartbeat" in client.body[closed])


# Turns and writes


async def test_a_long_replay_does_not_hold_up_other_streams(autojump_clock, server):
    """Its frames and theirs take turns: what is published meanwhile arrives in the middle of it."""
    await server.tracker.update("b", progress=1)
    await server.tracker.update("a", progress=1)
    for number in range(200):
        await server.tracker.emit("a", "old", f"{number}" + "x" * 5_000)
    cursor = await first_cursor(server)
    client = await server.connect()
    live = await watch(client, "/api/sessions/b/status/stream")
    replayed = await client.request("GET", STREAM, {"last-event-id": cursor})
    await client.until(lambda: len(client.body[replayed]) > 100_000)
    await server.tracker.emit("b", "tick", 1)
    await client.until(lambda: ("tick", 1) in events(client, live))
    assert len(client.body[replayed]) < 500_000
    await client.until(lambda: len(events(client, replayed)) == 201)
    assert events(client, replayed)[0][0] == "resume"


async def test_streams_of_a_connection_that_get_the_same_are_one_write(server, monkeypatch):
    """The first of them is written at once, the others together, when other tasks run."""
    monkeypatch.setattr(fanout, "SLICE", 1e9)
    await server.tracker.update("a", progress=1)
    writes = []

    class Recorder(Transport):
        """A socket whose writes are noted."""

        def try_send(self, data):
            writes.append(bytes(data))
            return super().try_send(data)

    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    server._nursery.start_soon(server.app.connections.serve, Recorder(ours))
    client = Client(trio.SocketStream(trio.socket.from_stdlib_socket(theirs)))
    numbers = [await client.request("GET", STREAM) for _ in range(20)]
    await client.until(lambda: all(client.body[number] for number in numbers))
    await wait_all_tasks_blocked()
    writes.clear()
    await server.tracker.emit("a", "tick", 1)
    await client.until(lambda: all(events(client, number)[-1] == ("tick", 1) for number in numbers))
    assert [data.count(b"event: tick") for data in writes if b"tick" in data] == [1, 19]
    await client.stream.aclose()


async def test_many_streams_of_a_connection_get_more_than_one_write_holds(server):
    """What one write leaves over is written by the next, although the socket takes everything at once."""
    await server.tracker.update("a", progress=1)
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    server._nursery.start_soon(server.app.connections.serve, ours)
    client = Client(theirs)
    client.h2.increment_flow_control_window(2**20)
    numbers = [await watch(client) for _ in range(90)]
    await server.tracker.emit("a", "tick", "x" * 3_000)
    with trio.fail_after(5):
        await client.until(lambda: all(events(client, n)[-1] == ("tick", "x" * 3_000) for n in numbers))
    await client.stream.aclose()


async def test_what_waits_for_a_window_comes_first(autojump_clock, server):
    """Nothing is sent past it, however little that is."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    number = await watch(client)
    (subscriber,) = server.app.broker.subscribers()
    transport = subscriber._transport
    transport._output.queue(number, b"first" * 20_000)  # the window is smaller
    assert not transport.try_send(b"second")
    await client.until(lambda: client.body[number].endswith(b"first" * 20_000))
    assert transport.try_send(b"third")
    await client.until(lambda: client.body[number].endswith(b"third"))
    assert b"second" not in client.body[number]
    transport._output.queue(number, b"fourth")
    subscriber.write(b"fifth")
    await client.until(lambda: client.body[number].endswith(b"fourthfifth"))


async def test_an_event_without_data_holds_up_nothing(autojump_clock, server):
    """Conflation may leave one that the stream's dialect has no use for: what follows it is sent."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    number = await watch(client)
    (subscriber,) = server.app.broker.subscribers()
    subscriber._begin_buffer()
    subscriber._enqueue(EncodedEvents.raw(b""))
    subscriber._enqueue(EncodedEvents.raw(b"x" * 20_000))
    subscriber._notify()
    await client.until(lambda: client.body[number].endswith(b"x" * 20_000))
    assert not subscriber.has_backlog


async def test_sending_to_a_stream_that_its_client_resets_fails(autojump_clock, server):
    """What waits is not taken for sent."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    number = await watch(client)
    (subscriber,) = server.app.broker.subscribers()
    transport = subscriber._transport
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.reset, number)
        with pytest.raises(trio.BrokenResourceError):
            await transport.send_all(b"x" * 100_000)
    with pytest.raises(trio.BrokenResourceError):
        transport.try_send(b"x")
    assert not transport.pull_from(subscriber)


async def test_the_rest_of_a_write_is_sent(server):
    """The socket takes a part of an event: nothing else has to happen for the rest."""
    await server.tracker.update("a", progress=1)
    client = await server.connect(lambda: reversed(socket_streams()))
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**20})
    client.h2.increment_flow_control_window(2**20)
    number = await watch(client)
    await wait_all_tasks_blocked(0.01)
    await server.tracker.emit("a", "tick", "x" * 30_000)
    with trio.fail_after(5):
        await client.until(lambda: events(client, number)[-1] == ("tick", "x" * 30_000))
    await client.stream.aclose()


async def fill(
    server: Server, client: Client, events: int, *, stalled: int = 0, size: int = 10_000
) -> list[int]:
    """Open 20 streams, and publish more than the socket takes; ``stalled`` of them have a small window."""
    await server.tracker.update("a", progress=1)
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**24})
    client.h2.increment_flow_control_window(2**24)
    numbers = [await watch(client) for _ in range(20 - stalled)]
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**14})
    for number in numbers:
        open_window(client, number, 2**24)
    numbers += [await watch(client) for _ in range(stalled)]
    await wait_all_tasks_blocked()
    for number in range(events):
        await server.tracker.emit("a", "tick", f"{number} {'x' * size}")
        await wait_all_tasks_blocked()
    return numbers


def ticks(client: Client, number: int) -> list[int]:
    """Which events of ``fill`` a stream has, in their order."""
    return [int(str(data).split()[0]) for name, data in events(client, number) if name == "tick"]


async def test_the_streams_of_a_full_connection_wait_without_tasks(nursery):
    """Its writer takes what waits for each, as soon as the client reads; then they end as any stream."""
    server = Server(nursery, buffer_bytes=2**20)
    client = await server.connect(socket_streams)
    before = trio.lowlevel.current_statistics().tasks_living
    numbers = await fill(server, client, 40)
    subscribers = server.app.broker.subscribers()
    assert all(subscriber.has_backlog for subscriber in subscribers)
    assert trio.lowlevel.current_statistics().tasks_living <= before + 4 + len(numbers)
    await server.tracker.update("a", status="done")
    with trio.fail_after(20):
        await client.until(lambda: set(numbers) <= client.ended)
    for number in numbers:
        assert ticks(client, number) == list(range(40))
        assert events(client, number)[-1][0] == "complete"
    assert client.reset_with == {}
    sizes = [len(client.body[number]) for number in numbers]
    assert sorted(subscriber.sent_bytes for subscriber in subscribers) == sorted(sizes)
    deliveries = server.app.broker.deliveries
    assert (deliveries.clients, deliveries.events, deliveries.size) == (0, 0, 0)
    await client.stream.aclose()


@pytest.mark.parametrize("size", [10_000, 1_000])
async def test_a_full_connection_does_not_wait_for_a_stream_without_a_window(nursery, size):
    """What is larger than its window waits for that; the others get theirs, and it gets all in the end."""
    server = Server(nursery, buffer_bytes=2**20)
    client = await server.connect(socket_streams)
    client.h2.acknowledge_received_data = lambda *_: None  # no window is given back
    numbers = await fill(server, client, 40, stalled=5, size=size)
    await server.tracker.update("a", status="done")
    with trio.fail_after(20):
        await client.until(lambda: set(numbers[:15]) <= client.ended)
    assert not set(numbers[15:]) & client.ended
    for number in numbers[15:]:
        open_window(client, number, 2**24)
    await client.flush()
    with trio.fail_after(20):
        await client.until(lambda: set(numbers) <= client.ended)
    assert [ticks(client, number) for number in numbers] == [list(range(40))] * 20
    assert client.reset_with == {}
    await client.stream.aclose()


async def test_a_failure_on_a_full_connection_resets_one_stream(nursery, monkeypatch, caplog):
    """The others get everything."""
    server = Server(nursery, buffer_bytes=2**20)
    client = await server.connect(socket_streams)
    numbers = await fill(server, client, 40)
    failing, dequeue = server.app.broker.subscribers()[-1], PushSubscriber._dequeue

    def fail(subscriber, limit):
        if subscriber is failing:
            raise RuntimeError("a defect")
        return dequeue(subscriber, limit)

    monkeypatch.setattr(PushSubscriber, "_dequeue", fail)
    await server.tracker.update("a", status="done")
    with trio.fail_after(20):
        await client.until(lambda: set(numbers) <= client.ended)
    (reset,) = client.reset_with
    assert all(ticks(client, number) == list(range(40)) for number in numbers if number != reset)
    assert any(r.exc_info and r.exc_info[0] is RuntimeError for r in caplog.records)
    assert server.app.broker.subscribers() == []
    await client.stream.aclose()


async def test_the_streams_of_a_full_connection_are_cut(nursery):
    """What each has got is the beginning, and then the reason; it is reset."""
    server = Server(nursery, buffer_events=8)
    client = await server.connect(socket_streams)
    numbers = await fill(server, client, 40)
    assert server.app.broker.statistics().cut == 20
    with trio.fail_after(20):
        await client.until(lambda: set(numbers) <= client.ended)
    for number in numbers:
        assert events(client, number)[-1][0] == "overflow"
        assert ticks(client, number) == list(range(len(ticks(client, number))))
        assert client.reset_with[number] == h2.errors.ErrorCodes.CANCEL
    await client.stream.aclose()


async def test_a_response_to_a_stream_that_is_gone(autojump_clock, server):
    """A WebSocket whose client sends too early and resets, and then makes another request, all at once."""
    client = await server.connect()
    await client.flush()
    await client.read()
    head = {":method": "CONNECT", ":protocol": "websocket", ":path": STREAM[:-6] + "ws", ":scheme": "http"}
    head |= {":authority": "localhost", "sec-websocket-version": "13"}
    client.h2.send_headers(1, list(head.items()))
    client.h2.send_data(1, b"x")
    client.h2.reset_stream(1)
    number = await client.request("GET", "/health")
    await client.until(lambda: number in client.ended)
    assert client.status[number] == "200"


async def test_pings_and_settings_are_answered_while_streams_stall(autojump_clock, server):
    """They need no window."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    await close_window(client)
    numbers = [await client.request("GET", STREAM) for _ in range(5)]
    await client.until(lambda: set(numbers) <= client.status.keys())
    acknowledged = []
    receive = client.h2.receive_data

    def note(data):
        found = receive(data)
        acknowledged.extend(type(event).__name__ for event in found)
        return found

    client.h2.receive_data = note
    client.h2.ping(b"12345678")
    client.h2.update_settings({SettingCodes.MAX_FRAME_SIZE: 20_000})
    await client.flush()
    await client.until(lambda: {"PingAckReceived", "SettingsAcknowledged"} <= set(acknowledged))


async def test_a_connection_that_stalls_costs_its_bound(nursery):
    """TCP takes no more: what waits is bounded, of the connection and of each stream, until it is closed."""
    server = Server(nursery, buffer_events=50, buffer_bytes=20_000, send_timeout=0.5)
    await server.tracker.update("a", progress=1)
    client = await server.connect(lambda: reversed(socket_streams()))
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**30})
    client.h2.increment_flow_control_window(2**30)
    for _ in range(10):
        await watch(client)
    (connection,) = server.app.http2._connections
    for number in range(2_000):
        await server.tracker.emit("a", "tick", "x" * 1_000)
        if number % 100 == 0:
            await trio.lowlevel.checkpoint()
            waiting = sum(each.backlog[1] for each in server.app.broker.subscribers())
            copied = sum(len(each.buffer) for each in connection._output._outgoing.values())
            assert len(connection._h2.encoded) <= 64 * 1024 + 40_000
            assert waiting + copied <= 10 * (20_000 + 64 * 1024 + 2_000)
    assert server.app.broker.statistics().cut == 10
    with trio.fail_after(10):
        while server.open:
            await trio.sleep(0.01)
    await client.stream.aclose()
    assert server.app.broker.subscribers() == []


# Ends


async def test_a_stream_ends_with_its_token(autojump_clock, server):
    """Complete, after its notice: END_STREAM, also if the client gives no window."""
    expires_at = trio.current_time() + 90

    async def authenticate(_request):
        return Grant("a", "admin", expires_at=expires_at)

    server.app.admission.authenticate = authenticate
    server._nursery.start_soon(server.app.open_streams.run)
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    number = await watch(client)
    await client.until(lambda: number in client.ended)
    assert trio.current_time() == pytest.approx(expires_at, abs=1.5)
    assert events(client, number)[-1][0] == "expiring"
    assert number not in client.reset_with


async def test_a_failure_resets_one_stream(autojump_clock, server, monkeypatch, caplog):
    """Its client can tell that the response is not complete, and the others go on."""
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    other = await watch(client)

    def fail(*_arguments):
        raise RuntimeError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(server.app.broker, "subscribe", fail)
        number = await client.request("GET", STREAM)
        await client.until(lambda: number in client.ended)
    assert number in client.reset_with
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    await server.tracker.emit("a", "tick", 1)
    await client.until(lambda: events(client, other)[-1] == ("tick", 1))


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/sessions/none/status/stream", "404"),
        (STREAM + "?a=caf\xe9", "400"),
        (STREAM + "?a=" + "x" * 40_000, "414"),
    ],
)
async def test_refusals_are_whole_responses(autojump_clock, server, path, status):
    """In the shape of every error, with the header fields that every response has."""
    client = await server.connect()
    client.h2.update_settings({SettingCodes.MAX_FRAME_SIZE: 20_000})
    number = await client.request("GET", path, {"x-request-id": "mine"})
    await client.until(lambda: number in client.ended)
    assert client.status[number] == status
    assert number not in client.reset_with
    headers = client.headers[number]
    assert (headers["x-request-id"], headers["content-length"]) == ("mine", str(len(client.body[number])))
    assert "date" in headers
    assert json.loads(client.body[number])["error"]["request_id"] == "mine"


# Shutdown


class Draining:
    """A connection with a stream that has ended, a request that is being served, and a server that stops."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.go = trio.Event()

    async def begin(self) -> Client:
        await self.server.tracker.update("a", progress=1)
        client = await self.server.connect()
        self.stream = await watch(client)

        async def authenticate(request):
            if request.path.endswith("/status"):
                await self.go.wait()
            return Grant("a", "admin")

        self.server.app.admission.authenticate = authenticate
        self.request = await client.request("GET", "/api/sessions/a/status")
        await wait_all_tasks_blocked()
        listener = self.server.app.listen([])
        await self.server._nursery.start(listener.run)
        listener.stop()
        return client


async def test_a_shutdown_says_twice_that_the_connection_ends(autojump_clock, server):
    """RFC 9113, section 6.8. Streams end before; what was on its way is served, what comes later refused."""
    draining = Draining(server)
    client = await draining.begin()
    await client.until(lambda: client.last_streams)
    assert client.last_streams == [LAST_STREAM]
    assert client.goaway_after == {draining.stream}
    assert draining.stream not in client.reset_with
    assert b"retry: " in client.body[draining.stream]
    start = trio.current_time()
    await client.until(lambda: len(client.last_streams) == 2)
    assert trio.current_time() - start < 0.1
    assert client.last_streams[1] == draining.request
    refused = await client.request("GET", "/health")
    await client.until(lambda: refused in client.ended)
    assert client.reset_with[refused] == h2.errors.ErrorCodes.REFUSED_STREAM
    draining.go.set()
    await client.until(lambda: draining.request in client.ended)
    assert client.status[draining.request] == "200"
    start = trio.current_time()
    while await client.read():
        pass
    assert trio.current_time() - start < 0.1
    assert len(client.last_streams) == 2


async def test_a_request_that_was_on_its_way_is_served(autojump_clock, server):
    """It arrives between the two: before the answer to the ping."""
    draining = Draining(server)
    client = await draining.begin()
    await trio.sleep(0.5)  # the first GOAWAY has been sent, and not been read
    late = client.h2.get_next_available_stream_id()
    fields = {":method": "GET", ":path": "/health", ":scheme": "http", ":authority": "localhost"}
    client.h2.send_headers(late, list(fields.items()), end_stream=True)
    client.body[late] = b""
    await client.flush()
    await client.until(lambda: late in client.ended and len(client.last_streams) == 2)
    assert client.status[late] == "200"
    assert client.last_streams == [LAST_STREAM, late]
    draining.go.set()


async def test_a_request_behind_the_end_of_the_last_stream_is_refused(autojump_clock, server):
    """They arrive in one read, after the first GOAWAY: by then the connection is being closed."""
    draining = Draining(server)
    client = await draining.begin()
    await trio.sleep(0.5)
    client.h2.reset_stream(draining.request, h2.errors.ErrorCodes.CANCEL)
    late = await client.request("GET", STREAM)
    while await client.read():
        pass
    assert client.reset_with[late] == h2.errors.ErrorCodes.REFUSED_STREAM
    assert late not in client.status
    assert client.body[late] == b""


async def test_a_client_that_answers_no_ping_is_told_in_time(autojump_clock, server):
    """After about a second the second GOAWAY comes anyway."""
    draining = Draining(server)
    client = await draining.begin()
    flush = client.flush

    async def drop() -> None:
        client.h2.clear_outbound_data_buffer()
        await trio.lowlevel.checkpoint()

    client.flush = drop
    start = trio.current_time()
    await client.until(lambda: len(client.last_streams) == 2)
    assert trio.current_time() - start == pytest.approx(1.2, abs=0.2)
    client.flush = flush
    draining.go.set()
    await client.until(lambda: draining.request in client.ended)


async def test_a_client_that_ignores_goaway_does_not_hold_a_shutdown(autojump_clock, server):
    """It goes on sending requests; all are refused, and the server stops in time."""
    await server.tracker.update("a", progress=1)
    listener = await server.listen()
    client = await server.connect()
    await watch(client)
    server.app.admission.authenticate = None

    async def go_on() -> None:
        while True:
            try:
                await client.request("GET", STREAM)
                await client.request("GET", "/api/sessions/a/status?wait=30")
                await client.read()
            except (trio.BrokenResourceError, trio.ClosedResourceError, AssertionError):
                return
            await trio.sleep(0.05)

    server._nursery.start_soon(go_on)
    assert await listener.stop() <= 4


async def test_a_stream_that_stalls_does_not_hold_a_shutdown(autojump_clock, server):
    """Its client gets GOAWAY, and the connection ends with the drain."""
    await server.tracker.update("a", progress=1)
    listener = await server.listen()
    client = await server.connect()
    await close_window(client)
    for _ in range(3):
        await client.request("GET", STREAM)
    await wait_all_tasks_blocked()
    took = []
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            took.append(await listener.stop())

        nursery.start_soon(stop)
        while await client.read():
            pass
    assert took[0] <= 4
    assert client.last_streams[:2] == [LAST_STREAM, 5]


async def test_an_idle_connection_is_told_the_last_request(autojump_clock, server):
    """Once is enough: whatever the client has sent since is not served, which it can tell."""
    listener = await server.listen()
    client = await server.connect()
    number = await client.request("GET", "/health")
    await client.until(lambda: number in client.ended)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.stop)
        while await client.read():
            pass
        await client.stream.aclose()
    assert client.last_streams == [number]


async def test_a_goaway_of_the_client_during_a_drain(autojump_clock, server):
    """Both sides stop: its requests end, and the connection with them."""
    draining = Draining(server)
    client = await draining.begin()
    await client.stream.send_all(hyperframe.frame.GoAwayFrame(0).serialize())
    draining.go.set()
    await client.until(lambda: draining.request in client.ended)
    start = trio.current_time()
    while await client.read():
        pass
    await client.stream.aclose()
    await closed(server)
    assert trio.current_time() - start < 2
