"""The one-file binary, which UNDER_TEST names (``bash .ci/binary/build``; see ``test_smoke``)."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import pytest
from processes import Program, wait_until

BINARY = Path(os.environ.get("UNDER_TEST", "")).absolute()
if not BINARY.is_file() or BINARY.read_bytes()[:4] != b"\x7fELF":
    pytest.skip("UNDER_TEST names no binary", allow_module_level=True)

SIZE = 35_000_000  # bytes that it may have
LIBRARIES = "/lib/x86_64-linux-gnu"
C_LIBRARY = (
    "/lib64/ld-linux-x86-64.so.2",
    *(
        f"{LIBRARIES}/lib{name}"
        for name in ("c.so.6", "m.so.6", "dl.so.2", "pthread.so.0", "rt.so.1", "util.so.1")
    ),
)


def start(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the binary in an environment of these variables only."""
    return subprocess.run(
        [BINARY, *arguments], env=environ, capture_output=True, text=True, timeout=60, check=False
    )


def files_in(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return size and time of all files."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def home(tmp_path) -> Path:
    """A home directory without files."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_size():
    """It is small enough to be sent around."""
    assert BINARY.stat().st_size < SIZE


def test_machine_with_nothing_but_the_file(tmp_path):
    """The C library, a directory for temporary files, and the binary: `demo` works."""
    for folder in ("tmp", "lib64", "lib/x86_64-linux-gnu"):
        (tmp_path / folder).mkdir(mode=0o700, parents=True)
    for file in C_LIBRARY:
        shutil.copy(file, tmp_path / file[1:])
    shutil.copy(BINARY, tmp_path)
    command = ["unshare", "--map-root-user", "env", "-i", shutil.which("chroot"), tmp_path, f"/{BINARY.name}"]
    with Program(*command, "demo") as server:
        url = server.wait_for_output(r"at (http\S+)$")[1]
        (session,) = wait_until(lambda: httpx.get(f"{url}api/sessions").json()["sessions"], "the job")
        assert "<title>" in httpx.get(url).text
        with httpx.stream("GET", f"{url}api/sessions/{session['session_id']}/status/stream") as response:
            assert next(line for line in response.iter_lines() if line.startswith("event:"))
        assert server.wait(signal.SIGTERM) == 0, server.output


def test_it_is_one_process(home):
    """Signals, the exit status and what systemd tells its main process reach the server itself."""
    with Program(BINARY, "serve", "--port", "0", HOME=str(home), XDG_CACHE_HOME="") as server:
        server.wait_for_output("serving at")
        assert Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text() == ""
        program = Path(f"/proc/{server.pid}/exe").readlink()
        assert program.is_relative_to(home)
        folder = os.open(program.parent, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # what systemd-tmpfiles tries before it deletes old files
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(folder)
        assert server.wait(signal.SIGTERM) == 0, server.output


def test_files_are_unpacked_once(home):
    """Later starts, and a process that is killed, write nothing."""
    environ = {"HOME": str(home), "TMPDIR": str(home / "tmp")}
    assert start("--version", **environ).returncode == 0
    files = files_in(home)
    assert start("--version", **environ).returncode == 0
    with Program(BINARY, "serve", "--port", "0", **environ, XDG_CACHE_HOME="") as server:
        server.wait_for_output("serving at")
        server.wait(signal.SIGKILL)
    assert files_in(home) == files
    assert files


def test_files_that_were_deleted_or_cut_off(home):
    """They are unpacked again."""
    start("--version", HOME=str(home))
    complete = {path: size for path, (size, _) in files_in(home).items()}
    deleted, cut, *_ = (path for path in complete if path.name in {"base_library.zip", "libcrypto.so.3"})
    deleted.unlink()
    cut.chmod(0o600)
    os.truncate(cut, 1000)
    assert start("--version", HOME=str(home)).returncode == 0
    assert {path: size for path, (size, _) in files_in(home).items()} == complete


def test_several_first_starts_at_once(home):
    """Each finds complete files."""
    environ = {"HOME": str(home)}
    processes = [
        subprocess.Popen([BINARY, "--version"], env=environ, stdout=subprocess.PIPE) for _ in range(4)
    ]
    outputs = {process.communicate(timeout=60)[0] for process in processes}
    assert outputs == {start("--version", **environ).stdout.encode()}
    assert not list(home.rglob("*.new-*"))


@pytest.mark.parametrize(
    ("variable", "folder"),
    [("CACHE_DIRECTORY", "sseserve"), ("XDG_CACHE_HOME", "sseserve"), ("HOME", ".cache/sseserve")],
)
def test_places(variable, folder, tmp_path):
    """systemd's directory, the user's cache, the home directory."""
    assert start("--version", **{variable: str(tmp_path)}).returncode == 0
    assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        ("mount -t tmpfs -o ro tmpfs home", "/home/.cache: Read-only file system"),
        ("mount -t tmpfs -o noexec tmpfs home", "is on a file system without programs (noexec)"),
        ("mount -t tmpfs -o size=1m tmpfs home", "No space left on device"),
        ("mkdir -p home/.cache/sseserve; chmod 777 home/.cache/sseserve", "only this user can write"),
        ("mkdir home/.cache elsewhere; ln -s /elsewhere home/.cache/sseserve", "only this user can write"),
        ("rmdir home; touch home", "/home: Not a directory"),
        ("chown 12345 home", "/home: belongs to another user"),
        ("chmod 1777 home; chown 12345 home", "/home: belongs to another user"),
        ("chmod 777 home", "/home: can be changed by other users"),
        ("true", "needs glibc, which is not installed"),
    ],
)
def test_place_that_cannot_be_used(prepare, reason, tmp_path, home):
    """Where there is no other, the message has each with its reason, and what to do."""
    if "chown" in prepare and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    shutil.copy(BINARY, tmp_path / "sseserve")
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    look = "find home -name '*.new-*'"  # a file that is not complete
    result = subprocess.run(
        [
            *namespace,
            "sh",
            "-ec",
            f"{prepare}; chroot . /sseserve --version || status=$?; {look}; exit $status",
        ],
        cwd=tmp_path,
        env={"HOME": "/home", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout) == (126, "")
    first, *places, advice = result.stderr.splitlines()
    assert first.startswith("sseserve: cannot unpack its files (")
    assert reason in places[0]
    assert places[1:] == [
        "  /tmp: No such file or directory",
        "  /var/tmp: No such file or directory",
    ]
    assert advice.startswith("Set TMPDIR to a directory")


def test_next_place(tmp_path, home):
    """It is used where the one before cannot be."""
    (home / ".cache").symlink_to("/proc")  # where nobody can create a directory
    (tmp_path / "temporary").mkdir()
    assert start("--version", HOME=str(home), TMPDIR=str(tmp_path / "temporary")).returncode == 0
    assert [path.name for path in (tmp_path / "temporary").iterdir()] == [f"sseserve-{os.geteuid()}"]


def test_no_library_is_searched_in_the_current_directory(home):
    """An empty element of the search path is that directory (ld.so(8)), also behind an empty variable."""
    done = start("--version", HOME=str(home), LD_LIBRARY_PATH="", LD_DEBUG="libs")
    tried = re.findall(r"trying file=(\S+)", done.stderr)
    assert done.returncode == 0
    assert tried
    assert [path for path in tried if path[0] != "/"] == []
