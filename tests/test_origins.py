"""The pages of other origins, and DNS rebinding: over every HTTP version, and for every route."""

from __future__ import annotations

from contextlib import nullcontext

import httpx
import pytest
from harness import ServerHarness
from raw_client import HANDSHAKE, RawWebSocket
from test_http2 import Server

import sseserve
from sseserve import Grant
from sseserve.errors import BadRequest, Forbidden, HostNotAllowed
from sseserve.http.messages import Request
from sseserve.http.origins import Origins
from sseserve.http.routes import ROUTES
from sseserve.http.routing import Kind

EVIL = "https://evil.example"
CHANGING = [route for route in ROUTES if route.method != "GET"]


@pytest.fixture
async def harness(nursery):
    return ServerHarness(nursery)


def check(host: str | None, origin: str | None = None, method: str = "POST", *, is_open=True, at="127.0.0.1"):
    headers = [(b"host", (host or "").encode())] if host is not None else []
    headers += [] if origin is None else [(b"origin", origin.encode())]
    path = "/api/sessions/a/progress" if method == "POST" else "/api/sessions/a/status"
    request = Request.create(method, path, headers=headers)
    match = ROUTES.match(method, path)
    assert match is not None
    allowed = ("Listed.example", ".below.example")
    Origins([at], allowed_hosts=allowed, cors_origins=("https://page.example", "*")).check(
        request, match, is_open=is_open
    )


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("host", "at_loopback", "elsewhere"),
    [
        ("localhost", True, True),
        ("LOCALHOST:8000", True, True),
        ("localhost.", True, True),
        ("127.0.0.1:8000", True, True),
        ("127.1.2.3", True, True),
        ("[::1]:8000", True, True),
        ("listed.example:8000", True, True),
        ("below.example", True, True),
        ("a.below.example", True, True),
        (None, True, True),  # HTTP/1.0; a browser always sends one
        ("192.168.1.5:8000", False, True),
        ("[fe80::1]", False, True),
        ("workstation:8000", False, True),
        ("0.0.0.0:8000", False, True),
        ("evil.example", False, False),
        ("a.listed.example", False, False),
        ("notbelow.example", False, False),
        ("localhost.evil.example", False, False),
        ("127.0.0.1.evil.example", False, False),
        ("a..b", False, False),
        ("x" * 64 + ".example", False, False),
    ],
)
def test_hosts(method, host, at_loopback, elsewhere):
    """A name that somebody else can make resolve to this server is allowed only if it is listed."""
    for at, allowed in (("127.0.0.1", at_loopback), ("localhost", at_loopback), ("0.0.0.0", elsewhere)):
        with nullcontext() if allowed else pytest.raises(HostNotAllowed, match="allowed_hosts"):
            check(host, method=method, at=at)
    check("10.0.0.5:8000", at="10.0.0.5")
    check("server.example", at="server.example")


@pytest.mark.parametrize("host", ["evil.example@localhost", "localhost/", "[::1", ":8000", "a b"])
def test_malformed_host(host):
    with pytest.raises(BadRequest, match="Host"):
        check(host)


def test_any_host():
    """``*`` allows every host, as for a server behind a proxy that checks them."""
    match = ROUTES.match("GET", "/health")
    assert match is not None
    for host in (b"evil.example", b"a b", b"["):
        request = Request.create("GET", "/health", headers=[(b"host", host)])
        Origins(["127.0.0.1"], allowed_hosts=("*",)).check(request, match, is_open=True)


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        (None, "localhost", True),
        ("http://localhost", "localhost", True),
        ("https://Listed.example", "listed.example", True),  # after a proxy that terminates TLS
        ("https://listed.example", "listed.example:443", True),
        ("https://listed.example:443", "listed.example", True),
        ("http://localhost:8000", "localhost:8000", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("https://page.example", "localhost", True),
        ("http://localhost", "localhost:8000", False),
        ("http://127.0.0.1:8000", "localhost:8000", False),
        ("https://localhost:444", "localhost", False),
        ("https://evil.example", "localhost", False),
        ("https://localhost.evil.example", "localhost", False),
        ("https://evil.example?localhost", "localhost", False),
        ("http://page.example", "localhost", False),
        ("null", "localhost", False),
        ("null", None, False),
        ("", None, False),
        ("http://localhost:99999", "localhost:99999", False),
        ("http://[", "localhost", False),
    ],
)
def test_the_origin_of_a_change(origin, host, allowed):
    """Listed origins, and that of the request's own host; with authentication ``*`` allows none."""
    with nullcontext() if allowed else pytest.raises(Forbidden, match=r"cors_origins.*with its port"):
        check(host, origin, is_open=False)
    check(host, origin, is_open=True)
    check(host, origin, "GET", is_open=False)


@pytest.mark.parametrize(
    ("site", "origin", "allowed"),
    [
        ("cross-site", None, False),
        ("same-site", None, False),
        ("none", None, True),
        ("same-origin", None, True),
        ("same-origin", "http://localhost", True),
        ("cross-site", "http://localhost", False),  # an http page of the host of an https server
        ("same-site", "http://localhost", False),
        ("cross-site", "https://page.example", True),  # listed
        ("same-origin", "https://evil.example", False),
        ("unknown", None, False),
    ],
)
async def test_what_a_browser_says_of_the_site(autojump_clock, nursery, site, origin, allowed):
    """A request that changes something and comes from another site is refused, with and without an Origin."""
    harness = ServerHarness(nursery, cors_origins=("https://page.example",))
    fields = [("Sec-Fetch-Site", site), *([] if origin is None else [("Origin", origin)])]
    expected = 400 if allowed else 403
    assert (await harness.post("/api/sessions/a/progress", b"", fields)).status == expected
    assert (await harness.get("/api/sessions/none/status", fields)).status == 404  # it changes nothing
    handshake = await harness.get("/api/sessions/none/status/ws", [*HANDSHAKE, *fields])
    assert handshake.status == (404 if allowed else 403)
    # And over HTTP/2.
    server = Server(nursery, cors_origins=("https://page.example",))
    headers = [(name.lower(), value) for name, value in fields]
    client, socket = await server.connect(), await server.connect()
    number = await client.request("POST", "/api/sessions/a/progress", [*headers, ("content-length", "0")])
    await client.until(lambda: number in client.ended)
    assert client.status[number] == str(expected)
    number = await socket.websocket("/api/sessions/none/status/ws", **dict(headers))
    await socket.until(lambda: number in socket.status)
    assert socket.status[number] == ("404" if allowed else "403")


@pytest.mark.parametrize("route", CHANGING, ids=lambda route: route.name)
@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/x-ndjson"])
async def test_a_page_of_another_origin_changes_nothing(autojump_clock, harness, route, content_type):
    """Whatever it sends; and a program, which has no origin, notices nothing."""
    await harness.tracker.update("a", progress=1)
    path = route.path.replace("{id}", "a").replace("{token}", "t")
    for origin in (EVIL, "null", "http://localhost:8001"):
        headers = [("Origin", origin), ("Content-Type", content_type)]
        response = await harness.request(route.method, path, b'{"progress": 50}', headers)
        assert (response.status, response.error["code"]) == (403, "forbidden")
    sessions = await harness.tracker.sessions()
    assert [(session.id, session.seq) for session in sessions] == [("a", 1)]
    for headers in ([], [("Origin", "http://localhost")]):
        response = await harness.request(route.method, path, b'{"progress": 50}', headers)
        assert response.status not in (403, 421)


@pytest.mark.parametrize("route", list(ROUTES), ids=lambda route: route.name)
async def test_a_request_for_another_host_gets_nothing(autojump_clock, harness, route):
    """421 in the shape of every error, and the message names the setting."""
    await harness.tracker.update("a", progress=1)
    path = route.path.replace("{id}", "a").replace("{name}", "style.css").replace("{token}", "t")
    for more in ([], HANDSHAKE if route.kind is Kind.SOCKET else [("Origin", "http://evil.example:8000")]):
        headers = [("Host", "evil.example:8000"), *more]
        body = None if route.method == "GET" else b'{"progress": 50}'
        response = await harness.request(route.method, f"{path}?session=a", body, headers)
        assert (response.status, response.error["code"]) == (421, "host_not_allowed")
        assert "SSESERVE_ALLOWED_HOSTS" in response.error["message"]
    assert (await harness.tracker.get("a")).seq == 1


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://evil.example/health", "localhost", 421),
        ("http://localhost/health", "evil.example", 200),
        ("HTTPS://[::1]:8000/health?a=http://evil.example", "evil.example", 200),
        ("http://localhost", "evil.example", 200),
        ("http://localhost@evil.example/health", "localhost", 400),
    ],
)
async def test_the_host_of_an_absolute_target(autojump_clock, harness, target, host, status):
    """It counts, whatever the Host field says (RFC 9112, section 3.2.2)."""
    assert (await harness.get(target, [("Host", host)])).status == status


async def test_hosts_and_origins_over_http_2(autojump_clock, nursery):
    """The same, for requests, streams and WebSockets."""
    server = Server(nursery)
    await server.tracker.update("a", progress=1)
    client = await server.connect()
    numbers = []
    for host in ("evil.example", "a..b", "x" * 64 + ".example", "caf\xe9"):
        numbers += [
            await client.request("GET", "/health", [(":authority", host)]),
            await client.request("GET", "/api/sessions/a/status/stream", [(":authority", host)]),
            await client.websocket(**{":authority": host}),
        ]
    await client.until(lambda: client.ended >= set(numbers))
    assert {client.status[number] for number in numbers} == {"421"}
    assert all(b'"host_not_allowed"' in client.body[number] for number in numbers)
    numbers = [
        await client.request("POST", "/api/sessions/a/progress", [("origin", EVIL)]),
        await client.request("DELETE", "/api/sessions/a", [("origin", "null")]),
        await client.websocket(origin=EVIL),
    ]
    await client.until(lambda: client.ended >= set(numbers))
    assert {client.status[number] for number in numbers} == {"403"}
    number = await client.websocket(origin="http://localhost")
    await client.until(lambda: client.body[number])
    assert client.status[number] == "200"
    assert (await server.tracker.get("a")).seq == 1


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("origin", [EVIL, "null", "http://localhost", None])
async def test_websocket_from_another_origin(autojump_clock, harness, is_open, origin):
    """403, with and without authentication: its page could read what runs on the visitor's machine."""

    async def authenticate(request):
        return Grant(subject="a", role="admin")

    await harness.tracker.update("a", progress=1)
    harness.app.admission.authenticate = None if is_open else authenticate
    headers = [*HANDSHAKE, *([] if origin is None else [("Origin", origin)])]
    if origin in ("http://localhost", None):
        socket = await RawWebSocket.open(harness.connect(), "a", headers=headers)
        assert (await socket.message())["event"] == "progress"
        return
    for session_id in ("a", "none"):
        response = await harness.get(f"/api/sessions/{session_id}/status/ws", headers=headers)
        assert (response.status, response.error["code"]) == (403, "forbidden")


async def test_a_server_on_every_address_is_reached_by_each():
    """By its addresses and the name in its network, and a listed name of a proxy."""
    async with (
        sseserve.serve(host="0.0.0.0", port=0, allowed_hosts=("jobs.example",), insecure=True) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client,
    ):
        allowed = {"192.0.2.1:80": 200, "box": 200, "jobs.example": 200, "evil.example": 421}
        for host, status in allowed.items():
            assert (await client.get("/health", headers={"Host": host})).status_code == status
