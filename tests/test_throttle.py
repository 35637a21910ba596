"""Throttled progress: of a burst of updates the first, the last, and one per throttle time in between.

Only conflatable updates are dropped, the order is kept, and the last event is always delivered.
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
THROTTLE = 0.1  # seconds; the default of the dialect


@pytest.fixture
def harness(nursery):
    return ServerHarness(nursery)


async def open_stream(harness, target=STREAM):
    """Open a stream and read its first message."""
    await harness.tracker.update("s", progress=0)
    stream = await harness.stream(target)
    await stream.next()
    return stream


async def test_first_update_is_sent_at_once(autojump_clock, harness):
    """The leading edge: an update after a pause is not delayed."""
    stream = await open_stream(harness)
    for percent in (1, 2, 3):
        await trio.sleep(THROTTLE)
        await harness.tracker.update("s", progress=percent)
        before = trio.current_time()
        assert (await stream.next()).data["progress"] == percent
        assert trio.current_time() == before


async def test_last_update_of_a_burst_is_sent(autojump_clock, harness):
    """The trailing edge: after a burst its last update is sent within the throttle time."""
    stream = await open_stream(harness)
    for percent in range(1, 51):
        await harness.tracker.update("s", progress=percent)
    messages = await stream.take(2)
    assert [s.data["progress"] for s in messages] == [1, 50]
    assert trio.current_time() == pytest.approx(THROTTLE)
    assert (await harness.tracker.get("s")).seq == 51  # the log has all of them
    assert messages[-1].id.endswith("-51")


async def test_new_data_is_superseded_by_new_data_only(autojump_clock, harness):
    """A throttled update whose worker added members is not dropped for one without any."""
    stream = await open_stream(harness)
    await harness.tracker.update("s", progress=1)
    updates = [{"progress": 2, "segment": "a"}, {"progress": 3, "segment": "b"}, {"progress": 4}]
    for update in updates:
        await harness.post("/api/v1/sessions/s/status", update)
    messages = await stream.take(3)
    assert [(m.data["progress"], m.data.get("segment")) for m in messages] == [(1, None), (3, "b"), (4, None)]


async def test_burst_is_limited_to_the_throttle_rate(autojump_clock, harness):
    """1,000 updates in ten seconds become about a hundred messages."""
    stream = await open_stream(harness)

    async def publish():
        for number in range(1, 1001):
            await harness.tracker.update("s", progress=number / 10)
            await trio.sleep(0.01)
        await harness.tracker.update("s", status="completed")

    times, percents = [], []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        while (event := await stream.connection.event()) is not None:
            times.append(trio.current_time())
            percents.append(event.data)
    assert 90 <= len(times) <= 103
    gaps = [b - a for a, b in pairwise(times[:-1])]
    assert min(gaps) >= THROTTLE - 1e-9
    assert max(gaps) <= 0.12
    assert harness.broker.statistics().conflated >= 890


async def test_other_events_are_never_throttled(autojump_clock, harness):
    """A new stage, a new status and other events are sent at once, in order."""
    stream = await open_stream(harness)
    await harness.tracker.update("s", progress=1)
    await harness.tracker.update("s", progress=2)
    await harness.tracker.update("s", progress=3, stage="next")
    await harness.tracker.update("s", progress=4)
    await harness.tracker.emit("s", "note", "n")
    await harness.tracker.update("s", progress=5)
    await harness.tracker.update("s", progress=6, status="resuming")
    messages = await stream.take(5)
    assert trio.current_time() == 0
    payloads = [s.data if s.event == "note" else s.data["progress"] for s in messages]
    assert payloads == [1, 3, 4, "n", 6]


async def test_end_is_sent_at_once_and_ends_the_stream(autojump_clock, harness):
    """A throttled update is superseded by the end, which is sent at once and last."""
    stream = await open_stream(harness)
    for percent in (1, 2, 3):
        await harness.tracker.update("s", progress=percent)
    await harness.tracker.update("s", status="completed")
    assert [s.data["progress"] for s in await stream.read_to_end()] == [1, 100]
    assert trio.current_time() == 0


async def test_watcher_that_joins_during_a_burst(autojump_clock, harness):
    """The update throttled for others is not sent to a watcher that has already read it from the log."""
    stream = await open_stream(harness)
    await harness.tracker.update("s", progress=1)
    await stream.next()
    await harness.tracker.update("s", progress=2)  # throttled
    await wait_all_tasks_blocked()
    late = await harness.stream(STREAM)
    assert (await late.next()).data["progress"] == 2
    assert (await stream.next()).data["progress"] == 2
    await harness.tracker.update("s", status="completed")
    assert [s.data["progress"] for s in await late.read_to_end()] == [100]


async def test_other_dialects_are_not_throttled(autojump_clock, harness):
    """Watchers without a throttle get every update, beside throttled watchers of the same session."""
    throttled = await open_stream(harness)
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
async def test_throttle_setting(autojump_clock, nursery, throttle):
    """The setting overrides the dialect's throttle time, to a longer or a shorter one."""
    harness = ServerHarness(nursery, throttle=throttle)
    stream = await open_stream(harness)
    for percent in (1, 2, 3):
        await harness.tracker.update("s", progress=percent)
        await trio.sleep(0.2)
    messages = [await stream.next()]
    while messages[-1].data["progress"] != 3:
        messages.append(await stream.next())
    assert len(messages) == (2 if throttle == 1.0 else 3)


async def test_resume_returns_throttled_updates(autojump_clock, harness):
    """A watcher that disconnects before a throttled update was sent gets every update after its cursor."""
    stream = await open_stream(harness)
    await harness.tracker.update("s", progress=1)
    messages = await stream.next()
    for percent in (2, 3):
        await harness.tracker.update("s", progress=percent)
    await stream.disconnect()
    resumed = await harness.stream(STREAM, messages.id)
    assert [s.data.get("progress") for s in await resumed.take(3)] == [None, 2, 3]


@pytest.mark.parametrize("trial", range(16))
async def test_update_throttled_when_another_is_due_is_sent(mock_clock, harness, trial):
    """Two updates in one batch, at the very moment when an earlier one is due.

    Trio runs the pump and the timer of that moment in either order, so this needs a few trials.
    """
    stream = await open_stream(harness)
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
        st.sampled_from(["update", "update", "update", "stage", "note"]),
        st.sampled_from([0.0, 0.0, 0.01, 0.05, THROTTLE, 0.3]),
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(STEPS, st.booleans())
def test_random_bursts(steps, ends):
    """What is received is a subsequence of the log with all events that are not conflatable and the last one.

    An update that is not received is superseded by progress received within the throttle time.
    """
    clock = trio.testing.MockClock(autojump_threshold=0)
    trio.run(partial(_check_throttle, steps, ends), clock=clock)


async def _check_throttle(steps, ends):
    async with trio.open_nursery() as nursery:
        harness = ServerHarness(nursery)
        stream = await open_stream(harness)
        log = {}  # seq -> (kind, time published)
        received = {}  # seq -> time received

        async def receive():
            while (event := await stream.connection.event()) is not None:
                seq = int(event.id.rpartition("-")[2])
                assert seq not in received
                received[seq] = trio.current_time()

        nursery.start_soon(receive)
        for number, (kind, delay) in enumerate(steps, 1):
            match kind:
                case "update":
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
    assert list(received) == sorted(received)
    assert received.keys() <= log.keys()
    assert received.keys() >= {seq for seq, (kind, _) in log.items() if kind != "update"}
    if log:
        assert max(log) in received
    progress = [seq for seq in received if log[seq][0] != "note"]
    for seq, (kind, at) in log.items():
        newer = next((s for s in progress if s >= seq), None)
        if kind == "update":
            assert newer is not None
            assert received[newer] - at <= THROTTLE + 1e-9
