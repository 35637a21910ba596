"""``sseserve doctor`` without a proxy: its command, what it says of a server, and how it judges."""

from __future__ import annotations

import gzip
import json
import re
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest
import trio
from certificates import Authority
from click.testing import CliRunner
from processes import Program, run_server
from tokens import SECRET, make_token

import sseserve
from sseserve.cli import main
from sseserve.client.doctor import Report, diagnose, render
from sseserve.client.doctor.judge import CURSOR, Check, judge
from sseserve.client.doctor.proxies import Change, Proxy, changes, recognize
from sseserve.client.doctor.records import (
    Arrival,
    Body,
    Cors,
    Measured,
    Poll,
    Response,
    Seen,
    Socket,
    Stream,
    Target,
    Tls,
)
from sseserve.client.doctor.streams import open_stream
from sseserve.client.errors import CannotConnect

NOW = 1_800_000_000.0


def run_doctor(*arguments: str, **environ: str) -> tuple[int, str]:
    """Run the command; return its exit status and what it has written."""
    with Program(sys.executable, "-m", "sseserve", "doctor", *arguments, **environ) as program:
        return program.wait(), program.output


def usage_error(*arguments: str) -> str:
    """Return what is said about arguments that are wrong."""
    result = CliRunner().invoke(main, ["doctor", *arguments])
    assert result.exit_code == 2, result.output
    return result.output


def test_a_server_without_a_proxy():
    """All is ok, as a table without colors, and as JSON; nothing is stored."""
    with run_server(heartbeat=1, cors_origins="https://app.example.com") as url:
        status, output = run_doctor(url, "--idle", "1", "--origin", "https://app.example.com")
        assert status == 0, output
        title, empty, *lines = output.splitlines()
        assert title.startswith(f"{url}: sseserve ")
        assert empty == ""
        assert {line.split()[0] for line in lines} == {"ok"}, output
        assert "\x1b" not in output
        status, output = run_doctor(url, "--json", "--idle", "1")
    assert status == 0
    report = json.loads(output)
    assert report["url"] == url
    assert report["proxies"] == []
    assert {check["status"] for check in report["checks"]} == {"ok", "not checked"}


def test_exit_statuses():
    """1: a problem; 2: wrong arguments; 3: no such server."""
    with run_server(heartbeat=1) as url:
        status, output = run_doctor(url, "--idle", "1", "--origin", "https://app.example.com")
        assert (status, "SSESERVE_CORS_ORIGINS=https://app.example.com" in output) == (1, True)
        status, output = run_doctor(f"{url}/prefix")
        assert (status, "has no /prefix/api/diagnostics" in output) == (3, True)
    for wrong in (["--idle", "0.5"], ["--idle", "3601"], ["--origin", "a.example"], ["--token", "a b"]):
        assert wrong[0] in usage_error(url, *wrong)
    for wrong_url in ("127.0.0.1", "ftp://127.0.0.1", "http://", "http://a/?b", "http://a:b", "http://a:0"):
        assert "is not a server URL" in usage_error(wrong_url)
    status, output = run_doctor(url)
    assert (status, output.count("\n")) == (3, 1)
    assert "cannot connect" in output


def test_tokens():
    """Any token will do; without one, or with a wrong one, it says what is missing."""
    with run_server(heartbeat=1, jwt_key=SECRET) as url:
        status, output = run_doctor(url, "--idle", "1", SSESERVE_TOKEN=make_token(sub="ann"))
        assert status == 0, output
        assert "Last-Event-ID, Cookie, Authorization reach the server" in output
        status, output = run_doctor(url)
        assert (status, "give one with --token or SSESERVE_TOKEN" in output) == (3, True)
        wrong = make_token(sub="ann", key="another-secret-of-thirty-two-bytes!")
        status, output = run_doctor(url, SSESERVE_TOKEN=wrong)
        assert (status, "rejected the request with 401" in output) == (3, True), output


async def test_tls(tmp_path):
    """It verifies the certificate before it sends anything, and says what browsers get."""
    authority = Authority()
    certificate, key = authority.issue().write(tmp_path)
    ca = authority.write(tmp_path)
    async with sseserve.serve(port=0, tls_cert=str(certificate), tls_key=str(key), heartbeat=1) as server:
        url = f"https://127.0.0.1:{server.port}"
        report = await diagnose(url, ca=str(ca), idle=1)
        checks = {check.name: check for check in report.checks}
        assert not report.has_problems
        assert checks["TLS"].text.startswith("TLSv1.3; the certificate is valid until ")
        assert checks["HTTP version"].text == "HTTP/2 here, HTTP/1.1 at the server"
        report = await diagnose(url)
        assert report.has_problems
        assert report.checks[0].name == "TLS"
        assert report.checks[0].text.startswith("the certificate is not valid: ")
        assert "everything else" in render(report, color=False)


@pytest.mark.parametrize(("held", "status"), [(2, "ok"), (3, "problem")])
async def test_a_body_that_was_delayed_is_sent_again(nursery, held, status):
    """A busy machine may delay one or two; what delays every body is a proxy."""

    async def copy(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some(65536):
                await sink.send_all(data)

    async def pass_on(client: trio.SocketStream) -> None:
        nonlocal held
        async with client, await trio.open_tcp_stream("127.0.0.1", server.port) as upstream:
            data = await client.receive_some(65536)
            if b"chunked" in data and held:
                held -= 1
                while not data.endswith(b"0\r\n\r\n"):
                    data += await client.receive_some(65536)
            await upstream.send_all(data)
            async with trio.open_nursery() as both:
                both.start_soon(copy, client, upstream)
                await copy(upstream, client)
                both.cancel_scope.cancel()

    async with sseserve.serve(port=0, heartbeat=1) as server:
        listeners = await nursery.start(partial(trio.serve_tcp, pass_on, 0, host="127.0.0.1"))
        report = await diagnose(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}", idle=1)
        assert {check.name: check.status for check in report.checks}["publishing"] == status
        assert not held
        nursery.cancel_scope.cancel()


@contextmanager
def fake_server(status: int, headers: dict[str, str], body: Callable[[str], str]) -> Iterator[str]:
    """Run a server that responds to everything alike; ``body`` gets the ``Host`` of a request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = body(self.headers["Host"]).encode()
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def error(code: str, message: str) -> str:
    return json.dumps({"error": {"code": code, "message": message, "request_id": "a"}})


@pytest.mark.parametrize(
    ("status", "headers", "body", "message"),
    [
        (502, {"Server": "nginx/1.22.1"}, "", "nginx 1.22.1 answers with 502: it does not reach the server"),
        (301, {"Location": "https://a.example/api/diagnostics"}, "", "redirects to https://a.example: give"),
        (404, {}, "<h1>Not Found</h1>", "answers with 404, and not as sseserve does"),
        (200, {}, "{}", "answers with 200, and not as sseserve does"),
        (429, {}, error("too_many_requests", "slow down"), "with 429: slow down"),
    ],
)
async def test_other_servers(status, headers, body, message):
    """It says who has answered, and what that means."""
    with fake_server(status, headers, lambda _host: body) as url, pytest.raises(CannotConnect) as caught:
        await diagnose(url)
    assert message in str(caught.value)


async def test_a_proxy_that_removes_the_token():
    """The server says that it has got none."""
    headers = {"Server": "nginx", "WWW-Authenticate": "Bearer"}
    with fake_server(401, headers, lambda _host: error("unauthorized", "m")) as url:
        report = await diagnose(url, token="a.b.c")
    check = report.checks[0]
    assert (check.name, check.status) == ("request headers", "problem")
    line = "proxy_set_header Authorization $http_authorization;"
    assert check.changes == (Change("nginx", "location", (line,)),)


@pytest.mark.parametrize(
    ("name", "line"),
    [("{}", "SSESERVE_ALLOWED_HOSTS=127.0.0.1"), ("backend", "proxy_set_header Host $http_host;")],
)
async def test_a_host_that_is_not_allowed(name, line):
    """Either the server does not know the name, or a proxy has sent another one."""

    def body(host: str) -> str:
        return error("host_not_allowed", f"{name.format(host)!r} is not a host of this server")

    with fake_server(421, {"Server": "nginx"}, body) as url:
        report = await diagnose(url)
    check = report.checks[0]
    assert (check.name, [line for change in check.changes for line in change.lines]) == ("Host", [line])
    assert report.has_problems


# Hostile and broken servers

SEEN = Seen(
    id="a",
    instance="i",
    version="1",
    time=NOW,
    http_version="1.1",
    host="a.example",
    address="192.0.2.1",
    proxy="",
    proxy_header="",
    fields={"last-event-id": CURSOR},
    names=["host", "last-event-id", "cookie"],
    heartbeat=30.0,
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
HOSTILE = {
    "closes": b"",
    "no HTTP": b"\0\xff" * 100,
    "half a head": b"HTTP/1.1 200 OK\r\nContent-",
    "no body": HEAD + b"Content-Length: 9\r\n\r\n",
    "a wrong chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "no gzip": HEAD + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "wrong events": HEAD
    + b'\r\nevent: request\ndata: {"time":"x"}\n\nevent: probe\ndata: [1]\n\nevent: probe\ndata: {\n\n',
    "wrong times": HEAD
    + b'\r\nevent: probe\ndata: {"time":1e308}\n\nevent: probe\ndata: {"time":-1e308}\n\n',
    "without end": HEAD + b"\r\n" + b": x\n" * 500_000,
    "a bomb": HEAD + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(50_000_000)),
    "wrong frames": UPGRADED + b"\x81\x05hello\x82\xff" + bytes(100),
    "masked frames": UPGRADED + b"\x81\x85" + bytes(9),
    "interim": b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
    "JSON": b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n" + b'{"parts":[[1,2]]}',
}


async def test_hostile_servers(monkeypatch, nursery):
    """Whatever a server sends to any request but the first, there is a report, and in time."""
    for module in ("measure", "streams", "wire"):
        for constant in ("SLACK", "CONTINUE"):
            name = f"sseserve.client.doctor.{module}"
            monkeypatch.setattr(sys.modules[name], constant, 0.3, raising=False)
    content = msgspec.json.encode(SEEN)
    first = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)
    reports: dict[str, Report] = {}

    async def diagnose_one(name: str) -> None:
        is_first = True

        async def serve(stream: trio.SocketStream) -> None:
            nonlocal is_first
            data, is_first = (first if is_first else HOSTILE[name]), False
            with suppress(trio.BrokenResourceError):
                async with stream:
                    await stream.receive_some(65536)
                    await stream.send_all(data)
                    if data:
                        await stream.receive_some(65536)

        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        reports[name] = await diagnose(url, idle=0.1, origin="https://a.example")

    with trio.fail_after(30):
        async with trio.open_nursery() as all_of_them:
            for name in HOSTILE:
                all_of_them.start_soon(diagnose_one, name)
    nursery.cancel_scope.cancel()
    assert reports.keys() == HOSTILE.keys()
    for report in reports.values():
        assert report.has_problems
        render(report, color=True)


async def test_large_responses(nursery):
    """No more of a stream is read than is needed, and no more of it decompressed."""
    sent = 0
    bomb = gzip.compress(bytes(1 << 26))

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal sent
        is_compressed = b"gzip" in await stream.receive_some(65536)
        with suppress(trio.BrokenResourceError):
            async with stream:
                if is_compressed:
                    await stream.send_all(HEAD + b"Content-Encoding: gzip\r\n\r\n" + bomb)
                    return
                await stream.send_all(HEAD + b"\r\n")
                while True:
                    await stream.send_all(bytes(1 << 16))
                    sent += 1 << 16

    listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
    port = listeners[0].socket.getsockname()[1]
    target = Target("http", "127.0.0.1", port, f"127.0.0.1:{port}", "")
    await open_stream(target, [])
    assert sent < 1 << 25
    tracemalloc.start()
    await open_stream(target, [("Accept-Encoding", "gzip")])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24
    nursery.cancel_scope.cancel()


# Judging


def stream(delays: list[float], *, response: Response | None = None, **more: Any) -> Stream:
    """A stream of events that were sent a second apart."""
    arrivals = [Arrival(NOW + number, NOW + number + delay) for number, delay in enumerate(delays)]
    head = Response(200, "1.1", [], id="a") if response is None else response
    return Stream(response=head, seen=SEEN, arrivals=arrivals, end="complete", finished=True, **more)


def measured(**more: Any) -> Measured:
    """What was measured of a server when all is ok, but for ``more``."""
    fine = {
        "target": Target("https", "a.example", 443, "a.example", ""),
        "now": NOW,
        "origin": None,
        "has_token": False,
        "idle": 30.0,
        "first": Response(200, "1.1", [], id="a"),
        "seen": SEEN,
        "offset": 0.0,
        "round_trip": 0.01,
        "tls": Tls("TLSv1.3", NOW + 90 * 86_400, "h2"),
        "asked": stream([0.0] * 5),
        "plain": stream([0.0] * 5),
        "twin": stream([0.0] * 5),
        "quiet": stream([0.0]),
        "socket": Socket(101, SEEN, [Arrival(NOW, NOW)], ponged=True, end="complete", finished=True),
        "poll": Poll(200, 30.0),
        "body": Body(200, [(0.3, 3), (0.6, 3), (0.9, 3)], continued=True),
        "repeated": [(Response(200, "1.1", [], id="a"), SEEN)],
        "noticed": True,
    }
    return Measured(**fine | more)


def findings(**more: Any) -> dict[str, Check]:
    """The checks that are not ok."""
    report = judge("https://a.example", measured(**more))
    return {check.name: check for check in report.checks if check.status != "ok" and check.name != "CORS"}


def head(*fields: tuple[str, str], status: int = 200) -> Response:
    return Response(status, "1.1", list(fields), id="a")


OTHER = msgspec.structs.replace(SEEN, id="b")


@pytest.mark.parametrize(
    ("changed", "name", "status", "text"),
    [
        ({}, None, "", ""),
        # TLS and HTTP versions
        ({"tls": Tls("TLSv1.3", NOW + 5 * 86_400, "h2")}, "TLS", "warning", "5 days"),
        ({"tls": None, "target": Target("http", "a.example", 80, "a.example", "")}, None, "", ""),
        ({"tls": Tls("TLSv1.3", NOW + 9e6, "http/1.1")}, "HTTP version", "warning", "HTTP/1.1 here"),
        # Buffering: late by less than LATE more than a response, or by more; of most events, or of some
        ({"plain": stream([0.09] * 5)}, None, "", ""),
        ({"plain": stream([0.5] * 5, latency=0.41)}, None, "", ""),
        ({"plain": stream([0.5] * 5, latency=0.38)}, "buffering", "problem", "0.12 s late"),
        ({"plain": stream([0.12] * 5)}, "buffering", "problem", "0.12 s late"),
        ({"plain": stream([0.0, 0.5, 0.0, 0.5, 0.0])}, None, "", ""),
        ({"plain": stream([4.0, 3.0, 2.0, 1.0, 0.0])}, "buffering", "problem", "5 events came together"),
        ({"plain": stream([0.5] * 5), "offset": -0.5}, None, "", ""),
        ({"plain": stream([])}, "buffering", "problem", "cut before its first event"),
        ({"plain": Stream()}, "buffering", "problem", "no response"),
        ({"plain": stream([], response=head(status=502))}, "buffering", "problem", "status 502"),
        # Compression: only of who accepts it, of all, and with delays
        (
            {"asked": stream([0.0] * 5, response=head(("content-encoding", "gzip")))},
            "compression",
            "warning",
            "(gzip)",
        ),
        (
            {"asked": stream([4.0, 3.0, 2.0, 1.0, 0.0], response=head(("content-encoding", "gzip")))},
            "compression",
            "problem",
            "late",
        ),
        (
            {"plain": stream([0.0] * 5, response=head(("content-encoding", "br")))},
            "compression",
            "warning",
            "(br), also unasked",
        ),
        ({"asked": stream([0.0] * 5, response=head(("content-encoding", "identity")))}, None, "", ""),
        # Silence: tried for too short a time, cut before a heartbeat, or after
        ({"idle": 5.0}, "idle cut-off", "not checked", "none within 5 s"),
        (
            {"quiet": Stream(response=head(), end="cut", silence=10.0)},
            "idle cut-off",
            "problem",
            "streams are cut after 10.0 s",
        ),
        (
            {"quiet": Stream(response=head(), end="complete", silence=10.0)},
            "idle cut-off",
            "problem",
            "as if they were complete",
        ),
        ({"quiet": Stream(response=head(), end="cut", silence=31.0), "idle": 60.0}, None, "", ""),
        ({"poll": Poll(504, 10.0)}, "idle cut-off", "problem", "long-polls are cut after 10.0 s"),
        ({"poll": Poll(504, 31.0), "idle": 60.0}, "idle cut-off", "problem", "long-polls"),
        ({"poll": Poll(429, 0.0)}, None, "", ""),
        (
            {"socket": Socket(101, SEEN, [Arrival(NOW, NOW)], ponged=True, end="cut", silence=10.0)},
            "idle cut-off",
            "problem",
            "WebSockets are cut after 10.0 s",
        ),
        # WebSockets
        ({"socket": Socket(426)}, "WebSocket", "problem", "answered with 426"),
        ({"socket": Socket()}, "WebSocket", "problem", "not answered"),
        ({"socket": Socket(101)}, "WebSocket", "problem", "no event"),
        ({"socket": Socket(101, SEEN, [Arrival(NOW, NOW)], finished=True)}, "WebSocket", "problem", "ping"),
        ({"socket": Socket(429)}, "WebSocket", "not checked", "limit"),
        # Bodies
        ({"body": Body()}, "publishing", "problem", "not answered"),
        ({"body": Body(411)}, "publishing", "problem", "411"),
        ({"body": Body(200, [(0.9, 9)], continued=True)}, "publishing", "problem", "together"),
        ({"body": Body(200, [(0.3, 3), (0.9, 6)], continued=False)}, "publishing", "warning", "100-continue"),
        # Fields
        ({"asked": Stream(response=head())}, "request headers", "not checked", ""),
        ({"has_token": True}, "request headers", "problem", "Authorization does not"),
        ({"seen": msgspec.structs.replace(SEEN, host="b")}, "Host", "problem", "as b"),
        # Addresses
        (
            {"seen": msgspec.structs.replace(SEEN, fields={"forwarded": "for=192.0.2.9"})},
            "client address",
            "warning",
            "every client counts as 192.0.2.1",
        ),
        ({"first": head(("server", "nginx"))}, "client address", "warning", "every client"),
        (
            {"first": head(("server", "nginx")), "seen": msgspec.structs.replace(SEEN, proxy="10.0.0.1")},
            None,
            "",
            "",
        ),
        (
            {
                "first": head(("server", "nginx")),
                "seen": msgspec.structs.replace(SEEN, proxy_header="proxy-protocol"),
            },
            None,
            "",
            "",
        ),
        # Caches
        ({"repeated": [(head(), OTHER)]}, "cache", "problem", "an earlier request"),
        ({"twin": Stream(response=head(), seen=OTHER)}, "cache", "problem", "another client"),
        ({"repeated": []}, "cache", "not checked", ""),
        # Clocks
        ({"offset": 4.0, **dict.fromkeys(("plain", "asked"), stream([-4.0] * 5))}, None, "", ""),
        (
            {"offset": 6.0, **dict.fromkeys(("plain", "asked"), stream([-6.0] * 5))},
            "clock",
            "warning",
            "6.0 s ahead of",
        ),
        (
            {"offset": -31.0, **dict.fromkeys(("plain", "asked"), stream([31.0] * 5))},
            "clock",
            "problem",
            "31.0 s behind",
        ),
        # Leaving
        ({"noticed": False}, "leaving", "problem", "does not learn"),
        ({"noticed": None}, "leaving", "not checked", ""),
    ],
)
def test_judging(changed, name, status, text):
    """One thing is wrong, and that is all that it says."""
    found = findings(**changed)
    assert list(found) == ([] if name is None else [name])
    if name is not None:
        assert found[name].status == status
        assert text in found[name].text


ORIGIN = ("access-control-allow-origin", "https://p.example")
OWN = ("x-request-id", "a")
NGINX_ADDS = ["add_header Access-Control-Allow-"]


@pytest.mark.parametrize(
    ("preflight", "response", "status", "text", "lines"),
    [
        (head(ORIGIN, OWN), head(ORIGIN, OWN), "ok", "may read", []),
        (head((ORIGIN[0], "*"), OWN), head((ORIGIN[0], "*"), OWN), "ok", "may read", []),
        (head(OWN), head(OWN), "problem", "a preflight of", ["SSESERVE_CORS_ORIGINS=https://p.example"]),
        (
            head(ORIGIN, OWN),
            head(OWN),
            "problem",
            "a request of",
            ["SSESERVE_CORS_ORIGINS=https://p.example"],
        ),
        (
            head(ORIGIN, ORIGIN, OWN),
            head(ORIGIN, OWN),
            "problem",
            "twice",
            NGINX_ADDS,
        ),
        (head(status=405), head(ORIGIN, OWN), "problem", "a preflight", NGINX_ADDS),
        (None, None, "problem", "not answered", []),
        (head(ORIGIN, OWN, status=403), head(ORIGIN, OWN), "problem", "preflight", None),
        (
            head((ORIGIN[0], "https://q.example"), OWN),
            head(ORIGIN, OWN),
            "problem",
            "not allowed",
            [*NGINX_ADDS, "SSESERVE_CORS_ORIGINS=https://p.example"],
        ),
    ],
)
def test_cors(preflight, response, status, text, lines):
    """It tells the server's setting from what a proxy adds or answers itself."""
    found = measured(
        origin="https://p.example", cors=Cors(preflight, response), first=head(("server", "nginx/1.2"))
    )
    (check,) = [check for check in judge("https://a.example", found).checks if check.name == "CORS"]
    assert check.status == status
    assert text in check.text
    if lines is not None:
        assert [line for change in check.changes for line in (*change.lines, *change.remove)] == lines


@pytest.mark.parametrize(
    ("headers", "names", "page", "expected"),
    [
        ([("server", "nginx/1.22.1")], [], "", ["nginx 1.22.1"]),
        ([("server", "openresty/1.21")], [], "", ["nginx 1.21"]),
        ([("server", "Apache/2.4.71 (Debian)")], [], "", ["Apache httpd 2.4.71"]),
        ([("server", "Caddy")], [], "", ["Caddy"]),
        ([("via", "1.1 varnish (Varnish/7.1)")], [], "", ["Varnish 7.1"]),
        ([("via", "1.1 google")], [], "", ["Google Cloud"]),
        ([("server", "cloudflare"), ("cf-ray", "1")], [], "", ["Cloudflare"]),
        ([("server", "awselb/2.0")], ["x-amzn-trace-id"], "", ["AWS load balancer 2.0"]),
        ([], ["x-varnish"], "", ["Varnish"]),
        ([("server", "envoy"), ("via", "1.1 varnish")], [], "", ["Envoy", "Varnish"]),
        ([], [], "HTTP/1.1 400 Bad Request\r\nServer: nginx\r\n\r\n<h1>", ["nginx"]),
        (
            [],
            [],
            "HTTP/1.1 400 A\r\n\r\n<h1>400 Bad request</h1>\nYour browser sent an invalid request.\n",
            ["HAProxy"],
        ),
        ([("server", "Microsoft-IIS/10.0")], [], "", []),
        ([], [], "", []),
    ],
)
def test_recognizing_proxies(headers, names, page, expected):
    """By their fields in either direction, and by what they answer to what is no request."""
    assert list(map(str, recognize([headers], names, page))) == expected


@pytest.mark.parametrize("kinds", [(), ("cloudflare",)])
def test_a_proxy_that_is_not_known(kinds):
    """Then the lines of all common ones are shown."""
    shown = {change.proxy for change in changes("buffering", [Proxy(kind) for kind in kinds])}
    assert shown == {"nginx", "haproxy", "caddy", "apache", "varnish"}


def test_what_a_server_sends_cannot_control_the_terminal():
    """Colors are of the command only."""
    seen = msgspec.structs.replace(SEEN, host="\x1b[31mred\r\nnew line", version="\x1b]0;title\x07")
    report = judge("https://a.example", measured(seen=seen))
    plain = render(report, color=False)
    assert not {"\x1b", "\r", "\x07"} & set(plain)
    colored = render(report, color=True)
    assert set(re.findall(r"\x1b\[\d*m|\x1b", colored)) <= {
        "\x1b[0m",
        "\x1b[2m",
        "\x1b[31m",
        "\x1b[32m",
        "\x1b[33m",
    }
    assert len(colored.splitlines()) == len(plain.splitlines())
