"""The video studio: jobs with phases, each a range of the whole.

A progress event says what it has changed: ``job-status`` a new state, ``step-status`` a new stage,
``step-progress`` the amount. The end is one of ``job-completed``, ``job-failed`` and ``job-cancelled``.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..model import Artifact, Event, Progress, Session, State, isotime, phase_of
from .base import Dialect, Message, raw_json

__all__ = ["JOBS", "RANGES", "job", "overall", "step_percent"]

# Percent of the whole at which a phase begins and ends.
RANGES = {"plan": (0, 15), "tts": (15, 35), "visuals": (35, 65), "compose": (65, 85), "render": (85, 100)}

_STATUS = {
    State.QUEUED: "Queued",
    State.RUNNING: "Running",
    State.PAUSED: "Paused",
    State.SUCCEEDED: "Succeeded",
    State.FAILED: "Failed",
    State.CANCELLED: "Cancelled",
    State.LOST: "Failed",
}
# What the studio's job store calls the ends, other than its events do.
_STORED = {State.SUCCEEDED: "Done", State.CANCELLED: "Canceled"}
_END = {
    State.SUCCEEDED: "job-completed",
    State.FAILED: "job-failed",
    State.LOST: "job-failed",
    State.CANCELLED: "job-cancelled",
}


def overall(stage: str | None, percent: float) -> float:
    """Return the percent of the whole job for a percent of its stage (both 0 to 100)."""
    first, last = RANGES.get(phase_of(stage or ""), (0, 100))
    return _number(first + (last - first) * percent / 100)


def step_percent(stage: str | None, percent: float) -> float:
    """Return the percent of the stage for a percent of the whole job (both 0 to 100)."""
    first, last = RANGES.get(phase_of(stage or ""), (0, 100))
    return _number(min(max((percent - first) * 100 / (last - first), 0), 100))


def _number(value: float) -> float:
    """Round to what is worth showing; a whole number is written without a point."""
    value = round(value, 4)
    return int(value) if value == int(value) else value


def _artifacts(progress: Progress) -> list[dict[str, Any]]:
    return [
        {
            "name": artifact.name,
            "path": artifact.path or artifact.url,
            "type": artifact.type,
            "sizeBytes": artifact.size_bytes,
        }
        for artifact in progress.artifacts
    ]


def _first(artifacts: tuple[Artifact, ...], *types: str) -> Artifact | None:
    return next((a for a in artifacts if a.type is not None and a.type.startswith(types)), None)


def _output(progress: Progress) -> dict[str, Any] | None:
    """Where the film and its subtitles are."""
    video = _first(progress.artifacts, "video/", "image/apng", "image/gif")
    if video is None:
        return None
    subtitle = _first(progress.artifacts, "application/x-subrip", "text/vtt", "text/srt")
    return {
        "videoPath": video.path or video.url,
        "subtitlePath": None if subtitle is None else subtitle.path or subtitle.url,
        "sizeBytes": video.size_bytes,
    }


def _common(session_id: str, progress: Progress) -> dict[str, Any]:
    return {
        "jobId": session_id,
        "status": _STATUS[progress.state],
        "stage": progress.stage,
        "phase": progress.phase,
        "percent": progress.percent,
        "message": progress.message,
        "etaSeconds": progress.eta,
        "timestamp": isotime(progress.updated_at),
    }


def _error(progress: Progress) -> Any:
    if progress.error is not None:
        return progress.error
    if progress.state is State.LOST:
        return "the worker was lost: it said nothing for too long"
    return progress.message


def _shape(session_id: str, event: Event) -> list[Message]:
    progress = event.progress
    if progress is None:
        # Events of a publisher's own; an error that ends nothing is a warning here.
        name = "warning" if event.type == "error" else event.type
        return [Message(name, raw_json(event.data), retry=event.retry)]
    common = _common(session_id, progress)
    said: list[tuple[str, dict[str, Any]]] = []
    if "state" in event.changed:
        said.append(("job-status", common))
    if "stage" in event.changed and progress.stage is not None:
        said.append(("step-status", common))
    if (end := _END.get(progress.state)) is not None:
        final = {**common, "artifacts": _artifacts(progress), "output": _output(progress)}
        if end == "job-failed":
            final["error"] = _error(progress)
            said.append(("error", {**common, "error": final["error"]}))
        said.append((end, final))
    else:
        within = step_percent(progress.stage, progress.percent)
        said.append(("step-progress", {**common, "progress": within}))
    return [Message(name, raw_json(data)) for name, data in said]


def job(session: Session) -> dict[str, Any]:
    """Describe a job as the studio's job store keeps it."""
    progress = session.progress or Progress(
        status="queued", state=State.QUEUED, updated_at=session.touched_at
    )
    return {
        **_common(session.id, progress),
        "id": session.id,
        "status": _STORED.get(progress.state, _STATUS[progress.state]),
        "progress": step_percent(progress.stage, progress.percent),
        "progressMessage": progress.message,
        "error": _error(progress) if progress.state in (State.FAILED, State.LOST) else None,
        "artifacts": _artifacts(progress),
        "output": _output(progress),
        "control": session.control.value,
        "correlationId": session.correlation_id,
        "title": session.title,
        "request": None if session.data is msgspec.UNSET else session.data,
        "createdAt": isotime(session.created_at),
        "startedAt": None if progress.started_at is None else isotime(progress.started_at),
        "endedAt": None if progress.ended_at is None else isotime(progress.ended_at),
        "cursor": str(session.cursor),
    }


JOBS = Dialect(
    name="jobs",
    shape=_shape,
    heartbeat=lambda now: f"keepalive: {isotime(now)}",
    interval=10.0,
)
