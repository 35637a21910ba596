"""An interaction: typed events while a recording is transcribed, watched with curl and in a page."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import Example, curl, example, options
from worker import process_audio


def begin(here: Example) -> dict[str, str]:
    """Begin an interaction. Whoever opens its stream now may be earlier than the first event."""
    session_id = f"session{secrets.token_hex(4)}"
    here.work(process_audio, session_id)
    return {"session_id": session_id}


def main() -> None:
    with example(HERE, options(__doc__).parse_args(), begin) as here:
        curl("-N", f"{here.server}/api/interaction/events/{begin(here)['session_id']}")
        # Anybody may publish; the stream of a session is there before the session is.
        greeting = '{"type":"transcription","data":{"text":"hello"}}'
        curl(f"{here.server}/api/interaction/events/by-hand", "-d", greeting)
        here.linger()


if __name__ == "__main__":
    main()
