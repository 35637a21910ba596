"""A therapy session: its recording is processed, watched with Python, with curl and in a page."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import httpx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import Example, curl, example, options, post
from worker import process_session

TOKEN = "a-token"  # as the application's login makes them


def begin(here: Example) -> dict[str, str]:
    """Take an upload: create the session, and let the pipeline begin."""
    session_id = str(uuid.uuid4())
    with httpx.Client(base_url=here.server) as client:
        made = {"session_id": session_id, "owner": "patient-7", "viewers": ["therapist-2"], "lease": 10}
        post(client, "/api/sessions", made)
    here.work(process_session, session_id)
    return {"session_id": session_id, "token": TOKEN}


def main() -> None:
    with example(HERE, options(__doc__).parse_args(), begin) as here:
        session_id = begin(here)["session_id"]
        client = [str(HERE / "client.py"), here.server, session_id, TOKEN]
        print("$ python client.py SERVER SESSION TOKEN", flush=True)
        subprocess.run([sys.executable, *client], check=True)
        # One that comes after the end is told it at once.
        stream = f"{here.server}/api/sessions/{session_id}/status/stream"
        curl("-N", "-H", f"Authorization: Bearer {TOKEN}", stream)
        unknown = f"{here.server}/api/sessions/00000000-0000-0000-0000-000000000000/status/stream"
        curl("-N", "-H", f"Authorization: Bearer {TOKEN}", unknown)
        here.linger()


if __name__ == "__main__":
    main()
