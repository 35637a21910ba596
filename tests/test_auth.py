"""Roles and grants, and that every route checks them."""

from __future__ import annotations

import re

import httpx
import hypothesis
import msgspec
import pytest
import trio
from hypothesis import strategies

import sseserve
from sseserve import Action, Grant, Session, Unauthorized
from sseserve.http.auth import Policy, Ticket, refusal
from sseserve.http.routes import ROUTES
from sseserve.http.routing import Kind

PATIENT = Grant("ann", "patient")
OTHER = Grant("bob", "patient")
THERAPIST = Grant("dr-lee", "therapist", frozenset({"ann"}))
STRANGER = Grant("dr-moe", "therapist", frozenset({"bob"}))
SERVICE = Grant("worker", "service")
ADMIN = Grant("root", "admin")
TOKENS = {"ann": PATIENT, "bob": OTHER, "lee": THERAPIST, "moe": STRANGER, "worker": SERVICE, "root": ADMIN}
HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
EVERYBODY = {Action.LIST, Action.TICKET, Action.REFRESH, Action.DIAGNOSE}
SESSION = Session(id="s", epoch="e", owner="ann", viewers=("eve",))


async def authenticate(request):
    """Return the grant of a bearer token."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme != "Bearer" or token not in TOKENS:
        raise Unauthorized("a bearer token is required")
    return TOKENS[token]


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    ("grant", "allowed"),
    [
        (PATIENT, {Action.WATCH, Action.CONTROL, *EVERYBODY}),
        (OTHER, EVERYBODY),
        (THERAPIST, {Action.WATCH, Action.CONTROL, *EVERYBODY}),
        (STRANGER, EVERYBODY),
        (Grant("eve", "patient"), {Action.WATCH, *EVERYBODY}),
        (Grant("ann"), EVERYBODY),
        (Grant("ann", "unknown"), EVERYBODY),
        (SERVICE, set(Action) - {Action.DELETE, Action.REVOKE}),
        (ADMIN, set(Action)),
    ],
)
def test_roles(grant, allowed):
    """Each role may do what its row lists, and nothing else."""
    assert {action for action in Action if Policy().allows(grant, action, "s", SESSION)} == allowed


@pytest.mark.parametrize("grant", [PATIENT, THERAPIST])
def test_unknown_session_is_not_allowed(grant):
    """Without a session there is no owner, so a client cannot find out whether one exists."""
    assert not Policy().allows(grant, Action.WATCH, "s", None)


@hypothesis.given(strategies.text("ab*", max_size=8), strategies.text("ab", max_size=8))
def test_capabilities_match_as_a_regular_expression_does(pattern, session_id):
    """Each ``*`` stands for any characters, or none."""
    expression = ".*".join(map(re.escape, pattern.split("*")))
    grant = Grant("bob", capabilities={Action.WATCH: (pattern,)})
    matches = re.fullmatch(expression, session_id) is not None
    assert Policy().allows(grant, Action.WATCH, session_id, None) is matches


@pytest.mark.parametrize(
    ("pattern", "session_id", "matches"),
    [
        ("*", "job-1", True),
        ("job-*", "job-1", True),
        ("job-*", "job-", True),
        ("job-*", "a-job-1", False),
        ("job-1", "job-1", True),
        ("job-1", "job-17", False),
        ("a*c", "a/b\nc", True),
        ("a*b*c", "a-b-b-c", True),
        ("a*b*c", "a-c", False),
        ("ab*ba", "aba", False),
        ("**", "", True),
        ("*" + "a*" * 60 + "b", "a" * 120, False),
        ("job-[0-9]", "job-1", False),
        ("job-?", "job-1", False),
        ("", "job-1", False),
    ],
)
def test_capabilities(pattern, session_id, matches):
    """A capability is for the sessions whose whole id matches; only ``*`` is special."""
    grant = Grant("bob", capabilities={Action.WATCH: (pattern,)})
    session = Session(id=session_id, epoch="e", owner="ann")
    assert Policy().allows(grant, Action.WATCH, session_id, session) is matches
    assert Policy().allows(grant, Action.WATCH, session_id, None) is matches
    assert not Policy().allows(grant, Action.PUBLISH, session_id, session)


def test_ticket_allows_what_it_is_for_and_its_maker_may():
    """Watching its sessions, as far as the right of its maker goes, and nothing else."""
    for maker, allowed in ((PATIENT, True), (OTHER, False), (ADMIN, True)):
        grant = msgspec.structs.replace(maker, ticket=Ticket(frozenset({"s"})))
        assert Policy().allows(grant, Action.WATCH, "s", SESSION) is allowed
        other = msgspec.structs.replace(SESSION, id="t")
        assert not Policy().allows(grant, Action.WATCH, "t", other)
        rest = set(Action) - {Action.WATCH}
        assert not any(Policy().allows(grant, action, "s", SESSION) for action in rest)
    grant = msgspec.structs.replace(ADMIN, ticket=Ticket(lists=True))
    assert {action for action in Action if Policy().allows(grant, action, "s", SESSION)} == {Action.LIST}


def test_every_api_route_requires_an_action():
    """No route under /api is open by mistake."""
    assert [r.path for r in ROUTES if r.path.startswith("/api") and r.action is None] == []


async def test_access_to_sessions_by_role():
    """401 without a valid token, 403 for another owner's session, 404 for none, 200 for one's own."""
    async with sseserve.serve(port=0, authenticate=authenticate) as server:
        await server.tracker.create("s", owner="ann")
        await server.tracker.update("s", status="processed")
        url = "/api/sessions/{}/status/stream"
        async with httpx.AsyncClient(base_url=server.url) as client:
            for token, session, status in [
                ("ann", "s", 200),
                ("lee", "s", 200),
                ("root", "s", 200),
                ("bob", "s", 403),
                ("moe", "s", 403),
                ("bob", "none", 403),
                ("root", "none", 404),
                ("nobody", "s", 401),
            ]:
                response = await client.get(url.format(session), headers=bearer(token))
                assert (token, session, response.status_code) == (token, session, status)
            response = await client.get(url.format("s"))
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"


async def test_a_refusal_says_what_the_token_may_not_do():
    """It names the role and the right, and is the same for a session that exists and one that does not."""
    async with sseserve.serve(port=0, authenticate=authenticate) as server:
        await server.tracker.create("s", owner="ann")
        async with httpx.AsyncClient(base_url=server.url, headers=bearer("bob")) as client:
            for method, path, right in [
                ("GET", "/api/sessions/s/status", "watch this session"),
                ("GET", "/api/sessions/none/status", "watch this session"),
                ("GET", "/api/streams?session=s", "watch this session"),
                ("POST", "/api/sessions/s/cancel", "control this session"),
                ("POST", "/api/sessions/s/progress", "publish to this session"),
                ("DELETE", "/api/sessions/s", "delete this session"),
                ("POST", "/api/sessions", "create this session"),
                ("POST", "/api/claims", "publish to all sessions"),
            ]:
                response = await client.request(method, path)
                message = response.json()["error"]["message"]
                assert (response.status_code, message) == (
                    403,
                    f"a token with the role 'patient' may not {right}",
                )


@pytest.mark.parametrize("action", Action)
def test_every_refusal_has_a_message(action):
    """Also one of a token without a role, and one of a ticket."""
    assert str(refusal(Grant("x"), action)).startswith("a token without a role may not ")
    assert str(refusal(Grant("x", ticket=Ticket()), action)).startswith("this ticket may not ")


@pytest.mark.parametrize("route", [r for r in ROUTES if r.action is not None], ids=lambda r: r.name)
async def test_every_route_requires_a_token(route):
    """Each route responds with 401, on the first request of a connection and on a later one."""
    async with sseserve.serve(port=0, authenticate=authenticate) as server:
        await server.tracker.create("s", owner="ann")
        path = route.path.replace("{id}", "s").replace("{name}", "x")
        query = "?session=s" if route.name == "streams" else ""
        headers = HANDSHAKE if route.kind is Kind.SOCKET else {}
        async with httpx.AsyncClient(base_url=server.url) as client:
            first = await client.request(route.method, path + query, headers=headers)
        async with httpx.AsyncClient(base_url=server.url) as client:
            await client.get("/health")
            later = await client.request(route.method, path + query, headers=headers)
        assert (first.status_code, later.status_code) == (401, 401)
        assert (await server.tracker.get("s")).seq == 1


@pytest.mark.parametrize(("origin", "status"), [("http://evil.example", 403), (None, 101)])
async def test_websocket_checks_the_origin(origin, status):
    """With authentication a page of an origin that is not listed gets no WebSocket."""
    async with sseserve.serve(port=0, authenticate=authenticate, allowed_hosts=("x",)) as server:
        await server.tracker.create("s", owner="ann")
        fields = {"Host": "x", **HANDSHAKE, **bearer("ann"), **({} if origin is None else {"Origin": origin})}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        async with stream:
            await stream.send_all(f"GET /api/sessions/s/status/ws HTTP/1.1\r\n{head}\r\n".encode())
            assert f" {status} ".encode() in await stream.receive_some()


async def test_patient_lists_own_sessions_and_cannot_publish():
    """The list has the sessions that the client may watch; publishing needs the service role."""
    async with sseserve.serve(port=0, authenticate=authenticate) as server:
        await server.tracker.create("s", owner="ann")
        await server.tracker.create("t", owner="bob")
        async with httpx.AsyncClient(base_url=server.url, headers=bearer("ann")) as client:
            listed = (await client.get("/api/sessions")).json()["sessions"]
            assert [session["session_id"] for session in listed] == ["s"]
            rejected = await client.post("/api/sessions/s/progress", json={"progress": 1})
            assert rejected.status_code == 403
            response = await client.post(
                "/api/sessions/s/progress", json={"progress": 1}, headers=bearer("worker")
            )
            assert response.status_code == 202
            bundle = await client.get("/api/streams?session=s&session=t")
            assert bundle.status_code == 403


async def test_authenticate_gets_the_same_request_on_every_path():
    """Over HTTP/1.1 and HTTP/2, for streams, WebSockets, long-polls and publishers: all of its fields."""
    seen = []

    async def note(request):
        seen.append((request.http_version, request))
        return ADMIN

    requests = [
        ("GET", "/api/sessions/%61b/status/stream?x=1&x=2", {}),
        ("GET", "/api/streams?session=%61b", {}),
        ("GET", "/api/streams/sessions", {}),
        ("GET", "/api/sessions/%61b/status/ws?x=1", HANDSHAKE),
        ("GET", "/api/sessions/%61b/events?wait=0", {}),
        ("POST", "/api/sessions/%61b/progress?x=1", {}),
        ("DELETE", "/api/sessions/none", {}),
    ]
    async with sseserve.serve(port=0, authenticate=note) as server:
        await server.tracker.update("ab", status="completed")
        for http2 in (False, True):
            async with httpx.AsyncClient(
                base_url=server.url, http1=not http2, http2=http2, trust_env=False
            ) as client:
                for method, path, fields in requests:
                    if http2 and fields:
                        continue  # a WebSocket over HTTP/2 has another handshake (RFC 8441)
                    headers = {"X-Request-ID": "r-1", "Authorization": "Bearer x", "X-Own": "a, b", **fields}
                    async with client.stream(method, path, headers=headers):
                        pass

    def view(request):
        own = {name: request.headers[name] for name in ("authorization", "x-request-id", "x-own", "host")}
        return (
            *(request.method, request.raw_path, request.path, request.query_string, request.id, request.peer),
            own,
        )

    first = [view(request) for version, request in seen if version == "1.1"]
    second = [view(request) for version, request in seen if version == "2"]
    assert [(row[0], row[1].partition("?")[0]) for row in first] == [
        (method, path.partition("?")[0]) for method, path, _ in requests
    ]
    assert second == [row for row, (_, _, fields) in zip(first, requests, strict=True) if not fields]
    assert {row[5] for row in first} == {"127.0.0.1"}
