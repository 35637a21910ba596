"""Who watches a session, and how many may: over each transport, in one instance."""

from __future__ import annotations

import pytest
import trio
from harness import HTTP2Client, ServerHarness
from raw_client import RawWebSocket
from trio.testing import wait_all_tasks_blocked

from sseserve.http.auth import Grant


@pytest.fixture
async def harness(autojump_clock, nursery):
    harness = ServerHarness(nursery)
    for session_id in "ab":
        await harness.tracker.update(session_id, progress=1)
    return harness


async def watchers(harness, session_id="a"):
    """Who watches, and that the numbers agree."""
    await wait_all_tasks_blocked()
    response = await harness.get(f"/api/sessions/{session_id}/watchers")
    assert response.status == 200
    body = response.json
    assert body.pop("session_id") == session_id
    instances = body.pop("by_instance")
    assert instances == ({harness.app.coordination.instance: body["total"]} if body["total"] else {})
    return body


async def test_watchers_by_protocol_and_dialect(harness):
    """Event streams over HTTP/1.1 and HTTP/2, WebSockets and bundles; each until it is closed."""
    nobody = {"total": 0, "by_protocol": {}, "by_dialect": {}}
    assert await watchers(harness) == nobody
    streams = [await harness.stream(f"/api/sessions/{name}/status/stream") for name in "aab"]
    streams.append(await harness.stream("/api/jobs/a/events"))
    streams.append(await harness.stream("/api/streams?session=b&session=a"))
    socket = await RawWebSocket.open(harness.connect(), "a")
    client = HTTP2Client(harness.connect())
    (number,) = await client.request("/api/v1/jobs/a/events")
    await client.read_until(lambda: client.bodies[number])
    assert await watchers(harness) == {
        "total": 6,
        "by_protocol": {"sse": 5, "ws": 1},
        "by_dialect": {"sessions": 4, "jobs": 1, "jobs_v1": 1},
    }
    assert await watchers(harness, "b") == {
        "total": 2,
        "by_protocol": {"sse": 2},
        "by_dialect": {"sessions": 2},
    }
    assert (await harness.get("/api/v1/jobs/a")).json["connections"] == 6
    await client.cancel(number)
    await socket.connection.stream.aclose()
    for stream in streams:
        await stream.disconnect()
    assert [await watchers(harness, name) for name in "ab"] == [nobody] * 2
    assert (await harness.get("/api/v1/jobs/a")).json["connections"] == 0


async def test_a_session_that_is_watched_in_a_bundle_does_not_expire(autojump_clock, harness):
    """Each session of a bundle is watched, as long as its client stays."""
    stream = await harness.stream("/api/streams?session=a&session=b")
    await stream.take(2)
    assert harness.broker.is_watched("a")
    assert harness.broker.is_watched("b")
    await stream.disconnect()
    assert not harness.broker.is_watched("a")


async def test_who_may_ask(harness):
    """Whoever may watch; others do not learn whether there is such a session."""
    assert (await harness.get("/api/sessions/none/watchers")).error["code"] == "session_not_found"

    async def authenticate(_request):
        return Grant("somebody", "patient")

    harness.app.admission.authenticate = authenticate
    for session_id in ("a", "none"):
        assert (await harness.get(f"/api/sessions/{session_id}/watchers")).status == 403


async def test_stream_limit_per_session(autojump_clock, nursery):
    """Each stream of a session counts, whoever its user is, over HTTP/1.1, HTTP/2 and in a bundle."""
    harness = ServerHarness(nursery, max_streams_per_session=2, max_streams_per_user=5, limit_loopback=True)
    for session_id in "ab":
        await harness.tracker.update(session_id, progress=1)
    path = "/api/sessions/{}/status/stream"
    first = await harness.stream(path.format("a"))
    bundle = await harness.stream("/api/streams?session=b&session=a")
    for target in (path.format("a"), "/api/streams?session=b&session=a", "/api/jobs/a/events"):
        response = await harness.get(target)
        assert (response.status, response.error["code"]) == (429, "too_many_streams")
        assert "'a'" in response.error["message"]
        assert (await harness.request("HEAD", target)).status == 429
    client = HTTP2Client(harness.connect())
    (number,) = await client.request(path.format("a"))
    await client.read_until(lambda: client.statuses)
    assert client.statuses[number] == 429
    # Those that were refused have taken nothing, of the other session either.
    await harness.stream(path.format("b"))
    assert (await harness.get(path.format("b"))).status == 429
    taken = dict(harness.app.coordination.slots.taken)
    assert {name: count for name, count in taken.items() if name.startswith("session")} == {
        "session a": 2,
        "session b": 2,
    }
    assert sorted(taken.values()) == [2, 2, 3]
    await first.disconnect()
    await wait_all_tasks_blocked()
    assert (await harness.request("HEAD", path.format("a"))).status == 200
    await harness.stream(path.format("a"))
    await bundle.disconnect()


async def test_a_stream_that_is_cancelled_while_it_takes_its_slots(autojump_clock, nursery, monkeypatch):
    """It gives back those that it has got."""
    harness = ServerHarness(nursery, max_streams_per_session=1, max_streams_per_user=1, limit_loopback=True)
    await harness.tracker.update("a", progress=1)
    coordination = harness.app.coordination
    take = coordination.take_slot

    async def take_slowly(name, limit):
        if name.startswith("session"):
            await trio.sleep_forever()
        return await take(name, limit)

    monkeypatch.setattr(coordination, "take_slot", take_slowly)
    client = HTTP2Client(harness.connect())
    (number,) = await client.request("/api/sessions/a/status/stream")
    await wait_all_tasks_blocked()
    assert len(coordination.slots.taken) == 1
    await client.cancel(number)
    await wait_all_tasks_blocked()
    assert coordination.slots.taken == {}
