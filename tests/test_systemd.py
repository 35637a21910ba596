"""What systemd gives a service, and what it is told: sockets, notifications, the watchdog."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import TIMEOUT, Program, wait_until
from programs import require_program
from test_workers import children

from sseserve.errors import ConfigError
from sseserve.server.systemd import Notifier, inherited_sockets

SERVE = (sys.executable, "-m", "sseserve", "serve")


# Socket activation


@contextmanager
def activated(*addresses: str | Path, command: tuple[str, ...] = SERVE, **environ: str) -> Iterator[Program]:
    """Run a server that systemd-socket-activate starts with the first connection."""
    options = [f"--listen={address}" for address in addresses]
    forwarded = [f"--setenv={name}" for name in environ]
    program = require_program("systemd-socket-activate")
    with Program(program, *options, *forwarded, *command, **environ) as activated:
        activated.wait_for_output("Listening on " + ".*\n.*".join(".*" for _ in addresses))
        yield activated


def unused_ports(number: int) -> list[int]:
    """Return TCP ports that nobody uses."""
    opened = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [listening.getsockname()[1] for listening in opened]
    for listening in opened:
        listening.close()
    return ports


def is_open(family: int, address: Any) -> bool:
    with socket.socket(family) as client:
        return client.connect_ex(address) == 0


def health(url: str, **transport: Any) -> dict[str, Any]:
    with httpx.Client(transport=httpx.HTTPTransport(**transport), timeout=TIMEOUT) as client:
        return client.get(f"{url}/health").json()


def test_sockets_of_systemd(tmp_path):
    """TCP, IPv6 and a unix socket, instead of host, port and unix_socket; the first request is served."""
    path, unused = tmp_path / "a.sock", tmp_path / "unused.sock"
    ports = unused_ports(2)
    addresses = (f"127.0.0.1:{ports[0]}", f"[::1]:{ports[1]}", path)
    with activated(*addresses, SSESERVE_UNIX_SOCKET=str(unused), SSESERVE_HOST="192.0.2.1") as program:
        assert health(f"http://127.0.0.1:{ports[0]}")["status"] == "ok"
        assert health(f"http://[::1]:{ports[1]}")["status"] == "ok"
        assert health("http://localhost", uds=str(path))["connections"] >= 1
        urls = f"http://127.0.0.1:{ports[0]}, http://[::1]:{ports[1]}, unix:{path}"
        program.wait_for_output(f"serving at {re.escape(urls)}$")
        assert not unused.exists()
        variables = Path(f"/proc/{program.pid}/environ").read_text()
        assert "LISTEN_FDS=3" in variables
        assert program.wait(signal.SIGTERM) == 0, program.output
        assert "ERROR" not in program.output
    assert path.exists()  # it is systemd's


def test_socket_of_systemd_for_workers(redis):
    """All of them accept from it."""
    (port,) = unused_ports(1)
    command = (*SERVE, "--workers", "2", "--engine", redis.url)
    with activated(f"127.0.0.1:{port}", command=command, SSESERVE_DRAIN="2") as program:
        url = f"http://127.0.0.1:{port}"
        health(url)
        program.wait_for_output(rf"serving at {url} with 2 workers")
        workers = set()

        def ask() -> set[str]:
            workers.add(re.search(r'worker="(\d)"', httpx.get(f"{url}/metrics").text)[1])
            return workers

        wait_until(lambda: ask() == {"1", "2"}, "both workers")
        assert program.wait(signal.SIGTERM) == 0, program.output
        assert not is_open(socket.AF_INET, ("127.0.0.1", port))


def test_exposed_socket_of_systemd_needs_a_key(tmp_path):
    """The addresses of the sockets count, not the settings; the exit status is that of a wrong setting."""
    (port,) = unused_ports(1)
    with activated(f"0.0.0.0:{port}") as program:
        assert is_open(socket.AF_INET, ("127.0.0.1", port))
        program.wait_for_output("everybody who can reach '0.0.0.0' may do everything: set jwt_key")
        assert program.wait() == 2
    with activated(tmp_path / "a.sock", SSESERVE_HOST="0.0.0.0") as program:
        assert is_open(socket.AF_UNIX, str(tmp_path / "a.sock"))
        program.wait_for_output("serving at unix:")
        assert program.wait(signal.SIGTERM) == 0


def test_accepted_connection_of_systemd():
    """With Accept=yes it would be a process for each connection: the message says what to change."""
    (port,) = unused_ports(1)
    program = require_program("systemd-socket-activate")
    with Program(program, "--accept", f"--listen=127.0.0.1:{port}", *SERVE) as activated:
        activated.wait_for_output("Listening on")
        assert is_open(socket.AF_INET, ("127.0.0.1", port))
        activated.wait_for_output(r"file descriptor 3 that was passed in LISTEN_FDS is no .*Accept=no")


@contextmanager
def passed(descriptor: int) -> Iterator[None]:
    """Pass a file as the first one, as a parent does."""
    saved = None
    with suppress(OSError):
        saved = os.dup(3)
    os.dup2(descriptor, 3)
    try:
        yield
    finally:
        with suppress(OSError):
            os.close(3)
        if saved is not None:
            os.dup2(saved, 3)
            os.close(saved)


def variables(**changes: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "http", **changes}


def test_variables_are_removed():
    """Whoever they are of: no program that is started from here is to take them for its own."""
    with socket.create_server(("127.0.0.1", 0)) as listening, passed(listening.fileno()):
        environ = variables(OTHER="1")
        (given,) = inherited_sockets(environ)
        assert environ == {"OTHER": "1"}
        assert not given.get_inheritable()
        assert given.getsockname() == listening.getsockname()
        given.detach()
        for other in ({"LISTEN_PID": "1"}, {"LISTEN_FDS": ""}, {"LISTEN_FDS": "x"}, {"LISTEN_FDS": "0"}):
            environ = variables(**other)
            assert inherited_sockets(environ) == []
            assert environ == {}
    assert inherited_sockets({}) == []


@pytest.mark.parametrize(
    ("kind", "listen"),
    [(socket.SOCK_STREAM, False), (socket.SOCK_DGRAM, False), (socket.SOCK_SEQPACKET, True)],
)
def test_socket_that_cannot_be_served(kind, listen):
    """The message names it as the unit file does."""
    with socket.socket(socket.AF_UNIX, kind) as opened, passed(opened.fileno()):
        if listen:
            opened.bind("")  # an abstract name that is free
            opened.listen()
        with pytest.raises(
            ConfigError, match=r"descriptor 3 \(http\) that was passed in LISTEN_FDS is no stream"
        ):
            inherited_sockets(variables())
    with (
        Path("/dev/null").open() as file,
        passed(file.fileno()),
        pytest.raises(ConfigError, match=r"3 \(http\) that .* is no socket"),
    ):
        inherited_sockets(variables())


# Notifications


class ServiceManager:
    """What is told what a service does, in datagrams; ``address`` is for NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address[0] == "@" else address)
        self._socket.settimeout(TIMEOUT)
        self.received: list[list[str]] = []

    def __enter__(self) -> ServiceManager:
        return self

    def __exit__(self, *_error: object) -> None:
        self._socket.close()

    def next(self) -> list[str]:
        """Receive a notification; return its assignments."""
        self.received.append(self._socket.recv(4096).decode().split("\n"))
        return self.received[-1]

    def wait_for(self, assignment: str) -> list[str]:
        """Receive until one begins with an assignment; return that."""
        while self.next()[0] != assignment:
            pass
        return self.received[-1]

    def waiting(self) -> list[str]:
        """Return the first assignments of what has been received meanwhile."""
        self._socket.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                self.next()
        self._socket.settimeout(TIMEOUT)
        return [assignments[0] for assignments in self.received]


@pytest.fixture
def manager(tmp_path):
    with ServiceManager(str(tmp_path / "notify")) as manager:
        yield manager


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_start_and_stop_are_notified(kind, tmp_path):
    """READY when it serves, STOPPING when it begins to stop, each with what it does."""
    address = str(tmp_path / "notify") if kind == "path" else f"@sseserve-test-{os.getpid()}"
    with (
        ServiceManager(address) as manager,
        Program(*SERVE, "--port", "0", NOTIFY_SOCKET=manager.address) as program,
    ):
        ready, status = manager.next()
        assert ready == "READY=1"
        url = re.fullmatch(r"STATUS=serving at (http://127\.0\.0\.1:\d+)", status)[1]
        assert health(url)["status"] == "ok"
        program.signal(signal.SIGTERM)
        assert manager.next()[0] == "STOPPING=1"
        assert program.wait() == 0, program.output
        assert manager.waiting() == ["READY=1", "STOPPING=1"]


def test_workers_are_notified_once(redis, manager):
    """By the parent, when all of them serve."""
    command = (*SERVE, "--port", "0", "--workers", "2", "--engine", redis.url)
    with Program(*command, NOTIFY_SOCKET=manager.address) as program:
        assert re.fullmatch(r"STATUS=serving at http://\S+ with 2 workers", manager.next()[1])
        assert program.wait(signal.SIGTERM) == 0, program.output
        assert manager.waiting() == ["READY=1", "STOPPING=1"]


def test_failed_start_is_not_ready(manager):
    """A server that cannot start tells nothing; its exit status says it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with Program(*SERVE, "--port", port, NOTIFY_SOCKET=manager.address) as program:
            assert program.wait() == 1
    assert manager.waiting() == []


def test_server_without_its_service_manager(tmp_path):
    """It serves all the same, and says once a time what it could not tell."""
    with Program(*SERVE, "--port", "0", NOTIFY_SOCKET=str(tmp_path / "gone")) as program:
        program.wait_for_output("cannot tell the service manager READY=1: No such file or directory")
        url = program.wait_for_output(r"serving at (\S+)")[1]
        assert health(url)["status"] == "ok"
        assert program.wait(signal.SIGTERM) == 0


def test_systemd_notify_understands_the_same_variables(manager):
    """The manager of these tests is one: systemd's own program tells it something."""
    command = [require_program("systemd-notify"), "--no-block", "--ready", "--status=up"]
    subprocess.run(command, env={**os.environ, "NOTIFY_SOCKET": manager.address}, check=True, timeout=TIMEOUT)
    assert sorted(manager.next()) == ["READY=1", "STATUS=up"]


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1"])
def test_other_addresses(address):
    """Nobody is told."""
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})
    notifier.ready("x")
    assert notifier.watchdog is None


def test_status_is_one_line(manager):
    """What stands behind a line break would be another assignment."""
    Notifier({"NOTIFY_SOCKET": manager.address}).ready("a\nMAINPID=1")
    assert manager.next() == ["READY=1", "STATUS=a MAINPID=1"]


# The watchdog


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("3000000", "", 3.0),
        ("3000000", str(os.getpid()), 3.0),
        ("3000000", "1", None),
        ("0", "", None),
        ("x", "", None),
        ("", "", None),
    ],
)
def test_variables_of_the_watchdog(usec, pid, seconds):
    """They are of one process, and are removed."""
    environ = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": usec, "WATCHDOG_PID": pid}
    assert Notifier(environ).watchdog == seconds
    assert environ == {}


HANG = """
import sys, time, trio
from sseserve import server
from sseserve.config import Settings
from sseserve.web import operations

async def hang(self, request, match):
    print("hanging", flush=True)
    time.sleep(3600)

operations.OperationsHandlers.health = hang
server.run(Settings(port=0))
"""


def test_event_loop_that_hangs_is_noticed(manager):
    """It says twice a period that it is alive; while a task does not return it says nothing."""
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"}
    with Program(sys.executable, "-c", HANG, **environ) as program:
        for _ in range(3):
            manager.wait_for("WATCHDOG=1")
        port = int(program.wait_for_output(r"serving at http://127\.0\.0\.1:(\d+)")[1])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            program.wait_for_output("hanging")
            manager.waiting()
            with pytest.raises(BlockingIOError):
                receive_for_periods(manager, 3)


def receive_for_periods(manager: ServiceManager, periods: int) -> None:
    """Raise BlockingIOError if nothing comes in so many periods of 0.1 s."""
    manager._socket.settimeout(0.1 * periods)
    try:
        manager.next()
    except TimeoutError:
        raise BlockingIOError from None


def test_server_is_alive_while_it_stops(manager):
    """The drain may take longer than the period."""
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "100000", "SSESERVE_DRAIN": "20"}
    with Program(*SERVE, "--port", "0", **environ) as program:
        port = int(program.wait_for_output(r"serving at http://127\.0\.0\.1:(\d+)")[1])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(
                b"POST /api/sessions/a/progress HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
            )
            client.sendall(b"Content-Type: application/json\r\n\r\n{")
            wait_until(lambda: "connections" in health(f"http://127.0.0.1:{port}"), "the server")
            program.signal(signal.SIGTERM)
            manager.wait_for("STOPPING=1")
            for _ in range(3):
                manager.wait_for("WATCHDOG=1")
            client.sendall(b"}")
            assert client.recv(100).startswith(b"HTTP/1.1 202")
        assert program.wait() == 0, program.output


def test_worker_that_hangs_is_replaced(redis, manager):
    """The parent says that it is alive, and kills a worker that does not: the others go on."""
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1000000"}
    command = (*SERVE, "--port", "0", "--workers", "2", "--engine", redis.url)
    with Program(*command, **environ) as program:
        url = program.wait_for_output(r"serving at (\S+) with 2 workers")[1]
        first, second = children(program.pid)
        os.kill(first, signal.SIGSTOP)
        program.wait_for_output(rf"worker 1 \(process {first}\) has not responded for 1 s; killing it")
        program.wait_for_output(
            rf"worker 1 \(process {first}\) was killed by SIGKILL; it is replaced at once"
        )
        wait_until(lambda: len(children(program.pid)) == 2, "the replacement")
        assert second in children(program.pid)
        manager.waiting()
        manager.wait_for("WATCHDOG=1")
        assert health(url)["status"] == "ok"
        assert program.wait(signal.SIGTERM) == 0, program.output
        assert program.output.count("killing it") == 1
        assert [first for first in manager.waiting() if first != "WATCHDOG=1"] == ["READY=1", "STOPPING=1"]
