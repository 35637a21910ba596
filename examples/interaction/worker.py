"""The interaction service's audio processing: transcribes a recording and publishes its progress."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import SAMPLE_TEXT, post, transcribe, write_recording


class EventStreamService:
    """The service's ``PublishEventAsync``, over HTTP. The server stores events even if nobody is watching."""

    def __init__(self, server: str) -> None:
        self._client = httpx.Client(base_url=server)

    def publish_event(self, session_id: str, type: str, data: Any) -> None:  # noqa: A002 - the event stream's own word
        post(self._client, f"/api/interaction/events/{session_id}", {"type": type, "data": data})


def process_audio(server: str, session_id: str, files: Path, pace: float) -> None:
    """Fail to transcribe a truncated recording, then transcribe a complete one."""
    events = EventStreamService(server)
    recording = files / f"{session_id}.wav"
    write_recording(recording, SAMPLE_TEXT)
    os.truncate(recording, recording.stat().st_size // 3)
    try:
        _transcribe(events, session_id, recording, pace)
    except ValueError:
        write_recording(recording, SAMPLE_TEXT)
        _transcribe(events, session_id, recording, pace)
    # Ends the session, and with it the clients' streams.
    events.publish_event(session_id, "complete", {"message": "Done"})


def _transcribe(events: EventStreamService, session_id: str, recording: Path, pace: float) -> None:
    def publish_progress(fraction: float, message: str) -> None:
        data = {"stage": "audio-transcription", "progress": fraction, "message": message}
        events.publish_event(session_id, "processing", data)

    publish_progress(0, "Starting audio transcription...")
    text = ""
    try:
        for fraction, text in transcribe(recording):
            publish_progress(round(fraction, 2), f"Transcribing audio... {len(text)} characters")
            time.sleep(pace)  # the work is faster than anybody can watch
        events.publish_event(session_id, "transcription", {"text": text, "confidence": 0.95})
    except ValueError as error:
        failure = {"code": "TRANSCRIPTION_FAILED", "message": f"Failed to transcribe audio: {error}"}
        events.publish_event(session_id, "error", {**failure, "recoverable": True})
        raise
