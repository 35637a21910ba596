"""The server over real loopback sockets, as its users and as hostile peers meet it."""

from __future__ import annotations

import errno
import json
import re
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime

import pytest
import trio
from raw_client import RawConnection, RawWebSocket, chunk, connect, get, post, request_bytes, reset
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from sseserve.config import load
from sseserve.dialects.sessions import SESSIONS
from sseserve.http.routes import ROUTES
from sseserve.server import serve
from sseserve.server.application import Application

both_doors = pytest.mark.parametrize("behind", [False, True], ids=["direct", "behind"])
NDJSON = "application/x-ndjson"
EVIL = 'one\ntwo\r\nthree\rfour\u2028five\u2029six\x85seven\x0beight\x1cnine\0ten \U0001f600 "\\'


@pytest.fixture
async def server():
    async with serve(port=0, drain=0.5) as server:
        yield server


@asynccontextmanager
async def talk(server, behind=False, **options):
    """Connect; ``behind``: so that Hypercorn serves what follows."""
    connection = await connect(server.port, **options)
    async with connection.stream:
        if behind:
            assert (await connection.request("GET", "/health")).status == 200
        yield connection


async def settled(server, *, watchers):
    """Wait until so many clients watch, whatever has to happen before."""
    while len(server.app.broker.subscribers()) != watchers:
        await trio.lowlevel.checkpoint()


def places(cursors):
    return [int(cursor.split("-")[1]) for cursor in cursors]


# The table: every method, path and status


ASKED = [
    # Create
    ("POST", "/api/sessions", b"", 201, None),
    (
        "POST",
        "/api/sessions",
        b'{"session_id": "n\xc3\xa4her", "title": "t", "ttl": 5, "data": [1]}',
        201,
        None,
    ),
    ("POST", "/api/sessions", b'{"session_id": "run"}', 409, "session_exists"),
    ("POST", "/api/sessions", b'{"session_id": "a b"}', 422, "invalid"),
    ("POST", "/api/sessions", b'{"session_id": ""}', 422, "invalid"),
    ("POST", "/api/sessions", b'{"session_id": "x/y"}', 422, "invalid"),
    ("POST", "/api/sessions", b'{"session_id": 5}', 422, "invalid"),
    ("POST", "/api/sessions", b'{"ttl": -1}', 422, "invalid"),
    ("POST", "/api/sessions", b'{"colour": 1}', 422, "invalid"),
    ("POST", "/api/sessions", b"[]", 422, "invalid"),
    ("POST", "/api/sessions", b"{", 400, "bad_request"),
    # List
    ("GET", "/api/sessions", None, 200, None),
    ("GET", "/api/sessions?state=running&limit=1", None, 200, None),
    ("GET", "/api/sessions?state=flying", None, 422, "invalid"),
    ("GET", "/api/sessions?limit=-1", None, 422, "invalid"),
    ("GET", "/api/sessions?limit=many", None, 422, "invalid"),
    # Progress
    ("POST", "/api/sessions/run/progress", b'{"progress": 60, "stage": "s", "message": "m"}', 202, None),
    ("POST", "/api/sessions/new/progress", b"{}", 202, None),
    ("POST", "/api/sessions/run/progress", b'{"progress": 10}', 422, "invalid_progress"),
    ("POST", "/api/sessions/run/progress", b'{"progress": 10, "restart": true}', 202, None),
    ("POST", "/api/sessions/run/progress", b'{"progress": 101}', 422, "invalid_progress"),
    ("POST", "/api/sessions/run/progress", b'{"progress": -1}', 422, "invalid_progress"),
    ("POST", "/api/sessions/run/progress", b'{"progress": "50"}', 422, "invalid_progress"),
    ("POST", "/api/sessions/run/progress", b'{"progress": true}', 422, "invalid_progress"),
    ("POST", "/api/sessions/run/progress", b'{"progress": NaN}', 422, "invalid_progress"),
    ("POST", "/api/sessions/run/progress", b'{"progress": 1e999}', 422, "invalid_progress"),
    ("POST", "/api/sessions/run/progress", b'{"percent": 1}', 422, "invalid"),
    ("POST", "/api/sessions/run/progress", b"", 400, "bad_request"),
    ("POST", "/api/sessions/run/progress", b"nonsense", 400, "bad_request"),
    ("POST", "/api/sessions/run/progress", b'{"data": ' + b"[" * 100_000, 400, "bad_request"),
    ("POST", "/api/sessions/over/progress", b'{"progress": 100}', 409, "session_ended"),
    ("POST", "/api/sessions/a%20b/progress", b"{}", 422, "invalid"),
    ("POST", "/api/sessions/%00/progress", b"{}", 422, "invalid"),
    ("POST", "/api/sessions/%0a/progress", b"{}", 422, "invalid"),
    ("POST", "/api/sessions/" + "x" * 129 + "/progress", b"{}", 422, "invalid"),
    # Events
    ("POST", "/api/sessions/run/events", b'{"type": "note", "data": {"a": 1}, "retry": 5}', 202, None),
    ("POST", "/api/sessions/run/events", b'{"type": "note"}', 202, None),
    ("POST", "/api/sessions/run/events", b'{"data": 1}', 422, "invalid"),
    ("POST", "/api/sessions/run/events", b'{"type": ""}', 422, "invalid"),
    ("POST", "/api/sessions/run/events", b'{"type": "a\\nb"}', 422, "invalid"),
    ("POST", "/api/sessions/run/events", b'{"type": "a\\rb"}', 422, "invalid"),
    ("POST", "/api/sessions/run/events", b'{"type": "a\\u0000b"}', 422, "invalid"),
    ("POST", "/api/sessions/run/events", b'{"type": "progress"}', 422, "invalid"),
    ("POST", "/api/sessions/run/events", b'{"type": "x", "retry": -1}', 422, "invalid"),
    ("POST", "/api/sessions/over/events", b'{"type": "x"}', 409, "session_ended"),
    # Status and history
    ("GET", "/api/sessions/run/status", None, 200, None),
    ("GET", "/api/sessions/over/status?wait=60", None, 200, None),
    ("GET", "/api/sessions/run/status?wait=nan", None, 422, "invalid"),
    ("GET", "/api/sessions/run/status?wait=61", None, 422, "invalid"),
    ("GET", "/api/sessions/none/status", None, 404, "session_not_found"),
    ("GET", "/api/sessions/run/events", None, 200, None),
    ("GET", "/api/sessions/over/events?wait=60", None, 200, None),
    ("GET", "/api/sessions/run/events?limit=0", None, 422, "invalid"),
    ("GET", "/api/sessions/none/events?wait=60", None, 404, "session_not_found"),
    # Watch
    ("GET", "/api/sessions/over/status/stream", None, 200, None),
    ("GET", "/api/sessions/none/status/stream", None, 404, "session_not_found"),
    ("HEAD", "/api/sessions/run/status/stream", None, 200, None),
    ("HEAD", "/api/sessions/none/status/stream", None, 404, None),
    ("OPTIONS", "/api/sessions/run/status/stream", None, 200, None),
    ("GET", "/api/sessions/run/status/ws", None, 426, "upgrade_required"),
    ("GET", "/api/sessions/none/status/ws", None, 404, "session_not_found"),
    ("GET", "/api/streams?session=over", None, 200, None),
    ("GET", "/api/streams?session=none", None, 404, "session_not_found"),
    ("GET", "/api/streams", None, 422, "invalid"),
    # Control
    ("POST", "/api/sessions/run/pause", None, 202, None),
    ("POST", "/api/sessions/run/resume", b"{}", 202, None),
    ("POST", "/api/sessions/run/cancel", b'{"force": true}', 202, None),
    ("POST", "/api/sessions/run/cancel", b'{"force": 1}', 422, "invalid"),
    ("POST", "/api/sessions/run/cancel", b"{", 400, "bad_request"),
    ("POST", "/api/sessions/over/cancel", None, 409, "session_ended"),
    ("POST", "/api/sessions/none/cancel", None, 404, "session_not_found"),
    ("POST", "/api/sessions/none/pause", None, 404, "session_not_found"),
    ("POST", "/api/sessions/none/resume", None, 404, "session_not_found"),
    # Forget
    ("DELETE", "/api/sessions/run", None, 204, None),
    ("DELETE", "/api/sessions/none", None, 404, "session_not_found"),
    # Operations and pages
    ("POST", "/api/quick/demo", None, 202, None),
    ("GET", "/health", None, 200, None),
    ("GET", "/ready", None, 200, None),
    ("GET", "/metrics", None, 200, None),
    ("GET", "/openapi.json", None, 200, None),
    ("GET", "/", None, 200, None),
    ("GET", "/dashboard", None, 200, None),
    ("GET", "/static/style.css", None, 200, None),
    ("GET", "/static/none.css", None, 404, "not_found"),
    ("GET", "/static/..%2Fapp.py", None, 404, "not_found"),
    ("GET", "/static/%2e%2e/app.py", None, 404, "not_found"),
    ("GET", "/api/artifacts/run/none", None, 404, "not_found"),
    # What there is not
    ("GET", "/nothing", None, 404, "not_found"),
    ("GET", "/health/", None, 404, "not_found"),
    ("DELETE", "/health", None, 405, "method_not_allowed"),
    ("GET", "/api/sessions/run/progress", None, 405, "method_not_allowed"),
    ("POST", "/api/sessions/run/status/stream", b"{}", 405, "method_not_allowed"),
    ("PUT", "/api/sessions/run", b"{}", 405, "method_not_allowed"),
]


@both_doors
@pytest.mark.parametrize(("method", "target", "body", "status", "code"), ASKED)
async def test_the_table(server, method, target, body, status, code, behind):
    """What is asked for is answered the same as first request of a connection and as a later one."""
    await server.tracker.update("run", progress=50)
    await server.tracker.update("over", status="done")
    before = {s.id: s.seq for s in await server.tracker.sessions()}
    async with talk(server, behind) as connection:
        response = await connection.request(method, target, body, [("X-Request-ID", "chosen")])
    assert response.status == status, response
    assert response.headers["x-request-id"] == "chosen"
    if code is not None:
        assert response.error["code"] == code
        # Whatever was refused has changed nothing.
        assert {s.id: s.seq for s in await server.tracker.sessions()} == before
    if status == 405:
        assert response.headers["allow"]


async def test_every_route_of_the_table_is_asked_for():
    """The list above leaves none out."""
    asked = [(method, target.partition("?")[0]) for method, target, _, status, _ in ASKED if status < 500]
    for route in (route for route in ROUTES if route.dialect is SESSIONS):
        pattern = re.sub(r"{\w+}", "[^/]+", route.path)
        assert any(m == route.method and re.fullmatch(pattern, t) for m, t in asked), route


@both_doors
@pytest.mark.parametrize(
    ("given", "taken"),
    [("a-b.c:1", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False), ("\xe4", False)],
)
@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("POST", "/api/sessions/run/progress", b"{}"),
        ("POST", "/api/sessions/run/progress", b"{"),
        ("GET", "/api/sessions/over/status/stream", None),
        ("GET", "/api/sessions/none/status/stream", None),
        ("GET", "/health", None),
        ("GET", "/none", None),
    ],
)
async def test_a_request_id_is_taken_or_made(server, behind, given, taken, method, target, body):
    """A sound one is answered as it came; any other is replaced by one of ours."""
    await server.tracker.update("over", status="done")
    async with talk(server, behind) as connection:
        response = await connection.request(method, target, body, [("X-Request-ID", given)])
    found = response.headers["x-request-id"]
    assert (found == given) == taken
    assert re.fullmatch(r"[\x21-\x7e]{1,128}", found)
    if response.status >= 400:
        assert response.error["request_id"] == found


async def test_create_names_where_everything_is(server):
    """Each link of the answer leads somewhere, also for an id that must be encoded."""
    response = await post(
        server.port, "/api/sessions", {"session_id": "café&co", "title": "T", "owner": "me"}
    )
    made = response.json
    assert (made["session_id"], made["state"], made["progress"]) == ("café&co", "queued", 0)
    assert response.headers["location"] == made["links"]["status"]
    async with talk(server) as connection:
        for name in ("status", "events"):
            assert (await connection.request("GET", made["links"][name])).json["session_id"] == "café&co"
        assert (await connection.request("POST", made["links"]["progress"], b'{"progress": 1}')).status == 202
        for name in ("pause", "resume", "cancel"):
            assert (await connection.request("POST", made["links"][name])).status == 202
        socket = await RawWebSocket.open(connection, "caf%C3%A9&co")
        assert (await socket.message())["data"]["session_id"] == "café&co"
    assert (await get(server.port, made["links"]["stream"].replace("status/stream", "events"))).status == 200
    async with talk(server) as connection:
        assert (await connection.request("DELETE", made["links"]["self"])).status == 204
        assert (await connection.request("GET", made["links"]["status"])).status == 404


async def test_the_list_is_filtered_by_state(server):
    """The newest first, one state or all."""
    for name, status in (("a", "running"), ("b", "done"), ("c", "failed"), ("d", "running")):
        await server.tracker.update(name, status=status)
    for query, ids in (("", "dcba"), ("?state=running", "da"), ("?state=succeeded", "b"), ("?limit=2", "dc")):
        found = (await get(server.port, "/api/sessions" + query)).json["sessions"]
        assert [s["session_id"] for s in found] == list(ids)


async def test_openapi_names_every_route(server):
    """The description is made of the table."""
    paths = (await get(server.port, "/openapi.json")).json["paths"]
    assert {(path, method.upper()) for path in paths for method in paths[path]} == {
        (route.path, route.method) for route in ROUTES if route.documented
    }


async def test_health_and_metrics_count_what_is_there(server):
    """Connections, streams, sockets, events, deliveries."""
    await server.tracker.update("a", progress=1)
    async with talk(server) as stream, talk(server) as other:
        await stream.watch("a")
        await RawWebSocket.open(other, "a")
        await settled(server, watchers=2)
        await server.tracker.update("a", progress=2)
        assert [(await stream.event()).event for _ in range(2)] == ["progress"] * 2
        figures = (await get(server.port, "/health")).json
        assert (figures["streams"], figures["sockets"], figures["sessions"]) == (1, 1, 1)
        assert figures["connections"] == 3
        text = (await get(server.port, "/metrics")).body.decode()
    for line in (
        'sseserve_subscribers{dialect="sessions",protocol="sse"} 1.0',
        'sseserve_subscribers{dialect="sessions",protocol="ws"} 1.0',
        "sseserve_events_total 2.0",
        "sseserve_deliveries_total 2.0",
    ):
        assert line in text.splitlines()


@both_doors
async def test_the_worker_learns_what_is_asked_of_it(server, behind):
    """Pause, go on, cancel: in the answer to its next update, and as events for the watchers."""
    async with talk(server, behind) as worker, talk(server) as watcher:
        await worker.request("POST", "/api/sessions/a/progress", b'{"progress": 1}')
        await watcher.watch("a")
        assert (await watcher.event()).event == "progress"
        for name, control in (("pause", "pause"), ("resume", "continue"), ("cancel", "cancel")):
            assert (await post(server.port, f"/api/sessions/a/{name}", b"")).json["control"] == control
            assert json.loads((await watcher.event()).data) == {"control": control}
            response = await worker.request("POST", "/api/sessions/a/events", b'{"type": "x"}')
            assert response.json["control"] == control
            assert (await watcher.event()).event == "x"
        assert (await post(server.port, "/api/sessions/a/resume", b"")).error["code"] == "conflict"


# Publishing


@both_doors
async def test_the_same_idempotency_key_gets_the_same_answer(server, behind):
    """No second event, whichever of the two doors; another body under the same key is refused."""
    async with talk(server) as first, talk(server, behind) as again:
        for path, body, other in (
            ("progress", b'{"progress": 1}', b'{"progress": 2}'),
            ("events", b'{"type": "x"}', b'{"type": "y"}'),
        ):
            ask = "POST", f"/api/sessions/a/{path}"
            answers = [await c.request(*ask, body, [("Idempotency-Key", "k")]) for c in (first, again, first)]
            assert [a.status for a in answers] == [202] * 3
            assert len({a.json["id"] for a in answers}) == 1
            assert (await again.request(*ask, other, [("Idempotency-Key", "k")])).status == 422
        async with talk(server, behind) as other:
            headers = [("Idempotency-Key", "x" * 256)]
            assert (
                await other.request("POST", "/api/sessions/a/events", b'{"type": "x"}', headers)
            ).status == 422
    assert (await server.tracker.get("a")).seq == 2


@both_doors
async def test_a_batch_stops_at_its_first_bad_line(server, behind):
    """The answer names the line and how many before it stand; empty lines count as lines alone."""
    lines = [b'{"progress": 5}', b"", b'{"type": "x", "data": 1}', b'{"progress": 4}', b'{"progress": 9}']
    async with talk(server, behind) as connection:
        response = await connection.request(
            "POST", "/api/sessions/a/events", b"\n".join(lines), content_type=NDJSON
        )
    assert (response.status, response.error["code"]) == (422, "invalid_progress")
    assert (response.error["line"], response.error["applied"]) == (4, 2)
    assert (await server.tracker.get("a")).seq == 2


@both_doors
@pytest.mark.parametrize(
    ("last", "status", "line"),
    [
        (b"{", 400, 2),
        (b'{"type": "progress"}', 422, 2),
        (b"x" * 3000, 413, 2),
        (b"\xff", 400, 2),
        (b"[]", 422, 2),
    ],
)
async def test_every_kind_of_bad_line_is_named(behind, last, status, line):
    """Broken JSON, a reserved type, one that is too long, no UTF-8, no object."""
    async with serve(port=0, drain=0.5, max_body=2000) as server, talk(server, behind) as connection:
        body = b'{"type": "x"}\n' + last
        response = await connection.request("POST", "/api/sessions/a/events", body, content_type=NDJSON)
        assert (response.status, response.error["line"], response.error["applied"]) == (status, line, 1)
        assert (await server.tracker.get("a")).seq == 1


@both_doors
async def test_an_empty_batch_is_refused(server, behind):
    """Nothing but empty lines is nobody's intention."""
    async with talk(server, behind) as connection:
        response = await connection.request("POST", "/api/sessions/a/events", b"\n \n", content_type=NDJSON)
        assert (response.status, response.error["code"]) == (422, "invalid")


@both_doors
async def test_a_line_counts_when_it_arrives(server, behind):
    """A batch is a stream: its watchers see each line long before its end, which gets the answer."""
    await server.tracker.create("a")
    headers = [("Content-Type", NDJSON), ("Transfer-Encoding", "chunked")]
    async with talk(server, behind) as publisher, talk(server) as watcher:
        await watcher.watch("a")
        assert (await watcher.event()).event == "progress"
        await publisher.send(request_bytes("POST", "/api/sessions/a/events", b"", headers))
        for number in range(5):
            await publisher.send(chunk(b'{"type": "x", "data": %d}\n' % number))
            assert (await watcher.event()).data == str(number)
            assert publisher.buffer == b""
        await publisher.send(chunk(b""))
        response = await publisher.read_response()
        assert (response.status, response.json["applied"]) == (202, 5)


@both_doors
@pytest.mark.parametrize("target", ["/api/sessions/a/progress", "/api/sessions/a/events", "/api/sessions"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_big_is_refused(behind, target, chunked):
    """413, and the rest is read away: a reset would overtake the answer on a longer way than this one."""
    body = b"x" * 1_000_000
    headers = [("Transfer-Encoding", "chunked")] if chunked else []
    sent = request_bytes("POST", target, chunk(body) if chunked else body, headers)
    async with serve(port=0, drain=0.5, max_body=1000) as server, talk(server, behind) as connection:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.send, sent)
            response = await connection.read_response()
        assert (response.status, response.error["code"]) == (413, "payload_too_large")
        assert await connection.read_to_end() == b""
        assert connection.ended == "eof"
        assert await server.tracker.sessions() == []


@both_doors
async def test_a_media_type_that_is_not_read_is_refused(server, behind):
    """415; what curl says by itself is taken for JSON."""
    for kind, status in (("application/xml", 415), ("application/json; charset=utf-8", 202)):
        async with talk(server, behind) as connection:
            response = await connection.request("POST", "/api/sessions/a/progress", b"{}", content_type=kind)
            assert response.status == status
        async with talk(server, behind) as connection:
            response = await connection.request(
                "POST", "/api/sessions/a/events", b'{"type": "x"}', content_type=kind
            )
            assert response.status == status


async def test_publishing_creates_no_session_if_that_is_off():
    """With ``auto_create`` off it is 404, whatever the body."""
    async with serve(port=0, drain=0.5, auto_create=False) as server:
        for path in ("progress", "events"):
            assert (await post(server.port, f"/api/sessions/a/{path}", b"{")).error[
                "code"
            ] == "session_not_found"
        await post(server.port, "/api/sessions", {"session_id": "a"})
        assert (await post(server.port, "/api/sessions/a/progress", {"progress": 1})).status == 202


async def test_sessions_have_their_limit():
    """One more than ``max_sessions`` is 503, and those that exist go on."""
    async with serve(port=0, drain=0.5, max_sessions=2) as server:
        for name, status in (("a", 202), ("b", 202), ("c", 503), ("b", 202)):
            assert (await post(server.port, f"/api/sessions/{name}/progress", {})).status == status
        assert (await post(server.port, "/api/sessions", {})).error["code"] == "unavailable"


# Watching


class Poll:
    """A watcher by long-poll that looks like the others."""

    def __init__(self, connection, cursor):
        self.connection, self.cursor, self.end = connection, cursor, False

    async def batch(self, wait=30):
        target = f"/api/sessions/a/events?wait={wait}" + (f"&after={self.cursor}" if self.cursor else "")
        response = await self.connection.request("GET", target)
        assert response.status == 200, response
        self.cursor, self.end = response.json["next"], response.json["end"]
        resume = [] if response.json["resume"] is None else [("resume", response.json["resume"])]
        return resume + [(e["event"], e["data"]) for e in response.json["events"]]


async def watched(server, transport, cursor=None, *, behind=False, count=None):
    """Watch session "a" to its end, or the first ``count`` messages: a list of (id, event, data)."""
    found = []
    async with talk(server, behind) as connection:
        if transport == "sse":
            response = await connection.watch("a", cursor)
            if response.status == 204:
                return found
            assert response.status == 200
            while len(found) != count and (event := await connection.event()) is not None:
                found.append((event.id, event.event, json.loads(event.data)))
        elif transport == "ws":
            socket = await RawWebSocket.open(connection, "a", cursor)
            while len(found) != count and isinstance(message := await socket.message(), dict):
                found.append((message["id"], message["event"], message["data"]))
            if len(found) != count:
                assert message[0] == 1000
        else:
            while len(found) != count:
                limit = 1000 if count is None else count - len(found) - bool(cursor and not found)
                target = f"/api/sessions/a/events?wait=30&limit={limit}" + (
                    f"&after={cursor}" if cursor else ""
                )
                page = (await connection.request("GET", target)).json
                if cursor and not found:
                    found.append((None, "resume", page["resume"]))
                found += [(e["id"], e["event"], e["data"]) for e in page["events"]]
                cursor = page["next"]
                if page["end"]:
                    break
    return found


every_transport = pytest.mark.parametrize("transport", ["sse", "ws", "poll"])


@both_doors
@every_transport
async def test_a_terminal_late_comer_gets_the_end_at_once(server, transport, behind):
    """Who comes when all is over learns how it ended, and the connection ends."""
    await server.tracker.update("a", progress=10)
    await server.tracker.update("a", status="failed", error="no paper")
    found = await watched(server, transport, behind=behind)
    assert found[-1][1] == "error"
    assert (found[-1][2]["error"], found[-1][2]["state"]) == ("no paper", "failed")
    assert len(found) == (2 if transport == "poll" else 1)  # the history begins where the log does


@both_doors
@every_transport
async def test_who_has_seen_the_end_is_told_so(server, transport, behind):
    """204 stops an EventSource; a WebSocket closes with 1000; a poll says that it is the end."""
    await server.tracker.update("a", progress=10)
    end = (await server.tracker.update("a", status="done")).id
    found = await watched(server, transport, end, behind=behind)
    assert [event for _, event, _ in found] == ([] if transport == "sse" else ["resume"])


@both_doors
@every_transport
async def test_what_was_missed_is_made_up_for(server, transport, behind):
    """With a cursor: a verdict, then exactly what came after it, then the rest as it comes."""
    cursors = [(await server.tracker.emit("a", "x", n)).id for n in range(300)]
    async with trio.open_nursery() as nursery:

        async def finish():
            if transport != "poll":
                await settled(server, watchers=1)
            await server.tracker.emit("a", "x", 300)
            await server.tracker.update("a", status="done")

        nursery.start_soon(finish)
        found = await watched(server, transport, cursors[9], behind=behind)
    assert found[0][1:] == ("resume", {"status": "ok", "missed": 0})
    assert places(cursor for cursor, _, _ in found[1:]) == list(range(11, 303))
    assert [data for _, event, data in found if event == "x"] == list(range(10, 301))
    assert found[-1][1] == "complete"


@both_doors
@every_transport
@pytest.mark.parametrize(
    ("cursor", "verdict"),
    [
        ("{epoch}-1", {"status": "gap", "missed": 29}),
        ("0000-7", {"status": "reset", "missed": 30}),
        ("mine", None),
    ],
    ids=["gap", "reset", "not ours"],
)
async def test_a_cursor_that_leads_nowhere_is_answered_in_band(transport, cursor, verdict, behind):
    """The log no longer reaches back, or is another one: say so, then the snapshot, then go on."""
    async with serve(port=0, drain=0.5, history_events=10) as server:
        for number in range(29):
            await server.tracker.emit("a", "x", number)
        last = (await server.tracker.update("a", progress=50)).id
        cursor = cursor.format(epoch=last.split("-")[0])
        found = await watched(server, transport, cursor, behind=behind, count=2)
    assert found[0][1] == "resume"
    assert found[0][2] == (verdict or {"status": "reset", "missed": 30})
    assert (found[1][0], found[1][1], found[1][2]["progress"]) == (last, "progress", 50)


async def test_a_client_that_changes_transport_mid_job_ends_with_exactly_the_log(server):
    """SSE, then WebSocket, then long-poll, through either door, while the job goes on."""
    plan = [("sse", False), ("ws", False), ("poll", False), ("sse", True), ("ws", True), ("poll", True)]
    found = []
    async with trio.open_nursery() as nursery:

        async def work():
            for number in range(1, 375):
                # Half of each part is there already, the other half comes while it is watched.
                while number > len(found) + (50 if server.app.broker.statistics().topics else 25):
                    await trio.lowlevel.checkpoint()
                if number % 3:
                    await server.tracker.update("a", progress=number / 10)
                else:
                    await server.tracker.emit("a", "x", number)
            await server.tracker.update("a", status="done")

        await server.tracker.emit("a", "x", 0)
        start = cursor = (await get(server.port, "/api/sessions/a/events")).json["next"]
        nursery.start_soon(work)
        for transport, behind in plan:
            part = await watched(server, transport, cursor, behind=behind, count=51)
            assert part.pop(0)[1:] == ("resume", {"status": "ok", "missed": 0})
            found += part
            cursor = part[-1][0]
        found += (await watched(server, "sse", cursor, count=51))[1:]
        found += (await watched(server, "sse", found[-1][0]))[1:]
    log = (await get(server.port, f"/api/sessions/a/events?after={start}")).json["events"]
    assert found == [(e["id"], e["event"], e["data"]) for e in log]
    assert places(cursor for cursor, _, _ in found) == list(range(2, 377))


@both_doors
async def test_all_transports_see_the_same(server, behind):
    """The same events with the same cursors and data over all three, whatever the data."""
    values = [EVIL, {"a": EVIL}, None, [], 0.1, 2**60, "", {"": {}}, "x" * 70_000]
    await server.tracker.create("a")
    results = {}
    async with trio.open_nursery() as nursery:

        async def watch(transport, behind):
            results[transport, behind] = await watched(server, transport, behind=behind)

        nursery.start_soon(watch, "sse", False)
        nursery.start_soon(watch, "sse", True)
        nursery.start_soon(watch, "ws", False)
        nursery.start_soon(watch, "ws", True)
        await settled(server, watchers=4)
        bodies = [json.dumps({"type": "x", "data": v}, indent=1).encode() for v in values]
        bodies += [json.dumps({"type": "x", "data": EVIL}, ensure_ascii=False).encode()]
        async with talk(server, behind) as publisher:
            for body in bodies:
                response = await publisher.request("POST", "/api/sessions/a/events", body)
                assert response.status == 202, (body[:100], response.body)
            body = json.dumps({"message": EVIL, "data": {"a": [EVIL]}}, indent=1, ensure_ascii=False).encode()
            assert (await publisher.request("POST", "/api/sessions/a/progress", body)).status == 202
            assert (
                await publisher.request("POST", "/api/sessions/a/progress", b'{"status": "done"}')
            ).status == 202
    results["poll", False] = await watched(server, "poll")
    results["poll", True] = await watched(server, "poll", behind=True)
    wanted = results["poll", False]
    for found in results.values():
        assert found == wanted
    assert [data for _, event, data in wanted if event == "x"] == [*values, EVIL]
    assert wanted[-2][2]["data"] == {"a": [EVIL]}
    assert wanted[-2][2]["message"] == EVIL


@both_doors
async def test_the_head_of_a_stream(server, behind):
    """What proxies must know, and no length."""
    await server.tracker.update("a", progress=1)
    async with talk(server, behind) as connection:
        headers = (await connection.watch("a")).headers
    assert headers.pop("x-request-id")
    assert parsedate_to_datetime(headers.pop("date")).tzinfo is not None
    assert headers == {
        "content-type": "text/event-stream",
        "cache-control": "no-cache, no-transform",
        "x-accel-buffering": "no",
        "connection": "close",
    }
    async with talk(server, behind) as connection:
        response = await connection.request("HEAD", "/api/sessions/a/status/stream")
        assert (response.status, response.headers["content-type"]) == (200, "text/event-stream")
        # A HEAD is no stream: the connection is good for more.
        assert (await connection.request("GET", "/health")).json["streams"] == 0


@both_doors
async def test_the_cursor_of_the_query_is_as_good_as_the_header(server, behind):
    """For those who cannot send headers; the header, which is newer, is the stronger."""
    one, two, _ = [(await server.tracker.emit("a", "x", n)).id for n in range(3)]
    await server.tracker.update("a", status="done")
    for headers, first in (((), one), ([("Last-Event-ID", two)], two)):
        async with talk(server, behind) as connection:
            target = f"/api/sessions/a/status/stream?last_event_id={one}"
            await connection.send(request_bytes("GET", target, headers=headers))
            await connection.read_head()
            events = await connection.events()
            assert places(e.id for e in events[1:]) == list(range(int(first[-1]) + 1, 5))


@both_doors
async def test_streams_ask_for_a_reconnection_time_if_one_is_set(behind):
    """``retry_ms`` comes before everything else."""
    async with serve(port=0, drain=0.5, retry_ms=1234) as server:
        await server.tracker.update("a", status="done")
        async with talk(server, behind) as connection:
            await connection.watch("a")
            await connection.events()
            assert connection.raw.startswith(b"retry: 1234\nid: ")
            assert connection.decoder.retry == 1234


async def test_a_publisher_may_ask_for_a_reconnection_time(server):
    """An event's own ``retry`` reaches all transports."""
    await server.tracker.emit("a", "x", 1)
    cursor = (await server.tracker.get("a")).cursor
    await post(server.port, "/api/sessions/a/events", {"type": "x", "data": 2, "retry": 77})
    async with talk(server) as connection:
        await connection.watch("a", str(cursor))
        await connection.event()
        assert (await connection.event()).retry == 77
    async with talk(server) as connection:
        socket = await RawWebSocket.open(connection, "a", str(cursor))
        await socket.message()
        assert (await socket.message())["retry"] == 77


@both_doors
async def test_watchers_of_a_deleted_session_are_told(server, behind):
    """Over each transport, at once; a session of the same name that begins now is another one."""
    await server.tracker.update("a", progress=1)
    ended = []
    async with trio.open_nursery() as nursery:

        async def stream():
            async with talk(server, behind) as connection:
                await connection.watch("a")
                ended.append([e.event for e in await connection.events()])

        async def socket():
            async with talk(server, behind) as connection:
                messages, close = await (await RawWebSocket.open(connection, "a")).messages()
                ended.append([m["event"] for m in messages])
                assert close[0] == 1000

        async def poll(target):
            async with talk(server, behind) as connection:
                ended.append((await connection.request("GET", target)).error["code"])

        nursery.start_soon(stream)
        nursery.start_soon(socket)
        nursery.start_soon(poll, "/api/sessions/a/status?wait=60")
        cursor = (await server.tracker.get("a")).cursor
        nursery.start_soon(poll, f"/api/sessions/a/events?wait=60&after={cursor}")
        await settled(server, watchers=2)
        while len(server.app.broker._topics["a"].waiters) < 2:
            await trio.lowlevel.checkpoint()
        async with talk(server, behind) as connection:
            assert (await connection.request("DELETE", "/api/sessions/a")).status == 204
            await connection.request("POST", "/api/sessions/a/progress", b'{"progress": 2}')
    assert ended.count(["progress", "deleted"]) == 2
    assert ended.count("session_not_found") == 2
    assert (await get(server.port, "/api/sessions/a/status")).json["progress"] == 2


# Status and long-poll


async def test_the_status_is_conditional(server):
    """The ETag is the cursor; 304 until there is something newer."""
    cursor = (await server.tracker.update("a", progress=5)).id
    async with talk(server) as connection:
        first = await connection.request("GET", "/api/sessions/a/status")
        assert (first.headers["etag"], first.json["id"]) == (f'"{cursor}"', cursor)
        for tag in (f'"{cursor}"', f'W/"{cursor}"', f'"x", "{cursor}"', "*"):
            response = await connection.request(
                "GET", "/api/sessions/a/status", headers=[("If-None-Match", tag)]
            )
            assert (response.status, response.headers["etag"]) == (304, f'"{cursor}"')
        await server.tracker.update("a", progress=6)
        response = await connection.request(
            "GET", "/api/sessions/a/status", headers=[("If-None-Match", f'"{cursor}"')]
        )
        assert (response.status, response.json["progress"]) == (200, 6)


@pytest.mark.parametrize(
    "target", ["/api/sessions/a/status?wait=60", "/api/sessions/a/events?wait=60&after={}"]
)
async def test_a_publish_answers_those_who_wait(server, target):
    """All of them, at once, with what was published."""
    cursor = (await server.tracker.update("a", progress=5)).id
    responses = []
    async with trio.open_nursery() as nursery:

        async def poll(headers):
            async with talk(server) as connection:
                responses.append(await connection.request("GET", target.format(cursor), headers=headers))

        for _ in range(5):
            nursery.start_soon(poll, ())
            nursery.start_soon(poll, [("If-None-Match", f'"{cursor}"')])
        while "a" not in server.app.broker._topics or len(server.app.broker._topics["a"].waiters) < 10:
            await trio.lowlevel.checkpoint()
        await post(server.port, "/api/sessions/a/progress", {"progress": 7})
    assert [r.status for r in responses] == [200] * 10
    for response in responses:
        body = response.json if "status?" in target else response.json["events"][0]["data"]
        assert body["progress"] == 7
    # Who waits for nothing holds nothing.
    assert server.app.broker.statistics().topics == 0


async def test_a_poll_that_is_over_says_where_to_go_on(server):
    """Without anything new: an empty page with the same cursor, and no end."""
    cursor = (await server.tracker.update("a", progress=5)).id
    page = (await get(server.port, f"/api/sessions/a/events?after={cursor}&wait=0.01")).json
    assert (page["events"], page["next"], page["end"]) == ([], cursor, False)
    response = await get(server.port, "/api/sessions/a/status?wait=0.01", [("If-None-Match", f'"{cursor}"')])
    assert response.status == 304


async def test_history_comes_in_pages(server):
    """Each page begins where the one before ended, and the last one says so."""
    for number in range(25):
        await server.tracker.emit("a", "x", number)
    await server.tracker.update("a", status="done")
    found, cursor, ends = [], "", []
    while not ends or not ends[-1]:
        page = (await get(server.port, f"/api/sessions/a/events?limit=10&after={cursor}")).json
        found += [e["id"] for e in page["events"]]
        cursor = page["next"]
        ends.append(page["end"])
    assert places(found) == list(range(1, 27))
    assert ends == [False, False, True]


# Browsers of other origins


@both_doors
@pytest.mark.parametrize(
    ("origins", "origin", "allowed", "credentials"),
    [
        ((), "http://a.example", None, None),
        (("http://a.example",), "http://a.example", "http://a.example", "true"),
        (("http://a.example",), "http://b.example", None, None),
        (("http://a.example",), "http://a.example.evil", None, None),
        (("http://a.example",), "null", None, None),
        (("*",), "http://b.example", "*", None),
        (("*", "http://a.example"), "http://a.example", "http://a.example", "true"),
        (("*", "http://a.example"), "http://b.example", "*", None),
        (("http://a.example",), None, None, None),
    ],
)
async def test_only_listed_origins_may_read(origins, origin, allowed, credentials, behind):
    """An allow-list; ``*`` never with credentials; on answers, errors, streams and preflights alike."""
    async with serve(port=0, drain=0.5, cors_origins=origins) as server:
        await server.tracker.update("a", status="done")
        headers = [] if origin is None else [("Origin", origin)]
        for method, target, body in (
            ("GET", "/api/sessions/a/status/stream", None),
            ("GET", "/api/sessions/none/status/stream", None),
            ("POST", "/api/sessions/b/progress", b"{}"),
            ("POST", "/api/sessions/a/progress", b"{}"),
            ("GET", "/api/sessions/a/status", None),
            ("GET", "/api/sessions/none/status", None),
            ("GET", "/none", None),
            ("OPTIONS", "/api/sessions/a/progress", None),
        ):
            async with talk(server, behind) as connection:
                response = await connection.request(method, target, body, headers)
            assert response.headers.get("access-control-allow-origin") == allowed, target
            assert response.headers.get("access-control-allow-credentials") == credentials, target
            if allowed is not None:
                assert "X-Request-ID" in response.headers["access-control-expose-headers"]
            if allowed != "*" and origins and origin is not None:
                assert response.headers["vary"] == "Origin"


async def test_a_preflight_names_what_may_be_sent(server):
    """The methods of the path and our headers; nothing for those who are not listed."""
    asked = [("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "idempotency-key")]
    async with serve(port=0, drain=0.5, cors_origins=("http://a.example",)) as other:
        for port, names in ((server.port, False), (other.port, True)):
            connection = await connect(port)
            async with connection.stream:
                response = await connection.request(
                    "OPTIONS", "/api/sessions/a/events", headers=[("Origin", "http://a.example"), *asked]
                )
            assert response.status == 200
            assert ("access-control-allow-methods" in response.headers) == names
            if names:
                assert response.headers["access-control-allow-methods"] == "GET, POST"
                allowed = response.headers["access-control-allow-headers"].lower().split(", ")
                assert {"idempotency-key", "last-event-id", "content-type", "authorization"} <= set(allowed)


# WebSocket behind Hypercorn


async def test_a_socket_behind_hypercorn_keeps_the_same_rules(server):
    """Pings are answered, talk is ignored, too much talk is 1009, a close is answered."""
    await server.tracker.update("a", progress=1)
    async with talk(server, behind=True) as connection:
        socket = await RawWebSocket.open(connection, "a")
        assert (await socket.message())["event"] == "progress"
        await socket.send(1, b"hello")
        await socket.send(9, b"ping")
        assert await socket.frame() == (10, b"ping")
        await server.tracker.emit("a", "x")
        assert (await socket.message())["event"] == "x"
        await socket.send(8, b"\x03\xe8")
        assert (await socket.frame())[0] == 8
        assert await connection.read_to_end() == b""
    async with talk(server, behind=True) as connection:
        socket = await RawWebSocket.open(connection, "a")
        await socket.message()
        await socket.send(1, b"x" * 10_000)
        opcode, payload = await socket.frame()
        assert (opcode, int.from_bytes(payload[:2], "big")) == (8, 1009)
    await settled(server, watchers=0)


async def test_a_refused_socket_behind_hypercorn_is_told_why(server):
    """404 in the one shape, with the request's id."""
    async with talk(server, behind=True) as connection:
        from raw_client import HANDSHAKE

        headers = [*HANDSHAKE, ("X-Request-ID", "mine")]
        response = await connection.request("GET", "/api/sessions/none/status/ws", headers=headers)
        assert (response.status, response.json["error"]["code"]) == (404, "session_not_found")
        assert response.json["error"]["request_id"] == "mine"


# Hostile peers


@pytest.mark.parametrize(
    "request_",
    [
        request_bytes("POST", "/api/sessions/a/progress", b'{"progress": 7}'),
        request_bytes("GET", "/api/sessions/a/status"),
        request_bytes("GET", "/api/sessions/a/status/stream"),
        request_bytes(
            "GET",
            "/api/sessions/a/status/ws",
            headers=[
                ("Upgrade", "websocket"),
                ("Connection", "Upgrade"),
                ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
                ("Sec-WebSocket-Version", "13"),
            ],
        ),
    ],
    ids=["publish", "web", "sse", "ws"],
)
async def test_resets_at_every_byte_leave_the_server_as_it_was(server, caplog, request_):
    """A RST inside the request, behind it and inside the answer: others go on, the log stays sane."""
    await server.tracker.update("a", progress=1)
    async with talk(server) as witness:
        await witness.watch("a")
        await witness.event()
        for at in range(0, len(request_), 2):
            peer = await connect(server.port)
            await peer.send(request_[:at])
            reset(peer)
        for size in (0, 1, 40, 200):
            peer = await connect(server.port)
            await peer.send(request_)
            if size:
                await peer.stream.receive_some(size)
            await server.tracker.emit("a", "x", "y" * 1000)
            reset(peer)
            await server.tracker.emit("a", "x", "y" * 1000)
        await settled(server, watchers=1)
        while server.app.counters.connections > 1:
            await trio.lowlevel.checkpoint()
        received = 0
        while received < 8:
            received += (await witness.event()).event == "x"
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


async def test_fifty_readers_that_stall_delay_nobody(caplog):
    """Each costs its bound and is cut with a reason; fifty good ones beside them get everything."""
    events, size = 60, 20_000
    async with serve(port=0, drain=0.5, buffer_bytes=50_000, buffer_events=100) as server:
        await server.tracker.update("a", progress=1)
        stalled = [await connect(server.port, receive_buffer=4096) for _ in range(50)]
        good = [await connect(server.port) for _ in range(50)]
        for connection in stalled + good:
            await connection.watch("a")
        await settled(server, watchers=100)
        most = 0
        received = []

        async def read(connection):
            assert (await connection.event()).event == "progress"
            numbers = [json.loads((await connection.event()).data)[0] for _ in range(events)]
            received.append(numbers)

        async with trio.open_nursery() as nursery:
            for connection in good:
                nursery.start_soon(read, connection)
            for number in range(events):
                await server.tracker.emit("a", "x", [number, "y" * size])
                waiting = [s.backlog[1] for s in server.app.broker.subscribers()]
                most = max(most, *waiting)
                await trio.lowlevel.checkpoint()
        assert received == [list(range(events))] * 50
        assert most <= 50_000
        await settled(server, watchers=50)
        assert server.app.broker.statistics().cut == 50
        # One that reads again learns why, and where to go on.
        found = await stalled[0].events()
        assert found[-1].event == "overflow"
        cursor = found[-1].id
        numbers = [json.loads(e.data)[0] for e in found if e.event == "x"]
        async with talk(server) as connection:
            await connection.watch("a", cursor)
            assert json.loads((await connection.event()).data)["status"] == "ok"
            numbers += [json.loads((await connection.event()).data)[0] for _ in range(len(numbers), events)]
        assert numbers == list(range(events))
        for connection in stalled + good:
            await connection.stream.aclose()
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


async def test_the_house_has_a_limit():
    """One too many gets 503 and is not waited for; when somebody leaves there is room again."""
    async with serve(port=0, drain=0.5, max_connections=3) as server:
        guests = [await connect(server.port) for _ in range(3)]
        for guest in guests:
            assert (await guest.request("GET", "/health")).json["connections"] <= 3
        for _ in range(5):
            extra = await connect(server.port)
            async with extra.stream:
                response = await extra.read_response()
                assert (response.status, response.error["code"]) == (503, "unavailable")
                assert int(response.headers["retry-after"]) > 0
        text = (await guests[0].request("GET", "/metrics")).body.decode()
        assert "sseserve_refused_total 5.0" in text
        await guests[1].stream.aclose()
        while server.app.counters.connections == 3:
            await trio.lowlevel.checkpoint()
        assert (await get(server.port, "/health")).status == 200
        for guest in guests:
            await guest.stream.aclose()


class Door:
    """A listener that gives what it is told to: errors, or streams."""

    def __init__(self, *gifts):
        self.gifts = list(gifts)
        self.closed = False

    async def accept(self):
        await trio.lowlevel.checkpoint()
        if not self.gifts:
            await trio.sleep_forever()
        gift = self.gifts.pop(0)
        if isinstance(gift, OSError):
            raise gift
        return gift

    async def aclose(self):
        self.closed = True


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_running_out_of_files_passes(autojump_clock, nursery, caplog, number):
    """Accepting is tried again after a moment, as often as it takes, and the log says why."""
    app = Application(load(environ={}), nursery)
    client, stream = memory_stream_pair()
    door = Door(*(OSError(number, "no more") for _ in range(20)), stream)
    listener = app.listen([door])
    await nursery.start(listener.run)
    assert (await RawConnection(client).request("GET", "/health")).status == 200
    assert caplog.text.count("cannot accept") == 20
    listener.stop()
    await wait_all_tasks_blocked()
    assert door.closed


# What publishers must not be able to do


@pytest.mark.parametrize(
    ("target", "body"),
    [
        ("/api/sessions/a/events", b'{"type": "x", "data": "\xff"}'),
        ("/api/sessions/a/progress", b'{"progress": 2, "data": "\xff"}'),
        ("/api/sessions", b'{"session_id": "b", "data": "\xff"}'),
        ("/api/sessions/a/events", b'{"type": "x", "data": "\\ud83d"}'),
        ("/api/sessions/a/progress", b'{"message": "\\ud83d"}'),
    ],
)
async def test_json_that_is_no_unicode_is_refused(server, target, body):
    """Neither bytes that are no UTF-8 nor half a surrogate pair get into a log, for clients stop there."""
    await server.tracker.update("a", progress=1)
    response = await post(server.port, target, body)
    assert (response.status, response.error["code"]) == (400, "bad_request")
    assert [s.seq for s in await server.tracker.sessions()] == [1]


async def test_a_fan_out_that_fails_costs_only_its_watchers(server, monkeypatch, caplog):
    """If an event cannot be encoded, its watchers are cut and told; other sessions go on."""
    await server.tracker.update("bad", progress=1)
    await server.tracker.update("good", progress=1)
    bad, good = await connect(server.port), await connect(server.port)
    async with bad.stream, good.stream:
        for connection, session_id in ((bad, "bad"), (good, "good")):
            await connection.watch(session_id)
            assert (await connection.event()).event == "progress"
        (subscriber,) = [s for s in server.app.broker.subscribers() if s.topic.session_id == "bad"]
        encoding = type(subscriber.encoding)
        honest = encoding.event

        def event(self, session_id, epoch, event):
            if session_id == "bad":
                raise RuntimeError("a bug")
            return honest(self, session_id, epoch, event)

        monkeypatch.setattr(encoding, "event", event)
        await server.tracker.update("bad", progress=2)
        await server.tracker.update("good", progress=2)
        assert [e.event for e in await bad.events()] == ["overflow"]
        assert (await good.event()).event == "progress"
    assert "fan-out of session bad failed" in caplog.text


@both_doors
async def test_a_path_cannot_write_lines_of_the_log(server, caplog, behind):
    """What a client asks for is noted on one line, whatever it holds."""
    caplog.set_level("DEBUG", "sseserve")
    async with talk(server, behind) as connection:
        for target in ("/none%0aERROR%20forged", "/api/sessions/a%0d%0aERROR/status/stream"):
            if (await connection.request("GET", target)).headers.get("connection") == "close":
                break
    assert [r.getMessage() for r in caplog.records if "\n" in r.getMessage() or "\r" in r.getMessage()] == []
