"""Code that the examples share: a server, a web page on another origin, curl, and simulated recordings."""

from __future__ import annotations

import argparse
import json
import math
import mimetypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
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

SAMPLE_TEXT = (
    "The patient slept better this week. She walks to the harbour in the morning and writes a page "
    "before breakfast. We agreed to meet again in two weeks."
)

_STYLE = Path(__file__).resolve().parent / "style.css"  # of the examples' pages


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make the parser of an example's command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--server", help="URL of a running server, which must allow the page's origin")
    parser.add_argument("--page-port", type=int, default=0, help="port of the page; 0 selects a free port")
    parser.add_argument("--pace", type=float, default=0.1, help="seconds to wait after each step of the work")
    parser.add_argument("--once", action="store_true", help="exit after the terminal part")
    return parser


class Example:
    """The URLs, arguments and working directory of a running example.

    Attributes:
        args: the parsed command line.
        server: URL of the sseserve server.
        page: URL of the page, which is the server's client.
        files: directory for the workers' files, deleted at the end.
        stopping: set when the example ends.
    """

    def __init__(self, args: argparse.Namespace, page: str, files: Path) -> None:
        self.args = args
        self.page = page
        self.files = files
        self.server = ""
        self.stopping = threading.Event()

    def start_worker(self, worker: Callable[..., None], *args: object) -> None:
        """Call ``worker(server, *args, files, pace)`` in a thread."""

        def work() -> None:
            try:
                worker(self.server, *args, self.files, self.args.pace)
            except Exception:
                # Ctrl-C also stops the server, maybe before this program knows that it is to stop.
                if not self.stopping.wait(1):
                    raise

        threading.Thread(target=work, daemon=True).start()

    def serve_page(self) -> None:
        """Print the page's address, and serve it until Ctrl-C is pressed."""
        if self.args.once:
            return
        try:
            print(f"\nOpen {self.page}/ in a browser. Press Ctrl-C to stop.", flush=True)
            # A wait without a timeout does not end if the kernel gives the signal to another thread.
            while True:
                time.sleep(0.2)
        except KeyboardInterrupt:
            print()


@contextmanager
def run_example(
    folder: Path,
    args: argparse.Namespace,
    start_session: Callable[[Example], dict[str, Any]] | None = None,
    *,
    login: Callable[[Any], dict[str, Any]] | None = None,
    command: tuple[str, ...] = ("-m", "sseserve", "serve"),
    extra_files: dict[str, Path] | None = None,
    **environ: str,
) -> Iterator[Example]:
    """Run the server and the page of an example for the duration of the block.

    Args:
        folder: the example's directory; its ``page`` directory is served.
        args: the command line, from `make_parser`.
        start_session: handles ``POST /begin`` of the page's server; returns the JSON of the response.
        login: handles ``POST /login``: takes the JSON of the body, and returns that of the response.
        command: arguments of ``python`` that run the server, unless ``--server`` is given.
        extra_files: more files that the page's server serves, by path.
        environ: environment variables of the server.

    Ctrl-C ends the program with status 130.
    """
    try:
        with _run_all(folder, args, start_session, login, command, extra_files or {}, environ) as example:
            yield example
    except KeyboardInterrupt:
        print()
        raise SystemExit(130) from None


@contextmanager
def _run_all(
    folder: Path,
    args: argparse.Namespace,
    start_session: Callable[[Example], dict[str, Any]] | None,
    login: Callable[[Any], dict[str, Any]] | None,
    command: tuple[str, ...],
    extra_files: dict[str, Path],
    environ: dict[str, str],
) -> Iterator[Example]:
    with ExitStack() as stack:
        # A worker may still write a file while the directory is being deleted.
        temporary = tempfile.TemporaryDirectory(prefix="sseserve-example-", ignore_cleanup_errors=True)
        files = Path(stack.enter_context(temporary))
        handler = partial(_PageHandler, directory=str(folder / "page"))
        page_server = stack.enter_context(_PageServer(("127.0.0.1", args.page_port), handler))
        example = Example(args, f"http://127.0.0.1:{page_server.server_address[1]}", files)
        page_server.example = example
        page_server.start_session = start_session
        page_server.login = login
        page_server.extra_files = {"/style.css": _STYLE, **extra_files}
        settings = {"SSESERVE_CORS_ORIGINS": example.page, **environ}
        example.server = args.server or stack.enter_context(run_server(command, settings))
        threading.Thread(target=page_server.serve_forever, daemon=True).start()
        stack.callback(page_server.shutdown)
        stack.callback(example.stopping.set)
        yield example


@contextmanager
def run_server(command: tuple[str, ...], settings: dict[str, str]) -> Iterator[str]:
    """Run a server on a free port for the duration of the block, which gets its URL."""
    process = subprocess.Popen(
        [sys.executable, *command, "--port", "0"],
        env={**os.environ, **settings},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if match := re.search(r"serving at (\S+)", line):
                break
            sys.stderr.write(line)
        else:
            raise SystemExit(f"the server exited with status {process.wait()}")
        # Keep reading the server's log: it would block once the pipe is full.
        threading.Thread(target=_copy_to_stderr, args=(process.stderr,), daemon=True).start()
        yield match[1]
    finally:
        process.terminate()
        process.wait(10)


def _copy_to_stderr(lines: Iterator[str]) -> None:
    for line in lines:
        sys.stderr.write(line)


class _PageServer(ThreadingHTTPServer):
    """Serves the page of an example; its handlers read these attributes."""

    daemon_threads = True
    example: Example
    start_session: Callable[[Example], dict[str, Any]] | None
    login: Callable[[Any], dict[str, Any]] | None
    extra_files: dict[str, Path]


class _PageHandler(SimpleHTTPRequestHandler):
    """The application's own back end: serves the page, its configuration and login, and starts sessions."""

    def do_GET(self) -> None:
        if self.path == "/config":
            self._send_json({"server": self.server.example.server})
        elif (file := self.server.extra_files.get(self.path)) is not None:
            self._send_body(mimetypes.guess_type(self.path)[0] or "text/plain", file.read_bytes())
        else:
            super().do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        example, server = self.server.example, self.server
        if self.path == "/begin" and server.start_session is not None:
            self._send_json({"server": example.server, **server.start_session(example)})
        elif self.path == "/login" and server.login is not None:
            self._send_json(server.login(json.loads(body)))
        else:
            self.send_error(404)

    def _send_json(self, value: dict[str, Any]) -> None:
        self._send_body("application/json", json.dumps(value).encode())

    def _send_body(self, content_type: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def curl(*args: str, **variables: str) -> str:
    """Print a curl command, run it, and return its output, which is also printed.

    Args:
        args: of the command.
        variables: texts that are printed as the variables of these names.

    Raises:
        SystemExit: curl is not installed, or it failed.
    """
    print("$ curl", *(_shown(argument, variables) for argument in args), flush=True)
    if shutil.which("curl") is None:
        raise SystemExit("this example requires curl")
    lines = []
    with subprocess.Popen(["curl", "-sS", *args], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    print(flush=True)
    if process.returncode:
        raise SystemExit(f"curl exited with status {process.returncode}")
    return "".join(lines)


def _shown(argument: str, variables: dict[str, str]) -> str:
    for name, text in variables.items():
        if text in argument:
            return f'"{argument.replace(text, f"${name}")}"'
    return shlex.quote(argument)


def post(client: httpx.Client, path: str, body: Any) -> Any:
    """Send a JSON body; return the JSON body of the response.

    Raises:
        httpx.HTTPStatusError: the response is an error.
    """
    return client.post(path, json=body).raise_for_status().json()


# Simulated speech, so that the examples need no speech recognition: a byte is two tones, one for each half,
# and a tone has one of sixteen frequencies.

_SAMPLE_RATE = 8000  # Hz
_TONE_LENGTH = 80  # samples


def write_recording(path: Path, text: str) -> None:
    """Encode ``text`` as simulated speech in a WAV file."""
    samples = array("h")
    for byte in text.encode():
        for nibble in (byte >> 4, byte & 15):
            step = 2 * math.pi * (500 + 200 * nibble) / _SAMPLE_RATE
            samples.extend(round(20_000 * math.sin(step * (n + 0.5))) for n in range(_TONE_LENGTH))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_SAMPLE_RATE)
        file.writeframes(samples.tobytes())


def transcribe(path: Path) -> Iterator[tuple[float, str]]:
    """Decode a recording of `write_recording`.

    Yields:
        After each word: the fraction of the recording that is transcribed (0 to 1), and the text so far.

    Raises:
        ValueError: the recording is truncated or is not simulated speech.
    """
    with wave.open(str(path), "rb") as file:
        count = file.getnframes()
        samples = array("h", file.readframes(count))
    text = bytearray()
    for start in range(0, count, 2 * _TONE_LENGTH):
        if len(samples) < start + 2 * _TONE_LENGTH:
            raise ValueError("the recording is truncated")
        high, low = (_decode_tone(samples[at : at + _TONE_LENGTH]) for at in (start, start + _TONE_LENGTH))
        text.append(high << 4 | low)
        if text.endswith(b" "):
            yield start / count, text.decode().rstrip()
    yield 1.0, text.decode()


def _decode_tone(samples: array[int]) -> int:
    zero_crossings = sum((a < 0) != (b < 0) for a, b in pairwise(samples))
    nibble = round((zero_crossings - 10) / 4)
    if not 0 <= nibble <= 15:
        raise ValueError("the recording contains an unknown tone")
    return nibble
