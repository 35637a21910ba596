"""Sessions in words, for terminals and pipes. No I/O, no clock: times are arguments, in POSIX seconds.

Text from publishers is reduced to printable characters, so that it cannot control the terminal.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeGuard
from urllib.parse import urljoin

import msgspec

from ..model import State
from .messages import ReceivedMessage

__all__ = [
    "describe",
    "describe_missed",
    "display_width",
    "is_progress",
    "printable",
    "render_bar",
    "render_end",
    "render_line",
    "truncate",
]

_MAX_BAR_WIDTH = 20  # columns between the brackets
_MIN_WIDTH_WITH_ELAPSED = 60  # columns; a narrower bar leaves the elapsed time out

_CONTROL = {"pause": "pause requested", "continue": "continue requested", "cancel": "cancel requested"}

Record = Mapping[str, Any]  # the ``data`` of a progress message


def is_progress(message: ReceivedMessage) -> bool:
    """Return whether a message has a session's whole record as its data."""
    return message.event in {"progress", "complete", "error"} and isinstance(message.data, Mapping)


def describe(message: ReceivedMessage) -> str | None:
    """Return a message as one line of text; None if it is not for display."""
    data = message.data
    if is_progress(message):
        return render_line(data)
    match message.event:
        case "resume":
            return None
        case "deleted":
            return "the session was deleted"
        case "control" if isinstance(data, Mapping) and data.get("control") in _CONTROL:
            return _CONTROL[data["control"]]
        case "degraded" if isinstance(data, Mapping):
            return printable(f"the server cannot store new events: {data.get('reason', 'no reason given')}")
        case "expiring" if isinstance(data, Mapping) and _is_number(data.get("expires_in")):
            return f"the token expires in {_format_duration(data['expires_in'])}"
        case "restored":
            return "the server can store new events again"
        case "stalled" if isinstance(data, Mapping) and _is_number(data.get("silent")):
            return f"stalled: the worker has published nothing for {_format_duration(data['silent'])}"
    text = data if isinstance(data, str) else msgspec.json.encode(data).decode()
    return printable(f"{message.event}  {text}")


def describe_missed(resume: Mapping[str, Any]) -> str:
    """Return a sentence for the data of a ``resume`` message that is not ``ok``."""
    missed = resume.get("missed", 0)
    subject = "1 event is" if missed == 1 else f"{missed} events are"
    if resume.get("status") == "gap":
        return f"{subject} missing: the server no longer stores them"
    restarted = "the log was restarted, most likely together with the server"
    return f"{subject} missing: {restarted}" if missed else restarted


def render_line(data: Record) -> str:
    """Return a record as one line: percentage, status, stage, message, error and ETA."""
    head = "" if data.get("indeterminate") else f"{int(_percent(data)):3d}%"
    texts = [*_texts(data), " ".join(_error_lines(data))]
    eta = data.get("eta")
    tail = f"  ETA {_format_duration(eta)}" if _is_number(eta) else ""
    return (" ".join(filter(None, (head, "  ".join(filter(None, texts))))) or "running") + tail


def render_bar(data: Record, width: int, now: float | None = None, note: str = "") -> str:
    """Return a record as a progress bar; the text in the middle is shortened to fit.

    Args:
        data: the record.
        width: the maximum width, in columns.
        now: counts the elapsed time on, and the ETA down; None: they are as they were at the update.
        note: what comes before the message.
    """
    percent = _percent(data)
    bar_width = max(min(_MAX_BAR_WIDTH, width // 4), 1)
    if data.get("indeterminate"):
        head = f"[{'.' * bar_width}]"
    else:
        filled = int(bar_width * min(max(percent, 0), 100) / 100)
        head = f"[{'#' * filled}{'-' * (bar_width - filled)}] {int(percent)}%"
    tail = _render_times(data, now, with_elapsed=width >= _MIN_WIDTH_WITH_ELAPSED)
    texts = "  ".join(filter(None, (printable(note), *_texts(data))))
    text = truncate(texts, width - len(head) - 1 - len(tail))
    return truncate(f"{head} {text}{tail}" if text else head + tail, width)


def render_end(data: Record, width: int, base_url: str) -> list[str]:
    """Return a session's last record in full: the bar, and below it what does not fit, error and artifacts.

    Lines below the bar may be longer than ``width``: the terminal wraps them, and they can be copied whole.

    Args:
        data: the record.
        width: the maximum width of the bar, in columns.
        base_url: the server's URL, for artifacts whose URL is relative.
    """
    bar = render_bar(data, width)
    below = []
    texts = _texts(data)
    if any(text not in bar for text in texts):
        bar = render_bar({**data, "message": ""}, width)
        below = [text for text in texts if text not in bar]
    errors = _error_lines(data)
    if not errors and data.get("state") == State.LOST:
        errors = ["error: the worker has published nothing for too long"]
    artifacts = data.get("artifacts") or []
    rendered = [_render_artifact(item, base_url) for item in artifacts if isinstance(item, Mapping)]
    return [bar, *below, *errors, *rendered]


def _texts(data: Record) -> list[str]:
    """Return what a record says: its status, unless that is "running", with the stage, and its message."""
    status = None if data.get("state") == "running" else data.get("status")
    label = " ".join(str(part) for part in (status, data.get("stage")) if part)
    return [printable(str(text)) for text in (label, data.get("message")) if text]


def _error_lines(data: Record) -> list[str]:
    error = data.get("error")
    if not error:
        return []
    if isinstance(error, Mapping):
        rest = {name: value for name, value in error.items() if name != "message"}
        details = msgspec.json.encode(rest).decode() if rest else ""
        error = "\n".join(filter(None, (str(error.get("message") or ""), details)))
    first, *rest_of_text = str(error).splitlines() or [""]
    return [printable(line) for line in (f"error: {first}", *rest_of_text)]


def _render_artifact(artifact: Mapping[str, Any], base_url: str) -> str:
    size, url = artifact.get("size_bytes"), artifact.get("url")
    parts = [
        artifact.get("name"),
        artifact.get("type"),
        _format_size(size) if _is_number(size) else None,
        urljoin(base_url + "/", str(url)) if url else artifact.get("path"),
    ]
    return printable("artifact: " + "  ".join(str(part) for part in parts if part))


def _render_times(data: Record, now: float | None, *, with_elapsed: bool) -> str:
    """Return the elapsed time and the ETA; an ETA that has passed is none."""
    started_at, ended_at = _timestamp(data.get("started_at")), _timestamp(data.get("ended_at"))
    updated_at, eta = _timestamp(data.get("updated_at")), data.get("eta")
    times = ""
    if with_elapsed and started_at is not None:
        until = ended_at or max(now or 0.0, updated_at or 0.0)
        times = f"  elapsed {_format_duration(math.floor(until - started_at))}"
    if _is_number(eta):
        # The clocks of the two machines may differ a little.
        remaining = eta - (max(now - updated_at, 0.0) if now and updated_at else 0.0)
        times += f"  ETA {_format_duration(remaining)}" if remaining >= 0 else ""
    return times


def _timestamp(text: Any) -> float | None:
    """Return the POSIX seconds of an RFC 3339 timestamp, None if it is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _percent(data: Record) -> float:
    percent = data.get("progress")
    return float(percent) if isinstance(percent, int | float) else 0.0


def _format_duration(seconds: float) -> str:
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _format_size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def printable(text: str) -> str:
    """Replace control and other unprintable characters by spaces."""
    return "".join(char if char.isprintable() else " " for char in text)


def display_width(text: str) -> int:
    """Return the width of ``text`` in terminal columns (Unicode Standard Annex 11)."""
    return sum(map(_char_width, text))


def _char_width(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def truncate(text: str, width: int) -> str:
    """Truncate ``text`` to ``width`` columns, with an ellipsis if there is space for one."""
    if display_width(text) <= width:
        return text
    ellipsis = "..." if width > 6 else ""
    remaining = width - len(ellipsis)
    kept = []
    for char in text:
        remaining -= _char_width(char)
        if remaining < 0:
            break
        kept.append(char)
    return ("".join(kept).rstrip() + ellipsis) if width > 0 else ""
