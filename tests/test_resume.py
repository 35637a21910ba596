"""Joining a session: snapshots, cursors, verdicts, ends; the same for every transport."""

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
from sseserve.live.resume import History, is_complete, join, read_history
from sseserve.live.subscriber import PullSubscriber
from sseserve.model import Control

WAYS = [("socket", "sse"), ("socket", "ws"), ("stream", "sse"), ("pull", "sse"), ("pull", "ws")]
ways = pytest.mark.parametrize(("kind", "protocol"), WAYS)
ENDS = {"done": "complete", "failed": "error", "cancelled": "error", "lost": "error"}


@pytest.fixture(params=[False, True], ids=["memory", "slow engine"])
def harness(request, nursery) -> LiveHarness:
    """A harness, over an engine that never waits and over one that does."""
    harness = LiveHarness(nursery)
    if request.param:
        harness.slow_engine()
    return harness


async def cursor_at(harness: LiveHarness, seq: int) -> str:
    return f"{(await harness.tracker.get('s')).epoch}-{seq}"


async def notes(harness: LiveHarness, number: int) -> None:
    for n in range(number):
        await harness.tracker.emit("s", "note", n)


async def poll(harness: LiveHarness, after: str | None, *, limit: int = 1000, wait: float = 0) -> History:
    return await read_history(
        harness.engine,
        harness.broker,
        SESSIONS,
        "s",
        after=after,
        limit=limit,
        wait=wait,
        stopping=harness.stopping,
    )


def shown(found: History) -> list[Any]:
    """A long-poll's messages as its client reads them."""
    reader = SocketReader()
    return [
        m
        for message in found.messages
        for m in reader.feed(websocket_text(msgspec.json.encode(text_message(message))))
    ]


# Without a cursor


@ways
async def test_a_newcomer_gets_a_snapshot_then_what_comes(harness, kind, protocol):
    """The current progress as an ordinary event with the log's cursor, and every later event once."""
    await harness.tracker.update("s", progress=40)
    await notes(harness, 2)
    watcher = await harness.watch(protocol=protocol, connection=kind)
    (snapshot,) = watcher.received
    assert (snapshot.event, snapshot.seq, snapshot.data["progress"]) == ("progress", 3, 40)
    await notes(harness, 2)
    await wait_all_tasks_blocked()
    assert (watcher.names, watcher.seqs) == (["progress", "note", "note"], [3, 4, 5])


@ways
async def test_without_progress_a_newcomer_gets_the_cursor_alone(harness, kind, protocol):
    """Nothing to show, but a place to come back to."""
    await notes(harness, 2)
    watcher = await harness.watch(protocol=protocol, connection=kind)
    assert watcher.cursor == await cursor_at(harness, 2)
    if protocol == "sse":
        assert watcher.raw == HEAD + f"id: {await cursor_at(harness, 2)}\n\n".encode()


@ways
@pytest.mark.parametrize("label", ENDS)
async def test_who_comes_late_gets_the_end_at_once(harness, kind, protocol, label):
    """As a snapshot, and then the stream is over."""
    await harness.tracker.update("s", progress=40)
    await harness.tracker.update("s", status=label)
    watcher = await harness.watch(protocol=protocol, connection=kind)
    assert (watcher.names, watcher.seqs, watcher.ended) == ([ENDS[label]], [2], True)
    assert harness.broker.statistics().topics == 0


@ways
@pytest.mark.parametrize("label", ENDS)
async def test_who_is_there_gets_the_end(harness, kind, protocol, label):
    """Live, behind everything else, and then the stream is over."""
    await harness.tracker.update("s", progress=40)
    watcher = await harness.watch(protocol=protocol, connection=kind)
    await notes(harness, 3)
    await harness.tracker.update("s", status=label)
    await wait_all_tasks_blocked()
    assert watcher.names == ["progress", "note", "note", "note", ENDS[label]]
    assert watcher.ended
    assert harness.broker.statistics().topics == 0
    if protocol == "ws":
        assert (watcher.reader.closed.code, watcher.reader.closed.reason) == (1000, "ended")


# With a cursor


@ways
async def test_a_good_cursor_goes_on_where_it_stopped(harness, kind, protocol):
    """The verdict first, then every event behind the cursor, then what comes."""
    await notes(harness, 5)
    watcher = await harness.watch(cursor=await cursor_at(harness, 2), protocol=protocol, connection=kind)
    await harness.tracker.emit("s", "note", 5)
    await wait_all_tasks_blocked()
    verdict, *events = watcher.received
    assert (verdict.event, verdict.id, verdict.data) == ("resume", None, {"status": "ok", "missed": 0})
    assert [(event.seq, event.data) for event in events] == [(3, 2), (4, 3), (5, 4), (6, 5)]


@ways
async def test_a_cursor_at_the_end_of_the_log_gets_no_more(harness, kind, protocol):
    """But the verdict, and what comes."""
    await notes(harness, 2)
    watcher = await harness.watch(cursor=await cursor_at(harness, 2), protocol=protocol, connection=kind)
    assert watcher.names == ["resume"]
    await notes(harness, 1)
    await wait_all_tasks_blocked()
    assert watcher.seqs == [3]


@ways
async def test_a_log_that_no_longer_reaches_back_is_a_gap(nursery, kind, protocol):
    """How many are missed, the current snapshot, and on from there."""
    harness = LiveHarness(nursery, history_events=3)
    await harness.tracker.update("s", progress=40)
    await notes(harness, 5)
    watcher = await harness.watch(cursor=await cursor_at(harness, 2), protocol=protocol, connection=kind)
    verdict, snapshot = watcher.received
    assert verdict.data == {"status": "gap", "missed": 4}
    assert (snapshot.event, snapshot.seq, snapshot.data["progress"]) == ("progress", 6, 40)
    ok = await harness.watch(cursor=await cursor_at(harness, 3), protocol=protocol, connection=kind)
    assert (ok.received[0].data["status"], ok.seqs) == ("ok", [4, 5, 6])
    await notes(harness, 1)
    await wait_all_tasks_blocked()
    assert (watcher.seqs, ok.seqs) == ([6, 7], [4, 5, 6, 7])


@ways
@pytest.mark.parametrize("cursor", ["other-1", "nonsense", "{epoch}-3", "{epoch}-1.x", "-1"])
async def test_a_cursor_of_another_log_is_a_reset(harness, kind, protocol, cursor):
    """Another epoch, a place that does not exist yet, or no cursor at all."""
    await harness.tracker.update("s", progress=40)
    await notes(harness, 1)
    cursor = cursor.format(epoch=(await harness.tracker.get("s")).epoch)
    watcher = await harness.watch(cursor=cursor, protocol=protocol, connection=kind)
    verdict, snapshot = watcher.received
    assert verdict.data == {"status": "reset", "missed": 2}
    assert (snapshot.event, snapshot.seq) == ("progress", 2)


async def test_long_polls_judge_alike(nursery):
    """The same verdicts, messages and cursors as a stream, for every cursor of a trimmed log."""
    harness = LiveHarness(nursery, history_events=3)
    await harness.tracker.update("s", progress=40)
    await notes(harness, 5)
    for cursor in [*[await cursor_at(harness, seq) for seq in range(9)], "other-1", "nonsense"]:
        stream = await harness.watch(cursor=cursor, protocol="ws")
        found = await poll(harness, cursor)
        assert msgspec.to_builtins(found.resume) == stream.received[0].data
        assert shown(found) == stream.received[1:]
        assert found.next == stream.cursor


@ways
async def test_a_client_may_change_its_transport(harness, kind, protocol):
    """SSE, WebSocket, long-poll and back, by cursor, in the middle of the work: exactly the log."""
    await harness.tracker.create("s")
    seen, cursor = [], await cursor_at(harness, 0)
    for number in range(8):
        if number % 2:
            found = await poll(harness, cursor, limit=2)
            seen += shown(found)
            cursor = found.next
        else:
            watcher = await harness.watch(cursor=cursor, protocol=protocol, connection=kind)
            await notes(harness, 3)
            await wait_all_tasks_blocked()
            watcher.disconnect()
            await notes(harness, 2)
            seen += watcher.events
            cursor = watcher.cursor
    seen += shown(await poll(harness, cursor))
    assert [message.seq for message in seen] == list(range(1, len(await harness.log("s")) + 1))


# Long replays


@ways
async def test_a_long_replay_has_no_seams(harness, kind, protocol):
    """Events that come while its pages go out follow them, in order, once; there is one verdict."""
    await notes(harness, 500)
    cursor = await cursor_at(harness, 1)
    watcher = await harness.watch(cursor=cursor, protocol=protocol, connection=kind, stalled=True)
    await notes(harness, 100)
    await wait_all_tasks_blocked()
    watcher.unstall()
    await wait_all_tasks_blocked()
    await notes(harness, 3)
    await wait_all_tasks_blocked()
    assert watcher.names.count("resume") == 1
    assert watcher.seqs == list(range(2, 604))


@ways
async def test_a_log_trimmed_under_a_long_replay(nursery, kind, protocol):
    """The client is told of the gap where it comes, and goes on from a snapshot: never a hole in silence."""
    harness = LiveHarness(nursery, history_events=400)
    await harness.tracker.update("s", progress=40)
    await notes(harness, 399)
    watcher = await harness.watch(
        cursor=await cursor_at(harness, 1), protocol=protocol, connection=kind, stalled=True
    )
    await notes(harness, 1000)
    await wait_all_tasks_blocked()
    watcher.unstall()
    await wait_all_tasks_blocked()
    await notes(harness, 1)
    await wait_all_tasks_blocked()
    first, second = [seen.data for seen in watcher.received if seen.event == "resume"]
    assert first == {"status": "ok", "missed": 0}
    assert second["status"] == "gap"
    at = watcher.names.index("resume", 1)
    before, after = watcher.seqs[: at - 1], watcher.seqs[at - 1 :]
    assert before == list(range(2, before[-1] + 1))
    assert second["missed"] == 1400 - before[-1]
    assert after == [1400, 1401]
    assert watcher.received[at + 1].event == "progress"


async def test_a_replay_waits_for_its_client(nursery, autojump_clock):
    """A page at a time, at the client's pace; one that takes nothing is given up at send_timeout."""
    harness = LiveHarness(nursery, send_timeout=5)
    await harness.tracker.update("s", progress=1)
    for _ in range(1000):
        await harness.tracker.emit("s", "note", "x" * 100)
    for kind in ("stream", "pull"):
        started = trio.current_time()
        watcher = await harness.watch(cursor=await cursor_at(harness, 1), connection=kind, stalled=True)
        assert watcher.subscriber.backlog[1] < 128 * 200
        while not watcher.subscriber.ending:
            await trio.sleep(0.1)
        assert trio.current_time() - started == pytest.approx(4.8, abs=0.4)
        watcher.disconnect()


# Joins and other things at the same time


program = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(1, 200)),
        st.tuples(st.just("join"), st.integers(0, 400)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    min_size=2,
    max_size=12,
)


async def joins(slow: bool, steps: list[tuple[str, int]]) -> None:
    async with trio.open_nursery() as nursery:
        harness = LiveHarness(nursery)
        if slow:
            harness.slow_engine()
        await harness.tracker.create("s")
        watchers = []
        for name, number in steps:
            if name == "publish":
                await notes(harness, number)
            elif name == "join":
                seq = min(number, (await harness.tracker.get("s")).seq)
                way = WAYS[len(watchers) % len(WAYS)]
                nursery.start_soon(_join, harness, await cursor_at(harness, seq), way, watchers)
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


async def _join(harness: LiveHarness, cursor: str, way: tuple[str, str], watchers: list[Any]) -> None:
    watchers.append(await harness.watch(cursor=cursor, connection=way[0], protocol=way[1]))


@settings(max_examples=60, deadline=None)
@given(st.booleans(), program)
def test_joins_during_fan_out(slow, steps):
    """Whenever a client joins, in whatever state the topic is: every event behind its cursor, once."""
    run(joins, slow, steps)


@ways
async def test_a_session_deleted_under_its_watchers(harness, kind, protocol):
    """They are told, behind everything before it, and their streams end; nothing is left of it."""
    await harness.tracker.update("s", progress=1)
    watcher = await harness.watch(protocol=protocol, connection=kind)
    await notes(harness, 3)
    await wait_all_tasks_blocked()
    await harness.delete("s")
    await wait_all_tasks_blocked()
    assert watcher.names[1:] == ["note"] * 3 + ["deleted"]
    assert watcher.ended
    assert harness.broker.statistics().topics == harness.broker.statistics().subscribers == 0


@ways
async def test_a_session_that_begins_again(harness, kind, protocol):
    """The watchers of its last life are ended; with their cursor they get a reset and the new life."""
    await harness.tracker.update("s", progress=90)
    watcher = await harness.watch(protocol=protocol, connection=kind)
    await harness.delete("s")
    await harness.tracker.create("s")
    await harness.tracker.update("s", progress=5)
    fresh = await harness.watch(protocol=protocol, connection=kind)
    await wait_all_tasks_blocked()
    assert (watcher.names, watcher.ended) == (["progress", "deleted"], True)
    again = await harness.watch(cursor=watcher.cursor, protocol=protocol, connection=kind)
    assert again.received[0].data == {"status": "reset", "missed": 2}
    for one in (fresh, again):
        assert one.events[0].data["progress"] == 5
    await notes(harness, 1)
    await wait_all_tasks_blocked()
    assert fresh.seqs == again.seqs == [2, 3]


@ways
@pytest.mark.parametrize("end", ["deleted", "drained"])
async def test_the_head_comes_first_whatever_ends_a_join(nursery, kind, protocol, end):
    """The head of a response goes out before a farewell, even if the engine was still looking."""
    harness = LiveHarness(nursery)
    harness.slow_engine()
    await harness.tracker.create("s")
    watcher = Watcher(harness, "s", None, protocol, kind)
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
@pytest.mark.parametrize("behind", [0, 3])
async def test_a_join_between_the_log_and_its_fan_out(nursery, before, behind):
    """What is in the log already and still to be fanned out comes once: from the log."""
    harness = LiveHarness(nursery)
    await harness.tracker.create("s")
    await harness.watch(connection="pull")  # so that there is something to fan out to
    await notes(harness, before)
    subscriber = PullSubscriber(harness.broker, encoding("sse"))
    await join(harness.memory, harness.broker, subscriber, "s", await cursor_at(harness, 1))
    assert subscriber.live
    await notes(harness, behind)
    await wait_all_tasks_blocked()
    seen = SSEReader().feed(await subscriber.receive())
    assert [message.seq for message in seen[1:]] == list(range(2, 2 + before + behind))
    subscriber.abort()


async def test_a_reader_that_left_before_its_join(harness):
    """Is not on the topic for ever."""
    await harness.tracker.create("s")
    subscriber = PullSubscriber(harness.broker, encoding("sse"))
    subscriber.abort()
    await join(harness.engine, harness.broker, subscriber, "s", None)
    assert harness.broker.statistics().topics == harness.broker.statistics().subscribers == 0


@ways
async def test_nothing_follows_a_farewell(nursery, kind, protocol):
    """Not even the rest of a long replay, if the end comes while the engine looks for it."""
    harness = LiveHarness(nursery)
    harness.slow_engine()
    await notes(harness, 500)
    watcher = Watcher(harness, "s", await cursor_at(harness, 1), protocol, kind)
    nursery.start_soon(watcher.run)
    while not harness.broker.is_watched("s"):
        await trio.lowlevel.checkpoint()
    (subscriber,) = harness.broker.subscribers()
    subscriber.end(subscriber.encoding.message(Message("drained", b"{}")))
    await wait_all_tasks_blocked()
    assert (watcher.names, watcher.ended) == (["drained"], True)


async def test_resume_what_does_not_exist(harness):
    """A stream is ended with a word, a long-poll is an error; nothing is left of either."""
    watcher = await harness.watch()
    assert (watcher.names, watcher.ended) == (["deleted"], True)
    with pytest.raises(SessionNotFound):
        await poll(harness, None)
    assert harness.broker.statistics().topics == 0


async def test_a_dialect_that_waits(harness):
    """Its stream is opened before there is a session, and gets it from its first event on."""
    early = await harness.watch(dialect=INTERACTION)
    assert early.raw == HEAD
    late = Watcher(harness, "s", None, "sse", "socket", INTERACTION)
    harness.nursery.start_soon(late.run)
    while late.subscriber is None or late.subscriber.topic is None:
        await trio.lowlevel.checkpoint()
    await notes(harness, 3)  # the late one may still be looking
    await wait_all_tasks_blocked()
    assert [seen.data for seen in early.received] == [0, 1, 2]
    assert late.reader.cursor == early.reader.cursor
    assert late.seqs in ([], [1, 2, 3])
    await notes(harness, 1)
    await wait_all_tasks_blocked()
    assert early.seqs[-1:] == late.seqs[-1:] == [4]


# The end of it


async def test_who_has_seen_the_end_has_seen_everything(harness):
    """``over`` is what 204 answers: at the end, of this life, and only when there is an end."""
    await harness.tracker.update("s", progress=1)
    session = await harness.tracker.get("s")
    assert not is_complete(session, str(session.cursor))
    await harness.tracker.update("s", status="done")
    session = await harness.tracker.get("s")
    assert is_complete(session, f"{session.epoch}-2")
    for cursor in (None, "", f"{session.epoch}-1", f"{session.epoch}-2.1", "other-2", "nonsense"):
        assert not is_complete(session, cursor)


@ways
async def test_an_event_source_comes_to_an_end(harness, kind, protocol):
    """Whatever cursor it comes back with, after its next stream it has seen everything."""
    await harness.tracker.update("s", progress=1)
    await notes(harness, 2)
    await harness.tracker.update("s", status="done")
    session = await harness.tracker.get("s")
    for cursor in (None, *[await cursor_at(harness, seq) for seq in range(4)], "other-9", "nonsense"):
        watcher = await harness.watch(cursor=cursor, protocol=protocol, connection=kind)
        assert watcher.names[-1] == "complete"
        assert watcher.ended
        assert is_complete(session, watcher.cursor)


# Long-poll


async def test_a_long_poll_pages_through_the_log(harness):
    """From its beginning without a cursor, so many at a time; ``end`` when nothing follows."""
    await notes(harness, 5)
    first = await poll(harness, None, limit=3)
    assert (first.resume, [seen.seq for seen in shown(first)], first.end) == (None, [1, 2, 3], False)
    assert first.next == await cursor_at(harness, 3)
    second = await poll(harness, first.next, limit=3)
    assert ([seen.seq for seen in shown(second)], second.end) == ([4, 5], False)
    await harness.tracker.update("s", status="done")
    third = await poll(harness, second.next)
    assert ([seen.event for seen in shown(third)], third.end) == (["complete"], True)
    last = await poll(harness, third.next, wait=60)
    assert (last.messages, last.next, last.end) == ([], third.next, True)
    assert last.resume.status == "ok"


async def test_a_long_poll_of_a_log_that_fits_exactly(harness):
    """``end`` only with the last event, not with a page that is full."""
    await notes(harness, 2)
    await harness.tracker.update("s", status="done")
    assert not (await poll(harness, None, limit=2)).end
    assert (await poll(harness, None, limit=3)).end


async def test_a_long_poll_waits_for_what_comes(nursery, autojump_clock):
    """It is answered when there is something, not before, and not much later."""
    harness = LiveHarness(nursery)
    await notes(harness, 1)
    answers = []

    async def ask() -> None:
        answers.append((await poll(harness, await cursor_at(harness, 1), wait=30), trio.current_time()))

    nursery.start_soon(ask)
    await trio.sleep(10)
    assert not answers
    await notes(harness, 1)
    await wait_all_tasks_blocked()
    ((found, at),) = answers
    assert ([seen.seq for seen in shown(found)], at) == ([2], 10)
    assert harness.broker.statistics().topics == 0


@pytest.mark.parametrize("cursor", [None, "other-1"])
async def test_a_long_poll_that_has_something_does_not_wait(nursery, autojump_clock, cursor):
    """Without a cursor, and with a stale one, there is something at once."""
    harness = LiveHarness(nursery)
    await harness.tracker.update("s", progress=1)
    found = await poll(harness, cursor, wait=30)
    assert (trio.current_time(), len(found.messages)) == (0, 1)


async def test_a_long_poll_misses_nothing_while_it_looks(nursery, autojump_clock):
    """An event that comes while the engine looks is answered at once, not when the time is over."""
    harness = LiveHarness(nursery)
    harness.slow_engine()
    await notes(harness, 1)
    for delay in range(8):
        cursor = str((await harness.tracker.get("s")).cursor)
        async with trio.open_nursery() as asking:

            async def ask(cursor: str = cursor) -> None:
                found = await poll(harness, cursor, wait=30)
                assert len(found.messages) == 1

            asking.start_soon(ask)
            for _ in range(delay):
                await trio.lowlevel.checkpoint()
            await notes(harness, 1)
    assert trio.current_time() == 0


async def test_a_long_poll_has_its_time(nursery, autojump_clock):
    """When it is over, the answer is empty, and the cursor as it was."""
    harness = LiveHarness(nursery)
    await notes(harness, 1)
    found = await poll(harness, await cursor_at(harness, 1), wait=30)
    assert (trio.current_time(), found.messages, found.next) == (30, [], await cursor_at(harness, 1))
    assert harness.broker.statistics().topics == 0


async def test_pollers_of_a_session_that_is_deleted(nursery, autojump_clock):
    """They are told at once; if it has begun again meanwhile, that their cursor is stale."""
    harness = LiveHarness(nursery)
    outcomes = []

    async def ask(cursor: str) -> None:
        try:
            outcomes.append((await poll(harness, cursor, wait=30)).resume.status)
        except SessionNotFound:
            outcomes.append("not found")

    for again in (False, True):
        await notes(harness, 1)
        nursery.start_soon(ask, await cursor_at(harness, 1))
        await wait_all_tasks_blocked()
        await harness.delete("s")
        if again:
            await notes(harness, 1)
        await wait_all_tasks_blocked()
    assert outcomes == ["not found", "reset"]
    assert trio.current_time() == 0


async def test_a_drain_wakes_the_pollers(nursery, autojump_clock):
    """They are answered with what there is, and nobody waits any more."""
    harness = LiveHarness(nursery)
    await notes(harness, 1)
    found = []

    async def ask() -> None:
        found.append(await poll(harness, await cursor_at(harness, 1), wait=30))

    nursery.start_soon(ask)
    await wait_all_tasks_blocked()
    harness.stopping.set()
    harness.broker.notify_all()
    await wait_all_tasks_blocked()
    await ask()
    assert [one.messages for one in found] == [[], []]
    assert trio.current_time() == 0


async def test_a_control_event_is_an_event_as_any(harness):
    """Watchers see what is asked of the worker, with a cursor, by every transport."""
    await harness.tracker.update("s", progress=1)
    watcher = await harness.watch()
    await harness.tracker.control("s", Control.PAUSE)
    await wait_all_tasks_blocked()
    assert (watcher.received[-1].event, watcher.received[-1].data) == ("control", {"control": "pause"})
    assert shown(await poll(harness, await cursor_at(harness, 1))) == watcher.received[-1:]
