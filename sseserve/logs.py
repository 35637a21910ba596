"""The log on standard error: one record a line, as text or as JSON."""

from __future__ import annotations

import logging
import re
import sys
from contextvars import ContextVar
from typing import Protocol

import msgspec
import trio

from .model import isotime

__all__ = ["Line", "LogContext", "RequestIds", "TextFormatter", "begin_context", "configure"]


# Control characters, and other ends of lines.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN = re.compile(r"[^\s\"=\\]+")  # values that are written as text without quotes


class _HasFields(Protocol):
    @property
    def log_fields(self) -> dict[str, object]: ...


class RequestIds(msgspec.Struct, frozen=True, gc=False):
    """What is kept of a request as long as its stream."""

    request_id: str
    correlation_id: str

    @property
    def log_fields(self) -> dict[str, object]:
        """The ids, as every line has them."""
        return {"request_id": self.request_id, "correlation_id": self.correlation_id}


class LogContext:
    """What the lines belong to that a task logs, and the tasks in its nurseries: ``subject.log_fields``.

    A connection has one, whose ``subject`` is the request that is being served. A task that was only started
    from there, as the pump of a topic is by a publisher, has inherited the context (PEP 567) but is not in
    that task's nurseries: its lines do not belong to the request.
    """

    __slots__ = ("_task", "began", "subject")

    def __init__(self, task: int) -> None:
        self._task = task  # its id(): with the task itself this would be a cycle
        self.subject: _HasFields | None = None
        self.began = 0.0  # when the request did, on time.perf_counter

    def includes(self, task: trio.lowlevel.Task) -> bool:
        """Whether the lines of a task belong to this."""
        while id(task) != self._task:
            if (nursery := task.parent_nursery) is None:
                return False
            task = nursery.parent_task
        return True


_context: ContextVar[LogContext | None] = ContextVar("sseserve_log_context", default=None)


def begin_context() -> LogContext:
    """Begin the context of this task."""
    context = LogContext(id(trio.lowlevel.current_task()))
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


def _current_fields() -> dict[str, object]:
    context = current_context()
    return {} if context is None or context.subject is None else context.subject.log_fields


class Line:
    """A message with fields, for ``log.info(Line("stream ended", events=3))``.

    As text it is ``stream ended events=3``; in the JSON format the fields are members. The ids of what it
    belongs to are added. Values are strings, numbers or booleans; None: there is none.
    """

    __slots__ = ("fields", "message", "trace")

    def __init__(self, message: str, **fields: object) -> None:
        self.message = message
        self.trace = ""  # of an exception, if it is not that of the record
        self.fields = fields
        for name, value in _current_fields().items():
            fields.setdefault(name, value)

    def __str__(self) -> str:
        trace = self.trace and f"\n{self.trace}"
        return f"{self.message}{format_fields(self.fields)}{trace}"


def format_fields(fields: dict[str, object]) -> str:
    """Write fields as `` name=value`` each; a value in quotes if it has spaces, quotes or ``=``."""
    pairs = [f" {name}={_format_value(value)}" for name, value in fields.items() if value is not None]
    return "".join(pairs)


def _format_value(value: object) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if _PLAIN.fullmatch(text) else msgspec.json.encode(text).decode()


class TextFormatter(logging.Formatter):
    """Writes a record as text. What a client has sent cannot end its line and look like another record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - of the standard library
        line = super().formatMessage(record)
        if not isinstance(record.msg, Line) and (fields := _current_fields()):
            line += format_fields(fields)
        return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), line)


class _JSONFormatter(logging.Formatter):
    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._worker = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        message, fields = record.getMessage(), _current_fields()
        if isinstance(record.msg, Line):
            message = record.msg.message
            fields = {name: value for name, value in record.msg.fields.items() if value is not None}
        line: dict[str, object] = {
            "time": isotime(record.created),
            "level": record.levelname.lower(),
            **self._worker,
            "logger": record.name,
            "message": message,
            **fields,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        elif isinstance(record.msg, Line) and record.msg.trace:
            line["exception"] = record.msg.trace
        return msgspec.json.encode(line).decode()


def configure(level: str, form: str, worker: int | None = None) -> None:
    """Write this process's log to standard error, from ``level`` on, as ``text`` or ``json``.

    Each line names the ``worker``, if the process is one of several.
    """
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(_JSONFormatter(worker))
    else:
        name = "%(name)s" if worker is None else f"worker {worker} %(name)s"
        handler.setFormatter(TextFormatter(f"%(asctime)s %(levelname)-7s {name}: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for library in ("httpx", "httpcore"):
        logging.getLogger(library).setLevel(logging.WARNING)  # they log whole URLs, which may have secrets
