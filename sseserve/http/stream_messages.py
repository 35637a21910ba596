"""The messages of streams that belong to no dialect, for ``/asyncapi.json``. No I/O, no clock."""

from __future__ import annotations

from typing import Any

import msgspec

from ..dialects import MessageType
from ..live.resume import ResumeResult
from ..model import Control
from .diagnostics import SeenRequest

__all__ = ["OWN_TYPES", "PROBE_MESSAGES", "SERVER_MESSAGES"]


class ControlRequest(msgspec.Struct, frozen=True):
    """What the watchers ask of the worker."""

    control: Control


class Stalled(msgspec.Struct, frozen=True):
    """A producer has been silent for longer than its lease; both are in seconds."""

    lease: float
    silent: float


class Reason(msgspec.Struct, frozen=True):
    """Why, in a sentence."""

    reason: str


class Expiring(msgspec.Struct, frozen=True):
    """In how many seconds the token expires."""

    expires_in: int


class Empty(msgspec.Struct, frozen=True):
    """No members."""


class ProbeEvent(msgspec.Struct, frozen=True):
    """An event that says when it was sent, in POSIX seconds."""

    number: int
    time: float
    text: str


class ProbeEnd(msgspec.Struct, frozen=True):
    """The end of a probe, in POSIX seconds."""

    time: float


SERVER_MESSAGES = (
    MessageType("resume", "How resuming from the client's cursor went; comes first", ResumeResult),
    MessageType("control", "A watcher has asked the worker to pause, continue or cancel", ControlRequest),
    MessageType("stalled", "The worker has been silent for longer than its lease", Stalled),
    MessageType("degraded", "Events cannot be stored or read for now; the stream stays open", Reason),
    MessageType("restored", "They can be again", Empty),
    MessageType("expiring", "The token expires soon, and the stream then ends", Expiring),
    MessageType("overflow", "The client was too slow; it resumes with its cursor. The stream ends", Reason),
    MessageType("deleted", "The session was deleted. The stream ends", Empty),
)
# Of publishers: the name of the event is the type that they have given it.
OWN_TYPES = MessageType("*", "An event of a publisher's own type, under that name", Any)
PROBE_MESSAGES = (
    MessageType("request", "The request as the server has received it; comes first", SeenRequest),
    MessageType("probe", "One of the events that were asked for", ProbeEvent),
    MessageType("end", "The end, after the silence that was asked for", ProbeEnd),
)
