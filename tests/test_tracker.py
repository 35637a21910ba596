"""The tracker: sessions, events, control requests, leases, and concurrent writers."""

from __future__ import annotations

import itertools

import msgspec
import pytest
import trio

from sseserve.config import Settings
from sseserve.engines import EngineListener, Stale
from sseserve.engines.memory import MemoryEngine
from sseserve.errors import (
    Conflict,
    Invalid,
    InvalidProgress,
    SessionEnded,
    SessionExists,
    SessionNotFound,
    Unavailable,
)
from sseserve.model import Artifact, Control, Receipt, State
from sseserve.progress.rules import Update
from sseserve.progress.tracker import IdempotencyKey, Tracker


class Clock:
    """A clock that changes only when a test sets ``now``."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine() -> MemoryEngine:
    return MemoryEngine(Settings(), EngineListener())


@pytest.fixture
def tracker(engine: MemoryEngine, clock: Clock) -> Tracker:
    return Tracker(engine, reserved={"progress", "resume", "overflow"}, clock=clock, monotonic=clock)


async def events_of(tracker: Tracker, session_id: str = "s"):
    page = await tracker.engine.read(session_id, 0, 10_000)
    assert page is not None
    return page.events


# Conflatable events


@pytest.mark.parametrize(
    ("update", "conflatable"),
    [
        (Update(progress=50), True),
        (Update(message="on"), True),
        (Update(data=msgspec.Raw(b"1")), True),
        (Update(data=msgspec.Raw(b'"%s"' % (b"x" * 5000))), True),
        (Update(stage="visuals", data=msgspec.Raw(b'"%s"' % (b"x" * 5000))), False),
        (Update(), True),
        (Update(status="running"), True),
        (Update(stage="tts"), True),
        (Update(status="crunching"), False),
        (Update(status="paused"), False),
        (Update(stage="visuals"), False),
        (Update(error="e"), False),
        (Update(artifacts=(Artifact("a"),)), False),
        (Update(restart=True), False),
        (Update(retry=1000), False),
        (Update(status="done"), False),
    ],
)
async def test_only_changed_amounts_are_conflatable(tracker, update, conflatable):
    """An update that changes anything else is delivered to every client."""
    await tracker.update("s", progress=40, stage="tts")
    await tracker.apply("s", update)
    first, second = await events_of(tracker)
    assert not first.conflatable
    assert second.conflatable is conflatable


async def test_other_events_are_not_conflatable(tracker):
    """The publisher's own events and control events are never dropped."""
    await tracker.emit("s", "note", 1)
    await tracker.control("s", Control.PAUSE)
    assert [event.conflatable for event in await events_of(tracker)] == [False, False]


# Sessions


async def test_create_and_get(tracker, clock):
    """A created session is queued, has one event, and keeps every field that was given."""
    session = await tracker.create("s", owner="o", viewers=["v"], title="t", ttl=5, data=msgspec.Raw(b"1"))
    assert session == await tracker.get("s")
    assert (session.seq, session.owner, session.viewers, session.title, session.ttl) == (
        1,
        "o",
        ("v",),
        "t",
        5,
    )
    assert (session.created_at, session.control, session.ended) == (clock.now, Control.CONTINUE, False)
    (event,) = await events_of(tracker)
    assert (event.seq, event.type, event.progress.state) == (1, "progress", State.QUEUED)


async def test_duplicate_id_is_rejected(tracker):
    """An id in use is rejected and its session unchanged; without an id each session gets a new one."""
    before = await tracker.create("s")
    with pytest.raises(SessionExists):
        await tracker.create("s", title="mine")
    assert await tracker.get("s") == before
    assert (await tracker.create()).id != (await tracker.create()).id


@pytest.mark.parametrize(
    "session_id",
    ["", ".", "..", "x" * 129, "a b", "a/b", "a\\b", "a?b", "a#b", "a%b", 'a"b', "a\nb", "a\0", "\ud800"],
)
async def test_invalid_session_id(tracker, session_id):
    """Ids with characters that a URL or a log line would interpret are rejected by every operation."""
    for call in (tracker.create(session_id), tracker.update(session_id), tracker.emit(session_id, "note")):
        with pytest.raises(Invalid):
            await call
    assert await tracker.sessions() == []


@pytest.mark.parametrize("session_id", ["x", "x" * 128, "job:1.2_3-4~", "é", "ジョブ"])
async def test_valid_session_id(tracker, session_id):
    """Printable characters of any script are accepted."""
    assert (await tracker.create(session_id)).id == session_id


async def test_auto_create(engine, clock):
    """The first update or event creates a session; without auto_create it raises and changes nothing."""
    strict = Tracker(engine, auto_create=False, clock=clock)
    for call in (strict.update("s"), strict.emit("s", "note")):
        with pytest.raises(SessionNotFound):
            await call
    assert await engine.count() == 0
    await Tracker(engine, clock=clock).emit("s", "note")
    assert (await strict.get("s")).progress is None
    await strict.update("s", progress=1)


async def test_session_limit(engine, clock):
    """At max_sessions no operation creates another session; existing sessions can still be updated."""
    tracker = Tracker(engine, max_sessions=1, clock=clock)
    await tracker.create("s")
    for call in (tracker.create("t"), tracker.update("t"), tracker.emit("t", "note")):
        with pytest.raises(Unavailable):
            await call
    await tracker.update("s", progress=1)
    await tracker.delete("s")
    await tracker.create("t")


async def test_unknown_session_is_not_found(tracker):
    """Reading, controlling and deleting never create a session."""
    for call in (tracker.get("s"), tracker.control("s", Control.PAUSE), tracker.delete("s")):
        with pytest.raises(SessionNotFound):
            await call
    assert await tracker.sessions() == []


async def test_recreated_session_has_another_epoch(tracker):
    """A cursor of the deleted session is therefore recognized as stale."""
    before = await tracker.create("s")
    await tracker.delete("s")
    assert (await tracker.create("s")).epoch != before.epoch


async def test_sessions_by_state(tracker):
    """The newest comes first; a session without progress counts as queued."""
    await tracker.create("a")
    await tracker.update("b", progress=1)
    await tracker.emit("c", "note")
    assert [session.id for session in await tracker.sessions()] == ["c", "b", "a"]
    assert [session.id for session in await tracker.sessions(State.QUEUED)] == ["c", "a"]
    assert [session.id for session in await tracker.sessions(State.RUNNING)] == ["b"]


async def test_large_data_does_not_push_out_the_log(clock):
    """Small updates after large data take what they are, not what the data is."""
    engine = MemoryEngine(Settings(), EngineListener())
    tracker = Tracker(engine, clock=clock)
    await tracker.update("s", progress=0, data="x" * 1_000_000)
    for percent in range(1, 11):
        await tracker.update("s", progress=percent)
    events = await events_of(tracker)
    assert [event.progress.percent for event in events] == list(range(11))
    assert sum(event.weight for event in events) < 1_010_000
    assert bytes((await tracker.get("s")).progress.data) == b'"%s"' % (b"x" * 1_000_000)


# Events


@pytest.mark.parametrize(
    "name", ["", "x" * 129, "a\rb", "a\nb", "a\0b", "\ud800", "progress", "resume", "overflow"]
)
async def test_invalid_event_type(tracker, name):
    """Types that would break the framing or are reserved for the server are rejected."""
    await tracker.create("s")
    with pytest.raises(Invalid):
        await tracker.emit("s", name)
    assert len(await events_of(tracker)) == 1


@pytest.mark.parametrize("retry", [-1, 86_400_001])
async def test_retry_is_limited(tracker, retry):
    """A retry time outside 0 ms to one day is rejected."""
    with pytest.raises(Invalid):
        await tracker.emit("s", "note", retry=retry)


async def test_ended_session_rejects_changes(tracker):
    """Events, progress and control requests raise, and the log is unchanged."""
    await tracker.update("s", status="done")
    for call in (
        tracker.emit("s", "note"),
        tracker.update("s", progress=1),
        tracker.control("s", Control.CANCEL, force=True),
    ):
        with pytest.raises(SessionEnded):
            await call
    assert len(await events_of(tracker)) == 1


@pytest.mark.parametrize("text", [b'{"a":\n1}', b'{"a":\r\n1}', b"[1,\r2]"])
async def test_data_is_kept_on_one_line(tracker, text):
    """Line breaks between JSON tokens are removed, however the data arrives."""
    raw = msgspec.Raw(text)
    await tracker.create("s", data=raw)
    await tracker.emit("s", "note", raw)
    await tracker.apply("s", Update(data=raw))
    created, note, progress = await events_of(tracker)
    for kept in (created.progress.data, note.data, progress.progress.data):
        assert b"\n" not in bytes(kept)
        assert b"\r" not in bytes(kept)
        assert msgspec.json.decode(kept) == msgspec.json.decode(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"message": "\ud800.wav"},
        {"stage": "\ud800"},
        {"error": {"why": "\ud800"}},
        {"error": {"why": object()}},
        {"artifacts": [Artifact("\ud800")]},
        {"data": {"why": object()}},
    ],
)
async def test_unencodable_values_are_rejected(tracker, fields):
    """For example a file name that is not UTF-8: no client could receive it."""
    await tracker.create("s")
    with pytest.raises(Invalid, match="cannot be written as JSON"):
        await tracker.update("s", **fields)
    assert len(await events_of(tracker)) == 1


async def test_updates_yield_to_other_tasks(tracker):
    """A producer in the same process that awaits nothing but its updates does not block other tasks."""
    ran = []

    async def other() -> None:
        ran.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(3):
            await tracker.update("s", progress=1)
        assert ran


async def test_cancelled_update_has_no_effect(tracker):
    """A cancelled update changes nothing."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await tracker.update("s", progress=1)
    assert scope.cancelled_caught
    assert await tracker.sessions() == []


# Control


async def test_control_is_in_each_receipt(tracker):
    """Each receipt has the current control request, until another one is made."""
    assert (await tracker.update("s", progress=1)).control is Control.CONTINUE
    await tracker.control("s", Control.PAUSE)
    assert (await tracker.update("s", progress=2)).control is Control.PAUSE
    await tracker.control("s", Control.CONTINUE)
    assert (await tracker.emit("s", "note")).control is Control.CONTINUE
    requests = [bytes(event.data) for event in await events_of(tracker) if event.type == "control"]
    assert requests == [b'{"control":"pause"}', b'{"control":"continue"}']


async def test_repeated_control_request(tracker):
    """A control request that is already in force adds no event."""
    await tracker.update("s", progress=1)
    first = await tracker.control("s", Control.PAUSE)
    assert await tracker.control("s", Control.PAUSE) == first


async def test_cancel_request_is_final(tracker):
    """It cannot be withdrawn, and the session ends only when the worker reports it."""
    await tracker.update("s", progress=1)
    assert not (await tracker.control("s", Control.CANCEL)).ended
    for control in (Control.PAUSE, Control.CONTINUE):
        with pytest.raises(Conflict):
            await tracker.control("s", control)
    await tracker.update("s", status="cancelled")
    assert (await tracker.get("s")).ended


async def test_queued_session_is_cancelled_at_once(tracker):
    """A running session is cancelled at once only with ``force``."""
    await tracker.create("s")
    assert (await tracker.control("s", Control.CANCEL)).progress.state is State.CANCELLED
    await tracker.update("t", progress=1)
    await tracker.control("t", Control.CANCEL)
    assert (await tracker.control("t", Control.CANCEL, force=True)).progress.state is State.CANCELLED


# Leases


async def test_expired_lease_stalls_then_loses(tracker, clock):
    """After one lease time the session is stalled, once; after three it is lost, which ends it."""
    await tracker.create("s", lease=10)
    for seconds, types in [(10, []), (11, ["stalled"]), (30, ["stalled"]), (31, ["stalled", "progress"])]:
        clock.now = 1_700_000_000.0 + seconds
        await tracker.check_leases()
        assert [event.type for event in await events_of(tracker)][1:] == types
    assert (await tracker.get("s")).progress.state is State.LOST
    await tracker.check_leases()
    assert len(await events_of(tracker)) == 3


async def test_only_updates_renew_the_lease(tracker, clock):
    """Updates renew it and control requests do not; after an update the session can stall again."""
    await tracker.create("s", lease=10)
    clock.now += 11
    await tracker.check_leases()
    await tracker.update("s", progress=1)
    assert not (await tracker.get("s")).stalled
    clock.now += 10
    await tracker.check_leases()
    await tracker.control("s", Control.PAUSE)
    clock.now += 1
    await tracker.check_leases()
    types = [event.type for event in await events_of(tracker)]
    assert types == ["progress", "stalled", "progress", "control", "stalled"]


# Races


class RacingEngine(MemoryEngine):
    """Another writer appends first, ``races`` times."""

    races = 0

    async def append(self, session, events, **more):
        if self.races:
            self.races -= 1
            other = Tracker(MemoryEngine(Settings(), EngineListener()))
            other.engine = self
            races, self.races = self.races, 0
            await other.emit(session.id, "other", races)
            self.races = races
        await super().append(session, events, **more)


async def test_stale_update_is_retried():
    """An update that lost a race is evaluated again on the new state; both writers' events are in the log."""
    engine = RacingEngine(Settings(), EngineListener())
    tracker = Tracker(engine)
    await tracker.update("s", progress=1)
    engine.races = 3
    receipt = await tracker.update("s", progress=2)
    events = await events_of(tracker)
    assert [event.type for event in events] == ["progress", "other", "other", "other", "progress"]
    assert receipt.id.endswith("-5")


async def test_concurrent_create_is_rejected():
    """Of two writers that create the same session one gets SessionExists."""
    engine = RacingEngine(Settings(), EngineListener())
    engine.races = 1
    with pytest.raises(SessionExists):
        await Tracker(engine).create("s")


async def test_receipt_is_stored_with_its_event(tracker):
    """It is stored under its key, with the cursor that the publisher gets."""
    result = await tracker.apply(
        "s",
        Update(progress=1),
        key=IdempotencyKey("k", digest=b"d"),
    )
    stored = await tracker.engine.receipt("s", "k")
    assert stored == Receipt(result.id, Control.CONTINUE, 1, b"d", created=True)
    assert await tracker.engine.receipt("s", "other") is None


async def test_rejected_update_has_no_effect(tracker):
    """It changes neither the log nor the session, and stores no receipt."""
    await tracker.update("s", progress=40)
    before = await tracker.get("s")
    for bad in (Update(progress=39), Update(progress=101)):
        with pytest.raises(InvalidProgress):
            await tracker.apply("s", bad, key=IdempotencyKey("k"))
    assert await tracker.get("s") == before
    assert await tracker.engine.receipt("s", "k") is None


async def test_stale_appends_are_rejected(engine, tracker):
    """The engine's guarantee that the tracker relies on."""
    session = await tracker.create("s")
    (event,) = await events_of(tracker)
    for seq in itertools.chain(range(2), range(3, 6)):
        with pytest.raises(Stale):
            await engine.append(msgspec.structs.replace(session, seq=seq), [event])
