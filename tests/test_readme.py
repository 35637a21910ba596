"""The documents say what the code does. ``python tests/test_readme.py`` writes the table of routes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sseserve import Settings
from sseserve.http.routes import ROUTES
from sseserve.http.routing import Kind

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SECURITY = ROOT / "SECURITY.md"
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
    """Every SSESERVE_* variable that the README names is a setting, the file's or the clients' token."""
    names = re.findall(r"SSESERVE_([A-Z_]*[A-Z])", README.read_text())
    assert names
    assert {name.lower() for name in names} <= {*Settings.__struct_fields__, "config", "token"}


def test_numbers_are_the_defaults():
    """The bounds that the README promises are the defaults."""
    text, settings = README.read_text(), Settings()
    assert f"{settings.buffer_events:,} events or {settings.buffer_bytes // 1024} KiB" in text
    assert f"{settings.history_events:,} events or {settings.history_bytes // 2**20} MiB" in text
    assert f"{settings.max_sessions:,} sessions" in text
    assert f"within `drain` seconds ({settings.drain:g})" in text
    assert (
        f"{settings.max_sessions:,} sessions, {settings.max_sessions_per_owner:,} of them an owner's" in text
    )
    assert f"all logs together take at most {settings.max_log_bytes // 2**30} GiB" in text


def test_commands_of_authentication(tmp_path):
    """The commands under "Who may do what" do what is said: both streams end with their session."""
    text = README.read_text()
    section = text[text.index("## Who may do what") :]
    script = section.split("```sh\n", 1)[1].split("```", 1)[0]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    script = script.replace("8000", str(port)).replace(".venv/bin/sseserve", f"{sys.executable} -m sseserve")
    # It has to have started, and what runs in the background to end.
    ready = f"until curl -s http://127.0.0.1:{port}/ready >ready.json; do kill -0 $! || exit; sleep 0.1; done"
    script = script.replace("\nB=", f"\n{ready}\nB=", 1) + "wait %2 %3; kill %1; wait %1"
    environ = {name: text for name, text in os.environ.items() if not name.startswith("SSESERVE_")}
    command, options = ["bash", "-mc", script], {"capture_output": True, "text": True, "timeout": 50}
    result = subprocess.run(command, cwd=tmp_path, env=environ, check=False, **options)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert output.count("event: complete") == 2, output
    assert '"status":"completed"' in output


UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "s": 1, "/s": 1, "h": 3600, "d": 86400}


def parse_default(text: str) -> object:
    """Read a default as SECURITY.md writes it."""
    if match := re.fullmatch(r"([\d,]+) ?(\S*)", text):
        return int(match[1].replace(",", "")) * UNITS.get(match[2], 1)
    return {"none": None, "true": True, "false": False}.get(text, text.strip("`"))


def test_settings_of_security():
    """SECURITY.md's table has settings that exist, and their defaults."""
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", SECURITY.read_text(), re.MULTILINE)
    rows = [row for row in rows if re.fullmatch(r"(`\w+`(, )?)+", row[0])]
    assert len(rows) > 20
    for names, defaults in rows:
        if defaults == "see above":
            continue
        keys = re.findall(r"\w+", names)
        values = [parse_default(text) for text in re.split(r", (?!\d{3})", defaults)]
        for key, value in zip(keys, values * (len(keys) // len(values)), strict=True):
            assert (getattr(Settings(), key) or None) == (value or None), key


def test_security_is_complete():
    """SECURITY.md names only files that exist, and every limit of an address, a user or a session."""
    text = SECURITY.read_text()
    paths = re.findall(r"`((?:sseserve|tests)/[\w/]+\.py)`", text)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []
    kinds = re.compile(r"jw|max_.*per_|pubsub_[ae]|.*_rate$")
    names = [name for name in Settings.__struct_fields__ if kinds.match(name)]
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    "name", ["README.md", "SECURITY.md", "CONTRIBUTING.md", "sseserve/README.md", "benchmarks/README.md"]
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
