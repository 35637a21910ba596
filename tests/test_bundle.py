"""Several sessions on one stream: one cursor for all of them, exact for each."""

from __future__ import annotations

import random

import pytest
import trio
from harness import EventStream, HTTP2Client, ServerHarness
from raw_client import connect, get, request_bytes
from trio.testing import wait_all_tasks_blocked

import sseserve

A_B = "/api/streams?session=a&session=b"
THREE = "/api/streams?session=a&session=b&session=c"


@pytest.fixture
async def harness(nursery):
    harness = ServerHarness(nursery)
    for session_id in "abc":
        await harness.tracker.create(session_id)
    return harness


def whose(said):
    return said.data["session_id"]


def progress(said):
    """(session, percent) of the progress among messages."""
    return [(whose(s), s.data["progress"]) for s in said if s.event in ("progress", "complete", "error")]


def forever(messages):
    """What an EventSource dispatches, without the verdicts of coming back."""
    return [s for s in messages if s.event != "resume"]


async def test_it_begins_with_where_each_stands(autojump_clock, harness):
    """A snapshot of each in the order asked for, and then what comes."""
    await harness.tracker.update("a", progress=10)
    await harness.tracker.update("b", progress=20)
    stream = await harness.stream(A_B)
    assert progress(await stream.take(2)) == [("a", 10), ("b", 20)]
    await harness.tracker.update("b", progress=30)
    await harness.tracker.update("a", progress=40)
    assert sorted(progress(await stream.take(2))) == [("a", 40), ("b", 30)]
    await harness.tracker.update("c", progress=1)
    assert await stream.is_silent()


async def test_other_events_say_where_they_come_from(autojump_clock, harness):
    """An event's own data stays as it is, beside its session's id."""
    stream = await harness.stream(A_B)
    await stream.take(2)
    await harness.tracker.emit("b", "note", [1, {"x": None}])
    said = await stream.next()
    assert (said.event, said.data) == ("note", {"session_id": "b", "data": [1, {"x": None}]})


async def test_a_cursor_names_a_place_in_each(autojump_clock, harness):
    """The id behind every message is the joined cursor of what has been said of each session."""
    stream = await harness.stream(A_B)
    first, second = await stream.take(2)
    a, b = [str((await harness.tracker.get(s)).cursor) for s in "ab"]
    assert (first.id, second.id) == (a, f"{a}_{b}")
    await harness.tracker.update("a", progress=1)
    assert (await stream.next()).id == f"{a[:-1]}2_{b}"


async def test_the_end_of_one_is_not_the_end_of_all(autojump_clock, harness):
    """The stream goes on for those that have not ended, and ends with the last."""
    stream = await harness.stream(A_B)
    await stream.take(2)
    await harness.tracker.update("a", status="completed")
    assert (await stream.next()).event == "complete"
    await harness.tracker.update("b", progress=50)
    assert progress([await stream.next()]) == [("b", 50)]
    await harness.tracker.update("b", status="failed")
    (said,) = await stream.read_to_end()
    assert (said.event, whose(said)) == ("error", "b")
    assert (await harness.get(A_B, [("Last-Event-ID", said.id)])).status == 204


async def test_who_has_not_seen_an_end_gets_it(autojump_clock, harness):
    """204 only for who has seen all the ends; without a cursor they come at once, and then the end."""
    for session_id in "ab":
        await harness.tracker.update(session_id, progress=10)
    stream = await harness.stream(A_B)
    cursor = (await stream.take(2))[1].id
    for session_id in "ab":
        await harness.tracker.update(session_id, status="completed")
    assert progress(forever(await harness.watch(A_B, cursor))) == [("a", 100), ("b", 100)]
    assert progress(await harness.watch(A_B)) == [("a", 100), ("b", 100)]


async def test_a_deleted_session_is_said_and_dropped(autojump_clock, harness):
    """The others go on; when it was the last one, the stream ends."""
    stream = await harness.stream(A_B)
    await stream.take(2)
    await harness.app.tracker.delete("a")
    said = await stream.next()
    assert (said.event, said.data) == ("deleted", {"session_id": "a"})
    assert said.id == str((await harness.tracker.get("b")).cursor)
    await harness.tracker.update("b", progress=50)
    assert progress([await stream.next()]) == [("b", 50)]
    await harness.app.tracker.delete("b")
    assert [s.event for s in await stream.read_to_end()] == ["deleted"]


async def test_a_session_that_begins_anew_is_another_one(autojump_clock, harness):
    """Its name is all that the old one leaves to it; who watched the old one is told."""
    stream = await harness.stream(A_B)
    await stream.take(2)
    await harness.app.tracker.delete("a")
    await harness.tracker.update("a", progress=99)
    said = await stream.next()
    assert (said.event, whose(said)) == ("deleted", "a")
    await harness.tracker.update("a", progress=100)
    assert await stream.is_silent()


async def test_who_comes_back_learns_what_is_gone(autojump_clock, harness):
    """A session that was deleted meanwhile is no reason to lose the others (404 stops an EventSource)."""
    stream = await harness.stream(A_B)
    cursor = (await stream.take(2))[1].id
    await stream.disconnect()
    await harness.app.tracker.delete("a")
    await harness.tracker.update("b", progress=50)
    stream = await harness.stream(A_B, cursor)
    said = await stream.take(3)
    assert [s.event for s in said] == ["resume", "progress", "deleted"]
    assert whose(said[2]) == "a"
    await harness.tracker.update("b", status="completed")
    last = await stream.next()
    assert (last.event, whose(last)) == ("complete", "b")
    assert (await harness.get(A_B, [("Last-Event-ID", last.id)])).status == 204


async def test_who_has_seen_the_end_of_one_still_learns_that_the_other_is_gone(autojump_clock, harness):
    """204 comes after the word about the deleted one, and does come."""
    stream = await harness.stream(A_B)
    await stream.take(2)
    await harness.tracker.update("a", status="completed")
    cursor = (await stream.next()).id
    await stream.disconnect()
    await harness.app.tracker.delete("b")
    said = await harness.watch(A_B, cursor)
    assert [(s.event, whose(s)) for s in said] == [("resume", "a"), ("deleted", "b")]
    assert (await harness.get(A_B, [("Last-Event-ID", said[-1].id)])).status == 204


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/api/streams", 422),
        ("/api/streams?session=", 422),
        ("/api/streams?" + "&".join(f"session={n}" for n in range(51)), 422),
        ("/api/streams?session=a&session=none", 404),
        ("/api/streams?session=none", 404),
    ],
)
async def test_what_cannot_be_watched(autojump_clock, harness, target, status):
    """None, too many, or one that was never there."""
    assert (await harness.get(target)).error
    assert (await harness.get(target)).status == status


async def test_one_named_twice_is_one(autojump_clock, harness):
    """Naming a session twice does not double its events."""
    stream = await harness.stream("/api/streams?session=a&session=a")
    await stream.next()
    await harness.tracker.update("a", progress=1)
    await stream.next()
    assert await stream.is_silent()


async def test_heartbeats(autojump_clock, nursery):
    """Every 15 s in silence, or as often as the settings say."""
    for given, expected in (({}, 15), ({"heartbeat": 4}, 4)):
        harness = ServerHarness(nursery, **given)
        await harness.tracker.create("a")
        stream = await harness.stream("/api/streams?session=a")
        await stream.next()
        for _ in range(3):
            before = trio.current_time()
            await stream.connection.read_until(b": heartbeat\n\n")
            assert trio.current_time() - before == pytest.approx(expected)


async def test_a_log_that_does_not_reach_back_is_a_gap(autojump_clock, nursery):
    """What the log no longer holds is counted for its session, and a snapshot stands in for it."""
    harness = ServerHarness(nursery, history_events=3)
    for session_id in "ab":
        await harness.tracker.create(session_id)
    stream = await harness.stream(A_B)
    cursor = (await stream.take(2))[1].id
    await stream.disconnect()
    for percent in range(1, 11):
        await harness.tracker.update("a", progress=percent)
    await harness.tracker.update("b", progress=1)
    said = await (await harness.stream(A_B, cursor)).take(4)
    verdicts = {whose(s): s.data for s in said if s.event == "resume"}
    assert verdicts["a"] == {"session_id": "a", "status": "gap", "missed": 10}
    assert verdicts["b"] == {"session_id": "b", "status": "ok", "missed": 0}
    assert progress(said) == [("a", 10), ("b", 1)]


async def test_sessions_may_be_added(autojump_clock, harness):
    """A cursor without a place for a session: that one begins with its snapshot."""
    cursor = (await (await harness.stream("/api/streams?session=a")).next()).id
    await harness.tracker.update("a", progress=1)
    await harness.tracker.update("b", progress=2)
    said = await (await harness.stream(A_B, cursor)).take(4)
    assert progress(said) == [("a", 1), ("b", 2)]
    assert [s.data["status"] for s in said if s.event == "resume"] == ["ok", "reset"]


# Resume


async def program(harness, rng, count):
    """Random updates and events of three sessions."""
    percent = dict.fromkeys("abc", 0.0)
    for number in range(count):
        session_id = rng.choice("abc")
        if rng.random() < 0.3:
            await harness.tracker.emit(session_id, "note", number)
        else:
            percent[session_id] += 0.1
            await harness.tracker.update(session_id, progress=percent[session_id])
    for session_id in "abc":
        await harness.tracker.update(session_id, status="completed")


def by_session(messages):
    """The messages of each session, without what depends on where they stood on the stream."""
    found = {session_id: [] for session_id in "abc"}
    for said in messages:
        found[whose(said)].append((said.event, said.data))
    return found


@pytest.mark.parametrize("door", ["first request", "second request", "HTTP/2"])
async def test_resume_is_exact_wherever_it_is_cut(autojump_clock, harness, door):
    """Cut behind every single message, whatever its session, and resumed: each session's log, once.

    All three doors give the same.
    """
    cursor = (await (await harness.stream(THREE)).take(3))[-1].id
    await program(harness, random.Random(7), 30)
    expected = by_session(forever(await harness.watch(THREE, cursor)))
    seen = []
    for _ in range(200):
        said = await first_said(harness, door, THREE, cursor)
        if said is None:
            break
        seen.append(said)
        cursor = said.id
    assert len(seen) == 33
    assert by_session(seen) == expected
    notes = [s.data["data"] for s in seen if s.event == "note"]
    assert len(notes) == len(set(notes))


async def first_said(harness, door, target, cursor):
    """Open the stream, take the first message that has a cursor of its own, and leave. None: 204."""
    connection = harness.connect()
    if door == "HTTP/2":
        client = HTTP2Client(connection)
        (number,) = await client.request(target, cursor=cursor)
        await client.read_until(lambda: number in client.ended or forever(client.messages(number)))
        said = forever(client.messages(number))
        assert said or client.statuses[number] == 204
        await connection.stream.aclose()
        return said[0] if said else None
    if door == "second request":
        assert (await connection.request("GET", "/health")).status == 200
    await connection.send(request_bytes("GET", target, headers=[("Last-Event-ID", cursor)]))
    response = await connection.read_head()
    if response.status == 204:
        return None
    stream = EventStream(connection, response)
    while (said := await stream.next()).event == "resume":
        pass
    await stream.disconnect()
    return said


async def test_a_live_stream_and_a_resumed_one_say_the_same(autojump_clock, harness):
    """What comes while one watches is what one gets who comes back."""
    live = await harness.stream(THREE)
    cursor = (await live.take(3))[-1].id
    await program(harness, random.Random(3), 300)
    assert by_session(await live.read_to_end()) == by_session(forever(await harness.watch(THREE, cursor)))


async def test_http2_watches_live(autojump_clock, harness):
    """Through the other door it is live as well, and ends."""
    client = HTTP2Client(harness.connect())
    (number,) = await client.request(A_B)
    await client.read_until(lambda: len(client.messages(number)) == 2)
    await harness.tracker.update("b", progress=5)
    await client.read_until(lambda: len(client.messages(number)) == 3)
    for session_id in "ab":
        await harness.tracker.update(session_id, status="completed")
    await client.read_until(lambda: number in client.ended)
    assert progress(client.messages(number))[2:] == [("b", 5), ("a", 100), ("b", 100)]


@pytest.mark.parametrize("first", [None, "/health"], ids=["first request", "second request"])
async def test_who_leaves_is_noticed_at_once(autojump_clock, harness, first):
    """Nothing is left of a bundle whose client has gone."""
    connection = harness.connect()
    if first:
        await connection.request("GET", first)
    await connection.send(request_bytes("GET", A_B))
    await connection.read_head()
    await wait_all_tasks_blocked()
    assert harness.broker.is_watched("a")
    await connection.stream.aclose()
    await wait_all_tasks_blocked()
    assert not harness.broker.is_watched("a")


async def test_a_drain_tells_it_to_come_back():
    """A server that stops gives it a time to come again, and an ordinary end."""
    async with sseserve.serve(port=0, drain=0.5) as server:
        for session_id in "ab":
            await server.tracker.create(session_id)
        connection = await connect(server.port)
        async with connection.stream:
            await connection.send(request_bytes("GET", A_B))
            stream = EventStream(connection, await connection.read_head())
            await stream.take(2)
            server.stop()
            assert await stream.read_to_end() == []
            assert 500 <= stream.retry <= 1000
            assert connection.ended == "eof"
    with pytest.raises(OSError):
        await get(server.port, "/health")
