"""Seed 000, the interaction service: typed events, several readers, fractions of a stage."""

from __future__ import annotations

import json
import logging

import pytest
from harness import ServerHarness
from trio.testing import wait_all_tasks_blocked

import sseserve
from sseserve.errors import Invalid, SessionEnded

PATH = "/api/interaction/events/session123"
OTHER_STREAMS = (
    "/api/sessions/{}/status/stream",
    "/api/jobs/{}/events",
    "/api/v1/jobs/{}/events",
    "/api/v1/sessions/{}/status/stream",
)


@pytest.fixture
def harness(nursery):
    return ServerHarness(nursery)


async def publish(harness, kind, data, **more):
    return await harness.post(PATH, {"type": kind, "data": data, **more})


async def test_stream_headers(autojump_clock, harness):
    """The response is an event stream that must not be cached or buffered."""
    stream = await harness.stream(PATH)
    assert stream.response.headers["content-type"] == "text/event-stream"
    assert "no-cache" in stream.response.headers["cache-control"]
    assert stream.response.headers["x-accel-buffering"] == "no"


async def test_an_event_has_id_retry_type_and_data(autojump_clock, harness):
    """A published event arrives with its fields, in the byte format of the seed."""
    stream = await harness.stream(PATH)
    response = await publish(harness, "transcription", {"text": "a", "confidence": 0.95}, retry=3000)
    assert response.status == 202
    message = await stream.next()
    assert (message.event, message.data) == ("transcription", {"text": "a", "confidence": 0.95})
    assert message.id == response.json["id"]
    assert stream.connection.decoder.retry == 3000
    block = (
        f'event: transcription\nretry: 3000\ndata: {{"text": "a", "confidence": 0.95}}\nid: {message.id}\n\n'
    )
    assert stream.raw.decode() == block


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("processing", {"progress": 0.5}),
        ("complete", {"message": "done"}),
        ("error", {"code": "E", "recoverable": True}),
        ("error", {"code": "E", "recoverable": False}),
        ("note", 1),
    ],
)
async def test_every_type_may_set_the_retry_time(autojump_clock, harness, kind, data):
    """The reconnection time reaches the clients of all dialects, once for each event."""
    paths = [PATH, *(path.format("session123") for path in OTHER_STREAMS)]
    await publish(harness, "processing", {"progress": 0})
    streams = [await harness.stream(path) for path in paths]
    for stream in streams:
        await stream.next()
    await publish(harness, "processing", {"progress": 0.4})
    assert (await publish(harness, kind, data, retry=3000)).status == 202
    for stream in streams:
        while stream.connection.decoder.retry is None:
            await stream.next()
        assert stream.raw.count(b"retry: 3000\n") == 1


@pytest.mark.parametrize("retry", [-1, 86_400_001])
async def test_invalid_retry_times_are_refused(autojump_clock, harness, retry):
    """Of progress, of an end and of any other event."""
    for kind in ("processing", "complete", "note"):
        response = await publish(harness, kind, {}, retry=retry)
        assert (response.status, response.error["code"]) == (422, "invalid")
    assert await harness.tracker.sessions() == []


async def test_data_arrives_as_it_was_published(autojump_clock, harness):
    """Members, their order and the format of numbers are kept in processing and error events."""
    stream = await harness.stream(PATH)
    processing = '{"stage":"audio-transcription","progress":0.50,"message":"half","speaker":{"z":1,"a":2}}'
    failure = '{"recoverable":false,"code":"E","message":"m","extra":[1]}'
    for kind, data in (("processing", processing), ("error", failure)):
        body = f'{{"type":"{kind}","data":{data}}}'.encode()
        assert (await harness.post(PATH, body)).status == 202
    await stream.read_to_end()
    lines = [line for line in stream.raw.decode().split("\n") if line.startswith("data: ")]
    assert lines == ["data: " + processing, "data: " + failure]


async def test_indented_json_arrives_on_one_line(autojump_clock, harness):
    """Line breaks in published JSON do not split the event."""
    stream = await harness.stream(PATH)
    body = b'{"type": "processing", "data": {\r\n"stage": "a",\n\n"progress": 0.5}}'
    assert (await harness.post(PATH, body)).status == 202
    assert (await stream.next()).data == {"stage": "a", "progress": 0.5}
    assert stream.raw.count(b"data:") == 1


async def test_the_seeds_example(autojump_clock, harness):
    """The audio service's events arrive in order: processing, processing, transcription, error."""
    stream = await harness.stream(PATH)
    events = [
        ("processing", {"stage": "audio-transcription", "progress": 0, "message": "Starting..."}),
        ("processing", {"stage": "audio-transcription", "progress": 0.5, "message": "Transcribing..."}),
        ("transcription", {"text": "Transcribed text...", "confidence": 0.95}),
        ("error", {"code": "TRANSCRIPTION_FAILED", "message": "Failed", "recoverable": True}),
    ]
    for kind, data in events:
        assert (await publish(harness, kind, data)).status == 202
    assert [(message.event, message.data) for message in await stream.take(4)] == events


async def test_every_reader_gets_every_event(autojump_clock, harness):
    """Each reader gets all events, once and in order."""
    streams = [await harness.stream(PATH) for _ in range(5)]
    for number in range(10):
        await publish(harness, "note", number)
    for stream in streams:
        assert [message.data for message in await stream.take(10)] == list(range(10))


async def test_disconnect_ends_no_other_stream(autojump_clock, harness):
    """In the seed a reader that disconnected removed the channel of all."""
    leaving, staying = await harness.stream(PATH), await harness.stream(PATH)
    await publish(harness, "note", 1)
    await leaving.next()
    await leaving.disconnect()
    await wait_all_tasks_blocked()
    assert harness.broker.count_watchers("session123").total() == 1
    await publish(harness, "note", 2)
    assert [message.data for message in await staying.take(2)] == [1, 2]


async def test_events_without_listeners_are_kept(autojump_clock, harness, caplog):
    """They are kept for clients that connect later, and each is a warning in the log, in the seed's words."""
    await publish(harness, "note", 1)
    await harness.events.publish("session123", "note", 2)
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert messages == ["No active listeners for session session123"] * 2
    for _ in range(2):
        stream = await harness.stream(PATH)
        assert [message.data for message in await stream.take(2)] == [1, 2]


async def test_other_dialects_do_not_warn_of_no_listeners(autojump_clock, harness, caplog):
    """Their workers publish whether or not somebody watches."""
    for path in ("/api/sessions/s/progress", "/api/jobs/s/progress", "/api/v1/sessions/s/status"):
        assert (await harness.post(path, {"progress": 1})).status == 202
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_with_a_listener_nothing_is_logged(autojump_clock, harness, caplog):
    """A publish with a listener is not logged as one without."""
    caplog.set_level(logging.DEBUG, "sseserve")
    await harness.stream(PATH)
    caplog.clear()
    await harness.events.publish("session123", "note", 1)
    await publish(harness, "note", 2)
    assert "listen" not in caplog.text


async def test_stream_opened_before_its_session(autojump_clock, harness):
    """A stream of a session that does not exist waits, and gets every event from the first on."""
    stream = await harness.stream(PATH)
    assert await stream.is_silent()
    for number in range(3):
        await publish(harness, "note", number)
    messages = await stream.take(3)
    assert [m.data for m in messages] == [0, 1, 2]
    assert [m.id.partition("-")[2] for m in messages] == ["1", "2", "3"]


async def test_a_waiting_stream_gets_heartbeats(autojump_clock, harness):
    """A stream whose session does not exist yet is kept open by heartbeats."""
    stream = await harness.stream(PATH)
    await stream.connection.read_until(b": heartbeat\n")


async def test_resuming_after_the_session_was_deleted(autojump_clock, harness):
    """A cursor of a deleted session is reported as ``reset``: new events are of another log."""
    await publish(harness, "note", 1)
    cursor = (await (await harness.stream(PATH)).next()).id
    await harness.app.tracker.delete("session123")
    stream = await harness.stream(PATH, cursor)
    resume = await stream.next()
    assert (resume.event, resume.data) == ("resume", {"status": "reset", "missed": 0})
    await publish(harness, "note", 2)
    assert (await stream.next()).data == 2


async def test_resuming_after_a_cursor(autojump_clock, harness):
    """A client that reconnects gets the events after its cursor, none of them twice."""
    for number in range(4):
        await publish(harness, "note", number)
    first = await (await harness.stream(PATH)).take(2)
    stream = await harness.stream(PATH, first[-1].id)
    resume, *rest = await stream.take(3)
    assert (resume.event, resume.data) == ("resume", {"status": "ok", "missed": 0})
    assert [message.data for message in rest] == [2, 3]


async def test_fractions_are_percentages_in_other_dialects(autojump_clock, harness):
    """Progress from 0 to 1 in this dialect is 0 to 100 in the others, and the reverse."""
    await publish(harness, "processing", {"stage": "audio", "progress": 0.45, "message": "m"})
    status = (await harness.get("/api/sessions/session123/status")).json
    assert (status["progress"], status["stage"], status["message"]) == (45, "audio", "m")
    await harness.post("/api/sessions/session123/progress", {"progress": 60, "message": "n"})
    stream = await harness.stream(PATH)
    message = (await stream.take(2))[1]
    assert message.event == "processing"
    assert message.data == {"stage": "audio", "progress": 0.6, "message": "n"}


@pytest.mark.parametrize("fraction", [-0.01, 1.01, 45, "half", True])
async def test_invalid_fractions_are_refused(autojump_clock, harness, fraction):
    """A percentage, a negative number or a value that is no number changes nothing."""
    response = await publish(harness, "processing", {"stage": "a", "progress": fraction})
    assert (response.status, response.error["code"]) == (422, "invalid_progress")
    assert await harness.tracker.sessions() == []


async def test_another_stage_may_begin_at_0_again(autojump_clock, harness):
    """A fraction is of its stage, and 0 begins the next recording."""
    for stage, fraction in (("audio", 0.8), ("response", 0), ("response", 0.4), ("response", 0)):
        assert (await publish(harness, "processing", {"stage": stage, "progress": fraction})).status == 202
    stream = await harness.stream(PATH)
    assert [m.data["progress"] for m in await stream.take(4)] == [0.8, 0, 0.4, 0]


async def test_a_fraction_that_falls_is_held(autojump_clock, harness):
    """The rest of the update counts, for the clients of this dialect and of the others."""
    await publish(harness, "processing", {"stage": "audio", "progress": 0.8, "message": "a"})
    falling = {"stage": "audio", "progress": 0.5, "message": "b", "speaker": {"z": 1}}
    assert (await publish(harness, "processing", falling)).status == 202
    await harness.events.publish("session123", "processing", {"progress": 0.7, "message": "c"})
    stream = await harness.stream(PATH)
    messages = [message.data for message in await stream.take(3)]
    assert messages[1:] == [{**falling, "progress": 0.8}, {"progress": 0.8, "message": "c"}]
    status = (await harness.get("/api/sessions/session123/status")).json
    assert (status["progress"], status["message"]) == (80, "c")


async def test_recoverable_error_does_not_end_the_session(autojump_clock, harness):
    """The session goes on; clients of the other dialects get a warning."""
    stream = await harness.stream(PATH)
    failure = {"code": "TRANSCRIPTION_FAILED", "message": "Failed", "recoverable": True}
    await publish(harness, "error", failure)
    await publish(harness, "processing", {"stage": "again", "progress": 0.1})
    messages = await stream.take(2)
    assert (messages[0].event, messages[0].data) == ("error", failure)
    assert messages[1].event == "processing"
    history = (await harness.get("/api/sessions/session123/events")).json["events"]
    assert [event["event"] for event in history] == ["warning", "progress"]


async def test_unrecoverable_error_ends_the_session(autojump_clock, harness):
    """The stream ends, the session has failed, and later events are refused."""
    stream = await harness.stream(PATH)
    failure = {"code": "TRANSCRIPTION_FAILED", "message": "Failed", "recoverable": False}
    await publish(harness, "error", failure)
    (message,) = await stream.read_to_end()
    assert (message.event, message.data) == ("error", failure)
    status = (await harness.get("/api/sessions/session123/status")).json
    assert (status["state"], status["message"]) == ("failed", "Failed")
    assert status["error"] == {"code": "TRANSCRIPTION_FAILED", "message": "Failed"}
    assert (await publish(harness, "note", 1)).error["code"] == "session_ended"
    assert await harness.watch(PATH) == [message]  # sent to clients that connect after the end too
    assert (await harness.get(PATH, [("Last-Event-ID", message.id)])).status == 204


async def test_complete_ends_the_session(autojump_clock, harness):
    """A published ``complete`` ends the session as succeeded, with its own data."""
    data = {"message": "answered", "url": "/r/1", "progress": 0.9}
    await publish(harness, "complete", data)
    (message,) = await harness.watch(PATH)
    assert (message.event, message.data) == ("complete", data)
    assert (await harness.get("/api/sessions/session123/status")).json["state"] == "succeeded"


@pytest.mark.parametrize("status", ["failed", "cancelled", "lost"])
async def test_failure_in_another_dialect_is_an_error_event(autojump_clock, harness, status):
    """However a session fails, the client's ``handleError(code, message)`` is called."""
    await harness.tracker.update("session123", status=status, message="it broke")
    (message,) = await harness.watch(PATH)
    assert message.event == "error"
    assert message.data == {"code": status.upper(), "message": "it broke", "recoverable": False}


@pytest.mark.parametrize("type_", ["a\nb", "a\rb", "a\0b", "", "x" * 129, "resume", "job-status"])
async def test_types_cannot_break_the_framing(autojump_clock, harness, type_):
    """Types that are no valid event name, or that are reserved, are refused."""
    response = await publish(harness, type_, {})
    assert (response.status, response.error["code"]) == (422, "invalid")
    assert await harness.tracker.sessions() == []


async def test_publish_in_process(autojump_clock, harness):
    """``await events.publish(session, type, data)`` follows all rules of publishing by HTTP."""
    stream = await harness.stream(PATH)
    receipt = await harness.events.publish("session123", "processing", {"stage": "a", "progress": 0.5})
    await harness.events.publish("session123", "transcription", {"text": "t"}, retry=1000)
    first, second = await stream.take(2)
    assert first.id == receipt.id
    assert (first.event, first.data) == ("processing", {"stage": "a", "progress": 0.5})
    assert (second.event, second.data) == ("transcription", {"text": "t"})
    assert stream.connection.decoder.retry == 1000
    assert (await harness.tracker.get("session123")).progress.percent == 50
    with pytest.raises(Invalid):
        await harness.events.publish("session123", "processing", {"progress": 2})
    with pytest.raises(Invalid):
        await harness.events.publish("session123", "note", object())
    await harness.events.publish("session123", "error", {"recoverable": False})
    with pytest.raises(SessionEnded):
        await harness.events.publish("session123", "note", 1)


async def test_publish_from_the_servers_program():
    """A program that runs the server publishes with ``server.events.publish``."""
    async with sseserve.serve(port=0, drain=0.2) as server:
        receipt = await server.events.publish("s", "transcription", {"text": "t"})
        (event,) = (await server.app.engine.read("s", 0, 10)).events
    assert receipt.id.endswith("-1")
    assert (event.type, json.loads(bytes(event.data))) == ("transcription", {"text": "t"})
