"""examples/deploy/nginx.conf in front of a real server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import httpx_sse
import pytest
import trio
from processes import ROOT, Program, run_server
from programs import require_program

from sseserve.client import watch

CONF = (ROOT / "examples" / "deploy" / "nginx.conf").read_text()
STREAM_PATHS = (
    "/api/sessions/s/status/stream",
    "/api/interaction/events/s",
    "/api/jobs/s/events",
    "/api/v1/jobs/s/events",
    "/api/v1/sessions/s/status/stream",
    "/api/streams?session=s",
    "/api/sessions/s/control",
)
# The main configuration, which includes the example's. All files that nginx writes are in the folder.
MAIN_CONF = """
{user}
worker_processes 1;
worker_shutdown_timeout 1s;
pid {folder}/pid;
error_log stderr notice;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    scgi_temp_path {folder}/scgi;
    uwsgi_temp_path {folder}/uwsgi;
    gzip on;
    gzip_types text/event-stream application/json;
    include {folder}/sseserve.conf;
}}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return bound.getsockname()[1]


@contextmanager
def nginx(folder: Path, upstream: str) -> Iterator[tuple[str, Program]]:
    """Run nginx with a copy of the configuration that has other ports; the block gets its URL."""
    binary, port = require_program("nginx"), free_port()
    target = upstream.removeprefix("http://")
    site = CONF.replace("server 127.0.0.1:8000;", f"server {target};")
    site = site.replace("listen 80;", f"listen 127.0.0.1:{port};")
    assert f"server {target};" in site
    assert f"listen 127.0.0.1:{port};" in site
    (folder / "sseserve.conf").write_text(site)
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(MAIN_CONF.format(folder=folder, user=user))
    # A worker logs its start; the port has been open since before that.
    with Program(binary, "-p", folder, "-c", folder / "nginx.conf", "-g", "daemon off;") as program:
        program.wait_for_output(r"start worker process \d+")
        yield f"http://127.0.0.1:{port}", program
        assert program.wait(signal.SIGTERM) == 0
    assert "[error]" not in program.output, program.output


@pytest.fixture
def server_url() -> Iterator[str]:
    # No heartbeat during a test: it could push an event out of a buffer.
    with run_server(heartbeat=300, throttle=0.000001, drain=1) as url:
        yield url


@pytest.fixture
def proxy(tmp_path: Path, server_url: str) -> Iterator[tuple[str, Program]]:
    with nginx(tmp_path, server_url) as proxy:
        yield proxy


def progress(client: httpx.Client, percent: int, **more: Any) -> str:
    """Publish progress; return the event's cursor."""
    body = {"progress": percent, "message": str(percent), **more}
    return client.post("/api/sessions/s/progress", json=body).raise_for_status().json()["id"]


@pytest.mark.parametrize("path", STREAM_PATHS)
def test_streams_are_not_buffered(server_url, proxy, path):
    """Each event arrives before the next one is published: no stream is buffered or compressed."""
    url, _ = proxy
    with httpx.Client(base_url=server_url) as publisher, httpx.Client(timeout=10) as client:
        progress(publisher, 1, stage="plan")
        headers = {"Accept-Encoding": "gzip"}
        with httpx_sse.connect_sse(client, "GET", url + path, headers=headers) as source:
            assert "content-encoding" not in source.response.headers
            events = source.iter_sse()
            for percent in (2, 3, 4):
                if path.endswith("/control"):
                    command = ("pause", "resume", "cancel")[percent - 2]
                    publisher.post(f"/api/sessions/s/{command}").raise_for_status()
                    cursor = None
                    expected = f'"{command.replace("resume", "continue")}"'
                else:
                    cursor = progress(publisher, percent)
                    expected = f'"message":"{percent}"'
                for event in events:  # the stream begins with a snapshot
                    if expected in event.data and (cursor is None or event.id.endswith(cursor)):
                        break
                else:
                    raise AssertionError("the stream has ended")


async def test_websocket_is_proxied(server_url, proxy):
    """Each message arrives before the next one is published, and the final one ends the stream."""
    url, _ = proxy
    async with httpx.AsyncClient(base_url=server_url) as publisher:
        await publisher.post("/api/sessions", json={"session_id": "s"})
        with trio.fail_after(10):
            async with watch(url, "s", transport="ws", retry_timeout=0) as messages:
                assert (await anext(messages)).data["status"] == "queued"
                for percent in (1, 2, 3):
                    await publisher.post("/api/sessions/s/progress", json={"progress": percent})
                    assert (await anext(messages)).data["progress"] == percent
                await publisher.post("/api/sessions/s/progress", json={"status": "done"})
                assert [message.event async for message in messages] == ["complete"]


def test_batch_is_proxied_line_by_line(server_url, proxy):
    """A publisher's lines are applied while its request body is still being sent."""
    url, _ = proxy
    with httpx.Client(base_url=server_url) as client, httpx.Client(timeout=10) as watcher:
        client.post("/api/sessions", json={"session_id": "s"}).raise_for_status()
        with httpx_sse.connect_sse(watcher, "GET", f"{server_url}/api/sessions/s/status/stream") as source:
            events = source.iter_sse()
            seen = [next(events).json()["progress"]]

            def lines() -> Iterator[bytes]:
                for percent in (10, 20, 30):
                    yield b'{"progress": %d}\n' % percent
                    seen.append(next(events).json()["progress"])

            headers = {"Content-Type": "application/x-ndjson"}
            response = client.post(f"{url}/api/sessions/s/events", content=lines(), headers=headers)
            assert (response.status_code, response.json()["applied"]) == (202, 3)
    assert seen == [0, 10, 20, 30]


def test_resuming_through_nginx(server_url, proxy):
    """Last-Event-ID reaches the server and the missed events are sent; after the end, 204."""
    url, _ = proxy
    with httpx.Client(base_url=server_url) as publisher, httpx.Client(timeout=10) as client:
        cursors = [progress(publisher, percent) for percent in (1, 2, 3)]
        cursors.append(progress(publisher, 100, status="done"))
        stream = f"{url}/api/sessions/s/status/stream"
        with httpx_sse.connect_sse(client, "GET", stream, headers={"Last-Event-ID": cursors[0]}) as source:
            resume, *events = source.iter_sse()
        assert (resume.event, resume.json()) == ("resume", {"status": "ok", "missed": 0})
        assert [event.id for event in events] == cursors[1:]
        assert client.get(stream, headers={"Last-Event-ID": cursors[-1]}).status_code == 204


def test_reload_loses_no_event(server_url, proxy):
    """When nginx reloads, its old worker's streams end in time and their watchers resume at the new one."""
    url, program = proxy
    stream = f"{url}/api/sessions/s/status/stream"
    seen: list[int] = []
    connections = []
    started = threading.Event()

    def watch_job() -> None:
        cursor = ""
        with httpx.Client(timeout=10) as client:
            while 200 not in seen:
                headers = {"Last-Event-ID": cursor} if cursor else {}
                try:
                    with httpx_sse.connect_sse(client, "GET", stream, headers=headers) as source:
                        connections.append(cursor)
                        for event in source.iter_sse():
                            cursor = event.id
                            if event.event in ("progress", "complete"):
                                seen.append(event.json()["data"])
                            started.set()
                except httpx.TransportError:
                    continue

    watcher = threading.Thread(target=watch_job)
    with httpx.Client(base_url=server_url) as publisher, httpx.Client(timeout=10) as client:
        progress(publisher, 1, data=0)
        watcher.start()
        assert started.wait(10)
        for number in range(1, 100):
            progress(publisher, 1, data=number)
        (old,) = re.findall(r"start worker process (\d+)", program.output)
        program.signal(signal.SIGHUP)
        for number in range(100, 200):
            if number == 150:
                # The new worker serves requests; the old one serves its stream until it exits.
                program.wait_for_output(
                    rf"gracefully shutting down[\s\S]*worker process {old} exited with code 0"
                )
                assert client.get(f"{url}/health").status_code == 200
            progress(publisher, 1, data=number)
        progress(publisher, 100, data=200, status="done")
        watcher.join(20)
    assert not watcher.is_alive()
    assert seen == list(range(201))
    assert len(connections) == 2


def test_forwarded_headers(tmp_path):
    """The server gets the host that was requested and the address of the client."""

    class EchoHeaders(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(dict(self.headers)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), EchoHeaders) as echo:
        threading.Thread(target=echo.serve_forever, daemon=True).start()
        with nginx(tmp_path, f"http://127.0.0.1:{echo.server_address[1]}") as (url, _):
            seen = httpx.get(url, headers={"X-Forwarded-For": "192.0.2.7", "Host": "watch.example"}).json()
        echo.shutdown()
    assert seen["Host"] == "watch.example"
    assert seen["X-Forwarded-For"] == "192.0.2.7, 127.0.0.1"
    assert seen["X-Real-IP"] == "127.0.0.1"
    assert seen["X-Forwarded-Proto"] == "http"
    assert "Connection" not in seen  # so that the connection to the server is reused
