"""sseserve log export, import and check: the file of a SQLite engine as NDJSON, and whether it is sound."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from click.testing import CliRunner, Result

from sseserve.cli import main
from sseserve.config import Settings
from sseserve.engines import EngineListener, open_engine
from sseserve.model import Control, Event, Progress, Receipt, Session, State


def log(command: str, *arguments: Any, data: bytes = b"") -> Result:
    """Run a command of ``sseserve log``."""
    return CliRunner().invoke(main, ["log", command, *map(str, arguments)], input=data)


async def fill(path: Path, **settings: Any) -> None:
    """Store some sessions with all that there is."""
    engine = open_engine(Settings(engine=f"sqlite:{path}", **settings), EngineListener())
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        for session_id in ("ü/1", "b", "deleted"):
            for seq in range(1, 8):
                progress = Progress(
                    status="s", state=State.RUNNING, percent=10 * seq, message="é\u2028\n", error={"a": [seq]}
                )
                session = Session(
                    id=session_id, epoch="e", seq=seq, lease=5.0, progress=progress, data=msgspec.Raw(b"[1]")
                )
                event = Event(seq, "progress", progress, seq + 0.25, ("stage",))
                if seq % 2:
                    event = Event(seq, "note", msgspec.Raw(b'{"n":%d}' % seq), 1e9, retry=5)
                receipt = (
                    f"key {seq}",
                    Receipt(str(session.cursor), Control.PAUSE, 2, b"\x00\xff", created=True),
                )
                await engine.append(session, [event], receipt=receipt)
        await engine.delete("deleted", "e")
        await engine.store_revocation(b"\0\xff", 4e9)
        nursery.cancel_scope.cancel()


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "logs.db"
    trio.run(lambda: fill(path, history_events=5))
    return path


def damage(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)


def test_round_trip(path, tmp_path):
    """What is imported is exported again to the byte, and is what the engine had."""
    exported = log("export", path)
    assert exported.exit_code == 0
    assert "exported 2 sessions, 10 events, 14 receipts" in exported.stderr
    lines = [json.loads(line) for line in exported.stdout_bytes.splitlines()]
    assert lines[0]["sseserve_log"] == 1
    assert [line["session"]["id"] for line in lines if "session" in line] == ["ü/1", "b"]
    copy = tmp_path / "copy.db"
    imported = log("import", copy, data=exported.stdout_bytes)
    assert (imported.exit_code, imported.stdout) == (0, "")
    assert "imported 2 sessions, 10 events, 14 receipts" in imported.stderr
    assert log("export", copy).stdout_bytes == exported.stdout_bytes
    assert log("check", copy).exit_code == 0
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT * FROM revocations").fetchall() == [(b"\0\xff", 4e9)]

    async def read() -> Any:
        found = []
        for name in (path, copy):
            engine = open_engine(Settings(engine=f"sqlite:{name}"), EngineListener())
            async with trio.open_nursery() as nursery:
                await nursery.start(engine.run)
                sessions = await engine.sessions()
                pages = [await engine.read(session.id, 0, 100) for session in sessions]
                receipts = [await engine.receipt(session.id, "key 1") for session in sessions]
                found.append((sessions, pages, receipts))
                nursery.cancel_scope.cancel()
        return found

    before, after = trio.run(read)
    assert before == after


def test_pipe(path, tmp_path):
    """Of two processes; a reader that leaves is no error."""
    sseserve = f"{sys.executable} -m sseserve"
    copy = tmp_path / "copy.db"
    command = f"set -o pipefail; {sseserve} log export {path} - | {sseserve} log import {copy} -"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    assert log("export", copy).stdout_bytes == log("export", path).stdout_bytes
    output = tmp_path / "out"
    assert log("export", path, output).exit_code == 0
    assert output.read_bytes() == log("export", path).stdout_bytes


def test_while_a_server_has_the_file(tmp_path):
    """Export and check read it as it is at one moment; import is refused."""
    path = tmp_path / "logs.db"
    exported: Any = None
    checked: Any = None
    imported: Any = None

    async def main_() -> None:
        nonlocal exported, checked, imported
        engine = open_engine(Settings(engine=f"sqlite:{path}"), EngineListener())
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            for seq in range(1, 21):
                session = Session(id="s", epoch="e", seq=seq)
                await engine.append(session, [Event(seq, "note", msgspec.Raw(b"1"), 1.0)])
            command = [sys.executable, "-m", "sseserve", "log"]
            options: Any = {"capture_stdout": True, "capture_stderr": True, "check": False, "stdin": b""}
            exported, checked, imported = [
                await trio.run_process([*command, name, path], **options)
                for name in ("export", "check", "import")
            ]
            session = Session(id="s", epoch="e", seq=21)
            await engine.append(session, [Event(21, "note", msgspec.Raw(b"1"), 1.0)])
            assert len((await engine.read("s", 0, 100)).events) == 21
            nursery.cancel_scope.cancel()

    trio.run(main_)
    assert exported.returncode == checked.returncode == 0
    assert exported.stdout.count(b'"event"') == 20
    assert (imported.returncode, imported.stdout) == (2, b"")
    assert b"another server has" in imported.stderr


def with_seq(line, seq):
    return re.sub(rb'"seq":\d+', b'"seq":%d' % seq, line)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda lines: [], "line 1: the last line is missing"),
        (lambda lines: [b'{"id": 1}\n', *lines], "line 1: it is not what sseserve log export writes"),
        (lambda lines: [lines[0].replace(b"1", b"2", 1)], "line 1: the format 2 is of another sseserve"),
        (lambda lines: lines[:-1], "the last line is missing"),
        (lambda lines: lines + lines[1:2], "it follows the last one"),
        (lambda lines: lines[:1] + lines[2:], "line 2: a session must come first"),
        (lambda lines: lines[:3] + lines[4:], "line 4: event 5 follows event 3"),
        (lambda lines: lines[:6] + lines[7:], "before it end at 6, not at 7"),
        (lambda lines: lines[:7] + lines[8:], "there should be"),
        (lambda lines: lines[:-1] + lines[1:2] + lines[-1:], "it is there twice"),
        (lambda lines: [lines[0], b'{"session":' + b"[" * 100_000 + b"]" * 100_000], "line 2: maximum"),
        (lambda lines: [*lines[:2], with_seq(lines[2], 2**32)], "line 3: there is no event 4294967296"),
        (lambda lines: [*lines[:2], with_seq(lines[2], 0)], "line 3: there is no event 0"),
        (lambda lines: [lines[0], with_seq(lines[1], 0), with_seq(lines[1], 0)], "end at 0, not at 0"),
        (lambda lines: [lines[0], with_seq(lines[1], 2**64)], "line 2: no session can have the id"),
        (lambda lines: [lines[0], lines[1].replace(b'"id":"', b'"id":"","x":"')], "line 2: no session can"),
        (lambda lines: [lines[0], lines[1].replace(b'"epoch":"', b'"epoch":"\\n')], "line 2: no session can"),
        (lambda lines: [*lines[:2], b"{}\n", *lines[2:]], "line 3: it is no session, event"),
        (lambda lines: [*lines[:2], b"nonsense\n"], "line 3: JSON is malformed"),
    ],
)
def test_wrong_input(path, tmp_path, change, reason):
    """The message has the number of the line, and there is no file afterwards."""
    lines = log("export", path).stdout_bytes.splitlines(keepends=True)
    copy = tmp_path / "new.db"
    result = log("import", copy, data=b"".join(change(lines)))
    assert result.exit_code == 1
    assert reason in result.stderr
    assert result.stderr.endswith("; nothing was imported\n")
    assert [name.name for name in tmp_path.iterdir() if name.name.startswith("new")] == []


def test_file_with_sessions_is_not_imported_into(path):
    """Nor is one that is not there exported or checked, or that is another program's."""
    result = log("import", path)
    assert (result.exit_code, "has 2 sessions already" in result.stderr) == (2, True)
    for command in ("export", "check"):
        result = log(command, path.parent / "nowhere.db")
        assert (result.exit_code, "there is no file" in result.stderr) == (2, True)
    path.write_bytes(b"x" * 10_000)
    result = log("check", path)
    assert (result.exit_code, "is not an SQLite database" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("DELETE FROM events WHERE place = (1 << 32 | 5)", "session 'ü/1': the events 5 to 5 are missing"),
        ("DELETE FROM events WHERE place = (2 << 32 | 7)", "its events end at 6, its record is at 7"),
        ("UPDATE events SET body = 'x' WHERE place = (1 << 32 | 4)", "event 4 cannot be read"),
        ("UPDATE events SET weight = 1 WHERE place = (1 << 32 | 4)", "event 4 takes "),
        ("UPDATE sessions SET record = '{}' WHERE position = 1", "its record cannot be read"),
        ("UPDATE sessions SET id = 'x' WHERE position = 1", "session 'x': its record is that of 'ü/1'"),
        ("UPDATE sessions SET size = 1 WHERE position = 1", "bytes, not 1"),
        ("DELETE FROM receipts WHERE position = 1 AND number = 1", "6 receipts of "),
        ("DELETE FROM sessions WHERE position = 1", "the events of log 1 belong to no session"),
        (
            'UPDATE sessions SET record = replace(record, \'"state":"running"\', \'"state":"failed"\')',
            "its last progress is running",
        ),
    ],
)
def test_check_finds(path, script, problem):
    """What is damaged, with the session's id."""
    assert log("check", path).exit_code == 0
    damage(path, script)
    result = log("check", path)
    assert result.exit_code == 1
    assert problem in result.stdout


def test_check_finds_damaged_pages(path):
    """SQLite's own check is part of it."""
    data = bytearray(path.read_bytes())
    page = 4096 * 5
    data[page + 100 : page + 3000] = bytes(2900)
    path.write_bytes(data)
    result = log("check", path)
    assert result.exit_code == 1
    assert result.stdout.startswith("SQLite: ")
