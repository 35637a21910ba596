"""The servers under test: how each is started, measured and stopped.

Every round gets a new server process, so that no figure depends on the state left by another round.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from .load.process import BenchmarkError

__all__ = ["ROOT", "Server", "ServerProcess", "cpu_seconds", "find_nginx", "free_port"]

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT = 20.0
STOP_TIMEOUT = 10.0
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class ServerProcess:
    """A running server on 127.0.0.1, with all processes that it starts.

    Args:
        name: for messages.
        command: returns the command, for the directory of the server's files.
        environ: added to the environment.
        port: where it will listen.
        ready: path of a GET request that is answered with 200 when it is ready; None: when it accepts a
            connection.
        headers: of all requests that are made here.

    Raises:
        BenchmarkError: the server cannot be started, or is not ready in time.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[Path], Sequence[str]],
        *,
        port: int,
        environ: Mapping[str, str] | None = None,
        ready: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.port = name, port
        self._headers = dict(headers or {})
        self._directory = Path(tempfile.mkdtemp(prefix="sseserve-bench-"))
        self._log = self._directory / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command(self._directory),
                cwd=ROOT,
                env={**os.environ, **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.pid = self._process.pid
        try:
            self._wait_ready(ready)
        except BaseException:
            self.stop()
            raise

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Make a request on a connection of its own; return the status and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request(method, path, body, self._headers | dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _wait_ready(self, path: str | None) -> None:
        """Poll: nginx, for one, does not report in another way that it is ready."""
        deadline = time.monotonic() + START_TIMEOUT
        status: int | str = "no response"
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise BenchmarkError(
                    f"{self.name} exited with status {self._process.returncode}: {self._last_line()}"
                )
            try:
                if path is None:
                    socket.create_connection(("127.0.0.1", self.port), 5).close()
                    return
                status, _ = self.request("GET", path)
            except (OSError, http.client.HTTPException) as error:
                status = str(error)
            if status == 200:
                return
            time.sleep(0.02)  # between two attempts: the server is another process
        raise BenchmarkError(f"{self.name} was not ready after {START_TIMEOUT:g} s ({status}):\n{self.log()}")

    def log(self) -> str:
        """Return the last 2,000 characters of the server's output."""
        return self._log.read_text(errors="replace")[-2000:]

    def _last_line(self) -> str:
        return self.log().strip().rpartition("\n")[2]

    def pids(self) -> list[int]:
        """Return the ids of all processes of the server."""
        found = [self._process.pid]
        for pid in found:
            found += _children(pid)
        return found

    def rss(self) -> int:
        """Return the resident memory, in bytes. What several processes share counts once, in shares."""
        pids = self.pids()
        if len(pids) == 1:
            return self._read_memory(pids[0], "status", "VmRSS")
        return sum(self._read_memory(pid, "smaps_rollup", "Pss") for pid in pids)

    def peak_rss(self) -> int:
        """Return the peak resident memory since :meth:`reset_peak_rss`, in bytes."""
        return sum(self._read_memory(pid, "status", "VmHWM") for pid in self.pids())

    def reset_peak_rss(self) -> None:
        """Reset the kernel's record of the peak to the current resident memory."""
        for pid in self.pids():
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def _read_memory(self, pid: int, file: str, name: str) -> int:
        text = Path(f"/proc/{pid}/{file}").read_text()
        match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
        if match is None:
            raise BenchmarkError(f"no {name} for process {pid}")
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
        """Return the CPU time that the processes of the server have used, in seconds."""
        return sum(map(cpu_seconds, self.pids()))

    def __enter__(self) -> ServerProcess:
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


class Server(ServerProcess):
    """A running sseserve. The session ``bench`` is created.

    Args:
        headers: of a request that creates a session.
        port: where it listens; 0: on a free port.
        settings: of sseserve, by their names.

    Raises:
        BenchmarkError: the server cannot be started, or is not ready in time.
    """

    def __init__(
        self, *, headers: Mapping[str, str] | None = None, port: int = 0, **settings: object
    ) -> None:
        port = port or free_port()
        command = [sys.executable, "-m", "sseserve", "serve", "--port", str(port)]
        command += ["--log-level", str(settings.pop("log_level", "warning"))]
        environ = {f"SSESERVE_{name.upper()}": str(value) for name, value in settings.items()}
        super().__init__(
            "sseserve", lambda _: command, port=port, environ=environ, ready="/ready", headers=headers
        )
        try:
            self.create_sessions(["bench"])
        except BaseException:
            self.stop()
            raise

    def create_sessions(self, sessions: Sequence[str]) -> None:
        """Create sessions, unless another instance on the same Redis has created them.

        Raises:
            BenchmarkError: a response was neither 201 nor 409.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        for session in sessions:
            connection.request("POST", "/api/sessions", f'{{"session_id":"{session}"}}', self._headers)
            response = connection.getresponse()
            body = response.read()
            if response.status not in (201, 409):
                raise BenchmarkError(
                    f"creating a session failed with status {response.status}: {body[:300]!r}"
                )
        connection.close()

    def wait_for_workers(self) -> list[int]:
        """Wait until all workers serve, which the log says at the level ``info``; return their ids."""
        deadline = time.monotonic() + START_TIMEOUT
        while "serving at" not in self.log():
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the workers did not start:\n{self.log()}")
            time.sleep(0.02)  # between two attempts: they are other processes
        return _children(self._process.pid) or [self._process.pid]


def find_nginx() -> str:
    """Return the path of nginx, which need not be in an ordinary user's PATH."""
    binary = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if binary is None:
        raise BenchmarkError("nginx is not installed")
    return binary


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that a server which sets ``SO_REUSEADDR``, as all do, can listen on.

    A socket of this process stays bound to it, so that the kernel gives it to nobody else (socket(7)).
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = int(held.getsockname()[1])
    held.detach()  # its descriptor stays open
    return port


def _children(pid: int) -> list[int]:
    """Return the ids of the processes that a process has started, in any of its threads."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for children in tasks for child in children.read_text().split()]


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
