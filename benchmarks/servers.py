"""The servers under test: how each is started, measured and stopped, and the requests of its clients.

Every round gets a new server process, so that no figure depends on the state left by another round.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import jwt

from .load.process import BenchmarkError

__all__ = [
    "NCHAN",
    "ROOT",
    "SSESERVE",
    "SSESERVE_TOKEN",
    "SSESERVE_WS",
    "Server",
    "Target",
    "collect_versions",
    "cpu_seconds",
    "find_nginx",
    "free_port",
]

ROOT = Path(__file__).resolve().parent.parent
NCHAN_MODULES = (
    Path("/usr/lib/nginx/modules/ngx_nchan_module.so"),
    Path("/usr/lib64/nginx/modules/ngx_nchan_module.so"),
    Path("/etc/nginx/modules/ngx_nchan_module.so"),
)
START_TIMEOUT = 20.0
STOP_TIMEOUT = 10.0
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")

# One worker, since sseserve is one process. The message buffer is as long as sseserve's default history.
# Pings stay off, which is nchan's default and saves it a timer per subscriber.
NGINX_CONFIG = """\
load_module {module};
daemon off;
user {user};
worker_processes 1;
worker_rlimit_nofile {files};
pid {directory}/nginx.pid;
error_log stderr warn;
events {{ worker_connections {connections}; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
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

_SSE_HEADERS = b"Host: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n"


@dataclass(frozen=True)
class Target:
    """A server and one transport, with the requests that are sent to it."""

    name: str
    server: str
    watch_request: bytes  # opens a stream
    watch_status: bytes  # the expected beginning of the response
    publish_path: str
    publish_prefix: bytes  # precedes the payload in the body of a publish request
    publish_suffix: bytes  # follows it
    settings: tuple[tuple[str, str], ...] = ()  # of the server
    publish_headers: str = ""  # of a publish request, with line ends


SSESERVE = Target(
    name="sseserve",
    server="sseserve",
    watch_request=b"GET /api/sessions/bench/status/stream HTTP/1.1\r\n" + _SSE_HEADERS,
    watch_status=b"HTTP/1.1 200",
    publish_path="/api/sessions/bench/events",
    publish_prefix=b'{"type":"tick","data":',
    publish_suffix=b"}",
)
SSESERVE_WS = Target(
    name="sseserve-ws",
    server="sseserve",
    watch_request=(
        b"GET /api/sessions/bench/status/ws HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ),
    watch_status=b"HTTP/1.1 101",
    publish_path=SSESERVE.publish_path,
    publish_prefix=SSESERVE.publish_prefix,
    publish_suffix=SSESERVE.publish_suffix,
)
_KEY = secrets.token_hex(32)


def _token() -> str:
    """Return a token for an hour that may do everything."""
    now = int(time.time())
    claims = {"sub": "bench", "role": "admin", "iat": now, "exp": now + 3600}
    return jwt.encode(claims, _KEY, algorithm="HS256")


_AUTHORIZATION = f"Authorization: Bearer {_token()}\r\n"

# All clients have the same token, so they are one user.
SSESERVE_TOKEN = Target(
    name="sseserve-token",
    server="sseserve",
    watch_request=SSESERVE.watch_request.removesuffix(b"\r\n") + _AUTHORIZATION.encode() + b"\r\n",
    watch_status=SSESERVE.watch_status,
    publish_path=SSESERVE.publish_path,
    publish_prefix=SSESERVE.publish_prefix,
    publish_suffix=SSESERVE.publish_suffix,
    settings=(("jwt_key", _KEY), ("max_streams_per_user", "20000")),
    publish_headers=_AUTHORIZATION,
)
NCHAN = Target(
    name="nchan",
    server="nchan",
    watch_request=b"GET /sub HTTP/1.1\r\n" + _SSE_HEADERS,
    watch_status=b"HTTP/1.1 200",
    publish_path="/pub",
    publish_prefix=b"",
    publish_suffix=b"",
)


class Server:
    """One running server on 127.0.0.1. In sseserve, the session ``bench`` is created.

    Args:
        kind: ``"sseserve"`` or ``"nchan"``.
        files: the limit of open files, which nginx needs in its configuration.
        headers: of a request that creates a session.
        port: where it listens; 0: on a free port.
        settings: of sseserve, by their names.

    Raises:
        BenchmarkError: the server cannot be started, or is not ready in time.
    """

    def __init__(
        self, kind: str, files: int, headers: str = "", *, port: int = 0, **settings: object
    ) -> None:
        self._headers = dict(line.split(": ", 1) for line in headers.splitlines())
        self.port = port or free_port()
        self._directory = Path(tempfile.mkdtemp(prefix="sseserve-bench-"))
        self._log = self._directory / "log"
        if kind == "nchan":
            command = self._nginx(files)
        else:
            command = [sys.executable, "-m", "sseserve", "serve"]
            command += ["--port", str(self.port), "--log-level", str(settings.pop("log_level", "warning"))]
        environ = {f"SSESERVE_{name.upper()}": str(value) for name, value in settings.items()}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_ready()
            self.pid = _worker_pid(self._process.pid) if kind == "nchan" else self._process.pid
            if kind == "sseserve":
                self.create_sessions(["bench"])
        except BaseException:
            self.stop()
            raise

    def _nginx(self, files: int) -> list[str]:
        module = next((path for path in NCHAN_MODULES if path.exists()), None)
        if module is None:
            raise BenchmarkError("nginx with the nchan module is not installed (Debian: libnginx-mod-nchan)")
        config = self._directory / "nginx.conf"
        config.write_text(
            NGINX_CONFIG.format(
                module=module,
                directory=self._directory,
                files=files,
                connections=files - 100,
                port=self.port,
                user="root" if os.geteuid() == 0 else "nobody",  # ignored unless nginx is started by root
            )
        )
        return [find_nginx(), "-p", str(self._directory), "-c", str(config), "-e", "stderr"]

    def _request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request(method, path, body, self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _wait_ready(self) -> None:
        """Poll ``/ready`` until its status is 200: nginx does not report in another way that it is ready."""
        deadline = time.monotonic() + START_TIMEOUT
        status: int | str = "no response"
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise BenchmarkError(
                    f"the server exited with status {self._process.returncode}:\n{self.log()}"
                )
            try:
                status, self.ready_body = self._request("GET", "/ready")
            except OSError as error:
                status = str(error)
            if status == 200:
                return
            time.sleep(0.02)  # between two attempts: the server is another process
        raise BenchmarkError(f"the server was not ready after {START_TIMEOUT:g} s ({status}):\n{self.log()}")

    def create_sessions(self, sessions: Sequence[str]) -> None:
        """Create sessions, unless another instance on the same Redis has created them.

        Raises:
            BenchmarkError: a response was neither 201 nor 409.
        """
        for session in sessions:
            status, body = self._request("POST", "/api/sessions", b'{"session_id":"%b"}' % session.encode())
            if status not in (201, 409):
                raise BenchmarkError(f"creating a session failed with status {status}: {body[:300]!r}")

    def log(self) -> str:
        """Return the last 2,000 characters of the server's output."""
        return self._log.read_text(errors="replace")[-2000:]

    def rss(self) -> int:
        """Return the resident memory of the serving process, in bytes."""
        return self._read_memory("VmRSS")

    def peak_rss(self) -> int:
        """Return the peak resident memory since :meth:`reset_peak_rss`, in bytes."""
        return self._read_memory("VmHWM")

    def reset_peak_rss(self) -> None:
        """Reset the kernel's record of the peak to the current resident memory."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def _read_memory(self, name: str) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
        if match is None:
            raise BenchmarkError(f"no {name} for process {self.pid}")
        return int(match[1]) * 1024

    def stable_rss(self, period: float = 1.0, timeout: float = 8.0) -> int:
        """Return the resident memory, in bytes, once it is stable.

        Stable means that it changed by at most 1 % for ``period`` seconds; wait at most ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        reference, since = self.rss(), time.monotonic()
        while time.monotonic() < deadline and time.monotonic() - since < period:
            time.sleep(0.1)  # between two samples
            if abs((current := self.rss()) - reference) > reference / 100:
                reference, since = current, time.monotonic()
        return self.rss()

    def cpu_seconds(self) -> float:
        """Return the CPU time that the serving process has used, in seconds."""
        return cpu_seconds(self.pid)

    def wait_for_workers(self) -> list[int]:
        """Wait until all workers serve, which the log says at the level ``info``; return their ids."""
        deadline = time.monotonic() + START_TIMEOUT
        while "serving at" not in self.log():
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the workers did not start:\n{self.log()}")
            time.sleep(0.02)  # between two attempts: they are other processes
        return _children(self._process.pid) or [self._process.pid]

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server with SIGTERM, or with SIGKILL after ``STOP_TIMEOUT`` seconds; remove its files.

        ``status`` is its exit status then.
        """
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(STOP_TIMEOUT)
        self.status = self._process.returncode
        shutil.rmtree(self._directory, ignore_errors=True)


def find_nginx() -> str:
    """Return the path of nginx, which need not be in an ordinary user's PATH."""
    binary = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if binary is None:
        raise BenchmarkError("nginx is not installed")
    return binary


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _worker_pid(pid: int) -> int:
    """Return the process id of nginx's only worker, which serves the streams."""
    children = _children(pid)
    if len(children) != 1:
        raise BenchmarkError(f"nginx has {len(children)} child processes instead of one worker")
    return children[0]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def collect_versions(files: int, *, nchan: bool) -> dict[str, str]:
    """Return the versions of Python, the kernel, the libraries and the servers under test."""
    versions = {"python": sys.version.split()[0], "kernel": os.uname().release}
    for package in ("trio", "hypercorn", "trio-websocket"):
        versions[package] = importlib.metadata.version(package)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    versions["sseserve"] = project["project"]["version"]
    git = shutil.which("git")
    if git is not None:
        command = [git, "rev-parse", "--short", "HEAD"]
        completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
        versions["commit"] = completed.stdout.strip() or "?"
    if nchan:
        with Server("nchan", files) as server:
            versions["nchan"] = server.ready_body.decode() or "?"
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
            connection.request("GET", "/ready")
            versions["nginx"] = connection.getresponse().getheader("Server", "?").removeprefix("nginx/")
            connection.close()
    return versions
