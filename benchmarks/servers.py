"""The servers under test: how each is started, watched and ended, and what its clients say to it.

Every measurement gets a fresh process, so that no figure carries the memory or the history of another.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from process import BenchError

__all__ = ["NCHAN", "OURS", "OURS_WS", "TARGETS", "Server", "Target", "versions"]

ROOT = Path(__file__).resolve().parent.parent
NCHAN_MODULES = (
    Path("/usr/lib/nginx/modules/ngx_nchan_module.so"),
    Path("/usr/lib64/nginx/modules/ngx_nchan_module.so"),
    Path("/etc/nginx/modules/ngx_nchan_module.so"),
)
START_LIMIT = 20.0
STOP_LIMIT = 10.0
TICKS = os.sysconf("SC_CLK_TCK")

# One worker, since sseserve is one process. The buffer matches sseserve's default history; pings are left
# off, as they are by default, which spares nchan a timer per subscriber.
NGINX_CONFIG = """\
load_module {module};
daemon off;
user {user};
worker_processes 1;
worker_rlimit_nofile {files};
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections {connections}; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000000;
  keepalive_timeout 600s;
  nchan_shared_memory_size 256M;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location = /ready {{ return 200 "$nchan_version"; }}
    location = /pub {{
      nchan_publisher;
      nchan_channel_id bench;
      nchan_message_buffer_length 10000;
      nchan_message_timeout 1h;
    }}
    location = /sub {{
      nchan_subscriber eventsource;
      nchan_channel_id bench;
      nchan_subscriber_first_message newest;
    }}
  }}
}}
"""

_SSE_HEAD = b"Host: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n"


@dataclass(frozen=True)
class Target:
    """What is measured: a server and one way to watch it. All of it is bytes that go out as they are."""

    name: str
    server: str
    watch: bytes  # the request that opens a stream
    status: bytes  # how the answer to it begins
    publish_path: str
    before: bytes  # what stands around the payload in a publish request's body
    after: bytes


OURS = Target(
    name="sseserve",
    server="sseserve",
    watch=b"GET /api/sessions/bench/status/stream HTTP/1.1\r\n" + _SSE_HEAD,
    status=b"HTTP/1.1 200",
    publish_path="/api/sessions/bench/events",
    before=b'{"type":"tick","data":',
    after=b"}",
)
OURS_WS = Target(
    name="sseserve-ws",
    server="sseserve",
    watch=(
        b"GET /api/sessions/bench/status/ws HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ),
    status=b"HTTP/1.1 101",
    publish_path=OURS.publish_path,
    before=OURS.before,
    after=OURS.after,
)
NCHAN = Target(
    name="nchan",
    server="nchan",
    watch=b"GET /sub HTTP/1.1\r\n" + _SSE_HEAD,
    status=b"HTTP/1.1 200",
    publish_path="/pub",
    before=b"",
    after=b"",
)
TARGETS = {target.name: target for target in (OURS, NCHAN, OURS_WS)}


class Server:
    """One running server on a port of its own, with the session ``bench`` in it.

    Raises:
        BenchError: it cannot be started, or is not ready in time.
    """

    def __init__(self, kind: str, files: int) -> None:
        self.port = _free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="sseserve-bench-"))
        self._log = self._folder / "log"
        if kind == "nchan":
            command = self._nginx(files)
        else:
            command = [sys.executable, "-m", "sseserve", "serve"]
            command += ["--port", str(self.port), "--log-level", "warning"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait_ready()
            self.pid = _only_child(self._process.pid) if kind == "nchan" else self._process.pid
            if kind == "sseserve":
                self._create_session()
        except BaseException:
            self.stop()
            raise

    def _nginx(self, files: int) -> list[str]:
        module = next((path for path in NCHAN_MODULES if path.exists()), None)
        binary = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
        if module is None or binary is None:
            raise BenchError("nginx with the nchan module is not installed (Debian: libnginx-mod-nchan)")
        config = self._folder / "nginx.conf"
        config.write_text(
            NGINX_CONFIG.format(
                module=module,
                folder=self._folder,
                files=files,
                connections=files - 100,
                port=self.port,
                user="root" if os.geteuid() == 0 else "nobody",  # only a master run by root changes user
            )
        )
        return [binary, "-p", str(self._folder), "-c", str(config), "-e", "stderr"]

    def _request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _wait_ready(self) -> None:
        """Ask ``/ready`` until it says 200; nothing announces a foreign server's start but its port."""
        end = time.monotonic() + START_LIMIT
        status: int | str = "nothing"
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise BenchError(f"the server ended with {self._process.returncode}:\n{self.log()}")
            try:
                status, self.greeting = self._request("GET", "/ready")
            except OSError as error:
                status = str(error)
            if status == 200:
                return
            time.sleep(0.02)
        raise BenchError(f"the server is not ready after {START_LIMIT:g} s ({status}):\n{self.log()}")

    def _create_session(self) -> None:
        status, body = self._request("POST", "/api/sessions", b'{"session_id":"bench"}')
        if status != 201:
            raise BenchError(f"creating the session was answered {status}: {body[:300]!r}")

    def log(self) -> str:
        """Return the end of what the server has printed."""
        return self._log.read_text(errors="replace")[-2000:]

    def rss(self) -> int:
        """Return the resident memory of the process that serves, in bytes."""
        return self._memory("VmRSS")

    def peak(self) -> int:
        """Return the largest resident memory since :meth:`forget_peak`, in bytes."""
        return self._memory("VmHWM")

    def forget_peak(self) -> None:
        """Let the kernel take the peak anew from here."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def _memory(self, name: str) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
        if found is None:
            raise BenchError(f"no {name} for process {self.pid}")
        return int(found[1]) * 1024

    def settled_rss(self, quiet: float = 1.0, limit: float = 8.0) -> int:
        """Return the resident memory once it has kept to 1 % for ``quiet`` seconds, or after ``limit``."""
        end = time.monotonic() + limit
        anchor, since = self.rss(), time.monotonic()
        while time.monotonic() < end and time.monotonic() - since < quiet:
            time.sleep(0.1)
            if abs((now := self.rss()) - anchor) > anchor / 100:
                anchor, since = now, time.monotonic()
        return self.rss()

    def cpu(self) -> float:
        """Return the CPU seconds that the process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server: politely, then not. Bounded."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_LIMIT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(STOP_LIMIT)
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _only_child(pid: int) -> int:
    """Return nginx's worker, which is where the streams live."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    if len(children) != 1:
        raise BenchError(f"nginx has {len(children)} processes instead of one worker")
    return int(children[0])


def versions(files: int, *, nchan: bool) -> dict[str, str]:
    """Return the versions of all that takes part."""
    found = {"python": sys.version.split()[0], "kernel": os.uname().release}
    for package in ("trio", "hypercorn", "trio-websocket"):
        found[package] = importlib.metadata.version(package)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found["sseserve"] = project["project"]["version"]
    git = shutil.which("git")
    if git is not None:
        command = [git, "rev-parse", "--short", "HEAD"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
        found["commit"] = shown.stdout.strip() or "?"
    if nchan:
        with Server("nchan", files) as server:
            found["nchan"] = server.greeting.decode() or "?"
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
            connection.request("GET", "/ready")
            found["nginx"] = connection.getresponse().getheader("Server", "?").removeprefix("nginx/")
            connection.close()
    return found
