"""Typed events of an interaction: what is published under a type arrives under it, as it was published.

Progress is the type ``processing`` with a fraction from 0 to 1. A stream may be opened before anything is
published, and gets what was published before it came.
"""

from __future__ import annotations

from typing import Any

from ..model import Event, State
from .base import Dialect, Message, raw_json

__all__ = ["INTERACTION"]

_ENDS = {State.FAILED: "FAILED", State.CANCELLED: "CANCELLED", State.LOST: "LOST"}


def _shape(_session_id: str, event: Event) -> list[Message]:
    progress = event.progress
    if progress is None:
        return [Message(event.type, raw_json(event.data), retry=event.retry)]
    name = "error" if progress.state in _ENDS else "complete" if progress.state.terminal else "processing"
    if event.published is not None and event.published.dialect == "interaction":
        return [Message(name, bytes(event.published.data))]
    data: dict[str, Any] = {
        "stage": progress.stage,
        "progress": progress.percent / 100,
        "message": progress.message,
    }
    if name == "error":
        data = {"code": _ENDS[progress.state], "message": progress.message, "recoverable": False}
        if isinstance(progress.error, dict):
            data |= progress.error
        elif progress.error is not None:
            data["message"] = progress.error
    return [Message(name, raw_json(data))]


INTERACTION = Dialect(
    name="interaction",
    shape=_shape,
    heartbeat=lambda _now: "heartbeat",
    interval=15.0,
    waits=True,
    replays=True,
)
