"""Run the server, other programs and Chromium as processes. All calls block: for tests without async."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, sync_playwright
from programs import require_program

__all__ = [
    "FLAGS",
    "ROOT",
    "Chromium",
    "Program",
    "Proxy",
    "install_node_packages",
    "run_server",
    "wait_until",
]

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 20.0  # seconds; far more than anything here takes
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Poll until ``condition`` returns a true value; return it. ``what`` names it in the failure."""
    deadline = time.monotonic() + TIMEOUT
    while not (value := condition()):
        assert time.monotonic() < deadline, f"timed out after {TIMEOUT:g} s: {what}"
        time.sleep(0.01)
    return value


class Program:
    """A running program; ``output`` is what it has written to standard output and standard error."""

    def __init__(self, *command: str | Path, **environ: str) -> None:
        self.output = ""
        self._output_changed = threading.Condition()
        self._process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            with self._output_changed:
                self.output += line
                self._output_changed.notify_all()
        with self._output_changed:
            self._output_changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        # The whole process group: its child processes too.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()

    def wait_for_output(self, pattern: str) -> re.Match[str]:
        """Wait until the output matches the regular expression; return the match."""

        def search() -> re.Match[str] | None:
            return re.search(pattern, self.output, re.MULTILINE)

        with self._output_changed:
            self._output_changed.wait_for(lambda: search() or self._process.poll() is not None, TIMEOUT)
            match = search()
        assert match, f"no output matched {pattern!r}:\n{self.output}"
        return match

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_exited(self) -> bool:
        return self._process.poll() is not None

    def signal(self, signal_number: int) -> None:
        self._process.send_signal(signal_number)

    def press_ctrl_c(self) -> None:
        """Interrupt it and its child processes, as a terminal does."""
        os.killpg(self._process.pid, signal.SIGINT)

    def wait(self, signal_number: int | None = None) -> int:
        """Wait until it exits, after sending a signal if one is given; return its exit status."""
        if signal_number is not None:
            self.signal(signal_number)
        status = self._process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        return status


@contextmanager
def run_server(**settings: Any) -> Iterator[str]:
    """Run a server on a free port; yields its URL."""
    environ = {f"SSESERVE_{name.upper()}": str(value) for name, value in settings.items()}
    with Program(sys.executable, "-m", "sseserve", "serve", "--port", "0", **environ) as program:
        yield program.wait_for_output(r"serving at (\S+)")[1]
        assert program.wait(signal.SIGTERM) == 0, program.output


def install_node_packages(folder: Path, packages: str = "npm") -> Path:
    """Install the locked packages of a folder of tests/ into ``folder``; return its node_modules."""
    for path in (ROOT / "tests" / packages).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    command = [
        require_program("npm"),
        "ci",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--prefer-offline",
    ]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=50, check=False)
    assert process.returncode == 0, process.stderr
    return folder / "node_modules"


def _peek(client: socket.socket) -> bytes:
    """Return what has come first, without taking it; empty if the client has left."""
    with suppress(OSError):
        return client.recv(65536, socket.MSG_PEEK)
    return b""


class Proxy:
    """A TCP proxy that forwards connections to a server and can break them.

    With ``refuse_upgrades`` no WebSocket gets through; ``refused`` counts them.
    """

    def __init__(self, url: str, *, refuse_upgrades: bool = False) -> None:
        target = urlsplit(url)
        self._target = (target.hostname, target.port)
        self._refuse_upgrades = refuse_upgrades
        self.refused = 0
        self._connections: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(self, *_error: object) -> None:
        # Closing a socket does not wake a thread that blocks on it; shutting it down does.
        self._listener.shutdown(socket.SHUT_RDWR)
        self.disconnect_all()
        for thread in self._threads:
            thread.join(TIMEOUT)
        self._listener.close()

    def disconnect_all(self) -> None:
        """Close all connections, abruptly."""
        with self._lock:
            for end in [end for ends in self._connections for end in ends]:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as upstream:
            ends = (client, upstream)
            with self._lock:
                self._connections.add(ends)
            # The head of a handshake comes in one piece.
            if self._refuse_upgrades and b"\r\nupgrade: websocket" in _peek(client).lower():
                self.refused += 1
                client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                upstream.shutdown(socket.SHUT_RDWR)
            upward = threading.Thread(target=self._pump, args=(client, upstream), daemon=True)
            upward.start()
            self._pump(upstream, client)
            upward.join()
            with self._lock:
                self._connections.discard(ends)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        """Forward bytes until either side closes."""
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Chromium:
    """Chromium in its own thread, because Playwright runs an event loop in the thread that uses it."""

    def __init__(self) -> None:
        self._path = require_program("chromium")
        self._thread = ThreadPoolExecutor(1)
        self._browser: Browser | None = None

    def __enter__(self) -> Self:
        self._thread.submit(self._open).result()
        return self

    def __exit__(self, *_error: object) -> None:
        self._thread.submit(self._close).result()
        self._thread.shutdown()

    def _open(self) -> None:
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=self._path, args=FLAGS)

    def _close(self) -> None:
        self._browser.close()
        self._playwright.stop()

    def visit(self, scenario: Callable[[Page], Any], **options: Any) -> tuple[Any, list[str]]:
        """Call ``scenario`` with a new page; return its result and the errors logged to the console."""
        return self._thread.submit(self._visit, scenario, options).result()

    def _visit(self, scenario: Callable[[Page], Any], options: dict[str, Any]) -> tuple[Any, list[str]]:
        errors: list[str] = []
        context = self._browser.new_context(**options)
        context.set_default_timeout(TIMEOUT * 1000)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        try:
            return scenario(page), errors
        finally:
            context.close()
