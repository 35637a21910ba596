"""Watch a task of a Celery worker on two servers that share a Redis."""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from common import SAMPLE_TEXT, Example, curl, run_example, run_server
from recording import write_recording

UPLOADED_FIRST = 0.6  # of the recording; the rest comes when the task has found that it is missing


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--http", action="store_true", help="let the worker publish over HTTP, not through Redis"
    )
    parser.add_argument("--words", type=int, default=112, help="length of the recording")
    parser.add_argument("--page-port", type=int, default=0, help="port of the page; 0 selects a free port")
    parser.add_argument("--once", action="store_true", help="exit after the terminal part")
    parser.set_defaults(server=None)
    return parser.parse_args()


def _end_with_parent() -> None:
    """In a child process: end when this program does, however that ends (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@contextmanager
def run_program(*command: str | Path, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the duration of the block. Ctrl-C does not reach it, so that it ends in its turn."""
    process = subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, **environ},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def run_redis() -> Iterator[str]:
    """Run a redis-server that saves nothing; yields its URL."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise SystemExit("this example needs redis-server: apt-get install redis-server")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = ("--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no")
    with run_program(program, *options) as process:
        while process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
            except ConnectionRefusedError:
                time.sleep(0.02)  # between two attempts: it is another process
            else:
                yield f"redis://127.0.0.1:{port}/0"
                return
        raise SystemExit(f"redis-server exited with status {process.returncode}")


class Application:
    """The application's own back end: it accepts recordings and starts tasks.

    Args:
        servers: their URLs; both know all sessions.
        words: length of a recording.
    """

    def __init__(self, servers: list[str], words: int) -> None:
        self.servers = servers
        words_of_text = (SAMPLE_TEXT.split() * (words // 28 + 1))[:words]
        self._text = " ".join(words_of_text)
        self._number = 0

    def start_session(self, example: Example) -> dict[str, Any]:
        """Handle an upload: store its first part, and start the task."""
        from tasks import transcribe_audio

        session_id = str(uuid.uuid4())
        complete, uploaded = (example.files / f"{session_id}{suffix}" for suffix in (".complete", ".wav"))
        write_recording(complete, self._text)
        recording = complete.read_bytes()
        size = int(UPLOADED_FIRST * len(recording))
        uploaded.write_bytes(recording[:size])
        httpx.post(f"{self.servers[0]}/api/sessions", json={"session_id": session_id}).raise_for_status()
        transcribe_audio.delay(session_id, str(uploaded))
        rest = partial(self._upload_rest, example, session_id, uploaded, recording[size:])
        threading.Thread(target=rest, daemon=True).start()
        return {"session_id": session_id, "servers": self.servers}

    def _upload_rest(self, example: Example, session_id: str, path: Path, rest: bytes) -> None:
        """Upload the second part once the task is to be tried again, as one of the servers says."""
        servers = cycle(self.servers)
        while not example.stopping.wait(0.05):
            url = f"{next(servers)}/api/v1/sessions/{session_id}/status"
            try:
                status = httpx.get(url).raise_for_status().json()["status"]
            except httpx.HTTPError:
                continue  # that server is gone, or cannot use Redis
            if status == "retrying":
                with path.open("ab") as file:
                    file.write(rest)
                return


def interrupt(*_signal: object) -> None:
    """End like Ctrl-C."""
    raise KeyboardInterrupt


def check_packages() -> None:
    """Exit if a package is missing that only this example needs."""
    try:
        from celery import Celery  # noqa: F401 - the name tells it from this directory, if that is found instead
        from coredis import Redis  # noqa: F401 - is it installed?
        from redis import Redis as _  # noqa: F401 - is it installed?
    except ImportError:
        raise SystemExit("this example needs more packages: pip install '.[all]' celery") from None


def main() -> None:
    args = parse_arguments()
    check_packages()
    signal.signal(signal.SIGTERM, interrupt)
    with ExitStack() as stack:
        redis = stack.enter_context(run_redis())
        application = Application([], args.words)
        example = stack.enter_context(
            run_example(FOLDER, args, application.start_session, SSESERVE_ENGINE=redis)
        )
        os.environ["CELERY_BROKER_URL"] = redis
        os.environ["STATUS_URL"] = example.server if args.http else redis
        command = (sys.executable, "-m", "celery", "-A", "tasks", "--workdir", str(FOLDER), "worker")
        options = ("--concurrency", "2", "--loglevel", "WARNING", "--without-gossip", "--without-mingle")
        # SIGTERM ends it at once, with the tasks that it runs.
        stack.enter_context(run_program(*command, *options, REMAP_SIGTERM="SIGQUIT"))
        settings = {"SSESERVE_ENGINE": redis, "SSESERVE_CORS_ORIGINS": example.page}
        other = stack.enter_context(run_server(("-m", "sseserve", "serve"), settings))
        application.servers += [example.server, other]
        session_id = application.start_session(example)["session_id"]
        curl("-N", f"{application.servers[0]}/api/v1/sessions/{session_id}/status/stream")
        curl(f"{application.servers[1]}/api/v1/sessions/{session_id}/status")
        example.serve_page()


if __name__ == "__main__":
    main()
