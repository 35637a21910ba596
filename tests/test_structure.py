"""The package's structure: imports point down, pure modules stay pure, only the routes name a dialect."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sseserve"

# From the bottom to the top. A module imports from its own group, and from the groups before it.
LAYERS = (
    {"errors", "sse", "trace_context", "concurrency", "backoff", "extras"},
    {"model", "jsontext"},
    {"config", "logs", "metrics", "version"},
    {"tracing"},
    {"engines"},
    {"progress"},
    {"dialects"},
    {"live", "demo"},
    {"http"},
    {"auth"},
    {"channels"},
    {"web"},
    {"server"},
    {"client"},
    {""},
    {"cli"},
    {"__main__"},
)

# Modules that do no I/O and read no clock: time is an argument.
PURE = (
    "sse",
    "trace_context",
    "model",
    "jsontext",
    "errors",
    "backoff",
    "config/about",
    "config/access",
    "config/changes",
    "config/checks",
    "config/document",
    "config/environment",
    "config/settings",
    "config/tables",
    "config/toml",
    "dialects/*",
    "progress/rules",
    "progress/steps",
    "progress/leases",
    "live/throttle",
    "auth/claims",
    "http/auth",
    "http/revocations",
    "auth/claims",
    "http/routing",
    "http/routes",
    "http/schemas",
    "http/limits",
    "http/proxies",
    "http/diagnostics",
    "client/retry",
    "client/doctor/records",
    "client/doctor/judge",
    "client/doctor/proxies",
)
IMPURE = {"trio", "socket", "time", "os", "httpx", "logging", "sqlite3", "subprocess", "threading"}


def _modules() -> dict[str, Path]:
    """Every module by its dotted name below the package; "" is the package itself."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = _modules()


def _imports(name: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in it, also under TYPE_CHECKING."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (
            node.level or (node.module or "").startswith("sseserve")
        ):
            continue
        if node.level:
            base = [part for part in package if part][: len([p for p in package if p]) - node.level + 1]
        else:
            base = []
            node.module = (node.module or "").removeprefix("sseserve").removeprefix(".")
        target = ".".join([*base, *(node.module.split(".") if node.module else [])])
        submodules = {f"{target}.{alias.name}".removeprefix(".") for alias in node.names} & MODULES.keys()
        if submodules:
            imported |= submodules
        if len(submodules) < len(node.names):
            imported.add(target)
    return imported


def _layer(name: str) -> int:
    group = name.partition(".")[0]
    (layer,) = [number for number, groups in enumerate(LAYERS) if group in groups]
    return layer


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name):
    """A module imports nothing from a group above its own."""
    for imported in _imports(name):
        same_group = imported.partition(".")[0] == name.partition(".")[0]
        assert same_group or _layer(imported) < _layer(name), f"{name} imports {imported}"


def test_no_circles():
    """No chain of imports leads back to where it began."""
    remaining = {name: _imports(name) for name in MODULES}
    while ready := [name for name, imported in remaining.items() if not imported & remaining.keys()]:
        for name in ready:
            del remaining[name]
    assert not remaining, f"in or behind a circle: {sorted(remaining)}"


def test_the_client_needs_no_server():
    """It imports nothing but the modules at the bottom."""
    names = [name for name in MODULES if name.partition(".")[0] == "client"]
    imported = {target for name in names for target in _imports(name)}
    allowed = {"client", "model", "sse", "errors", "concurrency", "backoff", "extras"}
    assert {target.partition(".")[0] for target in imported} <= allowed


@pytest.mark.parametrize("pattern", PURE)
def test_pure_modules_import_no_io(pattern):
    """Neither Trio nor a socket, a clock or a log."""
    paths = list(PACKAGE.glob(f"{pattern}.py"))
    assert paths
    for path in paths:
        tree = ast.parse(path.read_text())
        names = {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {
            node.module or ""
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and not node.level
        }
        assert not {name.partition(".")[0] for name in names} & IMPURE, path


def test_only_the_table_of_routes_names_a_dialect():
    """Everything else gets the dialect of a route; what dialects share is in ``base`` and ``encoding``."""
    shared = {"dialects", "dialects.base", "dialects.encoding", "dialects.phases"}
    named = {
        name
        for name in MODULES
        if name.partition(".")[0] != "dialects"
        and any(target.startswith("dialects") and target not in shared for target in _imports(name))
    }
    assert named == {"http.routes"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_has_a_docstring(name):
    """One that says what it is for."""
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text()))
    assert docstring
