"""The coaching assistant's transcription task, and its StatusPublisher, over HTTP."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import WORDS, post, record, transcribe


class StatusPublisher:
    """Publishes statuses; whatever else ``status_data`` holds reaches the watchers too."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def publish_status_update(self, session_id: str, status_data: dict[str, Any]) -> None:
        """Publish status update to the session's watchers."""
        post(self._client, f"/api/v1/sessions/{session_id}/status", status_data)


def transcribe_audio(server: str, session_id: str, files: Path, pace: float) -> None:
    """Transcribe audio with real-time status updates."""
    with httpx.Client(base_url=server) as client:
        publisher = StatusPublisher(client)

        def processing(progress: int, message: str, **more: Any) -> None:
            said = {"status": "processing", "progress": progress, "message": message, **more}
            publisher.publish_status_update(session_id, said)

        try:
            processing(10, "Starting audio processing...")
            recording = files / f"{session_id}.wav"
            record(recording, WORDS)
            time.sleep(pace)
            text, told = "", 10
            for share, text in transcribe(recording):
                for progress in (25, 50, 75, 90):
                    if told < progress <= 100 * share:
                        processing(progress, f"Heard {progress} %", words=len(text.split()))
                        told = progress
                time.sleep(pace)
            (files / f"{session_id}.txt").write_text(text)
            done = {"status": "completed", "progress": 100, "words": len(text.split())}
            done["message"] = "Transcription completed successfully!"
            publisher.publish_status_update(session_id, done)
        except Exception as error:
            failed = {"status": "failed", "progress": 0, "message": f"Transcription failed: {error}"}
            publisher.publish_status_update(session_id, failed)
            raise
