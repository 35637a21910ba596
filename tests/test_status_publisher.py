"""The synchronous status publisher, against a real server and against fake servers that misbehave."""

from __future__ import annotations

import logging
import multiprocessing
import threading
from functools import partial

import httpx
import pytest
import trio
from fakes import FakeServer, drip_response, read_body, reset_on_close, respond, respond_error, send_raw
from raw_client import get

import sseserve
from sseserve.client import (
    Backoff,
    CannotConnect,
    InvalidResponse,
    RequestRejected,
    SessionFinished,
    StatusPublisher,
)
from sseserve.model import Control

RECEIPT = {"id": "e-1", "control": "continue"}
PROCESSING = {"status": "processing", "progress": 10, "message": "Starting audio processing..."}


@pytest.fixture
async def server():
    async with sseserve.serve(port=0, drain=0.2) as server:
        yield server


def publisher(url, **options):
    return StatusPublisher(url, **{"backoff": Backoff(initial=0.0, maximum=0.0), **options})


async def publish(client, session_id="s", data=PROCESSING):
    """Publish from a thread, as a synchronous worker does."""
    return await trio.to_thread.run_sync(client.publish_status_update, session_id, data)


async def unused_url():
    """Return a URL at which no server listens."""
    with trio.socket.socket() as sock:
        await sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


async def test_seed_task(server):
    """The calls of the seed's Celery task, unchanged, reach the watchers."""

    def transcribe_audio(session_id):
        with StatusPublisher(server.url) as publisher:
            publisher.publish_status_update(session_id, PROCESSING)
            for progress in [25, 50, 75, 90]:
                publisher.publish_status_update(
                    session_id, {"status": "processing", "progress": progress, "message": f"at {progress}"}
                )
            publisher.publish_status_update(
                session_id, {"status": "completed", "progress": 100, "message": "Completed!", "words": 12}
            )

    await trio.to_thread.run_sync(transcribe_audio, "s")
    events = (await get(server.port, "/api/sessions/s/events")).json["events"]
    assert [event["data"]["progress"] for event in events] == [10, 25, 50, 75, 90, 100]
    assert events[-1]["event"] == "complete"
    assert (await get(server.port, "/api/v1/sessions/s/status")).json["words"] == 12


async def test_result_contains_the_control_request(server):
    """A worker that checks the result can stop when the watchers request it."""
    with publisher(server.url) as client:
        assert (await publish(client)).control is Control.CONTINUE
        await server.tracker.control("s", Control.CANCEL)
        assert (await publish(client)).control is Control.CANCEL


@pytest.mark.parametrize(
    "data",
    [{"status": 3}, {"status": "processing", "progress": 101}, {"status": "x", "object": object()}, None],
    ids=["no label", "no percentage", "not JSON", "not a mapping"],
)
async def test_invalid_status_is_ignored(server, caplog, data):
    """It is logged and ignored; with ``raise_errors`` it is raised."""
    with publisher(server.url) as client:
        assert await publish(client, data=data) is None
        assert "cannot publish the status of session s" in caplog.text
        assert (await publish(client)).id.endswith("-1")
    with publisher(server.url, raise_errors=True) as client, pytest.raises((RequestRejected, TypeError)):
        await publish(client, data=data)


async def test_update_after_the_end_is_ignored(server, caplog):
    """It is logged and not retried; with ``raise_errors`` it is raised."""
    caplog.set_level(logging.WARNING)
    await server.tracker.update("s", status="completed")
    with publisher(server.url) as client:
        assert await publish(client) is None
    assert "the session has ended" in caplog.text
    with publisher(server.url, raise_errors=True) as client, pytest.raises(SessionFinished):
        await publish(client)


async def test_unreachable_server(caplog):
    """It is retried until ``retry_timeout``, with growing delays; then the update is dropped."""
    url = await unused_url()
    delays = []
    with StatusPublisher(url, retry_timeout=5, backoff=Backoff(1, 4), sleep=delays.append) as client:
        assert await publish(client) is None
    assert "Connection refused" in caplog.text
    assert 2 <= len(delays) <= 6
    assert sum(delays) < 5
    with StatusPublisher(url, retry_timeout=0, raise_errors=True) as client, pytest.raises(CannotConnect):
        await publish(client)


async def lose_the_response(stream, request):
    """Read a request and reset the connection instead of responding."""
    await read_body(stream, request)
    reset_on_close(stream)


async def test_lost_response_is_retried_with_the_same_key(nursery):
    """The same request is sent again: the server recognizes its key and applies it once."""
    fake = await FakeServer(
        lose_the_response, respond_error(503, "unavailable"), respond(202, RECEIPT)
    ).start(nursery)
    with publisher(fake.url) as client:
        assert (await publish(client)).id == "e-1"
    assert len(fake.requests) == 3
    assert len({request.headers["idempotency-key"] for request in fake.requests}) == 1
    assert len({request.body for request in fake.requests}) == 1
    nursery.cancel_scope.cancel()


async def test_every_update_has_its_own_key(nursery):
    """Two updates with the same content are two updates."""
    fake = await FakeServer(*[respond(202, RECEIPT)] * 2).start(nursery)
    with publisher(fake.url) as client:
        await publish(client)
        await publish(client)
    assert len({request.headers["idempotency-key"] for request in fake.requests}) == 2
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("status", [503, 507])
async def test_retry_after(nursery, status):
    """The next attempt is after exactly ``Retry-After`` seconds."""
    handler = respond(status, {"error": {"code": "unavailable", "message": "full"}}, "Retry-After: 3")
    fake = await FakeServer(handler, respond(202, RECEIPT)).start(nursery)
    delays = []
    with publisher(fake.url, sleep=delays.append) as client:
        await publish(client)
    assert delays == [3]
    nursery.cancel_scope.cancel()


async def test_conflict_with_an_earlier_attempt(nursery):
    """409 conflict with an earlier attempt of the same call is retried."""
    fake = await FakeServer(respond_error(409, "conflict"), respond(202, RECEIPT)).start(nursery)
    with publisher(fake.url) as client:
        assert (await publish(client)).id == "e-1"
    nursery.cancel_scope.cancel()


async def test_response_timeout(nursery, caplog):
    """An attempt is limited to ``timeout``; then the work continues."""
    fake = await FakeServer(send_raw(head=b"", then="hang")).start(nursery)
    with publisher(fake.url, timeout=0.05, retry_timeout=0) as client:
        assert await publish(client) is None
    assert "timed out waiting for data from the server" in caplog.text
    nursery.cancel_scope.cancel()


async def test_dripping_response(nursery, caplog):
    """Each byte arrives in time, but the response is never complete: ``timeout`` is the sum."""
    fake = await FakeServer(drip_response).start(nursery)
    with publisher(fake.url, timeout=0.1, retry_timeout=0) as client:
        assert await publish(client) is None
        assert "timed out waiting for data from the server" in caplog.text
    nursery.cancel_scope.cancel()


async def test_response_without_a_result(nursery):
    """A response without a result means that the status was not accepted."""
    fake = await FakeServer(respond(200, {"hello": "world"})).start(nursery)
    with publisher(fake.url, raise_errors=True) as client, pytest.raises(InvalidResponse):
        await publish(client)
    nursery.cancel_scope.cancel()


async def test_session_id_is_percent_encoded(nursery):
    """It stays one path segment."""
    fake = await FakeServer(respond(202, RECEIPT)).start(nursery)
    with publisher(fake.url) as client:
        await publish(client, session_id="../a b")
    assert fake.requests[0].path == "/api/v1/sessions/..%2Fa%20b/status"
    nursery.cancel_scope.cancel()


def _in_a_fork(client, inherited, results):
    result = client.publish_status_update("s", PROCESSING)
    results.put(result is not None and client._target.client() is not inherited)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
async def test_fork(server):
    """A worker process forked after a first update opens its own connections."""
    with publisher(server.url) as client:
        assert await publish(client) is not None
        before = client._target.client()
        fork = multiprocessing.get_context("fork")
        results = fork.SimpleQueue()
        process = fork.Process(target=partial(_in_a_fork, client, before, results))
        process.start()
        await trio.to_thread.run_sync(process.join)
        assert results.get()
        assert await publish(client) is not None
        assert client._target.client() is before
    assert (await server.tracker.get("s")).seq == 3


def test_threads_of_a_fork(monkeypatch):
    """The threads that publish first in a forked process share one new set of connections."""
    client = StatusPublisher("http://127.0.0.1")
    inherited = client._target.client()
    monkeypatch.setattr("os.getpid", lambda: 0)
    results, creating, proceed = [], threading.Event(), threading.Event()

    def create(*args, **options):
        """Create the connections of the first thread only when those of the second are in use."""
        if not creating.is_set():
            creating.set()
            proceed.wait()
        return create_client(*args, **options)

    create_client = httpx.Client
    monkeypatch.setattr("httpx.Client", create)
    first = threading.Thread(target=lambda: results.append(client._target.client()))
    first.start()
    creating.wait()
    results.append(client._target.client())
    proceed.set()
    first.join()
    assert results[0] is results[1] is not inherited
    client.close()
    monkeypatch.undo()
    client.close()
    assert results[0].is_closed
    assert inherited.is_closed


async def test_closed_by_another_thread(caplog):
    """An update that meets a closed publisher is logged, as any other that cannot be published."""
    client = publisher("http://127.0.0.1")
    closed = client._target.client()
    closed.close()
    assert await publish(client) is None
    assert "client has been closed" in caplog.text
