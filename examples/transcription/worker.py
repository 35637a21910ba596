"""The coaching assistant's transcription task, with a StatusPublisher that publishes over HTTP."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import SAMPLE_TEXT, post, transcribe, write_recording


class StatusPublisher:
    """Publishes statuses. Additional members of ``status_data`` are sent to the watchers unchanged."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def publish_status_update(self, session_id: str, status_data: dict[str, Any]) -> None:
        """Publish a status update to the session's watchers."""
        post(self._client, f"/api/v1/sessions/{session_id}/status", status_data)


def transcribe_audio(server: str, session_id: str, files: Path, pace: float) -> None:
    """Transcribe a recording and publish its status until it has completed or failed."""
    with httpx.Client(base_url=server) as client:
        publisher = StatusPublisher(client)

        def publish_progress(progress: int, message: str, **more: Any) -> None:
            status_data = {"status": "processing", "progress": progress, "message": message, **more}
            publisher.publish_status_update(session_id, status_data)

        try:
            publish_progress(10, "Starting audio processing...")
            recording = files / f"{session_id}.wav"
            write_recording(recording, SAMPLE_TEXT)
            time.sleep(pace)  # the work is faster than anybody can watch
            text, published = "", 10
            for fraction, text in transcribe(recording):
                for progress in (25, 50, 75, 90):
                    if published < progress <= 100 * fraction:
                        publish_progress(progress, f"Transcribed {progress}%", words=len(text.split()))
                        published = progress
                time.sleep(pace)  # the work is faster than anybody can watch
            (files / f"{session_id}.txt").write_text(text)
            completed = {
                "status": "completed",
                "progress": 100,
                "message": "Transcription completed successfully!",
                "words": len(text.split()),
            }
            publisher.publish_status_update(session_id, completed)
        except Exception as error:
            failed = {"status": "failed", "progress": 0, "message": f"Transcription failed: {error}"}
            publisher.publish_status_update(session_id, failed)
            raise
