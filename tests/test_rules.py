"""The rules of progress, each alone and with random sequences of updates."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseserve.errors import Invalid, InvalidProgress, SessionEnded
from sseserve.model import Artifact, Progress, State
from sseserve.progress.rules import (
    MAX_ENCODED,
    MAX_LABEL,
    MAX_MESSAGE,
    MIN_OBSERVED,
    REPEATED_DATA,
    Update,
    advance,
    changed_fields,
    event_record,
)

RUNNING = advance(None, Update(progress=40), 0.0)


def apply_all(*steps: tuple[float, Update]) -> Progress:
    """Apply (time, update) pairs in order; return the last progress."""
    progress = None
    for at, update in steps:
        progress = advance(progress, update, at)
    assert progress is not None
    return progress


# States


def test_indeterminate_until_a_percentage_is_published():
    """Without a percentage the amount is unknown, not 0; a restart makes it unknown again, success is 100."""
    unknown = advance(None, Update(stage="reading"), 1.0)
    assert (unknown.indeterminate, unknown.percent) == (True, 0)
    assert advance(unknown, Update(status="failed"), 2.0).indeterminate
    assert not advance(unknown, Update(status="done"), 2.0).indeterminate
    known = advance(unknown, Update(progress=0), 2.0)
    assert not known.indeterminate
    assert not advance(known, Update(message="still"), 3.0).indeterminate
    assert advance(known, Update(restart=True), 3.0).indeterminate


def test_first_update_starts_the_session():
    """A first update without a status sets the state to running and the start time to now."""
    progress = advance(None, Update(), 7.0)
    assert (progress.status, progress.state, progress.percent) == ("running", State.RUNNING, 0)
    assert (progress.started_at, progress.updated_at, progress.ended_at) == (7.0, 7.0, None)


def test_queued_session_starts_with_progress():
    """Queued work that reports progress is running; with the status queued it stays queued."""
    queued = advance(None, Update(status="pending"), 1.0)
    assert (queued.state, queued.status, queued.started_at) == (State.QUEUED, "pending", None)
    assert advance(queued, Update(progress=1), 2.0).state is State.RUNNING
    assert advance(queued, Update(status="queued", message="third in line"), 2.0).state is State.QUEUED


def test_status_is_kept_until_changed():
    """An update without a status changes neither the status nor the state."""
    paused = advance(RUNNING, Update(status="on hold"), 1.0)
    again = advance(paused, Update(message="still"), 2.0)
    assert (again.status, again.state) == ("on hold", State.PAUSED)


@pytest.mark.parametrize("label", ["done", "failed", "cancelled", "lost"])
def test_terminal_state_rejects_updates(label):
    """Neither a restart nor the same status again is accepted after the end."""
    ended = advance(RUNNING, Update(status=label), 1.0)
    assert ended.ended_at == 1.0
    for update in (Update(), Update(status=label), Update(progress=100), Update(restart=True)):
        with pytest.raises(SessionEnded):
            advance(ended, update, 2.0)


def test_success_without_a_percent_is_100():
    """A percent that is given is kept, and a failure keeps the last percent."""
    assert advance(RUNNING, Update(status="done"), 1.0).percent == 100
    assert advance(RUNNING, Update(status="done", progress=99), 1.0).percent == 99
    assert advance(RUNNING, Update(status="failed"), 1.0).percent == 40


# Percent


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, True, False, "40", b"4", -0.0001, 100.0001, -1, 101, 10**400, [4], 4j],
)
def test_invalid_percent_is_rejected(value):
    """Only finite numbers from 0 to 100 are accepted; a bool is not a number."""
    with pytest.raises(InvalidProgress, match="finite number from 0 to 100"):
        advance(RUNNING, Update(progress=value, restart=True), 1.0)


@pytest.mark.parametrize(
    ("value", "kept"), [(0, 0), (-0.0, 0), (100, 100), (100.0, 100), (40.5, 40.5), (5e-324, 5e-324)]
)
def test_percent_limits_and_form(value, kept):
    """0 and 100 are valid; a whole number is encoded as an integer, and never as -0."""
    percent = advance(None, Update(progress=value), 1.0).percent
    assert msgspec.json.encode(percent) == msgspec.json.encode(kept)


def test_percent_does_not_decrease():
    """It may stay equal; a lower value needs a restart or a terminal status."""
    assert advance(RUNNING, Update(progress=40.0), 1.0).percent == 40
    with pytest.raises(InvalidProgress, match="cannot go back from 40 to 39"):
        advance(RUNNING, Update(progress=39), 1.0)
    assert advance(RUNNING, Update(progress=39, restart=True), 1.0).percent == 39
    assert advance(RUNNING, Update(progress=39, status="failed"), 1.0).percent == 39
    paused = advance(RUNNING, Update(status="paused"), 1.0)
    with pytest.raises(InvalidProgress):
        advance(paused, Update(progress=39), 2.0)


def test_restart_clears_the_outcome():
    """A restart clears percent, error, artifacts and estimate, keeps the rest, and the state is running."""
    steps = [
        (0.0, Update(progress=10, stage="tts", message="m", data=msgspec.Raw(b"1"))),
        (1.0, Update(progress=20, error="bad", artifacts=(Artifact("a"),))),
        (2.0, Update(status="paused")),
        (5.0, Update(restart=True)),
    ]
    after = apply_all(*steps)
    assert (after.status, after.percent, after.error, after.artifacts) == ("running", 0, None, ())
    assert (after.rate, after.eta) == (None, None)
    assert (after.stage, after.message, bytes(after.data), after.started_at) == ("tts", "m", b"1", 0.0)


def test_unmentioned_fields_are_kept():
    """Every field but the times is carried over."""
    before = apply_all(
        (0.0, Update(progress=1, stage="s", message="m", error={"a": 1}, artifacts=(Artifact("a"),)))
    )
    after = advance(before, Update(), 1.0)
    same = ("status", "state", "percent", "stage", "message", "error", "artifacts", "data", "started_at")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]
    assert advance(before, Update(artifacts=()), 1.0).artifacts == ()


labels = st.sampled_from([None, "running", "paused", "queued", "rendering", "done", "failed", "lost"])
updates = st.builds(Update, status=labels, progress=st.none() | st.floats(0, 100), restart=st.booleans())


@given(st.lists(st.tuples(st.floats(0, 1e6), updates), max_size=30))
def test_random_updates_keep_the_invariants(steps):
    """No decrease without a restart, nothing after a terminal state, an ETA only with a rate."""
    progress, now = None, 0.0
    for delay, update in steps:
        now += delay
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


# Sizes


@pytest.mark.parametrize(
    ("name", "limit"), [("status", MAX_LABEL), ("stage", MAX_LABEL), ("message", MAX_MESSAGE)]
)
def test_texts_have_a_limit(name, limit):
    """One character more is refused, with the limit; what is refused changes nothing."""
    assert getattr(advance(RUNNING, Update(**{name: "x" * limit}), 1.0), name) == "x" * limit
    with pytest.raises(Invalid, match=f"{name} has at most {limit} characters, not {limit + 1}"):
        advance(RUNNING, Update(**{name: "x" * (limit + 1)}), 1.0)


@pytest.mark.parametrize(
    "update",
    [
        Update(status="failed", error="x" * MAX_ENCODED),
        Update(error={"message": "x" * MAX_ENCODED}),
        Update(artifacts=(Artifact("x" * MAX_ENCODED),)),
        Update(artifacts=(Artifact("a"),) * (MAX_ENCODED // 10)),
    ],
)
def test_errors_and_artifacts_have_a_limit(update):
    """It is counted in bytes of JSON."""
    with pytest.raises(Invalid, match=f"at most {MAX_ENCODED} bytes"):
        advance(RUNNING, update, 1.0)


def test_large_data_is_not_repeated():
    """Over the limit it is in the event that brings it and in the final one, and in the session's record."""
    small, large = (msgspec.Raw(b'"%s"' % (b"x" * size)) for size in (REPEATED_DATA - 2, REPEATED_DATA))
    for data, repeated in ((small, True), (large, False)):
        update = Update(data=data)
        brings = advance(RUNNING, update, 1.0)
        assert event_record(brings, update).data == data
        assert ("large_data" in changed_fields(RUNNING, brings, update)) is not repeated
        later = advance(brings, Update(progress=50), 2.0)
        assert later.data == data
        assert (event_record(later, Update(progress=50)).data == data) is repeated
        end = Update(status="done")
        final = advance(later, end, 3.0)
        assert event_record(final, end).data == data


# Rate and ETA


@given(
    step=st.floats(1e-3, 10),
    rate=st.floats(1e-6, 100),
    pauses=st.lists(st.tuples(st.integers(1, 9), st.floats(0.001, 1e6), st.floats(0, 1)), max_size=3),
)
def test_steady_work_has_an_exact_rate(step, rate, pauses):
    """Once there is a rate it is exact, whatever the pauses and the updates during them."""
    seconds = step / rate
    now = 1_000.0
    progress = advance(None, Update(progress=0), now)
    percent = 0.0
    for number in range(1, 10):
        elapsed = 0.0
        for at, pause, part in pauses:
            if at == number:
                # Part of the step is done before the pause and is not reported.
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
        if number * seconds > MIN_OBSERVED * 1.001:
            assert progress.rate == pytest.approx(rate, rel=1e-3)
            assert progress.eta == pytest.approx((100 - percent) / rate, rel=2e-3, abs=0.051)
        elif number * seconds < MIN_OBSERVED * 0.999:
            assert (progress.rate, progress.eta) == (None, None)
        if percent + step > 100:
            break


def etas(*steps):
    """Return the ETA after each update, given ``(seconds, percent)``."""
    progress, out = None, []
    for now, percent in steps:
        progress = advance(progress, Update(progress=percent), now)
        out.append(progress.eta)
    return out


def test_quick_first_updates_have_no_eta():
    """Two updates in quick succession are no speed; with more time the ETA is that of the plain mean."""
    # 25 percent in 0.7 seconds would be 1.8 seconds, and 22.6 after the next update.
    assert etas((0, 10), (0.7, 35), (23.0, 60), (23.0, 80), (45.0, 90)) == [
        None,
        None,
        pytest.approx(40 / (50 / 23), rel=0.4),
        pytest.approx(20 / (70 / 23), rel=0.4),
        pytest.approx(10 / (80 / 45), rel=0.4),
    ]


def test_irregular_updates_have_a_steady_eta():
    """Bursts and gaps around the same mean speed change the ETA by little, as the time passes."""
    steps = [(second + 0.9 * (second % 2), 2 * second) for second in range(51)]
    expected = [(100 - percent) / 2 for _, percent in steps]
    for (now, _), eta, ideal in zip(steps, etas(*steps), expected, strict=True):
        assert eta is None if now < MIN_OBSERVED else eta == pytest.approx(ideal, rel=0.35, abs=0.1)


def test_eta_follows_a_change_of_speed():
    """Work that has become ten times slower has that speed after a few times TAU."""
    steps = [(second, second) for second in range(51)]
    steps += [(50 + 10 * (percent - 50), percent) for percent in range(51, 91)]
    assert etas(*steps)[-1] == pytest.approx(100, rel=0.01)


def test_restart_forgets_the_speed():
    """The estimate is of the current attempt."""
    progress = apply_all((0.0, Update(progress=0)), (10.0, Update(progress=50)))
    progress = advance(progress, Update(progress=0, restart=True), 20.0)
    assert (progress.rate, progress.eta) == (None, None)
    assert advance(progress, Update(progress=1), 30.0).rate == pytest.approx(0.1)


def test_another_stage_clears_the_message():
    """It was about the stage before; a message of the update itself, or the same stage, keeps one."""
    before = apply_all((0.0, Update(progress=1, stage="reading", message="12 of 120 files")))
    assert advance(before, Update(stage="adding up"), 1.0).message == ""
    assert advance(before, Update(stage="adding up", message="first sum"), 1.0).message == "first sum"
    assert advance(before, Update(stage="reading", progress=2), 1.0).message == "12 of 120 files"
    assert advance(before, Update(status="done"), 1.0).message == "12 of 120 files"


def test_rate_has_no_start_up_bias():
    """One slow step after many quick ones is weighted by its share of the last 30 seconds."""
    progress = None
    for second in range(11):
        progress = advance(progress, Update(progress=second), float(second))
    assert progress is not None
    assert (progress.rate, progress.eta) == (1.0, 90.0)
    slower = advance(progress, Update(progress=11), 20.0)
    assert slower.rate is not None
    assert 0.1 < slower.rate < 1.0


def test_slow_work_has_a_rate():
    """One percent in three months is a rate of 1.3e-7 percent per second, not None."""
    month = 30 * 86400.0
    progress = apply_all((0.0, Update(progress=0)), (3 * month, Update(progress=1)))
    assert progress.rate == pytest.approx(1 / (3 * month), rel=1e-5)
    assert progress.eta == pytest.approx(99 * 3 * month, rel=1e-5)


def test_rate_is_kept_across_a_pause():
    """After a pause the rate is at once what it was before."""
    progress = apply_all(
        (0.0, Update(progress=0)),
        (10.0, Update(progress=10)),
        (12.0, Update(status="paused")),
        (500.0, Update(status="running")),
    )
    assert (progress.rate, progress.eta) == (1.0, 90.0)


def test_clock_going_backwards():
    """A step during which the clock goes backwards gives no rate; the next step does."""
    progress = apply_all(
        (1000.0, Update(progress=0)),
        (1010.0, Update(progress=10)),
        (10.0, Update(progress=20)),
        (20.0, Update(progress=30)),
    )
    assert progress.rate == 1.0
