"""The processing pipeline of a therapy session: transcribes the recording, then analyzes the transcript."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import SAMPLE_TEXT, post, transcribe, write_recording


def process_session(server: str, token: str, session_id: str, files: Path, pace: float) -> None:
    """Process one session and publish its progress until it has been processed or has failed.

    ``token`` is one of the role ``service``, which may publish to all sessions.
    """
    with httpx.Client(base_url=server, headers={"Authorization": f"Bearer {token}"}) as client:

        def update_progress(status: str, progress: int, message: str, **more: Any) -> None:
            payload = {"status": status, "progress": progress, "message": message, **more}
            post(client, f"/api/sessions/{session_id}/progress", payload)

        try:
            recording = files / f"{session_id}.wav"
            write_recording(recording, SAMPLE_TEXT)
            text = ""
            for fraction, text in transcribe(recording):
                update_progress("transcribing", int(70 * fraction), f"{len(text.split())} words")
                time.sleep(pace)  # the work is faster than anybody can watch
            words = Counter(word.strip(".").lower() for word in text.split())
            update_progress("analyzing", 85, f"{len(words)} different words")
            time.sleep(pace)  # the work is faster than anybody can watch
            (files / f"{session_id}.txt").write_text(text)
            digest = hashlib.sha256(text.encode()).hexdigest()
            update_progress("processed", 100, "Session processing complete", data={"sha256": digest})
        except Exception as error:
            update_progress("failed", 0, "Processing failed", error=str(error), restart=True)
            raise
