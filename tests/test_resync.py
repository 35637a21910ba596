"""Events of other instances: delivered as one's own; and what follows when some were not delivered."""

from __future__ import annotations

import msgspec
import pytest
import trio
from harness import FaultyHarness
from test_availability import TRANSPORTS, watch
from trio.testing import wait_all_tasks_blocked

from sseserve.live.topic import Topic

BUNDLE = "/api/streams?session=s&session=t"
LIST = "/api/streams/sessions"


@pytest.fixture
async def harness(nursery):
    harness = FaultyHarness(nursery)
    await harness.tracker.update("s", progress=1)
    return harness


async def lose(harness: FaultyHarness, change) -> None:
    """Make a change on another instance that is not delivered here, and say so."""
    harness.engine.is_deaf = True
    await change()
    harness.engine.is_deaf = False
    harness.engine.resync("s")
    await trio.sleep(2)


def topics(harness) -> list[Topic]:
    return list(harness.broker._topics.values())


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_events_of_other_instances_are_delivered(autojump_clock, harness, transport):
    """In the order of the log, whoever has appended them; an end is counted where it was stored."""
    watcher = await watch(harness, transport)
    await harness.elsewhere.update("s", progress=2)
    await harness.tracker.update("s", progress=3)
    await harness.elsewhere.update("s", status="done")
    await trio.sleep(2)
    assert [(m.event, m.data["progress"]) for m in watcher.received] == [
        ("progress", 1),
        ("progress", 2),
        ("progress", 3),
        ("complete", 100),
    ]
    assert watcher.ended
    metrics = (await harness.get("/metrics")).body.decode()
    assert 'sseserve_sessions_finished_total{state="succeeded"} 0.0' in metrics
    assert "sseserve_events_total 2.0" in metrics


async def test_a_deletion_elsewhere_ends_the_streams_here(autojump_clock, harness):
    watcher = await watch(harness)
    await harness.elsewhere.delete("s")
    await trio.sleep(2)
    assert watcher.take() == ["progress", "deleted"]
    assert watcher.ended


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_who_missed_events_comes_back_for_them(autojump_clock, harness, transport):
    """It gets what was delivered, is asked to reconnect, and then gets the rest: nothing twice."""
    watcher = await watch(harness, transport)

    async def change():
        await harness.elsewhere.update("s", progress=3)
        await harness.elsewhere.update("s", progress=4)

    await harness.tracker.update("s", progress=2)
    await lose(harness, change)
    assert [m.data["progress"] for m in watcher.received] == [1, 2]
    assert watcher.ended
    if transport.endswith("ws"):
        assert watcher.reader.closed.code == 1012
    else:
        assert b"\nretry: " in watcher.reader.raw
    again = await watch(harness, transport, cursor=watcher.cursor)
    assert again.received[0].data == {"status": "ok", "missed": 0}
    assert [m.data["progress"] for m in again.received[1:]] == [3, 4]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_who_comes_back_to_another_log_is_told(autojump_clock, harness, transport):
    """``reset``, and the snapshot of the log as it is now."""
    watcher = await watch(harness, transport)

    async def change():
        await harness.elsewhere.delete("s")
        await harness.elsewhere.update("s", progress=50)

    await lose(harness, change)
    again = await watch(harness, transport, cursor=watcher.cursor)
    assert again.received[0].data == {"status": "reset", "missed": 1}
    assert [m.data["progress"] for m in again.received[1:]] == [50]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_who_comes_back_too_late_is_told(autojump_clock, nursery, transport):
    """``gap``, with the number of events that the log does not hold any more."""
    harness = FaultyHarness(nursery, history_events=2)
    await harness.tracker.update("s", progress=1)
    watcher = await watch(harness, transport)

    async def change():
        for percent in range(2, 12):
            await harness.elsewhere.update("s", progress=percent)

    await lose(harness, change)
    again = await watch(harness, transport, cursor=watcher.cursor)
    assert again.received[0].data == {"status": "gap", "missed": 10}
    assert [m.data["progress"] for m in again.received[1:]] == [11]


async def test_what_waits_is_delivered_first(autojump_clock, harness):
    """All that was published before the loss is known reaches the watcher, in order."""
    watcher = await watch(harness)
    watcher.take()
    for percent in range(2, 300):
        await harness.tracker.update("s", progress=percent / 10 + 1)
    harness.engine.resync("s")
    await harness.tracker.update("s", progress=99)
    await trio.sleep(2)
    assert [m.seq for m in watcher.received] == list(range(2, 300))
    assert watcher.ended


async def test_a_loss_is_told_to_those_of_that_session_only(autojump_clock, harness):
    await harness.tracker.update("t", progress=1)
    other = await watch(harness, target="/api/sessions/t/status/stream")
    await lose(harness, lambda: harness.elsewhere.update("s", progress=2))
    assert not other.ended
    harness.engine.resync("nobody watches this")


@pytest.mark.parametrize("transport", ["sse", "h2"])
async def test_who_joins_in_the_middle_reads_again(autojump_clock, harness, transport):
    """What it has read may be from before the loss, and nobody would deliver the rest."""
    read = harness.engine.memory.read
    is_first = True

    async def read_slowly(*args):
        nonlocal is_first
        page = await read(*args)
        if is_first:
            is_first = False
            await trio.sleep(1)
        return page

    harness.engine.memory.read = read_slowly
    watcher = await watch(harness, transport)
    await lose(harness, lambda: harness.elsewhere.update("s", progress=2))
    await harness.tracker.update("s", progress=3)
    await wait_all_tasks_blocked()
    assert [m.data["progress"] for m in watcher.received] == [2, 3]
    assert not watcher.ended


async def test_who_reads_another_log_before_it_is_delivered_waits_for_it(autojump_clock, harness):
    """The end of the log before it is delivered late, and must not end the stream of the one after it."""
    before = await watch(harness, target="/api/v1/sessions/s/status/stream")
    harness.engine.is_deaf = True
    delivered = []
    harness.engine._listener, listener = None, harness.engine._listener
    harness.engine.deliver = lambda session, events, **_: delivered.append((session, events))
    transcription = "/api/v1/sessions/s/status"
    for status in ("failed", "processing"):  # an attempt has failed, and the next one begins
        await harness.post(transcription, {"status": status, "progress": 5})
    assert len(delivered) == 2
    after = await watch(harness, target="/api/v1/sessions/s/status/stream")
    assert after.received == []
    for session, events in delivered:
        listener.deliver(session, events)
        await trio.sleep(2)
    assert [m.data["status"] for m in before.received] == ["running", "failed"]
    assert [m.data["status"] for m in after.received] == ["processing"]
    assert not after.ended
    harness.engine._listener = listener
    del harness.engine.deliver


async def test_a_log_that_goes_on_under_another_epoch_asks_to_reconnect(autojump_clock, harness):
    """A watcher that has had no event yet, too: the cursors of the two do not compare."""
    watcher = await watch(harness)
    session = await harness.tracker.get("s")
    page = await harness.engine.memory.read("s", 0, 1)
    harness.broker.publish(msgspec.structs.replace(session, epoch="e2", seq=2), page.events)
    await trio.sleep(2)
    assert watcher.take() == ["progress"]
    assert watcher.ended


async def test_a_bundle_reads_on(autojump_clock, harness):
    """It reads the logs anyway; the stream stays open."""
    await harness.tracker.update("t", progress=1)
    watcher = await watch(harness, target=BUNDLE)
    watcher.take()
    await lose(harness, lambda: harness.elsewhere.update("s", progress=2))
    assert [m.data["progress"] for m in watcher.received] == [2]
    assert not watcher.ended


async def test_the_list_shows_what_other_instances_do(autojump_clock, harness):
    """Of all sessions, as long as somebody watches the list, and of none afterwards."""
    watcher = await watch(harness, target=LIST)
    assert watcher.take() == ["snapshot"]
    await harness.elsewhere.update("new", progress=1)
    await trio.sleep(2)
    await harness.elsewhere.delete("s")
    await trio.sleep(2)
    changes = [m.data for m in watcher.received if m.event == "changes"]
    assert [change["created"] for change in changes] == [["new"], []]
    assert [change["removed"] for change in changes] == [[], ["s"]]
    watcher.disconnect()
    await trio.sleep(10)
    assert harness.engine.followed == set()


async def test_the_list_is_sent_again(autojump_clock, harness):
    """As any session may have changed."""
    watcher = await watch(harness, target=LIST)
    assert watcher.take() == ["snapshot"]
    await lose(harness, lambda: harness.elsewhere.update("s", progress=2))
    (snapshot,) = [m.data for m in watcher.received if m.event == "snapshot"]
    assert snapshot["sessions"][0]["progress"] == 2


async def test_a_long_poll_reads_again(autojump_clock, harness):
    cursor = (await harness.tracker.get("s")).cursor
    responses = harness.start_get(f"/api/sessions/s/events?wait=60&after={cursor}")
    await wait_all_tasks_blocked()
    await lose(harness, lambda: harness.elsewhere.update("s", progress=2))
    assert [len(response.json["events"]) for response in responses] == [1]


async def test_nothing_is_left_of_a_topic_without_watchers(autojump_clock, harness):
    """A session that was watched, or polled, when events were lost is not followed for ever."""
    watcher = await watch(harness)
    await lose(harness, lambda: harness.elsewhere.update("s", progress=2))
    assert watcher.ended
    assert topics(harness) == []
    with harness.broker.wakeup("s"):
        harness.engine.resync("s")
    await wait_all_tasks_blocked()
    assert topics(harness) == []
