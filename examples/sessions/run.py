"""Watch the processing of a therapy session with a Python client, with curl and in a page."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import uuid
from pathlib import Path

import httpx

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from common import Example, curl, make_parser, post, run_example
from worker import process_session

TOKEN = "a-token"  # in a real application its login issues the token


def start_session(example: Example) -> dict[str, str]:
    """Handle an upload: create the session and start the pipeline."""
    session_id = str(uuid.uuid4())
    with httpx.Client(base_url=example.server) as client:
        request = {"session_id": session_id, "owner": "patient-7", "viewers": ["therapist-2"], "lease": 10}
        post(client, "/api/sessions", request)
    example.start_worker(process_session, session_id)
    return {"session_id": session_id, "token": TOKEN}


def run_client(*args: str) -> None:
    """Run the service's Python client.

    Raises:
        SystemExit: it failed.
    """
    print("$ python client.py SERVER SESSION TOKEN", flush=True)
    # In a process group of its own, so that Ctrl-C is for this program, which then ends the client.
    command = [sys.executable, str(FOLDER / "client.py"), *args]
    if status := subprocess.run(command, check=False, process_group=0).returncode:
        raise SystemExit(f"client.py exited with status {status}")


def main() -> None:
    if importlib.util.find_spec("requests") is None:
        raise SystemExit(f"this example's client requires requests: {sys.executable} -m pip install requests")
    with run_example(FOLDER, make_parser(__doc__).parse_args(), start_session) as example:
        session_id = start_session(example)["session_id"]
        run_client(example.server, session_id, TOKEN)
        # A client that connects after the end gets the final event immediately.
        stream = f"{example.server}/api/sessions/{session_id}/status/stream"
        curl("-N", "-H", f"Authorization: Bearer {TOKEN}", stream)
        unknown = f"{example.server}/api/sessions/00000000-0000-0000-0000-000000000000/status/stream"
        curl("-N", "-H", f"Authorization: Bearer {TOKEN}", unknown)
        example.serve_page()


if __name__ == "__main__":
    main()
