"""What the examples share: a server, a page of another origin, curl, and recordings to work on."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import wave
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

WORDS = (
    "The patient slept better this week. She walks to the harbour in the morning and writes a page "
    "before breakfast. We agreed to meet again in two weeks."
)


def options(description: str) -> argparse.ArgumentParser:
    """Make the parser of an example's command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--server", help="URL of a server that runs already; it must allow the page's origin")
    parser.add_argument("--page-port", type=int, default=0, help="port of the page; 0 takes a free one")
    parser.add_argument("--pace", type=float, default=0.1, help="seconds to rest after each step of the work")
    parser.add_argument("--once", action="store_true", help="end after the work in the terminal")
    return parser


class Example:
    """A server, a page that is its client, and a place for files."""

    def __init__(self, args: argparse.Namespace, page: str, files: Path) -> None:
        self.args = args
        self.page = page
        self.files = files
        self.server = ""

    def work(self, worker: Callable[..., None], session_id: str, *args: Any) -> None:
        """Start a worker for a session: ``worker(server, session_id, files, pace, *args)``."""
        given = (self.server, session_id, self.files, self.args.pace, *args)
        threading.Thread(target=worker, args=given, daemon=True).start()

    def linger(self) -> None:
        """Serve the page until Ctrl-C."""
        if self.args.once:
            return
        try:
            print(f"\nOpen {self.page}/ in a browser. Ctrl-C ends.", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


@contextmanager
def example(
    folder: Path,
    args: argparse.Namespace,
    begin: Callable[[Example], dict[str, Any]] | None = None,
    *,
    command: tuple[str, ...] = ("-m", "sseserve", "serve"),
    extra: dict[str, Path] | None = None,
    **environ: str,
) -> Iterator[Example]:
    """Run what an example needs for the length of a block.

    Args:
        folder: the example; its ``page`` is served.
        begin: what ``POST /begin`` of the page's server does: start some work and say which.
        command: the Python program that is the server, unless ``--server`` names one.
        extra: more files for the page, by their path.
        environ: more settings for the server.
    """
    with ExitStack() as stack:
        files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sseserve-example-")))
        handler = partial(_Page, directory=str(folder / "page"))
        http = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", args.page_port), handler))
        http.daemon_threads = True
        here = Example(args, f"http://127.0.0.1:{http.server_address[1]}", files)
        http.example, http.begin, http.extra = here, begin, extra or {}  # type: ignore[attr-defined]
        settings = {"SSESERVE_CORS_ORIGINS": here.page, **environ}
        here.server = args.server or stack.enter_context(_server(command, settings))
        threading.Thread(target=http.serve_forever, daemon=True).start()
        stack.callback(http.shutdown)
        yield here


@contextmanager
def _server(command: tuple[str, ...], settings: dict[str, str]) -> Iterator[str]:
    """Run a server on a free port; the block gets its URL."""
    process = subprocess.Popen(
        [sys.executable, *command, "--port", "0"],
        env={**os.environ, **settings},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if found := re.search(r"serving at (\S+)", line):
                break
            sys.stderr.write(line)
        else:
            raise SystemExit(f"the server ended with {process.wait()}")
        # Its log goes on: somebody has to read it.
        threading.Thread(target=_copy, args=(process.stderr,), daemon=True).start()
        yield found[1]
    finally:
        process.terminate()
        process.wait(10)


def _copy(lines: Iterator[str]) -> None:
    for line in lines:
        sys.stderr.write(line)


class _Page(SimpleHTTPRequestHandler):
    """Serves the page, says where the server is, and starts work: the application's own back end."""

    def do_GET(self) -> None:
        if self.path == "/config":
            self._say({"server": self.server.example.server})
        elif (found := self.server.extra.get(self.path)) is not None:
            self._send("text/javascript", found.read_bytes())
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/begin" or self.server.begin is None:
            self.send_error(404)
            return
        self._say({"server": self.server.example.server, **self.server.begin(self.server.example)})

    def _say(self, value: dict[str, Any]) -> None:
        self._send("application/json", json.dumps(value).encode())

    def _send(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def curl(*args: str) -> str:
    """Run curl as a reader would type it, and return what it said."""
    print(f"$ curl {shlex.join(args)}", flush=True)
    if shutil.which("curl") is None:
        raise SystemExit("this needs curl")
    said = []
    with subprocess.Popen(["curl", "-sS", *args], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            said.append(line)
            print(line, end="", flush=True)
    print(flush=True)
    if process.returncode:
        raise SystemExit(f"curl ended with {process.returncode}")
    return "".join(said)


def post(client: httpx.Client, path: str, body: Any, **headers: str) -> Any:
    """Send JSON; returns the answer's."""
    return client.post(path, json=body, headers=headers).raise_for_status().json()


# Recordings: speech as machines would have it. A byte is two tones, each of one of sixteen frequencies.

_RATE = 8000
_TONE = 80  # samples


def record(path: Path, text: str) -> None:
    """Write what is said as a WAV file."""
    samples = array("h")
    for byte in text.encode():
        for half in (byte >> 4, byte & 15):
            step = 2 * math.pi * (500 + 200 * half) / _RATE
            samples.extend(round(20_000 * math.sin(step * (n + 0.5))) for n in range(_TONE))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes(samples.tobytes())


def transcribe(path: Path) -> Iterator[tuple[float, str]]:
    """Listen to a recording. After each word: the share that was heard (0 to 1), and the text so far.

    Raises:
        ValueError: the recording ends early, or somebody mumbles.
    """
    with wave.open(str(path), "rb") as file:
        count = file.getnframes()
        samples = array("h", file.readframes(count))
    text = bytearray()
    for start in range(0, count, 2 * _TONE):
        if len(samples) < start + 2 * _TONE:
            raise ValueError("the recording ends early")
        high, low = (_tone(samples[at : at + _TONE]) for at in (start, start + _TONE))
        text.append(high << 4 | low)
        if text.endswith(b" "):
            yield start / count, text.decode().rstrip()
    yield 1.0, text.decode()


def _tone(samples: array[int]) -> int:
    crossings = sum((a < 0) != (b < 0) for a, b in pairwise(samples))
    found = round((crossings - 10) / 4)
    if not 0 <= found <= 15:
        raise ValueError("nobody says this")
    return found
