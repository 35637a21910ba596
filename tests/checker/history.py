"""What a run recorded. Ticks are numbers that grow with every request and response, over all tasks."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sseserve.model import Cursor

__all__ = ["Complete", "History", "Joined", "Message", "Observation", "Publish", "payload_of", "summarize"]

# The names of messages that stand for an event of the log; all others are about the connection.
LOG_EVENTS = frozenset({"note", "progress", "complete", "error", "control", "stalled"})
TERMINAL_EVENTS = frozenset({"complete", "error"})


class Publish(msgspec.Struct, frozen=True):
    """A publisher's request, with all its attempts under one Idempotency-Key.

    ``payload`` is unique. ``began`` is the tick before the first attempt, ``ended`` the one after the last.
    ``cursor`` is where the server says that it is, if it was acknowledged.
    """

    payload: str
    kind: Literal["note", "progress", "end"]
    began: int
    ended: int
    outcome: Literal["acknowledged", "refused", "in doubt"]
    cursor: str | None = None


class Joined(msgspec.Struct, frozen=True):
    """A client connected, or polled, with a cursor or without one."""

    cursor: str | None
    transport: Literal["sse", "ws", "poll"]
    tick: int
    instance: int = 0


class Message(msgspec.Struct, frozen=True):
    """A client got a message. ``id`` is None if this message itself has none."""

    event: str
    data: Any
    id: str | None = None

    @property
    def place(self) -> Cursor | None:
        """Where in a log it is, if it stands for an event."""
        return Cursor.parse(self.id) if self.id is not None and self.event in LOG_EVENTS else None


class Complete(msgspec.Struct, frozen=True):
    """The server said that nothing will ever follow what the client has."""


Observation = Joined | Message | Complete


class History(msgspec.Struct):
    """A run.

    Attributes:
        publishes: all requests.
        clients: what each client saw, in its order.
        logs: the whole log at the end, as each instance returned it.
        deletions: how many requests may have deleted the session.
        attempts: how many may have begun another attempt.
        losses: how often data may have been lost under the server.
        conflated: how many progress events the instances dropped for slow clients.
        history_events: how many events a log keeps.
        problems: what went wrong outside of this: crashes, wrong responses, what never came.
    """

    publishes: list[Publish] = []
    clients: list[list[Observation]] = []
    logs: list[list[Message]] = []
    deletions: int = 0
    attempts: int = 0
    losses: int = 0
    conflated: int = 0
    history_events: int = 10_000
    problems: list[str] = []


def payload_of(message: Message) -> str | None:
    """Return the payload that was published as this message, None if it is the server's own."""
    if not isinstance(message.data, dict):
        return None
    payload = message.data.get("payload" if message.event == "note" else "message")
    return payload if isinstance(payload, str) and payload else None


def summarize(history: History) -> dict[str, int]:
    """Count what happened, to see that it did."""
    names = "events joins ok gap reset deleted overflow degraded restored acknowledged refused"
    counts = dict.fromkeys([*names.split(), "in doubt"], 0)
    counts["conflated"] = history.conflated
    stored = {payload_of(message) for log in history.logs for message in log}
    final = {cursor.epoch for log in history.logs for message in log if (cursor := message.place) is not None}
    # Acknowledged, and after a loss not in the log at the end, which is complete
    counts["lost"] = 0
    is_complete = history.losses and any(
        log and log[0].place is not None and log[0].place.seq == 1 for log in history.logs
    )
    for publish in history.publishes:
        counts[publish.outcome] += 1
        cursor = Cursor.parse(publish.cursor or "")
        if is_complete and cursor and cursor.epoch not in final and publish.payload not in stored:
            counts["lost"] += 1
    for observation in (item for client in history.clients for item in client):
        if isinstance(observation, Joined):
            counts["joins"] += 1
        elif isinstance(observation, Message):
            name = observation.data["status"] if observation.event == "resume" else observation.event
            counts["events" if observation.place is not None else name] += 1
    return counts
