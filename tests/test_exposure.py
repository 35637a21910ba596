"""Without authentication a server is reached from its own machine only, unless that is said."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from processes import ROOT, Program
from redis_server import RedisServer
from tokens import SECRET, make_token

import sseserve
from sseserve import Grant
from sseserve.config import Issuer
from sseserve.errors import ConfigError

ISSUERS = (Issuer(issuer="a", key=SECRET),)


async def admit(request):
    return Grant("root", "admin")


async def start(**options):
    """Start a server and stop it."""
    async with sseserve.serve(port=0, drain=0.1, **options):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "box.example"])
async def test_open_server_on_another_address_is_refused(host):
    """Before it listens: the message names the settings."""
    with pytest.raises(ConfigError, match=r"jwt_key \(SSESERVE_JWT_KEY\), jwks_url or issuers.*--insecure"):
        await start(host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "LocalHost"])
async def test_open_server_on_loopback(host, caplog):
    """It starts without a warning, with or without ``insecure``."""
    await start(host=host)
    await start(host=host, insecure=True)
    assert not caplog.records


@pytest.mark.parametrize(
    "options",
    [
        {"jwt_key": SECRET},
        {"jwks_url": "https://id.example.invalid/jwks"},
        {"issuers": ISSUERS},
        {"authenticate": admit},
    ],
    ids=lambda options: next(iter(options)),
)
async def test_server_with_authentication(options, caplog):
    """It may listen on any address."""
    await start(host="0.0.0.0", **options)
    assert "everybody" not in caplog.text


async def test_insecure_server_warns(caplog):
    """At each start."""
    for count in (1, 2):
        await start(host="0.0.0.0", insecure=True)
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert [record.name for record in warnings] == ["sseserve.server.checks"] * count
        assert "everybody who can reach '0.0.0.0' may do everything" in warnings[-1].getMessage()


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_commands(command):
    """The exit status is that of a wrong setting; with ``--insecure`` they serve, and say it."""
    arguments = [sys.executable, "-m", "sseserve", command, "--host", "0.0.0.0", "--port", "0"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("sseserve: without authentication everybody who can reach '0.0.0.0'")
    assert "--insecure" in result.stderr
    with Program(*arguments, "--insecure") as program:
        program.wait_for_output("may do everything")
        program.wait_for_output(r"http://\S+")
        assert program.wait(signal.SIGTERM) == 0


def test_workers_are_refused_together():
    """By the parent, before there is a worker or a port."""
    # In a process of its own, as it configures the log of the process.
    arguments = [sys.executable, "-m", "sseserve", "serve", "--port", "0", "--workers", "2"]
    environ = {**os.environ, "SSESERVE_ENGINE": "redis://127.0.0.1:1/0"}
    for changes, message in (
        ({"SSESERVE_HOST": "0.0.0.0"}, "--insecure"),
        ({"SSESERVE_JWT_KEY": "x"}, "secret of 1 bytes"),
    ):
        result = subprocess.run(
            arguments, cwd=ROOT, env=environ | changes, capture_output=True, text=True, timeout=20
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert message in result.stderr


def test_workers_with_a_key(redis):
    """Each verifies tokens; the warning of an insecure server is logged once."""
    arguments = [sys.executable, "-m", "sseserve", "serve", "--port", "0", "--workers", "2"]
    environ = {"SSESERVE_ENGINE": redis.url, "SSESERVE_HOST": "0.0.0.0"}
    with Program(*arguments, "--insecure", **environ) as program:
        program.wait_for_output("with 2 workers")
        assert program.output.count("may do everything") == 1
        assert program.wait(signal.SIGTERM) == 0
    with Program(*arguments, **environ, SSESERVE_JWT_KEY=SECRET) as program:
        port = int(program.wait_for_output(r"serving at http://0\.0\.0\.0:(\d+)")[1])
        statuses = set()
        for _ in range(16):
            with socket.create_connection(("127.0.0.1", port), 10) as client:
                client.sendall(b"GET /api/sessions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                statuses.add(client.makefile("rb").readline())
        assert statuses == {b"HTTP/1.1 401 Unauthorized\r\n"}
        assert program.wait(signal.SIGTERM) == 0
    assert SECRET not in program.output


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_is_logged(form, tmp_path):
    """Whatever clients do with their secrets, and the server with its own, at level debug with all it has."""
    key, password, header = "hunter2-" * 5, "redis-hunter2", "otel-hunter2"
    tokens = [make_token(key, role="admin", jti=str(number)) for number in range(2)]
    secrets = {key, password, header, "basic-hunter2", "url-hunter2"}
    secrets |= {token.rpartition(".")[2] for token in tokens}
    with RedisServer(tmp_path, user=f"app on >{password} ~* &* +@all") as redis:
        environ = {
            "SSESERVE_LOG_LEVEL": "debug",
            "SSESERVE_LOG_FORMAT": form,
            "SSESERVE_ACCESS_LOG": "true",
            "SSESERVE_JWT_KEY": key,
            "SSESERVE_ENGINE": f"redis://app:{password}@127.0.0.1:{redis.port}/0",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9/?key=url-hunter2",
            "OTEL_EXPORTER_OTLP_HEADERS": f"api-key={header}",
        }
        with Program(sys.executable, "-m", "sseserve", "serve", "--port", "0", **environ) as server:
            url = server.wait_for_output(r"serving at ([^\s\"]+)")[1]
            for http2, token in enumerate(tokens):
                with httpx.Client(base_url=url, http1=not http2, http2=bool(http2)) as client:
                    _use_secrets(client, token, secrets)
            host = url.removeprefix("http://")
            address = host.partition(":")[0], int(host.rpartition(":")[2])
            handshake = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            handshake += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            for target, more in (
                (f"http://admin:url-hunter2@{host}/api/sessions", ""),
                ("/api/sessions", f"Authorization: Bearer {token}\r\n bad\r\n"),
                (f"/api/sessions/s/status/ws?ticket={token}", handshake),
            ):
                request = f"GET {target} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n"
                with socket.create_connection(address) as connection:
                    connection.sendall(request.encode())
                    connection.recv(65536)
            redis.kill()  # what is said of a Redis that is away
            server.wait_for_output(r"cannot be used")
            server.wait(signal.SIGTERM)
            output = server.output
    assert output.count("request") > 20
    assert "stream ended" in output
    for secret in secrets:
        assert [line for line in output.splitlines() if secret in line] == []


def _use_secrets(client: httpx.Client, token: str, secrets: set[str]) -> None:
    """Make requests with secrets in all places where clients have them."""
    right = {"Authorization": f"Bearer {token}"}
    client.post("/api/sessions/s/progress", json={"progress": 5}, headers=right)
    for headers in (
        right,
        {"Authorization": "Basic basic-hunter2"},
        {"Authorization": f"{token} {token}"},
        {"Authorization": f"Bearer {token}x"},
        {"Cookie": f"__Host-sseserve={token}; other=basic-hunter2"},
    ):
        for path in ("/api/sessions", "/api/sessions/none/status", f"/api/sessions?token={token}"):
            client.get(path, headers=headers)
    for path in ("/api/sessions/s/status/stream", "/api/streams/sessions"):
        body = {"list": True} if path.endswith("sessions") else {"sessions": ["s"]}
        ticket = client.post("/api/tickets", json=body, headers=right).json()["ticket"]
        secrets.add(ticket)
        for _ in range(2):  # the second time it is used up
            with client.stream("GET", f"{path}?ticket={ticket}") as response:
                next(response.iter_raw())
    client.post("/api/tokens/refresh", headers=right)
    assert client.post("/api/revocations", json={"subject": "bob"}, headers=right).status_code == 204
