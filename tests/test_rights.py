"""Whose the sessions are that a request creates, and that rights are checked again when it is recorded."""

from __future__ import annotations

import json

import pytest
import trio.testing
from harness import START, ServerHarness
from raw_client import RawConnection, RawResponse, request_bytes

from sseserve import Action, Grant, Unauthorized
from sseserve.config import ROLES, Role
from sseserve.errors import Forbidden
from sseserve.http.auth import Policy, Ticket
from sseserve.http.revocations import Revocation

JOBS = dict.fromkeys((Action.CREATE, Action.PUBLISH, Action.WATCH), ("job-*",))
ROLE_NAMES = {
    **ROLES,
    "owner": Role(own=frozenset({"create", "watch", "publish", "control", "delete"})),
    "clinic": Role(assigned=frozenset({"create"})),
}
GRANTS = {
    "jobs": Grant("ann", capabilities=JOBS),
    "all": Grant("ann", capabilities={Action.CREATE: ("*",), Action.PUBLISH: ("*",)}),
    "owner": Grant("ann", "owner"),
    "clinic": Grant("dr-lee", "clinic", patients=frozenset({"ann"})),
    "patient": Grant("ann", "patient"),
    "service": Grant("worker", "service"),
    "ticket": Grant("root", "admin", ticket=Ticket(frozenset({"job-1"}))),
}


async def authenticate(request):
    if (grant := GRANTS.get(request.headers.get("authorization", "").removeprefix("Bearer "))) is None:
        raise Unauthorized("a bearer token is required")
    return grant


def bearer(name: str) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {name}")]


@pytest.fixture
def server(nursery, autojump_clock) -> ServerHarness:
    return ServerHarness(nursery, authenticate=authenticate, roles=ROLE_NAMES)


# Who owns what is created


@pytest.mark.parametrize(
    ("name", "session_id", "owner", "expected"),
    [
        ("service", None, None, None),
        ("service", "x", "bob", "bob"),
        ("jobs", "job-1", None, "ann"),
        ("jobs", "job-1", "ann", "ann"),
        ("jobs", "job-1", "bob", Forbidden),
        ("jobs", "x", None, Forbidden),
        ("jobs", None, None, Forbidden),
        ("all", None, None, "ann"),
        ("all", "x", None, "ann"),
        ("all", "x", "bob", Forbidden),
        ("owner", None, None, "ann"),
        ("owner", None, "bob", Forbidden),
        ("owner", "x", None, Forbidden),
        ("clinic", None, "ann", "ann"),
        ("clinic", None, "bob", Forbidden),
        ("clinic", None, None, Forbidden),
        ("patient", None, None, Forbidden),
        ("patient", None, "ann", Forbidden),
        ("ticket", "job-1", None, Forbidden),
        ("ticket", None, None, Forbidden),
    ],
)
def test_creation_owner(name, session_id, owner, expected):
    """The holder of the grant, unless its role has the right on every session."""
    policy, grant = Policy(ROLE_NAMES), GRANTS[name]
    if expected is Forbidden:
        with pytest.raises(Forbidden):
            policy.creation_owner(grant, Action.CREATE, session_id, owner)
    else:
        assert policy.may_create_some(grant)
        assert policy.creation_owner(grant, Action.CREATE, session_id, owner) == expected
    assert policy.creation_owner(None, Action.CREATE, session_id, owner) == owner
    assert not policy.may_create_some(GRANTS["ticket"])


async def test_sessions_that_are_created(server):
    """Their ids match the capability, and they are their creator's; what is refused creates nothing."""
    for name, body, status in [
        ("jobs", {"session_id": "job-1"}, 201),
        ("jobs", {"session_id": "job-1"}, 409),  # it may create this id, so it may know
        ("jobs", {"session_id": "job-2", "owner": "bob"}, 403),
        ("jobs", {"session_id": "other"}, 403),
        ("jobs", {}, 403),
        ("all", {"session_id": "other", "owner": "bob"}, 403),
        ("owner", {"session_id": "job-1"}, 403),  # it must not learn that there is one
        ("owner", {"session_id": "job-3"}, 403),
        ("patient", {"session_id": "job-3"}, 403),
        ("ticket", {"session_id": "job-3"}, 403),
        ("service", {"session_id": "for-bob", "owner": "bob"}, 201),
        ("service", {"session_id": "of-nobody"}, 201),
    ]:
        response = await server.post("/api/sessions", body, bearer(name))
        assert (name, body, response.status) == (name, body, status)
    owners = {session.id: session.owner for session in await server.tracker.sessions()}
    assert owners == {"job-1": "ann", "for-bob": "bob", "of-nobody": None}


@pytest.mark.parametrize("path", ["/api/sessions", "/api/jobs", "/api/v1/jobs", "/api/quick/demo"])
async def test_sessions_whose_id_the_server_chooses(server, path):
    """They need a right on all ids, or on sessions of one's own; whose they are is the same for all paths."""
    for name, owner, status in [
        ("jobs", None, 403),
        ("patient", None, 403),
        ("all", None, 2),
        ("all", "bob", 403),
        ("owner", None, 2),
        ("owner", "bob", 403),
        ("service", "bob", 2),
    ]:
        before = {session.id for session in await server.tracker.sessions()}
        body = {} if owner is None else {"owner": owner}
        response = await server.post(path, body, bearer(name))
        assert response.status in (status, status * 100 + 1, status * 100 + 2), (name, owner)
        created = [session for session in await server.tracker.sessions() if session.id not in before]
        expected = [] if status == 403 else [owner if name == "service" else "ann"]
        assert [session.owner for session in created] == expected


@pytest.mark.parametrize("is_lines", [False, True])
async def test_sessions_that_publishing_creates(server, is_lines):
    """The right to publish is enough; they are the publisher's, unless its role may publish to all."""
    types = [("Content-Type", "application/x-ndjson")] if is_lines else []
    for name, session_id, status in [
        ("jobs", "job-1", 202),
        ("jobs", "other", 403),
        ("owner", "other", 403),
        ("all", "third", 202),
        ("service", "fourth", 202),
    ]:
        path = f"/api/sessions/{session_id}/{'events' if is_lines else 'progress'}"
        response = await server.post(path, b'{"progress":1}', [*bearer(name), *types])
        assert (name, session_id, response.status) == (name, session_id, status)
    owners = {session.id: session.owner for session in await server.tracker.sessions()}
    assert owners == {"job-1": "ann", "third": "ann", "fourth": None}


@pytest.mark.parametrize(
    "path", ["/api/sessions", "/api/sessions/job-{}/progress", "/api/sessions/job-{}/events"]
)
async def test_sessions_of_an_owner_are_limited(nursery, autojump_clock, path):
    """Whether it creates them or publishes to them; others are not affected, nor are those that exist."""
    server = ServerHarness(nursery, authenticate=authenticate, roles=ROLE_NAMES, max_sessions_per_owner=2)
    body = {"type": "x", "data": 1} if path.endswith("events") else {}
    statuses = [(await server.post(path.format(number), body, bearer("all"))).status for number in range(4)]
    assert statuses == [200 + statuses[0] % 100] * 2 + [429] * 2
    refused = await server.post(path.format(9), body, bearer("all"))
    assert refused.error["code"] == "too_many_sessions"
    (session, *_) = await server.tracker.sessions()
    assert (await server.post(f"/api/sessions/{session.id}/progress", {}, bearer("all"))).status == 202
    assert (await server.post(path.format(10), body, bearer("service"))).status == statuses[0]
    assert server.app.counters.refused["max_sessions_per_owner"] == 3


# Rights when a request is recorded


async def begin(
    server: ServerHarness, path: str, name: str, size: int, *more: tuple[str, str]
) -> RawConnection:
    """Send the head of a request, and wait until it is authorised."""
    connection = server.connect()
    await connection.send(
        request_bytes("POST", path, b"", [*bearer(name), ("Content-Length", str(size)), *more])
    )
    await trio.testing.wait_all_tasks_blocked()
    return connection


async def finish(connection: RawConnection, body: bytes) -> RawResponse:
    await connection.send(body)
    return await connection.read_response()


@pytest.mark.parametrize("again", ["bob", None, "nobody"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/sessions/s/cancel", b'{"force":true}'),
        ("/api/jobs/s/pause", b"{}"),
        ("/api/sessions/s/progress", b'{"progress":50}'),
        ("/api/interaction/events/s", b'{"type":"x","data":1}'),
    ],
)
async def test_a_session_that_has_become_another(server, path, body, again):
    """Deleted while a request was read, and created again by somebody else or by nobody, or not at all."""
    await server.tracker.create("s", owner="ann")
    connection = await begin(server, path, "owner", len(body))
    await server.tracker.delete("s")
    if again is not None:
        await server.tracker.create("s", owner=None if again == "nobody" else again)
    before = await server.tracker.find("s")
    response = await finish(connection, body)
    assert response.status == 403, response.body
    assert await server.tracker.find("s") == before


async def test_a_session_that_is_still_the_same(server):
    """What its owner may do, it may."""
    await server.tracker.create("s", owner="ann")
    for path in ("progress", "pause", "resume"):
        response = await server.post(f"/api/sessions/s/{path}", {}, bearer("owner"))
        assert response.status == 202, response.body
    assert (await server.request("DELETE", "/api/sessions/s", headers=bearer("owner"))).status == 204
    assert (await server.request("DELETE", "/api/sessions/s", headers=bearer("owner"))).status == 403


async def test_lines_after_the_session_has_become_another(server):
    """The lines before stand, those after are refused."""
    await server.tracker.create("s", owner="ann")
    lines = [b'{"progress":10}\n', b'{"progress":20}\n']
    ndjson = ("Content-Type", "application/x-ndjson")
    connection = await begin(server, "/api/sessions/s/events", "owner", len(b"".join(lines)), ndjson)
    await connection.send(lines[0])
    await trio.testing.wait_all_tasks_blocked()
    assert (await server.tracker.get("s")).progress.percent == 10
    await server.tracker.delete("s")
    created = await server.tracker.create("s", owner="bob")
    response = await finish(connection, lines[1])
    assert (response.status, json.loads(response.body)["error"]["applied"]) == (403, 1)
    assert await server.tracker.get("s") == created


async def test_lines_after_the_token_was_revoked(server):
    """A request that goes on for an hour ends with its token."""
    lines = [b'{"progress":10}\n', b'{"progress":20}\n']
    ndjson = ("Content-Type", "application/x-ndjson")
    connection = await begin(server, "/api/sessions/s/events", "service", len(b"".join(lines)), ndjson)
    await connection.send(lines[0])
    await trio.testing.wait_all_tasks_blocked()
    server.app.revocations.add(Revocation(subject="worker", at=START, until=START + 60))
    response = await finish(connection, lines[1])
    assert (response.status, json.loads(response.body)["error"]["applied"]) == (401, 1)
    assert (await server.tracker.get("s")).progress.percent == 10


@pytest.mark.parametrize(
    ("method", "path"), [("DELETE", ""), ("GET", "/status"), ("GET", "/watchers"), ("POST", "/cancel")]
)
@pytest.mark.parametrize("again", ["bob", None])
async def test_a_session_that_becomes_another_after_the_request_is_authorised(
    server, monkeypatch, method, path, again
):
    """Whoever had a right to the earlier one does not learn of the other one, and changes nothing."""
    await server.tracker.create("s", owner="ann")
    load = server.app.engine.load
    loads = 0

    async def load_and_replace(session_id: str):
        nonlocal loads
        loads += 1
        found = await load(session_id)
        if loads == 1:  # this is what the request is authorised by
            await server.app.engine.delete("s", found.epoch)
            if again is not None:
                await server.tracker.create("s", owner=again)
        return found

    monkeypatch.setattr(server.app.engine, "load", load_and_replace)
    response = await server.request(method, f"/api/sessions/s{path}", headers=bearer("owner"))
    assert (response.status, response.error["code"]) == (403, "forbidden")
    session = await load("s")
    assert (session and session.owner, session and session.seq) == (again, again and 1)


async def test_no_room_for_more(nursery, autojump_clock):
    """507 that names the setting, once those that have ended are deleted; the end is stored all the same."""
    server = ServerHarness(nursery, max_log_bytes=9000)
    data = {"type": "x", "data": "x" * 2000}
    await server.post("/api/sessions/old/events", data)
    await server.tracker.update("old", status="done")
    statuses = [(await server.post("/api/sessions/live/events", data)).status for _ in range(4)]
    assert statuses == [202, 202, 202, 507]
    assert await server.tracker.find("old") is None
    refused = await server.post("/api/sessions/live/events", data)
    assert refused.error["code"] == "insufficient_storage"
    assert "max_log_bytes = 9000" in refused.error["message"]
    assert server.app.counters.refused["max_log_bytes"] == 2
    done = await server.post("/api/sessions/live/progress", {"status": "done"})
    assert done.status == 202
    assert (await server.post("/api/sessions/next/events", data)).status == 202
