"""Tokens and tickets reach nobody but who has sent them: no log line, no error, no header and no metric."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from harness import ServerHarness
from processes import Program
from raw_client import HANDSHAKE
from test_http2 import Client as HTTP2Connection
from test_openapi import BODIES, path_of
from tokens import SECRET, make_token
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from sseserve import Action, Grant
from sseserve.http.routes import ROUTES
from sseserve.http.routing import Kind

TARGETS = [(route.method, path_of(route, "s"), route) for route in ROUTES]


def send(address: tuple[str, int], data: bytes) -> bytes:
    """Send bytes on a connection of their own; return what comes back within a moment, or to its end."""
    received = b""
    with socket.create_connection(address) as client:
        client.sendall(data)
        client.settimeout(0.2)
        try:
            while more := client.recv(65536):
                received += more
        except (TimeoutError, ConnectionResetError):
            pass
    return received


def malformed(token: str, ticket: str) -> list[bytes]:
    """Requests that cannot be parsed, each with the token and the ticket where something is wrong."""
    line = b"GET /api/sessions/s/status/stream?ticket=%b HTTP/1.1\r\nHost: localhost\r\n" % ticket.encode()
    field = b"Authorization: Bearer " + token.encode()
    return [
        line + field.replace(b":", b" :") + b"\r\n\r\n",
        line + field + b"\0\r\n\r\n",
        line + b" " + field + b"\r\n\r\n",
        line.replace(b"HTTP/1.1", b"HTTP/1.1 " + token.encode()) + b"\r\n",
        line.replace(b"GET", b"GET GET") + field + b"\r\n\r\n",
        line + b"Content-Length: " + token.encode() + b"\r\n\r\n",
        line + b"Transfer-Encoding: " + token.encode() + b"\r\n\r\n",
        line + b"Transfer-Encoding: chunked\r\n\r\n" + token.encode() + b"\r\n",
        line + b"Cookie: __Host-sseserve=" + token.encode() + b"\x7f\r\n\r\n",
        b"GET /" + token.encode() + b"?ticket=" + ticket.encode() + b"\r\n\r\n",
        line + field * 1000 + b"\r\n\r\n",
        token.encode() + b"\r\n\r\n",
    ]


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_output_of_a_server_has_a_token(form):
    """Valid and invalid ones, in every place of a request for every route, at the log level debug."""
    environ = {
        "SSESERVE_JWT_KEY": SECRET, "SSESERVE_LOG_LEVEL": "debug", "SSESERVE_LOG_FORMAT": form,
        "SSESERVE_CORS_ORIGINS": "https://page.example",
    }  # fmt: skip
    valid = make_token(role="admin", sub="root", jti="the-id")
    weak = make_token(sub="nobody")
    invalid = make_token("another-key-another-key-another-key-", sub="marked")
    garbage = "marked-garbage-0123456789"
    secrets = {SECRET, valid, weak, invalid, garbage}
    secrets |= {part for token in (valid, weak, invalid) for part in token.split(".")[1:]}
    received = []
    with Program(sys.executable, "-m", "sseserve", "serve", "--port", "0", **environ) as program:
        url = program.wait_for_output(r"serving at ([^\s\"]+)")[1]
        address = (urlsplit(url).hostname, urlsplit(url).port)
        with httpx.Client(base_url=url, trust_env=False) as client:
            admin = {"Authorization": f"Bearer {valid}"}
            client.post("/api/sessions", json={"session_id": "s"}, headers=admin)
            client.post("/api/sessions", json={"session_id": "t"}, headers=admin)

            def make_ticket() -> str:
                response = client.post("/api/tickets", json={"sessions": ["s"]}, headers=admin)
                secrets.add(response.json()["ticket"])
                return response.json()["ticket"]

            def note(response: httpx.Response) -> None:
                received.append(f"{response.headers}{response.text}".encode())

            for method, path, route in TARGETS:
                body = BODIES.get(route.name)
                for token in (valid, weak, invalid, garbage):
                    for headers in (
                        {"Authorization": f"Bearer {token}"},
                        {"Authorization": f"Basic {token}"},
                        {"Authorization": token},
                        {"Cookie": f"__Host-sseserve={token}", "Origin": "https://page.example"},
                        {"Cookie": f"__Host-sseserve={token}; __Host-sseserve={garbage}"},
                    ):
                        is_watched = route.kind in (Kind.STREAM, Kind.SOCKET)
                        if token == valid and (is_watched or route.name in ("delete", "ticket")):
                            continue
                        target = f"{path}?ticket={garbage}&state={form}&limit=1"
                        note(client.request(method, target, json=body, headers=headers))
            note(client.get(f"/api/sessions?limit=1&ticket={garbage}", headers=admin))
            for path in ("stream", "ws"):
                ticket = make_ticket()
                head = f"GET /api/sessions/s/status/{path}?ticket={ticket} HTTP/1.1\r\nHost: localhost\r\n"
                fields = "".join(f"{name}: {value}\r\n" for name, value in HANDSHAKE)
                data = f"{head}{fields if path == 'ws' else ''}\r\n".encode()
                received += [send(address, data), send(address, data)]
            received += [send(address, data) for data in malformed(valid, make_ticket())]
            with httpx.Client(base_url=url, http1=False, http2=True, trust_env=False) as http2:
                for headers in (admin, {"Authorization": garbage}, {"Cookie": f"__Host-sseserve={valid}"}):
                    note(http2.get(f"/api/sessions/none/status?ticket={garbage}", headers=headers))
                note(http2.get(f"/api/sessions/none/status/stream?ticket={make_ticket()}"))
            for path in ("/metrics", "/health", "/openapi.json"):
                note(client.get(path))
        assert program.wait(signal.SIGTERM) == 0
        output = program.output
    assert "401" in output
    assert b" 101 " in b"".join(received)
    for secret in secrets:
        assert secret not in output
        assert all(secret.encode() not in data for data in received)


@pytest.mark.parametrize("protocol", ["http/1.1", "h2"])
async def test_an_error_that_repeats_a_token_is_logged_without_it(autojump_clock, nursery, caplog, protocol):
    """That of the embedding program, and one of a handler; the traceback is there, and the token is not."""
    tokens = {"Bearer marked-but-good": Grant("ann", "admin")}

    async def authenticate(request):
        return tokens[request.headers.get("authorization") or request.headers["cookie"].partition("=")[2]]

    caplog.set_level(logging.DEBUG)
    harness = ServerHarness(nursery, authenticate=authenticate)

    async def get(path, **headers):
        if protocol == "http/1.1":
            return (await harness.get(path, headers.items())).status
        client, server = memory_stream_pair()
        nursery.start_soon(harness.app.connections.serve, server)
        connection = HTTP2Connection(client)
        number = await connection.request("GET", path, [(name.lower(), v) for name, v in headers.items()])
        await connection.until(lambda: number in connection.ended)
        return int(connection.status[number])

    path = "/api/sessions/s/status?ticket=marked%2Bticket"
    assert await get(path, Authorization="Bearer marked-and-bad") == 500
    assert await get(path, Cookie="session=marked-and-bad") == 500

    async def fail(*_args):
        raise RuntimeError(f"marked-but-good {tokens} marked+ticket")

    harness.tracker.engine.load = fail
    assert await get(path, Authorization="Bearer marked-but-good") == 500
    await wait_all_tasks_blocked()
    assert caplog.text.count("KeyError") == 2
    assert "RuntimeError" in caplog.text
    assert caplog.text.count("Traceback") == 3
    assert "[removed]" in caplog.text
    assert "marked" not in caplog.text


async def test_the_link_of_a_list_has_no_ticket(autojump_clock, nursery):
    """Of the query it repeats what the list has read."""
    harness = ServerHarness(nursery)
    for session_id in "abc":
        await harness.tracker.create(session_id)
    response = await harness.get("/api/sessions?limit=1&ticket=marked&state=queued&token=marked")
    assert "marked" not in response.headers["link"]
    assert "state=queued" in response.headers["link"]


@pytest.mark.parametrize("path", ["/", "/dashboard", "/static/style.css"])
async def test_a_page_tells_nobody_its_address(autojump_clock, nursery, path):
    """What it links to gets no referrer."""
    response = await ServerHarness(nursery).get(path)
    assert response.headers["referrer-policy"] == "no-referrer"


def test_what_is_shown_of_a_grant():
    """It holds no text of a token; ``trust`` is a part of a hash."""
    grant = Grant("ann", capabilities={Action.WATCH: ("*",)}, token_id="id")
    assert set(msgspec.structs.asdict(grant)) == {
        "subject", "role", "patients", "capabilities", "issuer", "token_id", "issued_at", "expires_at",
        "ticket", "trust",
    }  # fmt: skip
