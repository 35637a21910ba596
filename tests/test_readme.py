"""The documents say what the code does. ``python tests/test_readme.py`` writes the table of routes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sseserve import Settings
from sseserve.http.routes import ROUTES
from sseserve.http.routing import Kind

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "sseserve" / "README.md"
BEGIN, END = "<!-- routes: begin -->\n", "<!-- routes: end -->\n"
WAYS = {Kind.STREAM: "SSE", Kind.SOCKET: "WebSocket"}


def table() -> str:
    """Write the table of routes as Markdown."""
    lines = ["| path | does | dialect |", "|---|---|---|"]
    for route in ROUTES:
        if not route.documented:
            continue
        way = f" ({WAYS[route.kind]})" if route.kind in WAYS else ""
        lines.append(f"| `{route.method} {route.path}` | {route.summary}{way} | {route.dialect.name} |")
    return "\n".join(lines) + "\n"


def test_table_of_routes():
    """The table of the architecture page is the table of routes."""
    text = ARCHITECTURE.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == table()


def test_settings_that_are_named_exist():
    """Every SSESERVE_* variable that the README names is a setting, or the clients' token."""
    names = re.findall(r"SSESERVE_([A-Z_]*[A-Z])", README.read_text())
    assert names
    assert {name.lower() for name in names} <= {*Settings.__struct_fields__, "token"}


def test_numbers_are_the_defaults():
    """The bounds that the README promises are the defaults."""
    text, settings = README.read_text(), Settings()
    assert f"{settings.buffer_events:,} events or {settings.buffer_bytes // 1024} KiB" in text
    assert f"{settings.history_events:,} events or {settings.history_bytes // 2**20} MiB" in text
    assert f"{settings.max_sessions:,} sessions" in text
    assert f"within `drain` seconds ({settings.drain:g})" in text


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "sseserve/README.md", "benchmarks/README.md"]
)
def test_links_lead_somewhere(name):
    """Every relative link is to a file that exists, and every anchor to a heading of it."""
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)#:]+)?(?:#([^)]+))?\)", text):
        path, anchor = target
        linked = (ROOT / name).parent / path if path else ROOT / name
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_the_architecture_page_names_every_module():
    """Each module of the package is in the picture of its structure."""
    text = ARCHITECTURE.read_text()
    picture = set(re.findall(r"\w+", text[text.index("```") : text.index("## Glossary")]))
    package = ROOT / "sseserve"
    names = {path.stem for path in package.rglob("*.py") if "client" not in path.parts}
    dialects = {path.stem for path in (package / "dialects").glob("*.py")}
    assert names - picture <= dialects, names - picture


if __name__ == "__main__":
    old = ARCHITECTURE.read_text()
    ARCHITECTURE.write_text(old[: old.index(BEGIN) + len(BEGIN)] + table() + old[old.index(END) :])
