"""The systemd units of examples/deploy: checked by systemd, and run with what systemd would give them.

systemd itself does not run here. The service gets its socket (from systemd-socket-activate), whom to notify,
its key and its directories; not a user of its own, nor the sandbox.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from deployments import BIN, DEPLOY, Job, over_http, serve_and_restart, settings_of
from ports import free_port
from processes import Program
from programs import require_program
from test_systemd import ServiceManager
from tokens import SECRET

SYSTEMD = DEPLOY / "systemd"


def values(unit: str, key: str) -> list[str]:
    """Return the values of a key of a unit, in their order."""
    lines = (SYSTEMD / unit).read_text().splitlines()
    return [value for name, _, value in (line.partition("=") for line in lines) if name == key]


@pytest.fixture
def units(tmp_path) -> Path:
    """Copies of the units, with the program where it is installed here."""
    for path in SYSTEMD.iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/sseserve/bin", str(BIN)))
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ("verify", "sseserve.service", "sseserve.socket"),
        ("security", "--offline=true", "--threshold=15", "sseserve.service"),  # 1.5 of 10, at most
    ],
)
def test_units_are_valid_and_safe(units, command):
    """systemd finds nothing wrong with them, nor that the service may do much that it need not."""
    program = require_program("systemd-analyze")
    process = subprocess.run([program, *command], cwd=units, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout
    assert process.stderr == ""


def test_times_and_limits():
    """The service is left the time that it drains, and more files than the default."""
    environ = dict(value.split("=", 1) for value in values("sseserve.service", "Environment"))
    stop = int(values("sseserve.service", "TimeoutStopSec")[0])
    assert settings_of(environ).drain + 5 < stop
    assert int(values("sseserve.service", "LimitNOFILE")[0]) >= 65536


@pytest.fixture
def manager(tmp_path) -> Iterator[ServiceManager]:
    with ServiceManager(str(tmp_path / "notify")) as manager:
        yield manager


def test_the_service(tmp_path, manager):
    """A job is streamed over the socket, through a reload, until the service is stopped and started again."""
    port = free_port()
    (listen,) = values("sseserve.socket", "ListenStream")
    assert listen == "127.0.0.1:8000"
    # The directories of the service, its settings and its key.
    (credential,) = values("sseserve.service", "LoadCredential")
    name, _, path = credential.partition(":")
    directories = {"%d": tmp_path / "credentials", "%S": tmp_path / "lib", "/etc/sseserve": tmp_path / "etc"}
    for directory in directories.values():
        directory.mkdir()
    (directories["%S"] / values("sseserve.service", "StateDirectory")[0]).mkdir()
    (directories["%d"] / name).write_text(SECRET)
    assert path == "/etc/sseserve/key"
    template = subprocess.run([BIN / "sseserve", "config", "template"], capture_output=True, check=True)
    (directories["/etc/sseserve"] / "sseserve.toml").write_bytes(template.stdout)

    def resolve(text: str) -> str:
        for prefix, directory in directories.items():
            text = text.replace(prefix, str(directory))
        return text.replace("/opt/sseserve/bin", str(BIN))

    (command,) = values("sseserve.service", "ExecStart")
    (reload,) = values("sseserve.service", "ExecReload")
    environ = [resolve(value) for value in values("sseserve.service", "Environment")]
    environ += [f"NOTIFY_SOCKET={manager.address}", "SSESERVE_DRAIN=1"]
    activate = [require_program("systemd-socket-activate"), f"--listen=127.0.0.1:{port}"]
    running: list[Program] = []

    def start() -> Program:
        # It waits for a connection, as a socket unit does, and then becomes the service.
        options = [f"--setenv={variable}" for variable in environ]
        running.append(Program(*activate, *options, *shlex.split(resolve(command))))
        running[-1].wait_for_output("Listening on")
        httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
        manager.wait_for("READY=1")
        return running[-1]

    def begin(client: httpx.Client) -> Job:
        client.post("/api/sessions", json={"session_id": "j"}).raise_for_status()
        publish = over_http(client, "j")

        def publish_after_reload(percent: int) -> None:
            # Between two events of a stream, which goes on.
            if percent == 40:
                subprocess.run(reload.replace("$MAINPID", str(running[-1].pid)).split(), check=True)
                manager.wait_for("RELOADING=1")
                manager.wait_for("READY=1")
            publish(percent)

        return Job("/api/sessions/j/status/stream", publish_after_reload)

    serve_and_restart(start, f"http://127.0.0.1:{port}", begin, signal.SIGTERM)
    assert manager.waiting()[-1] == "STOPPING=1"
