"""What a user does first, with the command that UNDER_TEST names: the one-file binary, or an installed one.

    UNDER_TEST=dist/sseserve pytest tests/test_smoke.py

Without it, the command of the checkout. Nothing here imports the package: the command has what it needs.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from certificates import Authority
from playwright.sync_api import expect
from processes import Chromium, Program
from tokens import SECRET, private_key, private_pem, public_pem

COMMAND = shlex.split(os.environ.get("UNDER_TEST", f"{sys.executable} -m sseserve"))
COMMAND[0] = str(Path(COMMAND[0]).absolute())


PAGES = (
    "/",
    "/dashboard",
    "/docs",
    "/static/style.css",
    "/openapi.json",
    "/asyncapi.json",
    "/metrics",
    "/health",
)


def run(*arguments: object, **environ: str) -> str:
    """Run a command that must succeed; return its output."""
    command = [*COMMAND, *map(str, arguments)]
    result = subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 0, result
    return result.stdout


def serve(*arguments: object, **environ: str) -> Program:
    return Program(*COMMAND, "serve", "--port", "0", *map(str, arguments), **environ)


def url_of(server: Program) -> str:
    return server.wait_for_output(r"serving at (\S+?)( with \d workers)?$")[1]


def test_version():
    """It knows its own."""
    assert run("--version").startswith("sseserve, version 0.")


def test_demo_in_a_browser():
    """Its page shows the job over every transport; SIGTERM ends it with status 0."""
    with Program(*COMMAND, "demo", SSESERVE_DRAIN="1") as server, Chromium() as chromium:
        url = server.wait_for_output(r"at (http\S+)$")[1]

        def scenario(page):
            page.goto(url)
            page.get_by_role("button", name="Start demo job").click()
            for card in page.locator(".subscription").all():
                expect(card.locator("[data-part=state]")).to_have_text("connected")
                expect(card.locator("[data-part=events]")).not_to_have_text("0")
            return page.locator(".subscription").count()

        assert chromium.visit(scenario) == (4, [])
        assert server.wait(signal.SIGTERM) == 0, server.output


def test_pages_and_descriptions():
    """Every file that is not a module is there."""
    with serve() as server, httpx.Client(base_url=url_of(server)) as client:
        for path in PAGES:
            assert client.get(path).status_code == 200, path
        assert client.get("/openapi.json").json()["info"]["version"] in run("--version")


def test_clients(tmp_path):
    """The commands publish and watch over each transport; a stream is told to come back on SIGTERM."""
    with serve(SSESERVE_DRAIN="1") as server:
        url = url_of(server)
        updates = tmp_path / "updates.ndjson"
        updates.write_text('{"progress": 10}\n{"progress": 20}\n')
        assert json.loads(run("publish", "job-1", "--server", url, "--ndjson", updates))["applied"] == 2
        run("publish", "job-1", "--server", url, "--status", "completed")
        for transport in ("sse", "ws", "poll"):
            output = run("watch", "job-1", "--server", url, "--json", "--transport", transport)
            assert json.loads(output.splitlines()[-1])["event"] == "complete"
        httpx.post(f"{url}/api/sessions/job-2/progress", json={"progress": 1}).raise_for_status()
        with httpx.stream("GET", f"{url}/api/sessions/job-2/status/stream") as response:
            lines = response.iter_lines()
            while not next(lines).startswith("data:"):
                pass
            server.signal(signal.SIGTERM)
            assert any(line.startswith("retry:") for line in lines)
        assert server.wait() == 0, server.output


def test_sqlite(tmp_path):
    """What was acknowledged is there after a SIGKILL."""
    path = tmp_path / "logs.db"
    with serve("--engine", f"sqlite:{path}") as server:
        httpx.post(f"{url_of(server)}/api/sessions/s/progress", json={"progress": 7}).raise_for_status()
        server.wait(signal.SIGKILL)
    with serve("--engine", f"sqlite:{path}") as server:
        assert httpx.get(f"{url_of(server)}/api/sessions/s/status").json()["progress"] == 7
        assert server.wait(signal.SIGTERM) == 0
    assert '"s"' in run("log", "export", path)


def test_redis_and_workers(redis):
    """Two processes of one server, and a third elsewhere, share the logs."""
    with serve("--engine", redis.url, "--workers", "2") as server, serve(REDIS_URL=redis.url) as other:
        httpx.post(f"{url_of(server)}/api/sessions/s/progress", json={"progress": 7}).raise_for_status()
        assert httpx.get(f"{url_of(other)}/api/sessions/s/status").json()["progress"] == 7
        assert (server.wait(signal.SIGTERM), other.wait(signal.SIGTERM)) == (0, 0), server.output


@pytest.mark.parametrize("algorithm", ["HS256", "RS256", "EdDSA"])
def test_tokens(algorithm, tmp_path):
    """Those of the command open a server that has the key, and nobody else gets in."""
    key = tmp_path / "key"
    signing = tmp_path / "signing"
    key.write_text(SECRET if algorithm == "HS256" else public_pem(private_key(algorithm)))
    signing.write_text(SECRET if algorithm == "HS256" else private_pem(private_key(algorithm)))
    token = run("token", "--subject", "ann", "--role", "service", "--key", f"file:{signing}").strip()
    with serve(SSESERVE_JWT_KEY=f"file:{key}") as server:
        url = f"{url_of(server)}/api/sessions/s/progress"
        assert httpx.post(url, json={"progress": 1}).status_code == 401
        headers = {"Authorization": f"Bearer {token}"}
        assert httpx.post(url, json={"progress": 1}, headers=headers).status_code == 202
        assert server.wait(signal.SIGTERM) == 0


def test_tls(tmp_path):
    """A server with a certificate, over HTTP/1.1 and HTTP/2, and the client's command."""
    authority = Authority()
    ca = authority.write(tmp_path)
    certificate, key = authority.issue().write(tmp_path)
    with serve("--tls-cert", certificate, "--tls-key", key) as server:
        url = url_of(server)
        assert url.startswith("https:")
        context = ssl.create_default_context(cafile=ca)
        for http2 in (False, True):
            with httpx.Client(verify=context, http2=http2) as client:
                response = client.post(f"{url}/api/sessions/s/progress", json={"status": "completed"})
                assert response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        assert "completed" in run("watch", "s", "--server", url, "--ca", ca)
        assert server.wait(signal.SIGTERM) == 0


def test_traces():
    """They are exported to where the standard variable says."""
    with socket.create_server(("127.0.0.1", 0)) as collector:
        collector.settimeout(20)
        endpoint = f"http://127.0.0.1:{collector.getsockname()[1]}"
        with serve(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, OTEL_BSP_SCHEDULE_DELAY="10") as server:
            httpx.post(f"{url_of(server)}/api/sessions/s/progress", json={"progress": 7}).raise_for_status()
            connection, _ = collector.accept()
            with connection:
                assert connection.recv(4096).startswith(b"POST /v1/traces ")
            assert "Traceback" not in server.output


def test_doctor():
    """Nothing is wrong between it and its own server."""
    with serve() as server:
        assert "WebSocket" in run("doctor", url_of(server), "--idle", "1")


def test_settings(tmp_path):
    """The template is a file that the server accepts; a wrong one is refused with status 2."""
    path = tmp_path / "sseserve.toml"
    path.write_text(run("config", "template"))
    with serve("--config", path) as server:
        url_of(server)
        assert server.wait(signal.SIGTERM) == 0
    run("config", "check", path)
    path.write_text("portt = 1\n")
    result = subprocess.run([*COMMAND, "serve", "--config", str(path)], capture_output=True, text=True)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert "did you mean 'port'?" in result.stderr
