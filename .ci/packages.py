"""Build the wheel and the sdist, install them into clean environments, and use what is installed.

    python .ci/packages.py [PYTHON ...]

In each environment are the oldest, or the newest, libraries that ``pyproject.toml`` allows. PYTHON is an
interpreter; without one, all of the versions that ``pyproject.toml`` names, as far as they are found. Needs
the extra ``test``: tests/test_smoke.py runs against each environment.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSIONS = [
    name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)
]
PART_IMPORTS = {"": "sseserve", "client": "sseserve.client", "server": "sseserve.server"}


def run(*command: str | Path, cwd: Path = ROOT, **environ: str) -> str:
    """Run a command and return its output; end the program if it fails."""
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        failed = f"failed with status {result.returncode}: {' '.join(map(str, command))}"
        raise SystemExit(f"{result.stdout}\n{result.stderr}\n{failed}")
    return result.stdout


def uv(*arguments: str | Path) -> None:
    run(sys.executable, "-m", "uv", *arguments, "--quiet")


def build(work: Path) -> tuple[Path, Path]:
    """Build both from a clone, and the wheel once more from the sdist; return wheel and sdist."""
    clone = work / "clone"
    if (ROOT / ".git").exists():
        run("git", "clone", "--quiet", ROOT, clone)
    else:  # .ci/run works in a copy, without what git ignores
        clone.symlink_to(ROOT)
    hatchling = (sys.executable, "-m", "hatchling", "build")
    run(*hatchling, "-d", work / "dist", cwd=clone)
    (sdist,) = (work / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    run(*hatchling, "-t", "wheel", "-d", work / "again", cwd=work / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = (work / "dist").glob("*.whl")
    (again,) = (work / "again").glob("*.whl")
    if contents(wheel) != contents(again):
        raise SystemExit("the wheel of the sdist differs from that of the checkout")
    packaged = {name for name in contents(wheel) if name.startswith("sseserve/")}
    tracked = {
        path.relative_to(clone).as_posix() for path in (clone / "sseserve").rglob("*") if path.is_file()
    }
    if packaged != {name for name in tracked if "__pycache__" not in name}:
        raise SystemExit(f"the wheel lacks, or has, {sorted(packaged ^ tracked)}")
    return wheel, sdist


def contents(wheel: Path) -> dict[str, int]:
    """Return the checksum of each file."""
    with zipfile.ZipFile(wheel) as archive:
        return {file.filename: file.CRC for file in archive.infolist()}


def find(version: str) -> Path | None:
    """Return an interpreter of a version of Python, if there is one."""
    folders = [
        *map(Path, os.environ["PATH"].split(":")),
        *Path.home().glob(f".pyenv/versions/{version}.*/bin"),
    ]
    programs = [folder / f"python{version}" for folder in folders]
    programs += [Path(f"/opt/python{version}/bin/python{version}")]
    for program in programs:
        query = [program, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if (
            program.exists()
            and subprocess.run(query, capture_output=True, text=True).stdout.strip() == version
        ):
            return program
    return None


def use(python: Path, resolution: str, package: Path, work: Path) -> None:
    """Install a package with all extras, and run the smoke tests and a user's program with it."""
    folder = Path(tempfile.mkdtemp(dir=work))
    constraints = folder / "constraints.txt"
    resolve = ("pip", "compile", "--python", python, "--resolution", resolution, "--extra", "all")
    uv(*resolve, "--no-annotate", "--no-header", "-o", constraints, ROOT / "pyproject.toml")
    print(f"+ {python}, {resolution}:", *constraints.read_text().split(), flush=True)
    uv("venv", "--python", python, folder / "venv")
    install = ("pip", "install", "--python", folder / "venv/bin/python", "-c", constraints)
    uv(*install, f"sseserve[all] @ {package.as_uri()}")
    # What a browser gets is the same everywhere, and other tests have seen it.
    smoke = (
        sys.executable,
        "-m",
        "pytest",
        "tests/test_smoke.py",
        "-k",
        "not browser",
        "-p",
        "no:cacheprovider",
    )
    run(*smoke, UNDER_TEST=str(folder / "venv/bin/sseserve"))
    program = folder / "program.py"
    program.write_text((ROOT / "tests/typed_program.py").read_text())
    run(folder / "venv/bin/python", "-W", "error", program, cwd=folder)
    if resolution == "highest":
        mypy = (sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", work / "mypy")
        run(*mypy, "--python-executable", folder / "venv/bin/python", program, cwd=folder)


def use_parts(python: Path, wheel: Path, work: Path) -> None:
    """Install each part without the others."""
    for extra, module in PART_IMPORTS.items():
        folder = work / f"part-{extra}"
        uv("venv", "--python", python, folder)
        uv("pip", "install", "--python", folder / "bin/python", f"sseserve[{extra}] @ {wheel.as_uri()}")
        run(folder / "bin/python", "-c", f"import {module}", cwd=work)


def main() -> None:
    pythons = list(map(Path, sys.argv[1:]))
    if not pythons:
        found = {version: find(version) for version in VERSIONS}
        pythons = [python for python in found.values() if python is not None]
        print(
            "not found:", ", ".join(version for version, python in found.items() if python is None) or "none"
        )
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        wheel, sdist = build(work)
        use_parts(pythons[0].absolute(), wheel, work)
        for python in pythons:
            use(python.absolute(), "lowest-direct", sdist, work)
            use(python.absolute(), "highest", wheel, work)


if __name__ == "__main__":
    main()
