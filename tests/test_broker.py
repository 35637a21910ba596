"""Live delivery: order, no loss, bounds, conflation, overflow, heartbeats; also with random programs."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
from hypothesis import event, given, settings
from hypothesis import strategies as st
from live_harness import LiveHarness, Watcher, encoding, run, socket_streams
from trio.testing import wait_all_tasks_blocked

from sseserve.config import Settings
from sseserve.dialects import Encoding, Message
from sseserve.dialects.sessions import SESSIONS
from sseserve.live import broker as broker_module
from sseserve.live import fanout
from sseserve.live.broker import Broker
from sseserve.live.fanout import FEW, MAX_AT_ONCE
from sseserve.live.pull_subscriber import PullSubscriber
from sseserve.live.push_subscriber import PushSubscriber
from sseserve.live.resume import deleted_message, join
from sseserve.live.subscriber import MAX_WRITE, EncodedEvents
from sseserve.live.transport import Transport
from sseserve.model import Event, Progress, State
from sseserve.progress.rules import Update
from sseserve.sse import Decoder

# Random programs of clients

BURSTS = ["t" * 30, "tts" * 8, "e" * 20, "ttttte" * 4]
client_kinds = st.lists(
    st.tuples(st.sampled_from(["socket", "stream", "pull"]), st.sampled_from(["sse", "ws"])),
    min_size=1,
    max_size=3,
)
program_steps = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sampled_from(BURSTS)),
        st.tuples(st.just("publish"), st.text("tttse", min_size=1, max_size=8)),
        st.tuples(st.sampled_from(["stall", "stall", "unstall", "disconnect", "join"]), st.integers(0, 2)),
        st.tuples(st.just("settle"), st.just(0)),
    ),
    min_size=10,
    max_size=40,
)


class ReconnectingClient:
    """A client of a random program: one connection after another, each with the cursor of the last."""

    def __init__(self, connection: str, protocol: str) -> None:
        self.connection, self.protocol = connection, protocol
        self.watchers: list[Watcher] = []

    @property
    def watcher(self) -> Watcher:
        return self.watchers[-1]

    def reconnect(self, harness: LiveHarness, nursery: trio.Nursery) -> None:
        """Open a new connection, with the cursor of the last one if there is one."""
        cursor = self.watcher.cursor if self.watchers else None
        self.watchers.append(Watcher(harness, "s", cursor, self.protocol, self.connection))
        nursery.start_soon(self.watcher.run)

    def check(self, log: list[Event]) -> int:
        """Compare everything received with the log; return the number of events conflated."""
        received_seqs: list[int] = []
        types = {entry.seq: entry.type for entry in log}
        for watcher in self.watchers:
            resumes = [message.data for message in watcher.received if message.event == "resume"]
            assert resumes == (
                [{"status": "ok", "missed": 0}] if watcher.initial_cursor and watcher.received else []
            )
            if watcher.initial_cursor is None:
                received_seqs = []  # the connection ended before it had a cursor
            # A snapshot replaces the event with its cursor.
            for message in watcher.events[watcher.initial_cursor is None :]:
                assert message.event == types[message.seq]
            received_seqs += watcher.seqs
        if not received_seqs:
            return 0
        assert received_seqs == sorted(set(received_seqs)), "repeated or out of order"
        conflated = 0
        for entry in log:
            if received_seqs[0] < entry.seq and entry.seq not in received_seqs:
                assert entry.conflatable, f"{entry} is not conflatable and was lost"
                assert any(later.progress and later.seq in received_seqs for later in log[entry.seq :])
                conflated += 1
        assert received_seqs[-1] == log[-1].seq
        return conflated


async def publish(harness: LiveHarness, kinds: str | list[str]) -> None:
    """Publish conflatable updates (t), other updates (s) and other events (e), without a pause."""
    for kind in kinds:
        session = await harness.memory.load("s")
        n = session.seq if session else 0
        if kind == "e":
            await harness.tracker.emit("s", "note", {"n": n, "pad": "x" * (n % 7) * 40})
        else:
            await harness.tracker.update(
                "s", progress=0, stage=f"stage {n}" if kind == "s" else None, message=f"message {n}"
            )


def assert_waiting_is_counted(broker: Broker) -> None:
    """What waits for clients that have been unsubscribed counts, too."""
    backlogs = [s.backlog for s in broker.subscribers() if s.has_backlog]
    waiting = broker.deliveries
    assert waiting.clients >= len(backlogs)
    assert waiting.events >= sum(events for events, _ in backlogs)
    assert waiting.size >= sum(size for _, size in backlogs)


async def program(
    kinds: list[tuple[str, str]], events: int, size: int, slow: bool, steps: list[tuple[str, Any]]
) -> None:
    clients = [ReconnectingClient(*kind) for kind in kinds]
    async with trio.open_nursery() as nursery:
        harness = LiveHarness(nursery, buffer_events=events, buffer_bytes=size)
        if slow:
            harness.slow_engine()
        await harness.tracker.create("s")
        for client in clients:
            client.reconnect(harness, nursery)
        for name, argument in steps:
            if name == "publish":
                await publish(harness, argument)
            elif name == "settle":
                await wait_all_tasks_blocked()
            else:
                client = clients[argument % len(clients)]
                if name != "join":
                    getattr(client.watcher, name)()
                elif client.watcher.ended:
                    client.reconnect(harness, nursery)
            counted = dict(harness.broker.watchers.most_watched())
            assert counted.get("s", 0) <= len(harness.broker.subscribers())
            assert sum(harness.broker.watchers.by_encoding.values()) == len(harness.broker.subscribers())
            for client in clients:
                if (subscriber := client.watcher.subscriber) is not None:
                    # A batch has at most MAX_BATCH events, and may be in the buffer alone, whatever its size.
                    assert subscriber.backlog[0] <= max(events, fanout.MAX_BATCH)
            assert_waiting_is_counted(harness.broker)
        # At the end every client reads, and reconnects each time it is disconnected.
        for client in clients:
            client.watcher.unstall()
        for _ in range(20):
            await wait_all_tasks_blocked()
            disconnected = [client for client in clients if client.watcher.ended]
            for client in disconnected:
                client.reconnect(harness, nursery)
            if not disconnected:
                break
        log = await harness.log("s")
        conflated = sum(client.check(log) for client in clients)
        statistics = harness.broker.statistics()
        event(f"cut {min(statistics.cut, 3)}")
        event(f"conflated {min(statistics.conflated, 3)}")
        event(f"connections {min(max(len(client.watchers) for client in clients), 5)}")
        assert conflated <= statistics.conflated
        for client in clients:
            for watcher in client.watchers:
                if "overflow" in watcher.names:
                    assert watcher.names[-1] == "overflow"
                assert not watcher.complete  # the session has not ended
        assert statistics.cut >= sum(
            watcher.names.count("overflow") for c in clients for watcher in c.watchers
        )
        for client in clients:
            client.watcher.disconnect()
        await wait_all_tasks_blocked()
        assert (harness.broker.statistics().topics, harness.broker.statistics().subscribers) == (0, 0)
        assert (harness.broker.watchers.by_encoding, [*harness.broker.watchers.most_watched()]) == ({}, [])
        waiting = harness.broker.deliveries
        assert (waiting.clients, waiting.events, waiting.size) == (0, 0, 0)
        assert not nursery.child_tasks


@settings(max_examples=250)
@given(
    kinds=client_kinds,
    events=st.integers(1, 12),
    size=st.integers(200, 4000),
    slice_=st.sampled_from([0.0, 1e9]),
    few=st.sampled_from([0, FEW]),
    slow=st.booleans(),
    steps=program_steps,
)
def test_random_clients_receive_the_log(kinds, events, size, slice_, few, slow, steps):
    """With random connects, stalls and disconnects: in order, no repeats, only superseded updates missing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fanout, "SLICE", slice_)
        patch.setattr(fanout, "FEW", few)
        run(program, kinds, events, size, slow, steps)


# The buffer of a subscriber

RUNNING = Progress(status="running", state=State.RUNNING)


def make_event(seq: int, kind: str, size: int = 0) -> Event:
    """A conflatable update (t), another update (s), or another event (e)."""
    if kind == "e":
        return Event(seq, "note", msgspec.Raw(b'"%s"' % (b"x" * size)), 0.0)
    progress = msgspec.structs.replace(RUNNING, message="x" * size)
    return Event(seq, "progress", progress, 0.0, () if kind == "t" else ("status",))


def make_encoded(first: int, kinds: str, size: int = 0) -> EncodedEvents:
    events = [make_event(seq, kind, size) for seq, kind in enumerate(kinds, first)]
    return EncodedEvents.encode(events, encoding("sse"), "s", "e")


def seqs(data: bytes) -> list[int]:
    """The ``seq`` of each event in an event stream."""
    return [int(event.id.rpartition("-")[2]) for event in Decoder().feed(data) if event.id]


def make_subscriber(nursery: trio.Nursery, **bounds: int) -> PullSubscriber:
    """A live subscriber that is not read, so that everything stays in its buffer."""
    broker = Broker(nursery, Settings(**bounds))
    subscriber = PullSubscriber(broker, encoding("sse"))
    broker.subscribe("s", subscriber)
    subscriber.live = True
    return subscriber


async def fill(events: int, size: int, frames: list[tuple[str, int]]) -> None:
    async with trio.open_nursery() as nursery:
        subscriber = make_subscriber(nursery, buffer_events=events, buffer_bytes=size)
        seq, log = 1, []
        for kinds, length in frames:
            frame = make_encoded(seq, kinds, length)
            empty = subscriber.backlog == (0, 0)
            single = subscriber.backlog[0] == 1
            subscriber.offer(frame)
            log += frame.events
            seq += len(kinds)
            if subscriber.ending:
                break
            waiting = subscriber.backlog
            alone = (empty, waiting) == (True, (len(kinds), len(frame.data))) or waiting[0] == 1
            assert alone or (waiting[0] <= events and waiting[1] <= size), single
        if subscriber.ending:
            event("cut")
            assert b"overflow" in subscriber._dequeue()
            assert subscriber.broker.statistics().cut == 1
            return
        received = seqs(await subscriber.receive() if log else b"")
        dropped = [entry for entry in log if entry.seq not in received]
        event(f"dropped {min(len(dropped), 3)}")
        assert received == sorted(received)
        assert subscriber.broker.conflated == len(dropped)
        for entry in dropped:
            assert entry.conflatable
            assert any(later.progress and later.seq in received for later in log if later.seq > entry.seq)


@settings(max_examples=200)
@given(
    st.integers(1, 40),
    st.integers(100, 5000),
    st.lists(st.tuples(st.text("ttttse", min_size=1, max_size=10), st.integers(0, 300)), max_size=20),
)
def test_buffer_is_bounded(events, size, frames):
    """Except for a single larger frame; only superseded conflatable events are dropped, and are counted."""
    run(fill, events, size, frames)


async def test_conflatable_updates_are_superseded(nursery):
    """A slow client of many conflatable updates gets the newest and is not disconnected."""
    subscriber = make_subscriber(nursery, buffer_events=10)
    for seq in range(1, 1001):
        subscriber.offer(make_encoded(seq, "t"))
    assert not subscriber.ending
    received = seqs(await subscriber.receive())
    assert received[-1] == 1000
    assert subscriber.broker.conflated == 1000 - len(received)


@pytest.mark.parametrize(("events", "size"), [(1, 10_000), (100, 400)])
async def test_buffer_for_a_single_event(nursery, events, size):
    """It is enough for conflatable updates, whatever their size."""
    subscriber = make_subscriber(nursery, buffer_events=events, buffer_bytes=size)
    for seq in range(1, 20):
        subscriber.offer(make_encoded(seq, "t", 300))
        assert subscriber.backlog[0] == 1
    assert seqs(await subscriber.receive()) == [19]


async def test_only_progress_supersedes_progress(nursery):
    """A conflatable update is not dropped because of another event after it."""
    subscriber = make_subscriber(nursery, buffer_events=8)
    for seq, kind in enumerate("teetetse", 1):
        subscriber.offer(make_encoded(seq, kind))
    subscriber.offer(make_encoded(9, "e"))
    assert seqs(await subscriber.receive()) == [2, 3, 5, 7, 8, 9]


async def test_large_data_is_superseded_by_data_only(nursery):
    """An update that brings large data is not dropped for progress without data, which does not repeat it."""

    def offer(seq: int, data: bytes | None) -> None:
        progress = RUNNING if data is None else msgspec.structs.replace(RUNNING, data=msgspec.Raw(data))
        event = Event(seq, "progress", progress, 0.0, () if data is None else ("data",))
        subscriber.offer(EncodedEvents.encode([event], encoding("sse"), "s", "e"))

    subscriber = make_subscriber(nursery, buffer_events=8)
    for seq in range(1, 10):
        offer(seq, b"[%d]" % seq if seq in (2, 5) else None)
    assert seqs(await subscriber.receive()) == [5, 9]


async def test_other_events_are_never_dropped(nursery):
    """A client too slow for them gets an overflow event with the reason and is disconnected."""
    subscriber = make_subscriber(nursery, buffer_events=10)
    for seq in range(1, 11):
        subscriber.offer(make_encoded(seq, "s"))
    assert (subscriber.backlog[0], subscriber.ending) == (10, False)
    subscriber.offer(make_encoded(11, "s"))
    assert subscriber.ending
    (last,) = Decoder().feed(await subscriber.receive())
    assert (last.event, last.id) == ("overflow", "")
    assert "resume with your cursor" in msgspec.json.decode(last.data)["reason"]
    assert await subscriber.receive() == b""
    assert subscriber.broker.statistics().subscribers == 0


async def test_single_frame_above_the_bounds(nursery):
    """A batch that exceeds the bounds by itself reaches a client with an empty buffer."""
    subscriber = make_subscriber(nursery, buffer_events=2, buffer_bytes=100)
    subscriber.offer(make_encoded(1, "eeeee", 500))
    assert subscriber.backlog[0] == 5
    assert seqs(await subscriber.receive()) == [1, 2, 3, 4, 5]


async def test_overflow_keeps_what_was_written(nursery):
    """An overflow drops live events, but not the response head and the resume event."""
    subscriber = make_subscriber(nursery, buffer_events=2)
    subscriber.write(b"event: resume\ndata: 1\n\n")
    for seq in range(1, 5):
        subscriber.offer(make_encoded(seq, "e"))
    names = [event.event for event in Decoder().feed(await subscriber.receive())]
    assert names == ["resume", "overflow"]


async def test_nothing_is_accepted_after_the_end(nursery):
    """Events, heartbeats and a second end are ignored."""
    subscriber = make_subscriber(nursery)
    subscriber.end(b"one\n")
    subscriber.end(b"two\n")
    subscriber.offer(make_encoded(1, "e"))
    subscriber.write(b"three\n")
    assert not subscriber.send_heartbeat(b"four\n")
    assert await subscriber.receive() == b"one\n"
    assert await subscriber.receive() == b""


async def test_writes_are_joined_up_to_a_limit(nursery):
    """Many small frames become one write of at most MAX_WRITE bytes."""
    subscriber = make_subscriber(nursery, buffer_events=10_000, buffer_bytes=10**7)
    for seq in range(1, 1001):
        subscriber.offer(make_encoded(seq, "e", 200))
    sizes = []
    received: list[int] = []
    while subscriber.backlog[0]:
        data = await subscriber.receive()
        sizes.append(len(data))
        received += seqs(data)
    assert received == list(range(1, 1001))
    assert max(sizes) <= MAX_WRITE
    assert min(sizes[:-1]) > MAX_WRITE - 500


async def test_overflow_with_a_full_socket(nursery, autojump_clock):
    """The overflow event follows the complete frame that was partly sent; a WebSocket is then closed."""
    harness = LiveHarness(nursery, buffer_events=5)
    await harness.tracker.create("s")
    watchers = {protocol: await harness.watch(protocol=protocol, stalled=True) for protocol in ("sse", "ws")}
    for number in range(300):
        await harness.tracker.emit("s", "note", "x" * 300)
        if number % 4 == 0:
            await wait_all_tasks_blocked()
    for watcher in watchers.values():
        assert watcher.subscriber.ending
        watcher.unstall()
    await wait_all_tasks_blocked()
    for watcher in watchers.values():
        assert watcher.ended
        assert watcher.names[-1] == "overflow"
        assert not watcher.complete
        assert watcher.seqs == list(range(1, len(watcher.seqs) + 1))
    closed = watchers["ws"].reader.closed
    assert (closed.code, closed.reason) == (1013, "too slow")
    assert harness.broker.statistics().cut == 2


async def test_client_that_does_not_read_is_disconnected(nursery, autojump_clock):
    """After send_timeout its task ends and its buffer is freed."""
    harness = LiveHarness(nursery, send_timeout=5)
    await harness.tracker.create("s")
    watcher = await harness.watch(stalled=True)
    while not watcher.subscriber.backlog[0]:
        await harness.tracker.emit("s", "note", "x" * 500)
        await wait_all_tasks_blocked()
    started = trio.current_time()
    while harness.broker.statistics().subscribers:
        await trio.sleep(0.1)
    assert 4 < trio.current_time() - started < 5.2
    assert watcher.subscriber.backlog == (0, 0)
    assert watcher.subscriber.broken


async def test_write_detects_a_closed_connection(nursery):
    """The client's connection task ends and its topic is removed."""
    broker = Broker(nursery, Settings())
    server, client = socket_streams()
    async with trio.open_nursery() as connection:
        subscriber = PushSubscriber(broker, encoding(), Transport(server), connection)
        broker.subscribe("s", subscriber)
        subscriber.live = True
        await client.aclose()
        subscriber.offer(make_encoded(1, "e"))
        assert subscriber.broken
        await trio.sleep_forever()
    assert broker.statistics().topics == 0
    await server.aclose()


# Topics and tasks


async def test_idle_sessions_have_no_task(nursery):
    """The broker's tasks end when their work is done; only each client's own task remains."""
    harness = LiveHarness(nursery)
    for number in range(20):
        await harness.tracker.create(f"s{number}")
        for _ in range(1 if number < 10 else FEW + 1):
            await harness.watch(f"s{number}", connection="pull")
    quiet = len(nursery.child_tasks)
    for number in range(20):
        await harness.tracker.emit(f"s{number}", "note")
    assert len(nursery.child_tasks) == quiet + 10  # a pump where many watch
    await wait_all_tasks_blocked()
    assert len(nursery.child_tasks) == quiet == 10 + 10 * (FEW + 1)


async def test_few_watchers_get_events_without_a_task(nursery):
    """But not many events in a row, which may be those that an engine has stored together."""
    harness = LiveHarness(nursery)
    sessions = [f"s{number}" for number in range(2 * MAX_AT_ONCE)]
    for session_id in sessions:
        await harness.tracker.create(session_id)
        await harness.watch(session_id, connection="pull")
    quiet = len(nursery.child_tasks)
    for session_id in sessions:
        await harness.tracker.emit(session_id, "note")
    assert len(nursery.child_tasks) == quiet + MAX_AT_ONCE
    assert harness.broker.statistics().delivered == MAX_AT_ONCE
    await wait_all_tasks_blocked()
    assert harness.broker.statistics().delivered == 2 * MAX_AT_ONCE
    await harness.tracker.emit("s0", "note")
    assert len(nursery.child_tasks) == quiet


async def test_few_watchers_are_left_while_a_task_delivers(nursery, monkeypatch):
    """What is published then does not overtake what the task has not delivered yet."""
    monkeypatch.setattr(fanout, "SLICE", 0.0)
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    # Nobody reads, so that everything stays in their buffers.
    subscribers = [PullSubscriber(harness.broker, encoding("sse")) for _ in range(40)]
    for subscriber in subscribers:
        harness.broker.subscribe("s", subscriber)
        subscriber.live = True
    await harness.tracker.emit("s", "note")
    while not subscribers[0].has_backlog:
        await trio.lowlevel.checkpoint()
    assert not subscribers[-1].has_backlog
    for subscriber in subscribers[:-1]:
        subscriber.abort()
    await harness.tracker.emit("s", "note")
    await wait_all_tasks_blocked()
    assert seqs(subscribers[-1]._dequeue()) == [2, 3]


@given(publishes=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=3 * MAX_AT_ONCE))
def test_order_with_and_without_a_task(publishes):
    """A topic whose pump has not run yet gets what follows through its pump."""

    async def publish() -> None:
        async with trio.open_nursery() as nursery:
            harness = LiveHarness(nursery)
            watchers = []
            for session_id in ("s0", "s1", "s2", "s3"):
                await harness.tracker.create(session_id)
                watchers.append(await harness.watch(session_id, connection="pull"))
            expected = [[1] for _ in watchers]  # the snapshot
            for session, waits in publishes:
                await harness.tracker.emit(f"s{session}", "note")
                expected[session].append(len(expected[session]) + 1)
                if waits:
                    await wait_all_tasks_blocked()
            await wait_all_tasks_blocked()
            assert [[message.seq for message in watcher.received] for watcher in watchers] == expected
            nursery.cancel_scope.cancel()

    run(publish)


async def test_unwatched_topics_are_removed(nursery, autojump_clock):
    """A topic exists only while a session is watched or polled; publishing does not create one."""
    harness = LiveHarness(nursery)
    await harness.tracker.emit("s", "note")
    assert not harness.broker.is_watched("s")
    watcher = await harness.watch()
    assert harness.broker.is_watched("s")
    watcher.disconnect()
    await wait_all_tasks_blocked()
    assert not harness.broker.is_watched("s")
    with harness.broker.wakeup("s"):
        assert harness.broker.is_watched("s")
    assert not harness.broker.is_watched("s")
    assert not nursery.child_tasks
    assert not any(harness.broker.heartbeats._wheel)


async def test_topic_is_removed_after_its_pump(nursery):
    """When the last watcher leaves while events are being delivered, the topic is removed afterwards."""
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    watchers = [await harness.watch(connection="pull") for _ in range(FEW + 1)]
    await harness.tracker.emit("s", "note")
    for watcher in watchers:
        watcher.subscriber.abort()
    assert harness.broker.is_watched("s")
    await wait_all_tasks_blocked()
    assert not harness.broker.is_watched("s")


async def test_another_attempt_wakes_those_who_wait(nursery):
    """They wait at the topic of the attempt before."""
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    with harness.broker.wakeup("s"):
        await harness.tracker.update("s", status="failed")
        with harness.broker.wakeup("s") as wakeup:
            await harness.tracker.apply("s", Update(progress=1, retries_failure=True))
            assert wakeup.is_set()
    await wait_all_tasks_blocked()
    assert not harness.broker.is_watched("s")


async def test_deletion_wakes_waiting_publishers(nursery, monkeypatch):
    """Publishers that wait for capacity continue when the session is deleted."""
    monkeypatch.setattr(broker_module, "MAX_BACKLOG", 2)
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    await harness.watch()
    for _ in range(5):
        await harness.tracker.emit("s", "note")
    async with trio.open_nursery() as publishers:
        publishers.start_soon(harness.broker.wait_for_capacity, "s")
        publishers.start_soon(harness.broker.wait_for_capacity, "s")
        await harness.delete("s")
    assert not harness.broker.is_watched("s")


async def test_batch_is_encoded_once(nursery):
    """Events that have accumulated are one batch, and all clients of an encoding share its bytes."""
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    rendered: list[int] = []

    def render(session_id: str, entry: Event) -> list[Message]:
        rendered.append(entry.seq)
        return SESSIONS.render(session_id, entry)

    dialect = msgspec.structs.replace(SESSIONS, render=render)
    watchers = [await harness.watch(connection="pull", dialect=dialect) for _ in range(5)]
    rendered.clear()
    before = harness.broker.statistics()
    for _ in range(10):
        await harness.tracker.emit("s", "note")
    await wait_all_tasks_blocked()
    after = harness.broker.statistics()
    assert rendered == list(range(2, 12))
    assert (after.batches - before.batches, after.delivered - before.delivered) == (1, 50)
    assert all(watcher.seqs == list(range(1, 12)) for watcher in watchers)


async def test_batch_is_bounded(nursery):
    """In events and roughly in bytes, so that one large batch does not delay others for long."""
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    for _ in range(FEW + 1):
        await harness.watch(connection="pull")
    for size, batches in [(1, 4), (10_000, 125)]:
        before = harness.broker.statistics().batches
        for _ in range(500):
            await harness.tracker.emit("s", "note", "x" * size)
        await wait_all_tasks_blocked()
        assert harness.broker.statistics().batches - before == batches


async def test_fan_out_yields_to_other_tasks(nursery, monkeypatch):
    """It yields every SLICE seconds, so that a large topic does not block the others."""
    monkeypatch.setattr(fanout, "SLICE", 0.0)
    harness = LiveHarness(nursery)
    await harness.tracker.create("big")
    await harness.tracker.create("small")
    big = [await harness.watch("big", connection="pull") for _ in range(64)]
    small = await harness.watch("small", connection="pull")
    served = []

    async def count_served() -> None:
        while sum(one.subscriber.backlog[0] or len(one.received) > 1 for one in big) < 64:
            served.append(sum(one.subscriber.backlog[0] or len(one.received) > 1 for one in big))
            await trio.lowlevel.checkpoint()

    nursery.start_soon(count_served)
    await harness.tracker.emit("big", "note")
    await harness.tracker.emit("small", "note")
    await wait_all_tasks_blocked()
    assert any(0 < number < 64 for number in served)
    assert small.names[-1] == "note"


async def test_joining_and_leaving_during_fan_out(nursery, monkeypatch):
    """A client that leaves gets nothing more; one that joins gets the event once, from the log."""
    monkeypatch.setattr(fanout, "SLICE", 0.0)
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    watchers = [await harness.watch(connection="pull") for _ in range(48)]
    await harness.tracker.emit("s", "note")
    while harness.broker._topics["s"].position < 2:
        await trio.lowlevel.checkpoint()
    last = watchers[-1].subscriber
    assert last.backlog == (0, 0)
    last.abort()
    late = await harness.watch(connection="pull")
    await wait_all_tasks_blocked()
    assert (last.backlog, watchers[-1].seqs) == ((0, 0), [1])
    assert late.seqs == [2]
    assert all(watcher.seqs == [1, 2] for watcher in watchers[:-1])


async def test_slow_clients_do_not_delay_others(nursery):
    """Beside 50 stalled clients a fast one gets every event before the next one is published."""
    harness = LiveHarness(nursery, buffer_events=8)
    await harness.tracker.create("s")
    for number in range(50):
        await harness.watch(connection=("socket", "stream", "pull")[number % 3], stalled=True)
    good = await harness.watch()
    for number in range(60):
        await harness.tracker.emit("s", "note", "x" * 300)
        await wait_all_tasks_blocked()
        assert good.seqs[-1] == number + 2
    assert harness.broker.statistics().cut == 50


class CountingTask:
    """Counts how often another task runs."""

    def __init__(self, nursery):
        self.count = 0
        nursery.start_soon(self._run)

    async def _run(self):
        while True:
            await trio.lowlevel.checkpoint()
            self.count += 1


@pytest.mark.parametrize("cause", ["deletion", "failed fan-out"])
async def test_ending_many_watchers_yields_to_other_tasks(cause, monkeypatch):
    """Thousands of watchers are ended in steps of 64."""
    async with trio.open_nursery() as nursery:
        harness = LiveHarness(nursery)
        await harness.tracker.create("s")
        subscribers = [PullSubscriber(harness.broker, encoding()) for _ in range(1000)]
        for subscriber in subscribers:
            await join(harness.engine, harness.broker, subscriber, "s", None)
        ended = []
        monkeypatch.setattr(PullSubscriber, "_end", lambda self, *_, **__: ended.append(other.count))
        other = CountingTask(nursery)
        if cause == "deletion":
            harness.broker.close("s", deleted_message())
        else:
            monkeypatch.setattr(fanout.EncodedEvents, "encode", None)
            await harness.tracker.emit("s", "note")
        while len(ended) < 1000:
            await trio.lowlevel.checkpoint()
        assert max(ended.count(count) for count in set(ended)) <= 2 * 64
        nursery.cancel_scope.cancel()


async def test_joining_a_session_that_is_deleted(nursery):
    """A watcher that reads the log while the session is deleted and created again gets the old one's end."""
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")

    async def read(*arguments):
        monkey.undo()
        await harness.delete("s")
        await harness.tracker.create("s")
        return await harness.engine.read(*arguments)

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(harness.engine, "read", read)
        watcher = await harness.watch()
        await wait_all_tasks_blocked()
    assert (watcher.names, watcher.ended) == (["deleted"], True)


async def test_failed_fan_out_affects_only_its_topic(nursery, caplog):
    """It is logged and its watchers are disconnected and can resume; other sessions are not affected."""
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    await harness.tracker.create("t")

    def render(session_id: str, entry: Event) -> list[Message]:
        if entry.type == "bad":
            raise RuntimeError("a dialect's bug")
        return SESSIONS.render(session_id, entry)

    broken = await harness.watch(dialect=msgspec.structs.replace(SESSIONS, render=render))
    other = await harness.watch("t")
    await harness.tracker.emit("s", "bad")
    await harness.tracker.emit("t", "note")
    await wait_all_tasks_blocked()
    assert (broken.names[-1], broken.ended) == ("overflow", True)
    assert other.names[-1] == "note"
    assert "a dialect's bug" in caplog.text
    again = await harness.watch(cursor=broken.cursor)
    await harness.tracker.emit("s", "note")
    await wait_all_tasks_blocked()
    assert again.seqs == [2, 3]


# Throttles


async def test_throttle_drops_conflatable_updates(nursery, autojump_clock):
    """The first update at once, then one per throttle time, the last one always; other events at once."""
    harness = LiveHarness(nursery)
    await harness.tracker.update("s", progress=0)
    dialect = msgspec.structs.replace(SESSIONS, throttle=1.0)
    watcher = await harness.watch(dialect=dialect)
    arrived = []
    for number in range(25):
        await harness.tracker.update("s", progress=number)
        if number == 12:
            await harness.tracker.emit("s", "note")
        await wait_all_tasks_blocked()
        arrived.append((round(trio.current_time(), 1), watcher.names[-1], watcher.seqs[-1]))
        await trio.sleep(0.1)
    at = {seq: (time, name) for time, name, seq in reversed(arrived)}
    assert at[2] == (0.0, "progress")
    assert at[15] == (1.2, "note")
    assert 14 in watcher.seqs  # the conflatable update before the note
    await trio.sleep(5)
    log = await harness.log("s")
    assert watcher.seqs[-1] == log[-1].seq
    assert watcher.seqs == sorted(set(watcher.seqs))
    assert len(watcher.seqs) <= 8
    assert harness.broker.statistics().conflated == len(log) - len(watcher.seqs)


async def test_throttle_does_not_delay_the_end(nursery, autojump_clock):
    """The terminal event is sent at once, and nothing after it."""
    harness = LiveHarness(nursery)
    await harness.tracker.update("s", progress=0)
    watcher = await harness.watch(dialect=msgspec.structs.replace(SESSIONS, throttle=10.0))
    for number in range(5):
        await harness.tracker.update("s", progress=number)
    await harness.tracker.update("s", status="done")
    await wait_all_tasks_blocked()
    assert trio.current_time() == 0
    assert watcher.ended
    assert watcher.names[-1] == "complete"
    await trio.sleep(20)
    assert not nursery.child_tasks


# Heartbeats


async def start_watchers(
    nursery: trio.Nursery, *protocols: str, **fields: Any
) -> tuple[LiveHarness, list[Watcher]]:
    harness = LiveHarness(nursery, **fields)
    nursery.start_soon(harness.broker.heartbeats.run)
    await harness.tracker.create("s")
    return harness, [await harness.watch(protocol=protocol) for protocol in protocols]


@pytest.mark.parametrize("interval", [2, 5, 15, 30, 60, 200])
async def test_idle_stream_gets_heartbeats(nursery, autojump_clock, interval):
    """At least one per interval and not many more; for comments and pings alike."""
    await trio.sleep(0.37)
    harness, watchers = await start_watchers(nursery, "sse", "ws", heartbeat=interval)
    last = [trio.current_time()] * 2
    counts = [0, 0]
    until = trio.current_time() + interval * 10
    while trio.current_time() < until:
        await trio.sleep(0.25)
        for number, watcher in enumerate(watchers):
            if watcher.reader.heartbeats > counts[number]:
                assert watcher.reader.heartbeats == counts[number] + 1
                counts[number] += 1
                last[number] = trio.current_time()
            assert trio.current_time() - last[number] <= interval
    assert all(9 <= count <= 10 / 0.5 for count in counts)
    assert harness.broker.statistics().heartbeats == sum(counts)


async def test_busy_stream_gets_no_heartbeats(nursery, autojump_clock):
    """Events keep the connection in use as well."""
    harness, (watcher,) = await start_watchers(nursery, "sse", heartbeat=10)
    for _ in range(30):
        await trio.sleep(4)
        await harness.tracker.emit("s", "note")
    assert watcher.reader.heartbeats == 0


async def test_stalled_stream_gets_no_heartbeats(nursery, autojump_clock):
    """While data waits to be sent, no heartbeats are added to the buffer."""
    harness, _ = await start_watchers(nursery, heartbeat=10, send_timeout=1000)
    pull = await harness.watch(connection="pull", stalled=True)
    await trio.sleep(100)
    assert pull.subscriber.backlog[0] == 1


async def test_heartbeats_are_spread(nursery, autojump_clock):
    """The heartbeats of clients that connected at the same time are spread over the interval."""
    harness, _ = await start_watchers(nursery, heartbeat=60)
    watchers = [await harness.watch(connection="pull") for _ in range(60)]
    totals: dict[int, int] = {}
    for second in range(61):
        count = sum(watcher.reader.heartbeats for watcher in watchers)
        totals[second] = count
        await trio.sleep(1)
    steps = [totals[at + 1] - totals[at] for at in range(60)]
    assert sum(steps) == 60
    assert max(steps) <= 30
    assert sum(step > 0 for step in steps) >= 4


async def test_failed_heartbeat_affects_only_its_stream(nursery, autojump_clock, caplog, monkeypatch):
    """It is logged, its stream is cut with a reason, and the other streams get their heartbeats."""
    broken = msgspec.structs.replace(SESSIONS, name="broken")
    heartbeat = Encoding.heartbeat

    def fail(encoding, at):
        if encoding.dialect is broken:
            raise RuntimeError("a dialect's bug")
        return heartbeat(encoding, at)

    monkeypatch.setattr(Encoding, "heartbeat", fail)
    harness, _ = await start_watchers(nursery, heartbeat=5)
    cut = [await harness.watch(dialect=broken) for _ in range(10)]
    kept = [await harness.watch() for _ in range(10)]
    await trio.sleep(12)
    assert all(watcher.ended and watcher.names[-1] == "overflow" for watcher in cut)
    assert all(watcher.reader.heartbeats >= 2 for watcher in kept)
    assert caplog.text.count("a dialect's bug") >= 10


async def test_heartbeats_go_on_where_they_were(nursery, autojump_clock):
    """The task that sends them may end and be started again: no stream is left out."""
    harness = LiveHarness(nursery, heartbeat=5)
    await harness.tracker.create("s")
    watchers = [await harness.watch() for _ in range(20)]
    for _ in range(8):
        with trio.move_on_after(2.5):
            await harness.broker.heartbeats.run()
        await trio.sleep(2)
    assert all(watcher.reader.heartbeats >= 5 for watcher in watchers)


async def test_no_heartbeat_after_disconnect(nursery, autojump_clock):
    """A client that has disconnected is removed from the timer wheel."""
    harness, (watcher,) = await start_watchers(nursery, "sse", heartbeat=5)
    watcher.disconnect()
    await wait_all_tasks_blocked()
    assert not any(harness.broker.heartbeats._wheel)
    await trio.sleep(20)
    assert harness.broker.statistics().heartbeats == 0


async def test_heartbeat_interval_of_the_dialect(nursery, autojump_clock):
    """Without a setting the interval is the dialect's, 15 s for sessions."""
    _, (watcher,) = await start_watchers(nursery, "sse")
    await trio.sleep(10)
    assert watcher.reader.heartbeats == 0
    await trio.sleep(5)
    assert watcher.reader.heartbeats == 1


async def test_stream_age_is_limited(nursery, autojump_clock):
    """A stream ends with a retry time at its maximum age, or after the idle timeout without events."""
    harness = LiveHarness(nursery)
    nursery.start_soon(harness.broker.heartbeats.run)
    await harness.tracker.create("s")
    old = await harness.watch(dialect=msgspec.structs.replace(SESSIONS, max_age=60.0))
    idle = await harness.watch(dialect=msgspec.structs.replace(SESSIONS, idle_timeout=40.0))
    for _ in range(3):
        await trio.sleep(18)
        await harness.tracker.emit("s", "note")
        assert not old.ended
        assert not idle.ended
    await trio.sleep(18)
    assert (old.ended, idle.ended) == (True, False)
    assert b"retry: 1000\n" in old.raw
    await trio.sleep(24)
    assert idle.ended


async def test_statistics(nursery):
    """A frozen record of the current values."""
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    await harness.watch(connection="pull")
    await harness.tracker.emit("s", "note")
    statistics = harness.broker.statistics()
    assert (statistics.topics, statistics.subscribers, statistics.delivered) == (1, 1, 1)
    assert "1 subscribers" in repr(harness.broker._topics["s"])
    assert "live=True" in repr(harness.broker.subscribers()[0])
