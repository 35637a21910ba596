"""The server over loopback sockets: every route, all transports, limits and hostile clients."""

from __future__ import annotations

import errno
import json
import re
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime

import pytest
import trio
from harness import logged
from raw_client import (
    HANDSHAKE,
    RawConnection,
    RawWebSocket,
    chunk,
    connect,
    frame,
    get,
    post,
    request_bytes,
    reset,
)
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from sseserve.config import load
from sseserve.dialects.sessions import SESSIONS
from sseserve.http.auth import Action
from sseserve.http.routes import ROUTES
from sseserve.http.routing import Kind
from sseserve.server import serve
from sseserve.server.application import Application

new_and_reused_connection = pytest.mark.parametrize(
    "reused", [False, True], ids=["new connection", "reused connection"]
)
NDJSON = "application/x-ndjson"
SPECIAL_TEXT = 'one\ntwo\r\nthree\rfour\u2028five\u2029six\x85seven\x0beight\x1cnine\0ten \U0001f600 "\\'


@pytest.fixture
async def server():
    async with serve(port=0, drain=0.5) as server:
        yield server


@asynccontextmanager
async def open_connection(server, reused=False, **options):
    """Connect; a ``reused`` connection has already served a request."""
    connection = await connect(server.port, **options)
    async with connection.stream:
        if reused:
            assert (await connection.request("GET", "/health")).status == 200
        yield connection


async def wait_for_watchers(server, count):
    """Wait until ``count`` clients watch."""
    while len(server.app.broker.subscribers()) != count:
        await trio.lowlevel.checkpoint()


def sequence_numbers(cursors):
    return [int(cursor.split("-")[1]) for cursor in cursors]


# Every route, with its status codes


REQUESTS = [
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
    ("GET", "/api/sessions/run/watchers", None, 200, None),
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
    ("HEAD", "/api/streams/sessions", None, 200, None),  # a GET has no end
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
    # Delete
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
    # Percent-encoding
    ("POST", "/api/sessions/%ff/progress", b"{}", 404, "not_found"),
    ("GET", "/api/sessions/%fe/status", None, 404, "not_found"),
    ("GET", "/api/interaction/events/%c3", None, 404, "not_found"),
    ("GET", "/api/sessions/%72un/status", None, 200, None),
    ("GET", "/api/sessions/run%2Fstatus", None, 405, "method_not_allowed"),  # the session "run/status"
    ("POST", "/api/sessions/run%2Fa/progress", b"{}", 422, "invalid"),
    ("GET", "/api/streams?session=%ff", None, 422, "invalid"),
    ("GET", "/api/sessions?state=%ff", None, 422, "invalid"),
    # Unusual targets
    ("GET", "?", None, 400, "bad_request"),
    ("GET", "?x=%ff", None, 400, "bad_request"),
    ("GET", "*", None, 400, "bad_request"),
    ("GET", "health", None, 400, "bad_request"),
    ("GET", "//", None, 404, "not_found"),
    ("GET", "/api//sessions", None, 404, "not_found"),
    # Unknown paths and methods
    ("GET", "/nothing", None, 404, "not_found"),
    ("GET", "/health/", None, 404, "not_found"),
    ("DELETE", "/health", None, 405, "method_not_allowed"),
    ("GET", "/api/sessions/run/progress", None, 405, "method_not_allowed"),
    ("POST", "/api/sessions/run/status/stream", b"{}", 405, "method_not_allowed"),
    ("PUT", "/api/sessions/run", b"{}", 405, "method_not_allowed"),
]


@new_and_reused_connection
@pytest.mark.parametrize(("method", "target", "body", "status", "code"), REQUESTS)
async def test_status_codes(server, method, target, body, status, code, reused):
    """Each request gets its status and error code, as the first and as a later request of a connection."""
    await server.tracker.update("run", progress=50)
    await server.tracker.update("over", status="done")
    before = {s.id: s.seq for s in await server.tracker.sessions()}
    async with open_connection(server, reused) as connection:
        response = await connection.request(method, target, body, [("X-Request-ID", "chosen")])
    assert response.status == status, response
    assert response.headers["x-request-id"] == "chosen"
    if code is not None:
        assert response.error["code"] == code
        # A refused request changes nothing.
        assert {s.id: s.seq for s in await server.tracker.sessions()} == before
    assert parsedate_to_datetime(response.headers["date"]).tzinfo is not None
    # Nothing but the pages' own files may be stored (RFC 9111, section 5.2.2.5).
    is_stream = response.headers.get("content-type") == "text/event-stream"
    is_file = status == 200 and (target in ("/", "/dashboard") or target.startswith("/static/"))
    expected = "no-cache, no-transform" if is_stream else "no-cache" if is_file else "no-store"
    assert response.headers["cache-control"] == expected


@new_and_reused_connection
async def test_what_a_cache_must_not_keep(server, reused):
    """A 204 that a proxy kept would keep late watchers from the end; a 304 keeps its ETag."""
    cursor = (await server.tracker.update("a", status="done")).id
    for target, headers, status in (
        ("/api/sessions/a/status/stream", [("Last-Event-ID", cursor)], 204),
        ("/api/sessions/a/status", [("If-None-Match", f'"{cursor}"')], 304),
        ("/api/sessions/a/status/ws", [], 426),
        ("/api/sessions/none/status/ws", HANDSHAKE, 404),
        ("/api/sessions/none/status/stream", [], 404),
    ):
        async with open_connection(server, reused) as connection:
            response = await connection.request("GET", target, headers=headers)
        assert (response.status, response.headers["cache-control"]) == (status, "no-store")
        assert response.headers["date"]
        assert response.headers.get("etag") == (f'"{cursor}"' if status == 304 else None)


@new_and_reused_connection
@pytest.mark.parametrize(
    ("target", "methods"),
    [
        ("/health", "GET, HEAD, OPTIONS"),
        ("/api/sessions", "GET, HEAD, OPTIONS, POST"),
        ("/api/sessions/a%2Fstatus", "DELETE, OPTIONS"),  # one segment: not /api/sessions/{id}/status
        ("/api/sessions/%61/events?x=1", "GET, HEAD, OPTIONS, POST"),
        ("/api/sessions/a/cancel", "OPTIONS, POST"),
    ],
)
async def test_allow(server, target, methods, reused):
    """The methods of the path's routes, HEAD where there is GET (RFC 9110, sections 9.3.2 and 10.2.1)."""
    for method, status in (("PUT", 405), ("OPTIONS", 200)):
        async with open_connection(server, reused) as connection:
            response = await connection.request(method, target)
        assert (response.status, response.headers["allow"]) == (status, methods)


async def test_every_route_is_requested():
    """``REQUESTS`` leaves out no route of the sessions dialect."""
    requests = [
        (method.replace("HEAD", "GET"), target.partition("?")[0])
        for method, target, _, status, _ in REQUESTS
        if status < 500
    ]
    for route in (route for route in ROUTES if route.dialect is SESSIONS):
        pattern = re.sub(r"{\w+}", "[^/]+", route.path)
        assert any(m == route.method and re.fullmatch(pattern, t) for m, t in requests), route


@new_and_reused_connection
@pytest.mark.parametrize(
    ("sent", "kept"),
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
async def test_request_id_is_kept_or_generated(server, reused, sent, kept, method, target, body):
    """A valid request ID is returned unchanged; any other is replaced by a generated one."""
    await server.tracker.update("over", status="done")
    async with open_connection(server, reused) as connection:
        response = await connection.request(method, target, body, [("X-Request-ID", sent)])
    returned = response.headers["x-request-id"]
    assert (returned == sent) == kept
    assert re.fullmatch(r"[\x21-\x7e]{1,128}", returned)
    if response.status >= 400:
        assert response.error["request_id"] == returned


async def test_create_returns_working_links(server):
    """Each link in the response works, also for an ID that must be percent-encoded."""
    response = await post(
        server.port, "/api/sessions", {"session_id": "café&co", "title": "T", "owner": "me"}
    )
    body = response.json
    assert (body["session_id"], body["state"], body["progress"]) == ("café&co", "queued", 0)
    assert response.headers["location"] == body["links"]["status"]
    async with open_connection(server) as connection:
        for name in ("status", "events"):
            assert (await connection.request("GET", body["links"][name])).json["session_id"] == "café&co"
        assert (await connection.request("POST", body["links"]["progress"], b'{"progress": 1}')).status == 202
        for name in ("pause", "resume", "cancel"):
            assert (await connection.request("POST", body["links"][name])).status == 202
        socket = await RawWebSocket.open(connection, "caf%C3%A9&co")
        assert (await socket.message())["data"]["session_id"] == "café&co"
    assert (await get(server.port, body["links"]["stream"].replace("status/stream", "events"))).status == 200
    async with open_connection(server) as connection:
        assert (await connection.request("DELETE", body["links"]["self"])).status == 204
        assert (await connection.request("GET", body["links"]["status"])).status == 404


async def test_list_is_filtered(server):
    """The newest session is first; ``state`` and ``limit`` filter the list; the total ignores the limit."""
    for name, status in (("a", "running"), ("b", "done"), ("c", "failed"), ("d", "running")):
        await server.tracker.update(name, status=status)
    for query, ids in (("", "dcba"), ("?state=running", "da"), ("?state=succeeded", "b"), ("?limit=2", "dc")):
        response = await get(server.port, "/api/sessions" + query)
        assert [s["session_id"] for s in response.json["sessions"]] == list(ids)
        assert response.headers["x-total-count"] == str(4 if "limit" in query else len(ids))


async def test_openapi_lists_every_route(server):
    """``/openapi.json`` lists exactly the documented routes of the table."""
    paths = (await get(server.port, "/openapi.json")).json["paths"]
    assert {(path, method.upper()) for path in paths for method in paths[path]} == {
        (route.path, route.method) for route in ROUTES if route.documented
    }


async def test_health_and_metrics(server):
    """They count connections, streams, WebSockets, sessions, events and deliveries."""
    await server.tracker.update("a", progress=1)
    async with open_connection(server) as stream, open_connection(server) as other:
        await stream.watch("a")
        await RawWebSocket.open(other, "a")
        await wait_for_watchers(server, 2)
        await server.tracker.update("a", progress=2)
        assert [(await stream.event()).event for _ in range(2)] == ["progress"] * 2
        health = (await get(server.port, "/health")).json
        assert (health["streams"], health["sockets"], health["sessions"]) == (1, 1, 1)
        assert health["connections"] == 3
        text = (await get(server.port, "/metrics")).body.decode()
    for line in (
        'sseserve_streams{dialect="sessions",transport="sse"} 1.0',
        'sseserve_streams{dialect="sessions",transport="ws"} 1.0',
        "sseserve_events_total 2.0",
        "sseserve_deliveries_total 2.0",
    ):
        assert line in text.splitlines()


@new_and_reused_connection
async def test_control_reaches_worker_and_watchers(server, reused):
    """Pause, resume and cancel come in the response to the worker's next request, and as events."""
    async with open_connection(server, reused) as worker, open_connection(server) as watcher:
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


@new_and_reused_connection
async def test_same_idempotency_key_gets_the_same_response(server, reused):
    """A repeated request adds no event; another body under the same key gets 422."""
    async with open_connection(server) as first, open_connection(server, reused) as repeating:
        for path, body, other in (
            ("progress", b'{"progress": 1}', b'{"progress": 2}'),
            ("events", b'{"type": "x"}', b'{"type": "y"}'),
        ):
            method_and_path = "POST", f"/api/sessions/a/{path}"
            responses = [
                await c.request(*method_and_path, body, [("Idempotency-Key", "k")])
                for c in (first, repeating, first)
            ]
            assert [r.status for r in responses] == [202] * 3
            assert len({r.json["id"] for r in responses}) == 1
            assert (
                await repeating.request(*method_and_path, other, [("Idempotency-Key", "k")])
            ).status == 422
        async with open_connection(server, reused) as other:
            headers = [("Idempotency-Key", "x" * 256)]
            assert (
                await other.request("POST", "/api/sessions/a/events", b'{"type": "x"}', headers)
            ).status == 422
    assert (await server.tracker.get("a")).seq == 2


@new_and_reused_connection
async def test_batch_stops_at_its_first_invalid_line(server, reused):
    """The error has the line's number, counting empty lines, and how many lines were applied before it."""
    lines = [b'{"progress": 5}', b"", b'{"type": "x", "data": 1}', b'{"progress": 4}', b'{"progress": 9}']
    async with open_connection(server, reused) as connection:
        response = await connection.request(
            "POST", "/api/sessions/a/events", b"\n".join(lines), content_type=NDJSON
        )
    assert (response.status, response.error["code"]) == (422, "invalid_progress")
    assert (response.error["line"], response.error["applied"]) == (4, 2)
    assert (await server.tracker.get("a")).seq == 2


@new_and_reused_connection
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
async def test_invalid_batch_lines(reused, last, status, line):
    """Malformed JSON, a reserved type, a line that is too long, invalid UTF-8 and an array are refused."""
    async with (
        serve(port=0, drain=0.5, max_body=2000) as server,
        open_connection(server, reused) as connection,
    ):
        body = b'{"type": "x"}\n' + last
        response = await connection.request("POST", "/api/sessions/a/events", body, content_type=NDJSON)
        assert (response.status, response.error["line"], response.error["applied"]) == (status, line, 1)
        assert (await server.tracker.get("a")).seq == 1


@new_and_reused_connection
async def test_an_empty_batch_is_refused(server, reused):
    """A batch of nothing but empty lines gets 422."""
    async with open_connection(server, reused) as connection:
        response = await connection.request("POST", "/api/sessions/a/events", b"\n \n", content_type=NDJSON)
        assert (response.status, response.error["code"]) == (422, "invalid")


@new_and_reused_connection
async def test_batch_lines_are_applied_as_they_arrive(server, reused):
    """Watchers get each line's event before the request body ends; then the publisher gets its response."""
    await server.tracker.create("a")
    headers = [("Content-Type", NDJSON), ("Transfer-Encoding", "chunked")]
    async with open_connection(server, reused) as publisher, open_connection(server) as watcher:
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


@new_and_reused_connection
@pytest.mark.parametrize("target", ["/api/sessions/a/progress", "/api/sessions/a/events", "/api/sessions"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_body_that_is_too_large_is_refused(reused, target, chunked):
    """413, and the rest of the body is read and discarded, since a reset could overtake the response."""
    body = b"x" * 1_000_000
    headers = [("Transfer-Encoding", "chunked")] if chunked else []
    sent = request_bytes("POST", target, chunk(body) if chunked else body, headers)
    async with (
        serve(port=0, drain=0.5, max_body=1000) as server,
        open_connection(server, reused) as connection,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.send, sent)
            response = await connection.read_response()
        assert (response.status, response.error["code"]) == (413, "payload_too_large")
        assert await connection.read_to_end() == b""
        assert connection.ended == "eof"
        assert await server.tracker.sessions() == []


@new_and_reused_connection
async def test_unsupported_media_type_is_refused(server, reused):
    """``application/xml`` gets 415; JSON with a charset parameter is accepted."""
    for media_type, status in (("application/xml", 415), ("application/json; charset=utf-8", 202)):
        async with open_connection(server, reused) as connection:
            response = await connection.request(
                "POST", "/api/sessions/a/progress", b"{}", content_type=media_type
            )
            assert response.status == status
        async with open_connection(server, reused) as connection:
            response = await connection.request(
                "POST", "/api/sessions/a/events", b'{"type": "x"}', content_type=media_type
            )
            assert response.status == status


async def test_publishing_with_auto_create_off():
    """With ``auto_create`` off publishing to an unknown session gets 404, whatever the body."""
    async with serve(port=0, drain=0.5, auto_create=False) as server:
        for path in ("progress", "events"):
            assert (await post(server.port, f"/api/sessions/a/{path}", b"{")).error[
                "code"
            ] == "session_not_found"
        await post(server.port, "/api/sessions", {"session_id": "a"})
        assert (await post(server.port, "/api/sessions/a/progress", {"progress": 1})).status == 202


async def test_session_limit():
    """One session more than ``max_sessions`` gets 503; updates of existing sessions are still accepted."""
    async with serve(port=0, drain=0.5, max_sessions=2) as server:
        for name, status in (("a", 202), ("b", 202), ("c", 503), ("b", 202)):
            assert (await post(server.port, f"/api/sessions/{name}/progress", {})).status == status
        assert (await post(server.port, "/api/sessions", {})).error["code"] == "unavailable"


# Watching


async def read_messages(server, transport, cursor=None, *, reused=False, count=None):
    """Watch session "a" to its end, or for ``count`` messages; return (id, event, data) tuples."""
    messages = []
    async with open_connection(server, reused) as connection:
        if transport == "sse":
            response = await connection.watch("a", cursor)
            if response.status == 204:
                return messages
            assert response.status == 200
            while len(messages) != count and (event := await connection.event()) is not None:
                messages.append((event.id, event.event, json.loads(event.data)))
        elif transport == "ws":
            socket = await RawWebSocket.open(connection, "a", cursor)
            while len(messages) != count and isinstance(message := await socket.message(), dict):
                messages.append((message["id"], message["event"], message["data"]))
            if len(messages) != count:
                assert message[0] == 1000
        else:
            while len(messages) != count:
                limit = 1000 if count is None else count - len(messages) - bool(cursor and not messages)
                target = f"/api/sessions/a/events?wait=30&limit={limit}" + (
                    f"&after={cursor}" if cursor else ""
                )
                page = (await connection.request("GET", target)).json
                if cursor and not messages:
                    messages.append((None, "resume", page["resume"]))
                messages += [(e["id"], e["event"], e["data"]) for e in page["events"]]
                cursor = page["next"]
                if page["end"]:
                    break
    return messages


every_transport = pytest.mark.parametrize("transport", ["sse", "ws", "poll"])


@new_and_reused_connection
@every_transport
async def test_watching_an_ended_session(server, transport, reused):
    """A watcher of a session that has ended gets its final event, and then the connection ends."""
    await server.tracker.update("a", progress=10)
    await server.tracker.update("a", status="failed", error="no paper")
    messages = await read_messages(server, transport, reused=reused)
    assert messages[-1][1] == "error"
    assert (messages[-1][2]["error"], messages[-1][2]["state"]) == ("no paper", "failed")
    assert len(messages) == (2 if transport == "poll" else 1)  # the history begins at the log's first event


@new_and_reused_connection
@every_transport
async def test_resuming_after_the_final_event(server, transport, reused):
    """SSE gets 204, a WebSocket is closed with 1000, and a long-poll returns ``end``."""
    await server.tracker.update("a", progress=10)
    cursor = (await server.tracker.update("a", status="done")).id
    messages = await read_messages(server, transport, cursor, reused=reused)
    assert [event for _, event, _ in messages] == ([] if transport == "sse" else ["resume"])


@new_and_reused_connection
@every_transport
async def test_resuming_replays_missed_events(server, transport, reused):
    """A watcher with a cursor gets a resume event, then exactly the events after it, then live ones."""
    cursors = [(await server.tracker.emit("a", "x", n)).id for n in range(300)]
    async with trio.open_nursery() as nursery:

        async def finish():
            if transport != "poll":
                await wait_for_watchers(server, 1)
            await server.tracker.emit("a", "x", 300)
            await server.tracker.update("a", status="done")

        nursery.start_soon(finish)
        messages = await read_messages(server, transport, cursors[9], reused=reused)
    assert messages[0][1:] == ("resume", {"status": "ok", "missed": 0})
    assert sequence_numbers(cursor for cursor, _, _ in messages[1:]) == list(range(11, 303))
    assert [data for _, event, data in messages if event == "x"] == list(range(10, 301))
    assert messages[-1][1] == "complete"


@new_and_reused_connection
@every_transport
@pytest.mark.parametrize(
    ("cursor", "expected"),
    [
        ("{epoch}-1", {"status": "gap", "missed": 29}),
        ("0000-7", {"status": "reset", "missed": 30}),
        ("mine", None),
    ],
    ids=["gap", "reset", "invalid"],
)
async def test_resuming_from_a_cursor_outside_the_log(transport, cursor, expected, reused):
    """If the log begins after the cursor or has another epoch: ``resume``, the snapshot, then live events."""
    async with serve(port=0, drain=0.5, history_events=10) as server:
        for number in range(29):
            await server.tracker.emit("a", "x", number)
        last = (await server.tracker.update("a", progress=50)).id
        cursor = cursor.format(epoch=last.split("-")[0])
        messages = await read_messages(server, transport, cursor, reused=reused, count=2)
    assert messages[0][1] == "resume"
    assert messages[0][2] == (expected or {"status": "reset", "missed": 30})
    assert (messages[1][0], messages[1][1], messages[1][2]["progress"]) == (last, "progress", 50)


async def test_changing_transport_mid_job(server):
    """SSE, WebSocket and long-poll in turn, on new and on reused connections, yield exactly the log."""
    plan = [("sse", False), ("ws", False), ("poll", False), ("sse", True), ("ws", True), ("poll", True)]
    messages = []
    async with trio.open_nursery() as nursery:

        async def work():
            for number in range(1, 375):
                # About half of each part is replayed, the other half is live.
                while number > len(messages) + (50 if server.app.broker.statistics().topics else 25):
                    await trio.lowlevel.checkpoint()
                if number % 3:
                    await server.tracker.update("a", progress=number / 10)
                else:
                    await server.tracker.emit("a", "x", number)
            await server.tracker.update("a", status="done")

        await server.tracker.emit("a", "x", 0)
        start = cursor = (await get(server.port, "/api/sessions/a/events")).json["next"]
        nursery.start_soon(work)
        for transport, reused in plan:
            part = await read_messages(server, transport, cursor, reused=reused, count=51)
            assert part.pop(0)[1:] == ("resume", {"status": "ok", "missed": 0})
            messages += part
            cursor = part[-1][0]
        messages += (await read_messages(server, "sse", cursor, count=51))[1:]
        messages += (await read_messages(server, "sse", messages[-1][0]))[1:]
    log = (await get(server.port, f"/api/sessions/a/events?after={start}")).json["events"]
    assert messages == [(e["id"], e["event"], e["data"]) for e in log]
    assert sequence_numbers(cursor for cursor, _, _ in messages) == list(range(2, 377))


@new_and_reused_connection
async def test_all_transports_deliver_the_same(server, reused):
    """SSE, WebSocket and long-poll deliver the same events, cursors and data, whatever the data."""
    values = [SPECIAL_TEXT, {"a": SPECIAL_TEXT}, None, [], 0.1, 2**60, "", {"": {}}, "x" * 70_000]
    await server.tracker.create("a")
    results = {}
    async with trio.open_nursery() as nursery:

        async def watch(transport, reused):
            results[transport, reused] = await read_messages(server, transport, reused=reused)

        nursery.start_soon(watch, "sse", False)
        nursery.start_soon(watch, "sse", True)
        nursery.start_soon(watch, "ws", False)
        nursery.start_soon(watch, "ws", True)
        await wait_for_watchers(server, 4)
        bodies = [json.dumps({"type": "x", "data": v}, indent=1).encode() for v in values]
        bodies += [json.dumps({"type": "x", "data": SPECIAL_TEXT}, ensure_ascii=False).encode()]
        async with open_connection(server, reused) as publisher:
            for body in bodies:
                response = await publisher.request("POST", "/api/sessions/a/events", body)
                assert response.status == 202, (body[:100], response.body)
            body = json.dumps(
                {"message": SPECIAL_TEXT, "data": {"a": [SPECIAL_TEXT]}}, indent=1, ensure_ascii=False
            ).encode()
            assert (await publisher.request("POST", "/api/sessions/a/progress", body)).status == 202
            assert (
                await publisher.request("POST", "/api/sessions/a/progress", b'{"status": "done"}')
            ).status == 202
    results["poll", False] = await read_messages(server, "poll")
    results["poll", True] = await read_messages(server, "poll", reused=True)
    expected = results["poll", False]
    for messages in results.values():
        assert messages == expected
    assert [data for _, event, data in expected if event == "x"] == [*values, SPECIAL_TEXT]
    assert expected[-2][2]["data"] == {"a": [SPECIAL_TEXT]}
    assert expected[-2][2]["message"] == SPECIAL_TEXT


@new_and_reused_connection
async def test_stream_response_headers(server, reused):
    """The headers that proxies need, and no ``Content-Length``."""
    await server.tracker.update("a", progress=1)
    async with open_connection(server, reused) as connection:
        headers = (await connection.watch("a")).headers
    assert headers.pop("x-request-id") == headers.pop("x-correlation-id")
    assert parsedate_to_datetime(headers.pop("date")).tzinfo is not None
    assert headers == {
        "content-type": "text/event-stream",
        "cache-control": "no-cache, no-transform",
        "x-accel-buffering": "no",
        "transfer-encoding": "chunked",
        "connection": "close",
    }
    async with open_connection(server, reused) as connection:
        response = await connection.request("HEAD", "/api/sessions/a/status/stream")
        assert (response.status, response.headers["content-type"]) == (200, "text/event-stream")
        # A stream has no length (RFC 9110, section 8.6).
        assert "content-length" not in response.headers
        # The response to HEAD is no stream: the connection stays open.
        assert (await connection.request("GET", "/health")).json["streams"] == 0


@new_and_reused_connection
@pytest.mark.parametrize("name", ["last_event_id", "lastEventId"])
async def test_cursor_in_the_query(server, reused, name):
    """For clients that cannot send headers, under either name; ``Last-Event-ID`` overrides it."""
    one, two, _ = [(await server.tracker.emit("a", "x", n)).id for n in range(3)]
    await server.tracker.update("a", status="done")
    for headers, first in (((), one), ([("Last-Event-ID", two)], two)):
        async with open_connection(server, reused) as connection:
            target = f"/api/sessions/a/status/stream?{name}={one}"
            await connection.send(request_bytes("GET", target, headers=headers))
            await connection.read_head()
            events = await connection.events()
            assert sequence_numbers(e.id for e in events[1:]) == list(range(int(first[-1]) + 1, 5))


@pytest.mark.parametrize("name", ["last_event_id", "lastEventId"])
async def test_cursor_in_the_query_of_every_watcher(server, name):
    """Every stream in the table, the WebSocket and the history take it, and ``/openapi.json`` says so."""
    cursor = (await server.tracker.emit("a", "x", 1)).id
    await server.tracker.emit("a", "x", 2)
    await server.tracker.update("a", status="done")
    document = (await get(server.port, "/openapi.json")).json
    watched = 0
    for route in server.app.routes:
        if route.kind not in (Kind.STREAM, Kind.SOCKET) and route.name != "history":
            continue
        if route.action in (Action.LIST, Action.DIAGNOSE):
            continue  # it has no log
        target = route.path.replace("{id}", "a") + f"?session=a&{name}={cursor}"
        headers = HANDSHAKE if route.kind is Kind.SOCKET else ()
        async with open_connection(server) as connection:
            await connection.send(request_bytes("GET", target, headers=headers))
            if route.kind is Kind.STREAM:
                await connection.read_head()
                assert (await connection.event()).event == "resume"
            elif route.kind is Kind.SOCKET:
                await connection.read_head()
                assert (await RawWebSocket(connection).message())["event"] == "resume"
            else:
                assert len((await connection.read_response()).json["events"]) == 2
        names = [parameter["name"] for parameter in document["paths"][route.path]["get"]["parameters"]]
        assert name in names
        watched += 1
    assert watched >= 9


async def test_event_types_that_an_event_source_fires(server):
    """``open`` would call ``onopen``, so it is refused; ``error`` is a warning to an EventSource."""
    for kind in ("open", "message"):
        response = await post(server.port, "/api/sessions/a/events", {"type": kind})
        assert response.status == 422
        assert "EventSource" in response.error["message"]
    for kind in ("error", "Open"):
        assert (await post(server.port, "/api/sessions/a/events", {"type": kind})).status == 202
    async with open_connection(server) as connection:
        await connection.send(request_bytes("GET", "/api/sessions/a/status/stream?replay=1"))
        await connection.read_head()
        assert [(await connection.event()).event for _ in range(2)] == ["warning", "Open"]


@new_and_reused_connection
async def test_retry_ms(reused):
    """A stream begins with the reconnection time that ``retry_ms`` sets."""
    async with serve(port=0, drain=0.5, retry_ms=1234) as server:
        await server.tracker.update("a", status="done")
        async with open_connection(server, reused) as connection:
            await connection.watch("a")
            await connection.events()
            assert connection.raw.startswith(b"retry: 1234\nevent: ")
            assert connection.decoder.retry == 1234


async def test_publisher_sets_the_reconnection_time(server):
    """An event's ``retry`` is sent over SSE and WebSocket."""
    await server.tracker.emit("a", "x", 1)
    cursor = (await server.tracker.get("a")).cursor
    await post(server.port, "/api/sessions/a/events", {"type": "x", "data": 2, "retry": 77})
    async with open_connection(server) as connection:
        await connection.watch("a", str(cursor))
        await connection.event()
        assert (await connection.event()).retry == 77
    async with open_connection(server) as connection:
        socket = await RawWebSocket.open(connection, "a", str(cursor))
        await socket.message()
        assert (await socket.message())["retry"] == 77


@new_and_reused_connection
async def test_deleting_a_session_ends_its_streams(server, reused):
    """Watchers on all transports are notified at once; a later session with the same ID is a new one."""
    await server.tracker.update("a", progress=1)
    ended = []
    async with trio.open_nursery() as nursery:

        async def stream():
            async with open_connection(server, reused) as connection:
                await connection.watch("a")
                ended.append([e.event for e in await connection.events()])

        async def socket():
            async with open_connection(server, reused) as connection:
                messages, close = await (await RawWebSocket.open(connection, "a")).messages()
                ended.append([m["event"] for m in messages])
                assert close[0] == 1000

        async def poll(target):
            async with open_connection(server, reused) as connection:
                ended.append((await connection.request("GET", target)).error["code"])

        nursery.start_soon(stream)
        nursery.start_soon(socket)
        nursery.start_soon(poll, "/api/sessions/a/status?wait=60")
        cursor = (await server.tracker.get("a")).cursor
        nursery.start_soon(poll, f"/api/sessions/a/events?wait=60&after={cursor}")
        await wait_for_watchers(server, 2)
        while len(server.app.broker._topics["a"].waiters) < 2:
            await trio.lowlevel.checkpoint()
        async with open_connection(server, reused) as connection:
            assert (await connection.request("DELETE", "/api/sessions/a")).status == 204
            await connection.request("POST", "/api/sessions/a/progress", b'{"progress": 2}')
    assert ended.count(["progress", "deleted"]) == 2
    assert ended.count("session_not_found") == 2
    assert (await get(server.port, "/api/sessions/a/status")).json["progress"] == 2


# Status and long-poll


async def test_conditional_status_request(server):
    """The ETag is the cursor; ``If-None-Match`` gets 304 until there is a newer event."""
    cursor = (await server.tracker.update("a", progress=5)).id
    async with open_connection(server) as connection:
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
async def test_publishing_completes_long_polls(server, target):
    """All waiting requests get a response at once, with the update that was published."""
    cursor = (await server.tracker.update("a", progress=5)).id
    responses = []
    async with trio.open_nursery() as nursery:

        async def poll(headers):
            async with open_connection(server) as connection:
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
    # Without a waiting poll there is no topic.
    assert server.app.broker.statistics().topics == 0


async def test_request_that_arrives_during_a_long_poll_is_served_after_it(server):
    """Its bytes were read while the long-poll waited, and nothing else comes from the client."""
    await server.tracker.update("a", progress=5)
    async with open_connection(server) as connection:
        await connection.send(request_bytes("GET", "/api/sessions/a/status?wait=60"))
        while not server.app.broker.is_watched("a"):
            await trio.lowlevel.checkpoint()
        await connection.send(request_bytes("GET", "/api/sessions/a/events"))
        await wait_all_tasks_blocked(0.01)
        await server.tracker.update("a", progress=7)
        assert (await connection.read_response()).json["progress"] == 7
        assert len((await connection.read_response()).json["events"]) == 2


async def test_long_poll_timeout(server):
    """A long-poll without events returns an empty page with the same cursor; a status request gets 304."""
    cursor = (await server.tracker.update("a", progress=5)).id
    page = (await get(server.port, f"/api/sessions/a/events?after={cursor}&wait=0.01")).json
    assert (page["events"], page["next"], page["end"]) == ([], cursor, False)
    response = await get(server.port, "/api/sessions/a/status?wait=0.01", [("If-None-Match", f'"{cursor}"')])
    assert response.status == 304


async def test_history_pages(server):
    """Each page begins where the previous one ended, and only the last one has ``end`` set."""
    for number in range(25):
        await server.tracker.emit("a", "x", number)
    await server.tracker.update("a", status="done")
    ids, cursor, ends = [], "", []
    while not ends or not ends[-1]:
        page = (await get(server.port, f"/api/sessions/a/events?limit=10&after={cursor}")).json
        ids += [e["id"] for e in page["events"]]
        cursor = page["next"]
        ends.append(page["end"])
    assert sequence_numbers(ids) == list(range(1, 27))
    assert ends == [False, False, True]


# CORS


@new_and_reused_connection
@pytest.mark.parametrize(
    ("origins", "origin", "allowed", "credentials"),
    [
        ((), "http://a.example", None, None),
        (("http://a.example",), "http://a.example", "http://a.example", "true"),
        (("http://a.example",), "http://b.example", None, None),
        (("http://a.example",), "http://a.example.evil", None, None),
        (("http://a.example",), "null", None, None),
        (("*",), "http://b.example", "*", None),
        (("*",), None, "*", None),
        (("*", "http://a.example"), None, "*", None),
        (("*",), "*", "*", None),
        (("*", "http://a.example"), "http://a.example", "http://a.example", "true"),
        (("*", "http://a.example"), "http://b.example", "*", None),
        (("http://a.example",), None, None, None),
    ],
)
async def test_cors_headers(origins, origin, allowed, credentials, reused):
    """Responses, errors, streams and preflights allow listed origins only, and ``*`` without credentials."""
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
            async with open_connection(server, reused) as connection:
                response = await connection.request(method, target, body, headers)
            assert response.headers.get("access-control-allow-origin") == allowed, target
            assert response.headers.get("access-control-allow-credentials") == credentials, target
            if allowed is not None:
                assert "X-Request-ID" in response.headers["access-control-expose-headers"]
            depends = origins not in ((), ("*",))
            assert response.headers.get("vary") == ("Origin" if depends else None), target


async def test_preflight(server):
    """A listed origin gets the path's methods and the accepted headers, any other origin nothing."""
    preflight = [
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "idempotency-key"),
    ]
    async with serve(port=0, drain=0.5, cors_origins=("http://a.example",)) as other:
        for port, listed in ((server.port, False), (other.port, True)):
            connection = await connect(port)
            async with connection.stream:
                response = await connection.request(
                    "OPTIONS", "/api/sessions/a/events", headers=[("Origin", "http://a.example"), *preflight]
                )
            assert response.status == 200
            assert ("access-control-allow-methods" in response.headers) == listed
            if listed:
                assert response.headers["access-control-allow-methods"] == "GET, POST"
                allowed = response.headers["access-control-allow-headers"].lower().split(", ")
                assert {"idempotency-key", "last-event-id", "content-type", "authorization"} <= set(allowed)
                assert {"traceparent", "tracestate", "x-request-id", "x-correlation-id"} <= set(allowed)


# WebSocket on a reused connection


async def test_websocket_on_a_reused_connection(server):
    """Pings are answered, messages ignored, too large ones closed with 1009, and a close is answered."""
    await server.tracker.update("a", progress=1)
    async with open_connection(server, reused=True) as connection:
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
    async with open_connection(server, reused=True) as connection:
        socket = await RawWebSocket.open(connection, "a")
        await socket.message()
        await socket.send(1, b"x" * 10_000)
        opcode, payload = await socket.frame()
        assert (opcode, int.from_bytes(payload[:2], "big")) == (8, 1009)
    await wait_for_watchers(server, 0)


async def test_everything_that_arrives_with_a_websocket_handshake_is_read(server):
    """However much it is: the ping at its end is answered, although nothing else comes from the client."""
    await server.tracker.update("a", progress=1)
    async with open_connection(server) as connection:
        handshake = request_bytes("GET", "/api/sessions/a/status/ws", headers=HANDSHAKE)
        await connection.send(handshake + frame(1, b"x" * 1000) * 5 + frame(9, b"ping"))
        assert (await connection.read_head()).status == 101
        socket = RawWebSocket(connection)
        assert (await socket.message())["event"] == "progress"
        assert await socket.frame() == (10, b"ping")


@pytest.mark.parametrize(("opcode", "answer"), [(9, 10), (8, 8)], ids=["ping", "close"])
async def test_a_websocket_is_read_during_a_long_replay(opcode, answer):
    """A ping and a close frame are answered before the end of what the client resumes with."""
    async with serve(port=0, drain=0.5, history_bytes=2**24) as server:
        cursor = (await server.tracker.update("a", progress=1)).id
        for _ in range(500):
            await server.tracker.emit("a", "x", "x" * 8000)
        async with open_connection(server, receive_buffer=4096) as connection:
            socket = await RawWebSocket.open(connection, "a", cursor)
            await socket.send(opcode)
            messages = 0
            while (await socket.frame())[0] != answer:
                messages += 1
                assert messages < 500


async def test_refused_websocket_on_a_reused_connection(server):
    """404 in the common error format, with the request's ID."""
    async with open_connection(server, reused=True) as connection:
        headers = [*HANDSHAKE, ("X-Request-ID", "mine")]
        response = await connection.request("GET", "/api/sessions/none/status/ws", headers=headers)
        assert (response.status, response.json["error"]["code"]) == (404, "session_not_found")
        assert response.json["error"]["request_id"] == "mine"


# Hostile clients


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
async def test_connection_resets_at_every_byte(server, caplog, request_):
    """After a RST within a request, after it or within the response, others go on and nothing is logged."""
    await server.tracker.update("a", progress=1)
    async with open_connection(server) as watcher:
        await watcher.watch("a")
        await watcher.event()
        for at in range(0, len(request_), 2):
            client = await connect(server.port)
            await client.send(request_[:at])
            reset(client)
        for size in (0, 1, 40, 200):
            client = await connect(server.port)
            await client.send(request_)
            if size:
                await client.stream.receive_some(size)
            await server.tracker.emit("a", "x", "y" * 1000)
            reset(client)
            await server.tracker.emit("a", "x", "y" * 1000)
        await wait_for_watchers(server, 1)
        while server.app.counters.connections > 1:
            await trio.lowlevel.checkpoint()
        received = 0
        while received < 8:
            received += (await watcher.event()).event == "x"
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


async def test_fifty_stalled_readers_delay_no_other(caplog):
    """Each keeps to its buffer limit and is cut with a reason; fifty other clients get every event."""
    events, size = 60, 20_000
    async with serve(port=0, drain=0.5, buffer_bytes=50_000, buffer_events=100) as server:
        await server.tracker.update("a", progress=1)
        stalled = [await connect(server.port, receive_buffer=4096) for _ in range(50)]
        reading = [await connect(server.port) for _ in range(50)]
        for connection in stalled + reading:
            await connection.watch("a")
        await wait_for_watchers(server, 100)
        max_buffered = 0
        received = []

        async def read(connection):
            assert (await connection.event()).event == "progress"
            numbers = [json.loads((await connection.event()).data)[0] for _ in range(events)]
            received.append(numbers)

        async with trio.open_nursery() as nursery:
            for connection in reading:
                nursery.start_soon(read, connection)
            for number in range(events):
                await server.tracker.emit("a", "x", [number, "y" * size])
                waiting = [s.backlog[1] for s in server.app.broker.subscribers()]
                max_buffered = max(max_buffered, *waiting)
                await trio.lowlevel.checkpoint()
        assert received == [list(range(events))] * 50
        assert max_buffered <= 50_000
        await wait_for_watchers(server, 50)
        assert server.app.broker.statistics().cut == 50
        # When it reads again it gets the reason and can resume.
        stalled_events = await stalled[0].events()
        assert stalled_events[-1].event == "overflow"
        cursor = stalled_events[-1].id
        numbers = [json.loads(e.data)[0] for e in stalled_events if e.event == "x"]
        async with open_connection(server) as connection:
            await connection.watch("a", cursor)
            assert json.loads((await connection.event()).data)["status"] == "ok"
            numbers += [json.loads((await connection.event()).data)[0] for _ in range(len(numbers), events)]
        assert numbers == list(range(events))
        for connection in stalled + reading:
            await connection.stream.aclose()
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


async def test_connection_limit():
    """A connection above the limit gets 503 at once; when one has closed, another is accepted."""
    async with serve(port=0, drain=0.5, max_connections=3) as server:
        connections = [await connect(server.port) for _ in range(3)]
        for connection in connections:
            assert (await connection.request("GET", "/health")).json["connections"] <= 3
        for _ in range(5):
            extra = await connect(server.port)
            async with extra.stream:
                response = await extra.read_response()
                assert (response.status, response.error["code"]) == (503, "unavailable")
                assert int(response.headers["retry-after"]) > 0
        text = (await connections[0].request("GET", "/metrics")).body.decode()
        assert 'sseserve_refused_total{limit="max_connections"} 5.0' in text
        await connections[1].stream.aclose()
        while server.app.counters.connections == 3:
            await trio.lowlevel.checkpoint()
        assert (await get(server.port, "/health")).status == 200
        for connection in connections:
            await connection.stream.aclose()


class FakeListener:
    """A listener whose ``accept`` returns the given streams, or raises the given errors."""

    def __init__(self, *results):
        self.results = list(results)
        self.closed = False

    async def accept(self):
        await trio.lowlevel.checkpoint()
        if not self.results:
            await trio.sleep_forever()
        result = self.results.pop(0)
        if isinstance(result, OSError):
            raise result
        return result

    async def aclose(self):
        self.closed = True


@pytest.mark.parametrize(
    "number",
    [
        *(errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM),
        *(errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN),
    ],
)
async def test_accept_is_retried_after_an_error(autojump_clock, nursery, caplog, number):
    """Without file descriptors or memory, or after an error of one connection (accept(2)), accepting goes on.

    There is a delay in between, and the log says why.
    """
    app = Application(load(environ={}), nursery)
    client, stream = memory_stream_pair()
    fake = FakeListener(*(OSError(number, "no more") for _ in range(20)), stream)
    listener = app.listen([fake])
    await nursery.start(listener.run)
    assert (await RawConnection(client).request("GET", "/health")).status == 200
    assert caplog.text.count("cannot accept") == 20
    listener.stop()
    await wait_all_tasks_blocked()
    assert fake.closed


# Invalid events and log lines


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
async def test_json_that_is_not_unicode_is_refused(server, target, body):
    """Invalid UTF-8 and lone surrogates are refused, since clients could not read an event that has them."""
    await server.tracker.update("a", progress=1)
    response = await post(server.port, target, body)
    assert (response.status, response.error["code"]) == (400, "bad_request")
    assert [s.seq for s in await server.tracker.sessions()] == [1]


async def test_failed_fan_out_cuts_only_its_watchers(server, monkeypatch, caplog):
    """If an event cannot be encoded its watchers get ``overflow`` and are cut; other sessions go on."""
    await server.tracker.update("bad", progress=1)
    await server.tracker.update("good", progress=1)
    failing, other = await connect(server.port), await connect(server.port)
    async with failing.stream, other.stream:
        for connection, session_id in ((failing, "bad"), (other, "good")):
            await connection.watch(session_id)
            assert (await connection.event()).event == "progress"
        (subscriber,) = [s for s in server.app.broker.subscribers() if s.topic.session_id == "bad"]
        encoding = type(subscriber.encoding)
        original = encoding.event

        def event(self, session_id, epoch, event):
            if session_id == "bad":
                raise RuntimeError("a bug")
            return original(self, session_id, epoch, event)

        monkeypatch.setattr(encoding, "event", event)
        await server.tracker.update("bad", progress=2)
        await server.tracker.update("good", progress=2)
        assert [e.event for e in await failing.events()] == ["overflow"]
        assert (await other.event()).event == "progress"
    assert "fan-out of session bad failed" in caplog.text


@new_and_reused_connection
@pytest.mark.parametrize(
    ("method", "target", "headers", "status", "error"),
    [
        ("GET", "/health", [("Host", "a.example")], 421, "'a.example' is not a host of "),
        ("GET", "/api/sessions/none/status/stream", [], 404, "there is no session 'none'"),
        (
            "GET",
            "/api/sessions/run/status/ws",
            [*HANDSHAKE, ("Origin", "http://a.example")],
            403,
            "a page of the origin http://a.example may not do this here; ",
        ),
        ("PUT", "/health", [], 405, "/health does not support PUT; it supports GET, HEAD, OPTIONS"),
        ("G T", "/health", [], 400, ""),
    ],
)
async def test_refused_requests_are_logged_with_their_reason(
    server, caplog, method, target, headers, status, error, reused
):
    """A page's script cannot read why its WebSocket is refused: the operator finds it in the log."""
    caplog.set_level("INFO", "sseserve")
    await server.tracker.update("run", progress=50)
    async with open_connection(server, reused) as connection:
        await connection.request(method, target, headers=headers)
    (line,) = logged(caplog, "request")
    assert line["status"] == status
    assert line["error"].startswith(error)
    is_parsed = status != 400
    assert (line.get("method"), line.get("path")) == ((method, target) if is_parsed else (None, None))


@new_and_reused_connection
async def test_line_breaks_in_paths_are_not_logged(server, caplog, reused):
    """A request takes one line of the log, whatever its path has in it."""
    caplog.set_level("DEBUG", "sseserve")
    async with open_connection(server, reused) as connection:
        for target in ("/none%0aERROR%20forged", "/api/sessions/a%0d%0aERROR/status/stream"):
            if (await connection.request("GET", target)).headers.get("connection") == "close":
                break
    assert [r.getMessage() for r in caplog.records if "\n" in r.getMessage() or "\r" in r.getMessage()] == []
