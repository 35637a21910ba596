"""Watch the processing of a therapy session, with tokens: in a Python client, with curl and in a page."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import httpx

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from common import Example, curl, make_parser, post, run_example
from worker import process_session


def read_key() -> str:
    """Return the key of a running server, or a new one, as a secret or from a file."""
    text = os.environ.get("SSESERVE_JWT_KEY") or secrets.token_urlsafe(32)
    return Path(text.removeprefix("file:")).read_text().strip("\r\n") if text.startswith("file:") else text


# The application and the event server share it: who has it makes tokens, and the server checks them with it.
KEY = read_key()
LIFETIME = 600  # seconds; the page gets a new token when one is about to expire

# Who may sign in, and what is in their tokens. A real application asks for a password, too.
USERS: dict[str, dict[str, Any]] = {
    "patient-7": {"role": "patient"},
    "therapist-2": {"role": "therapist", "patients": ["patient-7"]},
    "patient-8": {"role": "patient"},
}


def make_token(subject: str, **claims: Any) -> str:
    """Make a token (RFC 7519), as the application's login does."""
    import jwt

    now = int(time.time())
    return jwt.encode({"sub": subject, "iat": now, "exp": now + LIFETIME, **claims}, KEY, "HS256")


def log_in(request: Any) -> dict[str, Any]:
    """Handle the page's login."""
    user = request["user"]
    return {"token": make_token(user, **USERS[user])}


def start_session(example: Example) -> dict[str, str]:
    """Handle an upload: create the patient's session and start the pipeline, which has a service's token."""
    token = make_token("pipeline", role="service")
    session_id = str(uuid.uuid4())
    with httpx.Client(base_url=example.server, headers={"Authorization": f"Bearer {token}"}) as client:
        post(client, "/api/sessions", {"session_id": session_id, "owner": "patient-7", "lease": 10})
    example.start_worker(process_session, token, session_id)
    return {"session_id": session_id}


def run_client(server: str, session_id: str, token: str) -> None:
    """Run the service's Python client.

    Raises:
        SystemExit: it failed.
    """
    print("$ python client.py $SERVER $SESSION $PATIENT", flush=True)
    # In a process group of its own, so that Ctrl-C is for this program, which then ends the client.
    command = [sys.executable, str(FOLDER / "client.py"), server, session_id, token]
    if status := subprocess.run(command, check=False, process_group=0).returncode:
        raise SystemExit(f"client.py exited with status {status}")


def watch(path: str, **who: str) -> None:
    """Watch with curl, as somebody: the name of a variable, and the token that it stands for."""
    ((name, token),) = who.items()
    curl("-N", "-H", f"Authorization: Bearer {token}", path, **{name: token})


def main() -> None:
    for module, package in (("requests", "requests"), ("jwt", "'pyjwt[crypto]'")):
        if importlib.util.find_spec(module) is None:
            raise SystemExit(f"this example requires {package}: {sys.executable} -m pip install {package}")
    args = make_parser(__doc__).parse_args()
    with run_example(FOLDER, args, start_session, login=log_in, SSESERVE_JWT_KEY=KEY) as example:
        session_id = start_session(example)["session_id"]
        tokens = {user: make_token(user, **claims) for user, claims in USERS.items()}
        run_client(example.server, session_id, tokens["patient-7"])
        # A client that connects after the end gets the final event immediately.
        stream = f"{example.server}/api/sessions/{session_id}/status/stream"
        watch(stream, THERAPIST=tokens["therapist-2"])
        # Somebody else is told nothing of the session, not even that there is none of another id.
        unknown = f"{example.server}/api/sessions/00000000-0000-0000-0000-000000000000/status/stream"
        watch(stream, OTHER_PATIENT=tokens["patient-8"])
        watch(unknown, OTHER_PATIENT=tokens["patient-8"])
        watch(unknown, SERVICE=make_token("pipeline", role="service"))
        # What cannot send headers has a ticket, which is for one connection.
        patient = tokens["patient-7"]
        body = json.dumps({"sessions": [session_id]})
        arguments = ("-H", f"Authorization: Bearer {patient}", "-d", body, f"{example.server}/api/tickets")
        ticket = json.loads(curl(*arguments, PATIENT=patient))["ticket"]
        for _ in range(2):
            curl("-N", f"{stream}?ticket={ticket}", TICKET=ticket)
        example.serve_page()


if __name__ == "__main__":
    main()
