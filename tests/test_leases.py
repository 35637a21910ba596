"""The producer's promise: silent for a lease it has stalled, for three it is lost; and what it is told."""

from __future__ import annotations

import pytest
import trio
from harness import ServerHarness
from trio.testing import wait_all_tasks_blocked

from sseserve.config import Settings
from sseserve.engines.memory import MemoryEngine
from sseserve.errors import SessionEnded
from sseserve.model import Control, State
from sseserve.progress.tracker import Tracker

STREAM = "/api/sessions/s/status/stream"
CONTROL = "/api/sessions/s/control"


class Clock:
    """The time that a tracker is told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Silence:
    """A tracker with one session of a ten-second lease, and the events of its log."""

    def __init__(self):
        self.clock = Clock()
        self.engine = MemoryEngine(Settings(), lambda session, events: None)
        self.tracker = Tracker(self.engine, clock=self.clock)

    async def after(self, seconds):
        """Let so much time pass, look, and say what has been added to the log."""
        before = (await self.tracker.get("s")).seq
        self.clock.now += seconds
        await self.tracker.check_leases()
        page = await self.engine.read("s", before, 100)
        return [e.progress.status if e.progress else e.type for e in page.events]


@pytest.fixture
async def silence():
    silence = Silence()
    await silence.tracker.create("s", lease=10)
    return silence


async def test_one_lease_of_silence_is_stalled_three_are_lost(silence):
    """Exactly at one, and at three, it is not yet so; each is said once."""
    assert await silence.after(10) == []
    assert await silence.after(0.001) == ["stalled"]
    assert await silence.after(5) == []
    assert await silence.after(14.999) == []
    assert await silence.after(0.001) == ["lost"]
    assert (await silence.tracker.get("s")).progress.state is State.LOST
    assert await silence.after(1000) == []


async def test_a_server_that_did_not_look_says_the_end_alone(silence):
    """Nobody needs to hear that a lost worker has stalled."""
    assert await silence.after(31) == ["lost"]


@pytest.mark.parametrize("word", ["progress", "event", "nothing new"])
async def test_a_word_of_the_producer_renews_the_lease(silence, word):
    """Progress, an event of its own, even an update that says nothing."""
    for _ in range(10):
        assert await silence.after(9) == []
        if word == "event":
            await silence.tracker.emit("s", "note")
        else:
            await silence.tracker.update("s", progress=1 if word == "progress" else None)
    assert await silence.after(10.5) == ["stalled"]


async def test_what_others_say_does_not_renew_it(silence):
    """A watcher that asks for a pause is no sign of the worker's life."""
    await silence.tracker.update("s", progress=1)
    silence.clock.now += 8
    await silence.tracker.control("s", Control.PAUSE)
    assert await silence.after(2.5) == ["stalled"]


async def test_one_that_was_stalled_may_go_on_and_stall_again(silence):
    """Its next word is enough; the second silence is said as the first was."""
    assert await silence.after(15) == ["stalled"]
    await silence.tracker.update("s", progress=50)
    assert (await silence.tracker.get("s")).stalled is False
    assert await silence.after(10) == []
    assert await silence.after(1) == ["stalled"]


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
async def test_who_has_ended_has_kept_the_promise(silence, end):
    """Nothing follows an end."""
    await silence.tracker.update("s", status=end)
    assert await silence.after(1000) == []


async def test_without_a_lease_silence_means_nothing(silence):
    """Only who promises can break a promise."""
    await silence.tracker.create("free")
    assert await silence.after(31) == ["lost"]
    assert (await silence.tracker.get("free")).seq == 1


async def test_nothing_follows_the_loss(silence):
    """A worker that comes back late is told so."""
    await silence.after(31)
    with pytest.raises(SessionEnded):
        await silence.tracker.update("s", progress=99)


# Over HTTP, by the server's own sweep


@pytest.fixture
def harness(nursery):
    return ServerHarness(nursery)


async def begin(harness, **more):
    response = await harness.post("/api/sessions", {"session_id": "s", **more})
    assert response.status == 201
    return response


async def test_watchers_see_it_stall_and_get_lost(autojump_clock, harness):
    """``stalled`` after one lease, the end after three, within the sweep's second; the stream ends."""
    await begin(harness, lease=10)
    stream = await harness.stream(STREAM)
    await stream.next()
    stalled = await stream.next()
    assert stalled.event == "stalled"
    assert stalled.data["lease"] == 10
    assert 10 < trio.current_time() <= 11.1
    (lost,) = await stream.read_to_end()
    assert (lost.event, lost.data["status"], lost.data["state"]) == ("error", "lost", "lost")
    assert 30 < trio.current_time() <= 31.1


async def test_a_late_watcher_of_a_lost_job_gets_its_end_at_once(autojump_clock, harness):
    """In every dialect, and the stream ends."""
    await begin(harness, lease=1)
    await trio.sleep(5)
    at = trio.current_time()
    for target, end in (
        (STREAM, "error"),
        ("/api/interaction/events/s", "error"),
        ("/api/jobs/s/events", "job-failed"),
        ("/api/v1/jobs/s/events", "message"),
        ("/api/v1/sessions/s/status/stream", "message"),
        (CONTROL, "ended"),
    ):
        said = await harness.watch(target)
        assert said[-1].event == end, target
        assert (await harness.get(target, [("Last-Event-ID", said[-1].id)])).status == 204
    assert trio.current_time() == at


async def test_updates_over_http_keep_it_alive(autojump_clock, harness):
    """A worker that keeps its promise is never stalled."""
    await begin(harness, lease=2)
    stream = await harness.stream(STREAM)
    for percent in range(20):
        assert (await harness.post("/api/sessions/s/progress", {"progress": percent})).status == 202
        await trio.sleep(1.5)
    await harness.post("/api/sessions/s/progress", {"status": "completed"})
    assert {s.event for s in await stream.read_to_end()} == {"progress", "complete"}


@pytest.mark.parametrize("lease", [0, -1, 0.5, 86_401, "x"])
async def test_what_cannot_be_a_lease(autojump_clock, harness, lease):
    """From a second to a day."""
    assert (await harness.post("/api/sessions", {"session_id": "s", "lease": lease})).status == 422
    assert await harness.tracker.sessions() == []


# What the worker is told


async def test_control_comes_in_the_answer_to_the_next_update(autojump_clock, harness):
    """Every answer says whether to go on, pause or cancel."""
    await harness.tracker.update("s", progress=1)
    for action, control in (("pause", "pause"), ("resume", "continue"), ("cancel", "cancel")):
        assert (await harness.post(f"/api/sessions/s/{action}")).status == 202
        for path, body in (("progress", {"progress": 1}), ("events", {"type": "x"})):
            assert (await harness.post(f"/api/sessions/s/{path}", body)).json["control"] == control


async def test_the_control_stream(autojump_clock, harness):
    """What is asked now, then what will be; progress is none of the worker's business; then the end."""
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


async def test_a_worker_that_comes_back_misses_no_wish(autojump_clock, harness):
    """The control stream resumes as any other does."""
    await harness.tracker.update("s", progress=1)
    stream = await harness.stream(CONTROL)
    cursor = (await stream.next()).id
    await stream.disconnect()
    await harness.post("/api/sessions/s/pause")
    await harness.tracker.update("s", progress=2)
    await harness.post("/api/sessions/s/resume")
    stream = await harness.stream(CONTROL, cursor)
    said = await stream.take(3)
    assert [s.event for s in said] == ["resume", "control", "control"]
    assert [s.data["control"] for s in said[1:]] == ["pause", "continue"]


async def test_the_control_stream_ends_with_a_forced_cancel(autojump_clock, harness):
    """Who is cancelled by force learns it there, and so does who lost its session."""
    for session_id in ("s", "t"):
        await harness.tracker.update(session_id, progress=1)
    forced, deleted = [await harness.stream(f"/api/sessions/{s}/control") for s in ("s", "t")]
    await harness.post("/api/sessions/s/cancel", {"force": True})
    assert (await forced.read_to_end())[-1][:2] == ("ended", {"status": "cancelled"})
    await harness.request("DELETE", "/api/sessions/t")
    assert (await deleted.read_to_end())[-1].event == "deleted"


async def test_a_worker_listens_while_it_waits_to_begin(autojump_clock, harness):
    """A queued session that is cancelled has ended: nobody works on it yet."""
    links = (await begin(harness)).json["links"]
    stream = await harness.stream(links["control"])
    await harness.post(links["cancel"])
    await wait_all_tasks_blocked()
    assert [s.event for s in await stream.read_to_end()] == ["control", "ended"]
    assert (await harness.get("/api/sessions/none/control")).status == 404
