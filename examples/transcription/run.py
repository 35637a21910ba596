"""A transcription: statuses from a task, watched with curl and in a page with a React hook."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import httpx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import Example, curl, example, options, post
from worker import transcribe_audio


def begin(here: Example) -> dict[str, object]:
    """Take an upload: create the session, and hand it to a task."""
    session_id = str(uuid.uuid4())
    with httpx.Client(base_url=here.server) as client:
        post(client, "/api/sessions", {"session_id": session_id})
    here.work(transcribe_audio, session_id)
    # A hook that is to poll makes no attempt to reconnect.
    return {"session_id": session_id, "options": {"reconnectAttempts": 0} if here.args.no_sse else {}}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--react", type=Path, help="node_modules with React 18; default: a stand-in")
    parser.add_argument("--no-sse", action="store_true", help="switch streaming off: the page polls")
    args = parser.parse_args()
    react = {"/react.js": HERE / "page" / "standin.js"}
    if args.react is not None:
        react = {f"/{name}.js": args.react / name / "umd" / f"{name}.production.min.js" for name in _REACT}
    environ = {"ENABLE_SSE": "false"} if args.no_sse else {}
    with example(HERE, args, begin, extra=react, **environ) as here:
        status = f"{here.server}/api/v1/sessions/{begin(here)['session_id']}/status"
        curl("-N", f"{status}/stream")
        curl(status)
        here.linger()


_REACT = ("react", "react-dom")

if __name__ == "__main__":
    main()
