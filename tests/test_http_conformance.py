"""What RFC 9110 (HTTP Semantics) and RFC 9112 (HTTP/1.1) require of an origin server, a case for each.

Each case is named with its section. What concerns only proxies, caches and clients is left out, and so is
what test_smuggling.py, test_h1_fast.py and tests/fuzz hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import trio
from harness import ServerHarness
from raw_client import RawConnection, RawResponse, chunk, connect, request_bytes
from test_http2 import Client

import sseserve
from sseserve.http.routes import ROUTES

HOST = b"Host: localhost\r\n"
JSON = b'{"progress": 1}'
STATUS = "/api/sessions/s/status"
STREAM = STATUS + "/stream"
SOCKET = STATUS + "/ws"
MAX_HEAD = 16 * 1024  # bytes, by default


def get(target: bytes = b"/health", fields: bytes = HOST, *, method: bytes = b"GET", version: bytes = b"1.1"):
    """A request without a body."""
    return b"%b %b HTTP/%b\r\n%b\r\n" % (method, target, version, fields)


def post(fields: bytes, body: bytes = b"", *, version: bytes = b"1.1") -> bytes:
    """An update of progress, with the fields that frame its body."""
    fields = HOST + b"Content-Type: application/json\r\n" + fields
    return get(b"/api/sessions/s/progress", fields, method=b"POST", version=version) + body


LENGTH = b"Content-Length: %d\r\n" % len(JSON)
CHUNKED = b"Transfer-Encoding: chunked\r\n"


class Case(NamedTuple):
    """What is sent, and the final status; ``ends``: the connection must end with it.

    ``fields`` are those that the response must have, with a pattern of the value; None: must not have.
    """

    data: bytes
    status: int
    ends: bool = False
    fields: Mapping[str, str | None] = MappingProxyType({})


ALLOW = {"allow": "GET, HEAD, OPTIONS"}
CASES: dict[str, Case] = {
    # RFC 9110
    "2.5: a higher minor version is served as 1.1": Case(get(version=b"1.2"), 200),
    "5.1: names of fields in any case": Case(get(fields=b"hOsT: localhost\r\n"), 200),
    "5.1: unknown fields are ignored": Case(get(fields=HOST + b"X-Unknown: 1\r\n"), 200),
    "5.5: CR in a value": Case(get(fields=HOST + b"X: a\rb\r\n"), 400, ends=True),
    "5.5: NUL in a value": Case(get(fields=HOST + b"X: a\0b\r\n"), 400, ends=True),
    "5.5: other bytes in a value are opaque": Case(get(fields=HOST + b"X: \xff\r\n"), 200),
    "6.5: trailers are read": Case(
        post(CHUNKED + b"Trailer: X\r\n", chunk(JSON) + b"0\r\nX: y\r\n\r\n"), 202
    ),
    "6.5: a trailer that is none": Case(post(CHUNKED, chunk(JSON) + b"0\r\nX y\r\n\r\n"), 400, ends=True),
    "7.1: absolute form": Case(get(b"http://localhost/health"), 200),
    "7.2: the target's host counts, not the field": Case(get(b"http://evil.example/health"), 421),
    "7.4: a host of others": Case(get(fields=b"Host: evil.example\r\n"), 421),
    "7.8: an upgrade to something unknown is ignored": Case(
        get(fields=HOST + b"Connection: Upgrade\r\nUpgrade: other/1\r\n"), 200, fields={"upgrade": None}
    ),
    "8.6: no Content-Length with 204": Case(
        get(b"/api/sessions/done/status/stream", HOST + b"Last-Event-ID: DONE\r\n"),
        204,
        ends=True,
        fields={"content-length": None, "transfer-encoding": None},
    ),
    "9.1: an unknown method": Case(get(method=b"BREW"), 501),
    "9.1: an unknown method of an unknown resource": Case(get(b"/nothing", method=b"BREW"), 501),
    "9.1: a known method that is not allowed": Case(get(method=b"DELETE"), 405, fields=ALLOW),
    "9.3.6: CONNECT, which only proxies have": Case(get(b"localhost:80", method=b"CONNECT"), 501),
    "9.3.7: OPTIONS": Case(get(method=b"OPTIONS"), 200, fields={**ALLOW, "content-length": "0"}),
    "9.3.7: OPTIONS of the whole server": Case(
        get(b"*", method=b"OPTIONS"), 200, fields={"allow": "DELETE, GET, HEAD, OPTIONS, POST"}
    ),
    "9.3.7: OPTIONS of something unknown": Case(get(b"/nothing", method=b"OPTIONS"), 404),
    "9.3.8: TRACE": Case(get(method=b"TRACE"), 405, fields=ALLOW),
    "10.1.1: an expectation that nobody can meet": Case(
        post(b"Expect: bread\r\n" + LENGTH, JSON), 417, ends=True
    ),
    "10.1.1: of HTTP/1.0 it is ignored": Case(
        post(b"Expect: 100-continue\r\n" + LENGTH, JSON, version=b"1.0"), 202, ends=True
    ),
    "11.6.1: a challenge": Case(get(STATUS.encode()), 401, fields={"www-authenticate": "Bearer"}),
    "13.1.2: If-None-Match": Case(
        get(STATUS.encode(), HOST + b"If-None-Match: ETAG\r\n"), 304, fields={"etag": '"[^"]+"'}
    ),
    "13.1.2: one of a list": Case(
        get(STATUS.encode(), HOST + b'If-None-Match: "x", ETAG\r\n'), 304, fields={"etag": '"[^"]+"'}
    ),
    "13.1.2: a weak tag is compared weakly": Case(
        get(STATUS.encode(), HOST + b"If-None-Match: W/ETAG\r\n"), 304
    ),
    "13.1.2: any": Case(get(STATUS.encode(), HOST + b"If-None-Match: *\r\n"), 304),
    "13.1.2: another": Case(get(STATUS.encode(), HOST + b'If-None-Match: "x"\r\n'), 200),
    "14.2: ranges may be ignored": Case(get(fields=HOST + b"Range: bytes=0-1\r\n"), 200),
    "15.5.1: a target that is none": Case(get(b"health"), 400),
    "15.5.1: a target with another beginning": Case(get(b"localhost/health"), 400),
    "15.5.1: authority form": Case(get(b"localhost:80"), 400),
    "15.5.1: a URL of another scheme": Case(get(b"ftp://localhost/health"), 400),
    "15.5.1: an asterisk": Case(get(b"*"), 400),
    "15.5.5: nothing is there": Case(get(b"/nothing"), 404),
    "15.5.15: a target that is too long": Case(get(b"/" + b"x" * MAX_HEAD), 414, ends=True),
    "15.5.15: one without an end": Case(b"GET /" + b"x" * 5 * MAX_HEAD, 414, ends=True),
    "15.5.16: a type of body that is not taken": Case(
        post(LENGTH, JSON).replace(b"application/json", b"text/csv"), 415
    ),
    "15.5.22: a WebSocket without an upgrade": Case(
        get(SOCKET.encode()), 426, fields={"upgrade": "websocket", "connection": None}
    ),
    "15.6.6: another major version": Case(get(version=b"3.0"), 505, ends=True),
    "15.6.6: HTTP/0.9": Case(get(version=b"0.9"), 505, ends=True),
    # RFC 9112
    "2.2: an empty line before a request": Case(b"\r\n" + get(), 200),
    "2.2: many of them": Case(b"\r\n" * 100 + get(), 200),
    "2.2: LF may end a line": Case(get().replace(b"\r\n", b"\n"), 200),
    "2.2: CR alone does not": Case(get(fields=b"Host: localhost\rX: y\r\n"), 400, ends=True),
    "2.2: white space before the first field": Case(get(fields=b" X: y\r\n" + HOST), 400, ends=True),
    "2.3: the name of the protocol is in upper case": Case(get().replace(b"HTTP", b"http"), 400, ends=True),
    "2.3: versions have one digit and one": Case(get(version=b"1.10"), 400, ends=True),
    "3: two spaces": Case(get(b" /health"), 400, ends=True),
    "3: a tab": Case(get().replace(b" /", b"\t/", 1), 400, ends=True),
    "3: a space at the end": Case(get(version=b"1.1 "), 400, ends=True),
    "3: a method that is none": Case(get(method=b"G@T"), 400, ends=True),
    "3: a method longer than any": Case(get(method=b"A" * 5 * MAX_HEAD), 501, ends=True),
    "3: the same, in one piece": Case(get(method=b"A" * (MAX_HEAD + 1)), 501, ends=True),
    "3: a line of 8,000 bytes": Case(get(b"/health?" + b"x" * 8000), 200),
    "3.2: no Host": Case(get(fields=b""), 400, ends=True),
    "3.2: no Host, of a later version": Case(get(fields=b"", version=b"1.2"), 400, ends=True),
    "3.2: HTTP/1.0 needs none": Case(get(fields=b"", version=b"1.0"), 200, ends=True),
    "3.2: two Hosts": Case(get(fields=2 * HOST), 400, ends=True),
    "3.2: a Host with a space": Case(get(fields=b"Host: local host\r\n"), 400),
    "3.2: a list of Hosts": Case(get(fields=b"Host: localhost, localhost\r\n"), 400),
    "3.2: a Host with a user": Case(get(fields=b"Host: user@localhost\r\n"), 400),
    "3.2: a Host with a port that is none": Case(get(fields=b"Host: localhost:http\r\n"), 400),
    "3.2: also where nothing is": Case(get(b"/nothing", b"Host: a b\r\n"), 400),
    "3.2.2: absolute form needs a Host too": Case(get(b"http://localhost/health", b""), 400, ends=True),
    "3.2.2: absolute form without a path": Case(get(b"http://localhost"), 200),
    "5: more fields than are read": Case(get(fields=HOST + b"X: %b\r\n" % (b"x" * MAX_HEAD)), 431, ends=True),
    "5: fields without an end": Case(get(fields=b"X: " + b"x" * 5 * MAX_HEAD), 431, ends=True),
    "5.1: white space before the colon": Case(get(fields=HOST + b"X : a\r\n"), 400, ends=True),
    "5.1: no colon": Case(get(fields=HOST + b"X\r\n"), 400, ends=True),
    "5.1: no name": Case(get(fields=HOST + b": a\r\n"), 400, ends=True),
    "5.2: a folded line is one with spaces": Case(get(fields=HOST + b"X: a\r\n b\r\n"), 200),
    "6.1: an unknown coding": Case(post(b"Transfer-Encoding: gzip, chunked\r\n"), 501, ends=True),
    "6.1: chunked and a length": Case(post(CHUNKED + LENGTH, chunk(JSON) + chunk(b"")), 202, ends=True),
    "6.1: chunked in HTTP/1.0": Case(post(CHUNKED, chunk(JSON) + chunk(b""), version=b"1.0"), 202, ends=True),
    "6.3: two lengths": Case(post(LENGTH + b"Content-Length: 1\r\n", JSON), 400, ends=True),
    "6.3: a length that is none": Case(post(b"Content-Length: 1x\r\n", JSON), 400, ends=True),
    "6.3: a negative length": Case(post(b"Content-Length: -1\r\n", JSON), 400, ends=True),
    "6.3: the same length twice": Case(post(2 * LENGTH, JSON), 202),
    "6.3: less than the length": Case(post(b"Content-Length: 99\r\n", JSON), 400, ends=True),
    "7.1: chunks": Case(post(CHUNKED, chunk(JSON[:3]) + chunk(JSON[3:]) + chunk(b"")), 202),
    "7.1: sizes in upper case, with zeros": Case(post(CHUNKED, b"00F\r\n%b\r\n0\r\n\r\n" % JSON), 202),
    "7.1: a size that is none": Case(post(CHUNKED, b"xyz\r\n"), 400, ends=True),
    "7.1: a size that is too large": Case(post(CHUNKED, b"f" * 30 + b"\r\n"), 400, ends=True),
    "7.1: a chunk longer than its size": Case(post(CHUNKED, b"3\r\n%b\r\n" % JSON), 400, ends=True),
    "7.1.1: extensions are ignored": Case(post(CHUNKED, b"f;a=b\r\n%b\r\n0\r\n\r\n" % JSON), 202),
    "9.3: a connection is kept": Case(get(), 200, fields={"connection": None}),
    "9.3: until the client says so": Case(
        get(fields=HOST + b"Connection: x, CLOSE\r\n"), 200, ends=True, fields={"connection": "close"}
    ),
    "9.3: HTTP/1.0": Case(get(version=b"1.0"), 200, ends=True, fields={"connection": "close"}),
}


def is_date(value: str) -> bool:
    """Whether a value is a date of the preferred format (RFC 9110, section 5.6.7)."""
    pattern = r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT"
    return re.fullmatch(pattern, value) is not None and parsedate_to_datetime(value) is not None


async def refuse(_request: object) -> Any:
    raise sseserve.Unauthorized("a bearer token is required")


async def read_final(connection: RawConnection, method: str) -> RawResponse:
    while (response := await connection.read_response(method)).status < 200:
        pass
    return response


@pytest.mark.parametrize("name", CASES)
async def test_case(autojump_clock, nursery, name):
    """The response, whether the connection goes on, and the fields that every response has."""
    case = CASES[name]
    harness = ServerHarness(nursery, authenticate=refuse if case.status == 401 else None)
    await harness.tracker.update("s", progress=1)
    await harness.tracker.update("done", status="done")
    etag = f'"{(await harness.tracker.get("s")).cursor}"'
    done = str((await harness.tracker.get("done")).cursor)
    data = case.data.replace(b"ETAG", etag.encode()).replace(b"DONE", done.encode())
    connection = harness.connect()
    await connection.send(data)
    response = await read_final(connection, "GET")
    assert response.status == case.status
    assert is_date(response.headers["date"])
    for field, value in case.fields.items():
        if value is None:
            assert field not in response.headers
        else:
            assert re.fullmatch(value, response.headers[field]), field
    if case.ends:
        assert response.headers["connection"] == "close"
        assert await connection.read_to_end() == b""
    else:
        assert (await connection.request("GET", "/health")).status in (200, 401)
    await connection.stream.aclose()


# RFC 9110, section 6.6.1: Date


async def test_date_of_streams_and_refusals(nursery):
    """An event stream, a WebSocket that is refused, a request that comes too slowly, an unexpected error."""

    async def fail(_request: object) -> Any:
        raise RuntimeError("a defect")

    for options, data, status in (
        ({}, request_bytes("GET", STREAM), 200),
        ({}, request_bytes("GET", SOCKET), 426),
        ({"request_timeout": 0.01}, b"GET / HTTP/1.1\r\n", 408),
        ({"authenticate": fail}, request_bytes("GET", STATUS), 500),
    ):
        harness = ServerHarness(nursery, **options)
        await harness.tracker.update("s", progress=1)
        connection = harness.connect()
        await connection.send(data)
        response = await connection.read_head()
        assert response.status == status
        assert is_date(response.headers["date"])
        await connection.stream.aclose()


@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_address"])
async def test_date_and_retry_after_of_a_refused_connection(limit):
    """Section 10.2.3, too."""
    async with sseserve.serve(port=0, limit_loopback=True, **{limit: 1}) as server:
        first = await connect(server.port)
        while server.app.counters.connections != 1:
            await trio.lowlevel.checkpoint()
        second = await connect(server.port)
        response = await second.read_response()
        assert response.status == (503 if limit == "max_connections" else 429)
        assert is_date(response.headers["date"])
        assert int(response.headers["retry-after"]) > 0
        for connection in (first, second):
            await connection.stream.aclose()


async def test_retry_after(autojump_clock, nursery):
    """Section 10.2.3: whoever comes too often is told when to come again."""
    harness = ServerHarness(nursery, ticket_rate=1.0, limit_loopback=True)
    responses = [await harness.post("/api/tickets", {"sessions": ["s"]}) for _ in range(12)]
    assert responses[-1].status == 429
    assert int(responses[-1].headers["retry-after"]) > 0
    assert is_date(responses[-1].headers["date"])


# RFC 9110, section 9.3.2: HEAD

# Fields that may be left out of the response to a HEAD (section 9.3.2), or are of the connection.
OF_THE_CONTENT = {"connection", "date", "transfer-encoding", "x-request-id", "x-correlation-id"}
GETS = sorted({route.path for route in ROUTES if route.method == "GET"})


@pytest.mark.parametrize("path", GETS)
async def test_head_is_get_without_its_content(autojump_clock, nursery, path):
    """The same status and fields, on every route."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("s", progress=1)
    target = path.replace("{id}", "s").replace("{name}", "film.svg")
    target += "?session=s" if path == "/api/streams" else ""
    head = await harness.request("HEAD", target)
    assert head.body == b""
    connection = harness.connect()
    await connection.send(request_bytes("GET", target))
    response = await connection.read_head()
    await connection.stream.aclose()
    assert head.status == response.status

    def fields(headers: dict[str, str]) -> dict[str, str]:
        same = {name: value for name, value in headers.items() if name not in OF_THE_CONTENT}
        if path in ("/health", "/metrics", "/api/diagnostics"):
            same.pop("content-length", None)  # what they tell changes
        return same

    assert fields(head.headers) == fields(response.headers)
    # A connection whose HEAD had content would not be understood any more.
    connection = harness.connect()
    await connection.send(request_bytes("HEAD", target) + request_bytes("GET", "/ready"))
    assert (await connection.read_response("HEAD")).status == head.status
    assert (await connection.read_response()).json == {"status": "ready"}


@pytest.mark.parametrize("path", sorted({route.path for route in ROUTES}))
async def test_options_and_allow(autojump_clock, nursery, path):
    """Sections 9.3.7, 10.2.1 and 15.5.6: what a resource allows is said by OPTIONS and with 405."""
    harness = ServerHarness(nursery)
    target = path.replace("{id}", "s").replace("{name}", "film.svg")
    methods = {route.method for route in ROUTES if route.path == path}
    allowed = methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
    options = await harness.request("OPTIONS", target)
    assert options.status == 200
    refused = await harness.request("PATCH", target)
    assert refused.status == 405
    for response in (options, refused):
        assert set(response.headers["allow"].split(", ")) == allowed


# RFC 9110, section 10.1.1: Expect


async def test_100_continue(autojump_clock, nursery):
    """It comes before the body is sent; a request that is refused anyway gets its final status instead."""
    harness = ServerHarness(nursery, authenticate=refuse)
    connection = harness.connect()
    await connection.send(post(b"Expect: 100-Continue\r\n" + LENGTH))
    assert (await connection.read_response()).status == 401
    harness = ServerHarness(nursery)
    connection = harness.connect()
    await connection.send(post(b"Expect: 100-Continue\r\n" + LENGTH))
    assert (await connection.read_response()).status == 100
    await connection.send(JSON)
    assert (await connection.read_response()).status == 202
    await connection.send(post(b"Expect: 100-continue\r\n" + LENGTH, JSON))
    assert (await read_final(connection, "POST")).status == 202


# RFC 9110, section 15.4.5: 304


@pytest.mark.parametrize("target", [STATUS, "/"])
async def test_fields_of_a_304(autojump_clock, nursery, target):
    """Those that a 200 would have had, and no content."""
    harness = ServerHarness(nursery, cors_origins=["https://a.example"])
    await harness.tracker.update("s", progress=1)
    response = await harness.get(target)
    tag = response.headers["etag"]
    connection = harness.connect()
    headers = [("If-None-Match", tag), ("Origin", "https://a.example")]
    unmodified = await connection.request("GET", target, headers=headers)
    assert unmodified.status == 304
    for name in ("cache-control", "content-location", "date", "etag", "expires", "vary"):
        assert (name in unmodified.headers) == (name in response.headers), name
        if name != "date":
            assert unmodified.headers.get(name) == response.headers.get(name)
    assert "content-type" not in unmodified.headers
    assert (await connection.request("GET", target)).status == 200


# RFC 9112


@pytest.mark.parametrize("end", [b"\r\n", b"\n", b"\r\n\r\n"])
async def test_empty_lines_behind_a_body(autojump_clock, nursery, end):
    """Section 2.2: old clients send one; the connection is idle then, and not slow."""
    harness = ServerHarness(nursery, request_timeout=1, keep_alive=100)
    connection = harness.connect()
    for pause in (0, 50):
        await connection.send(post(LENGTH, JSON) + end)
        assert (await connection.read_response()).status == 202
        await trio.sleep(pause)
    await connection.send(post(LENGTH, JSON) + end + get() + end + get())
    assert [(await connection.read_response()).status for _ in range(3)] == [202, 200, 200]
    await connection.stream.aclose()


async def test_empty_line_while_the_server_stops(autojump_clock, nursery):
    """No request is waited for behind it."""
    harness = ServerHarness(nursery)
    connection = harness.connect()
    assert (await connection.request("GET", "/health")).status == 200
    harness.app.stopping.set()
    began = trio.current_time()
    await connection.send(b"\r\n")
    assert await connection.read_to_end() == b""
    assert trio.current_time() == began
    await connection.stream.aclose()


async def test_pipelining(autojump_clock, nursery):
    """Section 9.3.2: responses in the order of their requests, also of those that take longer."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("s", progress=1)
    connection = harness.connect()
    ids = [f"request-{number}" for number in range(6)]
    targets = ["/health", f"{STATUS}?wait=1", "/nothing", STATUS, "/ready", "/metrics"]
    await connection.send(
        b"".join(
            request_bytes("GET", target, headers=[("X-Request-ID", each)])
            for target, each in zip(targets, ids, strict=True)
        )
    )
    assert [(await connection.read_response()).headers["x-request-id"] for _ in ids] == ids


# Over HTTP/2 the semantics are the same


HTTP2_CASES: dict[str, tuple[str, str, dict[str, str], int, dict[str, str]]] = {
    "9.1: an unknown method": ("BREW", "/health", {}, 501, {}),
    "9.3.7: OPTIONS": ("OPTIONS", "/health", {}, 200, ALLOW),
    "9.3.7: OPTIONS of the whole server": (
        "OPTIONS",
        "*",
        {},
        200,
        {"allow": "DELETE, GET, HEAD, OPTIONS, POST"},
    ),
    "9.3.2: HEAD": ("HEAD", "/ready", {}, 200, {"content-length": r"\d\d"}),
    "9.3.2: HEAD of a stream": ("HEAD", STREAM, {}, 200, {"content-type": "text/event-stream"}),
    "13.1.2: If-None-Match": ("GET", STATUS, {"if-none-match": "*"}, 304, {"etag": '".*"'}),
    "15.3.5: 204": ("GET", "/api/sessions/done/status/stream", {"last-event-id": "DONE"}, 204, {}),
    "15.5.5: nothing is there": ("GET", "/nothing", {}, 404, {}),
    "15.5.6: a method that is not allowed": ("DELETE", "/health", {}, 405, ALLOW),
    "15.5.15: a target that is too long": ("GET", "/" + "x" * MAX_HEAD, {}, 414, {}),
    "15.5.20: a Host of others": ("GET", "/health", {":authority": "evil.example"}, 421, {}),
    "6.5.7 of RFC 6585: fields that are too large": ("GET", "/health", {"x": "x" * MAX_HEAD}, 431, {}),
}


@pytest.mark.parametrize("name", HTTP2_CASES)
async def test_http2(autojump_clock, nursery, name):
    method, path, headers, status, fields = HTTP2_CASES[name]
    harness = ServerHarness(nursery)
    await harness.tracker.update("s", progress=1)
    await harness.tracker.update("done", status="done")
    done = str((await harness.tracker.get("done")).cursor)
    client = Client(harness.connect().stream)
    headers = {key: value.replace("DONE", done) for key, value in headers.items()}
    number = await client.request(method, path, headers.items())
    await client.until(lambda: number in client.ended)
    assert client.status[number] == str(status)
    assert is_date(client.headers[number]["date"])
    for field, pattern in fields.items():
        assert re.fullmatch(pattern, client.headers[number][field])
    if method == "HEAD" or status in (204, 304):
        assert client.body[number] == b""
    await client.stream.aclose()
