"""SIGHUP: a running server reloads its settings, unless its terminal was closed, which stops it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from certificates import Authority
from processes import TIMEOUT, Program, wait_until
from programs import require_program
from terminals import Terminal
from test_systemd import ServiceManager
from test_workers import children, connect_to_both
from tokens import SECRET, bearer, make_token

SERVE = (sys.executable, "-m", "sseserve", "serve", "--port", "0")
OTHER = "another-secret-of-at-least-thirty-two-bytes"


@contextmanager
def curl(url: str, session_id: str = "s", *options: str) -> Iterator[Program]:
    """Watch a session with curl."""
    path = f"{url}/api/sessions/{session_id}/status/stream"
    with Program(require_program("curl"), "-sSN", *options, path) as program:
        yield program


def publish(url: str, progress: int, **options) -> int:
    body = {"progress": progress}
    return httpx.post(f"{url}/api/sessions/s/progress", json=body, **options).status_code


def reload(program: Program, outcome: str = "reloaded the settings") -> str:
    """Send SIGHUP; return the line that says what has become of it, which is one that was not there."""
    before = program.output.count(outcome)
    program.signal(signal.SIGHUP)
    wait_until(lambda: program.output.count(outcome) > before, outcome)
    return [line for line in program.output.splitlines() if outcome in line][-1]


@pytest.fixture
def config(tmp_path):
    return tmp_path / "sseserve.toml"


def test_stream_goes_on_through_a_reload(config):
    """It gets what is published later; new limits and origins hold; the log says what was and what is."""
    config.write_text("publish_rate = 1000.0\nlimit_loopback = true\n")
    with Program(*SERVE, "--config", config) as program:
        url = program.wait_for_output(r"serving at (\S+)")[1]
        assert publish(url, 1) == 202
        with curl(url) as stream:
            stream.wait_for_output('"progress":1')
            origin = 'cors_origins = ["https://a.example"]'
            config.write_text(f"publish_rate = 0.1\nlimit_loopback = true\n{origin}\nttl = 60.0\n")
            line = reload(program)
            assert "publish_rate: 1000.0 -> 0.1" in line
            assert "cors_origins: () -> ('https://a.example',)" in line
            assert "Needs a restart: ttl: 3600.0 -> 60.0" in line
            assert publish(url, 2) == 202
            stream.wait_for_output('"progress":2')
            assert publish(url, 3) == 429
            response = httpx.get(f"{url}/api/sessions", headers={"Origin": "https://a.example"})
            assert response.headers["access-control-allow-origin"] == "https://a.example"
            assert not stream.has_exited
            config.write_text("")
            assert "publish_rate: 0.1 -> 2000.0" in reload(program)
            assert publish(url, 4) == 202
            stream.wait_for_output('"progress":4')
            assert program.wait(signal.SIGTERM) == 0, program.output
            assert stream.wait() == 0
        assert "ERROR" not in program.output


def test_wrong_file_changes_nothing(config):
    """The log says what is wrong; the server goes on as it was, and takes the file when it is right."""
    config.write_text("limit_loopback = true")
    with Program(*SERVE, "--config", config) as program, httpx.Client() as client:
        url = program.wait_for_output(r"serving at (\S+)")[1]
        for text, message in (
            ("publish_rate = ", "is not TOML"),
            ("publish_rat = 5.0", "did you mean 'publish_rate'"),
            ("publish_rate = -5.0\nconnect_rate = 1.0", "publish_rate .* must be a number greater than 0"),
            (None, "cannot read"),
        ):
            if text is None:
                config.unlink()
            else:
                config.write_text(text)
            line = reload(program, "cannot reload the settings, so nothing is changed")
            assert re.search(message, line), line
            assert "ERROR" in line
        path = f"{url}/api/sessions/s/progress"
        assert [client.post(path, json={}).status_code for _ in range(15)] == [202] * 15
        config.write_text("publish_rate = 9.0\nlimit_loopback = true")
        assert "publish_rate: 2000.0 -> 9.0" in reload(program)
        assert program.wait(signal.SIGTERM) == 0


def test_key_in_a_file_is_read_again(tmp_path):
    """The old one's streams end, the new one's tokens are served; no key is in the log."""
    key = tmp_path / "key"
    key.write_text(SECRET)
    with Program(*SERVE, SSESERVE_JWT_KEY=f"file:{key}") as program:
        url = program.wait_for_output(r"serving at (\S+)")[1]
        old, new = (make_token(secret, role="admin") for secret in (SECRET, OTHER))
        assert publish(url, 1, headers=bearer(old)) == 202
        with curl(url, "s", "-H", f"Authorization: Bearer {old}") as stream:
            stream.wait_for_output('"progress":1')
            key.write_text(OTHER)
            assert "the files of keys or certificates have changed" in reload(program)
            stream.wait()
            assert publish(url, 2, headers=bearer(old)) == 401
            assert publish(url, 2, headers=bearer(new)) == 202
        key.write_text("short")
        assert "secret of 5 bytes" in reload(program, "cannot reload")
        assert publish(url, 3, headers=bearer(new)) == 202
        assert program.wait(signal.SIGTERM) == 0
        assert SECRET not in program.output
        assert OTHER not in program.output


def test_log_level(config):
    """Debug shows each request, until it is taken back."""
    config.write_text("")
    with Program(*SERVE, "--config", config) as program:
        url = program.wait_for_output(r"serving at (\S+)")[1]
        config.write_text('log_level = "debug"')
        assert "log_level: 'info' -> 'debug'" in reload(program)
        httpx.get(f"{url}/health?one")
        program.wait_for_output("DEBUG .*path=/health")
        config.write_text('log_level = "error"')
        assert "log_level: 'debug' -> 'error'" in reload(program)
        assert program.wait(signal.SIGTERM) == 0
        assert "got SIGTERM" not in program.output


def test_certificate(tmp_path):
    """New connections get the one that is in the file; a stream that is open goes on."""
    authority = Authority()
    ca, first = authority.write(tmp_path), authority.issue()
    paths = first.write(tmp_path)
    flags = ("--tls-cert", paths[0], "--tls-key", paths[1])

    def serial(url: str) -> int:
        pem = ssl.get_server_certificate((urlsplit(url).hostname, urlsplit(url).port), ca_certs=str(ca))
        from cryptography import x509

        return x509.load_pem_x509_certificate(pem.encode()).serial_number

    with Program(*SERVE, *flags) as program:
        url = program.wait_for_output(r"serving at (https://\S+)")[1]
        context = ssl.create_default_context(cafile=str(ca))
        assert publish(url, 1, verify=context) == 202
        with curl(url, "s", "--cacert", str(ca)) as stream:
            stream.wait_for_output('"progress":1')
            assert serial(url) == first.serial
            second = authority.issue()
            second.write(tmp_path)
            reload(program)
            assert serial(url) == second.serial
            assert publish(url, 2, verify=context) == 202
            stream.wait_for_output('"progress":2')
            paths[1].write_bytes(first.key)
            assert "is not the key of" in reload(program, "cannot reload the settings")
            assert serial(url) == second.serial
        assert program.wait(signal.SIGTERM) == 0


def test_workers(redis, config):
    """Every worker takes the settings, also one that is started later; streams go on."""
    config.write_text("limit_loopback = true")
    command = (*SERVE, "--workers", "2", "--engine", redis.url, "--config", config)
    with Program(*command, SSESERVE_DRAIN="2") as program:
        url = program.wait_for_output(r"serving at (\S+) with 2 workers")[1]
        clients = connect_to_both(url)
        assert clients["1"].post("/api/sessions/s/progress", json={"progress": 1}).status_code == 202
        with curl(url) as first, curl(url) as second:
            for stream in (first, second):
                stream.wait_for_output('"progress":1')
            config.write_text("limit_loopback = true\nallowed_hosts = ['a.example']\nttl = 60.0")
            line = reload(program)
            assert "allowed_hosts: () -> ('a.example',). Needs a restart: ttl" in line
            for client in clients.values():
                wait_until(lambda client=client: _allows(client, "a.example"), "a worker that has reloaded")
            assert program.output.count("reloaded the settings") == 1
            assert clients["2"].post("/api/sessions/s/progress", json={"progress": 2}).status_code == 202
            for stream in (first, second):
                stream.wait_for_output('"progress":2')
            os.kill(children(program.pid)[0], signal.SIGKILL)
            program.wait_for_output("was killed by SIGKILL")
            wait_until(lambda: len(children(program.pid)) == 2, "the replacement")
            for client in clients.values():
                client.close()
            clients = connect_to_both(url)
            assert all(_allows(client, "a.example") for client in clients.values())
            config.write_text("x")
            assert "is not TOML" in reload(program, "cannot reload")
            for client in clients.values():
                assert _allows(client, "a.example")
                client.close()
            assert program.wait(signal.SIGTERM) == 0, program.output


def _allows(client: httpx.Client, host: str) -> bool:
    return client.get("/api/sessions", headers={"Host": host}).status_code == 200


@contextmanager
def run_as_service(
    config: Path, folder: Path, workers: int, request: pytest.FixtureRequest
) -> Iterator[tuple[ServiceManager, Program]]:
    """Run a server that tells a service manager its state; several workers share a Redis."""
    command = [*SERVE, "--config", config]
    if workers > 1:
        command += ["--workers", str(workers), "--engine", request.getfixturevalue("redis").url]
    with (
        ServiceManager(str(folder / "notify")) as manager,
        Program(*command, NOTIFY_SOCKET=manager.address) as program,
    ):
        yield manager, program


@pytest.mark.parametrize("workers", [1, 2])
def test_service_manager_is_told(workers, config, tmp_path, request):
    """RELOADING with the time by systemd's clock, then READY, also if nothing could be changed."""
    config.write_text("")
    with run_as_service(config, tmp_path, workers, request) as (manager, program):
        ready = manager.wait_for("READY=1")
        for text in ("publish_rate = 5.0", "wrong"):
            config.write_text(text)
            before = time.clock_gettime(time.CLOCK_MONOTONIC)
            program.signal(signal.SIGHUP)
            reloading, usec = manager.next()
            assert reloading == "RELOADING=1"
            since = int(usec.removeprefix("MONOTONIC_USEC=")) / 1e6
            assert before <= since <= time.clock_gettime(time.CLOCK_MONOTONIC)
            assert manager.next() == ready
        assert program.wait(signal.SIGTERM) == 0, program.output
        assert manager.waiting()[-1] == "STOPPING=1"


@pytest.mark.parametrize("workers", [1, 2])
def test_hangup_during_the_drain(workers, config, tmp_path, request):
    """Nothing is reloaded any more, and the service manager is not told that the service is ready."""
    config.write_text("drain = 30.0")
    with run_as_service(config, tmp_path, workers, request) as (manager, program):
        url = httpx.URL(program.wait_for_output(r"serving at (http\S+)")[1])
        manager.wait_for("READY=1")
        with socket.create_connection((url.host, url.port), 10) as client:
            client.sendall(b"POST /api/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n")
            client.sendall(b"Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n")
            assert b" 100 " in client.recv(1000)  # the drain waits for it
            program.signal(signal.SIGTERM)
            manager.wait_for("STOPPING=1")
            program.signal(signal.SIGHUP)
            program.wait_for_output("got SIGHUP; .* already stopping|reloaded the settings")
            client.sendall(b"{}")
            assert program.wait() == 0, program.output
        assert "reloaded" not in program.output
        assert manager.waiting() == ["READY=1", "STOPPING=1"]


# The terminal


class ClosableTerminal(Terminal):
    """One that is closed as a window is, while the program runs."""

    def close(self) -> None:
        """Close it: the kernel sends SIGHUP."""
        controller = os.dup(self._controller)
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, self._controller)
        # It is closed when nobody reads from it any more: what is typed is echoed.
        os.write(controller, b"x")
        self._reader.join(TIMEOUT)
        os.close(null)
        os.close(controller)

    @property
    def pid(self) -> int:
        return self._process.pid


def run_in_terminal(log: Path, *prefix: str, options: str = "") -> ClosableTerminal:
    """Run a server whose log is in a file, as that of a closed terminal is lost."""
    command = f"exec {' '.join(prefix)} {' '.join(SERVE)} {options} > {log} 2>&1 < /dev/null"
    return ClosableTerminal("sh", "-c", command)


def wait_for_log(log: Path, pattern: str) -> re.Match[str]:
    match = wait_until(lambda: log.exists() and re.search(pattern, log.read_text()), pattern)
    assert isinstance(match, re.Match)
    return match


@pytest.mark.parametrize("workers", [1, 2])
def test_closed_terminal_stops_the_server(tmp_path, workers, request):
    """Before that SIGHUP reloads, as without a terminal."""
    log, options = tmp_path / "log", ""
    if workers > 1:
        options = f"--workers {workers} --engine {request.getfixturevalue('redis').url}"
    with run_in_terminal(log, options=options) as terminal:
        wait_for_log(log, r"serving at (\S+)")
        os.kill(terminal.pid, signal.SIGHUP)
        wait_for_log(log, "reloaded the settings")
        terminal.close()
        assert terminal._process.wait(TIMEOUT) == 0
        text = log.read_text()
        assert "got SIGHUP" in text
        assert text.count("reloading the settings") == 1
        assert "stopping; open connections: 0" in text


def test_closed_terminal_of_nohup(tmp_path):
    """The server goes on, and SIGHUP reloads it from then on."""
    log = tmp_path / "log"
    with run_in_terminal(log, "nohup") as terminal:
        url = wait_for_log(log, r"serving at (\S+)")[1]
        terminal.close()
        wait_for_log(log, "the terminal was closed; the server goes on")
        assert httpx.get(f"{url}/health").status_code == 200
        os.kill(terminal.pid, signal.SIGHUP)
        wait_for_log(log, "reloaded the settings")
        os.kill(terminal.pid, signal.SIGTERM)
        assert terminal._process.wait(TIMEOUT) == 0


def test_shell_that_is_killed_stops_its_server(tmp_path):
    """Its terminal is still open then, but controls nobody any more."""
    log = tmp_path / "log"
    command = f"{' '.join(SERVE)} > {log} 2>&1 < /dev/null; true"
    with ClosableTerminal("sh", "-c", command) as terminal:
        wait_for_log(log, r"serving at (\S+)")
        os.kill(terminal.pid, signal.SIGKILL)
        wait_for_log(log, "got SIGHUP\n")
        wait_for_log(log, "stopping; open connections")


def test_demo_reloads(tmp_path):
    """It has no file, but variables; nothing is different then."""
    with Program(sys.executable, "-m", "sseserve", "demo") as program:
        program.wait_for_output("Watch a job at")
        assert "nothing has changed" in reload(program)
        assert program.wait(signal.SIGTERM) == 0
        assert json.dumps("Traceback") not in program.output


def test_help_says_it():
    """What SIGHUP does is in the help of the command."""
    command = [sys.executable, "-m", "sseserve", "serve", "--help"]
    assert "SIGHUP reloads the settings" in subprocess.check_output(command, text=True, timeout=20)
