"""A report as a table. No I/O."""

from __future__ import annotations

from collections.abc import Iterator

from ..text import printable
from .judge import Check, Report, Status
from .proxies import NAMES, SERVER, Change

__all__ = ["render"]

_COLORS: dict[Status, str] = {"ok": "32", "warning": "33", "problem": "31", "not checked": "2"}
_STATUS_WIDTH, _NAME_WIDTH = 11, 15


def render(report: Report, *, color: bool) -> str:
    """Return the table. ``color``: with the escape sequences of a terminal."""
    behind = f", behind {' and '.join(map(str, report.proxies))}" if report.proxies else ""
    title = f"{report.url}: sseserve {report.version}{behind}".replace(" ,", ",")
    lines = [title, ""]
    for check in report.checks:
        lines += _render_check(check, color=color)
    return "\n".join(map(_printable, lines))


def _render_check(check: Check, *, color: bool) -> Iterator[str]:
    status = f"{check.status:<{_STATUS_WIDTH}}"
    if color:
        status = f"\x1b[{_COLORS[check.status]}m{status}\x1b[0m"
    yield f"  {status}  {check.name:<{_NAME_WIDTH}}  {check.text}"
    indent = " " * (4 + _STATUS_WIDTH)
    if check.cause:
        yield f"{indent}{'cause':<{_NAME_WIDTH}}  {check.cause}"
    for change in check.changes:
        yield from (f"{indent}{line}" for line in _render_change(change))
    if check.hint:
        yield f"{indent}{check.hint}"


def _render_change(change: Change) -> Iterator[str]:
    where = NAMES[change.proxy] + ("" if change.proxy == SERVER else f", {change.place}")
    for number, line in enumerate(change.lines):
        yield f"{where + ':' if number == 0 else '':<{_NAME_WIDTH}}  {line}"
    for number, line in enumerate(change.remove):
        label = f"{where}, without:" if number == 0 else ""
        yield f"{label:<{_NAME_WIDTH}}  {line} ..."


def _printable(line: str) -> str:
    """Leave the escape sequences of colors alone: what a server has sent cannot hold any."""
    return "\x1b".join(map(printable, line.split("\x1b")))
