"""``sseserve doctor`` without a proxy: its command, what it says of a server, and how it judges."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner
from processes import Program, run_server
from tokens import SECRET, make_token

from sseserve.cli import main
from sseserve.client.doctor import diagnose
from sseserve.client.doctor.proxies import Change
from sseserve.client.errors import CannotConnect


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
