"""What the lines of a task belong to: the request that it serves, or the stream or job that came of one."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Protocol

import msgspec
import trio

from ..trace_context import TraceContext

__all__ = [
    "HasFields",
    "JobIds",
    "LogContext",
    "RequestIds",
    "begin_context",
    "current_context",
    "current_fields",
    "note_user",
]


class HasFields(Protocol):
    """What lines of the log belong to: a request, or a stream or a job that has begun with one."""

    @property
    def log_fields(self) -> dict[str, object]: ...


class RequestIds(msgspec.Struct, frozen=True, gc=False):
    """What is kept of a request as long as its stream."""

    request_id: str
    correlation_id: str
    trace: TraceContext | None = None  # of the stream's request, where traces are made

    @property
    def log_fields(self) -> dict[str, object]:
        """The ids, as every line has them."""
        return {"request_id": self.request_id, "correlation_id": self.correlation_id}


class JobIds(msgspec.Struct, frozen=True, gc=False):
    """What the lines of a job have that the server runs: its session, and what its creation was part of."""

    session_id: str
    correlation_id: str | None

    @property
    def log_fields(self) -> dict[str, object]:
        """The ids, as every line has them."""
        return {"session_id": self.session_id, "correlation_id": self.correlation_id}


class LogContext:
    """What the lines belong to that a task logs, and the tasks in its nurseries: ``subject.log_fields``.

    A connection has one, whose ``subject`` is the request that is being served. A task that was only started
    from there, as the pump of a topic is by a publisher, has inherited the context (PEP 567) but is not in
    that task's nurseries: its lines do not belong to the request.
    """

    __slots__ = ("_task", "began", "subject", "user")

    def __init__(self, task: int, subject: HasFields | None) -> None:
        self._task = task  # its id(): with the task itself this would be a cycle
        self.subject = subject
        self.began = time.perf_counter()  # when the request did, on time.perf_counter
        self.user: str | None = None  # the subject of its token

    def elapsed(self) -> float:
        """Return how long the request has taken so far, in milliseconds."""
        return round((time.perf_counter() - self.began) * 1000, 3)

    def includes(self, task: trio.lowlevel.Task) -> bool:
        """Whether the lines of a task belong to this."""
        while id(task) != self._task:
            if (nursery := task.parent_nursery) is None:
                return False
            task = nursery.parent_task
        return True


_context: ContextVar[LogContext | None] = ContextVar("sseserve_log_context", default=None)


def begin_context(subject: HasFields | None = None) -> LogContext:
    """Begin the context of this task; of one request, if it serves but that."""
    context = LogContext(id(trio.lowlevel.current_task()), subject)
    _context.set(context)
    return context


def current_context() -> LogContext | None:
    """Return the context that this task is in; in a thread, that of the task which has started it."""
    if (context := _context.get()) is None:
        return None
    try:
        task = trio.lowlevel.current_task()
    except RuntimeError:
        return context  # a thread
    return context if context.includes(task) else None


def current_fields() -> dict[str, object]:
    context = current_context()
    return {} if context is None or context.subject is None else context.subject.log_fields


def note_user(user: str) -> None:
    """Note who makes the request that this task serves."""
    if (context := _context.get()) is not None:
        context.user = user
