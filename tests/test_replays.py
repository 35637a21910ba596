"""Clients that resume from the same place: encoded once, with the guarantees of each one's own read."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
from live_harness import LiveHarness, encoding
from trio.testing import wait_all_tasks_blocked

from sseserve.dialects import Encoding
from sseserve.live.pull_subscriber import PullSubscriber
from sseserve.live.replays import KEEP, MAX_BYTES, Place, Replay
from sseserve.live.resume import PAGE, join
from sseserve.model import Cursor

CLIENTS = 20


@pytest.fixture(params=[False, True], ids=["memory", "slow engine"])
def harness(request, nursery) -> LiveHarness:
    harness = LiveHarness(nursery, history_events=10_000)
    if request.param:
        harness.slow_engine()
    return harness


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many bytes each first write of a replay has, when it is encoded."""
    sizes: list[int] = []
    join = Encoding.join

    def count(self: Encoding, messages: Any) -> bytes:
        data = join(self, messages)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(Encoding, "join", count)
    return sizes


@pytest.fixture
def reads(monkeypatch, harness) -> list[int]:
    """How many events were asked for, by each read of the log."""
    limits: list[int] = []
    read = harness.memory.read

    async def count(session_id: str, after: int, limit: int) -> Any:
        limits.append(limit)
        return await read(session_id, after, limit)

    monkeypatch.setattr(harness.memory, "read", count)
    return limits


async def publish(harness: LiveHarness, number: int, session_id: str = "s") -> str:
    """Publish events; return the cursor before them."""
    if await harness.engine.load(session_id) is None:
        await harness.tracker.create(session_id)
    before = str((await harness.tracker.get(session_id)).cursor)
    for count in range(number):
        await harness.tracker.emit(session_id, "note", count)
    return before


async def test_a_storm_is_encoded_once(harness, encoded, reads):
    """The events of the log are read once, too; every client gets all of them, and what follows."""
    cursor = await publish(harness, 100)
    watchers = [await harness.watch(cursor=cursor) for _ in range(CLIENTS)]
    assert len(encoded) == 1
    assert reads == [PAGE] + [0] * (CLIENTS - 1)
    await publish(harness, 1)
    await wait_all_tasks_blocked()
    for watcher in watchers:
        assert watcher.names == ["resume"] + ["note"] * 101
        assert watcher.raw == watchers[0].raw


async def test_snapshots_are_encoded_once(harness, encoded):
    """As long as the session does not change."""
    await harness.tracker.update("s", progress=1)
    for _ in range(CLIENTS):
        await harness.watch()
    assert len(encoded) == 1
    await harness.tracker.update("s", progress=2)
    late = await harness.watch()
    assert len(encoded) == 2
    assert [message.data["progress"] for message in late.received] == [2]


async def test_each_page_of_a_long_replay_is_encoded_once(harness, encoded):
    """The first one begins with how resuming went, also for a client that is there in the middle."""
    cursor = await publish(harness, 2 * PAGE + 1)
    first = await harness.watch(cursor=cursor)
    second = await harness.watch(cursor=cursor)
    assert len(encoded) == 3
    middle = await harness.watch(cursor=f"{Cursor.parse(cursor).epoch}-{first.seqs[PAGE - 1]}")
    assert len(encoded) == 4  # of its two pages, the second is one of theirs
    assert first.raw == second.raw
    assert first.names == ["resume"] + ["note"] * (2 * PAGE + 1)
    assert middle.names == ["resume"] + ["note"] * (PAGE + 1)


async def test_what_is_published_meanwhile_is_not_missed(harness, encoded):
    """An entry is of no use when the log has grown: its events are read again."""
    cursor = await publish(harness, 3)
    assert len((await harness.watch(cursor=cursor)).seqs) == 3
    await publish(harness, 1)
    late = await harness.watch(cursor=cursor)
    assert len(encoded) == 2
    assert len(late.seqs) == 4
    assert late.names == ["resume"] + ["note"] * 4


async def test_a_log_that_was_trimmed_is_a_gap(nursery):
    """What was encoded before is not sent: the log no longer has it."""
    harness = LiveHarness(nursery, history_events=5)
    cursor = await publish(harness, 4)
    assert (await harness.watch(cursor=cursor)).received[0].data["status"] == "ok"
    await publish(harness, 5)
    assert (await harness.watch(cursor=cursor)).received[0].data["status"] == "gap"


async def test_a_session_that_was_created_again_is_a_reset(harness):
    """It is another log, although its id and its length are the same."""
    cursor = await publish(harness, 4)
    await harness.watch(cursor=cursor)
    await harness.delete("s")
    await publish(harness, 4)
    assert (await harness.watch(cursor=cursor)).received[0].data["status"] == "reset"


async def test_rights_are_checked_for_each_client(harness):
    """On the record that is read for it, whatever has been encoded for others."""
    cursor = await publish(harness, 4)
    await harness.watch(cursor=cursor, connection="pull")
    subscriber = PullSubscriber(harness.broker, encoding("sse"))
    await join(harness.engine, harness.broker, subscriber, "s", cursor, visible=lambda _session: False)
    assert await subscriber.receive() == b"event: deleted\ndata: {}\n\n"
    assert await subscriber.receive() == b""


async def test_encodings_have_entries_of_their_own(harness):
    """What a WebSocket is sent has other bytes."""
    cursor = await publish(harness, 2)
    for connection, protocol in (("socket", "sse"), ("socket", "ws"), ("pull", "sse")):
        watcher = await harness.watch(cursor=cursor, connection=connection, protocol=protocol)
        assert watcher.names == ["resume", "note", "note"]


async def test_entries_are_dropped_after_the_storm(autojump_clock, harness, nursery, encoded):
    """Within twice ``KEEP`` seconds; those that are still used stay."""
    nursery.start_soon(harness.broker.heartbeats.run)
    cursor = await publish(harness, 10)
    await publish(harness, 10, "other")
    await harness.watch("other")
    for _ in range(4):
        await harness.watch(cursor=cursor)
        await trio.sleep(KEEP - 1)
    assert len(encoded) == 2
    assert len(harness.broker.replays) == 1
    await trio.sleep(2 * KEEP)
    assert len(harness.broker.replays) == 0


async def test_entries_are_bounded(harness):
    """Clients that come with many cursors do not fill the memory."""
    replays = harness.broker.replays
    session = await harness.tracker.create("s")
    largest = 0
    for number in range(1000):
        place = Place(encoding("sse"), "s", f"{number}", started=False, replay=False)
        replays.put(place, Replay(session, bytes(30_000), 1, 1))
        kept = [*replays._recent.values(), *replays._older.values()]
        largest = max(largest, sum(len(replay.data) for replay in kept))
    assert MAX_BYTES / 2 < largest <= 2 * MAX_BYTES + 60_000


async def test_the_records_that_entries_hold_are_bounded(harness):
    """An old record with large data is kept by its entry alone, whose own data may be small."""
    replays = harness.broker.replays
    session = await harness.tracker.create("s")
    largest = 0
    for number in range(1000):
        place = Place(encoding("sse"), "s", f"{number}", started=False, replay=False)
        record = msgspec.structs.replace(session, seq=number, data=msgspec.Raw(bytes(30_000)))
        replays.put(place, Replay(record, b"", 1, 1))
        kept = [*replays._recent.values(), *replays._older.values()]
        largest = max(largest, sum(len(bytes(replay.session.data)) for replay in kept))
    assert MAX_BYTES / 2 < largest <= 2 * MAX_BYTES + 60_000
