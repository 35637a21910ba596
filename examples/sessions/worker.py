"""The pipeline of a therapy session: it transcribes the recording, then looks at what was said."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import WORDS, post, record, transcribe


def process_session(server: str, session_id: str, files: Path, pace: float) -> None:
    """Process one session to its end, which is an error if anything goes wrong."""
    with httpx.Client(base_url=server) as client:

        def update_progress(status: str, progress: int, message: str, **more: Any) -> None:
            said = {"status": status, "progress": progress, "message": message, **more}
            post(client, f"/api/sessions/{session_id}/progress", said)

        try:
            recording = files / f"{session_id}.wav"
            record(recording, WORDS)
            text = ""
            for share, text in transcribe(recording):
                update_progress("transcribing", int(70 * share), f"{len(text.split())} words")
                time.sleep(pace)
            said = Counter(word.strip(".").lower() for word in text.split())
            update_progress("analyzing", 85, f"{len(said)} different words")
            time.sleep(pace)
            (files / f"{session_id}.txt").write_text(text)
            digest = hashlib.sha256(text.encode()).hexdigest()
            end = {"message": "Session processing complete", "data": {"sha256": digest}}
            update_progress("processed", 100, **end)
        except Exception as error:
            update_progress("failed", 0, "Processing failed", error=str(error), restart=True)
            raise
