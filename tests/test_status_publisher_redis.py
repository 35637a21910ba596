"""The synchronous status publisher through a real redis-server, read by a server."""

from __future__ import annotations

import logging
import multiprocessing
import socket
import threading
from functools import partial

import pytest
import redis as redis_py
import redis.asyncio as redis_asyncio
import trio
from raw_client import get

import sseserve
from sseserve.client import Backoff, CannotConnect, RequestRejected, StatusPublisher

PROCESSING = {"status": "processing", "progress": 10, "message": "Starting audio processing..."}


@pytest.fixture
async def server(redis):
    """A server that has subscribed."""
    async with sseserve.serve(port=0, drain=0.2, engine="memory:", redis_url=redis.url) as server:
        while b"psub=3" not in redis.command("CLIENT", "LIST", "TYPE", "PUBSUB"):
            await trio.sleep(0.005)
        yield server


def publisher(target, **options):
    return StatusPublisher(target, **{"backoff": Backoff(initial=0.0, maximum=0.0), **options})


async def publish(client, session_id="s", data=PROCESSING):
    """Publish from a thread, as a synchronous worker does."""
    return await trio.to_thread.run_sync(client.publish_status_update, session_id, data)


async def log_of(server, session_id, count):
    """Wait for the log of a session to have that many events; return their data."""
    with trio.fail_after(20):
        while True:
            response = await get(server.port, f"/api/sessions/{session_id}/events")
            if response.status == 200 and len(response.json["events"]) >= count:
                return [event["data"] for event in response.json["events"]]
            await trio.sleep(0.005)


@pytest.mark.parametrize("given", ["url", "client"])
async def test_seed_task(server, redis, given):
    """The calls of the seed's Celery task, unchanged, reach the watchers."""
    client = redis_py.Redis(port=redis.port)

    def transcribe_audio(session_id):
        with StatusPublisher(redis.url if given == "url" else client, raise_errors=True) as publisher:
            publisher.publish_status_update(session_id, PROCESSING)
            for progress in [25, 50, 75, 90]:
                publisher.publish_status_update(
                    session_id, {"status": "processing", "progress": progress, "message": f"at {progress}"}
                )
            publisher.publish_status_update(
                session_id, {"status": "completed", "progress": 100, "message": "Completed!", "words": 12}
            )

    await trio.to_thread.run_sync(transcribe_audio, "s")
    events = await log_of(server, "s", 6)
    assert [event["progress"] for event in events] == [10, 25, 50, 75, 90, 100]
    assert (await get(server.port, "/api/v1/sessions/s/status")).json["words"] == 12
    assert client.ping()  # a client that was given stays open
    client.close()


def test_message(redis):
    """It has the members of the seed's, its additional ones, and the time."""
    with redis_py.Redis(port=redis.port) as client, client.pubsub() as subscription:
        subscription.subscribe("transcription:status:s")
        subscription.get_message(timeout=20)
        with publisher(redis.url) as sender:
            assert sender.publish_status_update("s", {"status": "x", "words": [1], "message": None}) is None
        message = subscription.get_message(timeout=20)
    prefix = b'{"session_id":"s","status":"x","progress":null,"message":null,"timestamp":"2'
    assert message["data"].startswith(prefix)
    assert message["data"].endswith(b'+00:00","words":[1]}')


async def test_each_update_is_recorded_once(server, redis):
    """Equal updates are two; one that is sent again, since its response was lost, is one."""
    client = redis_py.Redis(port=redis.port)
    sent = []

    class LosesResponses:
        def publish(self, channel, message):
            count = client.publish(channel, message)
            sent.append(message)
            if len(sent) % 2:
                raise redis_py.ConnectionError("Connection reset by peer")
            return count

    with publisher(LosesResponses(), raise_errors=True) as sender:
        for _ in range(2):
            await publish(sender)
        await publish(sender, data={"status": "completed"})
    client.close()
    assert [sent[at] == sent[at + 1] for at in range(5)] == [True, False, True, False, True]
    assert [event["status"] for event in await log_of(server, "s", 3)] == [
        "processing", "processing", "completed",
    ]  # fmt: skip
    counts = server.app.counters.channel_messages
    while sum(counts.values()) < 6:
        await trio.sleep(0.005)
    assert counts == {("transcription", "recorded"): 3, ("transcription", "repeated"): 3}


async def test_redis_is_away(caplog):
    """It is retried until ``retry_timeout``, with growing delays; then the update is logged and dropped."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{unused.getsockname()[1]}/0"
        delays = []
        with publisher(url, retry_timeout=5, backoff=Backoff(1, 4), sleep=delays.append) as client:
            assert await publish(client) is None
        assert (
            "cannot publish the status of session s: cannot publish to transcription:status:s" in caplog.text
        )
        assert "Connection refused" in caplog.text
        assert 2 <= len(delays) <= 6
        with publisher(url, retry_timeout=0, raise_errors=True) as client, pytest.raises(CannotConnect):
            await publish(client)


async def test_no_server_has_subscribed(redis):
    """That is as if Redis were away: it is retried."""
    attempts = []
    client = publisher(redis.url, sleep=attempts.append, backoff=Backoff(1, 1), raise_errors=True)
    with client, pytest.raises(CannotConnect, match="no server has subscribed"):
        await publish(client)
    assert attempts


async def test_redis_hangs(redis, caplog):
    """An attempt is limited to ``timeout``, also with a client that has no timeout of its own."""
    client = redis_py.Redis(port=redis.port)
    assert client.ping()
    redis.pause()
    try:
        with publisher(client, timeout=0.05, retry_timeout=0) as sender:
            assert await publish(sender) is None
    finally:
        redis.resume()
    assert "timed out waiting for data from the server" in caplog.text


async def test_redis_refuses(redis):
    """What an access control list forbids is not retried."""
    redis.command("ACL", "SETUSER", "worker", "on", "nopass", "+ping", "+client")
    attempts = []
    url = f"redis://worker:x@127.0.0.1:{redis.port}/0"
    client = publisher(url, sleep=attempts.append, raise_errors=True)
    with client, pytest.raises(RequestRejected, match="Redis refuses it"):
        await publish(client)
    redis.command("ACL", "DELUSER", "worker")
    assert attempts == []


@pytest.mark.parametrize("data", [{"status": "x", "object": object()}, None], ids=["not JSON", "no mapping"])
async def test_invalid_status_is_ignored(redis, caplog, data):
    """It is logged and ignored."""
    with publisher(redis.url) as client:
        assert await publish(client, data=data) is None
    assert "cannot publish the status of session s" in caplog.text


@pytest.mark.parametrize("target", [redis_asyncio.Redis(), object(), None])
def test_what_is_no_target(target):
    """A client for asyncio would publish nothing."""
    with pytest.raises(TypeError, match="StatusPublisher"):
        StatusPublisher(target)


def _in_a_fork(client, results):
    results.put(client.publish_status_update("s", PROCESSING) is None)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
async def test_fork_and_threads(server, redis):
    """Processes forked after a first update open their own connections; threads share a publisher."""
    with publisher(redis.url, raise_errors=True) as client:
        await publish(client)
        fork = multiprocessing.get_context("fork")
        results = fork.SimpleQueue()
        processes = [fork.Process(target=partial(_in_a_fork, client, results)) for _ in range(3)]
        for process in processes:
            process.start()
        threads = [threading.Thread(target=partial(_in_a_fork, client, results)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for each in (*processes, *threads):
            await trio.to_thread.run_sync(each.join)
        assert [results.get() for _ in range(6)] == [True] * 6
        await publish(client)
    assert len(await log_of(server, "s", 8)) == 8


def test_without_redis_py(monkeypatch):
    """The error says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(ImportError, match=r"pip install 'sseserve\[redis-publisher\]'"):
        StatusPublisher("redis://127.0.0.1/0")


async def test_over_http_still(server, caplog):
    """A URL of HTTP is a server's."""
    caplog.set_level(logging.WARNING)
    with publisher(server.url) as client:
        assert (await publish(client)).id.endswith("-1")
    assert caplog.text == ""
