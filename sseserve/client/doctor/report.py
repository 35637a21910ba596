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
    version = f" sseserve {report.version}" if report.version else ""
    lines = [printable(f"{report.url}:{version}{behind}"), ""]
    for check in report.checks:
        status = f"{check.status:<{_STATUS_WIDTH}}"
        if color:
            status = f"\x1b[{_COLORS[check.status]}m{status}\x1b[0m"
        first, *rest = _render_check(check)
        lines.append(f"  {status}  {printable(first)}")
        lines += [f"{'':<{_STATUS_WIDTH + 4}}{printable(line)}" for line in rest]
    return "\n".join(lines)


def _render_check(check: Check) -> Iterator[str]:
    """Yield the lines of a check, without its status; what a server has sent may be in them."""
    yield f"{check.name:<{_NAME_WIDTH}}  {check.text}"
    if check.cause:
        yield f"{'cause':<{_NAME_WIDTH}}  {check.cause}"
    for change in check.changes:
        yield from _render_change(change)
    if check.hint:
        yield f"{'':<{_NAME_WIDTH}}  {check.hint}"


def _render_change(change: Change) -> Iterator[str]:
    where = NAMES[change.proxy] + ("" if change.proxy == SERVER else f", {change.place}")
    for line in change.lines:
        yield f"{'change':<{_NAME_WIDTH}}  {where}: {line}"
    for beginning in change.remove:
        yield f"{'remove':<{_NAME_WIDTH}}  {where}: {beginning} ..."
