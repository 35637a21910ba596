"""Who gets what from which route, as a table of its own: every route, for every kind of client.

It is not made from the actions of the routes, so a route that requires a wrong one is found.
"""

from __future__ import annotations

import hashlib
import json

import pytest
import trio
from harness import START, ServerHarness
from http2_harness import Client as HTTP2Client
from raw_client import HANDSHAKE, request_bytes
from tokens import SECRET, make_token
from trio.testing import wait_all_tasks_blocked

from sseserve.config import ROLES, Role
from sseserve.dialects.jobs import JOBS
from sseserve.errors import ConfigError
from sseserve.http.revocations import Revocation
from sseserve.http.routes import ROUTES
from sseserve.http.routing import Kind, Route, Routes
from sseserve.progress.rules import Update
from sseserve.progress.tracker import IdempotencyKey

EVERYBODY = {
    *("health", "ready", "metrics", "openapi", "asyncapi", "docs", "dashboard", "index", "static"),
}
DIAGNOSTICS = {"diagnose", "diagnose_body", "diagnose_stream", "diagnose_socket"}
ANY_TOKEN = {"list", "list_jobs", "list_stream", "ticket", "refresh"} | DIAGNOSTICS
STREAMS = {
    *("stream", "control", "streams", "interaction", "job_events", "job_v1_events", "transcription"),
    *("socket", "job_socket"),
}
WATCH = STREAMS | {"status", "history", "watchers", "job", "job_v1", "transcription_poll", "artifact"}
PUBLISH = {"progress", "events", "interact", "job_progress", "transcription_status"}
PUBLISH_ALL = {"claim_job", "pubsub"}
CONTROL = {"cancel", "pause", "resume", "cancel_job", "pause_job", "resume_job"}
CREATE = {"create", "create_job", "create_v1", "demo"}
DELETE, REVOKE = {"delete"}, {"revoke"}
TABLE = (EVERYBODY, ANY_TOKEN, WATCH, PUBLISH, PUBLISH_ALL, CONTROL, CREATE, DELETE, REVOKE)

# The claims of tokens, and what they allow, of the session "s". It is ann's, and eve may watch it.
STRANGER = {
    right: ["t", "S", "s-*", "*-s", "ss"] for right in ("watch", "publish", "control", "create", "delete")
}
HOLDERS: dict[str, tuple[dict[str, object], set[str]]] = {
    "ann": ({"role": "patient"}, WATCH | CONTROL),
    "bob": ({"role": "patient"}, set()),
    "eve": ({"role": "patient"}, WATCH),
    "dr-lee": ({"role": "therapist", "patients": ["ann"]}, WATCH | CONTROL),
    "dr-moe": ({"role": "therapist", "patients": ["bob"]}, set()),
    "nobody": ({"patients": ["ann"]}, set()),
    "unknown": ({"role": "root", "patients": ["ann"]}, set()),
    "stranger": ({"sseserve": STRANGER}, set()),
    "worker": ({"role": "service"}, WATCH | PUBLISH | PUBLISH_ALL | CONTROL | CREATE),
    "root": ({"role": "admin"}, WATCH | PUBLISH | PUBLISH_ALL | CONTROL | CREATE | DELETE | REVOKE),
    "watcher": ({"sseserve": {"watch": ["s"]}}, WATCH),
    "publisher": ({"sseserve": {"publish": ["s"]}}, PUBLISH),
    "publisher-of-all": ({"sseserve": {"publish": ["*"]}}, PUBLISH | PUBLISH_ALL),
    "controller": ({"sseserve": {"control": ["s*"]}}, CONTROL),
    "creator": ({"sseserve": {"create": ["*"]}}, CREATE),
    "deleter": ({"sseserve": {"delete": ["s"]}}, DELETE),
}

BODIES = {
    "events": {"type": "note", "data": 1},
    "interact": {"type": "note", "data": 1},
    "job_progress": {"message": "half"},
    "pubsub": {"message": {"data": "e30="}},
    "revoke": {"token_id": "of-nobody"},
    "ticket": {"list": True},
}
PRIVATE = "what only watchers may read"


class Table:
    """Sends requests of all routes to one server. A response is its status, its headers and its body.

    Streams and WebSockets are closed after the head of their response.
    """

    def __init__(self, server: ServerHarness) -> None:
        self.server = server

    async def restore(self) -> None:
        """Let the only session be "s", as it was at first."""
        tracker = self.server.tracker
        for session in await tracker.sessions():
            await tracker.delete(session.id)
        await tracker.create("s", owner="ann", viewers=["eve"], title=PRIVATE)
        await tracker.update("s", status="processing", message=PRIVATE, data={"text": PRIVATE})

    async def request(
        self, name: str, headers: list[tuple[str, str]], session_id: str = "s", query: str = ""
    ) -> tuple[int, dict[str, str], bytes]:
        route, target, body = ROUTES[name], self.target(name, session_id, query), None
        if route.method != "GET":
            body = json.dumps(BODIES.get(name, {})).encode()
        if route.kind is Kind.SOCKET:
            headers = [*headers, *HANDSHAKE]
        connection = self.server.connect()
        async with connection.stream:
            await connection.send(request_bytes(route.method, target, body, headers))
            response = await connection.read_head()
            content = b""
            if response.status not in (101, 204) and "text/event-stream" not in response.headers.values():
                content = await connection.read_exactly(int(response.headers["content-length"]))
        return response.status, response.headers, content

    def target(self, name: str, session_id: str = "s", query: str = "") -> str:
        path = ROUTES[name].path.replace("{id}", session_id)
        path = path.replace("{name}", "main.gif" if name == "artifact" else "api.js")
        parameters = [f"session={session_id}"] * (name == "streams") + [query] * bool(query)
        return "?".join([path, "&".join(parameters)]) if parameters else path

    async def statuses(
        self, headers: list[tuple[str, str]], names: set[str] | None = None, query: str = ""
    ) -> dict[str, int]:
        """Return the status of each route; 200 for all that are successful, or that find no such file."""
        statuses = {}
        for route in ROUTES:
            if names is None or route.name in names:
                await self.restore()
                status, _, _ = await self.request(route.name, headers, query=query)
                is_success = status in route.responses or (route.name == "artifact" and status == 404)
                statuses[route.name] = 200 if is_success else status
        return statuses


def token(subject: str, **claims: object) -> str:
    return make_token(now=int(START), sub=subject, **{"role": "admin"} | claims)


def bearer(text: str) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {text}")]


def holder(subject: str) -> list[tuple[str, str]]:
    return bearer(make_token(now=int(START), sub=subject, **HOLDERS[subject][0]))


def expected(allowed: set[str], otherwise: int) -> dict[str, int]:
    return {route.name: 200 if route.name in allowed | EVERYBODY else otherwise for route in ROUTES}


@pytest.fixture
async def table(nursery):
    return Table(ServerHarness(nursery, jwt_key=SECRET))


def test_every_route_is_in_the_table_once():
    assert sorted(route.name for route in ROUTES) == sorted(name for row in TABLE for name in row)


@pytest.mark.parametrize("kind", [Kind.STREAM, Kind.SOCKET, Kind.PUBLISH])
def test_a_row_that_requires_no_right(kind):
    """It is refused: a program that adds a dialect may have forgotten it, and everybody could watch."""
    with pytest.raises(ConfigError, match="the route 'new' needs an action"):
        Routes((*ROUTES, Route("GET", "/new/{id}", "new", "New", kind, JOBS)))


@pytest.mark.parametrize("result", [None, "root", {"subject": "root", "role": "admin"}])
async def test_a_program_that_returns_no_grant(mock_clock, nursery, result):
    """That is an error of the program, not a server without authentication."""

    async def authenticate(_request):
        return result

    table = Table(ServerHarness(nursery, authenticate=authenticate))
    assert await table.statuses([]) == expected(set(), 500)


@pytest.mark.parametrize("subject", HOLDERS)
async def test_holders_of_tokens(mock_clock, table, subject):
    """Each may do what its row lists, and nothing else."""
    assert await table.statuses(holder(subject)) == expected(HOLDERS[subject][1] | ANY_TOKEN, 403)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        bearer(token("root", key="another-secret-of-thirty-two-bytes!")),
        bearer(token("root", iat=int(START) - 100, exp=int(START) - 31)),
        bearer(token("root", nbf=int(START) + 31)),
        bearer(token("root", jti="revoked")),
        bearer(token("revoked")),
        bearer(f"{token('root')}, Bearer {token('root')}"),
        bearer(token("root")) * 2,
        [("Authorization", token("root"))],
        [("Authorization", f"Basic {token('root')}"), ("Cookie", f"__Host-sseserve={token('root')}")],
        [("Authorization", ""), ("Cookie", f"__Host-sseserve={token('root')}")],
        [("Cookie", f"sseserve={token('root')}; __Host-Sseserve={token('root')}")],
        [("Cookie", f"__Host-sseserve={token('root')}; __Host-sseserve={token('ann')}")],
        [("X-Authorization", f"Bearer {token('root')}"), ("Sec-WebSocket-Protocol", token("root"))],
    ],
)
async def test_no_valid_token(mock_clock, table, headers):
    """401 everywhere but where everybody may read, and nothing of it in the response."""
    for revocation in (
        Revocation(token_id="revoked", at=START, until=START + 9e5),
        Revocation(subject="revoked", at=START, until=START + 9e5),
    ):
        table.server.app.revocations.add(revocation)
    assert await table.statuses(headers) == expected(set(), 401)


@pytest.mark.parametrize("query", ["ticket", "token", "access_token", "authorization", "jwt"])
async def test_tokens_are_not_taken_from_the_address(mock_clock, table, query):
    """Whatever the parameter is called."""
    assert await table.statuses([], query=f"{query}={token('root')}") == expected(set(), 401)


async def test_tickets(mock_clock, table):
    """Each is good for one of the streams that it was made for, once; nothing else takes one."""
    for maker, body, allowed in (
        ("ann", {"sessions": ["s"]}, STREAMS),
        ("root", {"sessions": ["t", "s-1"]}, set()),
        ("root", {"list": True}, {"list_stream"}),
    ):
        watched = STREAMS | {"list_stream", "diagnose_stream", "diagnose_socket"}
        for route in ROUTES:
            await table.restore()
            ticket = (await table.server.post("/api/tickets", body, holder(maker))).json["ticket"]
            results = [(await table.request(route.name, [], query=f"ticket={ticket}"))[0] for _ in "12"]
            if route.name in EVERYBODY:
                assert results == [200, 200]
            elif route.name in allowed:
                assert results == [101 if route.kind is Kind.SOCKET else 200, 401], route.name
            else:
                assert results == [403 if route.name in watched else 401, 401], route.name


async def test_cookies(mock_clock, table):
    """A request that changes something, and a WebSocket, need an Origin that is the same."""
    cookie = [("Cookie", f"a=b; __Host-sseserve={token('root')}; c=d")]
    changing = {r.name for r in ROUTES if r.method != "GET" or r.kind is Kind.SOCKET}
    everything = {route.name for route in ROUTES}
    own = [("Origin", "http://localhost")]
    assert await table.statuses(cookie) == expected(everything - changing, 403)
    assert await table.statuses(cookie + own) == expected(everything, 403)
    for more in (
        [("Origin", "https://evil.example")],
        [("Origin", "null")],
        [("Origin", "http://localhost:8000")],
        [("Origin", "http://localhost.evil.example")],
        [("Origin", "http://localhost@evil.example")],
        [("Origin", "capacitor://localhost")],
        [*own, ("Sec-Fetch-Site", "cross-site")],
        [*own, ("Sec-Fetch-Site", "same-site")],
        [*own, *own],
    ):
        assert await table.statuses(cookie + more, changing) == dict.fromkeys(changing, 403), more
        assert await table.statuses(bearer(token("root")) + more, changing) == dict.fromkeys(changing, 403)


@pytest.mark.parametrize("subject", ["bob", "dr-moe", "nobody", "unknown", "stranger", "creator"])
async def test_unknown_and_forbidden_sessions_are_responded_to_alike(mock_clock, table, subject):
    """With the same headers and the same body."""
    await table.restore()
    headers = [*holder(subject), ("X-Request-ID", "one")]
    for route in ROUTES:
        if route.name in WATCH | PUBLISH | CONTROL | DELETE:
            responses = [await table.request(route.name, headers, session_id) for session_id in ("s", "n")]
            for _, fields, _ in responses:
                del fields["date"]
            assert responses[0] == responses[1], route.name


@pytest.mark.parametrize("subject", [name for name, (_, allowed) in HOLDERS.items() if WATCH - allowed])
async def test_what_only_watchers_may_read(mock_clock, table, subject):
    """It is in no response to anybody else."""
    for route in ROUTES:
        await table.restore()
        _, headers, body = await table.request(route.name, holder(subject))
        assert PRIVATE not in f"{headers} {body.decode()}", route.name


async def test_a_receipt_of_a_session_that_was_replaced(autojump_clock, nursery):
    """An idempotency key does not lead to what another owner has published to a session of that id."""
    roles = {"owner": Role(own=frozenset({"publish"})), "admin": ROLES["admin"]}
    table = Table(ServerHarness(nursery, jwt_key=SECRET, roles=roles))
    await table.restore()
    headers, body = [*bearer(token("ann", role="owner")), ("Idempotency-Key", "1")], b'{"message": "half"}'
    connection = table.server.connect()
    data = request_bytes("POST", table.target("progress"), body, headers)
    await connection.send(data[:-1])
    await wait_all_tasks_blocked()
    await table.server.tracker.delete("s")
    await table.server.tracker.create("s", owner="bob")
    digest = hashlib.blake2b(body, digest_size=16).digest()
    key = IdempotencyKey("progress 1", digest=digest)  # on another instance
    await table.server.tracker.apply("s", Update(message="half"), key=key)
    await connection.send(data[-1:])
    assert (await connection.read_head()).status == 403


async def test_files_of_a_session_that_was_replaced(autojump_clock, table):
    """They are not those of the session that has its id now, whose owner is another."""
    server, now = table.server, int(START)
    ann, bob = (bearer(make_token(now=now, sub=name, role="patient")) for name in ("ann", "bob"))
    created = await server.post("/api/quick/demo", {"owner": "ann"}, bearer(token("root")))
    session_id = created.json["jobId"]
    await (await server.stream(f"/api/jobs/{session_id}/events", headers=ann)).read_to_end()
    [path, *_] = [file.url for file in (await server.tracker.get(session_id)).progress.artifacts]
    assert [(await server.get(path, headers)).status for headers in (ann, bob)] == [200, 403]
    await server.tracker.delete(session_id)
    assert [(await server.get(path, headers)).status for headers in (ann, bob)] == [403, 403]
    await server.tracker.create(session_id, owner="bob")
    assert [(await server.get(path, headers)).status for headers in (ann, bob)] == [403, 404]


@pytest.mark.parametrize("ends", ["expires", "is revoked"])
async def test_a_token_that_ends_while_a_body_arrives(mock_clock, table, ends):
    """A request is refused whose token is not valid any more when its body is complete."""
    names = [route.name for route in ROUTES if route.method == "POST" and route.name != "refresh"]
    for name in names:
        await table.restore()
        now = int(START + trio.current_time())
        headers = bearer(token("root", jti=name, iat=now - 3600, exp=now - 25))  # 5 s are left
        body = json.dumps(BODIES.get(name, {})).encode()
        connection = table.server.connect()
        async with connection.stream:
            data = request_bytes("POST", table.target(name), body, headers)
            await connection.send(data[:-1])
            await wait_all_tasks_blocked()
            if ends == "is revoked":
                table.server.app.revocations.add(Revocation(token_id=name, at=now, until=now + 86_400))
            else:
                mock_clock.jump(5)
            await connection.send(data[-1:])
            assert (await connection.read_head()).status == 401, name


async def test_over_http2(mock_clock, table):
    """A sample of routes, for all holders: those that the other implementation of HTTP serves by itself."""
    for subject, (_, allowed) in HOLDERS.items():
        client = HTTP2Client(table.server.connect().stream)
        headers = {name.lower(): value for name, value in holder(subject)}
        for name in ("socket", "stream", "list_stream", "streams", "status", "cancel", "progress", "delete"):
            await table.restore()
            method, target = ROUTES[name].method, table.target(name)
            if name == "socket":
                number = await client.websocket(target, **headers)
            else:
                number = await client.request(method, target, headers, end=method == "GET")
            if method != "GET":
                await client.send(number, json.dumps(BODIES.get(name, {})).encode(), end=True)
            while number not in client.status:
                await client.read()
            status = int(client.status[number])
            successful = {200, *ROUTES[name].responses} if name in allowed | ANY_TOKEN else {403}
            assert status in successful, (subject, name, status)
        await client.stream.aclose()
