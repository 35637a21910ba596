"""The rules of progress: what an update may do, and what follows from it. Pure: time is an argument.

``advance`` is the whole state machine. The rules:

1. A label without a known state means running. The first update of a session starts it.
2. Percent is a finite number from 0 to 100. It does not fall unless the session restarts or ends.
3. Success without a percent is 100.
4. Nothing follows a terminal state.
5. What an update does not mention stays as it was; a restart clears the error, artifacts and estimate.
6. The rate is a time-weighted moving average over about ``TAU`` seconds of running time, corrected for its
   start-up bias, so it is exact for steady work from the second update on. The ETA follows from it.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from ..errors import Invalid, InvalidProgress, SessionEnded
from ..model import Artifact, Progress, State, state_of

__all__ = ["TAU", "Update", "advance", "changes"]

TAU = 30.0  # seconds of running time that the rate is averaged over
MAX_DEPTH = 32  # levels of nesting in an error

_new = msgspec.structs.replace


class Update(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a publisher says of its work; None is not said. See ``POST .../progress``."""

    status: str | None = None
    progress: float | None = None
    stage: str | None = None
    message: str | None = None
    error: str | dict[str, Any] | None = None
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    artifacts: tuple[Artifact, ...] | None = None
    restart: bool = False


def _percent(value: float | None) -> float | None:
    """Check a percentage; a whole number stays (or becomes) an int, so that 40 is not written 40.0.

    Raises:
        InvalidProgress: it is no finite number from 0 to 100.
    """
    if value is None:
        return None
    # NaN is not between any two numbers, and asking an int of any size whether it is finite would raise.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise InvalidProgress(f"progress must be a finite number from 0 to 100, not {value!r}")
    return int(value) if value == int(value) else value


def _shallow(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether what every later event carries along can be written wherever it was read."""
    if isinstance(value, dict):
        return depth > 0 and all(_shallow(item, depth - 1) for item in value.values())
    if isinstance(value, list | tuple):
        return depth > 0 and all(_shallow(item, depth - 1) for item in value)
    return True


def advance(before: Progress | None, update: Update, now: float) -> Progress:
    """Return the progress after ``update`` at time ``now`` (POSIX seconds).

    Raises:
        SessionEnded: ``before`` is terminal.
        InvalidProgress: the percentage is none, or falls without a restart.
        Invalid: the error is nested too deep.
    """
    percent = _percent(update.progress)
    if isinstance(update.error, dict) and not _shallow(update.error):
        raise Invalid(f"an error is nested at most {MAX_DEPTH} deep")
    if before is None:
        before = Progress(status="queued", state=State.QUEUED)
    elif before.state.terminal:
        raise SessionEnded(f"the session has ended: {before.status}")
    status = update.status
    if status is None:
        # The first word of work that was waiting starts it.
        status = "running" if before.state is State.QUEUED or update.restart else before.status
    state = state_of(status)
    if percent is None:
        percent = 100 if state is State.SUCCEEDED else 0 if update.restart else before.percent
    elif percent < before.percent and not update.restart and not state.terminal:
        raise InvalidProgress(
            f'progress cannot go back from {before.percent} to {percent} without "restart": true'
        )
    kept = () if update.restart else before.artifacts
    after = _new(
        before,
        status=status,
        state=state,
        percent=percent,
        stage=update.stage if update.stage is not None else before.stage,
        message=update.message if update.message is not None else before.message,
        error=update.error if update.error is not None or update.restart else before.error,
        data=before.data if update.data is msgspec.UNSET else update.data,
        artifacts=kept if update.artifacts is None else update.artifacts,
        updated_at=now,
    )
    return _estimate(before, after, restart=update.restart, now=now)


def _estimate(before: Progress, after: Progress, *, restart: bool, now: float) -> Progress:
    """Fill in the times, the rate and the ETA."""
    if restart:
        before = _new(before, moved_at=None, weight=0.0, smoothed=0.0)
    running = after.state is State.RUNNING
    started_at = after.started_at if after.started_at is not None or not running else now
    moved_at, weight, smoothed = before.moved_at, before.weight, before.smoothed
    if moved_at is None:
        moved_at = now if running else None
    else:
        if before.state is not State.RUNNING:
            moved_at += now - before.updated_at  # time in which nothing can move does not count
        if after.percent > before.percent:
            if before.state is State.RUNNING and now > moved_at:
                keep = math.exp((moved_at - now) / TAU)
                speed = (after.percent - before.percent) / (now - moved_at)
                smoothed = smoothed * keep + speed * (1 - keep)
                weight = weight * keep + (1 - keep)
            moved_at = now
    # Six digits of it, wherever they stand: work may take months.
    rate = float(f"{smoothed / weight:.6g}") if running and weight else None
    return _new(
        after,
        started_at=started_at,
        ended_at=now if after.state.terminal else None,
        rate=rate,
        eta=round((100 - after.percent) / rate, 1) if rate else None,
        moved_at=moved_at,
        weight=weight,
        smoothed=smoothed,
    )


def changes(before: Progress | None, after: Progress, update: Update) -> tuple[str, ...]:
    """Name what has changed besides the amount."""
    if before is None:
        return ("state", "status", "stage") if after.stage is not None else ("state", "status")
    changed = [
        name
        for name in ("state", "status", "stage", "error", "artifacts")
        if getattr(before, name) != getattr(after, name)
    ]
    if update.restart:
        changed.append("restart")
    return tuple(changed)
