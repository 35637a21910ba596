"""The server, other programs and Chromium as processes. Nothing is awaited: tests of them are not async."""

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
from support_programs import need

__all__ = ["ROOT", "Chromium", "Program", "Proxy", "node_packages", "server", "until"]

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20.0  # seconds; far more than anything here takes
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until a condition holds that nobody announces; return its value."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)
    return value


class Program:
    """A program that runs, and what it has said on both of its outputs."""

    def __init__(self, *command: str | Path, **environ: str) -> None:
        self.output = ""
        self._news = threading.Condition()
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
            with self._news:
                self.output += line
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        # Whatever it has started goes with it.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()

    def says(self, pattern: str) -> re.Match[str]:
        """Wait until the output matches."""

        def known() -> re.Match[str] | None:
            return re.search(pattern, self.output, re.MULTILINE)

        with self._news:
            self._news.wait_for(lambda: known() or self._process.poll() is not None, PATIENCE)
            found = known()
        assert found, f"it never said {pattern!r}, but:\n{self.output}"
        return found

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self, number: int | None = None) -> int:
        """Wait for its end, after a signal if one is named; return its status."""
        if number is not None:
            self.signal(number)
        status = self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status


@contextmanager
def server(**settings: Any) -> Iterator[str]:
    """Run a server on a free port; the block gets its URL."""
    environ = {f"SSESERVE_{name.upper()}": str(value) for name, value in settings.items()}
    with Program(sys.executable, "-m", "sseserve", "serve", "--port", "0", **environ) as program:
        yield program.says(r"serving at (\S+)")[1]
        assert program.end(signal.SIGTERM) == 0, program.output


def node_packages(folder: Path) -> Path:
    """Install the packages of tests/npm as their lock file has them; return their folder."""
    for path in (ROOT / "tests" / "npm").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    command = [need("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "node_modules"


class Proxy:
    """Passes connections on to a server, and breaks streams when it is told to.

    ``limits`` says of how many bytes of the first answer to a path (without its query) clients get no more:
    there the connection ends, in the middle of an event if that is where it is.
    """

    def __init__(self, url: str, limits: dict[str, int] | None = None) -> None:
        found = urlsplit(url)
        self._target = (found.hostname, found.port)
        self._limits = dict(limits or {})
        self._live: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self.cuts: list[str] = []  # paths whose limit was reached

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(self, *_error: object) -> None:
        # A shutdown is what wakes a thread that waits for the socket; a close does not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE)
        self._listener.close()

    def cut(self) -> None:
        """Break all connections."""
        with self._lock:
            for end in [end for ends in self._live for end in ends]:
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
        with client, socket.create_connection(self._target) as server, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head and (data := client.recv(65536)):
                head += data
            if not head:
                return
            path = head.split(b" ", 2)[1].decode().partition("?")[0]
            ends = (client, server)
            with self._lock:
                limit = self._limits.pop(path, None)
                self._live.add(ends)
            server.sendall(head)
            upward = threading.Thread(target=self._pump, args=(client, server, None), daemon=True)
            upward.start()
            if self._pump(server, client, limit):
                self.cuts.append(path)
            upward.join()
            with self._lock:
                self._live.discard(ends)

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> bool:
        """Pass bytes on until either side ends; returns whether it was we who ended it."""
        cut = False
        with suppress(OSError):
            while not cut and (data := source.recv(65536)):
                if limit is not None:
                    data, cut = data[:limit], len(data) >= limit
                    limit -= len(data)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        return cut


class Chromium:
    """Chromium in a thread of its own, because Playwright keeps an event loop where it runs."""

    def __init__(self) -> None:
        self._path = need("chromium")
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

    def visit(self, look: Callable[[Page], Any], **options: Any) -> tuple[Any, list[str]]:
        """Call ``look`` with a fresh page; return its result, and the errors that the console has shown."""
        return self._thread.submit(self._visit, look, options).result()

    def _visit(self, look: Callable[[Page], Any], options: dict[str, Any]) -> tuple[Any, list[str]]:
        errors: list[str] = []
        context = self._browser.new_context(**options)
        context.set_default_timeout(PATIENCE * 1000)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        try:
            return look(page), errors
        finally:
            context.close()
