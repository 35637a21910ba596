"""The README says what the code does. ``python tests/test_readme.py`` writes its generated part anew."""

from __future__ import annotations

import re
from pathlib import Path

from sseserve import Settings
from sseserve.http.routes import ROUTES, Kind

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- routes: begin -->\n", "<!-- routes: end -->\n"
WAYS = {Kind.STREAM: "SSE", Kind.SOCKET: "WebSocket"}


def table() -> str:
    """Write the table of routes as Markdown."""
    lines = ["| path | does | dialect |", "|---|---|---|"]
    for route in ROUTES:
        if not route.documented:
            continue
        dialect = route.dialect.name if route.path.startswith("/api") else ""
        way = f" ({WAYS[route.kind]})" if route.kind in WAYS else ""
        lines.append(f"| `{route.method} {route.path}` | {route.summary}{way} | {dialect} |")
    return "\n".join(lines) + "\n"


def test_table_of_paths():
    """The README's table is the table of routes."""
    text = README.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == table()


def test_settings_that_are_named_exist():
    """Every SSESERVE_* variable that the README names is a setting."""
    names = re.findall(r"SSESERVE_([A-Z_]*[A-Z])", README.read_text())
    assert names
    assert {name.lower() for name in names} <= set(Settings.__struct_fields__)


def test_numbers_are_the_defaults():
    """The bounds that the README promises are the defaults."""
    text, settings = README.read_text(), Settings()
    assert f"{settings.buffer_events:,} events or {settings.buffer_bytes // 1024} KiB" in text
    assert f"{settings.history_events:,} events or {settings.history_bytes // 2**20} MiB" in text
    assert f"{settings.max_sessions:,} sessions" in text
    assert f"within `drain` seconds ({settings.drain:g})" in text


if __name__ == "__main__":
    old = README.read_text()
    README.write_text(old[: old.index(BEGIN) + len(BEGIN)] + table() + old[old.index(END) :])
