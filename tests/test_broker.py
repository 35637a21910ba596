"""The live side: order, no loss, bounds, conflation, cuts, heartbeats; by programs of random clients."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
from hypothesis import event, given, settings
from hypothesis import strategies as st
from live_harness import HEAD, LiveHarness, Watcher, encoding, run, socket_streams
from trio.testing import wait_all_tasks_blocked

from sseserve.config import Settings
from sseserve.dialects import Message
from sseserve.dialects.sessions import SESSIONS
from sseserve.live import broker as broker_module
from sseserve.live.broker import Broker
from sseserve.live.subscriber import MAX_WRITE, Frame, PullSubscriber, PushSubscriber
from sseserve.live.transport import Transport
from sseserve.model import Event, Progress, State
from sseserve.sse import Decoder

# Programs of random clients

BURSTS = ["t" * 30, "tts" * 8, "e" * 20, "ttttte" * 4]
clients_of = st.lists(
    st.tuples(st.sampled_from(["socket", "stream", "pull"]), st.sampled_from(["sse", "ws"])),
    min_size=1,
    max_size=3,
)
steps_of = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sampled_from(BURSTS)),
        st.tuples(st.just("publish"), st.text("tttse", min_size=1, max_size=8)),
        st.tuples(st.sampled_from(["stall", "stall", "unstall", "disconnect", "join"]), st.integers(0, 2)),
        st.tuples(st.just("settle"), st.just(0)),
    ),
    min_size=10,
    max_size=40,
)


class Client:
    """A client of a random program: connections one after another, and what all of them have seen."""

    def __init__(self, connection: str, protocol: str) -> None:
        self.connection, self.protocol = connection, protocol
        self.lives: list[Watcher] = []

    @property
    def now(self) -> Watcher:
        return self.lives[-1]

    def come_back(self, harness: LiveHarness, nursery: trio.Nursery) -> None:
        """Open a connection, with the cursor of the last one if there is any."""
        cursor = self.now.cursor if self.lives else None
        self.lives.append(Watcher(harness, "s", cursor, self.protocol, self.connection))
        nursery.start_soon(self.now.run)

    def check(self, log: list[Event]) -> int:
        """Hold all that was seen against the log; returns how many ticks were conflated away."""
        seen: list[int] = []
        types = {entry.seq: entry.type for entry in log}
        for life in self.lives:
            verdicts = [message.data for message in life.received if message.event == "resume"]
            assert verdicts == (
                [{"status": "ok", "missed": 0}] if life.initial_cursor and life.received else []
            )
            if life.initial_cursor is None:
                seen = []  # never got far enough to have a cursor
            # A snapshot stands for the event that it is as new as.
            for message in life.events[life.initial_cursor is None :]:
                assert message.event == types[message.seq]
            seen += life.seqs
        if not seen:
            return 0
        assert seen == sorted(set(seen)), "doubled or out of order"
        conflated = 0
        for entry in log:
            if seen[0] < entry.seq and entry.seq not in seen:
                assert entry.conflatable, f"{entry} is no tick, and lost"
                assert any(later.progress and later.seq in seen for later in log[entry.seq :])
                conflated += 1
        assert seen[-1] == log[-1].seq
        return conflated


async def publish(harness: LiveHarness, kinds: str | list[str]) -> None:
    """Publish ticks (t), progress that is none (s), and other events (e), without a pause."""
    for kind in kinds:
        session = await harness.memory.load("s")
        n = session.seq if session else 0
        if kind == "e":
            await harness.tracker.emit("s", "note", {"n": n, "pad": "x" * (n % 7) * 40})
        else:
            await harness.tracker.update(
                "s", progress=0, stage=f"stage {n}" if kind == "s" else None, message=f"message {n}"
            )


async def program(
    kinds: list[tuple[str, str]], events: int, size: int, slow: bool, steps: list[tuple[str, Any]]
) -> None:
    clients = [Client(*kind) for kind in kinds]
    async with trio.open_nursery() as nursery:
        harness = LiveHarness(nursery, buffer_events=events, buffer_bytes=size)
        if slow:
            harness.slow_engine()
        await harness.tracker.create("s")
        for client in clients:
            client.come_back(harness, nursery)
        for name, argument in steps:
            if name == "publish":
                await publish(harness, argument)
            elif name == "settle":
                await wait_all_tasks_blocked()
            else:
                client = clients[argument % len(clients)]
                if name != "join":
                    getattr(client.now, name)()
                elif client.now.ended:
                    client.come_back(harness, nursery)
            for client in clients:
                if (subscriber := client.now.subscriber) is not None:
                    # 128 events are the longest batch, hence the biggest frame that may wait alone.
                    assert subscriber.backlog[0] <= max(events, broker_module.MAX_BATCH)
        # In the end everybody reads, and comes back as often as it is cut.
        for client in clients:
            client.now.unstall()
        for _ in range(20):
            await wait_all_tasks_blocked()
            gone = [client for client in clients if client.now.ended]
            for client in gone:
                client.come_back(harness, nursery)
            if not gone:
                break
        log = await harness.log("s")
        conflated = sum(client.check(log) for client in clients)
        statistics = harness.broker.statistics()
        event(f"cut {min(statistics.cut, 3)}")
        event(f"conflated {min(statistics.conflated, 3)}")
        event(f"lives {min(max(len(client.lives) for client in clients), 5)}")
        assert conflated <= statistics.conflated
        for client in clients:
            for life in client.lives:
                if "overflow" in life.names:
                    assert life.names[-1] == "overflow"
                if client.protocol == "sse" and life.raw:
                    assert life.raw.startswith(HEAD)
        assert statistics.cut >= sum(life.names.count("overflow") for c in clients for life in c.lives)
        for client in clients:
            client.now.disconnect()
        await wait_all_tasks_blocked()
        assert (harness.broker.statistics().topics, harness.broker.statistics().subscribers) == (0, 0)
        assert not nursery.child_tasks


@settings(max_examples=250, deadline=None)
@given(
    kinds=clients_of,
    events=st.integers(1, 12),
    size=st.integers(200, 4000),
    slice_=st.sampled_from([0.0, 1e9]),
    slow=st.booleans(),
    steps=steps_of,
)
def test_every_client_ends_with_exactly_the_log(kinds, events, size, slice_, slow, steps):
    """Whoever joins, stalls, leaves, resumes: in order, nothing twice, nothing lost but superseded ticks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(broker_module, "SLICE", slice_)
        run(program, kinds, events, size, slow, steps)


# One buffer

RUNNING = Progress(status="running", state=State.RUNNING)


def an_event(seq: int, kind: str, size: int = 0) -> Event:
    """A tick (t), progress that is none (s), or another event (e)."""
    if kind == "e":
        return Event(seq, "note", msgspec.Raw(b'"%s"' % (b"x" * size)), 0.0)
    progress = msgspec.structs.replace(RUNNING, message="x" * size)
    return Event(seq, "progress", progress, 0.0, () if kind == "t" else ("status",))


def a_frame(first: int, kinds: str, size: int = 0) -> Frame:
    events = [an_event(seq, kind, size) for seq, kind in enumerate(kinds, first)]
    return Frame.encode(events, encoding("sse"), "s", "e")


def seqs(data: bytes) -> list[int]:
    """The ``seq`` of each event that a client reads."""
    return [int(event.id.rpartition("-")[2]) for event in Decoder().feed(data) if event.id]


def a_buffer(nursery: trio.Nursery, **bounds: int) -> PullSubscriber:
    """A live subscriber without a reader, so that everything waits."""
    broker = Broker(nursery, Settings(**bounds))
    subscriber = PullSubscriber(broker, encoding("sse"))
    broker.subscribe("s", subscriber)
    subscriber.live = True
    return subscriber


async def fill(events: int, size: int, frames: list[tuple[str, int]]) -> None:
    async with trio.open_nursery() as nursery:
        subscriber = a_buffer(nursery, buffer_events=events, buffer_bytes=size)
        seq, log = 1, []
        for kinds, length in frames:
            frame = a_frame(seq, kinds, length)
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
        got = seqs(await subscriber.receive() if log else b"")
        dropped = [entry for entry in log if entry.seq not in got]
        event(f"dropped {min(len(dropped), 3)}")
        assert got == sorted(got)
        assert subscriber.broker.conflated == len(dropped)
        for entry in dropped:
            assert entry.conflatable
            assert any(later.progress and later.seq in got for later in log if later.seq > entry.seq)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(100, 5000),
    st.lists(st.tuples(st.text("ttttse", min_size=1, max_size=10), st.integers(0, 300)), max_size=20),
)
def test_what_waits_is_within_its_bounds(events, size, frames):
    """But for one frame that is larger by itself; only superseded ticks are dropped, and counted."""
    run(fill, events, size, frames)


async def test_ticks_give_way(nursery):
    """A slow client of a flood of ticks gets the newest, and is not cut, however many there are."""
    subscriber = a_buffer(nursery, buffer_events=10)
    for seq in range(1, 1001):
        subscriber.offer(a_frame(seq, "t"))
    assert not subscriber.ending
    got = seqs(await subscriber.receive())
    assert got[-1] == 1000
    assert subscriber.broker.conflated == 1000 - len(got)


@pytest.mark.parametrize(("events", "size"), [(1, 10_000), (100, 400)])
async def test_a_buffer_for_a_single_event(nursery, events, size):
    """Is enough for ticks, whatever their size."""
    subscriber = a_buffer(nursery, buffer_events=events, buffer_bytes=size)
    for seq in range(1, 20):
        subscriber.offer(a_frame(seq, "t", 300))
        assert subscriber.backlog[0] == 1
    assert seqs(await subscriber.receive()) == [19]


async def test_a_tick_stays_until_progress_supersedes_it(nursery):
    """Other events behind it do not."""
    subscriber = a_buffer(nursery, buffer_events=8)
    for seq, kind in enumerate("teetetse", 1):
        subscriber.offer(a_frame(seq, kind))
    subscriber.offer(a_frame(9, "e"))
    assert seqs(await subscriber.receive()) == [2, 3, 5, 7, 8, 9]


async def test_what_is_no_tick_is_never_dropped(nursery):
    """A client that is too slow for it is cut instead, with a reason that it can see."""
    subscriber = a_buffer(nursery, buffer_events=10)
    for seq in range(1, 11):
        subscriber.offer(a_frame(seq, "s"))
    assert (subscriber.backlog[0], subscriber.ending) == (10, False)
    subscriber.offer(a_frame(11, "s"))
    assert subscriber.ending
    (last,) = Decoder().feed(await subscriber.receive())
    assert (last.event, last.id) == ("overflow", "")
    assert "resume with your cursor" in msgspec.json.decode(last.data)["reason"]
    assert await subscriber.receive() == b""
    assert subscriber.broker.statistics().subscribers == 0


async def test_one_big_frame_may_wait(nursery):
    """A batch that is larger than the bounds by itself reaches a client that keeps up otherwise."""
    subscriber = a_buffer(nursery, buffer_events=2, buffer_bytes=100)
    subscriber.offer(a_frame(1, "eeeee", 500))
    assert subscriber.backlog[0] == 5
    assert seqs(await subscriber.receive()) == [1, 2, 3, 4, 5]


async def test_what_it_joined_with_survives_a_cut(nursery):
    """The head of a response, the verdict: only live events are given up."""
    subscriber = a_buffer(nursery, buffer_events=2)
    subscriber.write(b"event: resume\ndata: 1\n\n")
    for seq in range(1, 5):
        subscriber.offer(a_frame(seq, "e"))
    names = [event.event for event in Decoder().feed(await subscriber.receive())]
    assert names == ["resume", "overflow"]


async def test_nothing_is_taken_behind_the_end(nursery):
    """Neither events nor heartbeats nor another end."""
    subscriber = a_buffer(nursery)
    subscriber.end(b"one\n")
    subscriber.end(b"two\n")
    subscriber.offer(a_frame(1, "e"))
    subscriber.write(b"three\n")
    assert not subscriber.send_heartbeat(b"four\n")
    assert await subscriber.receive() == b"one\n"
    assert await subscriber.receive() == b""


async def test_writes_are_joined_up_to_a_size(nursery):
    """A drain takes many small frames at once, and no more than it should."""
    subscriber = a_buffer(nursery, buffer_events=10_000, buffer_bytes=10**7)
    for seq in range(1, 1001):
        subscriber.offer(a_frame(seq, "e", 200))
    sizes = []
    got: list[int] = []
    while subscriber.backlog[0]:
        data = await subscriber.receive()
        sizes.append(len(data))
        got += seqs(data)
    assert got == list(range(1, 1001))
    assert max(sizes) <= MAX_WRITE
    assert min(sizes[:-1]) > MAX_WRITE - 500


async def test_a_cut_over_a_full_socket(nursery, autojump_clock):
    """The overflow message comes behind what is half out, so no frame is torn; a WebSocket is closed."""
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
        assert watcher.seqs == list(range(1, len(watcher.seqs) + 1))
    closed = watchers["ws"].reader.closed
    assert (closed.code, closed.reason) == (1013, "too slow")
    assert harness.broker.statistics().cut == 2


async def test_a_client_that_takes_nothing_is_given_up(nursery, autojump_clock):
    """Within send_timeout, with its task and its memory."""
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


async def test_a_client_that_is_gone_is_noticed_by_a_write(nursery):
    """Its connection ends, and nobody else notices."""
    broker = Broker(nursery, Settings())
    ours, theirs = socket_streams()
    async with trio.open_nursery() as connection:
        subscriber = PushSubscriber(broker, encoding(), Transport(ours), connection)
        broker.subscribe("s", subscriber)
        subscriber.live = True
        await theirs.aclose()
        subscriber.offer(a_frame(1, "e"))
        assert subscriber.broken
        await trio.sleep_forever()
    assert broker.statistics().topics == 0
    await ours.aclose()


# Topics and tasks


async def test_quiet_sessions_cost_no_task(nursery):
    """A pump and a drain end with their work; what is left of a client is its own."""
    harness = LiveHarness(nursery)
    for number in range(20):
        await harness.tracker.create(f"s{number}")
        await harness.watch(f"s{number}", connection="pull")
    quiet = len(nursery.child_tasks)
    for number in range(20):
        await harness.tracker.emit(f"s{number}", "note")
    assert len(nursery.child_tasks) == quiet + 20
    await wait_all_tasks_blocked()
    assert len(nursery.child_tasks) == quiet == 20


async def test_what_nobody_watches_is_forgotten(nursery, autojump_clock):
    """Topics are there for those who watch or wait; publishing alone makes none."""
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


async def test_a_topic_is_forgotten_behind_its_pump(nursery):
    """Its last watcher leaves while events are on their way."""
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    watcher = await harness.watch(connection="pull")
    await harness.tracker.emit("s", "note")
    watcher.subscriber.abort()
    assert harness.broker.is_watched("s")
    await wait_all_tasks_blocked()
    assert not harness.broker.is_watched("s")


async def test_waiting_publishers_go_on_when_a_session_is_deleted(nursery, monkeypatch):
    """And when its last watcher leaves."""
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


async def test_a_batch_is_encoded_once_for_all(nursery):
    """All clients of an encoding get the same bytes object; events that have piled up come as one."""
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    shaped: list[int] = []

    def render(session_id: str, entry: Event) -> list[Message]:
        shaped.append(entry.seq)
        return SESSIONS.render(session_id, entry)

    dialect = msgspec.structs.replace(SESSIONS, render=render)
    watchers = [await harness.watch(connection="pull", dialect=dialect) for _ in range(5)]
    shaped.clear()
    before = harness.broker.statistics()
    for _ in range(10):
        await harness.tracker.emit("s", "note")
    await wait_all_tasks_blocked()
    after = harness.broker.statistics()
    assert shaped == list(range(2, 12))
    assert (after.batches - before.batches, after.delivered - before.delivered) == (1, 50)
    assert all(watcher.seqs == list(range(1, 12)) for watcher in watchers)


async def test_a_batch_has_bounds(nursery):
    """In events and about in bytes, so that one big one does not delay the others for long."""
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    await harness.watch(connection="pull")
    for size, batches in [(1, 4), (10_000, 125)]:
        before = harness.broker.statistics().batches
        for _ in range(500):
            await harness.tracker.emit("s", "note", "x" * size)
        await wait_all_tasks_blocked()
        assert harness.broker.statistics().batches - before == batches


async def test_fan_out_lets_others_run(nursery, monkeypatch):
    """Every SLICE seconds of it, so one big topic cannot starve the others."""
    monkeypatch.setattr(broker_module, "SLICE", 0.0)
    harness = LiveHarness(nursery)
    await harness.tracker.create("big")
    await harness.tracker.create("small")
    big = [await harness.watch("big", connection="pull") for _ in range(64)]
    small = await harness.watch("small", connection="pull")
    reached = []

    async def look() -> None:
        while sum(one.subscriber.backlog[0] or len(one.received) > 1 for one in big) < 64:
            reached.append(sum(one.subscriber.backlog[0] or len(one.received) > 1 for one in big))
            await trio.lowlevel.checkpoint()

    nursery.start_soon(look)
    await harness.tracker.emit("big", "note")
    await harness.tracker.emit("small", "note")
    await wait_all_tasks_blocked()
    assert any(0 < number < 64 for number in reached)
    assert small.names[-1] == "note"


async def test_who_leaves_during_fan_out_gets_no_more(nursery, monkeypatch):
    """And whoever joins during it gets the event from the log instead, once."""
    monkeypatch.setattr(broker_module, "SLICE", 0.0)
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


async def test_slow_clients_delay_nobody(nursery):
    """Beside fifty that take nothing, a good one gets every event before the next one is published."""
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


async def test_a_failed_fan_out_stays_in_its_topic(nursery, caplog):
    """It is logged, its watchers are cut and resume; other sessions do not notice."""
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


async def test_a_throttle_spares_ticks(nursery, autojump_clock):
    """The first of a flood at once, then one in so many seconds, the last in any case; nothing else waits."""
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
    assert 14 in watcher.seqs  # the tick before the note
    await trio.sleep(5)
    log = await harness.log("s")
    assert watcher.seqs[-1] == log[-1].seq
    assert watcher.seqs == sorted(set(watcher.seqs))
    assert len(watcher.seqs) <= 8
    assert harness.broker.statistics().conflated == len(log) - len(watcher.seqs)


async def test_a_throttle_never_holds_back_the_end(nursery, autojump_clock):
    """The terminal event goes out at once, and nothing behind it."""
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


async def watched(nursery: trio.Nursery, *protocols: str, **fields: Any) -> tuple[LiveHarness, list[Watcher]]:
    harness = LiveHarness(nursery, **fields)
    nursery.start_soon(harness.broker.heartbeats.run)
    await harness.tracker.create("s")
    return harness, [await harness.watch(protocol=protocol) for protocol in protocols]


@pytest.mark.parametrize("interval", [2, 5, 15, 30, 60, 200])
async def test_an_idle_stream_has_its_heartbeats(nursery, autojump_clock, interval):
    """One within every interval, and no more of them than it takes; comments and pings alike."""
    await trio.sleep(0.37)
    harness, watchers = await watched(nursery, "sse", "ws", heartbeat=interval)
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


async def test_a_busy_stream_needs_none(nursery, autojump_clock):
    """Events keep it in use as well."""
    harness, (watcher,) = await watched(nursery, "sse", heartbeat=10)
    for _ in range(30):
        await trio.sleep(4)
        await harness.tracker.emit("s", "note")
    assert watcher.reader.heartbeats == 0


async def test_a_stalled_stream_gets_none(nursery, autojump_clock):
    """What waits for it is more than a heartbeat, and the buffer does not grow with them."""
    harness, _ = await watched(nursery, heartbeat=10, send_timeout=1000)
    pull = await harness.watch(connection="pull", stalled=True)
    await trio.sleep(100)
    assert pull.subscriber.backlog[0] == 1


async def test_heartbeats_do_not_come_all_at_once(nursery, autojump_clock):
    """Clients of one moment are spread."""
    harness, _ = await watched(nursery, heartbeat=60)
    watchers = [await harness.watch(connection="pull") for _ in range(60)]
    beaten: dict[int, int] = {}
    for second in range(61):
        count = sum(watcher.reader.heartbeats for watcher in watchers)
        beaten[second] = count
        await trio.sleep(1)
    steps = [beaten[at + 1] - beaten[at] for at in range(60)]
    assert sum(steps) == 60
    assert max(steps) <= 30
    assert sum(step > 0 for step in steps) >= 4


async def test_who_has_left_gets_no_heartbeat(nursery, autojump_clock):
    """And is not in the ticker's wheel any more."""
    harness, (watcher,) = await watched(nursery, "sse", heartbeat=5)
    watcher.disconnect()
    await wait_all_tasks_blocked()
    assert not any(harness.broker.heartbeats._wheel)
    await trio.sleep(20)
    assert harness.broker.statistics().heartbeats == 0


async def test_the_dialect_has_its_interval(nursery, autojump_clock):
    """Fifteen seconds for ours, if no setting says otherwise."""
    _, (watcher,) = await watched(nursery, "sse")
    await trio.sleep(10)
    assert watcher.reader.heartbeats == 0
    await trio.sleep(5)
    assert watcher.reader.heartbeats == 1


async def test_a_stream_has_its_age(nursery, autojump_clock):
    """It is told to come back: at its greatest age, or when nothing has happened for too long."""
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
    """A frozen record of this moment."""
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    await harness.watch(connection="pull")
    await harness.tracker.emit("s", "note")
    before = harness.broker.statistics()
    await wait_all_tasks_blocked()
    assert (before.topics, before.subscribers, before.events, before.delivered) == (1, 1, 2, 0)
    assert harness.broker.statistics().delivered == 1
    assert "1 subscribers" in repr(harness.broker._topics["s"])
    assert "live=True" in repr(harness.broker.subscribers()[0])
