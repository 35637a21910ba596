"""Seed 001, the video studio: jobs with phases, eight event types, artifacts, control; Demo Mode."""

from __future__ import annotations

import io
import logging
import re

import pytest
import trio
from harness import START, ServerHarness, logged
from raw_client import HANDSHAKE, RawWebSocket, request_bytes
from trio.testing import wait_all_tasks_blocked

import sseserve
from sseserve.dialects.phases import PHASES, job_percent, phase_of, step_percent
from sseserve.logs import TextFormatter
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


def event_names(messages):
    return [m.event for m in messages]


async def publish(harness, **payload):
    response = await harness.post(PROGRESS, payload)
    assert response.status == 202, response
    return response


# Events


async def test_all_eight_event_types(autojump_clock, harness):
    """Jobs with the three ends send all types that the seed names, and no other."""
    seen = set()
    for number, end in enumerate(("succeeded", "failed", "cancelled")):
        job = f"job-{number}"
        await harness.tracker.create(job)
        await harness.tracker.update(job, status="running", stage="script", progress=3)
        await harness.tracker.update(job, progress=5)
        await harness.tracker.emit(job, "warning", {"message": "slow"})
        await harness.tracker.update(job, status=end)
        messages = await harness.watch(f"/api/jobs/{job}/events?replay=1")
        seen |= set(event_names(messages))
        assert event_names(messages)[-1] == {"succeeded": "job-completed"}.get(end, f"job-{end}")
    assert seen == TYPES


async def test_update_sends_what_it_changes(autojump_clock, harness):
    """A new state sends job-status, a new stage step-status, a percentage step-progress."""
    await harness.tracker.create("job-123")
    stream = await harness.stream(EVENTS)
    await stream.take(2)
    await publish(harness, stage="script", progress=0)
    assert event_names(await stream.take(3)) == ["job-status", "step-status", "step-progress"]
    await publish(harness, progress=50)
    assert event_names(await stream.take(1)) == ["step-progress"]
    await publish(harness, stage="tts", progress=0)
    assert event_names(await stream.take(2)) == ["step-status", "step-progress"]
    await publish(harness, status="paused")
    assert event_names(await stream.take(2)) == ["job-status", "step-progress"]
    assert await stream.is_silent()


async def test_members_of_a_progress_event(autojump_clock, harness):
    """``progress`` is of the phase, ``percent`` of the whole job."""
    await publish(harness, stage="tts", progress=50, message="reading line 3")
    message = (await (await harness.stream(EVENTS)).take(3))[-1]
    assert message.event == "step-progress"
    assert message.data == {
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


async def test_warning_and_non_fatal_error(autojump_clock, harness):
    """Both are sent as ``warning``, whatever their publisher called them, and the job goes on."""
    await publish(harness, stage="tts", progress=10)
    stream = await harness.stream(EVENTS)
    await stream.take(3)
    await harness.tracker.emit("job-123", "warning", {"message": "a"})
    await harness.tracker.emit("job-123", "error", {"message": "b"})
    assert [(m.event, m.data["message"]) for m in await stream.take(2)] == [
        ("warning", "a"),
        ("warning", "b"),
    ]
    assert (await harness.tracker.get("job-123")).ended is False


@pytest.mark.parametrize(
    ("error", "expected"), [("no voice", "no voice"), ({"code": "E7"}, {"code": "E7"}), (None, "it broke")]
)
async def test_failure_sends_error_and_job_failed(autojump_clock, harness, error, expected):
    """``error`` comes before ``job-failed``, and both have the details."""
    await publish(harness, stage="tts", progress=10)
    stream = await harness.stream(EVENTS)
    await stream.take(3)
    await publish(harness, status="failed", error=error, message="it broke")
    messages = await stream.read_to_end()
    assert event_names(messages) == ["job-status", "error", "job-failed"]
    assert messages[1].data["error"] == messages[2].data["error"] == expected
    assert (await harness.get("/api/jobs/job-123")).json["error"] == expected


@pytest.mark.parametrize(
    ("update", "message", "code"),
    [
        ({"error": "no voice"}, "no voice", "generic_error"),
        ({"error": {"code": "validation_error", "message": "no brief"}}, "no brief", "validation_error"),
        ({"error": {"code": "E7"}}, "the job failed: E7", "E7"),
        ({"error": {"message": ""}, "message": "it broke"}, "it broke", "generic_error"),
        ({"error": {"code": 7, "message": {"a": 1}}}, "the job failed: generic_error", "generic_error"),
        ({"message": "it broke"}, "it broke", "generic_error"),
        ({}, "the work failed; its worker gave no reason", "generic_error"),
    ],
)
async def test_error_event_always_has_a_message_and_a_code(autojump_clock, harness, update, message, code):
    """A page shows ``message`` as it is, so it is never empty; ``errorCode`` tells failures apart."""
    await publish(harness, status="failed", **update)
    *_, error, failed = await harness.watch(EVENTS)
    assert event_names([error, failed]) == ["error", "job-failed"]
    for data in (error.data, failed.data):
        assert (data["message"], data["errorCode"]) == (message, code)
    assert (await harness.get("/api/jobs/job-123")).json["errorCode"] == code


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (sseserve.JobValidationError("the brief is empty"), "validation_error", "the brief is empty"),
        (sseserve.ProviderError("the voice service is down"), "provider_error", "the voice service is down"),
        (ZeroDivisionError("division by zero"), "generic_error", "ZeroDivisionError: division by zero"),
        (sseserve.ProviderError(), "provider_error", "the job failed: provider_error"),
    ],
)
async def test_failures_of_a_runner_are_told_apart(autojump_clock, nursery, caplog, error, code, message):
    """Validation, provider and generic errors have codes of their own; only the last have a traceback."""

    async def runner(tracker, session_id, data):
        raise error

    harness = ServerHarness(nursery, runner=runner)
    job = (await harness.post("/api/jobs", {}, [("X-Correlation-ID", "corr-7")])).json["jobId"]
    event = next(m for m in await harness.watch(f"/api/jobs/{job}/events") if m.event == "error")
    assert (event.data["errorCode"], event.data["message"]) == (code, message)
    (line,) = logged(caplog, "the job has failed")
    assert (line["session_id"], line["correlation_id"]) == (job, "corr-7")
    assert ("Traceback" in caplog.text) is (code == "generic_error")


async def test_skipped_is_an_end(autojump_clock, harness):
    """A status of the seed's job store: the job has ended well, and its stream ends."""
    await publish(harness, status="Skipped", message="up to date")
    messages = await harness.watch(EVENTS)
    assert event_names(messages) == ["job-status", "job-completed"]
    assert {message.data["status"] for message in messages} == {"Skipped"}
    assert (await harness.get("/api/jobs/job-123")).json["status"] == "Skipped"
    assert (await harness.tracker.get("job-123")).progress.state == "succeeded"


async def test_lost_job_is_sent_as_failed(autojump_clock, harness):
    """The seed has no lost jobs; the error says that the job was lost."""
    await harness.tracker.update("job-123", status="lost")
    messages = await harness.watch(EVENTS)
    assert event_names(messages)[-1] == "job-failed"
    assert "lost" in messages[-1].data["error"]
    assert (messages[-1].data["errorCode"], messages[-1].data["message"]) == (
        "worker_lost",
        messages[-1].data["error"],
    )
    assert messages[-1].data["status"] == "Failed"


async def test_the_final_event_has_artifacts_and_output(autojump_clock, harness):
    """The seed's example, member by member."""
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


@pytest.mark.parametrize("size", ["sizeBytes", "size_bytes"])
async def test_output_is_found_by_name_and_size_in_either_spelling(autojump_clock, harness, size):
    """Artifacts as the seed's final event writes them, without a media type that says what they are."""
    video = {
        "name": "Film.MP4",
        "path": "/path/to/Film.MP4",
        "type": "application/octet-stream",
        size: 12345678,
    }
    subtitle = {"name": "video.srt", "path": "/path/to/video.srt"}
    await publish(harness, status="succeeded", artifacts=[subtitle, video])
    final = (await harness.watch(EVENTS))[-1]
    assert final.data["output"] == {
        "videoPath": "/path/to/Film.MP4",
        "subtitlePath": "/path/to/video.srt",
        "sizeBytes": 12345678,
    }
    assert final.data["artifacts"][1]["sizeBytes"] == 12345678


async def test_no_output_without_a_video(autojump_clock, harness):
    """Without a video ``output`` is null; other artifacts are listed."""
    await publish(
        harness, status="succeeded", artifacts=[{"name": "a.txt", "url": "/a.txt", "type": "text/plain"}]
    )
    final = (await harness.watch(EVENTS))[-1]
    assert final.data["output"] is None
    assert final.data["artifacts"][0]["path"] == "/a.txt"


@pytest.mark.parametrize("heartbeat", [None, 30.0])
async def test_keep_alive_comments_carry_the_time(autojump_clock, nursery, heartbeat):
    """``: keepalive: <ISO time>`` comes at least every 10 seconds, also where other heartbeats are rarer."""
    harness = ServerHarness(nursery, heartbeat=heartbeat)
    await publish(harness, stage="tts", progress=0)
    stream = await harness.stream(EVENTS)
    await stream.take(3)
    at = trio.current_time()
    for _ in range(6):
        line = await stream.connection.read_until(b"\n")
        assert re.fullmatch(rb": keepalive: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\n", line), line
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
    """The seed's table, in any case; every other stage is ``processing``."""
    assert [phase_of(stage) for stage in stages] == [phase] * len(stages)


def test_phases_cover_the_whole_job():
    """0-15, 15-35, 35-65, 65-85, 85-100: no gap, no overlap."""
    assert list(PHASES.items()) == [
        ("plan", (0, 15)),
        ("tts", (15, 35)),
        ("visuals", (35, 65)),
        ("compose", (65, 85)),
        ("render", (85, 100)),
    ]


@pytest.mark.parametrize(
    ("stage", "of_phase", "of_job"),
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
def test_percent_of_the_job_and_of_the_phase(stage, of_phase, of_job):
    """Each is computed from the other."""
    assert job_percent(stage, of_phase) == of_job
    assert step_percent(stage, of_job) == of_phase


@pytest.mark.parametrize("third", [1, 2, 7, 33, 99])
def test_percentages_survive_the_conversion(third):
    """A third of a phase is still a third after the conversion to the job's percentage and back."""
    for stage in PHASES:
        assert step_percent(stage, job_percent(stage, third / 3)) == pytest.approx(third / 3, abs=1e-3)


async def test_stage_without_a_percentage_begins_its_phase(autojump_clock, harness):
    """The job's percentage is then the start of the phase's range; an earlier phase does not lower it."""
    await publish(harness, stage="script", progress=100)
    await publish(harness, stage="visuals")
    assert (await harness.get("/api/jobs/job-123")).json["percent"] == 35
    await publish(harness, stage="tts", progress=50, message="again")
    stored = (await harness.get("/api/jobs/job-123")).json
    assert (stored["percent"], stored["stage"], stored["message"]) == (35, "tts", "again")
    await publish(harness, stage="assets", progress=50)
    stored = (await harness.get("/api/jobs/job-123")).json
    assert (stored["percent"], stored["progress"], stored["phase"]) == (50, 50, "visuals")


@pytest.mark.parametrize("percent", [-1, 101, "x", None])
async def test_invalid_percentages_are_refused(autojump_clock, harness, percent):
    """A stage's percentage is from 0 to 100; null changes nothing."""
    response = await harness.post(PROGRESS, {"stage": "tts", "progress": percent})
    assert response.status == (202 if percent is None else 422)


# Resuming


async def replay(harness, job):
    """Return all messages of a job from its first event on."""
    return await harness.watch(f"/api/jobs/{job}/events?replay=1")


async def run_job(harness, job="job-123"):
    """Run a job through all phases, with warnings; its first and last events are several messages each."""
    await harness.tracker.create(job)
    for stage, (low, high) in PHASES.items():
        await harness.tracker.update(job, stage=stage, progress=low)
        await harness.tracker.emit(job, "warning", {"stage": stage})
        await harness.tracker.update(job, progress=(low + high) / 2)
    await harness.tracker.update(job, status="failed", error="at the very end")
    return await replay(harness, job)


async def test_history_with_replay(autojump_clock, harness):
    """``?replay=1`` begins with the first event; without it an ended job sends its final event alone."""
    whole = await run_job(harness)
    assert [m.data["phase"] for m in whole if m.event == "step-status"] == list(PHASES)
    assert event_names(whole)[-1] == "job-failed"
    assert len({m.id for m in whole}) == len(whole)
    assert event_names(await harness.watch(EVENTS)) == ["job-status", "step-status", "error", "job-failed"]


async def test_a_cursor_resumes_between_any_two_messages(autojump_clock, harness):
    """A stream cut after any message, within an event or between two, resumes exactly there."""
    whole = await run_job(harness)
    assert any("." in m.id for m in whole)
    for cut, message in enumerate(whole[:-1], 1):
        resume, *rest = await harness.watch(EVENTS, message.id)
        assert resume.data == {"status": "ok", "missed": 0}
        assert whole[:cut] + rest == whole
    assert (await harness.get(EVENTS, [("Last-Event-ID", whole[-1].id)])).status == 204


async def test_resuming_after_every_message(autojump_clock, harness):
    """A connection that is cut after each message still gets the whole job."""
    whole = await run_job(harness)
    stream = await harness.stream(f"{EVENTS}?replay=1")
    seen = [await stream.next()]
    while seen[-1] != whole[-1]:
        await stream.disconnect()
        stream = await harness.stream(EVENTS, seen[-1].id)
        assert (await stream.next()).event == "resume"
        seen.append(await stream.next())
    assert seen == whole


async def test_live_and_replayed_messages_are_the_same(autojump_clock, harness):
    """Live messages have the same IDs within an event as replayed ones."""
    await harness.tracker.create("job-123")
    stream = await harness.stream(f"{EVENTS}?replay=1")
    await harness.tracker.update("job-123", stage="tts", progress=15)
    await harness.tracker.update("job-123", status="succeeded")
    assert await stream.read_to_end() == await replay(harness, "job-123")


async def test_cursor_within_an_event_in_another_dialect(autojump_clock, harness):
    """A dialect that sends the event as one message sends it again rather than skipping it."""
    whole = await run_job(harness)
    last = next(m for m in reversed(whole) if "." in m.id)
    messages = await harness.watch("/api/sessions/job-123/status/stream", last.id)
    assert event_names(messages) == ["resume", "error"]


# Create, read, control


async def test_create_get_and_list(autojump_clock, nursery):
    """A job is queued, has its links, and is described in the terms of the seed's job store."""
    started, go_on = trio.Event(), trio.Event()

    async def runner(tracker, session_id, data):
        await tracker.update(session_id, stage="script", progress=0)
        started.set()
        await go_on.wait()

    harness = ServerHarness(nursery, runner=runner)
    response = await harness.post("/api/jobs", {"title": "A film", "brief": "b"})
    body = response.json
    job = body["jobId"]
    assert response.status == 202
    assert response.headers["location"] == body["links"]["self"] == f"/api/jobs/{job}"
    assert (body["status"], body["title"], body["request"]["brief"]) == ("Queued", "A film", "b")
    await started.wait()
    stored = (await harness.get(body["links"]["self"])).json
    assert stored["id"] == stored["jobId"] == job
    assert (stored["status"], stored["stage"], stored["phase"]) == ("Running", "script", "plan")
    assert stored["startedAt"]
    assert stored["endedAt"] is None
    assert [j["jobId"] for j in (await harness.get("/api/jobs?state=running")).json["jobs"]] == [job]
    go_on.set()
    await wait_all_tasks_blocked()
    stored = (await harness.get(body["links"]["self"])).json
    assert (stored["status"], bool(stored["endedAt"])) == ("Done", True)
    assert (await harness.get("/api/jobs/none")).error["code"] == "session_not_found"
    assert (await harness.get("/api/jobs/none/events")).error["code"] == "session_not_found"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("queued", "Queued"),
        ("running", "Running"),
        ("completed", "Done"),
        ("failed", "Failed"),
        ("cancelled", "Canceled"),
    ],
)
async def test_statuses_of_the_job_store(autojump_clock, harness, status, expected):
    """The store has Done and Canceled where the events have Succeeded and Cancelled."""
    await harness.tracker.update("job-123", status=status)
    assert (await harness.get("/api/jobs/job-123")).json["status"] == expected


async def test_correlation_ids(autojump_clock, nursery):
    """X-Correlation-ID is returned and kept with the job; without a valid one it is the request's ID."""
    harness = ServerHarness(nursery, runner=_idle)
    response = await harness.post("/api/jobs", {}, [("X-Correlation-ID", "corr-7")])
    assert response.headers["x-correlation-id"] == response.json["correlationId"] == "corr-7"
    assert (await harness.get(response.json["links"]["self"])).json["correlationId"] == "corr-7"
    response = await harness.post("/api/quick/demo", None, [("X-Request-ID", "req-1")])
    assert response.headers["x-correlation-id"] == response.json["correlationId"] == "req-1"
    for invalid in ("x" * 129, "a b", "\xe9"):
        response = await harness.post("/api/jobs", {}, [("X-Correlation-ID", invalid)])
        assert response.headers["x-correlation-id"] == response.headers["x-request-id"]


async def test_lines_of_a_runner_have_the_correlation_id(nursery):
    """Whatever logs them, whichever request has started the job, until the job has ended."""
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(TextFormatter("%(message)s"))
    logging.getLogger("runner").addHandler(handler)

    async def runner(tracker, session_id, data):
        logging.getLogger("runner").warning("works")
        await has_both.wait()
        await trio.to_thread.run_sync(logging.getLogger("runner").warning, "in a thread")

    harness = ServerHarness(nursery, runner=runner, max_running_jobs=1)
    jobs, has_both = [], trio.Event()
    for number in (1, 2):
        response = await harness.post("/api/jobs", {}, [("X-Correlation-ID", f"corr-{number}")])
        jobs.append(response.json["jobId"])
    has_both.set()
    for job in jobs:
        await harness.watch(f"/api/jobs/{job}/events")
    logging.getLogger("runner").removeHandler(handler)
    assert output.getvalue().splitlines() == [
        f"{message} session_id={job} correlation_id=corr-{number}"
        for number, job in enumerate(jobs, 1)
        for message in ("works", "in a thread")
    ]


async def test_correlation_ids_on_every_path(autojump_clock, harness, caplog):
    """Every response has the request's, a stream's and an error's too, and it is in the log."""
    caplog.set_level("DEBUG", "sseserve")
    await publish(harness, stage="tts", progress=10)
    paths = [
        ("GET", "/api/jobs"),
        ("GET", "/api/jobs/job-123"),
        ("GET", "/api/jobs/none"),
        ("GET", "/api/jobs/none/events"),
        ("GET", "/api/jobs/none/ws"),
        ("POST", PROGRESS),
        ("POST", "/api/jobs/job-123/pause"),
        ("POST", "/api/jobs/job-123/resume"),
        ("POST", "/api/jobs/job-123/cancel"),
        ("POST", "/api/jobs"),
        ("POST", "/api/quick/demo"),
        ("PUT", "/api/jobs"),
    ]
    for number, (method, path) in enumerate(paths):
        correlation = f"corr-{number}"
        headers = [("X-Correlation-ID", correlation)]
        response = await harness.request(method, path, None if method == "GET" else b"{}", headers)
        assert response.headers["x-correlation-id"] == correlation, path
        (line,) = [line for line in logged(caplog, "request") if line["correlation_id"] == correlation]
        assert (line["method"], line["path"], line["status"]) == (method, path, response.status)
        assert line["request_id"] == response.headers["x-request-id"]
    stream = await harness.stream(EVENTS, headers=[("X-Correlation-ID", "corr-x")])
    assert stream.response.headers["x-correlation-id"] == "corr-x"
    response = await harness.get("/api/jobs/job-123")
    assert response.headers["x-correlation-id"] == response.headers["x-request-id"]


async def test_metrics_of_the_streams(autojump_clock, harness):
    """How many streams are open, how many were resumed, and how long events take to all of their watchers."""
    await publish(harness, stage="tts", progress=10)
    stream = await harness.stream(EVENTS)
    cursor = (await stream.take(3))[-1].id
    await stream.disconnect()
    streams = [await harness.stream(EVENTS, cursor) for _ in range(2)]
    await publish(harness, progress=20)
    for stream in streams:
        await stream.take(2)
    await wait_all_tasks_blocked()
    metrics = (await harness.get("/metrics")).body.decode()
    assert 'sseserve_streams{dialect="jobs",transport="sse"} 2.0' in metrics
    assert "sseserve_reconnects_total 2.0" in metrics
    assert "sseserve_delivery_seconds_count 2.0" in metrics
    (latency,) = re.findall(r"^sseserve_delivery_seconds_sum (\S+)$", metrics, re.MULTILINE)
    assert float(latency) == 0  # the virtual clock stands still


async def test_a_job_over_websocket(autojump_clock, harness):
    """``/api/jobs/{id}/ws`` has the messages of the event stream, with the same cursors."""
    await publish(harness, stage="tts", progress=10)
    await publish(harness, progress=20)
    connection = harness.connect()
    async with connection.stream:
        headers = [*HANDSHAKE, ("X-Correlation-ID", "corr-7")]
        await connection.send(request_bytes("GET", "/api/jobs/job-123/ws?replay=1", headers=headers))
        head = await connection.read_head()
        assert (head.status, head.headers["x-correlation-id"]) == (101, "corr-7")
        websocket = RawWebSocket(connection)
        seen = [await websocket.message() for _ in range(4)]
        await publish(harness, status="failed", error="no voice")
        seen += [await websocket.message() for _ in range(3)]
        assert (await websocket.message())[0] == 1000
    whole = await harness.watch(EVENTS + "?replay=1")
    assert [(m["event"], m["data"], m["id"]) for m in seen] == [tuple(m) for m in whole]


async def _idle(tracker, session_id, data):
    await trio.sleep_forever()


async def test_cancel_reaches_the_worker(autojump_clock, harness):
    """``cancel`` comes with the response to the next update, job-cancelled when the worker has stopped."""
    await publish(harness, stage="tts", progress=10)
    stream = await harness.stream(EVENTS)
    await stream.take(3)
    response = await harness.post("/api/jobs/job-123/cancel")
    assert (response.status, response.json["control"], response.json["status"]) == (202, "cancel", "Running")
    assert (await publish(harness, progress=11)).json["control"] == "cancel"
    await publish(harness, status="cancelled")
    messages = await stream.read_to_end()
    assert event_names(messages) == ["control", "step-progress", "job-status", "job-cancelled"]
    assert (await harness.post("/api/jobs/job-123/cancel")).error["code"] == "session_ended"


async def test_pause_and_resume(autojump_clock, harness):
    """Both reach the worker; the duration of a pause does not count for the estimate."""
    await publish(harness, stage="tts", progress=0)
    await trio.sleep(10)
    await publish(harness, progress=50)  # 10 % of the job in 10 s
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
    """Work at a constant rate is estimated exactly from the second update on; events have the estimate."""
    await publish(harness, stage="script", progress=0)
    stream = await harness.stream(EVENTS)
    await stream.take(3)
    for step in range(1, 5):
        await trio.sleep(6)
        await publish(harness, progress=step * 20)  # 3 % of the job in 6 s
        assert (await stream.next()).data["etaSeconds"] == pytest.approx((100 - 3 * step) * 2)


async def test_several_jobs_at_once(autojump_clock, harness):
    """A job's stream has the events of that job alone."""
    streams = {}
    for number in range(5):
        await harness.tracker.update(f"j{number}", stage="tts", progress=15)
        streams[number] = await harness.stream(f"/api/jobs/j{number}/events")
        await streams[number].take(3)
    for percent in range(16, 20):
        for number in streams:
            await harness.tracker.update(f"j{number}", progress=percent)
    for number, stream in streams.items():
        messages = await stream.take(4)
        assert {m.data["jobId"] for m in messages} == {f"j{number}"}
        assert [m.data["percent"] for m in messages] == [16, 17, 18, 19]
        assert await stream.is_silent()


# Demo Mode


async def test_quick_demo_renders_a_film(autojump_clock, harness):
    """Without configuration: all phases in their order and ranges, and artifacts that can be downloaded."""
    response = await harness.post("/api/quick/demo")
    job = response.json["jobId"]
    stream = await harness.stream(f"{response.json['links']['events']}?replay=1")
    messages = await stream.read_to_end()
    assert [m.data["phase"] for m in messages if m.event == "step-status"] == list(PHASES)
    percents = [m.data["percent"] for m in messages if m.event == "step-progress"]
    assert percents == sorted(percents)
    assert len(percents) > 50
    for m in messages:
        if m.data["phase"] in PHASES:
            low, high = PHASES[m.data["phase"]]
            assert low <= m.data["percent"] <= high, m
    final = messages[-1]
    assert final.event == "job-completed"
    artifacts = {artifact["name"]: artifact for artifact in final.data["artifacts"]}
    film = next(a for a in artifacts.values() if a["path"] == final.data["output"]["videoPath"])
    assert final.data["output"]["subtitlePath"] in {a["path"] for a in artifacts.values()}
    for artifact in artifacts.values():
        download = await harness.get(artifact["path"])
        assert download.status == 200
        assert download.headers["content-type"].startswith(artifact["type"])
        assert len(download.body) == artifact["sizeBytes"] > 0
    assert (await harness.get(film["path"])).body.startswith(b"\x89PNG\r\n\x1a\n")
    assert (await harness.get(f"/api/artifacts/{job}/none")).status == 404


async def test_artifacts_are_made_by_the_phases(autojump_clock, harness):
    """A demo job that is cancelled before its last phase has no artifacts."""
    job = (await harness.post("/api/quick/demo")).json["jobId"]
    stream = await harness.stream(f"/api/jobs/{job}/events")
    while (await stream.next()).data["phase"] != "compose":
        pass
    await harness.post(f"/api/jobs/{job}/cancel")
    messages = await stream.read_to_end()
    assert event_names(messages)[-1] == "job-cancelled"
    assert messages[-1].data["artifacts"] == []
    assert harness.app.artifacts._files == {}


@pytest.mark.parametrize("path", ["/api/jobs", "/api/v1/jobs", "/api/quick/demo"])
async def test_title_and_owner_of_a_job(autojump_clock, harness, path):
    """Null is as absent; a wrong value is refused with its place, and no job is created."""
    for member, value in (("title", 7), ("owner", ["a"]), ("owner", "x" * 257)):
        response = await harness.post(path, {member: value})
        assert (response.status, response.error["code"]) == (422, "invalid")
        assert f"$.{member}" in response.error["message"]
    assert await harness.tracker.sessions() == []
    job = (await harness.post(path, {"title": None, "owner": None})).json["jobId"]
    session = await harness.tracker.get(job)
    assert (session.owner, session.title is None) == (None, "demo" not in path)


@pytest.mark.parametrize("body", [None, b"", b"{}", b'{"title": "Mine", "x": [1]}'])
async def test_quick_demo_needs_no_body(autojump_clock, harness, body):
    """With any body or none the job completes."""
    response = await harness.post("/api/quick/demo", body)
    assert response.status == 202
    assert (
        event_names(await harness.watch(f"/api/jobs/{response.json['jobId']}/events"))[-1] == "job-completed"
    )


async def test_quick_demo_has_the_same_request_on_create_and_get(autojump_clock, harness):
    """Without a body it is the number that the film is made from."""
    created = (await harness.post("/api/quick/demo")).json
    assert isinstance(created["request"], int)
    assert (await harness.get(f"/api/jobs/{created['jobId']}")).json["request"] == created["request"]


async def test_quick_demo_does_not_use_the_runner(autojump_clock, nursery):
    """A configured runner is not called, so that the demo depends on nothing."""

    async def runner(tracker, session_id, data):
        raise AssertionError("not this one")

    harness = ServerHarness(nursery, runner=runner)
    job = (await harness.post("/api/quick/demo")).json["jobId"]
    assert event_names(await harness.watch(f"/api/jobs/{job}/events"))[-1] == "job-completed"


async def test_without_a_runner_jobs_are_demo_jobs(autojump_clock, harness):
    """A job that is created without a runner completes with output."""
    job = (await harness.post("/api/jobs", {"brief": "b"})).json["jobId"]
    final = (await harness.watch(f"/api/jobs/{job}/events"))[-1]
    assert final.event == "job-completed"
    assert final.data["output"]["videoPath"]


async def test_demo_pauses_and_resumes(autojump_clock, harness):
    """The demo follows control commands as any worker does."""
    job = (await harness.post("/api/quick/demo")).json["jobId"]
    await trio.sleep(5)
    await harness.post(f"/api/jobs/{job}/pause")
    await trio.sleep(100)
    assert (await harness.get(f"/api/jobs/{job}")).json["status"] == "Paused"
    await harness.post(f"/api/jobs/{job}/resume")
    assert event_names(await harness.watch(f"/api/jobs/{job}/events"))[-1] == "job-completed"
    assert (await harness.tracker.get(job)).control is Control.CONTINUE
