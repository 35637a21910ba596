"""The synchronous publisher of statuses: against our server, and against those that refuse, cut and hang."""

from __future__ import annotations

import logging
import multiprocessing
from functools import partial

import pytest
import trio
from fakes import FakeServer, read_body, reset_on_close, respond, respond_error, send_raw
from peers import get

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


async def publish(to, session_id="s", data=PROCESSING):
    """Publish from a thread, as a worker that knows nothing of Trio."""
    return await trio.to_thread.run_sync(to.publish_status_update, session_id, data)


async def refused():
    """An address where nobody listens."""
    with trio.socket.socket() as sock:
        await sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


async def test_the_seeds_task(server):
    """The Celery task's calls, word for word, arrive at those who watch."""

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


async def test_it_answers_what_the_watchers_ask(server):
    """A worker that looks at the answer can stop when it is to."""
    with publisher(server.url) as to:
        assert (await publish(to)).control is Control.CONTINUE
        await server.tracker.control("s", Control.CANCEL)
        assert (await publish(to)).control is Control.CANCEL


@pytest.mark.parametrize(
    "data",
    [{"progress": 10}, {"status": "processing", "progress": 101}, {"status": "x", "object": object()}, None],
    ids=["no status", "no percentage", "no JSON", "no mapping"],
)
async def test_a_bad_status_does_not_end_the_work(server, caplog, data):
    """It is logged and passed over; with ``raise_errors`` it is raised."""
    with publisher(server.url) as to:
        assert await publish(to, data=data) is None
        assert "cannot publish the status of session s" in caplog.text
        assert (await publish(to)).id.endswith("-1")
    with publisher(server.url, raise_errors=True) as to, pytest.raises((RequestRejected, TypeError)):
        await publish(to, data=data)


async def test_what_comes_after_the_end_is_passed_over(server, caplog):
    """The server's no is not tried again."""
    caplog.set_level(logging.WARNING)
    await server.tracker.update("s", status="completed")
    with publisher(server.url) as to:
        assert await publish(to) is None
    assert "the session has ended" in caplog.text
    with publisher(server.url, raise_errors=True) as to, pytest.raises(SessionFinished):
        await publish(to)


async def test_a_server_that_is_not_there_costs_patience_and_no_more(caplog):
    """It is retried until ``retry_timeout``, with growing delays; then the update is dropped."""
    url = await refused()
    delays = []
    with StatusPublisher(url, retry_timeout=5, backoff=Backoff(1, 4), sleep=delays.append) as to:
        assert await publish(to) is None
    assert "Connection refused" in caplog.text
    assert 2 <= len(delays) <= 6
    assert sum(delays) < 5
    with StatusPublisher(url, retry_timeout=0, raise_errors=True) as to, pytest.raises(CannotConnect):
        await publish(to)


async def lose_the_answer(stream, request):
    """Take a request and reset the connection instead of answering."""
    await read_body(stream, request)
    reset_on_close(stream)


async def test_a_lost_answer_is_asked_for_again_under_the_same_key(nursery):
    """The same request again, byte for byte: the server knows it by its key and applies it once."""
    fake = await FakeServer(lose_the_answer, respond_error(503, "unavailable"), respond(202, RECEIPT)).start(
        nursery
    )
    with publisher(fake.url) as to:
        assert (await publish(to)).id == "e-1"
    assert len(fake.requests) == 3
    assert len({request.headers["idempotency-key"] for request in fake.requests}) == 1
    assert len({request.body for request in fake.requests}) == 1
    nursery.cancel_scope.cancel()


async def test_every_update_has_a_key_of_its_own(nursery):
    """Two updates that say the same are two."""
    fake = await FakeServer(*[respond(202, RECEIPT)] * 2).start(nursery)
    with publisher(fake.url) as to:
        await publish(to)
        await publish(to)
    assert len({request.headers["idempotency-key"] for request in fake.requests}) == 2
    nursery.cancel_scope.cancel()


async def test_a_server_asks_for_time(nursery):
    """``Retry-After`` is kept to."""
    handler = respond(503, {"error": {"code": "unavailable", "message": "full"}}, "Retry-After: 3")
    fake = await FakeServer(handler, respond(202, RECEIPT)).start(nursery)
    delays = []
    with publisher(fake.url, sleep=delays.append) as to:
        await publish(to)
    assert delays == [3]
    nursery.cancel_scope.cancel()


async def test_an_attempt_under_way_is_waited_for(nursery):
    """409 conflict with an earlier attempt of the same call is retried."""
    fake = await FakeServer(respond_error(409, "conflict"), respond(202, RECEIPT)).start(nursery)
    with publisher(fake.url) as to:
        assert (await publish(to)).id == "e-1"
    nursery.cancel_scope.cancel()


async def test_a_server_that_does_not_answer_is_given_up(nursery, caplog):
    """An attempt has its time; the work goes on without an answer."""
    fake = await FakeServer(send_raw(head=b"", then="hang")).start(nursery)
    with publisher(fake.url, timeout=0.05, retry_timeout=0) as to:
        assert await publish(to) is None
    assert "timed out waiting for data from the server" in caplog.text
    nursery.cancel_scope.cancel()


async def test_another_server_is_told_from_ours(nursery):
    """A response without a result means that the status was not accepted."""
    fake = await FakeServer(respond(200, {"hello": "world"})).start(nursery)
    with publisher(fake.url, raise_errors=True) as to, pytest.raises(InvalidResponse):
        await publish(to)
    nursery.cancel_scope.cancel()


async def test_a_session_id_is_one_segment(nursery):
    """An id cannot lead elsewhere, and need not be text (the seed's are UUIDs)."""
    fake = await FakeServer(respond(202, RECEIPT)).start(nursery)
    with publisher(fake.url) as to:
        await publish(to, session_id="../a b")
    assert fake.requests[0].path == "/api/v1/sessions/..%2Fa%20b/status"
    nursery.cancel_scope.cancel()


def _in_a_fork(to, results):
    inherited = to._http
    result = to.publish_status_update("s", PROCESSING)
    results.put(result is not None and to._http is not inherited)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
async def test_it_survives_a_fork(server):
    """A worker process that was forked after a first update opens a connection of its own."""
    with publisher(server.url) as to:
        assert await publish(to) is not None
        before = to._http
        fork = multiprocessing.get_context("fork")
        results = fork.SimpleQueue()
        process = fork.Process(target=partial(_in_a_fork, to, results))
        process.start()
        await trio.to_thread.run_sync(process.join)
        assert results.get()
        assert await publish(to) is not None
        assert to._http is before
    assert (await server.tracker.get("s")).seq == 3
