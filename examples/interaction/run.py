"""Watch typed events while a recording is transcribed, with curl and in a page."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from common import Example, curl, make_parser, run_example
from worker import process_audio


def start_session(example: Example) -> dict[str, str]:
    """Start an interaction. A client may open its stream before the first event is published."""
    session_id = f"session{secrets.token_hex(4)}"
    example.start_worker(process_audio, session_id)
    return {"session_id": session_id}


def main() -> None:
    with run_example(FOLDER, make_parser(__doc__).parse_args(), start_session) as example:
        curl("-N", f"{example.server}/api/interaction/events/{start_session(example)['session_id']}")
        # Publishing to a session that does not exist creates it.
        event = '{"type":"transcription","data":{"text":"hello"}}'
        curl(f"{example.server}/api/interaction/events/by-hand", "-d", event)
        example.serve_page()


if __name__ == "__main__":
    main()
