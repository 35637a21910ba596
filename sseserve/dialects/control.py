"""What a worker listens to: the watchers' requests, and the end. Everything else is left out."""

from __future__ import annotations

import msgspec

from ..model import Event, Session
from .base import Dialect, Message, MessageType, encode_json

__all__ = ["CONTROL"]


class Ended(msgspec.Struct, frozen=True):
    """The end of a session, with the status that its publisher has given it."""

    status: str


def _ended(status: str) -> Message:
    return Message("ended", encode_json(Ended(status)))


def _render(_session_id: str, event: Event) -> list[Message]:
    if event.type == "control":
        return [Message("control", encode_json(event.data))]
    progress = event.progress
    return [_ended(progress.status)] if progress is not None and progress.state.terminal else []


def _render_snapshot(_dialect: Dialect, session: Session) -> list[Message]:
    if session.ended and session.progress is not None:
        return [_ended(session.progress.status)]
    return [Message("control", encode_json({"control": session.control}))]


CONTROL = Dialect(
    name="control",
    render=_render,
    render_snapshot=_render_snapshot,
    event_names=frozenset({"ended"}),
    message_types=(MessageType("ended", "The end: there is nothing more to do", Ended),),
)
