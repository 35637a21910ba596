"""The Celery application: a task that transcribes a recording, and publishes its status as it goes on.

``CELERY_BROKER_URL`` is the Redis that Celery uses, ``STATUS_URL`` where statuses are published: a Redis, or
a server over HTTP.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from celery import Celery, Task

from sseserve.client import StatusPublisher

sys.path.insert(0, str(Path(__file__).resolve().parent))
from recording import TruncatedRecordingError, transcribe

app = Celery("transcription", broker=os.environ["CELERY_BROKER_URL"])
app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)

# One for all tasks of a worker, also in the processes that it forks.
publisher = StatusPublisher(os.environ["STATUS_URL"])


class TranscriptionTask(Task):
    """Publishes what Celery decides about a task; ``args`` are its own, the first is the session."""

    def on_retry(self, exc: Exception, _task_id: str, args: Any, *_details: Any) -> None:
        """The task will run again."""
        status = {"status": "retrying", "message": f"Trying again soon: {exc}"}
        publisher.publish_status_update(args[0], status)

    def on_failure(self, exc: Exception, _task_id: str, args: Any, *_details: Any) -> None:
        """The task has failed for good."""
        status = {"status": "failed", "progress": 0, "message": f"Transcription failed: {exc}"}
        publisher.publish_status_update(args[0], status)


@app.task(
    bind=True,
    base=TranscriptionTask,
    autoretry_for=(TruncatedRecordingError,),
    retry_kwargs={"max_retries": 1, "countdown": 1},
)
def transcribe_audio(self: Task, session_id: str, recording: str) -> None:
    """Transcribe the recording at a path; publish the text so far after each word."""
    attempt = self.request.retries + 1
    message = "Starting audio processing..."
    status = {"status": "processing", "progress": 1, "message": message, "attempt": attempt}
    publisher.publish_status_update(session_id, status)
    text = ""
    for fraction, text in transcribe(Path(recording)):
        status = {
            "status": "processing",
            "progress": round(1 + 98 * fraction, 1),
            "message": f"Words so far: {len(text.split())}",
            "attempt": attempt,
            "text": text,
        }
        publisher.publish_status_update(session_id, status)
    status = {
        "status": "completed",
        "progress": 100,
        "message": "Transcription completed successfully!",
        "attempt": attempt,
        "text": text,
    }
    publisher.publish_status_update(session_id, status)
