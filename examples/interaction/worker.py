"""The audio processing of the interaction service: it listens to a recording and says how far it is."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import WORDS, post, record, transcribe


class EventStreamService:
    """``PublishEventAsync`` over HTTP. With nobody listening the server keeps what comes."""

    def __init__(self, server: str) -> None:
        self._client = httpx.Client(base_url=server)

    def publish_event(self, session_id: str, type: str, data: Any) -> None:  # noqa: A002
        post(self._client, f"/api/interaction/events/{session_id}", {"type": type, "data": data})


def process_audio(server: str, session_id: str, files: Path, pace: float) -> None:
    """Transcribe a recording that arrived broken, and then the one that was sent again."""
    events = EventStreamService(server)
    recording = files / f"{session_id}.wav"
    record(recording, WORDS)
    os.truncate(recording, recording.stat().st_size // 3)
    try:
        _transcribe(events, session_id, recording, pace)
    except ValueError:
        record(recording, WORDS)
        _transcribe(events, session_id, recording, pace)
    # For watchers this is the end of the stream.
    events.publish_event(session_id, "complete", {"message": "Done"})


def _transcribe(events: EventStreamService, session_id: str, recording: Path, pace: float) -> None:
    def processing(progress: float, message: str) -> None:
        said = {"stage": "audio-transcription", "progress": progress, "message": message}
        events.publish_event(session_id, "processing", said)

    processing(0, "Starting audio transcription...")
    heard = ""
    try:
        for share, heard in transcribe(recording):
            processing(round(share, 2), f"Transcribing audio... {len(heard)} letters")
            time.sleep(pace)
        events.publish_event(session_id, "transcription", {"text": heard, "confidence": 0.95})
    except ValueError as error:
        failure = {"code": "TRANSCRIPTION_FAILED", "message": f"Failed to transcribe audio: {error}"}
        events.publish_event(session_id, "error", {**failure, "recoverable": True})
        raise
