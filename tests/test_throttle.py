"""Throttled progress: of a flood the first and the last tick, and those in between now and then.

Nothing but ticks is ever spared, nothing is said out of order, and the last word is always said.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import trio
import trio.testing
from harness import ServerHarness
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from sseserve.progress.rules import Update

STREAM = "/api/v1/sessions/s/status/stream"
THROTTLE = 0.1  # the dialect's own


@pytest.fixture
def harness(nursery):
    return ServerHarness(nursery)


async def opened(harness, target=STREAM):
    """A stream behind the first status."""
    await harness.tracker.update("s", progress=0)
    stream = await harness.stream(target)
    await stream.next()
    return stream


async def test_the_first_tick_of_a_flood_goes_out_at_once(autojump_clock, harness):
    """The leading edge: after a silence nothing is held back."""
    stream = await opened(harness)
    for percent in (1, 2, 3):
        await trio.sleep(THROTTLE)
        await harness.tracker.update("s", progress=percent)
        before = trio.current_time()
        assert (await stream.next()).data["progress"] == percent
        assert trio.current_time() == before


async def test_the_last_tick_of_a_flood_goes_out(autojump_clock, harness):
    """The trailing edge: when the flood stops, its last tick is said within the throttle's time."""
    stream = await opened(harness)
    for percent in range(1, 51):
        await harness.tracker.update("s", progress=percent)
    said = await stream.take(2)
    assert [s.data["progress"] for s in said] == [1, 50]
    assert trio.current_time() == pytest.approx(THROTTLE)
    assert (await harness.tracker.get("s")).seq == 51  # the log has them all
    assert said[-1].id.endswith("-51")


async def test_a_flood_is_thinned_to_its_rate(autojump_clock, harness):
    """1,000 ticks in ten seconds are about a hundred messages."""
    stream = await opened(harness)

    async def flood():
        for number in range(1, 1001):
            await harness.tracker.update("s", progress=number / 10)
            await trio.sleep(0.01)
        await harness.tracker.update("s", status="completed")

    times, percents = [], []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        while (event := await stream.connection.event()) is not None:
            times.append(trio.current_time())
            percents.append(event.data)
    assert 90 <= len(times) <= 103
    gaps = [b - a for a, b in pairwise(times[:-1])]
    assert min(gaps) >= THROTTLE - 1e-9
    assert max(gaps) <= 0.12
    assert harness.broker.conflated >= 890


async def test_what_is_no_tick_is_never_held(autojump_clock, harness):
    """A stage, a label, a warning: each goes out at once, in its place."""
    stream = await opened(harness)
    await harness.tracker.update("s", progress=1)
    await harness.tracker.update("s", progress=2)
    await harness.tracker.update("s", progress=3, stage="next")
    await harness.tracker.update("s", progress=4)
    await harness.tracker.emit("s", "note", "n")
    await harness.tracker.update("s", progress=5)
    await harness.tracker.update("s", progress=6, status="resuming")
    said = await stream.take(5)
    assert trio.current_time() == 0
    shown = [s.data if s.event == "note" else s.data["progress"] for s in said]
    assert shown == [1, 3, 4, "n", 6]


async def test_the_end_is_not_held_and_ends_the_stream(autojump_clock, harness):
    """A tick that is held back is superseded by the end, which comes at once and last."""
    stream = await opened(harness)
    for percent in (1, 2, 3):
        await harness.tracker.update("s", progress=percent)
    await harness.tracker.update("s", status="completed")
    assert [s.data["progress"] for s in await stream.read_to_end()] == [1, 100]
    assert trio.current_time() == 0


async def test_who_joins_in_a_flood_gets_nothing_twice(autojump_clock, harness):
    """The held tick of the others is not news to who has read the log up to it."""
    stream = await opened(harness)
    await harness.tracker.update("s", progress=1)
    await stream.next()
    await harness.tracker.update("s", progress=2)  # held
    await wait_all_tasks_blocked()
    late = await harness.stream(STREAM)
    assert (await late.next()).data["progress"] == 2
    assert (await stream.next()).data["progress"] == 2
    await harness.tracker.update("s", status="completed")
    assert [s.data["progress"] for s in await late.read_to_end()] == [100]


async def test_other_dialects_are_not_throttled(autojump_clock, harness):
    """Who has no throttle gets every tick, beside those who have one."""
    throttled = await opened(harness)
    others = [
        await harness.stream(target)
        for target in ("/api/sessions/s/status/stream", "/api/jobs/s/events", "/api/v1/jobs/s/events")
    ]
    for percent in range(1, 21):
        await harness.tracker.update("s", progress=percent)
    for stream in others:
        seqs = []
        while seqs[-1:] != [21]:
            cursor = (await stream.next()).id
            seqs += [] if "." in cursor else [int(cursor.rpartition("-")[2])]
        assert seqs == list(range(1, 22))
    assert len(await throttled.take(2)) == 2


@pytest.mark.parametrize("throttle", [1.0, 1e-6])
async def test_the_throttle_can_be_set(autojump_clock, nursery, throttle):
    """The setting stands for the dialect's own time, longer or shorter."""
    harness = ServerHarness(nursery, throttle=throttle)
    stream = await opened(harness)
    for percent in (1, 2, 3):
        await harness.tracker.update("s", progress=percent)
        await trio.sleep(0.2)
    said = [await stream.next()]
    while said[-1].data["progress"] != 3:
        said.append(await stream.next())
    assert len(said) == (2 if throttle == 1.0 else 3)


async def test_a_cursor_gets_what_was_held_back(autojump_clock, harness):
    """Who leaves before the held tick was said comes back to all ticks behind its cursor."""
    stream = await opened(harness)
    await harness.tracker.update("s", progress=1)
    said = await stream.next()
    for percent in (2, 3):
        await harness.tracker.update("s", progress=percent)
    await stream.disconnect()
    back = await harness.stream(STREAM, said.id)
    assert [s.data.get("progress") for s in await back.take(3)] == [None, 2, 3]


@pytest.mark.parametrize("trial", range(16))
async def test_a_tick_held_when_the_time_of_another_comes_is_said(mock_clock, harness, trial):
    """Two ticks in one batch, at the very moment at which the one before them was due.

    Trio runs the pump and the timer of that moment in either order, so this needs a few trials.
    """
    stream = await opened(harness)
    await harness.tracker.update("s", progress=1)
    await stream.next()
    await harness.tracker.update("s", progress=2)
    await wait_all_tasks_blocked()
    mock_clock.jump(THROTTLE)
    for percent in (3, 4):
        await harness.tracker.apply("s", Update(progress=percent))  # does not wait
    await wait_all_tasks_blocked()
    mock_clock.jump(THROTTLE)
    await wait_all_tasks_blocked()
    percents = [2, 3, 4] if (await stream.next()).data["progress"] == 2 else [3, 4]
    for percent in percents[1:]:
        assert not await stream.is_silent()
        assert (await stream.next()).data["progress"] == percent


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["tick", "tick", "tick", "stage", "note"]),
        st.sampled_from([0.0, 0.0, 0.01, 0.05, THROTTLE, 0.3]),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.booleans())
def test_a_flood_of_any_shape(steps, ends):
    """Said is a subsequence of the log, with everything that is no tick, and with its last event.

    A tick that is not said is superseded by progress that is said within the throttle's time.
    """
    clock = trio.testing.MockClock(autojump_threshold=0)
    trio.run(partial(_flood, steps, ends), clock=clock)


async def _flood(steps, ends):
    async with trio.open_nursery() as nursery:
        harness = ServerHarness(nursery)
        stream = await opened(harness)
        log = {}  # seq -> (is a tick, when)
        heard = {}  # seq -> when

        async def listen():
            while (event := await stream.connection.event()) is not None:
                seq = int(event.id.rpartition("-")[2])
                assert seq not in heard
                heard[seq] = trio.current_time()

        nursery.start_soon(listen)
        for number, (kind, delay) in enumerate(steps, 1):
            match kind:
                case "tick":
                    await harness.tracker.update("s", progress=number)
                case "stage":
                    await harness.tracker.update("s", progress=number, stage=str(number))
                case "note":
                    await harness.tracker.emit("s", "note", number)
            log[number + 1] = (kind, trio.current_time())
            await trio.sleep(delay)
        if ends:
            await harness.tracker.update("s", status="completed")
            log[len(steps) + 2] = ("end", trio.current_time())
        await trio.sleep(THROTTLE)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert list(heard) == sorted(heard)
    assert heard.keys() <= log.keys()
    assert heard.keys() >= {seq for seq, (kind, _) in log.items() if kind != "tick"}
    if log:
        assert max(log) in heard
    progress = [seq for seq in heard if log[seq][0] != "note"]
    for seq, (kind, at) in log.items():
        newer = next((s for s in progress if s >= seq), None)
        if kind == "tick":
            assert newer is not None
            assert heard[newer] - at <= THROTTLE + 1e-9
