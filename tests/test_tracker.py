"""The rules of progress, one by one and under random programs."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from sseserve.config import Settings
from sseserve.engines import Stale
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
from sseserve.model import Artifact, Control, Progress, Receipt, State
from sseserve.progress.rules import Update, advance
from sseserve.progress.tracker import Tracker

RUNNING = advance(None, Update(progress=40), 0.0)


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine() -> MemoryEngine:
    return MemoryEngine(Settings(), lambda session, events: None)


@pytest.fixture
def tracker(engine: MemoryEngine, clock: Clock) -> Tracker:
    return Tracker(engine, reserved={"progress", "resume", "overflow"}, clock=clock)


async def events_of(tracker: Tracker, session_id: str = "s"):
    page = await tracker.engine.read(session_id, 0, 10_000)
    assert page is not None
    return page.events


def program(*steps: tuple[float, Update]) -> Progress:
    """Apply updates at their times; returns the last progress."""
    progress = None
    for at, update in steps:
        progress = advance(progress, update, at)
    assert progress is not None
    return progress


# States


def test_the_first_word_starts_the_work():
    """A first update without a status means running, from now on."""
    progress = advance(None, Update(), 7.0)
    assert (progress.status, progress.state, progress.percent) == ("running", State.RUNNING, 0)
    assert (progress.started_at, progress.updated_at, progress.ended_at) == (7.0, 7.0, None)


def test_a_queued_session_starts_with_its_first_update():
    """Queued work that says how far it is runs; one that says it is queued still waits."""
    queued = advance(None, Update(status="pending"), 1.0)
    assert (queued.state, queued.status, queued.started_at) == (State.QUEUED, "pending", None)
    assert advance(queued, Update(progress=1), 2.0).state is State.RUNNING
    assert advance(queued, Update(status="queued", message="third in line"), 2.0).state is State.QUEUED


def test_a_label_stays_until_another_is_given():
    """An update that names no status leaves label and state alone."""
    paused = advance(RUNNING, Update(status="on hold"), 1.0)
    again = advance(paused, Update(message="still"), 2.0)
    assert (again.status, again.state) == ("on hold", State.PAUSED)


@pytest.mark.parametrize("label", ["done", "failed", "cancelled", "lost"])
def test_nothing_follows_a_terminal_state(label):
    """Not even a restart, nor the same state again."""
    ended = advance(RUNNING, Update(status=label), 1.0)
    assert ended.ended_at == 1.0
    for update in (Update(), Update(status=label), Update(progress=100), Update(restart=True)):
        with pytest.raises(SessionEnded):
            advance(ended, update, 2.0)


def test_success_without_a_percent_is_100():
    """But a percent that is given stands, and failure keeps what was reached."""
    assert advance(RUNNING, Update(status="done"), 1.0).percent == 100
    assert advance(RUNNING, Update(status="done", progress=99), 1.0).percent == 99
    assert advance(RUNNING, Update(status="failed"), 1.0).percent == 40


# Percent


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, True, False, "40", b"4", -0.0001, 100.0001, -1, 101, 10**400, [4], 4j],
)
def test_what_is_no_percentage_is_refused(value):
    """Only finite numbers from 0 to 100, and a bool is no number."""
    with pytest.raises(InvalidProgress, match="finite number from 0 to 100"):
        advance(RUNNING, Update(progress=value, restart=True), 1.0)


@pytest.mark.parametrize(
    ("value", "kept"), [(0, 0), (-0.0, 0), (100, 100), (100.0, 100), (40.5, 40.5), (5e-324, 5e-324)]
)
def test_the_ends_of_the_scale_are_on_it(value, kept):
    """0 and 100 are percentages; a whole number is written as one, and never as -0."""
    percent = advance(None, Update(progress=value), 1.0).percent
    assert msgspec.json.encode(percent) == msgspec.json.encode(kept)


def test_progress_does_not_go_backwards():
    """It may stand still; falling needs a restart or the end."""
    assert advance(RUNNING, Update(progress=40.0), 1.0).percent == 40
    with pytest.raises(InvalidProgress, match="cannot go back from 40 to 39"):
        advance(RUNNING, Update(progress=39), 1.0)
    assert advance(RUNNING, Update(progress=39, restart=True), 1.0).percent == 39
    assert advance(RUNNING, Update(progress=39, status="failed"), 1.0).percent == 39
    paused = advance(RUNNING, Update(status="paused"), 1.0)
    with pytest.raises(InvalidProgress):
        advance(paused, Update(progress=39), 2.0)


def test_a_restart_forgets_what_no_longer_holds():
    """Percent, error, artifacts and estimate go; the rest stays, and it runs again."""
    steps = [
        (0.0, Update(progress=10, stage="tts", message="m", data=msgspec.Raw(b"1"))),
        (1.0, Update(progress=20, error="bad", artifacts=(Artifact("a"),))),
        (2.0, Update(status="paused")),
        (5.0, Update(restart=True)),
    ]
    after = program(*steps)
    assert (after.status, after.percent, after.error, after.artifacts) == ("running", 0, None, ())
    assert (after.rate, after.eta) == (None, None)
    assert (after.stage, after.message, bytes(after.data), after.started_at) == ("tts", "m", b"1", 0.0)


def test_what_an_update_does_not_mention_stays():
    """Every field but the times is carried over."""
    before = program(
        (0.0, Update(progress=1, stage="s", message="m", error={"a": 1}, artifacts=(Artifact("a"),)))
    )
    after = advance(before, Update(), 1.0)
    same = ("status", "state", "percent", "stage", "message", "error", "artifacts", "data", "started_at")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]
    assert advance(before, Update(artifacts=()), 1.0).artifacts == ()


labels = st.sampled_from([None, "running", "paused", "queued", "rendering", "done", "failed", "lost"])
updates = st.builds(Update, status=labels, progress=st.none() | st.floats(0, 100), restart=st.booleans())


@given(st.lists(st.tuples(st.floats(0, 1e6), updates), max_size=30))
def test_no_program_breaks_the_rules(steps):
    """Whatever is said: no fall without a restart, nothing behind an end, an ETA only with a rate."""
    progress, now = None, 0.0
    for wait, update in steps:
        now += wait
        try:
            after = advance(progress, update, now)
        except SessionEnded:
            assert progress is not None
            assert progress.state.terminal
            continue
        except InvalidProgress:
            assert progress is not None
            assert update.progress is not None
            assert update.progress < progress.percent
            continue
        assert 0 <= after.percent <= 100
        assert (after.ended_at is not None) is after.state.terminal
        if progress is not None:
            assert not progress.state.terminal
            assert after.percent >= progress.percent or update.restart or after.state.terminal
        assert after.rate is None or (after.rate > 0 and after.state is State.RUNNING)
        assert (after.eta is None) is (after.rate is None)
        progress = after


# Rate and ETA


@given(
    step=st.floats(1e-3, 10),
    rate=st.floats(1e-6, 100),
    pauses=st.lists(st.tuples(st.integers(1, 9), st.floats(0.001, 1e6), st.floats(0, 1)), max_size=3),
)
def test_steady_work_has_an_exact_rate(step, rate, pauses):
    """From the second update on, however long it pauses and whatever it says meanwhile."""
    seconds = step / rate
    now = 1_000.0
    progress = advance(None, Update(progress=0), now)
    percent = 0.0
    for number in range(1, 10):
        elapsed = 0.0
        for at, pause, part in pauses:
            if at == number:
                # Some of the step is done before the pause, and it says nothing of that.
                work = max(0.0, (seconds - elapsed) * part)
                elapsed += work
                now += work
                progress = advance(progress, Update(status="paused"), now)
                assert (progress.rate, progress.eta) == (None, None)
                now += pause / 2
                progress = advance(progress, Update(message="coffee"), now)
                now += pause / 2
                progress = advance(progress, Update(status="running"), now)
        now += seconds - elapsed
        percent = min(100.0, percent + step)
        progress = advance(progress, Update(progress=percent), now)
        assert progress.rate == pytest.approx(rate, rel=1e-3)
        assert progress.eta == pytest.approx((100 - percent) / rate, rel=2e-3, abs=0.051)
        if percent + step > 100:
            break


def test_the_rate_has_no_start_up_bias_and_follows():
    """One slow step behind many quick ones counts by its share of the last half minute."""
    progress = None
    for second in range(11):
        progress = advance(progress, Update(progress=second), float(second))
    assert progress is not None
    assert (progress.rate, progress.eta) == (1.0, 90.0)
    slower = advance(progress, Update(progress=11), 20.0)
    assert slower.rate is not None
    assert 0.1 < slower.rate < 1.0


def test_slow_work_has_a_rate_too():
    """A percent in three months is 1.3e-7 percent a second, not none."""
    month = 30 * 86400.0
    progress = program((0.0, Update(progress=0)), (3 * month, Update(progress=1)))
    assert progress.rate == pytest.approx(1 / (3 * month), rel=1e-5)
    assert progress.eta == pytest.approx(99 * 3 * month, rel=1e-5)


def test_the_rate_comes_back_with_the_work():
    """Behind a pause the estimate goes on from where it was, at once."""
    progress = program(
        (0.0, Update(progress=0)),
        (10.0, Update(progress=10)),
        (12.0, Update(status="paused")),
        (500.0, Update(status="running")),
    )
    assert (progress.rate, progress.eta) == (1.0, 90.0)


def test_a_clock_that_steps_back_is_survived():
    """Time that runs backwards gives no rate of its own, and the next step counts again."""
    progress = program(
        (1000.0, Update(progress=0)),
        (1010.0, Update(progress=10)),
        (10.0, Update(progress=20)),
        (20.0, Update(progress=30)),
    )
    assert progress.rate == 1.0


# Ticks


@pytest.mark.parametrize(
    ("update", "tick"),
    [
        (Update(progress=50), True),
        (Update(message="on"), True),
        (Update(data=msgspec.Raw(b"1")), True),
        (Update(), True),
        (Update(status="running"), True),
        (Update(stage="tts"), True),
        (Update(status="crunching"), False),
        (Update(status="paused"), False),
        (Update(stage="visuals"), False),
        (Update(error="e"), False),
        (Update(artifacts=(Artifact("a"),)), False),
        (Update(restart=True), False),
        (Update(status="done"), False),
    ],
)
async def test_only_a_changed_amount_is_a_tick(tracker, update, tick):
    """All else that changes is never spared a client."""
    await tracker.update("s", progress=40, stage="tts")
    await tracker.apply("s", update)
    first, second = await events_of(tracker)
    assert not first.conflatable
    assert second.conflatable is tick


async def test_other_events_are_no_ticks(tracker):
    """Events of the publisher's own and of the server are never dropped."""
    await tracker.emit("s", "note", 1)
    await tracker.control("s", Control.PAUSE)
    assert [event.conflatable for event in await events_of(tracker)] == [False, False]


# Sessions


async def test_create_and_get(tracker, clock):
    """A created session is queued, with an event for it, and all that it was given."""
    made = await tracker.create("s", owner="o", viewers=["v"], title="t", ttl=5, data=msgspec.Raw(b"1"))
    assert made == await tracker.get("s")
    assert (made.seq, made.owner, made.viewers, made.title, made.ttl) == (1, "o", ("v",), "t", 5)
    assert (made.created_at, made.control, made.ended) == (clock.now, Control.CONTINUE, False)
    (event,) = await events_of(tracker)
    assert (event.seq, event.type, event.progress.state) == (1, "progress", State.QUEUED)


async def test_a_session_exists_once(tracker):
    """A taken id is refused and its session left alone; without an id each gets its own."""
    before = await tracker.create("s")
    with pytest.raises(SessionExists):
        await tracker.create("s", title="mine")
    assert await tracker.get("s") == before
    assert (await tracker.create()).id != (await tracker.create()).id


@pytest.mark.parametrize(
    "session_id",
    ["", ".", "..", "x" * 129, "a b", "a/b", "a\\b", "a?b", "a#b", "a%b", 'a"b', "a\nb", "a\0", "\ud800"],
)
async def test_an_id_that_cannot_be_one(tracker, session_id):
    """Nothing that an address or a line of a log would read as something else, by whichever way it comes."""
    for act in (tracker.create(session_id), tracker.update(session_id), tracker.emit(session_id, "note")):
        with pytest.raises(Invalid):
            await act
    assert await tracker.sessions() == []


@pytest.mark.parametrize("session_id", ["x", "x" * 128, "job:1.2_3-4~", "é", "ジョブ"])
async def test_an_id_that_can_be_one(tracker, session_id):
    """Printable characters of any script."""
    assert (await tracker.create(session_id)).id == session_id


async def test_publishing_creates_unless_it_may_not(engine, clock):
    """A first update or event begins a session; with auto_create off it is 404 and changes nothing."""
    strict = Tracker(engine, auto_create=False, clock=clock)
    for act in (strict.update("s"), strict.emit("s", "note")):
        with pytest.raises(SessionNotFound):
            await act
    assert await engine.count() == 0
    await Tracker(engine, clock=clock).emit("s", "note")
    assert (await strict.get("s")).progress is None
    await strict.update("s", progress=1)


async def test_there_is_room_for_so_many(engine, clock):
    """At max_sessions nothing creates one more, and the old ones go on."""
    tracker = Tracker(engine, max_sessions=1, clock=clock)
    await tracker.create("s")
    for act in (tracker.create("t"), tracker.update("t"), tracker.emit("t", "note")):
        with pytest.raises(Unavailable):
            await act
    await tracker.update("s", progress=1)
    await tracker.delete("s")
    await tracker.create("t")


async def test_what_does_not_exist_is_not_found(tracker):
    """Looking, controlling and deleting never create."""
    for act in (tracker.get("s"), tracker.control("s", Control.PAUSE), tracker.delete("s")):
        with pytest.raises(SessionNotFound):
            await act
    assert await tracker.sessions() == []


async def test_a_session_that_begins_again_has_another_epoch(tracker):
    """So a cursor of its last life is known as stale."""
    before = await tracker.create("s")
    await tracker.delete("s")
    assert (await tracker.create("s")).epoch != before.epoch


async def test_sessions_by_state(tracker):
    """The newest first; one that never said how far it is counts as queued."""
    await tracker.create("a")
    await tracker.update("b", progress=1)
    await tracker.emit("c", "note")
    assert [session.id for session in await tracker.sessions()] == ["c", "b", "a"]
    assert [session.id for session in await tracker.sessions(State.QUEUED)] == ["c", "a"]
    assert [session.id for session in await tracker.sessions(State.RUNNING)] == ["b"]


# Events


@pytest.mark.parametrize(
    "name", ["", "x" * 129, "a\rb", "a\nb", "a\0b", "\ud800", "progress", "resume", "overflow"]
)
async def test_a_type_that_cannot_be_one(tracker, name):
    """What would break the framing, or pass for the server's own word."""
    await tracker.create("s")
    with pytest.raises(Invalid):
        await tracker.emit("s", name)
    assert len(await events_of(tracker)) == 1


@pytest.mark.parametrize("retry", [-1, 86_400_001])
async def test_a_retry_has_a_range(tracker, retry):
    """From nothing to a day."""
    with pytest.raises(Invalid):
        await tracker.emit("s", "note", retry=retry)


async def test_nothing_follows_the_end(tracker):
    """No event, no progress, no wish; and the log stays as it was."""
    await tracker.update("s", status="done")
    for act in (
        tracker.emit("s", "note"),
        tracker.update("s", progress=1),
        tracker.control("s", Control.CANCEL, force=True),
    ):
        with pytest.raises(SessionEnded):
            await act
    assert len(await events_of(tracker)) == 1


@pytest.mark.parametrize("text", [b'{"a":\n1}', b'{"a":\r\n1}', b"[1,\r2]"])
async def test_data_is_kept_on_one_line(tracker, text):
    """However it was indented, and by whichever way it comes: a line of JSON is a line."""
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
async def test_what_cannot_be_written_is_refused(tracker, fields):
    """A file's name that is no UTF-8, say: nobody could ever be shown it."""
    await tracker.create("s")
    with pytest.raises(Invalid, match="cannot be written as JSON"):
        await tracker.update("s", **fields)
    assert len(await events_of(tracker)) == 1


async def test_a_loop_of_updates_lets_others_run(tracker):
    """A producer in this process that waits for nothing else still waits for this."""
    ran = []

    async def other() -> None:
        ran.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(3):
            await tracker.update("s", progress=1)
        assert ran


async def test_a_cancelled_update_has_not_begun(tracker):
    """Cancelled, an update leaves nothing behind."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await tracker.update("s", progress=1)
    assert scope.cancelled_caught
    assert await tracker.sessions() == []


# Control


async def test_the_worker_learns_what_is_asked(tracker):
    """In the answer to its next word, until something else is asked."""
    assert (await tracker.update("s", progress=1)).control is Control.CONTINUE
    await tracker.control("s", Control.PAUSE)
    assert (await tracker.update("s", progress=2)).control is Control.PAUSE
    await tracker.control("s", Control.CONTINUE)
    assert (await tracker.emit("s", "note")).control is Control.CONTINUE
    asked = [bytes(event.data) for event in await events_of(tracker) if event.type == "control"]
    assert asked == [b'{"control":"pause"}', b'{"control":"continue"}']


async def test_asking_twice_changes_nothing(tracker):
    """What is asked already makes no event."""
    await tracker.update("s", progress=1)
    first = await tracker.control("s", Control.PAUSE)
    assert await tracker.control("s", Control.PAUSE) == first


async def test_a_cancellation_stays(tracker):
    """It cannot be taken back, and ends the session only when the worker says so."""
    await tracker.update("s", progress=1)
    assert not (await tracker.control("s", Control.CANCEL)).ended
    for wish in (Control.PAUSE, Control.CONTINUE):
        with pytest.raises(Conflict):
            await tracker.control("s", wish)
    await tracker.update("s", status="cancelled")
    assert (await tracker.get("s")).ended


async def test_work_that_nobody_does_is_cancelled_at_once(tracker):
    """A queued session ends; a running one only by force."""
    await tracker.create("s")
    assert (await tracker.control("s", Control.CANCEL)).progress.state is State.CANCELLED
    await tracker.update("t", progress=1)
    await tracker.control("t", Control.CANCEL)
    assert (await tracker.control("t", Control.CANCEL, force=True)).progress.state is State.CANCELLED


# Leases


async def test_a_silent_producer_stalls_and_is_lost(tracker, clock):
    """Past its lease: stalled, once. Past three of them: lost, which is the end."""
    await tracker.create("s", lease=10)
    for silent, types in [(10, []), (11, ["stalled"]), (30, ["stalled"]), (31, ["stalled", "progress"])]:
        clock.now = 1_700_000_000.0 + silent
        await tracker.check_leases()
        assert [event.type for event in await events_of(tracker)][1:] == types
    assert (await tracker.get("s")).progress.state is State.LOST
    await tracker.check_leases()
    assert len(await events_of(tracker)) == 3


async def test_a_word_renews_the_lease_and_a_wish_does_not(tracker, clock):
    """Only the producer is heard; behind its word it may stall anew."""
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
    """Somebody else appends first, as often as ``races`` says."""

    races = 0

    async def append(self, session, events, *, receipt=None):
        if self.races:
            self.races -= 1
            other = Tracker(MemoryEngine(Settings(), lambda session, events: None))
            other.engine = self
            races, self.races = self.races, 0
            await other.emit(session.id, "other", races)
            self.races = races
        await super().append(session, events, receipt=receipt)


async def test_who_was_too_slow_decides_again():
    """An update that lost a race is judged by what the winner left, and both are in the log."""
    engine = RacingEngine(Settings(), lambda session, events: None)
    tracker = Tracker(engine)
    await tracker.update("s", progress=1)
    engine.races = 3
    receipt = await tracker.update("s", progress=2)
    events = await events_of(tracker)
    assert [event.type for event in events] == ["progress", "other", "other", "other", "progress"]
    assert receipt.id.endswith("-5")


async def test_who_creates_too_late_is_told():
    """Of two that create the same session one is told that it exists."""
    engine = RacingEngine(Settings(), lambda session, events: None)
    engine.races = 1
    with pytest.raises(SessionExists):
        await Tracker(engine).create("s")


async def test_a_receipt_is_stored_with_its_event(tracker):
    """Under its key, and with the cursor that the publisher is told."""
    told = await tracker.apply(
        "s",
        Update(progress=1),
        store_receipt=lambda answer: ("k", msgspec.structs.replace(answer, digest=b"d")),
    )
    kept = await tracker.engine.receipt("s", "k")
    assert kept == Receipt(told.id, Control.CONTINUE, 1, b"d")
    assert await tracker.engine.receipt("s", "other") is None


async def test_a_refused_update_leaves_no_trace(tracker):
    """Neither in the log nor in the record nor as a receipt."""
    await tracker.update("s", progress=40)
    before = await tracker.get("s")
    for bad in (Update(progress=39), Update(progress=101)):
        with pytest.raises(InvalidProgress):
            await tracker.apply("s", bad, store_receipt=lambda answer: ("k", answer))
    assert await tracker.get("s") == before
    assert await tracker.engine.receipt("s", "k") is None


async def test_stale_appends_are_refused(engine, tracker):
    """What ``Tracker`` relies on, seen from its side."""
    session = await tracker.create("s")
    (event,) = await events_of(tracker)
    for seq in itertools.chain(range(2), range(3, 6)):
        with pytest.raises(Stale):
            await engine.append(msgspec.structs.replace(session, seq=seq), [event])
