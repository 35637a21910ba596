"""Bundles of clients that are slow, cut off or still joining: order, no loss, bounds; random programs."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from live_harness import DISCONNECTED, HEAD, LiveHarness, Relay, Watcher, run
from trio.testing import wait_all_tasks_blocked

from sseserve.dialects.interaction import INTERACTION
from sseserve.live.bundle_join import join_bundle
from sseserve.live.resume import EPOCH_TIMEOUT, deleted_message
from sseserve.live.transport import Transport
from sseserve.model import Cursor
from sseserve.progress.rules import Update

SESSIONS = "abcd"


class BundleWatcher(Watcher):
    """A client of several sessions; ``visible`` are those that it may watch, None: all."""

    visible = None

    def __init__(self, harness, session_ids, cursor=None, connection="socket", **options):
        super().__init__(harness, "", cursor, "sse", connection, **options)
        self.session_ids = list(session_ids)

    async def _join(self, subscriber):
        harness = self._harness
        subscriber.head = self.head
        joining = partial(
            join_bundle,
            harness.engine,
            harness.broker,
            subscriber,
            self.session_ids,
            self.initial_cursor,
            visible=self.visible,
        )
        if self._connection == "pull":
            await joining()
            return
        # As the server does it: the connection is read meanwhile.
        async with trio.open_nursery() as nursery:

            async def send():
                with suppress(*DISCONNECTED):
                    await joining()
                    return
                nursery.cancel_scope.cancel()

            nursery.start_soon(send)
            with suppress(*DISCONNECTED):
                await self._server_stream.receive_some(1)
            nursery.cancel_scope.cancel()
        subscriber.abort()


async def watch(harness, session_ids, cursor=None, connection="socket", *, stalled=False, **options):
    watcher = BundleWatcher(harness, session_ids, cursor, connection, **options)
    if stalled:
        watcher.stall()
    harness.nursery.start_soon(watcher.run)
    await wait_all_tasks_blocked()
    return watcher


# Random programs


class RecordingRelay(Relay):
    """Keeps all logs that there have ever been, by their epoch, with the id of the session."""

    def __init__(self, broker):
        super().__init__(broker)
        self.logs = {}

    def deliver(self, session, events):
        self.logs.setdefault(session.epoch, (session.id, [], session.first_epoch))[1].extend(events)
        super().deliver(session, events)


class Client:
    """A client of a random program: one connection after another, each with the cursor of the last."""

    def __init__(self, session_ids, connection):
        self.session_ids, self.connection = session_ids, connection
        self.watchers = []

    @property
    def watcher(self):
        return self.watchers[-1]

    def reconnect(self, harness):
        cursor = self.watcher.cursor if self.watchers else None
        self.watchers.append(BundleWatcher(harness, self.session_ids, cursor, self.connection))
        harness.nursery.start_soon(self.watcher.run)

    def check(self, logs):
        """Compare every message, and every place of its id, with the logs; return what was seen of each."""
        seen = {}
        for watcher in self.watchers:
            if watcher.initial_cursor is None:
                seen = {}
            current = {}  # the epoch of each session that this connection has sent something of
            for message in watcher.received:
                if message.event == "deleted":
                    current.pop(message.data["session_id"], None)
                if message.id is None:
                    assert message.event in ("resume", "overflow", "deleted"), message
                    continue
                places = {
                    place.epoch: place.seq for place in map(Cursor.parse, filter(None, message.id.split("_")))
                }
                if message.event != "deleted":
                    session_id = message.data["session_id"]
                    # Until all logs have been read, the place in a log that is gone stays before it.
                    epoch = [e for e in places if e in logs and logs[e][0] == session_id][-1]
                    current[session_id] = epoch
                    events = logs[epoch][1]
                    seqs = seen.setdefault(epoch, [])
                    if seqs:
                        assert places[epoch] > seqs[-1], "repeated or out of order"
                        skipped = events[seqs[-1] : places[epoch] - 1]
                        assert all(event.conflatable for event in skipped), "lost"
                    seqs.append(places[epoch])
                for epoch in current.values():
                    # It may be ahead of what was received by what was dropped for newer progress.
                    last = seen[epoch][-1]
                    ahead = logs[epoch][1][last : places[epoch]]
                    assert places[epoch] >= last, "the id is before what was sent"
                    assert all(event.conflatable for event in ahead), "the id is ahead of what was sent"
        return seen

    def is_up_to_date(self, harness, logs):
        """Whether the client has seen all of its sessions that it still watches."""
        seen = self.check(logs)
        gone = {m.data["session_id"] for m in self.watcher.received if m.event == "deleted"}
        for epoch, seqs in seen.items():
            session_id, events, first_epoch = logs[epoch]
            session = harness.memory._logs.session(session_id)
            has_ended = events[-1].progress is not None and events[-1].progress.state.terminal
            if (
                has_ended
                and seqs[-1] == events[-1].seq
                and (session is None or session.first_epoch != first_epoch)
            ):
                gone.add(session_id)  # it was deleted after its end
        for session_id in set(self.session_ids) - gone:
            session = harness.memory._logs.session(session_id)
            if session is not None and seen.get(session.epoch, [None])[-1] != session.seq:
                return False
        return True


async def publish(harness, session_id, kinds):
    """Publish conflatable updates (t), other updates (s) and other events (e), without a pause."""
    session = await harness.memory.load(session_id)
    if session is not None and session.ended:
        return
    n = session.seq if session is not None else 0
    for kind in kinds:
        n += 1
        if kind == "e":
            await harness.tracker.emit(session_id, "note", {"n": n, "pad": "x" * (n % 7) * 40})
        else:
            stage = f"stage {n}" if kind == "s" else None
            await harness.tracker.update(session_id, progress=0, stage=stage, message=f"message {n}")


async def step(harness, clients, name, session_id, number, kinds):
    client = clients[number % len(clients)]
    session = await harness.memory.load(session_id)
    if name == "publish":
        await publish(harness, session_id, kinds)
    elif name == "finish" and session is not None and not session.ended:
        await harness.tracker.update(session_id, status="failed" if number % 2 else "done")
    elif name == "retry" and session is not None and session.ended:
        if session.progress.state.value == "failed":
            await harness.tracker.apply(session_id, Update(progress=0, retries_failure=True))
    elif name == "delete" and session is not None:
        await harness.delete(session_id)
    elif name == "resync":
        harness.broker.resync(session_id)
    elif name == "join" and client.watcher.ended:
        client.reconnect(harness)
    elif name == "disconnect":
        client.watcher.disconnect()
    elif name == "stall":
        client.watcher.stall()
    elif name == "unstall":
        client.watcher.unstall()
    elif name == "settle":
        await wait_all_tasks_blocked()
    elif name == "yield":
        for _ in range(number):
            await trio.lowlevel.checkpoint()


NAMES = (
    ["publish"] * 8
    + ["yield"] * 3
    + ["join"] * 4
    + ["stall", "unstall", "settle", "disconnect", "disconnect"]
)
NAMES += ["finish", "retry", "delete", "resync"]
steps = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.sampled_from(SESSIONS),
        st.integers(0, 5),
        st.one_of(st.sampled_from(["t" * 20, "e" * 12, "tts" * 6]), st.text("tse", min_size=1, max_size=6)),
    ),
    min_size=10,
    max_size=50,
)
client_kinds = st.lists(
    st.tuples(
        st.lists(st.sampled_from(SESSIONS), min_size=1, unique=True),
        st.sampled_from(["socket", "stream", "pull"]),
    ),
    min_size=1,
    max_size=3,
)


async def program(kinds, events, slow, program_steps):
    async with trio.open_nursery() as nursery:
        harness = LiveHarness(nursery, buffer_events=events, buffer_bytes=16384, send_timeout=5.0)
        relay = harness.memory._listener = RecordingRelay(harness.broker)
        for session_id in SESSIONS:
            await harness.tracker.update(session_id, progress=0)
        if slow:
            harness.slow_engine()
        clients = [Client(*kind) for kind in kinds]
        for client in clients:
            client.reconnect(harness)
        for arguments in program_steps:
            await step(harness, clients, *arguments)
        for client in clients:
            for _ in range(5):
                client.watcher.unstall()
                await trio.sleep(2 * EPOCH_TIMEOUT)
                await wait_all_tasks_blocked()
                if client.is_up_to_date(harness, relay.logs):
                    break
                assert client.watcher.ended, "an open stream is behind its logs"
                client.reconnect(harness)
            else:
                raise AssertionError("the client never caught up")
            client.watcher.disconnect()
        await wait_all_tasks_blocked()
        statistics = harness.broker.statistics()
        assert (statistics.topics, statistics.subscribers, harness.broker.subscribers()) == (0, 0, [])
        assert [*harness.broker.watchers.most_watched()] == []
        nursery.cancel_scope.cancel()


@given(client_kinds, st.sampled_from([4, 1024]), st.booleans(), steps)
@settings(max_examples=150)
def test_random_programs(kinds, events, slow, program_steps):
    """Whatever happens, a client gets each event of its sessions once, and each id resumes exactly there."""
    run(program, kinds, events, slow, program_steps)


# Writes, bounds, and clients that have not joined


@pytest.fixture
async def harness(nursery, autojump_clock):
    harness = LiveHarness(nursery, buffer_events=8)
    for session_id in SESSIONS:
        await harness.tracker.update(session_id, progress=0)
    return harness


async def test_what_is_published_to_many_sessions_is_one_write(harness, monkeypatch):
    """The events of all topics that wait are joined, for each client."""
    ids = [f"s{number}" for number in range(20)]
    for session_id in ids:
        await harness.tracker.create(session_id)
    watchers = [await watch(harness, ids) for _ in range(3)]
    writes = []
    original = Transport.try_send

    def count(transport, data):
        writes.append(transport)
        return original(transport, data)

    monkeypatch.setattr(Transport, "try_send", count)
    fan_out = harness.broker._fan_out
    fan_out._has_flusher = True  # it is busy with other clients
    for progress in range(1, 4):
        for session_id in ids:
            await harness.tracker.update(session_id, progress=progress)
        await wait_all_tasks_blocked()
    harness.nursery.start_soon(fan_out._flush_queued)
    await wait_all_tasks_blocked()
    assert all(len(watcher.events) == 20 + 60 for watcher in watchers)
    # The first event of each topic, then what has waited in the topics meanwhile.
    assert len(writes) == 2 * len(watchers)


async def test_nothing_is_offered_before_the_response_begins(harness):
    """A client that still reads the logs gets what is published meanwhile after its head, and once."""
    harness.slow_engine()
    watcher = BundleWatcher(harness, SESSIONS)
    harness.nursery.start_soon(watcher.run)
    other = await watch(harness, SESSIONS)
    late = BundleWatcher(harness, SESSIONS)
    harness.nursery.start_soon(late.run)
    for number in range(30):
        await harness.tracker.emit("a", "note", number)
        await trio.lowlevel.checkpoint()
    await wait_all_tasks_blocked()
    assert late.raw.startswith(HEAD)
    notes = [message.data["data"] for message in late.received if message.event == "note"]
    assert notes == list(range(30))[-len(notes) :]
    assert [m.data["data"] for m in other.received if m.event == "note"] == list(range(30))


async def test_the_buffer_is_conflated_for_each_session(harness):
    """Progress of one session does not supersede that of another."""
    watcher = await watch(harness, "ab", connection="stream", stalled=True)
    await harness.tracker.update("a", progress=1)
    for progress in range(1, 31):
        await harness.tracker.update("b", progress=progress)
        await wait_all_tasks_blocked()
    await harness.tracker.emit("a", "note", None)
    await wait_all_tasks_blocked()
    watcher.unstall()
    await wait_all_tasks_blocked()
    percents = {session_id: [] for session_id in "ab"}
    for message in watcher.received:
        if message.event == "progress":
            percents[message.data["session_id"]].append(message.data["progress"])
    assert percents["a"][-1] == 1
    assert percents["b"][-1] == 30
    assert len(percents["b"]) < 20
    assert "overflow" not in watcher.names
    assert harness.broker.statistics().conflated == 31 - len(percents["b"])


async def test_what_is_told_of_a_session_that_never_began_is_conflated_as_a_chunk(harness):
    """It is of no log, but a part of the stream as everything else."""
    options = {"connection": "stream", "dialect": INTERACTION}
    watcher = await watch(harness, ["later", "a"], stalled=True, **options)
    harness.broker.close("later", deleted_message())
    for progress in range(1, 31):
        await harness.tracker.update("a", progress=progress)
        await wait_all_tasks_blocked()
    watcher.unstall()
    await wait_all_tasks_blocked()
    assert "deleted" in watcher.names
    assert watcher.received[-1].data["data"]["progress"] == 0.3
    assert harness.broker.statistics().conflated


async def test_a_slow_client_is_cut_and_resumes(harness):
    """It learns why, is counted as others are, and gets each event once; the others are not affected."""
    slow = await watch(harness, "ab", connection="stream", stalled=True)
    fast = await watch(harness, "ab")
    for number in range(20):
        await harness.tracker.emit("ab"[number % 2], "note", number)
        await wait_all_tasks_blocked()
    assert [m.data["data"] for m in fast.received if m.event == "note"] == list(range(20))
    slow.unstall()
    await wait_all_tasks_blocked()
    assert slow.names[-1] == "overflow"
    assert not slow.complete
    assert (harness.broker.statistics().cut, harness.broker.statistics().subscribers) == (1, 1)
    again = await watch(harness, "ab", slow.cursor)
    notes = [m.data["data"] for w in (slow, again) for m in w.received if m.event == "note"]
    assert sorted(notes) == list(range(20))


async def test_what_comes_after_a_cut_is_not_lost(harness):
    """The snapshot of a session that is read again is not sent without what was before it."""
    watcher = await watch(harness, "ab", connection="stream", stalled=True)
    await harness.tracker.emit("b", "note", -1)  # is being sent
    await wait_all_tasks_blocked()
    for number in range(4):
        await harness.tracker.emit("b", "note", number)
    await wait_all_tasks_blocked()
    log = harness.memory._logs.get("a")
    log.session = msgspec.structs.replace(log.session, epoch="renewed")
    harness.broker.resync("a")
    await wait_all_tasks_blocked()
    for number in range(4, 20):
        await harness.tracker.emit("b", "note", number)
    await wait_all_tasks_blocked()
    watcher.unstall()
    await wait_all_tasks_blocked()
    assert watcher.names[-1] == "overflow"
    again = await watch(harness, "ab", watcher.cursor)
    notes = [m.data["data"] for w in (watcher, again) for m in w.received if m.event == "note"]
    assert notes == list(range(-1, 20))


async def test_a_dialect_that_waits_for_its_sessions(harness):
    """A session that is created later begins then; its place is in the cursor from its first event on."""
    watcher = await watch(harness, ["later", "a"], dialect=INTERACTION)
    before = len(watcher.received)
    await harness.tracker.emit("later", "note", 1)
    await wait_all_tasks_blocked()
    (message,) = watcher.received[before:]
    assert (message.event, message.data) == ("note", {"session_id": "later", "data": 1})
    assert str((await harness.tracker.get("later")).cursor) in message.id.split("_")
    await harness.tracker.update("later", progress=50)
    await wait_all_tasks_blocked()
    harness.broker.resync("later")
    await wait_all_tasks_blocked()
    assert len(watcher.received) == before + 2
    again = await watch(harness, ["later", "a"], message.id, dialect=INTERACTION)
    assert [m.data["status"] for m in again.received if m.event == "resume"] == ["ok", "ok"]


async def test_publishers_wait_for_slow_fan_out_to_bundles(harness):
    """A topic's next batch is made when the clients have been offered the last one."""
    await watch(harness, "ab")
    topic = harness.broker._topics["a"]
    harness.broker._fan_out._has_flusher = True  # it is busy with other clients
    for number in range(3):
        await harness.tracker.emit("a", "note", number)
        await wait_all_tasks_blocked()
    assert topic.backlog == 2


async def test_a_failure_for_one_client_is_contained(harness, monkeypatch, caplog):
    """It is cut, and resumes; the others get the event."""
    first, second = [await watch(harness, "ab") for _ in range(2)]
    client = first.subscriber
    original = type(client).offer

    def fail(subscriber, encoded):
        if subscriber is client:
            raise RuntimeError("broken")
        original(subscriber, encoded)

    monkeypatch.setattr(type(client), "offer", fail)
    await harness.tracker.emit("a", "note", 1)
    await wait_all_tasks_blocked()
    assert first.names[-1] == "overflow"
    assert second.names[-1] == "note"
    assert "RuntimeError: broken" in caplog.text


async def test_that_a_session_was_deleted_is_not_sent_without_what_was_before_it(harness):
    """A client that is cut is sent nothing that has a cursor behind what was dropped."""
    watcher = await watch(harness, "ab", connection="stream", stalled=True)
    for number in range(4):
        await harness.tracker.emit("b", "note", number)
        await wait_all_tasks_blocked()
    await harness.delete("a")
    await wait_all_tasks_blocked()
    for number in range(4, 20):
        await harness.tracker.emit("b", "note", number)
        await wait_all_tasks_blocked()
    watcher.unstall()
    await wait_all_tasks_blocked()
    assert watcher.names[-1] == "overflow"
    again = await watch(harness, "ab", watcher.cursor)
    notes = [m.data["data"] for w in (watcher, again) for m in w.received if m.event == "note"]
    assert notes == list(range(20))


async def test_another_session_of_the_same_id_is_not_watched(harness):
    """It was deleted and created again while nothing of it was delivered."""
    watcher = await watch(harness, "ab")
    log = harness.memory._logs.get("a")
    log.session = msgspec.structs.replace(log.session, epoch="other", first_epoch="other")
    harness.broker.resync("a")
    await wait_all_tasks_blocked()
    assert (watcher.names[-1], watcher.received[-1].data) == ("deleted", {"session_id": "a"})


async def test_a_session_that_may_not_be_watched_looks_deleted(harness):
    """Whether it may is asked of the session that was read: it may be another one than at the request."""
    watcher = BundleWatcher(harness, "ab")
    watcher.visible = lambda session: session.id != "b"
    harness.nursery.start_soon(watcher.run)
    await wait_all_tasks_blocked()
    assert [(m.event, m.data["session_id"]) for m in watcher.received] == [
        ("progress", "a"),
        ("deleted", "b"),
    ]
    await harness.tracker.emit("b", "note", 1)
    await wait_all_tasks_blocked()
    assert len(watcher.received) == 2


async def test_a_log_that_cannot_be_read_again_delays_no_other_session(harness):
    """What was read of the others is sent before."""
    watcher = await watch(harness, "ab")
    for session_id in "ab":
        log = harness.memory._logs.get(session_id)
        log.session = msgspec.structs.replace(log.session, epoch=f"renewed{session_id}")
    read = harness.engine.read

    async def block(session_id, after, limit):
        if session_id == "b":
            await trio.sleep_forever()
        return await read(session_id, after, limit)

    harness.engine.read = block
    before = len(watcher.received)
    harness.broker.resync("a")
    harness.broker.resync("b")
    await wait_all_tasks_blocked()
    assert [message.event for message in watcher.received[before:]] == ["resume", "progress"]
