"""The Redis channels of the seed systems: read, written, over a real redis-server."""

from __future__ import annotations

import json
import logging
import random
import re
import subprocess
import sys
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from harness import START, STREAMS, ServerHarness
from raw_client import connect, get, post
from redis_server import RedisServer
from trio.testing import wait_all_tasks_blocked

import sseserve
from sseserve.backoff import Backoff
from sseserve.channels.reader import ChannelReader
from sseserve.channels.service import Channels
from sseserve.channels.writer import ChannelWriter
from sseserve.config import Settings, load
from sseserve.dialects.sessions import SESSIONS
from sseserve.engines.redis.client import RedisClient
from sseserve.errors import ConfigError, EngineUnavailable, InsufficientStorage
from sseserve.http.publishing import Publishing
from sseserve.metrics import Counters
from sseserve.model import Event, Progress, Session, State

TIMEOUT = 20  # seconds; far more than anything here takes
PROGRAMS = Path(__file__).parent / "seed_clients" / "redis_programs.py"


@asynccontextmanager
async def serve(redis, **settings):
    """Run a server that has subscribed to the channels."""
    settings = {"engine": "memory:", "redis_url": redis.url, **settings}
    async with sseserve.serve(port=0, drain=0.2, **settings) as server:
        if settings.get("redis_channels") != ():
            with trio.fail_after(TIMEOUT):
                await server.app.channels.subscribed.wait()
        yield server


async def until(condition):
    """Poll until a condition, which may be async, returns something else than None; return that."""
    with trio.fail_after(TIMEOUT):
        while True:
            value = condition()
            if hasattr(value, "__await__"):
                value = await value
            if value is not None:
                return value
            await trio.sleep(0.005)


async def log_of(server, session_id, count):
    """Wait for the log of a session to have that many events; return what their watchers are shown."""

    async def read():
        response = await get(server.port, f"/api/sessions/{session_id}/events")
        events = response.json["events"] if response.status == 200 else []
        return [event["data"] for event in events] if len(events) >= count else None

    return await until(read)


async def messages(server, system, result, count=1):
    """Wait until so many messages had this result on a server, or on several together."""
    counts = [s.app.counters.channel_messages for s in (server if isinstance(server, list) else [server])]
    await until(lambda: True if sum(c.get((system, result), 0) for c in counts) >= count else None)


def publish(redis, channel, payload) -> None:
    text = payload if isinstance(payload, str | bytes) else json.dumps(payload)
    assert redis.command("PUBLISH", channel, text)[:1] == b":"


def status(session_id, status, progress, **more):
    at = "2026-01-02T03:00:00.000001"
    return {
        "session_id": session_id, "status": status, "progress": progress, "message": f"at {progress}",
        "timestamp": at, **more,
    }  # fmt: skip


def update(job_id, status, progress, **more):
    return {
        "jobId": job_id, "status": status, "progress": progress, "stage": "generating-summary",
        "message": f"at {progress}", "timestamp": "2026-01-02T03:00:00Z", **more,
    }  # fmt: skip


def tracked(status, progress, **more):
    return {
        "status": status, "progress": progress, "message": f"at {progress}",
        "updated_at": "2026-01-02T03:00:00.000001", **more,
    }  # fmt: skip


CHANNELS = {
    "transcription": ("transcription:status:{}", lambda status_, percent: status("s", status_, percent)),
    "jobs_v1": ("job:{}:updates", lambda status_, percent: update("s", status_, percent)),
    "sessions": ("session:{}:updates", tracked),
}


# Read


@pytest.mark.parametrize("system", CHANNELS)
async def test_messages_are_watched_in_every_dialect(redis, system):
    """What a program publishes in its system's channel reaches the watchers of all dialects, to the end."""
    channel, payload = CHANNELS[system]
    async with serve(redis) as server:
        await server.tracker.create("s")
        got: dict[str, Any] = {}

        async def watch(dialect):
            response = await get(server.port, STREAMS[dialect].format("s"))
            got[dialect] = response.body.decode()

        async with trio.open_nursery() as nursery:
            for dialect in STREAMS:
                nursery.start_soon(watch, dialect)
            await until(
                lambda: True if server.app.broker.count_watchers("s").total() == len(STREAMS) else None
            )
            publish(redis, channel.format("s"), payload("processing", 25))
            publish(redis, channel.format("s"), payload("completed", 100))
        assert all("at 25" in text and "at 100" in text for text in got.values()), got
        events = await log_of(server, "s", 3)
        assert [event["progress"] for event in events] == [0, 25, 100]
        assert events[-1]["state"] == "succeeded"
        assert server.app.counters.channel_messages == {(system, "recorded"): 2}


async def test_extra_members_reach_the_clients_of_the_system(redis):
    """They get the message as it was published, whatever its members."""
    async with serve(redis) as server:
        publish(redis, "transcription:status:s", status("s", "processing", 10, words=7, nested={"a": [1]}))
        await log_of(server, "s", 1)
        record = (await get(server.port, "/api/v1/sessions/s/status")).json
        assert (record["words"], record["nested"]) == (7, {"a": [1]})
        assert record["timestamp"] == "2026-01-02T03:00:00.000001"
        publish(redis, "job:j:updates", update("j", "processing", 10, data={"articles": 3}))
        await log_of(server, "j", 1)
        assert (await get(server.port, "/api/v1/jobs/j")).json["data"] == {"articles": 3}


async def test_order_is_kept(redis):
    """Messages of one session are recorded in the order of publication, none twice."""
    async with serve(redis) as server:
        for percent in range(101):
            publish(redis, "session:s:updates", tracked("transcribing", percent))
        events = await log_of(server, "s", 101)
        assert [event["progress"] for event in events] == list(range(101))


@pytest.mark.parametrize("system", CHANNELS)
async def test_equal_messages(redis, system):
    """Those that say when they were published are one, sent again; others are each recorded."""
    channel, payload = CHANNELS[system]
    async with serve(redis) as server:
        for label in ("a", "b", "a"):
            publish(redis, channel.format("s"), payload(label, 1))
        await messages(server, system, "repeated")
        for label in ("c", "d", "c"):
            message = payload(label, 1)
            del message["updated_at" if system == "sessions" else "timestamp"]
            publish(redis, channel.format("s"), message)
        events = await log_of(server, "s", 5)
        assert [event["status"] for event in events] == ["a", "b", "c", "d", "c"]


async def test_a_task_that_is_retried(redis):
    """After a failure a transcription's next message begins another attempt."""
    async with serve(redis) as server:
        for label, percent in (("processing", 50), ("failed", 0), ("processing", 10), ("completed", 100)):
            publish(redis, "transcription:status:s", status("s", label, percent))
        await until(partial(ended, server, "s", "succeeded"))
        assert (await server.tracker.get("s")).attempt == 2


async def ended(server, session_id, state):
    session = await server.tracker.engine.load(session_id)
    return True if session and session.progress and session.progress.state == state else None


BAD = {
    "not JSON": ("transcription:status:s", b"{status"),
    "not UTF-8": ("transcription:status:s", b'{"status":"\xff"}'),
    "not an object": ("transcription:status:s", b"[1]"),
    "a wrong type": ("transcription:status:s", b'{"status":3}'),
    "a percentage out of range": ("session:s:updates", json.dumps(tracked("a", 101)).encode()),
    "no status": ("session:s:updates", b'{"other":"program"}'),
    "no job": ("job:s:updates", b'{"status":"processing"}'),
    "an impossible id": ("session:a b:updates", json.dumps(tracked("a", 1)).encode()),
    "an id that is not UTF-8": (b"session:\xff:updates", json.dumps(tracked("a", 1)).encode()),
    "no id": ("transcription:status:", json.dumps(status("", "a", 1)).encode()),
    "too large": ("session:s:updates", json.dumps(tracked("a", 1, more="x" * 70_000)).encode()),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_messages_change_nothing(redis, caplog, case):
    """They are logged and counted, and those after them are recorded."""
    channel, payload = BAD[case]
    async with serve(redis, max_body=65_536) as server:
        channel = channel.encode() if isinstance(channel, str) else channel
        command = b"*3\r\n$7\r\nPUBLISH\r\n" + b"".join(
            b"$%d\r\n%s\r\n" % (len(w), w) for w in (channel, payload)
        )
        async with await trio.open_tcp_stream("127.0.0.1", redis.port) as stream:
            await stream.send_all(command)
            await stream.receive_some()
        await until(lambda: True if sum(server.app.counters.channel_messages.values()) else None)
        ((_, result),) = server.app.counters.channel_messages
        assert result == "refused"
        assert "is refused" in caplog.text
        assert await server.tracker.sessions() == []
        publish(redis, "session:s:updates", tracked("a", 1))
        assert len(await log_of(server, "s", 1)) == 1
        metrics = (await get(server.port, "/metrics")).body.decode()
        assert 'result="refused"' in metrics


async def test_a_message_after_the_end_is_logged(redis, caplog):
    """And changes nothing."""
    async with serve(redis) as server:
        publish(redis, "session:s:updates", tracked("processed", 100))
        publish(redis, "session:s:updates", tracked("transcribing", 10))
        await messages(server, "sessions", "refused")
        assert "the session has ended: processed" in caplog.text
        assert (await server.tracker.get("s")).seq == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_sessions": 1}, "max_sessions = 1 sessions"),
        ({"auto_create": False}, "there is no session 'new'"),
    ],
)
async def test_sessions_that_cannot_be_created(redis, caplog, setting, message):
    """Their messages are refused, and those of others are recorded."""
    async with serve(redis, **setting) as server:
        await server.tracker.create("s")
        publish(redis, "session:new:updates", tracked("a", 1))
        publish(redis, "session:s:updates", tracked("a", 1))
        await log_of(server, "s", 2)
        await messages(server, "sessions", "refused")
        assert message in caplog.text
        assert len(await server.tracker.sessions()) == 1


async def test_only_the_named_channels_are_read(redis):
    """``redis_channels`` names the systems."""
    async with serve(redis, redis_channels=("jobs_v1",)) as server:
        publish(redis, "transcription:status:t", status("t", "processing", 10))
        publish(redis, "job:j:updates", update("j", "processing", 10))
        await log_of(server, "j", 1)
        assert [session.id for session in await server.tracker.sessions()] == ["j"]


# Several instances, and an engine that cannot store: readers over one log, without Redis


class Reader:
    """The reader of one instance; ``receive`` gives it a message of the sessions dialect."""

    def __init__(self, harness, nursery) -> None:
        app = harness.app
        self.counters = Counters()
        publishing = Publishing(app.tracker, app.broker, max_body=1000, auto_create=True)
        self._reader = ChannelReader(publishing, app.tracker, self.counters, max_body=1000)
        self._nursery = nursery
        self._clock = app.tracker.clock

    def receive(self, payload, *, session_id="s", age=0.0) -> None:
        """Take a message that may have been on its way for ``age`` seconds."""
        text = json.dumps(payload).encode()
        after = self._clock() - age
        self._reader.receive(
            self._nursery, "sessions", SESSIONS.redis_channel, session_id, text, published_after=after
        )

    def results(self) -> dict[str, int]:
        return {result: count for (_, result), count in self.counters.channel_messages.items()}


def timeless(label, percent=1):
    payload = tracked(label, percent)
    del payload["updated_at"]
    return payload


async def statuses(harness, session_id="s"):
    page = await harness.app.engine.read(session_id, 0, 1000)
    return [event.progress.status for event in page.events] if page else []


@pytest.fixture
def harness(nursery):
    return ServerHarness(nursery)


@pytest.mark.parametrize("make", [tracked, timeless])
async def test_one_of_several_instances_records_a_message(autojump_clock, harness, nursery, make):
    """Each reads all messages; each is recorded once, in order, whichever instance is ahead."""
    readers = [Reader(harness, nursery) for _ in range(3)]
    labels = [f"status {n}" for n in range(30)]
    ahead = random.Random(1)
    remaining = [labels[:] for _ in readers]
    while any(remaining):
        reader, left = ahead.choice([pair for pair in zip(readers, remaining, strict=True) if pair[1]])
        reader.receive(make(left.pop(0), 1))
        if ahead.random() < 0.5:
            await wait_all_tasks_blocked()
    await wait_all_tasks_blocked()
    assert await statuses(harness) == labels
    results = [reader.results() for reader in readers]
    assert sum(result.get("recorded", 0) for result in results) == 30
    assert sum(result.get("repeated", 0) for result in results) == 60


async def test_an_equal_message_after_an_instance_has_gone(autojump_clock, harness, nursery):
    """One that this instance did not see is no reason to take a later one without a time for it."""
    first, second = Reader(harness, nursery), Reader(harness, nursery)
    first.receive(timeless("failed"), session_id="t")
    first.receive(timeless("a"))
    await trio.sleep(3600)
    second.receive(timeless("a"), age=10)
    await wait_all_tasks_blocked()
    assert await statuses(harness) == ["a", "a"]


async def test_an_instance_that_was_suspended(autojump_clock, harness, nursery):
    """What it receives afterwards may be old, and then another instance has recorded it."""
    first, second = Reader(harness, nursery), Reader(harness, nursery)
    first.receive(timeless("a"))
    await trio.sleep(3600)
    second.receive(timeless("a"), age=3610)
    await wait_all_tasks_blocked()
    assert await statuses(harness) == ["a"]
    assert second.results() == {"repeated": 1}


@pytest.mark.parametrize("error", [EngineUnavailable("away"), InsufficientStorage("full")])
async def test_messages_wait_while_the_engine_cannot_store(
    autojump_clock, harness, nursery, monkeypatch, caplog, error
):
    """They are recorded in order as soon as it can."""
    reader = Reader(harness, nursery)
    append = harness.app.engine.append

    async def refuse(*args, **options):
        raise error

    monkeypatch.setattr(harness.app.engine, "append", refuse)
    for label in ("a", "b", "c"):
        reader.receive(tracked(label, 1))
    await trio.sleep(300)
    assert await statuses(harness) == []
    assert "a sessions message of session s waits" in caplog.text
    monkeypatch.setattr(harness.app.engine, "append", append)
    await trio.sleep(5)
    assert await statuses(harness) == ["a", "b", "c"]
    assert reader.results() == {"recorded": 3}
    # But not for ever.
    monkeypatch.setattr(harness.app.engine, "append", refuse)
    reader.receive(tracked("d", 1))
    await trio.sleep(700)
    assert reader.results() == {"recorded": 3, "refused": 1}


async def test_waiting_messages_are_bounded(autojump_clock, harness, nursery, monkeypatch):
    """When too many wait, the oldest of the session is dropped: the newest says most."""
    monkeypatch.setattr("sseserve.channels.reader.MAX_WAITING", 4)
    reader = Reader(harness, nursery)
    append = harness.app.engine.append

    async def refuse(*args, **options):
        raise EngineUnavailable("away")

    monkeypatch.setattr(harness.app.engine, "append", refuse)
    for n in range(10):
        reader.receive(tracked(f"{n}", 1))
    await wait_all_tasks_blocked()
    reader.receive(tracked("other", 1), session_id="t")
    monkeypatch.setattr(harness.app.engine, "append", append)
    await trio.sleep(5)
    assert await statuses(harness) == ["0", "7", "8", "9"]
    assert await statuses(harness, "t") == []
    assert reader.results() == {"dropped": 7, "recorded": 4}


async def test_a_refused_subscription(redis, caplog, monkeypatch):
    """It is logged once, with the reason, and tried again."""
    monkeypatch.setattr("sseserve.channels.service.BACKOFF", Backoff(0.05, 0.05))
    redis.command("ACL", "SETUSER", "worker", "on", "nopass", "+@all", "~*", "resetchannels")
    url = f"redis://worker:x@127.0.0.1:{redis.port}/0"
    async with sseserve.serve(port=0, drain=0.2, engine="memory:", redis_url=url) as server:
        await until(lambda: True if "the Redis channels are not read" in caplog.text else None)
        assert "no permissions" in caplog.text
        await trio.sleep(0.3)
        redis.command("ACL", "SETUSER", "worker", "allchannels")
        with trio.fail_after(TIMEOUT):
            await server.app.channels.subscribed.wait()
        publish(redis, "session:s:updates", tracked("a", 1))
        await log_of(server, "s", 1)
    assert caplog.text.count("the Redis channels are not read") == 1
    redis.command("ACL", "DELUSER", "worker")


async def test_redis_is_away_at_the_start(tmp_path, caplog, monkeypatch):
    """A server whose logs are elsewhere starts without it, says so once, and reads the channels later."""
    monkeypatch.setattr("sseserve.channels.service.BACKOFF", Backoff(0.05, 0.05))
    tries = []
    run = Channels._run
    monkeypatch.setattr(Channels, "_run", lambda self: (tries.append(self), run(self))[1])
    redis = RedisServer(tmp_path)
    async with sseserve.serve(port=0, drain=0.2, engine="memory:", redis_url=redis.url) as server:
        await until(lambda: True if "the Redis channels are not read" in caplog.text else None)
        assert (await get(server.port, "/api/sessions/s/status")).status == 404
        assert (await get(server.port, "/ready")).status == 200
        await until(lambda: len(tries) > 3 or None)
        with redis:
            with trio.fail_after(TIMEOUT):
                await server.app.channels.subscribed.wait()
            publish(redis, "session:s:updates", tracked("a", 1))
            await log_of(server, "s", 1)
    assert caplog.text.count("the Redis channels are not read") == 1


# Keys


async def test_keys_at_the_start(redis):
    """The progress in the keys of the sessions is known to a server that starts later."""
    redis.command("SETEX", "session:s:progress", 3600, json.dumps(tracked("transcribing", 45)))
    redis.command("SETEX", "session:t:progress", 3600, json.dumps(tracked("processed", 100)))
    redis.command("SETEX", "session:bad:progress", 3600, "x")
    async with serve(redis) as server:
        assert (await log_of(server, "s", 1))[0]["progress"] == 45
        assert (await log_of(server, "t", 1))[0]["state"] == "succeeded"
        # What was published with the key is no news.
        publish(redis, "session:s:updates", tracked("transcribing", 45))
        await messages(server, "sessions", "repeated")
        assert (await server.tracker.get("s")).seq == 1


async def test_keys_after_the_connection_was_lost(redis, caplog):
    """What was published in between is known from the key, if that is newer than what is known."""
    caplog.set_level(logging.DEBUG, "sseserve")
    now = datetime.now(UTC)
    earlier, later = (now + timedelta(hours=hours) for hours in (-1, 1))
    async with serve(redis) as server:
        for session_id, at in (("s", later.isoformat()), ("t", earlier.replace(tzinfo=None).isoformat())):
            await server.tracker.update(session_id, status="transcribing", progress=10)
            key = tracked("transcribing", 45, updated_at=at)
            redis.command("SETEX", f"session:{session_id}:progress", 3600, json.dumps(key))
        assert redis.command("CLIENT", "KILL", "TYPE", "PUBSUB") == b":1\r\n"
        await until(lambda: True if caplog.text.count("the Redis channels are read") == 2 else None)
        assert (await log_of(server, "s", 2))[1]["progress"] == 45
        assert "subscribing again" in caplog.text
        publish(redis, "session:t:updates", tracked("transcribing", 60))
        assert [event["progress"] for event in await log_of(server, "t", 2)] == [10, 60]


async def test_key_of_a_session_that_is_asked_for(redis):
    """A session that nobody has published since the start is found in its key."""
    async with serve(redis) as server:
        assert (await get(server.port, "/api/sessions/s/status")).status == 404
        redis.command("SETEX", "session:s:progress", 3600, json.dumps(tracked("processed", 100)))
        response = await get(server.port, STREAMS["sessions"].format("s"))
        assert b"event: complete" in response.body
        assert b'"progress":100' in response.body


@asynccontextmanager
async def serve_after_reading_keys(redis):
    """Run a server that has read all keys."""
    redis.command("SETEX", "session:first:progress", 3600, json.dumps(tracked("transcribing", 45)))
    async with serve(redis) as server:
        await until(partial(server.tracker.engine.load, "first"))
        yield server


async def test_key_of_a_session_that_was_deleted(redis):
    """It is deleted with its session, so that this does not come back."""
    async with serve_after_reading_keys(redis) as server:
        redis.command("SETEX", "session:s:progress", 3600, json.dumps(tracked("transcribing", 45)))
        assert (await get(server.port, "/api/sessions/s/status")).status == 200
        connection = await connect(server.port)
        async with connection.stream:
            assert (await connection.request("DELETE", "/api/sessions/s")).status in (200, 204)
        await until(lambda: True if redis.command("EXISTS", "session:s:progress") == b":0\r\n" else None)
        assert (await get(server.port, "/api/sessions/s/status")).status == 404


async def test_key_that_is_about_to_be_deleted(redis, monkeypatch):
    """Its session does not come back in the meantime."""
    async with serve_after_reading_keys(redis) as server:
        redis.command("SETEX", "session:s:progress", 3600, json.dumps(tracked("transcribing", 45)))
        assert (await server.tracker.get("s")).progress.percent == 45
        writer, release = server.app.channels._writer, trio.Event()
        write = writer._write

        async def write_later(*args):
            await release.wait()
            return await write(*args)

        monkeypatch.setattr(writer, "_write", write_later)
        await server.tracker.delete("s")
        assert (await get(server.port, "/api/sessions/s/status")).status == 404
        release.set()
        await until(lambda: True if redis.command("EXISTS", "session:s:progress") == b":0\r\n" else None)
        assert (await get(server.port, "/api/sessions/s/status")).status == 404


# Written


class Subscriber:
    """Collects what is published in all channels, over a connection of its own."""

    def __init__(self, stream) -> None:
        self.stream = stream
        self._buffer = b""
        self.messages: list[tuple[str, Any]] = []

    async def collect(self, count):
        """Read until there are ``count`` messages; return their channels and contents."""
        with trio.fail_after(TIMEOUT):
            while len(self.messages) < count:
                self._buffer += await self.stream.receive_some()
                while (match := self._PMESSAGE.match(self._buffer)) is not None:
                    end = match.end() + int(match[2]) + 2
                    if len(self._buffer) < end:
                        break
                    self.messages.append((match[1].decode(), json.loads(self._buffer[match.end() : end])))
                    self._buffer = self._buffer[end:]
        return self.messages

    _PMESSAGE = re.compile(rb"\*4\r\n\$8\r\npmessage\r\n\$\d+\r\n.*\r\n\$\d+\r\n(.*)\r\n\$(\d+)\r\n")


@asynccontextmanager
async def subscribe_to_channels(redis):
    """Subscribe to the channels of all systems, but not to those of the engine."""
    patterns = b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in (b"job:*", b"session:*", b"transcription:*"))
    async with await trio.open_tcp_stream("127.0.0.1", redis.port) as stream:
        await stream.send_all(b"*4\r\n$10\r\nPSUBSCRIBE\r\n" + patterns)
        response = b""
        while response.count(b"psubscribe") < 3 or not response.endswith(b":3\r\n"):
            response += await stream.receive_some()
        yield Subscriber(stream)


EVERYTHING = ("sessions", "jobs_v1", "transcription")


async def test_progress_is_written_as_each_system_knows_it(redis):
    """What is recorded here is published in every channel, in its shape, and in the key."""
    async with (
        serve(redis, redis_channels=(), redis_publish=EVERYTHING) as server,
        subscribe_to_channels(redis) as all_,
    ):
        await server.tracker.update("s", status="processing", progress=40, stage="tts", message="m")
        await server.tracker.emit("s", "other", {"no": "progress"})
        await server.tracker.update("s", status="failed", error="broken")
        got = await all_.collect(6)
        assert [channel for channel, _ in got] == 2 * [
            "session:s:updates", "job:s:updates", "transcription:status:s",
        ]  # fmt: skip
        for message in (message for _, message in got):
            assert message.pop("published_by") == "sseserve"
            assert message.pop("timestamp", None) or message.pop("updated_at")
        common = {"status": "processing", "progress": 40, "message": "m"}
        assert [message for _, message in got[:3]] == [
            common,
            {"jobId": "s", "stage": "tts", **common},
            {"session_id": "s", **common},
        ]
        assert got[3][1] == {"status": "failed", "progress": 40, "message": "broken", "error": "broken"}
        assert redis.command("TTL", "session:s:progress") in (b":3600\r\n", b":3599\r\n")
        assert b'"status":"failed"' in redis.command("GET", "session:s:progress")


async def test_what_is_written_is_not_read(redis):
    """Neither by the server itself nor by another one, nor from the key at the next start."""
    settings = {"redis_publish": EVERYTHING}
    async with serve(redis, **settings) as server, serve(redis, **settings) as other:
        async with subscribe_to_channels(redis) as everything:
            await server.tracker.update("s", status="processing", progress=40)
            await everything.collect(3)
        # What comes after it has been read, so it has too.
        for system, (channel, payload) in CHANNELS.items():
            publish(redis, channel.format(system), payload("processing", 1))
            await log_of(server, system, 1)
            await log_of(other, system, 1)
        assert (await server.tracker.get("s")).seq == 1
        assert {session.id for session in await other.tracker.sessions()} == CHANNELS.keys()
        assert (await get(other.port, "/api/sessions/s/status")).status == 404


@pytest.mark.parametrize("system", CHANNELS)
async def test_what_came_from_a_channel_is_not_written_back(redis, system):
    """It is published in the channels of the other systems alone."""
    channel, payload = CHANNELS[system]
    async with serve(redis, redis_publish=EVERYTHING) as server, subscribe_to_channels(redis) as everything:
        for percent in (10, 20, 30):
            publish(redis, channel.format("s"), payload("processing", percent))
        await log_of(server, "s", 3)
        await server.tracker.update("last", progress=1)
        got = await everything.collect(3 + 2 * 3 + 3)
        own = [message for name, message in got if name == channel.format("s")]
        assert [message["progress"] for message in own] == [10, 20, 30]
        assert not any("published_by" in message for message in own)
        for others, _ in (CHANNELS[other] for other in CHANNELS if other != system):
            progress = [message["progress"] for name, message in got if name == others.format("s")]
            assert progress == [10, 20, 30]
        last = [name for name, message in got if "last" in name]
        assert sorted(last) == sorted(channel.format("last") for channel, _ in CHANNELS.values())


EVENT = Event(1, "progress", Progress(status="a", state=State.RUNNING, updated_at=START), START)
LAST = Session(id="s", epoch="e", created_at=START, attempt=2)
replace = msgspec.structs.replace


@asynccontextmanager
async def make_writer(redis):
    """Run a writer of the sessions channel without a server; yields it and its client."""
    counters = Counters()
    writer = ChannelWriter({"sessions": SESSIONS.redis_channel}, [], counters)
    async with trio.open_nursery() as nursery:
        client = RedisClient(redis.url)
        await nursery.start(client.run)
        nursery.start_soon(writer.run, client)
        yield writer
        nursery.cancel_scope.cancel()


def written(number, seq):
    """An event whose percentage is a number."""
    return replace(EVENT, seq=seq, data=replace(EVENT.data, percent=number))


async def test_an_event_that_was_overtaken_is_not_written(redis):
    """Another instance has written a newer one, of this attempt, of a later one or of a later session."""
    places = [  # in order, and whether each is written
        (LAST, 1, True),
        (LAST, 2, True),
        (LAST, 2, True),  # again, as its response was lost
        (LAST, 1, False),
        (replace(LAST, attempt=1), 9, False),
        (LAST, 3, True),
        (replace(LAST, attempt=3), 1, True),
        (replace(LAST, created_at=START - 1), 20, False),
        (replace(LAST, created_at=START + 0.5), 1, True),
        (replace(LAST, id="other", created_at=START - 1), 1, True),
    ]
    async with make_writer(redis) as writer, subscribe_to_channels(redis) as everything:
        expected = []
        for number, (session, seq, is_written) in enumerate(places):
            writer.recorded(session, written(number, seq))
            expected += [number] if is_written else []
            got = await everything.collect(len(expected))
            await until(lambda: None if writer.is_busy else True)
        assert [message["progress"] for _, message in got] == expected
        assert b'"progress":8' in redis.command("GET", "session:s:progress")


async def test_an_event_waits_for_those_before_it(redis, monkeypatch):
    """An instance has recorded them and is about to write them; if it does not, the event is written."""
    instances = make_writer(redis), make_writer(redis)
    async with instances[0] as first, instances[1] as second, subscribe_to_channels(redis) as everything:
        second.recorded(LAST, written(2, 2))
        await trio.sleep(0.02)
        first.recorded(LAST, written(1, 1))
        await everything.collect(2)
        second.recorded(LAST, written(4, 4))
        await trio.sleep(0.02)
        first.recorded(LAST, replace(EVENT, seq=3, type="other", data=msgspec.Raw(b"{}")))
        await everything.collect(3)
        # Those of one instance may be recorded in another order than that of the log.
        for seq in (6, 7, 5):
            first.recorded(LAST, written(seq, seq))
        await everything.collect(6)
        monkeypatch.setattr("sseserve.channels.writer.PATIENCE", 0.05)
        second.recorded(LAST, written(9, 9))
        await everything.collect(7)
        first.recorded(LAST, written(8, 8))
        first.recorded(LAST, written(10, 10))
        got = await everything.collect(8)
    assert [message["progress"] for _, message in got] == [1, 2, 4, 5, 6, 7, 9, 10]


async def test_events_that_wait_are_bounded(redis, monkeypatch):
    """While Redis is away, the oldest of a session but the first are dropped, and those of other sessions."""
    monkeypatch.setattr("sseserve.channels.writer.MAX_WAITING", 4)
    monkeypatch.setattr("sseserve.channels.writer.PATIENCE", 0.05)
    async with make_writer(redis) as writer, subscribe_to_channels(redis) as everything:
        for seq in range(1, 11):
            writer.recorded(LAST, written(seq, seq))
        writer.recorded(replace(LAST, id="other"), written(1, 1))
        got = await everything.collect(4)
        await until(lambda: None if writer.is_busy else True)
        # It has room again, also where one that was written has been dropped meanwhile.
        for seq in (14, 13, 12, 11, 15):
            writer.recorded(LAST, written(seq, seq))
            await trio.lowlevel.checkpoint()
        got = await everything.collect(8)
        await until(lambda: None if writer.is_busy else True)
    percents = [message["progress"] for _, message in got]
    assert percents[:4] == [1, 8, 9, 10]
    assert percents == sorted(percents)
    assert percents[-1] == 15
    assert (writer._count, writer._waiting) == (0, {})


async def test_instances_that_watch_a_job(redis):
    """The set and the keys of seed 002 say so, as long as somebody watches there."""
    async with serve(redis, redis_publish=("jobs_v1",)) as server:
        await server.tracker.create("s")
        assert redis.command("SCARD", "job:s:instances") == b":0\r\n"
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(get, server.port, STREAMS["jobs_v1"].format("s"))
            await until(lambda: True if redis.command("KEYS", "instance:*") != b"*0\r\n" else None)
            assert redis.command("SCARD", "job:s:instances") == b":1\r\n"
            (key,) = re.findall(r"instance:\S+:s\b", redis.command("KEYS", "instance:*").decode())
            instance = key.removeprefix("instance:").removesuffix(":s")
            assert redis.command("SISMEMBER", "job:s:instances", instance) == b":1\r\n"
            await until(lambda: True if redis.command("GET", key) == b"$6\r\nactive\r\n" else None)
            for name in (key, "job:s:instances"):
                assert redis.command("TTL", name) in (b":3600\r\n", b":3599\r\n")
            await server.tracker.update("s", status="completed")
        await until(lambda: True if redis.command("EXISTS", key, "job:s:instances") == b":0\r\n" else None)


async def test_what_says_that_a_job_is_watched_does_not_expire(redis, monkeypatch):
    """It is written again while somebody watches."""
    monkeypatch.setattr("sseserve.channels.presence.REFRESH", 0.05)
    async with serve(redis, redis_publish=("jobs_v1",)) as server:
        server.app.channels.note_watchers("s", 1)
        for _ in range(2):
            await until(lambda: True if redis.command("KEYS", "instance:*") != b"*0\r\n" else None)
            redis.command("FLUSHALL")


async def test_a_server_that_stops_leaves_the_sets(redis):
    """Its watchers have to reconnect, so nobody watches there any more."""
    async with serve(redis, redis_publish=("jobs_v1",)) as server:
        await server.tracker.create("s")
        server.app.channels.note_watchers("s", 1)
        await until(lambda: True if redis.command("KEYS", "instance:*") != b"*0\r\n" else None)
    assert redis.command("EXISTS", "job:s:instances") == b":0\r\n"
    assert redis.command("KEYS", "instance:*") == b"*0\r\n"


# Several servers on one Redis


async def publish_all(redis, messages):
    """Publish messages, each a channel and a payload, on one connection."""
    words = [[b"PUBLISH", channel.encode(), json.dumps(payload).encode()] for channel, payload in messages]
    async with await trio.open_tcp_stream("127.0.0.1", redis.port) as stream:
        for command in words:
            await stream.send_all(b"*3\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in command))
        received = b""
        while received.count(b"\r\n") < len(words):
            received += await stream.receive_some()


def count(servers, *results):
    counts = [item for server in servers for item in server.app.counters.channel_messages.items()]
    return sum(number for (_, result), number in counts if result in results)


async def test_several_servers_record_each_message_once(redis):
    """Whichever server is ahead, in the order of each session; and a server may go at any time."""
    labels = [f"status {n}" for n in range(100)]
    sent = [
        (f"session:{session_id}:updates", (tracked if session_id == "a" else timeless)(label, 1))
        for label in labels
        for session_id in ("a", "b", "c")
    ]
    async with serve(redis, engine=redis.url) as first, serve(redis, engine=redis.url) as second:
        async with serve(redis, engine=redis.url) as third:
            await publish_all(redis, sent[:150])
            await until(lambda: True if count([first, second, third], "recorded") else None)
        await publish_all(redis, sent[150:])
        servers = [first, second]
        for session_id in ("a", "b", "c"):
            for server in servers:
                events = await log_of(server, session_id, len(labels))
                assert [event["status"] for event in events] == labels
        both = 2 * len(sent)
        await until(lambda: True if count(servers, "recorded", "repeated") == both else None)
        assert (await first.tracker.get("a")).seq == len(labels)


async def test_a_server_that_has_just_subscribed_does_not_overtake(redis, monkeypatch):
    """It has not received what another one is about to record."""
    async with serve(redis, engine=redis.url) as first:
        # The second one waits longer than anything here takes.
        monkeypatch.setattr("sseserve.channels.service.SETTLE", 30.0)
        append, release = first.app.engine.append, trio.Event()

        async def append_later(*args, **options):
            await release.wait()
            await append(*args, **options)

        monkeypatch.setattr(first.app.engine, "append", append_later)
        publish(redis, "session:s:updates", tracked("a", 1))
        async with serve(redis, engine=redis.url) as second:
            publish(redis, "session:s:updates", tracked("b", 2))
            await until(lambda: True if second.app.channels._reader._waiting else None)
            await trio.sleep(0.2)
            release.set()
            events = await log_of(second, "s", 2)
            assert [event["status"] for event in events] == ["a", "b"]


async def test_several_servers_write_each_event_once(redis):
    """The one that has recorded it does, and not in the channel that it came from."""
    settings = {"engine": redis.url, "redis_publish": EVERYTHING}
    async with serve(redis, **settings) as first, serve(redis, **settings) as second:
        async with subscribe_to_channels(redis) as everything:
            for percent in range(1, 21):
                publish(redis, "transcription:status:s", status("s", "processing", percent))
            await log_of(first, "s", 20)
            await second.tracker.update("s", progress=50)
            await first.tracker.update("s", status="completed")
            got = await everything.collect(20 + 2 * 20 + 2 * 3)
            # Nothing else follows.
            publish(redis, "transcription:status:last", {"status": 3})
            got = await everything.collect(len(got) + 1)
        percents = [*range(1, 21), 50, 100]
        for channel, _ in CHANNELS.values():
            assert [message["progress"] for name, message in got if name == channel.format("s")] == percents
        assert sum("published_by" in message for _, message in got) == 2 * 20 + 2 * 3


async def test_messages_wait_while_the_redis_of_the_engine_is_away(redis, tmp_path, monkeypatch):
    """They come from another Redis, and are recorded in order when the engine's is back, none twice."""
    for name in ("connection.COMMAND_TIMEOUT", "connection.CONNECT_TIMEOUT", "client.DEADLINE"):
        monkeypatch.setattr(f"sseserve.engines.redis.{name}", 0.3)
    monkeypatch.setattr("sseserve.channels.reader.BACKOFF", Backoff(0.05, 0.2))
    with RedisServer(tmp_path / "engine") as engine:
        async with serve(redis, engine=engine.url) as first, serve(redis, engine=engine.url) as second:
            publish(redis, "session:s:updates", timeless("0"))
            await log_of(first, "s", 1)
            engine.pause()
            for n in range(1, 30):
                publish(redis, "session:s:updates", timeless(f"{n}"))
            await until(lambda: first.app.engine.problem and second.app.engine.problem)
            engine.resume()
            events = await log_of(second, "s", 30)
            assert [event["status"] for event in events] == [f"{n}" for n in range(30)]
            await until(lambda: True if count([first, second], "repeated") == 30 else None)
            assert count([first, second], "recorded") == 30


async def test_a_cluster(redis_cluster):
    """Messages come from any node (each publisher uses one), and the keys are where their names belong."""
    nodes = redis_cluster.nodes
    settings = {"engine": redis_cluster.url, "redis_publish": ("sessions",)}
    names = [*(f"s{number}" for number in range(9)), "with{braces}"]
    async with serve(redis_cluster, **settings) as first, serve(redis_cluster, **settings) as second:
        for percent in (10, 20):
            for number, name in enumerate(names):
                publish(nodes[number % 3], f"transcription:status:{name}", status("s", "a", percent))
        for name in names:
            events = await log_of(second, name, 2)
            assert [event["progress"] for event in events] == [10, 20]
        await messages([first, second], "sessions", "written", 2 * len(names))
        for name in names:
            found = [node.command("GET", f"session:{name}:progress") for node in nodes]
            assert sum(b'"progress":20' in value for value in found) == 1
        text = json.dumps(tracked("transcribing", 45))
        for node in nodes:  # two of them say that it belongs elsewhere
            node.command("SETEX", "session:asked:progress", 3600, text)
        assert (await first.tracker.get("asked")).progress.percent == 45


# The seeds' own programs


async def run_program(program, redis, session_id):
    """Run one of the seeds' programs to its end; return what it has printed, line by line."""
    command = [sys.executable, str(PROGRAMS), program, redis.url, session_id]
    with trio.fail_after(TIMEOUT):
        result = await trio.run_process(command, capture_stdout=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


async def test_the_seeds_celery_task(redis):
    """The statuses of its ``StatusPublisher`` reach the watchers, as it published them."""
    async with serve(redis) as server:
        await run_program("publish", redis, "s")
        events = await log_of(server, "s", 6)
        assert [event["progress"] for event in events] == [10, 25, 50, 75, 90, 100]
        record = (await get(server.port, "/api/v1/sessions/s/status")).json
        assert record["message"] == "Transcription completed successfully!"
        assert not record["timestamp"].endswith("Z")  # it is the worker's own


async def test_the_seeds_subscriber(redis):
    """Its ``StatusSubscriber`` reads what was published over HTTP, to the end."""
    async with serve(redis, redis_channels=(), redis_publish=("transcription",)) as server:
        got = []

        async def read():
            got.extend(await run_program("subscribe", redis, "s"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            number = b"*2\r\n$22\r\ntranscription:status:s\r\n:1\r\n"
            channel = "transcription:status:s"
            await until(lambda: True if redis.command("PUBSUB", "NUMSUB", channel) == number else None)
            await post(server.port, "/api/v1/sessions/s/status", {"status": "processing", "words": 3})
            await server.tracker.update("s", status="done")
        assert [message["status"] for message in got] == ["processing", "completed"]
        assert (got[0]["session_id"], got[0]["words"], got[1]["progress"]) == ("s", 3, 100)


async def test_the_seeds_progress_tracker(redis):
    """What its ``RedisProgressTracker`` writes is watched, whether the server runs then or starts later."""
    async with serve(redis) as server:
        await run_program("track", redis, "s")
        events = await log_of(server, "s", 2)
        assert [event["status"] for event in events] == ["transcribing", "processed"]
    async with serve(redis) as server:
        response = await get(server.port, STREAMS["sessions"].format("s"))
        assert b"event: complete" in response.body
        assert b'"message":"Session processing complete"' in response.body


# Settings


def test_which_redis():
    """The Redis that is named, also beside another engine; else that of the engine."""
    redis_url, other = "redis://a:1/0", "redis://b:2/0"
    assert load(None, {"REDIS_URL": redis_url}).channels_url == redis_url
    assert load(None, {"REDIS_URL": redis_url}, {"engine": "sqlite:x"}).channels_url == redis_url
    assert load(None, {"REDIS_URL": redis_url}, {"engine": other}).channels_url == redis_url
    assert load(None, {}, {"engine": other}).channels_url == other
    assert load(None, {"REDIS_HOST": "a", "REDIS_PORT": "1"}, {"engine": "memory:"}).channels_url == redis_url
    assert Settings().channels_url is None
    assert Settings(engine="sqlite:x").channels_url is None
    environ = {"SSESERVE_REDIS_CHANNELS": "jobs_v1,sessions", "SSESERVE_REDIS_PUBLISH": ""}
    settings = load(None, environ)
    assert (settings.redis_channels, settings.redis_publish) == (("jobs_v1", "sessions"), ())


@pytest.mark.parametrize("setting", ["engine", "redis_url"])
def test_without_coredis(setting):
    """A server without Redis does not need it; one with Redis says what to install."""
    program = f"""
import sys, trio, sseserve
sys.modules["coredis"] = None
async def main():
    async with sseserve.serve(port=0):
        print("served")
    async with sseserve.serve(port=0, {setting}="redis://127.0.0.1:1/0"):
        pass
trio.run(main)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout == "served\n"
    assert "ConfigError: Redis needs the package coredis: install it" in result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"redis_channels": ("sessions",)}, "redis_channels and redis_publish need a Redis"),
        ({"redis_publish": ("jobs_v1",)}, "need a Redis: name it with redis_url"),
        (
            {"redis_url": "redis://127.0.0.1:1/0", "engine": "memory:", "redis_publish": ("jobs",)},
            "redis_publish cannot have 'jobs': there are jobs_v1, sessions, transcription",
        ),
    ],
)
async def test_settings_that_cannot_be(settings, message):
    """The server says so when it starts."""
    with pytest.raises(ConfigError, match=message):
        async with sseserve.serve(port=0, **settings):
            pass
