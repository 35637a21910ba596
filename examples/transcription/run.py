"""Watch the statuses of a transcription task with curl and in a page with a React hook."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import httpx

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from common import Example, curl, make_parser, post, run_example
from worker import transcribe_audio


def start_session(example: Example) -> dict[str, str]:
    """Handle an upload: create the session and start the transcription task."""
    session_id = str(uuid.uuid4())
    with httpx.Client(base_url=example.server) as client:
        post(client, "/api/sessions", {"session_id": session_id})
    example.start_worker(transcribe_audio, session_id)
    return {"session_id": session_id}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--react", type=Path, help="node_modules with React 18; default: page/mini-react.js")
    parser.add_argument("--no-sse", action="store_true", help="disable streaming, so that the page polls")
    args = parser.parse_args()
    scripts = {"/react.js": FOLDER / "page" / "mini-react.js"}
    if args.react is not None:
        umd = "umd/{}.production.min.js"
        scripts = {f"/{name}.js": args.react / name / umd.format(name) for name in ("react", "react-dom")}
    environ = {"ENABLE_SSE": "false"} if args.no_sse else {}
    with run_example(FOLDER, args, start_session, extra_files=scripts, **environ) as example:
        status = f"{example.server}/api/v1/sessions/{start_session(example)['session_id']}/status"
        curl("-N", f"{status}/stream")
        curl(status)
        example.serve_page()


if __name__ == "__main__":
    main()
