"""Joining and resuming a session: snapshots, cursors, resume events, ends; over every transport."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from live_harness import HEAD, LiveHarness, SocketReader, SSEReader, Watcher, encoding, run
from trio.testing import wait_all_tasks_blocked

from sseserve.dialects import Message, text_message, websocket_text
from sseserve.dialects.interaction import INTERACTION
from sseserve.dialects.sessions import SESSIONS
from sseserve.errors import SessionNotFound
from sseserve.live.pull_subscriber import PullSubscriber
from sseserve.live.resume import PAGE, History, ResumeResult, is_complete, join, read_history
from sseserve.model import Control
from sseserve.progress.rules import Update

CONNECTIONS = [("socket", "sse"), ("socket", "ws"), ("stream", "sse"), ("pull", "sse"), ("pull", "ws")]
CHUNKED = [("socket", "sse"), ("stream", "sse")]
every_connection = pytest.mark.parametrize(("connection", "protocol"), CONNECTIONS)
ENDS = {"done": "complete", "failed": "error", "cancelled": "error", "lost": "error"}


@pytest.fixture(params=[False, True], ids=["memory", "slow engine"])
def harness(request, nursery) -> LiveHarness:
    """A harness with an engine that never yields, and one with an engine that does."""
    harness = LiveHarness(nursery)
    if request.param:
        harness.slow_engine()
    return harness


async def cursor_at(harness: LiveHarness, seq: int) -> str:
    return f"{(await harness.tracker.get('s')).epoch}-{seq}"


async def emit_notes(harness: LiveHarness, number: int) -> None:
    for n in range(number):
        await harness.tracker.emit("s", "note", n)


async def poll(
    harness: LiveHarness,
    after: str | None,
    *,
    limit: int = 1000,
    max_bytes: int = 256 * 1024,
    wait: float = 0,
) -> History:
    return await read_history(
        harness.engine,
        harness.broker,
        SESSIONS,
        "s",
        after=after,
        limit=limit,
        max_bytes=max_bytes,
        wait=wait,
        stopping=harness.stopping,
    )


def parse_messages(result: History) -> list[Any]:
    """The messages of a long-poll result as its client parses them."""
    reader = SocketReader()
    return [
        m
        for message in result.messages
        for m in reader.feed(websocket_text(msgspec.json.encode(text_message(message))))
    ]


# Without a cursor


@every_connection
async def test_without_a_cursor_a_snapshot_comes_first(harness, connection, protocol):
    """The current progress is an ordinary event with the log's cursor; each later event follows once."""
    await harness.tracker.update("s", progress=40)
    await emit_notes(harness, 2)
    watcher = await harness.watch(protocol=protocol, connection=connection)
    (snapshot,) = watcher.received
    assert (snapshot.event, snapshot.seq, snapshot.data["progress"]) == ("progress", 3, 40)
    await emit_notes(harness, 2)
    await wait_all_tasks_blocked()
    assert (watcher.names, watcher.seqs) == (["progress", "note", "note"], [3, 4, 5])


@every_connection
async def test_before_the_first_progress_a_session_is_queued(harness, connection, protocol):
    """The first message says so and has the cursor: none is without data, which some clients cannot take."""
    await emit_notes(harness, 2)
    watcher = await harness.watch(protocol=protocol, connection=connection)
    (snapshot,) = watcher.received
    assert (snapshot.event, snapshot.seq, snapshot.data["state"]) == ("progress", 2, "queued")
    assert watcher.cursor == await cursor_at(harness, 2)


@every_connection
async def test_without_a_snapshot_the_resume_event_has_the_cursor(harness, connection, protocol):
    """An interaction has none before its first progress; its client goes on from where it is."""
    await emit_notes(harness, 2)
    watcher = await harness.watch(
        cursor="unknown-1", protocol=protocol, connection=connection, dialect=INTERACTION
    )
    assert (watcher.names, watcher.cursor) == (["resume"], await cursor_at(harness, 2))


@every_connection
@pytest.mark.parametrize("label", ENDS)
async def test_joining_an_ended_session(harness, connection, protocol, label):
    """The client gets the end as a snapshot and the stream ends."""
    await harness.tracker.update("s", progress=40)
    await harness.tracker.update("s", status=label)
    watcher = await harness.watch(protocol=protocol, connection=connection)
    assert (watcher.names, watcher.seqs, watcher.ended) == ([ENDS[label]], [2], True)
    assert harness.broker.statistics().topics == 0


@every_connection
@pytest.mark.parametrize("label", ENDS)
async def test_live_client_gets_the_end(harness, connection, protocol, label):
    """The end comes after everything before it, and the stream ends."""
    await harness.tracker.update("s", progress=40)
    watcher = await harness.watch(protocol=protocol, connection=connection)
    await emit_notes(harness, 3)
    await harness.tracker.update("s", status=label)
    await wait_all_tasks_blocked()
    assert watcher.names == ["progress", "note", "note", "note", ENDS[label]]
    assert watcher.ended
    assert harness.broker.statistics().topics == 0
    assert watcher.complete is (True if (connection, protocol) in CHUNKED else None)
    if protocol == "ws":
        assert (watcher.reader.closed.code, watcher.reader.closed.reason) == (1000, "ended")


# With a cursor


@every_connection
async def test_resume_with_a_valid_cursor(harness, connection, protocol):
    """First the resume event, then every event after the cursor, then new events."""
    await emit_notes(harness, 5)
    watcher = await harness.watch(
        cursor=await cursor_at(harness, 2), protocol=protocol, connection=connection
    )
    await harness.tracker.emit("s", "note", 5)
    await wait_all_tasks_blocked()
    resume, *events = watcher.received
    assert (resume.event, resume.id, resume.data) == ("resume", None, {"status": "ok", "missed": 0})
    assert [(event.seq, event.data) for event in events] == [(3, 2), (4, 3), (5, 4), (6, 5)]


@every_connection
async def test_resume_at_the_end_of_the_log(harness, connection, protocol):
    """Only the resume event, then new events."""
    await emit_notes(harness, 2)
    watcher = await harness.watch(
        cursor=await cursor_at(harness, 2), protocol=protocol, connection=connection
    )
    assert watcher.names == ["resume"]
    await emit_notes(harness, 1)
    await wait_all_tasks_blocked()
    assert watcher.seqs == [3]


@every_connection
async def test_trimmed_log_is_a_gap(nursery, connection, protocol):
    """The resume event has the number of missed events; the current snapshot follows, then new events."""
    harness = LiveHarness(nursery, history_events=3)
    await harness.tracker.update("s", progress=40)
    await emit_notes(harness, 5)
    watcher = await harness.watch(
        cursor=await cursor_at(harness, 2), protocol=protocol, connection=connection
    )
    resume, snapshot = watcher.received
    assert resume.data == {"status": "gap", "missed": 4}
    assert (snapshot.event, snapshot.seq, snapshot.data["progress"]) == ("progress", 6, 40)
    ok = await harness.watch(cursor=await cursor_at(harness, 3), protocol=protocol, connection=connection)
    assert (ok.received[0].data["status"], ok.seqs) == ("ok", [4, 5, 6])
    await emit_notes(harness, 1)
    await wait_all_tasks_blocked()
    assert (watcher.seqs, ok.seqs) == ([6, 7], [4, 5, 6, 7])


@every_connection
@pytest.mark.parametrize("cursor", ["other-1", "nonsense", "{epoch}-3", "{epoch}-1.x", "-1"])
async def test_invalid_cursor_is_a_reset(harness, connection, protocol, cursor):
    """For another epoch, a position that does not exist yet, and text that is not a cursor."""
    await harness.tracker.update("s", progress=40)
    await emit_notes(harness, 1)
    cursor = cursor.format(epoch=(await harness.tracker.get("s")).epoch)
    watcher = await harness.watch(cursor=cursor, protocol=protocol, connection=connection)
    resume, snapshot = watcher.received
    assert resume.data == {"status": "reset", "missed": 2}
    assert (snapshot.event, snapshot.seq) == ("progress", 2)


async def test_long_poll_resumes_like_a_stream(nursery):
    """The same resume results, messages and cursors for every cursor of a trimmed log."""
    harness = LiveHarness(nursery, history_events=3)
    await harness.tracker.update("s", progress=40)
    await emit_notes(harness, 5)
    for cursor in [*[await cursor_at(harness, seq) for seq in range(9)], "other-1", "nonsense"]:
        stream = await harness.watch(cursor=cursor, protocol="ws")
        result = await poll(harness, cursor)
        assert msgspec.to_builtins(result.resume) == stream.received[0].data
        assert parse_messages(result) == stream.received[1:]
        assert result.next == stream.cursor


@every_connection
async def test_client_can_change_its_transport(harness, connection, protocol):
    """Alternating between a stream and long-polling by cursor gives exactly the log."""
    await harness.tracker.create("s")
    messages, cursor = [], await cursor_at(harness, 0)
    for number in range(8):
        if number % 2:
            result = await poll(harness, cursor, limit=2)
            messages += parse_messages(result)
            cursor = result.next
        else:
            watcher = await harness.watch(cursor=cursor, protocol=protocol, connection=connection)
            await emit_notes(harness, 3)
            await wait_all_tasks_blocked()
            watcher.disconnect()
            await emit_notes(harness, 2)
            messages += watcher.events
            cursor = watcher.cursor
    messages += parse_messages(await poll(harness, cursor))
    assert [message.seq for message in messages] == list(range(1, len(await harness.log("s")) + 1))


# Long replays


@every_connection
async def test_events_during_a_long_replay(harness, connection, protocol):
    """Events published during the replay follow it, in order and once; there is one resume event."""
    await emit_notes(harness, 500)
    cursor = await cursor_at(harness, 1)
    watcher = await harness.watch(cursor=cursor, protocol=protocol, connection=connection, stalled=True)
    await emit_notes(harness, 100)
    await wait_all_tasks_blocked()
    watcher.unstall()
    await wait_all_tasks_blocked()
    await emit_notes(harness, 3)
    await wait_all_tasks_blocked()
    assert watcher.names.count("resume") == 1
    assert watcher.seqs == list(range(2, 604))


@every_connection
async def test_log_trimmed_during_a_long_replay(nursery, connection, protocol):
    """A second resume event reports the gap where it is, and a snapshot follows."""
    harness = LiveHarness(nursery, history_events=400)
    await harness.tracker.update("s", progress=40)
    await emit_notes(harness, 399)
    watcher = await harness.watch(
        cursor=await cursor_at(harness, 1), protocol=protocol, connection=connection, stalled=True
    )
    await emit_notes(harness, 1000)
    await wait_all_tasks_blocked()
    watcher.unstall()
    await wait_all_tasks_blocked()
    await emit_notes(harness, 1)
    await wait_all_tasks_blocked()
    first, second = [message.data for message in watcher.received if message.event == "resume"]
    assert first == {"status": "ok", "missed": 0}
    assert second["status"] == "gap"
    at = watcher.names.index("resume", 1)
    before, after = watcher.seqs[: at - 1], watcher.seqs[at - 1 :]
    assert before == list(range(2, before[-1] + 1))
    assert second["missed"] == 1400 - before[-1]
    assert after == [1400, 1401]
    assert watcher.received[at + 1].event == "progress"


async def test_replay_waits_for_its_client(nursery, autojump_clock):
    """One page at a time; a client that does not read is disconnected after send_timeout."""
    harness = LiveHarness(nursery, send_timeout=5)
    await harness.tracker.update("s", progress=1)
    for _ in range(1000):
        await harness.tracker.emit("s", "note", "x" * 100)
    for connection in ("stream", "pull"):
        started = trio.current_time()
        watcher = await harness.watch(cursor=await cursor_at(harness, 1), connection=connection, stalled=True)
        assert watcher.subscriber.backlog[1] < 128 * 200
        while not watcher.subscriber.ending:
            await trio.sleep(0.1)
        assert trio.current_time() - started == pytest.approx(4.8, abs=0.4)
        watcher.disconnect()


# Joins during other operations


join_steps = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(1, 200)),
        st.tuples(st.just("join"), st.integers(0, 400)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    min_size=2,
    max_size=12,
)


async def check_joins(slow: bool, steps: list[tuple[str, int]]) -> None:
    async with trio.open_nursery() as nursery:
        harness = LiveHarness(nursery)
        if slow:
            harness.slow_engine()
        await harness.tracker.create("s")
        watchers = []
        for name, number in steps:
            if name == "publish":
                await emit_notes(harness, number)
            elif name == "join":
                seq = min(number, (await harness.tracker.get("s")).seq)
                kind = CONNECTIONS[len(watchers) % len(CONNECTIONS)]
                nursery.start_soon(_watch, harness, await cursor_at(harness, seq), kind, watchers)
            else:
                for _ in range(number):
                    await trio.lowlevel.checkpoint()
        await wait_all_tasks_blocked()
        last = (await harness.tracker.get("s")).seq
        for watcher in watchers:
            started = int(watcher.initial_cursor.rpartition("-")[2])
            assert watcher.names[0] == "resume"
            assert watcher.seqs == list(range(started + 1, last + 1))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("delay", range(8))
async def test_watchers_of_a_session_that_is_tried_again(autojump_clock, nursery, slow, delay):
    """Whenever they join, they get the end of the failed attempt, or are told ``reset`` and get the next."""
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    first = await cursor_at(harness, 1)
    await emit_notes(harness, 2 * PAGE)
    watchers = [await harness.watch(connection=c, protocol=p) for c, p in CONNECTIONS]
    if slow:
        harness.slow_engine()
    for kind in CONNECTIONS:
        nursery.start_soon(_watch, harness, first, kind, watchers)
    for _ in range(delay):
        await trio.lowlevel.checkpoint()
    await harness.tracker.update("s", status="failed")
    for percent in (1, 2):
        await harness.tracker.apply("s", Update(progress=percent, retries_failure=True))
    await wait_all_tasks_blocked()
    await harness.tracker.update("s", progress=3)
    await wait_all_tasks_blocked()
    session = await harness.tracker.get("s")
    assert (session.seq, session.attempt) == (3, 2)
    old = first.partition("-")[0]
    for watcher in watchers:
        seen = [message.id.split("-") for message in watcher.events]
        before = [int(seq) for epoch, seq in seen if epoch == old]
        after = [int(seq) for epoch, seq in seen if epoch != old]
        assert [epoch for epoch, _ in seen] == [old] * len(before) + [session.epoch] * len(after)
        assert before == list(range(before[0], before[0] + len(before))) if before else True
        if after:
            assert after == list(range(after[0], 4))
            resumed = [m.data["status"] for m in watcher.received if m.event == "resume"]
            assert resumed[-1] == "reset"
        else:
            assert before[-1] == 2 * PAGE + 2
            assert watcher.ended
    assert [w.events[-1].event for w in watchers[: len(CONNECTIONS)]] == ["error"] * len(CONNECTIONS)


async def test_polling_a_session_that_is_tried_again(harness):
    """A cursor of the failed attempt is answered with ``reset`` and the current state."""
    await harness.tracker.update("s", status="failed")
    cursor = await cursor_at(harness, 1)
    await harness.tracker.apply("s", Update(progress=1, retries_failure=True))
    history = await poll(harness, cursor, wait=10)
    assert history.resume == ResumeResult("reset", 1)
    assert [message.event for message in history.messages] == ["progress"]
    assert not history.end


async def _watch(harness: LiveHarness, cursor: str, kind: tuple[str, str], watchers: list[Any]) -> None:
    watchers.append(await harness.watch(cursor=cursor, connection=kind[0], protocol=kind[1]))


@settings(max_examples=60)
@given(st.booleans(), join_steps)
def test_joins_during_fan_out(slow, steps):
    """Whenever a client joins, it gets every event after its cursor once."""
    run(check_joins, slow, steps)


@every_connection
async def test_session_deleted_while_watched(harness, connection, protocol):
    """The watchers get ``deleted`` after all earlier events, their streams end and the topic is removed."""
    await harness.tracker.update("s", progress=1)
    watcher = await harness.watch(protocol=protocol, connection=connection)
    await emit_notes(harness, 3)
    await wait_all_tasks_blocked()
    await harness.delete("s")
    await wait_all_tasks_blocked()
    assert watcher.names[1:] == ["note"] * 3 + ["deleted"]
    assert watcher.ended
    assert harness.broker.statistics().topics == harness.broker.statistics().subscribers == 0


@every_connection
async def test_session_created_again(harness, connection, protocol):
    """Watchers of the deleted session are ended; with their cursor they get a reset and the new session."""
    await harness.tracker.update("s", progress=90)
    watcher = await harness.watch(protocol=protocol, connection=connection)
    await harness.delete("s")
    await harness.tracker.create("s")
    await harness.tracker.update("s", progress=5)
    new = await harness.watch(protocol=protocol, connection=connection)
    await wait_all_tasks_blocked()
    assert (watcher.names, watcher.ended) == (["progress", "deleted"], True)
    again = await harness.watch(cursor=watcher.cursor, protocol=protocol, connection=connection)
    assert again.received[0].data == {"status": "reset", "missed": 2}
    for one in (new, again):
        assert one.events[0].data["progress"] == 5
    await emit_notes(harness, 1)
    await wait_all_tasks_blocked()
    assert new.seqs == again.seqs == [2, 3]


@every_connection
@pytest.mark.parametrize("end", ["deleted", "drained"])
async def test_head_is_sent_before_any_final_message(nursery, connection, protocol, end):
    """The response head comes first, even if the stream ends while the engine is still reading."""
    harness = LiveHarness(nursery)
    harness.slow_engine()
    await harness.tracker.create("s")
    watcher = Watcher(harness, "s", None, protocol, connection)
    nursery.start_soon(watcher.run)
    while not harness.broker.is_watched("s"):
        await trio.lowlevel.checkpoint()
    (subscriber,) = harness.broker.subscribers()
    assert not subscriber.live
    if end == "deleted":
        await harness.delete("s")
    else:
        subscriber.end(subscriber.encoding.message(Message(end, b"{}")))
    await wait_all_tasks_blocked()
    assert (watcher.names, watcher.ended) == ([end], True)
    assert watcher.raw.startswith(watcher.head)
    assert harness.broker.statistics().topics == 0


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("after", [0, 3])
async def test_join_between_append_and_fan_out(nursery, before, after):
    """Events that are logged but not yet fanned out are received once, from the log."""
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    await harness.watch(connection="pull")  # a fan-out needs a watcher
    await emit_notes(harness, before)
    subscriber = PullSubscriber(harness.broker, encoding("sse"))
    await join(harness.memory, harness.broker, subscriber, "s", await cursor_at(harness, 1))
    assert subscriber.live
    await emit_notes(harness, after)
    await wait_all_tasks_blocked()
    messages = SSEReader().feed(await subscriber.receive())
    assert [message.seq for message in messages[1:]] == list(range(2, 2 + before + after))
    subscriber.abort()


async def test_subscriber_aborted_before_its_join(harness):
    """It is not added to the topic."""
    await harness.tracker.create("s")
    subscriber = PullSubscriber(harness.broker, encoding("sse"))
    subscriber.abort()
    await join(harness.engine, harness.broker, subscriber, "s", None)
    assert harness.broker.statistics().topics == harness.broker.statistics().subscribers == 0


@every_connection
async def test_nothing_follows_the_final_message(nursery, connection, protocol):
    """A stream that ends during a long replay sends no more of it."""
    harness = LiveHarness(nursery)
    harness.slow_engine()
    await emit_notes(harness, 500)
    watcher = Watcher(harness, "s", await cursor_at(harness, 1), protocol, connection)
    nursery.start_soon(watcher.run)
    while not harness.broker.is_watched("s"):
        await trio.lowlevel.checkpoint()
    (subscriber,) = harness.broker.subscribers()
    subscriber.end(subscriber.encoding.message(Message("drained", b"{}")))
    await wait_all_tasks_blocked()
    assert (watcher.names, watcher.ended) == (["drained"], True)


async def test_unknown_session(harness):
    """A stream ends with ``deleted``, a long-poll raises, and the topic is removed."""
    watcher = await harness.watch()
    assert (watcher.names, watcher.ended) == (["deleted"], True)
    with pytest.raises(SessionNotFound):
        await poll(harness, None)
    assert harness.broker.statistics().topics == 0


async def test_dialect_that_waits_for_its_session(harness):
    """Its stream can open before the session exists and gets it from its first event on."""
    early = await harness.watch(dialect=INTERACTION)
    assert early.raw == HEAD
    late = Watcher(harness, "s", None, "sse", "socket", INTERACTION)
    harness.nursery.start_soon(late.run)
    while late.subscriber is None or late.subscriber.topic is None:
        await trio.lowlevel.checkpoint()
    await emit_notes(harness, 3)  # the late one may not have joined yet
    await wait_all_tasks_blocked()
    assert [message.data for message in early.received] == [0, 1, 2]
    assert late.reader.cursor == early.reader.cursor
    assert late.seqs == [1, 2, 3]
    await emit_notes(harness, 1)
    await wait_all_tasks_blocked()
    assert early.seqs[-1:] == late.seqs[-1:] == [4]


# The end of a session


async def test_is_complete(harness):
    """Only for a cursor at the end of the current log of an ended session."""
    await harness.tracker.update("s", progress=1)
    session = await harness.tracker.get("s")
    assert not is_complete(session, str(session.cursor))
    await harness.tracker.update("s", status="done")
    session = await harness.tracker.get("s")
    assert is_complete(session, f"{session.epoch}-2")
    for cursor in (None, "", f"{session.epoch}-1", f"{session.epoch}-2.1", "other-2", "nonsense"):
        assert not is_complete(session, cursor)


@every_connection
async def test_reconnecting_client_completes(harness, connection, protocol):
    """Whatever its cursor, after the next stream of an ended session the client has everything."""
    await harness.tracker.update("s", progress=1)
    await emit_notes(harness, 2)
    await harness.tracker.update("s", status="done")
    session = await harness.tracker.get("s")
    for cursor in (None, *[await cursor_at(harness, seq) for seq in range(4)], "other-9", "nonsense"):
        watcher = await harness.watch(cursor=cursor, protocol=protocol, connection=connection)
        assert watcher.names[-1] == "complete"
        assert watcher.ended
        assert is_complete(session, watcher.cursor)


# Long-poll


async def test_long_poll_pages_through_the_log(harness):
    """From the beginning without a cursor, ``limit`` events at a time; ``end`` when nothing follows."""
    await emit_notes(harness, 5)
    first = await poll(harness, None, limit=3)
    assert (first.resume, [message.seq for message in parse_messages(first)], first.end) == (
        None,
        [1, 2, 3],
        False,
    )
    assert first.next == await cursor_at(harness, 3)
    second = await poll(harness, first.next, limit=3)
    assert ([message.seq for message in parse_messages(second)], second.end) == ([4, 5], False)
    await harness.tracker.update("s", status="done")
    third = await poll(harness, second.next)
    assert ([message.event for message in parse_messages(third)], third.end) == (["complete"], True)
    last = await poll(harness, third.next, wait=60)
    assert (last.messages, last.next, last.end) == ([], third.next, True)
    assert last.resume.status == "ok"


async def test_long_poll_page_is_limited_in_bytes(harness):
    """A page holds about ``max_bytes`` of events, but always one; following the pages reads the whole log."""
    for number in range(10):
        await harness.tracker.emit("s", "note", {"n": number, "text": "x" * 10_000})
    sizes, received = [], []
    result = await poll(harness, None, max_bytes=25_000)
    while result.messages:
        sizes.append(sum(len(message.data) for message in result.messages))
        received += [message.data["n"] for message in parse_messages(result)]
        result = await poll(harness, result.next, max_bytes=25_000 if len(received) < 8 else 100)
    assert received == list(range(10))
    assert max(sizes) <= 25_000
    assert len(sizes) == 6  # four of two events, and two of one that is larger than the limit


async def test_long_poll_with_a_full_page(harness):
    """``end`` is set only with the last event, not because a page is full."""
    await emit_notes(harness, 2)
    await harness.tracker.update("s", status="done")
    assert not (await poll(harness, None, limit=2)).end
    assert (await poll(harness, None, limit=3)).end


async def test_long_poll_waits_for_an_event(nursery, autojump_clock):
    """It returns when the event is published."""
    harness = LiveHarness(nursery)
    await emit_notes(harness, 1)
    results = []

    async def run_poll() -> None:
        results.append((await poll(harness, await cursor_at(harness, 1), wait=30), trio.current_time()))

    nursery.start_soon(run_poll)
    await trio.sleep(10)
    assert not results
    await emit_notes(harness, 1)
    await wait_all_tasks_blocked()
    ((result, at),) = results
    assert ([message.seq for message in parse_messages(result)], at) == ([2], 10)
    assert harness.broker.statistics().topics == 0


@pytest.mark.parametrize("cursor", [None, "other-1"])
async def test_long_poll_with_messages_does_not_wait(nursery, autojump_clock, cursor):
    """Without a cursor, and with a stale one, it returns at once."""
    harness = LiveHarness(nursery)
    await harness.tracker.update("s", progress=1)
    result = await poll(harness, cursor, wait=30)
    assert (trio.current_time(), len(result.messages)) == (0, 1)


async def test_event_during_the_read_of_a_long_poll(nursery, autojump_clock):
    """An event published while the engine reads is returned at once and not after the timeout."""
    harness = LiveHarness(nursery)
    harness.slow_engine()
    await emit_notes(harness, 1)
    for delay in range(8):
        cursor = str((await harness.tracker.get("s")).cursor)
        async with trio.open_nursery() as pollers:

            async def run_poll(cursor: str = cursor) -> None:
                result = await poll(harness, cursor, wait=30)
                assert len(result.messages) == 1

            pollers.start_soon(run_poll)
            for _ in range(delay):
                await trio.lowlevel.checkpoint()
            await emit_notes(harness, 1)
    assert trio.current_time() == 0


async def test_long_poll_timeout(nursery, autojump_clock):
    """After ``wait`` seconds the result is empty and the cursor unchanged."""
    harness = LiveHarness(nursery)
    await emit_notes(harness, 1)
    result = await poll(harness, await cursor_at(harness, 1), wait=30)
    assert (trio.current_time(), result.messages, result.next) == (30, [], await cursor_at(harness, 1))
    assert harness.broker.statistics().topics == 0


async def test_long_poll_of_a_session_that_is_deleted(nursery, autojump_clock):
    """It raises at once; if the session was created again meanwhile, the cursor is a reset."""
    harness = LiveHarness(nursery)
    outcomes = []

    async def run_poll(cursor: str) -> None:
        try:
            outcomes.append((await poll(harness, cursor, wait=30)).resume.status)
        except SessionNotFound:
            outcomes.append("not found")

    for again in (False, True):
        await emit_notes(harness, 1)
        nursery.start_soon(run_poll, await cursor_at(harness, 1))
        await wait_all_tasks_blocked()
        await harness.delete("s")
        if again:
            await emit_notes(harness, 1)
        await wait_all_tasks_blocked()
    assert outcomes == ["not found", "reset"]
    assert trio.current_time() == 0


async def test_drain_ends_long_polls(nursery, autojump_clock):
    """They return at once with what there is, and later ones do not wait."""
    harness = LiveHarness(nursery)
    await emit_notes(harness, 1)
    results = []

    async def run_poll() -> None:
        results.append(await poll(harness, await cursor_at(harness, 1), wait=30))

    nursery.start_soon(run_poll)
    await wait_all_tasks_blocked()
    harness.stopping.set()
    harness.broker.notify_all()
    await wait_all_tasks_blocked()
    await run_poll()
    assert [one.messages for one in results] == [[], []]
    assert trio.current_time() == 0


async def test_watchers_get_control_events(harness):
    """A control request is an event with a cursor, over streams and long-polling."""
    await harness.tracker.update("s", progress=1)
    watcher = await harness.watch()
    await harness.tracker.control("s", Control.PAUSE)
    await wait_all_tasks_blocked()
    assert (watcher.received[-1].event, watcher.received[-1].data) == ("control", {"control": "pause"})
    assert parse_messages(await poll(harness, await cursor_at(harness, 1))) == watcher.received[-1:]
