"""Leases: stalled after one lease time without an update, lost after three; and control requests."""

from __future__ import annotations

import pytest
import trio
from harness import ServerHarness
from trio.testing import wait_all_tasks_blocked

from sseserve.config import Settings
from sseserve.engines import EngineListener
from sseserve.engines.memory import MemoryEngine
from sseserve.errors import SessionEnded
from sseserve.model import Control, State
from sseserve.progress.tracker import Tracker

STREAM = "/api/sessions/s/status/stream"
CONTROL = "/api/sessions/s/control"


class Clock:
    """A clock that changes only when a test sets ``now``."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class LeasedSession:
    """A tracker with one session that has a lease of ten seconds.

    ``clock`` is the monotonic one, ``wall_clock`` the clock of day.
    """

    def __init__(self):
        self.clock = Clock()
        self.engine = MemoryEngine(Settings(), EngineListener())
        self.wall_clock = Clock()
        self.tracker = Tracker(self.engine, clock=self.wall_clock, monotonic=self.clock)

    async def events_after(self, seconds):
        """Advance the clock, check the leases, and return the statuses or types of the new events."""
        before = (await self.tracker.get("s")).seq
        self.clock.now += seconds
        await self.tracker.check_leases()
        page = await self.engine.read("s", before, 100)
        return [e.progress.status if e.progress else e.type for e in page.events]


@pytest.fixture
async def leased():
    leased = LeasedSession()
    await leased.tracker.create("s", lease=10)
    return leased


async def test_session_that_is_created_again_has_a_lease_of_its_own(leased):
    """The silence of the one before does not count, and nothing is kept of sessions that are gone."""
    assert await leased.events_after(9) == []
    await leased.tracker.delete("s")
    await leased.tracker.create("s", lease=10)
    assert await leased.events_after(9) == []
    await leased.tracker.delete("s")
    await leased.tracker.check_leases()
    assert not leased.tracker._leases._silences


async def test_an_older_record_does_not_renew_a_lease(leased):
    """One that was read before the producer's last event, and arrives after it."""
    older = await leased.tracker.get("s")
    await leased.tracker.update("s", progress=1)
    newer = await leased.tracker.get("s")
    leases = leased.tracker._leases
    for _ in range(3):
        leased.clock.now += 4
        assert leases.idle_time(older, leased.clock.now) == leases.idle_time(newer, leased.clock.now)
    assert leases.due(newer, leased.clock.now) == "stalled"


async def test_stalled_after_one_lease_lost_after_three(leased):
    """Strictly after one and three lease times, and reported once each."""
    assert await leased.events_after(10) == []
    assert await leased.events_after(0.001) == ["stalled"]
    assert await leased.events_after(5) == []
    assert await leased.events_after(14.999) == []
    assert await leased.events_after(0.001) == ["lost"]
    assert (await leased.tracker.get("s")).progress.state is State.LOST
    assert await leased.events_after(1000) == []


async def test_stalled_before_lost_if_checked_late(leased):
    """However late the first check is, the producer has one more lease time after ``stalled``."""
    assert await leased.events_after(31) == ["stalled"]
    assert await leased.events_after(10) == []
    assert await leased.events_after(0.001) == ["lost"]


async def test_update_after_a_late_check_renews_the_lease(leased):
    """The producer that was cut off with the server is not lost when it comes back in time."""
    assert await leased.events_after(3600) == ["stalled"]
    leased.clock.now += 9
    await leased.tracker.update("s", progress=1)
    assert await leased.events_after(10) == []


@pytest.mark.parametrize("jump", [3600, -3600])
async def test_clock_of_day_ends_no_lease(leased, jump):
    """Neither NTP nor an administrator who sets the clock."""
    leased.wall_clock.now += jump
    assert await leased.events_after(10) == []
    assert await leased.events_after(1) == ["stalled"]
    leased.wall_clock.now += jump
    assert await leased.events_after(18) == []
    leased.wall_clock.now += jump
    assert await leased.events_after(2) == ["lost"]


async def test_clock_of_day_deletes_no_session(autojump_clock):
    """Retention times run on the monotonic clock, too."""
    clock = Clock()
    engine = MemoryEngine(Settings(ttl=60, idle_ttl=60), EngineListener())
    tracker = Tracker(engine, clock=clock)
    await tracker.create("active")
    await tracker.update("ended", status="completed")
    for clock.now in (100_000.0, 0.0):
        await engine.expire(lambda _id: False)
        assert await engine.count() == 2
    await trio.sleep(61)
    await engine.expire(lambda _id: False)
    assert await engine.count() == 0


async def test_leases_begin_afresh_with_a_new_process(leased):
    """An engine that outlives the process has no times of its clock: a tracker begins when it first looks."""
    await leased.events_after(15)
    leased.tracker = Tracker(leased.engine, clock=leased.wall_clock, monotonic=leased.clock)
    assert await leased.events_after(3600) == []
    assert await leased.events_after(30) == []
    assert await leased.events_after(0.001) == ["lost"]


@pytest.mark.parametrize("activity", ["progress", "event", "empty update"])
async def test_every_update_renews_the_lease(leased, activity):
    """Progress, other events and even empty updates of the producer renew it."""
    for _ in range(10):
        assert await leased.events_after(9) == []
        if activity == "event":
            await leased.tracker.emit("s", "note")
        else:
            await leased.tracker.update("s", progress=1 if activity == "progress" else None)
    assert await leased.events_after(10.5) == ["stalled"]


async def test_control_requests_do_not_renew_the_lease(leased):
    """A watcher's pause request is no activity of the producer."""
    await leased.tracker.update("s", progress=1)
    leased.clock.now += 8
    await leased.tracker.control("s", Control.PAUSE)
    assert await leased.events_after(2.5) == ["stalled"]


async def test_stalled_session_recovers_and_stalls_again(leased):
    """One update is enough to recover; the next lease time without one is reported again."""
    assert await leased.events_after(15) == ["stalled"]
    await leased.tracker.update("s", progress=50)
    assert (await leased.tracker.get("s")).stalled is False
    assert await leased.events_after(10) == []
    assert await leased.events_after(1) == ["stalled"]


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
async def test_ended_session_is_never_stalled(leased, end):
    """No event follows the end."""
    await leased.tracker.update("s", status=end)
    assert await leased.events_after(1000) == []


async def test_session_without_a_lease_is_never_stalled(leased):
    """Only the session with a lease is lost; the other one gets no event."""
    await leased.tracker.create("free")
    assert await leased.events_after(31) == ["stalled"]
    assert await leased.events_after(31) == ["lost"]
    assert (await leased.tracker.get("free")).seq == 1


async def test_lost_session_rejects_updates(leased):
    """A producer that reports after the loss gets SessionEnded."""
    await leased.events_after(31)
    await leased.events_after(31)
    with pytest.raises(SessionEnded):
        await leased.tracker.update("s", progress=99)


# Over HTTP, with the server's own periodic check


@pytest.fixture
def harness(nursery):
    return ServerHarness(nursery)


async def create(harness, **more):
    response = await harness.post("/api/sessions", {"session_id": "s", **more})
    assert response.status == 201
    return response


async def test_watchers_get_stalled_and_lost(autojump_clock, harness):
    """``stalled`` after one lease time, the end after three, each within a second; then the stream ends."""
    await create(harness, lease=10)
    stream = await harness.stream(STREAM)
    await stream.next()
    stalled = await stream.next()
    assert stalled.event == "stalled"
    assert stalled.data["lease"] == 10
    assert 10 < trio.current_time() <= 11.1
    (lost,) = await stream.read_to_end()
    assert (lost.event, lost.data["status"], lost.data["state"]) == ("error", "lost", "lost")
    assert 30 < trio.current_time() <= 31.1


async def test_many_leases_take_a_part_of_the_time(autojump_clock, harness, monkeypatch):
    """Where it takes long to read them they are judged less often, and still are."""
    reads, leased = 0, harness.tracker.engine.leased

    async def read_slowly():
        nonlocal reads
        reads += 1
        await trio.sleep(1)
        return await leased()

    await harness.tracker.create("s", lease=5)
    monkeypatch.setattr(harness.tracker.engine, "leased", read_slowly)
    await trio.sleep(30)
    assert reads <= 7
    assert [e["event"] for e in (await harness.get("/api/sessions/s/events")).json["events"]][-2:] == [
        "stalled",
        "error",
    ]


async def test_suspended_server_loses_no_session(mock_clock, harness):
    """After a suspension, such as that of a virtual machine, leases begin afresh."""
    await create(harness, lease=10)

    async def advance(seconds):
        mock_clock.jump(seconds)
        await wait_all_tasks_blocked()
        return (await harness.tracker.get("s")).seq

    await wait_all_tasks_blocked()
    assert await advance(3600) == 1
    assert [await advance(1) for _ in range(9)] == [1] * 9
    assert await advance(3) == 2
    assert (await harness.tracker.get("s")).stalled


async def test_late_watcher_of_a_lost_job(autojump_clock, harness):
    """In every dialect it gets the end at once, and the stream ends."""
    await create(harness, lease=1)
    await trio.sleep(5)
    at = trio.current_time()
    for target, event in (
        (STREAM, "error"),
        ("/api/interaction/events/s", "error"),
        ("/api/jobs/s/events", "job-failed"),
        ("/api/v1/jobs/s/events", "message"),
        ("/api/v1/sessions/s/status/stream", "message"),
        (CONTROL, "ended"),
    ):
        messages = await harness.watch(target)
        assert messages[-1].event == event, target
        assert (await harness.get(target, [("Last-Event-ID", messages[-1].id)])).status == 204
    assert trio.current_time() == at


async def test_updates_over_http_renew_the_lease(autojump_clock, harness):
    """A session that is updated within its lease time is never stalled."""
    await create(harness, lease=2)
    stream = await harness.stream(STREAM)
    for percent in range(20):
        assert (await harness.post("/api/sessions/s/progress", {"progress": percent})).status == 202
        await trio.sleep(1.5)
    await harness.post("/api/sessions/s/progress", {"status": "completed"})
    assert {s.event for s in await stream.read_to_end()} == {"progress", "complete"}


@pytest.mark.parametrize("lease", [0, -1, 0.5, 86_401, "x"])
async def test_invalid_lease(autojump_clock, harness, lease):
    """A lease outside 1 s to one day is rejected."""
    assert (await harness.post("/api/sessions", {"session_id": "s", "lease": lease})).status == 422
    assert await harness.tracker.sessions() == []


# Control requests


async def test_control_is_in_the_response_to_an_update(autojump_clock, harness):
    """Every response says whether to continue, pause or cancel."""
    await harness.tracker.update("s", progress=1)
    for action, control in (("pause", "pause"), ("resume", "continue"), ("cancel", "cancel")):
        assert (await harness.post(f"/api/sessions/s/{action}")).status == 202
        for path, body in (("progress", {"progress": 1}), ("events", {"type": "x"})):
            assert (await harness.post(f"/api/sessions/s/{path}", body)).json["control"] == control


async def test_control_stream(autojump_clock, harness):
    """It has the current request, then each new one, then the end, and no progress."""
    await harness.tracker.update("s", progress=1)
    stream = await harness.stream(CONTROL)
    assert (await stream.next())[:2] == ("control", {"control": "continue"})
    await harness.post("/api/sessions/s/pause")
    assert (await stream.next())[:2] == ("control", {"control": "pause"})
    await harness.tracker.update("s", progress=2)
    await harness.tracker.emit("s", "note")
    assert await stream.is_silent()
    await harness.post("/api/sessions/s/resume")
    await harness.post("/api/sessions/s/cancel")
    await harness.tracker.update("s", status="cancelled")
    assert [s[:2] for s in await stream.read_to_end()] == [
        ("control", {"control": "continue"}),
        ("control", {"control": "cancel"}),
        ("ended", {"status": "cancelled"}),
    ]


async def test_control_stream_resumes_after_its_cursor(autojump_clock, harness):
    """A worker that reconnects gets every request made meanwhile."""
    await harness.tracker.update("s", progress=1)
    stream = await harness.stream(CONTROL)
    cursor = (await stream.next()).id
    await stream.disconnect()
    await harness.post("/api/sessions/s/pause")
    await harness.tracker.update("s", progress=2)
    await harness.post("/api/sessions/s/resume")
    stream = await harness.stream(CONTROL, cursor)
    messages = await stream.take(3)
    assert [s.event for s in messages] == ["resume", "control", "control"]
    assert [s.data["control"] for s in messages[1:]] == ["pause", "continue"]


async def test_control_stream_ends_with_its_session(autojump_clock, harness):
    """A forced cancel and a deletion of the session end the stream with an event."""
    for session_id in ("s", "t"):
        await harness.tracker.update(session_id, progress=1)
    forced, deleted = [await harness.stream(f"/api/sessions/{s}/control") for s in ("s", "t")]
    await harness.post("/api/sessions/s/cancel", {"force": True})
    assert (await forced.read_to_end())[-1][:2] == ("ended", {"status": "cancelled"})
    await harness.request("DELETE", "/api/sessions/t")
    assert (await deleted.read_to_end())[-1].event == "deleted"


async def test_control_stream_of_a_queued_session(autojump_clock, harness):
    """Cancelling a queued session ends it, and its control stream."""
    links = (await create(harness)).json["links"]
    stream = await harness.stream(links["control"])
    await harness.post(links["cancel"])
    await wait_all_tasks_blocked()
    assert [s.event for s in await stream.read_to_end()] == ["control", "ended"]
    assert (await harness.get("/api/sessions/none/control")).status == 404
