"""The rules of progress: what an update may do, and what follows from it. Pure: time is an argument.

``advance`` is the whole state machine. The rules:

1. A label without a known state means running. The first update of a session starts it.
2. Percent is a finite number from 0 to 100. It does not fall unless the session restarts or ends.
   Where it counts within a stage, another stage restarts it, and the same stage does at 0. An update that
   would let it fall is refused or, if it says so, counts without its percent.
3. Success without a percent is 100.
4. Nothing follows a terminal state. But work that has failed or was lost may be tried again: an update that
   allows it, and that is no failure itself, begins another attempt, in a log of its own.
5. What an update does not mention stays as it was; but another stage clears the message, which was about
   the stage before, and a restart clears the error, artifacts and estimate.
6. The rate is an exponentially weighted mean of the speed, over the running time of this attempt:

       rate = sum of (percent_i - percent_i-1) / dt_i * w_i  /  sum of w_i        for each advance i

   where ``w_i`` is the integral of exp(-age / TAU) over the ``dt_i`` seconds before advance i. So it is the
   plain mean at first, and later the last ``TAU`` seconds count most; steady work has its exact rate. Before
   ``MIN_OBSERVED`` seconds there is none: the quotient of two small numbers says nothing.
7. ETA = (100 - percent) / rate, in seconds after the update.
8. What ends without success has an error: its own, else the message, else a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec

from ..errors import Invalid, InvalidProgress, SessionEnded
from ..jsontext import MAX_DEPTH, is_shallow
from ..model import Artifact, OriginalPayload, Progress, Session, State, state_of

__all__ = [
    "MAX_ENCODED",
    "MAX_LABEL",
    "MAX_MESSAGE",
    "MIN_OBSERVED",
    "TAU",
    "Change",
    "NewEvent",
    "Update",
    "advance",
    "begins_attempt",
    "changed_fields",
    "event_record",
    "is_restart",
]

TAU = 30.0  # seconds of running time that the rate is averaged over
MIN_OBSERVED = 2.0  # seconds of running time before there is a rate
_MIN_WEIGHT = -math.expm1(-MIN_OBSERVED / TAU)  # the sum of the weights after that time

# Every later event carries these along, and every list of sessions shows them.
MAX_LABEL = 256  # characters of a status or a stage
MAX_MESSAGE = 16_384  # characters of a message
MAX_ENCODED = 65_536  # bytes of JSON of an error, and of the artifacts
REPEATED_DATA = 4096  # bytes of data that later events repeat

# The error of an end that came without any.
_NO_REASON = {
    State.FAILED: "the work failed; its worker gave no reason",
    State.CANCELLED: "the work was cancelled",
    State.LOST: "the worker was lost: it published nothing for too long",
}

_new = msgspec.structs.replace


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """What a publisher reports of its work; None leaves a field as it was.

    ``progress`` is in percent, 0 to 100. ``per_stage``: it counts within the stage, so another stage, or the
    same one beginning again at 0, may be at less. ``holds_percent``: if it is less than before without a
    restart, the percentage stays and the rest of the update counts. ``original`` is the payload as its
    publisher sent it, for the clients of the same dialect. ``retry`` is in milliseconds.
    ``retries_failure``: after a failure it begins another attempt.
    """

    status: str | None = None
    progress: float | None = None
    stage: str | None = None
    message: str | None = None
    error: str | dict[str, Any] | None = None
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    artifacts: tuple[Artifact, ...] | None = None
    restart: bool = False
    per_stage: bool = False
    holds_percent: bool = False
    original: OriginalPayload | None = None
    retry: int | None = None
    retries_failure: bool = False


class NewEvent(msgspec.Struct, frozen=True):
    """An event of the publisher's own ``type``. ``retry`` is in milliseconds."""

    type: str
    data: Any = None
    retry: int | None = None


# What a request asks to be recorded: an event, an update, or an update that depends on the session's state.
Change = NewEvent | Update | Callable[[Session], Update]


def _percent(value: float | None) -> float | None:
    """Check a percentage; a whole number stays (or becomes) an int, so that 40 is not written 40.0.

    Raises:
        InvalidProgress: it is not a finite number from 0 to 100.
    """
    if value is None:
        return None
    # NaN is not between any two numbers, and asking an int of any size whether it is finite would raise.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise InvalidProgress(f"progress must be a finite number from 0 to 100, not {value!r}")
    return int(value) if value == int(value) else value


def _check_sizes(update: Update) -> None:
    """Check what every later event carries along.

    Raises:
        Invalid: a member is larger than its limit, or the error is nested too deep.
    """
    for name, text, limit in (
        ("status", update.status, MAX_LABEL),
        ("stage", update.stage, MAX_LABEL),
        ("message", update.message, MAX_MESSAGE),
    ):
        if text is not None and len(text) > limit:
            raise Invalid(f"{name} has at most {limit} characters, not {len(text)}")
    if isinstance(update.error, dict) and not is_shallow(update.error):
        raise Invalid(f"error must be nested at most {MAX_DEPTH} deep")
    for name, value in (("error", update.error), ("artifacts", update.artifacts)):
        if value and (size := len(msgspec.json.encode(value))) > MAX_ENCODED:
            raise Invalid(f"{name} takes at most {MAX_ENCODED} bytes of JSON, not {size}")


def is_restart(before: Progress | None, update: Update) -> bool:
    """Return whether an update begins the work, or within it a stage, again."""
    if update.restart:
        return True
    if not update.per_stage or before is None or update.progress is None or update.progress >= before.percent:
        return False
    return update.progress == 0 or update.stage not in (None, before.stage)


def begins_attempt(before: Progress | None, update: Update) -> bool:
    """Return whether an update begins another attempt of work that has failed."""
    if before is None or not update.retries_failure or before.state not in (State.FAILED, State.LOST):
        return False
    return update.status is None or state_of(update.status) not in _NO_REASON


def advance(before: Progress | None, update: Update, now: float) -> Progress:
    """Return the progress after ``update`` at time ``now`` (POSIX seconds).

    Raises:
        SessionEnded: ``before`` is terminal.
        InvalidProgress: the percentage is invalid, or falls without a restart.
        Invalid: the error is nested too deep, or a member is larger than its limit.
    """
    percent = _percent(update.progress)
    restart = is_restart(before, update)
    _check_sizes(update)
    if before is None:
        before = Progress(status="queued", state=State.QUEUED, indeterminate=True)
    elif before.state.terminal:
        raise SessionEnded(f"the session has ended: {before.status}")
    status = update.status
    if status is None:
        # The first update of work that was waiting starts it.
        status = "running" if before.state is State.QUEUED or restart else before.status
    state = state_of(status)
    if percent is None:
        indeterminate = state is not State.SUCCEEDED and (restart or before.indeterminate)
        percent = 100 if state is State.SUCCEEDED else 0 if restart else before.percent
    elif percent < before.percent and not restart and not state.terminal:
        if not update.holds_percent:
            raise InvalidProgress(
                f'progress cannot go back from {before.percent} to {percent} without "restart": true'
            )
        percent, indeterminate = before.percent, before.indeterminate
    else:
        indeterminate = False
    kept = () if restart else before.artifacts
    after = _new(
        before,
        status=status,
        state=state,
        percent=percent,
        indeterminate=indeterminate,
        stage=update.stage if update.stage is not None else before.stage,
        message=_message(before, update),
        error=_error(before, update, state, restart=restart),
        data=before.data if update.data is msgspec.UNSET else update.data,
        artifacts=kept if update.artifacts is None else update.artifacts,
        updated_at=now,
    )
    return _estimate(before, after, restart=restart, now=now)


def _error(before: Progress, update: Update, state: State, *, restart: bool) -> str | dict[str, Any] | None:
    error = update.error if update.error is not None or restart else before.error
    if error or state not in _NO_REASON:
        return error
    return update.message or _NO_REASON[state]


def _message(before: Progress, update: Update) -> str:
    if update.message is not None:
        return update.message
    return before.message if update.stage in (None, before.stage) else ""


def _estimate(before: Progress, after: Progress, *, restart: bool, now: float) -> Progress:
    """Fill in the times, the rate and the ETA."""
    if restart:
        before = _new(before, last_advance_at=None, weight=0.0, smoothed=0.0)
    running = after.state is State.RUNNING
    started_at = after.started_at if after.started_at is not None or not running else now
    last_advance_at, weight, smoothed = before.last_advance_at, before.weight, before.smoothed
    if last_advance_at is None:
        last_advance_at = now if running else None
    else:
        if before.state is not State.RUNNING:
            last_advance_at += now - before.updated_at  # time in which nothing can move does not count
        if after.percent > before.percent:
            gain, time = after.percent - before.percent, now - last_advance_at
            if before.state is State.RUNNING and time >= 0:
                keep = math.exp(-time / TAU)
                # Of no time it is the limit, so that a burst counts as much as the same gain over time.
                smoothed = smoothed * keep + (gain / time * (1 - keep) if time else gain / TAU)
                weight = weight * keep + (1 - keep)
            last_advance_at = now
    # Six digits of it, wherever they stand: work may take months.
    rate = float(f"{smoothed / weight:.6g}") if running and weight >= _MIN_WEIGHT else None
    return _new(
        after,
        started_at=started_at,
        ended_at=now if after.state.terminal else None,
        rate=rate,
        eta=round((100 - after.percent) / rate, 1) if rate else None,
        last_advance_at=last_advance_at,
        weight=weight,
        smoothed=smoothed,
    )


def event_record(after: Progress, update: Update) -> Progress:
    """Return the record that an update's event carries.

    ``data`` of more than ``REPEATED_DATA`` bytes is in the event of the update that has it and in a terminal
    event, but in no other: else a small update would take as much of the log, and of every watcher's
    connection, as the data does. A snapshot always has it.
    """
    if after.data is msgspec.UNSET or update.data is not msgspec.UNSET or after.state.terminal:
        return after
    return after if len(after.data) <= REPEATED_DATA else _new(after, data=msgspec.UNSET)


def changed_fields(before: Progress | None, after: Progress, update: Update) -> tuple[str, ...]:
    """Return the names of what an update has changed besides the amount; see ``Event.changed``."""
    data: tuple[str, ...] = ()
    if update.data is not msgspec.UNSET:
        data = ("data",) if len(update.data) <= REPEATED_DATA else ("data", "large_data")
    if before is None:
        return ("state", "status", *(("stage",) if after.stage is not None else ()), *data)
    changed = [
        name
        for name in ("state", "status", "stage", "error", "artifacts")
        if getattr(before, name) != getattr(after, name)
    ]
    if is_restart(before, update):
        changed.append("restart")
    return (*changed, *data)
