"""Seed 001, the video studio: jobs with phases, eight event types, artifacts, control; Demo Mode."""

from __future__ import annotations

import re

import pytest
import trio
from harness import START, ServerHarness
from trio.testing import wait_all_tasks_blocked

from sseserve.dialects.phases import PHASES, job_percent, phase_of, step_percent
from sseserve.model import Control, isotime

EVENTS = "/api/jobs/job-123/events"
PROGRESS = "/api/jobs/job-123/progress"
VIDEO = {"name": "video.mp4", "path": "/path/to/video.mp4", "type": "video/mp4", "size_bytes": 12345678}
SUBTITLE = {"name": "video.srt", "path": "/path/to/video.srt", "type": "application/x-subrip"}
TYPES = {
    "job-status",
    "step-status",
    "step-progress",
    "warning",
    "error",
    "job-completed",
    "job-failed",
    "job-cancelled",
}


@pytest.fixture
def harness(nursery):
    return ServerHarness(nursery)


def names(said):
    return [s.event for s in said]


async def publish(harness, **said):
    response = await harness.post(PROGRESS, said)
    assert response.status == 202, response
    return response


# Events


async def test_all_eight_event_types(autojump_clock, harness):
    """Between them, the three ends of a job say every type that the seed names, and no other."""
    seen = set()
    for number, end in enumerate(("succeeded", "failed", "cancelled")):
        job = f"job-{number}"
        await harness.tracker.create(job)
        await harness.tracker.update(job, status="running", stage="script", progress=3)
        await harness.tracker.update(job, progress=5)
        await harness.tracker.emit(job, "warning", {"message": "slow"})
        await harness.tracker.update(job, status=end)
        said = await harness.watch(f"/api/jobs/{job}/events?replay=1")
        seen |= set(names(said))
        assert names(said)[-1] == {"succeeded": "job-completed"}.get(end, f"job-{end}")
    assert seen == TYPES


async def test_what_an_update_changes_is_what_is_said(autojump_clock, harness):
    """A new state is job-status, a new stage step-status, the amount step-progress."""
    await harness.tracker.create("job-123")
    stream = await harness.stream(EVENTS)
    await stream.take(2)
    await publish(harness, stage="script", progress=0)
    assert names(await stream.take(3)) == ["job-status", "step-status", "step-progress"]
    await publish(harness, progress=50)
    assert names(await stream.take(1)) == ["step-progress"]
    await publish(harness, stage="tts", progress=0)
    assert names(await stream.take(2)) == ["step-status", "step-progress"]
    await publish(harness, status="paused")
    assert names(await stream.take(2)) == ["job-status", "step-progress"]
    assert await stream.is_silent()


async def test_an_event_says_who_where_and_how_far(autojump_clock, harness):
    """The members of a progress event; ``progress`` is of the phase, ``percent`` of the whole."""
    await publish(harness, stage="tts", progress=50, message="reading line 3")
    said = (await (await harness.stream(EVENTS)).take(3))[-1]
    assert said.event == "step-progress"
    assert said.data == {
        "jobId": "job-123",
        "status": "Running",
        "stage": "tts",
        "phase": "tts",
        "percent": 25,
        "progress": 50,
        "message": "reading line 3",
        "etaSeconds": None,
        "timestamp": isotime(START),
    }


async def test_a_warning_and_an_error_that_ends_nothing(autojump_clock, harness):
    """Non-fatal issues are warnings here, whatever their publisher called them; the job goes on."""
    await publish(harness, stage="tts", progress=10)
    stream = await harness.stream(EVENTS)
    await stream.take(3)
    await harness.tracker.emit("job-123", "warning", {"message": "a"})
    await harness.tracker.emit("job-123", "error", {"message": "b"})
    assert [(s.event, s.data["message"]) for s in await stream.take(2)] == [
        ("warning", "a"),
        ("warning", "b"),
    ]
    assert (await harness.tracker.get("job-123")).ended is False


@pytest.mark.parametrize(
    ("error", "expected"), [("no voice", "no voice"), ({"code": "E7"}, {"code": "E7"}), (None, "it broke")]
)
async def test_a_failure_is_an_error_and_the_end(autojump_clock, harness, error, expected):
    """``error`` comes before ``job-failed``, both with the details."""
    await publish(harness, stage="tts", progress=10)
    stream = await harness.stream(EVENTS)
    await stream.take(3)
    await publish(harness, status="failed", error=error, message="it broke")
    said = await stream.read_to_end()
    assert names(said) == ["job-status", "error", "job-failed"]
    assert said[1].data["error"] == said[2].data["error"] == expected
    assert (await harness.get("/api/jobs/job-123")).json["error"] == expected


async def test_a_lost_worker_is_a_failure(autojump_clock, harness):
    """The studio knows no lost jobs; it learns why it failed."""
    await harness.tracker.update("job-123", status="lost")
    said = await harness.watch(EVENTS)
    assert names(said)[-1] == "job-failed"
    assert "lost" in said[-1].data["error"]
    assert said[-1].data["status"] == "Failed"


async def test_the_final_event_has_artifacts_and_output(autojump_clock, harness):
    """The seed's own example, member by member."""
    await publish(harness, stage="render", progress=90)
    await publish(harness, status="succeeded", artifacts=[SUBTITLE, VIDEO])
    final = (await harness.watch(EVENTS))[-1]
    assert final.event == "job-completed"
    assert final.data["status"] == "Succeeded"
    assert final.data["jobId"] == "job-123"
    video = {
        "name": "video.mp4",
        "path": "/path/to/video.mp4",
        "type": "video/mp4",
        "sizeBytes": 12345678,
    }
    assert video in final.data["artifacts"]
    assert final.data["output"] == {
        "videoPath": "/path/to/video.mp4",
        "subtitlePath": "/path/to/video.srt",
        "sizeBytes": 12345678,
    }
    stored = (await harness.get("/api/jobs/job-123")).json
    assert (stored["artifacts"], stored["output"]) == (final.data["artifacts"], final.data["output"])


async def test_without_a_film_there_is_no_output(autojump_clock, harness):
    """What was not made is not named."""
    await publish(
        harness, status="succeeded", artifacts=[{"name": "a.txt", "url": "/a.txt", "type": "text/plain"}]
    )
    final = (await harness.watch(EVENTS))[-1]
    assert final.data["output"] is None
    assert final.data["artifacts"][0]["path"] == "/a.txt"


async def test_keep_alive_comments_carry_the_time(autojump_clock, harness):
    """``: keepalive: <ISO time>``, at least every 10 seconds of silence."""
    await publish(harness, stage="tts", progress=0)
    stream = await harness.stream(EVENTS)
    await stream.take(3)
    at = trio.current_time()
    for _ in range(6):
        block = await stream.connection.read_until(b"\n\n")
        assert re.fullmatch(rb": keepalive: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\n\n", block), block
        assert 5 < trio.current_time() - at <= 10
        at = trio.current_time()


# Phases


@pytest.mark.parametrize(
    ("stages", "phase"),
    [
        (["initialization", "queued", "Queued"], "plan"),
        (["script", "planning", "brief", "BRIEF"], "plan"),
        (["tts", "audio", "voice"], "tts"),
        (["visuals", "images", "assets"], "visuals"),
        (["composition", "timeline", "compose"], "compose"),
        (["rendering", "render", "encode"], "render"),
        (["complete", "done"], "complete"),
        (["", "other", "scripting"], "processing"),
    ],
)
def test_stage_to_phase(stages, phase):
    """The seed's table, with any case, and ``processing`` for all else."""
    assert [phase_of(stage) for stage in stages] == [phase] * len(stages)


def test_the_phases_cover_the_whole():
    """0-15, 15-35, 35-65, 65-85, 85-100: no gap, no overlap."""
    assert list(PHASES.items()) == [
        ("plan", (0, 15)),
        ("tts", (15, 35)),
        ("visuals", (35, 65)),
        ("compose", (65, 85)),
        ("render", (85, 100)),
    ]


@pytest.mark.parametrize(
    ("stage", "within", "whole"),
    [
        ("script", 0, 0),
        ("script", 100, 15),
        ("voice", 50, 25),
        ("images", 10, 38),
        ("timeline", 100, 85),
        ("encode", 40, 91),
        ("complete", 100, 100),
        ("unheard of", 42, 42),
        (None, 42, 42),
    ],
)
def test_percent_of_the_whole_and_of_the_phase(stage, within, whole):
    """Each is got from the other."""
    assert job_percent(stage, within) == whole
    assert step_percent(stage, whole) == within


@pytest.mark.parametrize("third", [1, 2, 7, 33, 99])
def test_what_goes_out_is_what_came_in(third):
    """A third of a phase is still a third when it arrives."""
    for stage in PHASES:
        assert step_percent(stage, job_percent(stage, third / 3)) == pytest.approx(third / 3, abs=1e-3)


async def test_a_phase_that_begins_has_those_before_it_behind_it(autojump_clock, harness):
    """A stage without a percentage is at the beginning of its phase; going back is refused."""
    await publish(harness, stage="script", progress=100)
    await publish(harness, stage="visuals")
    assert (await harness.get("/api/jobs/job-123")).json["percent"] == 35
    response = await harness.post(PROGRESS, {"stage": "tts", "progress": 50})
    assert (response.status, response.error["code"]) == (422, "invalid_progress")
    await publish(harness, stage="assets", progress=50)
    stored = (await harness.get("/api/jobs/job-123")).json
    assert (stored["percent"], stored["progress"], stored["phase"]) == (50, 50, "visuals")


@pytest.mark.parametrize("percent", [-1, 101, "x", None])
async def test_what_is_no_percentage_is_refused(autojump_clock, harness, percent):
    """Of a stage, too, percent are 0 to 100; none at all is no change."""
    response = await harness.post(PROGRESS, {"stage": "tts", "progress": percent})
    assert response.status == (202 if percent is None else 422)


# Coming back


async def everything(harness, job):
    """All messages of a job from its beginning."""
    return await harness.watch(f"/api/jobs/{job}/events?replay=1")


async def a_whole_job(harness, job="job-123"):
    """Five phases, with warnings; its first and last events are of several messages."""
    await harness.tracker.create(job)
    for stage, (low, high) in PHASES.items():
        await harness.tracker.update(job, stage=stage, progress=low)
        await harness.tracker.emit(job, "warning", {"stage": stage})
        await harness.tracker.update(job, progress=(low + high) / 2)
    await harness.tracker.update(job, status="failed", error="at the very end")
    return await everything(harness, job)


async def test_history_with_replay(autojump_clock, harness):
    """``?replay=1`` plays a job from its first event; without it one gets where it stands."""
    whole = await a_whole_job(harness)
    assert [s.data["phase"] for s in whole if s.event == "step-status"] == list(PHASES)
    assert names(whole)[-1] == "job-failed"
    assert len({s.id for s in whole}) == len(whole)
    assert names(await harness.watch(EVENTS)) == ["job-status", "step-status", "error", "job-failed"]


async def test_a_cursor_resumes_between_any_two_messages(autojump_clock, harness):
    """Cut behind every message, within an event or between two, and resumed: the same list, exactly."""
    whole = await a_whole_job(harness)
    assert any("." in s.id for s in whole)
    for cut, said in enumerate(whole[:-1], 1):
        resume, *rest = await harness.watch(EVENTS, said.id)
        assert resume.data == {"status": "ok", "missed": 0}
        assert whole[:cut] + rest == whole
    assert (await harness.get(EVENTS, [("Last-Event-ID", whole[-1].id)])).status == 204


async def test_one_message_at_a_time_is_the_whole_job(autojump_clock, harness):
    """A connection that is cut behind each message still gets the job, message by message."""
    whole = await a_whole_job(harness)
    stream = await harness.stream(f"{EVENTS}?replay=1")
    seen = [await stream.next()]
    while seen[-1] != whole[-1]:
        await stream.disconnect()
        stream = await harness.stream(EVENTS, seen[-1].id)
        assert (await stream.next()).event == "resume"
        seen.append(await stream.next())
    assert seen == whole


async def test_a_live_stream_can_be_cut_anywhere_too(autojump_clock, harness):
    """What comes live has the same places within events as what is replayed."""
    await harness.tracker.create("job-123")
    stream = await harness.stream(f"{EVENTS}?replay=1")
    await harness.tracker.update("job-123", stage="tts", progress=15)
    await harness.tracker.update("job-123", status="succeeded")
    assert await stream.read_to_end() == await everything(harness, "job-123")


async def test_a_place_within_an_event_means_something_to_every_dialect(autojump_clock, harness):
    """Taken to a dialect that says the event in one message, it is said whole rather than lost."""
    whole = await a_whole_job(harness)
    last = next(s for s in reversed(whole) if "." in s.id)
    said = await harness.watch("/api/sessions/job-123/status/stream", last.id)
    assert names(said) == ["resume", "error"]


# Create, look, control


async def test_create_get_and_list(autojump_clock, nursery):
    """A job is queued, has its links, and can be looked at in the words of the studio's store."""
    started, go_on = trio.Event(), trio.Event()

    async def runner(tracker, session_id, data):
        await tracker.update(session_id, stage="script", progress=0)
        started.set()
        await go_on.wait()

    harness = ServerHarness(nursery, runner=runner)
    response = await harness.post("/api/jobs", {"title": "A film", "brief": "b"})
    made = response.json
    job = made["jobId"]
    assert response.status == 202
    assert response.headers["location"] == made["links"]["self"] == f"/api/jobs/{job}"
    assert (made["status"], made["title"], made["request"]["brief"]) == ("Queued", "A film", "b")
    await started.wait()
    stored = (await harness.get(made["links"]["self"])).json
    assert stored["id"] == stored["jobId"] == job
    assert (stored["status"], stored["stage"], stored["phase"]) == ("Running", "script", "plan")
    assert stored["startedAt"]
    assert stored["endedAt"] is None
    assert [j["jobId"] for j in (await harness.get("/api/jobs?state=running")).json["jobs"]] == [job]
    go_on.set()
    await wait_all_tasks_blocked()
    stored = (await harness.get(made["links"]["self"])).json
    assert (stored["status"], bool(stored["endedAt"])) == ("Done", True)
    assert (await harness.get("/api/jobs/none")).error["code"] == "session_not_found"
    assert (await harness.get("/api/jobs/none/events")).error["code"] == "session_not_found"


@pytest.mark.parametrize(
    ("status", "word"),
    [
        ("queued", "Queued"),
        ("running", "Running"),
        ("completed", "Done"),
        ("failed", "Failed"),
        ("cancelled", "Canceled"),
    ],
)
async def test_the_words_of_the_job_store(autojump_clock, harness, status, word):
    """The store says Done and Canceled where the events say Succeeded and Cancelled."""
    await harness.tracker.update("job-123", status=status)
    assert (await harness.get("/api/jobs/job-123")).json["status"] == word


async def test_correlation_ids(autojump_clock, nursery):
    """X-Correlation-ID is taken, answered, and kept with the job; without one the request's id is."""
    harness = ServerHarness(nursery, runner=_idle)
    response = await harness.post("/api/jobs", {}, [("X-Correlation-ID", "corr-7")])
    assert response.headers["x-correlation-id"] == response.json["correlationId"] == "corr-7"
    assert (await harness.get(response.json["links"]["self"])).json["correlationId"] == "corr-7"
    response = await harness.post("/api/quick/demo", None, [("X-Request-ID", "req-1")])
    assert response.headers["x-correlation-id"] == response.json["correlationId"] == "req-1"
    for unsound in ("x" * 129, "a b", "\xe9"):
        response = await harness.post("/api/jobs", {}, [("X-Correlation-ID", unsound)])
        assert response.headers["x-correlation-id"] == response.headers["x-request-id"]


async def _idle(tracker, session_id, data):
    await trio.sleep_forever()


async def test_cancel_reaches_the_worker(autojump_clock, harness):
    """In the answer to its next update; job-cancelled is said when it has stopped."""
    await publish(harness, stage="tts", progress=10)
    stream = await harness.stream(EVENTS)
    await stream.take(3)
    response = await harness.post("/api/jobs/job-123/cancel")
    assert (response.status, response.json["control"], response.json["status"]) == (202, "cancel", "Running")
    assert (await publish(harness, progress=11)).json["control"] == "cancel"
    await publish(harness, status="cancelled")
    said = await stream.read_to_end()
    assert names(said) == ["control", "step-progress", "job-status", "job-cancelled"]
    assert (await harness.post("/api/jobs/job-123/cancel")).error["code"] == "session_ended"


async def test_pause_and_resume(autojump_clock, harness):
    """Both reach the worker; the time of a pause does not count for the estimate."""
    await publish(harness, stage="tts", progress=0)
    await trio.sleep(10)
    await publish(harness, progress=50)  # 10 % of the whole in 10 s
    assert (await harness.post("/api/jobs/job-123/pause")).json["control"] == "pause"
    assert (await publish(harness, status="paused")).json["control"] == "pause"
    assert (await harness.get("/api/jobs/job-123")).json["status"] == "Paused"
    await trio.sleep(1000)
    assert (await harness.post("/api/jobs/job-123/resume")).json["control"] == "continue"
    assert (await publish(harness, status="running")).json["control"] == "continue"
    await trio.sleep(10)
    await publish(harness, progress=100)
    assert (await harness.get("/api/jobs/job-123")).json["etaSeconds"] == pytest.approx(65, abs=0.5)


async def test_eta(autojump_clock, harness):
    """Steady work is estimated exactly from the second update on, and the estimate is in the events."""
    await publish(harness, stage="script", progress=0)
    stream = await harness.stream(EVENTS)
    await stream.take(3)
    for step in range(1, 5):
        await trio.sleep(6)
        await publish(harness, progress=step * 20)  # 3 % of the whole in 6 s
        assert (await stream.next()).data["etaSeconds"] == pytest.approx((100 - 3 * step) * 2)


async def test_several_jobs_at_once(autojump_clock, harness):
    """Jobs do not hear of each other."""
    streams = {}
    for number in range(5):
        await harness.tracker.update(f"j{number}", stage="tts", progress=15)
        streams[number] = await harness.stream(f"/api/jobs/j{number}/events")
        await streams[number].take(3)
    for percent in range(16, 20):
        for number in streams:
            await harness.tracker.update(f"j{number}", progress=percent)
    for number, stream in streams.items():
        said = await stream.take(4)
        assert {s.data["jobId"] for s in said} == {f"j{number}"}
        assert [s.data["percent"] for s in said] == [16, 17, 18, 19]
        assert await stream.is_silent()


# Demo Mode


async def test_quick_demo_makes_a_film(autojump_clock, harness):
    """With nothing configured: all phases in their order and ranges, and files that download."""
    response = await harness.post("/api/quick/demo")
    job = response.json["jobId"]
    stream = await harness.stream(f"{response.json['links']['events']}?replay=1")
    said = await stream.read_to_end()
    assert [s.data["phase"] for s in said if s.event == "step-status"] == list(PHASES)
    percents = [s.data["percent"] for s in said if s.event == "step-progress"]
    assert percents == sorted(percents)
    assert len(percents) > 50
    for s in said:
        if s.data["phase"] in PHASES:
            low, high = PHASES[s.data["phase"]]
            assert low <= s.data["percent"] <= high, s
    final = said[-1]
    assert final.event == "job-completed"
    made = {artifact["name"]: artifact for artifact in final.data["artifacts"]}
    film = next(a for a in made.values() if a["path"] == final.data["output"]["videoPath"])
    assert final.data["output"]["subtitlePath"] in {a["path"] for a in made.values()}
    for artifact in made.values():
        download = await harness.get(artifact["path"])
        assert download.status == 200
        assert download.headers["content-type"].startswith(artifact["type"])
        assert len(download.body) == artifact["sizeBytes"] > 0
    assert (await harness.get(film["path"])).body.startswith(b"\x89PNG\r\n\x1a\n")
    assert (await harness.get(f"/api/artifacts/{job}/none")).status == 404


async def test_the_files_are_made_by_the_phases(autojump_clock, harness):
    """Cancelled before its last phase, a demonstration has made nothing."""
    job = (await harness.post("/api/quick/demo")).json["jobId"]
    stream = await harness.stream(f"/api/jobs/{job}/events")
    while (await stream.next()).data["phase"] != "compose":
        pass
    await harness.post(f"/api/jobs/{job}/cancel")
    said = await stream.read_to_end()
    assert names(said)[-1] == "job-cancelled"
    assert said[-1].data["artifacts"] == []
    assert harness.app.artifacts._files == {}


@pytest.mark.parametrize("body", [None, b"", b"{}", b'{"title": "Mine", "x": [1]}'])
async def test_the_demo_needs_no_request(autojump_clock, harness, body):
    """Whatever a browser posts, it works."""
    response = await harness.post("/api/quick/demo", body)
    assert response.status == 202
    assert names(await harness.watch(f"/api/jobs/{response.json['jobId']}/events"))[-1] == "job-completed"


async def test_the_demo_is_a_demo_beside_a_runner(autojump_clock, nursery):
    """A configured runner does not get it: the fallback depends on nothing."""

    async def runner(tracker, session_id, data):
        raise AssertionError("not this one")

    harness = ServerHarness(nursery, runner=runner)
    job = (await harness.post("/api/quick/demo")).json["jobId"]
    assert names(await harness.watch(f"/api/jobs/{job}/events"))[-1] == "job-completed"


async def test_without_a_runner_jobs_are_demonstrations(autojump_clock, harness):
    """Create never spins without output."""
    job = (await harness.post("/api/jobs", {"brief": "b"})).json["jobId"]
    final = (await harness.watch(f"/api/jobs/{job}/events"))[-1]
    assert final.event == "job-completed"
    assert final.data["output"]["videoPath"]


async def test_the_demo_pauses_and_goes_on(autojump_clock, harness):
    """The demonstration obeys as any worker does."""
    job = (await harness.post("/api/quick/demo")).json["jobId"]
    await trio.sleep(5)
    await harness.post(f"/api/jobs/{job}/pause")
    await trio.sleep(100)
    assert (await harness.get(f"/api/jobs/{job}")).json["status"] == "Paused"
    await harness.post(f"/api/jobs/{job}/resume")
    assert names(await harness.watch(f"/api/jobs/{job}/events"))[-1] == "job-completed"
    assert (await harness.tracker.get(job)).control is Control.CONTINUE
