"""The video studio: jobs with phases, each a range of the whole.

A progress event is rendered by what it has changed: ``job-status`` a new state, ``step-status`` a new stage,
``step-progress`` the amount. The end is one of ``job-completed``, ``job-failed`` and ``job-cancelled``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import msgspec

from ..errors import InvalidProgress
from ..model import Artifact, Event, Progress, Session, State, isotime
from ..progress.rules import Update
from .base import Dialect, Message, MessageType, Publication, current_progress, custom_event, encode_json
from .phases import job_percent, phase_of, step_percent

__all__ = ["JOBS", "CreatedJob", "Job", "JobBody", "JobList"]

_STATUS = {
    State.QUEUED: "Queued",
    State.RUNNING: "Running",
    State.PAUSED: "Paused",
    State.SUCCEEDED: "Succeeded",
    State.FAILED: "Failed",
    State.CANCELLED: "Cancelled",
    State.LOST: "Failed",
}
# The studio's job store has other names for the ends than its events do.
_STORED_STATUS = _STATUS | {State.SUCCEEDED: "Done", State.CANCELLED: "Canceled"}
_FINAL_EVENTS = {
    State.SUCCEEDED: "job-completed",
    State.FAILED: "job-failed",
    State.LOST: "job-failed",
    State.CANCELLED: "job-cancelled",
}


class JobArtifact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that the job produced; its size in bytes is ``sizeBytes`` or ``size_bytes``."""

    name: str
    type: str | None = None
    url: str | None = None
    path: str | None = None
    size_bytes: int | None = None
    sizeBytes: int | None = None  # noqa: N815 - the studio's own name

    def artifact(self) -> Artifact:
        """Return it as it is kept."""
        size = self.size_bytes if self.sizeBytes is None else self.sizeBytes
        return Artifact(self.name, self.type, self.url, self.path, size)


class JobBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``POST /api/jobs/{id}/progress``; ``progress`` is in percent of its stage."""

    status: str | None = None
    stage: str | None = None
    progress: float | None = None
    message: str | None = None
    error: str | dict[str, Any] | None = None
    artifacts: tuple[JobArtifact, ...] | None = None

    def change(self, _publication: Publication) -> Callable[[Session], Update]:
        """Return the update, in percent of the whole job; that depends on the stage of the session.

        Raises:
            InvalidProgress: the percentage is not from 0 to 100.
        """
        if self.progress is not None and not 0 <= self.progress <= 100:
            raise InvalidProgress(
                f"progress must be a percentage of the stage, 0 to 100, not {self.progress!r}"
            )
        return self._update

    def _update(self, session: Session) -> Update:
        before = session.progress
        stage = self.stage or (None if before is None else before.stage)
        percent = None
        if self.progress is not None:
            percent = job_percent(stage, self.progress)
        elif before is not None and self.stage is not None and phase_of(self.stage) != _phase(before):
            # When a phase begins, the phases before it are complete.
            percent = max(before.percent, job_percent(stage, 0))
        return Update(
            status=self.status,
            progress=percent,
            stage=self.stage,
            message=self.message,
            error=self.error,
            artifacts=None if self.artifacts is None else tuple(a.artifact() for a in self.artifacts),
            holds_percent=True,
        )


class JobStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What every event of a job has. ``percent`` is of the whole job."""

    job_id: str
    status: str
    stage: str | None
    phase: str | None
    percent: float
    message: str
    eta_seconds: float | None
    timestamp: str


class StepProgress(JobStatus, frozen=True, kw_only=True, rename="camel"):
    """The amount; ``progress`` is in percent of the stage."""

    progress: float


class JobFailure(JobStatus, frozen=True, kw_only=True, rename="camel"):
    """What went wrong: a sentence in ``message``, a code, and what the publisher has said."""

    error_code: str
    error: str | dict[str, Any]


class JobEnd(JobStatus, frozen=True, kw_only=True, rename="camel"):
    """What the job has produced; ``output`` is where the video and its subtitles are.

    After a failure it also has ``errorCode`` and ``error``.
    """

    artifacts: list[dict[str, Any]]
    output: dict[str, Any] | None
    error_code: str | msgspec.UnsetType = msgspec.UNSET
    error: str | dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class Job(JobStatus, frozen=True, kw_only=True, rename="camel"):
    """A job as the studio's store keeps it; ``progress`` is in percent of its stage."""

    id: str
    progress: float
    progress_message: str
    error: str | dict[str, Any] | None
    error_code: str | None
    artifacts: list[dict[str, Any]]
    output: dict[str, Any] | None
    control: str
    lease: float | None
    correlation_id: str | None
    title: str | None
    request: Any = msgspec.UNSET
    created_at: str
    started_at: str | None
    ended_at: str | None
    cursor: str


class CreatedJob(Job, frozen=True, kw_only=True, rename="camel"):
    """A job that was just created, and where everything about it is."""

    links: dict[str, str]
    session_id: str = msgspec.field(name="session_id")


class JobList(msgspec.Struct, frozen=True):
    """Jobs without their ``request``, which may be as large as a body; ``waiting`` counts the queued ones."""

    jobs: list[Job]
    waiting: int


def _phase(progress: Progress) -> str | None:
    return None if progress.stage is None else phase_of(progress.stage)


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


_VIDEO_TYPES = ("video/", "image/apng", "image/gif")
_VIDEO_NAMES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".y4m")
_SUBTITLE_TYPES = ("application/x-subrip", "text/vtt", "text/srt", "application/ttml+xml")
_SUBTITLE_NAMES = (".srt", ".vtt", ".ass", ".ssa", ".ttml")


def _first(
    artifacts: tuple[Artifact, ...], types: tuple[str, ...], names: tuple[str, ...]
) -> Artifact | None:
    """Return the first artifact of a type; an artifact without a known type is recognised by its name."""
    return next(
        (a for a in artifacts if a.type is not None and a.type.lower().startswith(types)), None
    ) or next((a for a in artifacts if a.name.lower().endswith(names)), None)


def _output(progress: Progress) -> dict[str, Any] | None:
    """Return where the video and its subtitles are."""
    video = _first(progress.artifacts, _VIDEO_TYPES, _VIDEO_NAMES)
    if video is None:
        return None
    subtitle = _first(progress.artifacts, _SUBTITLE_TYPES, _SUBTITLE_NAMES)
    return {
        "videoPath": video.path or video.url,
        "subtitlePath": None if subtitle is None else subtitle.path or subtitle.url,
        "sizeBytes": video.size_bytes,
    }


def _common(session_id: str, progress: Progress) -> dict[str, Any]:
    return {
        "jobId": session_id,
        "status": _status(progress),
        "stage": progress.stage,
        "phase": _phase(progress),
        "percent": progress.percent,
        "message": progress.message,
        "etaSeconds": progress.eta,
        "timestamp": isotime(progress.updated_at),
    }


def _status(progress: Progress, names: Mapping[State, str] = _STATUS) -> str:
    """Return the state's name. A job that was skipped has succeeded without having been done."""
    return "Skipped" if progress.status.strip().lower() == "skipped" else names[progress.state]


def _error(progress: Progress) -> str | dict[str, Any]:
    return progress.error or progress.message


def _error_code(progress: Progress) -> str:
    """Return what kind of failure it is: the code of the error, if its publisher gave one."""
    if progress.state is State.LOST:
        return "worker_lost"
    code = progress.error.get("code") if isinstance(progress.error, dict) else None
    return code if isinstance(code, str) and code else "generic_error"


def _failure(progress: Progress) -> dict[str, Any]:
    """Return the members of a failure's events: a sentence that is never empty, a code, the details."""
    error = _error(progress)
    message = error if isinstance(error, str) else error.get("message")
    if not isinstance(message, str):
        message = None
    return {
        "message": message or progress.message or f"the job failed: {_error_code(progress)}",
        "errorCode": _error_code(progress),
        "error": error,
    }


def _render(session_id: str, event: Event) -> list[Message]:
    progress = event.progress
    if progress is None:
        return [custom_event(event)]
    common = _common(session_id, progress)
    payloads: list[tuple[str, dict[str, Any]]] = []
    if "state" in event.changed:
        payloads.append(("job-status", common))
    if "stage" in event.changed and progress.stage is not None:
        payloads.append(("step-status", common))
    if (final_event := _FINAL_EVENTS.get(progress.state)) is not None:
        final = {**common, "artifacts": _artifacts(progress), "output": _output(progress)}
        if final_event == "job-failed":
            final |= _failure(progress)
            payloads.append(("error", {**common, **_failure(progress)}))
        payloads.append((final_event, final))
    else:
        percent = step_percent(progress.stage, progress.percent)
        payloads.append(("step-progress", {**common, "progress": percent}))
    return [Message(name, encode_json(data)) for name, data in payloads]


def _members(session: Session) -> dict[str, Any]:
    progress = current_progress(session)
    failed = progress.state in (State.FAILED, State.LOST)
    return {
        "job_id": session.id,
        "status": _status(progress, _STORED_STATUS),
        "stage": progress.stage,
        "phase": _phase(progress),
        "percent": progress.percent,
        "message": progress.message,
        "eta_seconds": progress.eta,
        "timestamp": isotime(progress.updated_at),
        "id": session.id,
        "progress": step_percent(progress.stage, progress.percent),
        "progress_message": progress.message,
        "error": _error(progress) if failed else None,
        "error_code": _error_code(progress) if failed else None,
        "artifacts": _artifacts(progress),
        "output": _output(progress),
        "control": session.control.value,
        "lease": session.lease,
        "correlation_id": session.correlation_id,
        "title": session.title,
        "request": None if session.data is msgspec.UNSET else session.data,
        "created_at": isotime(session.created_at),
        "started_at": None if progress.started_at is None else isotime(progress.started_at),
        "ended_at": None if progress.ended_at is None else isotime(progress.ended_at),
        "cursor": str(session.cursor),
    }


def _describe(_dialect: Dialect, session: Session, _watchers: int) -> Job:
    return Job(**_members(session))


def _describe_created(session: Session) -> tuple[str, CreatedJob]:
    path = f"/api/jobs/{quote(session.id, safe='')}"
    links = {
        "self": path,
        "events": f"{path}/events",
        "progress": f"{path}/progress",
        "ws": f"{path}/ws",
        "cancel": f"{path}/cancel",
        "control": f"/api/sessions/{quote(session.id, safe='')}/control",
        "status": f"/api/sessions/{quote(session.id, safe='')}/status",
    }
    return path, CreatedJob(**_members(session), links=links, session_id=session.id)


def _describe_item(_dialect: Dialect, session: Session) -> Job:
    return Job(**{**_members(session), "request": msgspec.UNSET})


def _describe_list(items: list[msgspec.Raw], queued: int) -> Any:
    return {"jobs": items, "waiting": queued}


JOBS = Dialect(
    name="jobs",
    render=_render,
    heartbeat=lambda now: f"keepalive: {isotime(now)[:19]}Z",
    heartbeat_interval=10.0,
    max_heartbeat_interval=10.0,
    event_names=frozenset(
        {
            "job-cancelled",
            "job-completed",
            "job-failed",
            "job-status",
            "step-progress",
            "step-status",
        }
    ),
    message_types=(
        MessageType("job-status", "The job has another state", JobStatus),
        MessageType("step-status", "The job has another stage", JobStatus),
        MessageType("step-progress", "The amount has changed", StepProgress),
        MessageType("error", "The job has failed; job-failed follows", JobFailure),
        MessageType("job-completed", "The end: the job has succeeded", JobEnd),
        MessageType("job-failed", "The end: the job has failed or is lost", JobEnd),
        MessageType("job-cancelled", "The end: the job was cancelled", JobEnd),
    ),
    describe=_describe,
    describe_created=_describe_created,
    counts_jobs=True,
    describe_item=_describe_item,
    describe_list=_describe_list,
)
