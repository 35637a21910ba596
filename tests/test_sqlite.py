"""The SQLite engine beyond the contract of all engines: what is on the disk, restarts, refusals, failures."""

from __future__ import annotations

import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
import trio.testing
from click.testing import CliRunner

import sseserve
import sseserve.client
from sseserve.cli import main
from sseserve.config import Settings
from sseserve.engines import EngineListener, Repeated, Stale, open_coordination, open_engine
from sseserve.engines.base import receipt_size
from sseserve.engines.sqlite import SqliteEngine
from sseserve.engines.sqlite import cleaning as cleaning_module
from sseserve.engines.sqlite import engine as engine_module
from sseserve.engines.sqlite import file as file_module
from sseserve.engines.sqlite import storage as storage_module
from sseserve.engines.sqlite.file import APPLICATION_ID, MIGRATIONS
from sseserve.engines.sqlite.readers import Reader
from sseserve.errors import ConfigError, EngineUnavailable, InsufficientStorage, TooManySessions
from sseserve.model import Control, Event, Progress, Receipt, Session, State
from sseserve.progress.tracker import Tracker


class Listener(EngineListener):
    """What the engine has told."""

    def __init__(self) -> None:
        self.delivered: list[tuple[str, int]] = []
        self.removals: list[str] = []
        self.problems: list[str | None] = []

    def deliver(self, session: Session, events: Sequence[Event], *, own: bool = True) -> None:
        self.delivered += [(session.id, event.seq) for event in events]

    def removed(self, session: Session, *, own: bool = True) -> None:
        self.removals.append(session.id)

    def availability_changed(self, problem: str | None) -> None:
        self.problems.append(problem)


class OpenEngine:
    """An engine on a file, and a minimal tracker."""

    def __init__(self, engine: SqliteEngine, listener: Listener) -> None:
        self.engine = engine
        self.listener = listener

    async def append(
        self, session_id: str = "s", *, data: bytes = b"1", receipt: Any = None, **fields: Any
    ) -> Session:
        """Append one event to what is the newest, stored or being stored."""
        before = await self.engine.latest(session_id) or Session(id=session_id, epoch="e")
        after = msgspec.structs.replace(before, seq=before.seq + 1, **fields)
        event = Event(after.seq, "note", msgspec.Raw(data), 1.5)
        await self.engine.append(after, [event], receipt=receipt)
        return after

    async def seqs(self, session_id: str = "s") -> list[int]:
        page = await self.engine.read(session_id, 0, 100_000)
        assert page is not None
        return [event.seq for event in page.events]


@asynccontextmanager
async def open_file(
    path: Path, clock: Any = trio.current_time, posix: Any = None, **settings: Any
) -> AsyncIterator[OpenEngine]:
    """Open an engine for the length of the block, and close it."""
    listener = Listener()
    fields = Settings(engine=f"sqlite:{path}", **settings)
    engine = SqliteEngine(fields, listener, clock, *([] if posix is None else [posix]))
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        yield OpenEngine(engine, listener)
        nursery.cancel_scope.cancel()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "logs.db"


def rows(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


# Restarts


async def test_everything_is_there_after_a_restart(path):
    """Records, events, receipts, order and the numbers that continue."""
    receipt = Receipt("e-1", Control.PAUSE, 3, b"\x00\xff", created=True)
    progress = Progress(status="s", state=State.RUNNING, data=msgspec.Raw(b'{"a":1}'))
    async with open_file(path) as file:
        await file.append("b", owner="o", lease=5.0, progress=progress, receipt=("k", receipt))
        await file.append("a")
        before = await file.append("b")
        page = await file.engine.read("b", 0, 10)
    async with open_file(path) as file:
        assert await file.engine.load("b") == before
        assert await file.engine.read("b", 0, 10) == page
        assert [session.id for session in await file.engine.sessions()] == ["a", "b"]
        assert [session.id for session in await file.engine.leased()] == ["b"]
        assert await file.engine.receipt("b", "k") == receipt
        with pytest.raises(Repeated):
            await file.append("b", receipt=("k", receipt))
        assert (await file.append("b")).seq == 3
        await file.append("c")
        assert await file.seqs("b") == [1, 2, 3]
        assert await file.seqs("c") == [1]


async def test_bounds_hold_after_a_restart(path):
    """Of events and of receipts, whose sizes are counted on."""
    for number in range(4):
        async with open_file(path, history_events=5, history_bytes=4000) as file:
            for key in range(3):
                await file.append(receipt=(f"{number}-{key}" * 50, Receipt("e", Control.CONTINUE)))
    async with open_file(path, history_events=5, history_bytes=4000) as file:
        assert await file.seqs() == [8, 9, 10, 11, 12]
        keys = [f"{number}-{key}" * 50 for number in range(4) for key in range(3)]
        kept = [key for key in keys if await file.engine.receipt("s", key)]
        assert kept == keys[-2:]


async def test_a_session_of_the_id_of_a_deleted_one(path):
    """Neither its events nor its receipts come back, whether its rows are deleted already or not."""
    receipt = ("k", Receipt("e-1", Control.CONTINUE))
    async with open_file(path) as file:
        await file.append(receipt=receipt)
        async with trio.open_nursery() as nursery, file.engine._writing:
            nursery.start_soon(file.engine.delete, "s", "e")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(partial(file.append, receipt=receipt))
            await trio.testing.wait_all_tasks_blocked()
        assert file.listener.removals == ["s"]
        await file.append()
    async with open_file(path) as file:
        assert await file.seqs() == [1, 2]
        assert await file.engine.receipt("s", "k") is not None


@pytest.mark.parametrize("cache", [0, 3000, 64 * 2**20])
async def test_receipts_that_are_not_in_memory(path, monkeypatch, cache):
    """They hold all the same: they are read when they are needed."""
    monkeypatch.setattr(engine_module, "RECEIPT_CACHE", cache)
    rng = random.Random(cache)
    receipt = Receipt("e", Control.CONTINUE)
    known: set[tuple[str, str]] = set()
    for _ in range(3):
        async with open_file(path) as file:

            async def publish(session_id: str, key: str) -> None:
                while True:
                    try:
                        await file.append(session_id, receipt=(key, receipt))
                    except Stale:
                        continue
                    except Repeated:
                        return
                    assert (session_id, key) not in known
                    known.add((session_id, key))
                    return

            for _ in range(20):
                async with trio.open_nursery() as nursery:
                    for key in rng.sample(range(60), 10):
                        nursery.start_soon(publish, f"s{key % 3}", f"{key}")
            assert sum([len(await file.seqs(f"s{number}")) for number in range(3)]) == len(known)
            receipts = file.engine._receipts
            assert receipts._size == sum(receipts._sizes.values())
            assert cache > 0 or len(receipts._sizes) < 3
    assert len(known) > 50


async def test_receipts_that_were_read_before_another_was_stored(path):
    """Are read again: the newest is not forgotten."""
    receipt = Receipt("e", Control.CONTINUE)
    async with open_file(path) as file:
        await file.append(receipt=("old", receipt))
    async with open_file(path) as file:
        call, gate = file.engine._readers.call, trio.Event()

        async def call_slowly(*arguments: Any) -> Any:
            file.engine._readers.call = call
            result = await call(*arguments)
            await gate.wait()
            return result

        file.engine._readers.call = call_slowly
        found = []

        async def read() -> None:
            found.append(await file.engine.receipt("s", "new"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            await file.append(receipt=("new", receipt))
            file.engine._receipts.forget(file.engine._logs.get("s"))
            gate.set()
        assert found == [receipt]
        await file.append(receipt=("newer", receipt))


async def test_receipts_of_one_commit(path):
    """Their bounds hold, whether those that make room are stored already or not."""
    receipt = Receipt("e", Control.CONTINUE)
    keys = [f"{number:0200}" for number in range(40)]
    async with open_file(path, history_bytes=20_000) as file:
        await file.append()
        for group in (keys[:5], keys[5:]):
            async with trio.open_nursery() as nursery, file.engine._writing:
                for key in group:
                    nursery.start_soon(lambda key=key: file.append(receipt=(key, receipt)))
                    await trio.testing.wait_all_tasks_blocked()
        kept = [key for key in keys if await file.engine.receipt("s", key)]
    assert kept == keys[-10:]
    assert [key for (key,) in rows(path, "SELECT key FROM receipts ORDER BY number")] == kept
    size = sum(receipt_size(key, receipt) for key in kept)
    assert rows(path, "SELECT receipts, receipts_size FROM sessions") == [(10, size)]
    async with open_file(path, history_bytes=20_000) as file:
        await file.append(receipt=(kept[0], msgspec.structs.replace(receipt, count=2)))
    assert [key for (key,) in rows(path, "SELECT key FROM receipts ORDER BY number")] == kept[1:] + kept[:1]
    assert rows(path, "SELECT receipts, receipts_size FROM sessions") == [(10, size)]


@pytest.mark.parametrize(
    ("durability", "boot", "renewed"),
    [("normal", "1", False), ("normal", "2", True), ("full", "2", False)],
)
async def test_power_cut(path, tmp_path, monkeypatch, durability, boot, renewed):
    """The logs get other epochs if acknowledged events may be lost: their numbers will be given again."""
    monkeypatch.setattr(engine_module, "boot_id", lambda: "1")
    after = tmp_path / "after.db"
    async with open_file(path, durability=durability) as file:
        for session_id in ("a", "b"):
            before = await file.append(session_id)
        await file.append("b")
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", f"{after}{suffix}")
    monkeypatch.setattr(engine_module, "boot_id", lambda: boot)
    async with open_file(after, durability=durability) as file:
        sessions = await file.engine.sessions()
        assert len({session.epoch for session in sessions} | {before.epoch}) == (3 if renewed else 1)
        assert await file.seqs("b") == [1, 2]
        await file.append("b")
        stored = sessions[0].epoch
    # In order again, until the next time.
    monkeypatch.setattr(engine_module, "boot_id", lambda: "3")
    async with open_file(after, durability=durability) as file:
        assert (await file.engine.load("b")).epoch == stored
        assert await file.seqs("b") == [1, 2, 3]


# Leases


async def test_leases_begin_afresh(path):
    """However long the server was away: a producer that goes on publishing is neither stalled nor lost."""
    now = 0.0
    async with open_file(path) as file:
        tracker = Tracker(file.engine, monotonic=lambda: now)
        await tracker.create("s", lease=5)
        now = 6.0
        await tracker.check_leases()
        assert (await tracker.get("s")).stalled
    now = 1e6
    async with open_file(path) as file:
        tracker = Tracker(file.engine, monotonic=lambda: now)
        for seconds in (0, 14.9):
            now = 1e6 + seconds
            await tracker.check_leases()
            assert not (await tracker.get("s")).ended
        await tracker.update("s", progress=10)
        assert not (await tracker.get("s")).stalled


# Group commit


async def test_appends_that_wait_are_one_transaction(path):
    """Fifty publishers of one session, each of which builds on the one before, cost two commits."""
    async with open_file(path) as file:
        await file.append()
        with closing(sqlite3.connect(path)) as connection:
            versions = []

            async def publish() -> None:
                await file.append()
                versions.append(connection.execute("PRAGMA data_version").fetchone())

            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(publish)
        assert len(set(versions)) <= 2
        assert await file.seqs() == list(range(1, 52))


async def test_nothing_is_shown_before_it_is_stored(path):
    """``latest`` has what is being stored; ``load``, ``read``, ``receipt`` and the listener do not."""
    async with open_file(path) as file:
        await file.append()
        async with trio.open_nursery() as nursery, file.engine._writing:
            nursery.start_soon(lambda: file.append(receipt=("k", Receipt("e-2", Control.CONTINUE))))
            await trio.testing.wait_all_tasks_blocked()
            assert (await file.engine.latest("s")).seq == 2
            assert (await file.engine.load("s")).seq == 1
            assert await file.seqs() == [1]
            assert file.listener.delivered == [("s", 1)]
            settled: list[Session] = []
            receipts: list[Receipt] = []

            async def settle() -> None:
                settled.append(await file.engine.settled("s"))

            async def read_receipt() -> None:
                receipts.append(await file.engine.receipt("s", "k"))

            nursery.start_soon(settle)
            nursery.start_soon(read_receipt)
            await trio.testing.wait_all_tasks_blocked()
            assert settled == receipts == []
        assert settled[0].seq == 2
        assert receipts[0].id == "e-2"
        assert file.listener.delivered == [("s", 1), ("s", 2)]


async def test_what_was_read_is_there_for_the_next_read(path):
    """Also if it is read between its commit and the moment at which the event loop learns of that."""
    async with open_file(path) as file:
        await file.append()
        commit, release = file.engine._writer.commit, threading.Event()

        def commit_slowly(*arguments: Any) -> Any:
            result = commit(*arguments)
            release.wait()
            return result

        file.engine._writer.commit = commit_slowly
        call, has_read = file.engine._readers.call, trio.Event()

        async def call_and_note(*arguments: Any) -> Any:
            result = await call(*arguments)
            has_read.set()
            return result

        file.engine._readers.call = call_and_note
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.append)
            await wait_until(lambda: rows(path, "SELECT count(*) FROM events") == [(2,)])
            pages = []

            async def read() -> None:
                pages.append(await file.engine.read("s", 0, 10))
                pages.append(await file.engine.read("s", 2, 10))

            nursery.start_soon(read)
            await has_read.wait()
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(trio.to_thread.run_sync, release.set)
        assert [page.session.seq for page in pages] == [2, 2]


async def test_cancelled_append_that_others_build_on_is_stored(path):
    """One that nothing builds on is left out, and its place is taken by another."""
    async with open_file(path) as file:
        await file.append()
        async with trio.open_nursery() as nursery, file.engine._writing:
            nursery.start_soon(file.append)  # waits for the lock, as a batch
            await trio.testing.wait_all_tasks_blocked()
            scopes = []

            async def append(data: bytes) -> None:
                with trio.CancelScope() as scope:
                    scopes.append(scope)
                    await file.append(data=data)

            for data in (b"3", b"4", b"5"):
                nursery.start_soon(append, data)
                await trio.testing.wait_all_tasks_blocked()
            scopes[0].cancel()  # 4 builds on it
            scopes[2].cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert (await file.engine.latest("s")).seq == 4
            nursery.start_soon(append, b"6")
            await trio.testing.wait_all_tasks_blocked()
        page = await file.engine.read("s", 0, 10)
        assert [bytes(event.data) for event in page.events] == [b"1", b"1", b"3", b"4", b"6"]
        assert [scope.cancelled_caught for scope in scopes] == [False, False, True, False]


async def test_closing_stores_what_others_build_on(path):
    """Nobody waits for ever for a batch after the last, and what is stored has no gap."""
    release = threading.Event()
    acknowledged = []
    async with trio.open_nursery() as nursery:
        engine = SqliteEngine(Settings(engine=f"sqlite:{path}"), Listener())
        await nursery.start(engine.run)
        file = OpenEngine(engine, Listener())
        commit = engine._writer.commit

        def commit_slowly(*arguments: Any) -> Any:
            release.wait()
            return commit(*arguments)

        engine._writer.commit = commit_slowly

        async def append(*, shield: bool) -> None:
            with trio.CancelScope(shield=shield):
                acknowledged.append((await file.append()).seq)

        for number in range(6):
            nursery.start_soon(partial(append, shield=number == 4))
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        release.set()
    async with open_file(path) as file:
        stored = await file.seqs()
        assert stored in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6])
        assert set(acknowledged) <= set(stored)


async def test_closing_waits_for_reads(path):
    """A connection is not closed while a thread uses it."""
    async with open_file(path) as file:
        await file.append()
        started, release = threading.Event(), threading.Event()
        readers = file.engine._readers

        def read(reader: Reader) -> Any:
            started.set()
            release.wait()
            return reader.read(1, 0, 10)

        pages = []

        async def call() -> None:
            with trio.CancelScope(shield=True):
                pages.append(await readers.call(read))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.to_thread.run_sync(started.wait)
            nursery.start_soon(readers.aclose)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(EngineUnavailable):
                await file.engine.read("s", 0, 10)
            release.set()
        assert len(pages[0].events) == 1


async def test_what_builds_on_a_failure_fails_too(path):
    """Also what is not in the failed batch, and would be stored by the next one."""
    async with open_file(path) as file:
        await file.append()
        connection, commit = file.engine._writer._connection, file.engine._writer.commit

        def fail_once(*arguments: Any) -> Any:
            connection.execute("PRAGMA query_only = 1")
            file.engine._writer.commit = commit
            try:
                return commit(*arguments)
            finally:
                connection.execute("PRAGMA query_only = 0")

        file.engine._writer.commit = fail_once
        failed = []

        async def append(session_id: str) -> None:
            try:
                await file.append(session_id)
            except InsufficientStorage:
                failed.append(session_id)

        async with trio.open_nursery() as nursery, file.engine._writing:
            for session_id in ("new", "s", "new", "s2"):  # the first is a batch, the others wait
                nursery.start_soon(append, session_id)
                await trio.testing.wait_all_tasks_blocked()
        assert sorted(failed) == ["new", "new", "s", "s2"]
        assert await file.engine.latest("new") is None
        assert await file.seqs() == [1]
        await append("new")
        assert await file.seqs("new") == [1]


# Refusals


def refusal(url: str) -> str:
    """Return the reason why an engine does not open."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            engine = open_engine(Settings(engine=url), EngineListener())
            await nursery.start(engine.run)
            nursery.cancel_scope.cancel()

    with pytest.raises((ConfigError, ExceptionGroup)) as caught:
        trio.run(main)
    error: BaseException = caught.value
    while isinstance(error, ExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, ConfigError)
    return str(error)


def make_file(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite:", "needs the path of a file"),
        ("sqlite::memory:", "are the engine memory:"),
        ("sqlite://host/x.db", "write sqlite:host/x.db or sqlite:/host/x.db"),
        ("sqlite:/nowhere/x.db", "create the directory /nowhere first"),
        ("sqlite:/tmp", "name a file in it, such as sqlite:/tmp/logs.db"),
        ("sqlite:/proc/version", "cannot (open|use) /proc/version"),
    ],
)
def test_impossible_paths(url, reason):
    """The message says what to do."""
    assert re.search(reason, refusal(url))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("CREATE TABLE users (name)", "is the database of another program"),
        ("PRAGMA application_id = 7", "is the database of another program"),
        (f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 99", "by a newer sseserve"),
    ],
)
def test_files_of_others_are_refused(path, script, reason):
    """And left as they are."""
    make_file(path, script)
    before = path.read_bytes()
    assert reason in refusal(f"sqlite:{path}")
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_no_database(path):
    """A file of another kind is refused and left as it is."""
    path.write_text("my thesis\n" * 1000)
    assert "is not an SQLite database" in refusal(f"sqlite:{path}")
    assert path.read_text() == "my thesis\n" * 1000


def test_connection_to_a_file_that_cannot_be_used_is_closed(path, monkeypatch):
    """Python 3.13 and later warn of one that is only forgotten."""
    opened = []

    class Connection(sqlite3.Connection):
        is_closed = False

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            opened.append(self)

        def close(self) -> None:
            self.is_closed = True
            super().close()

    connect = partial(sqlite3.connect, factory=Connection)
    monkeypatch.setattr(file_module.sqlite3, "connect", connect)
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        file_module.connect(path)
    assert [connection.is_closed for connection in opened] == [True]


async def test_one_server_has_the_file(path):
    """Neither this process nor another can open it a second time; afterwards they can."""
    command = [sys.executable, "-m", "sseserve", "serve", "--port", "0", "--engine", f"sqlite:{path}"]
    async with open_file(path) as file:
        with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match="another server has .* open")):
            async with open_file(path):
                pass
        second = await trio.run_process(command, capture_stderr=True, capture_stdout=True, check=False)
        assert second.returncode == 2
        assert b"sseserve: another server has " in second.stderr
        # The refused attempts took none of SQLite's own locks away: who reads the file leaves the WAL alone.
        read = f"import sqlite3; c = sqlite3.connect({str(path)!r}); print(*c.execute('SELECT * FROM clock'))"
        await trio.run_process([sys.executable, "-c", read], capture_stdout=True)
        assert Path(f"{path}-wal").exists()
        await file.append()
    async with open_file(path) as file:
        assert await file.seqs() == [1]


async def test_relative_path(tmp_path, monkeypatch):
    """It is below the working directory, even if that changes."""
    monkeypatch.chdir(tmp_path)
    async with open_file(Path("logs.db")) as file:
        monkeypatch.chdir("/")
        await file.append()
        assert await file.seqs() == [1]
    assert (tmp_path / "logs.db").exists()


# The schema


def test_file_of_version_1(path):
    """It had no note of the boot. Its sessions are kept, with their epochs."""
    make_file(
        path,
        f"PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL; {MIGRATIONS[0]}"
        f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 1;"
        """INSERT INTO sessions VALUES (1, 's', 1, 1, 129, 0, 0, 0, '{"id":"s","epoch":"e","seq":1}');
        INSERT INTO events VALUES (1 << 32 | 1, 129, '{"type":"note","at":1.5,"data":7}');""",
    )
    reading = CliRunner().invoke(main, ["log", "check", str(path)])
    assert (reading.exit_code, "start a server with it once" in reading.stderr) == (2, True)

    async def append() -> tuple[list[int], str]:
        async with open_file(path) as file:
            session = await file.append()
            return await file.seqs(), session.epoch

    assert trio.run(append) == ([1, 2], "e")
    assert rows(path, "PRAGMA user_version") == [(len(MIGRATIONS),)]
    assert CliRunner().invoke(main, ["log", "check", str(path)]).exit_code == 0


async def test_file_of_version_2(path):
    """It had no revocations; it can keep some now."""
    make_file(
        path,
        f"PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL; {MIGRATIONS[0]} {MIGRATIONS[1]}"
        f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 2;"
        """INSERT INTO sessions VALUES (1, 's', 1, 1, 129, 0, 0, 0, '{"id":"s","epoch":"e","seq":1}');
        INSERT INTO events VALUES (1 << 32 | 1, 129, '{"type":"note","at":1.5,"data":7}');""",
    )
    async with open_file(path) as file:
        assert await file.seqs() == [1]
        await file.engine.store_revocation(b"r", 4e9)
        assert await file.engine.load_revocations() == [(b"r", 4e9)]
    assert rows(path, "PRAGMA user_version") == [(len(MIGRATIONS),)]


def test_an_older_file_is_converted(path, monkeypatch):
    """With all that is in it; a step that fails changes nothing, those before it stand."""

    async def append() -> list[int]:
        async with open_file(path) as file:
            await file.append()
            return await file.seqs()

    trio.run(append)
    newer = (*MIGRATIONS, "ALTER TABLE sessions ADD COLUMN colour TEXT; UPDATE sessions SET colour = 'blue'")
    monkeypatch.setattr(file_module, "MIGRATIONS", (*newer, "CREATE TABLE half (a); SELECT nonsense"))
    assert "nonsense" in refusal(f"sqlite:{path}")
    assert rows(path, "PRAGMA user_version") == [(len(MIGRATIONS) + 1,)]
    assert rows(path, "SELECT colour FROM sessions") == [("blue",)]
    assert not rows(path, "SELECT * FROM sqlite_schema WHERE name = 'half'")
    monkeypatch.setattr(file_module, "MIGRATIONS", (*newer, "ALTER TABLE sessions DROP COLUMN colour"))
    assert trio.run(append) == [1, 2]


@pytest.mark.parametrize(("durability", "synchronous"), [("normal", 1), ("full", 2)])
async def test_durability(path, durability, synchronous):
    """It is SQLite's own setting, in WAL mode."""
    async with open_file(path, durability=durability) as file:
        connection = file.engine._writer._connection
        assert connection.execute("PRAGMA synchronous").fetchone() == (synchronous,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    ("lost", "first", "seqs"), [([3], 1, [1, 2]), ([1, 2], 3, [3, 4]), ([1, 2, 3, 4], 5, [])]
)
async def test_events_that_are_missing(path, lost, first, seqs):
    """A page of a damaged log does not begin before what is left: reading on comes to an end."""
    async with open_file(path) as file:
        for _ in range(4):
            await file.append()
        with closing(sqlite3.connect(path)) as connection:
            places = [(1 << 32 | seq,) for seq in lost]
            connection.executemany("DELETE FROM events WHERE place = ?", places)
            connection.commit()
        page = await file.engine.read("s", 0, 10)
        assert page is not None
        assert (page.first, [event.seq for event in page.events]) == (first, seqs)


@pytest.mark.parametrize("replaced", [False, True])
async def test_file_that_is_moved_away(tmp_path, replaced, monkeypatch):
    """Nothing is acknowledged that would be lost, nothing of another file is read, until it is back."""
    monkeypatch.setattr(engine_module, "RETRY", 0.01)
    path, away = tmp_path / "logs.db", tmp_path / "away"
    async with open_file(path) as opened:
        await opened.append()
        path.rename(away)
        if replaced:
            shutil.copy(away, path)
        with pytest.raises(EngineUnavailable, match=r"logs\.db, was deleted, moved or replaced"):
            await opened.append()
        assert opened.engine.problem is not None
        with pytest.raises(EngineUnavailable, match="deleted, moved or replaced"):
            await opened.seqs()
        away.rename(path)
        with trio.fail_after(20):
            while opened.engine.problem is not None:
                await trio.sleep(0.01)
        await opened.append()
        assert await opened.seqs() == [1, 2]
    async with open_file(path) as opened:
        assert await opened.seqs() == [1, 2]


async def test_sessions_of_an_owner_survive_a_restart(path):
    """They count afterwards."""
    async with open_file(path, max_sessions_per_owner=2) as file:
        for session_id in "ab":
            await file.append(session_id, owner="ann")
    async with open_file(path, max_sessions_per_owner=2) as file:
        with pytest.raises(TooManySessions):
            await file.append("c", owner="ann")
        await file.engine.delete("a", "e")
        await file.append("c", owner="ann")


async def test_sessions_that_are_not_stored_do_not_count(small_disk):
    """Those of an owner that the disk had no space for."""
    async with open_file(small_disk / "logs.db", max_sessions_per_owner=2) as file:
        filler = fill(small_disk)
        for number in range(5):
            with pytest.raises(InsufficientStorage):
                await file.append(f"s{number}", data=b'"%s"' % (b"x" * 50_000), owner="ann")
        filler.unlink()
        for session_id in "ab":
            await file.append(session_id, owner="ann")
        with pytest.raises(TooManySessions):
            await file.append("c", owner="ann")


# Revocations of tokens


async def test_revocations_survive_a_restart(path):
    """They are known before anything is served; those that have expired are not, and are deleted."""
    now = 1000.0
    async with open_file(path, posix=lambda: now) as file:
        settings = Settings(engine=f"sqlite:{path}")
        coordination = open_coordination(settings, file.engine, lambda _id: {}, lambda: now)
        await coordination.store_revocation(b"a\0", 1100.0)
        await coordination.store_revocation(b"b", 1200.0)
        await coordination.store_revocation(b"b", 1150.0)
    now = 1120.0
    async with open_file(path, posix=lambda: now) as file, trio.open_nursery() as nursery:
        coordination = open_coordination(settings, file.engine, lambda _id: {}, lambda: now)
        revoked: list[bytes] = []
        coordination.on_revocation = revoked.append
        await nursery.start(coordination.run)
        assert revoked == [b"b"]
        assert len(rows(path, "SELECT * FROM revocations")) == 2
        await coordination.store_revocation(b"c", 1300.0)
        assert rows(path, "SELECT * FROM revocations ORDER BY value") == [(b"b", 1200.0), (b"c", 1300.0)]
        nursery.cancel_scope.cancel()


async def test_a_revocation_is_on_the_disk(path):
    """A power cut, which may undo newer events with this durability, does not undo it."""
    async with open_file(path, durability="normal") as file:
        statements: list[str] = []
        file.engine._writer._connection.set_trace_callback(statements.append)
        await file.engine.store_revocation(b"r", 4e9)
        await file.append()
        full = statements.index("PRAGMA synchronous = FULL")
        normal = statements.index("PRAGMA synchronous = normal")
        stored = next(i for i, text in enumerate(statements) if text.startswith("INSERT INTO revocations"))
        assert full < stored < statements.index("COMMIT") < normal


async def test_a_revocation_that_cannot_be_stored(small_disk, path):
    """Whoever revokes a token is told, and it is not taken for revoked until the next restart only."""
    async with open_file(small_disk / "logs.db") as file:
        settings = Settings(engine=f"sqlite:{path}")
        coordination = open_coordination(settings, file.engine, lambda _id: {})
        revoked: list[bytes] = []
        coordination.on_revocation = revoked.append
        filler = fill(small_disk)
        with suppress(InsufficientStorage):
            for _ in range(1000):  # a little fits all the same
                await coordination.store_revocation(os.urandom(3000), 4e9)
        count = len(revoked)
        assert count < 1000
        filler.unlink()
        await coordination.store_revocation(b"r", 4e9)
        assert revoked[count:] == [b"r"]
    with pytest.raises(EngineUnavailable, match="shutting down"):
        await file.engine.store_revocation(b"late", 4e9)


# A disk that is full


@pytest.fixture
def small_disk(tmp_path):
    """A directory with a file system of 1 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "sseserve-test", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(disk: Path) -> Path:
    """Leave no space on a disk; return the file that takes it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


async def wait_until(condition: Any) -> None:
    """Wait until a condition holds, on the real clock."""
    while not condition():
        await trio.sleep(0.005)


async def test_full_disk(small_disk, monkeypatch):
    """Publishers are told, nothing of what failed is left, and the engine finds out when there is space."""
    monkeypatch.setattr(engine_module, "RETRY", 0.02)
    data = b'"%s"' % (b"x" * 50_000)
    receipt = Receipt("e", Control.CONTINUE)
    path = small_disk / "logs.db"
    async with open_file(path) as file:
        await file.append(receipt=("first", receipt))
        filler = fill(small_disk)
        errors = []

        async def publish(session_id: str, key: str) -> None:
            try:
                await file.append(session_id, data=data, receipt=(key, receipt))
            except InsufficientStorage as error:
                errors.append(str(error))

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(publish, "s", f"s{number}")  # each builds on the one before
                nursery.start_soon(publish, f"new{number}", "k")
        assert errors == ["the disk of the server's log is full"] * 20
        assert file.engine.problem == errors[0]
        assert file.listener.problems == [errors[0]]
        assert await file.engine.latest("new1") is None
        assert (await file.engine.latest("s")).seq == 1
        assert await file.engine.receipt("s", "s0") is None
        assert await file.seqs() == [1]
        filler.unlink()
        await wait_until(lambda: file.engine.problem is None)
        assert file.listener.problems == [errors[0], None]
        await file.append(data=data, receipt=("s0", receipt))
        assert await file.seqs() == [1, 2]
        # It is noticed by a publisher too, who need not wait for the next attempt.
        monkeypatch.setattr(engine_module, "RETRY", 1e6)
        filler = fill(small_disk)
        with pytest.raises(InsufficientStorage):
            await file.append(data=data)
        filler.unlink()
        await file.append(data=data)
        assert file.engine.problem is None
        assert await file.seqs() == [1, 2, 3]
    async with open_file(path) as file:
        assert await file.seqs() == [1, 2, 3]
        assert [session.id for session in await file.engine.sessions()] == ["s"]


async def test_almost_full_disk(small_disk):
    """That something small fits does not mean that all is well: nobody is told so again and again."""
    async with open_file(small_disk / "logs.db") as file:
        await file.append()
        filler = fill(small_disk)
        data = b'"%s"' % (b"x" * 50_000)
        with pytest.raises(InsufficientStorage):
            await file.append(data=data)
        os.truncate(filler, filler.stat().st_size - 24 * 1024)
        await file.append()
        assert await file.seqs() == [1, 2]
        assert len(file.listener.problems) == 1
        filler.unlink()
        await file.append()
        assert file.listener.problems[1:] == [None]


async def test_expiry_that_cannot_be_stored(path):
    """Sessions that cannot be deleted are deleted later."""
    now = 0.0
    async with open_file(path, lambda: now, idle_ttl=10) as file:
        await file.append("a")
        await file.append("b")
        connection = file.engine._writer._connection
        connection.execute("PRAGMA query_only = 1")
        now = 1000.0
        await file.engine.expire(lambda _id: False)
        assert await file.engine.count() == 2
        assert file.listener.removals == []
        connection.execute("PRAGMA query_only = 0")
        now = 1002.0
        await file.engine.expire(lambda _id: False)
        assert file.listener.removals == ["a", "b"]


async def test_file_that_cannot_be_written(path):
    """Publishers get the reason; what is stored can be read."""
    async with open_file(path) as file:
        await file.append()
        connection = file.engine._writer._connection
        connection.execute("PRAGMA query_only = 1")
        with pytest.raises(InsufficientStorage, match=r"cannot be written: .*readonly.*\(SQLITE_READONLY\)"):
            await file.append()
        assert file.engine.problem is not None
        assert await file.seqs() == [1]
        connection.execute("PRAGMA query_only = 0")
        await file.append()
        assert file.engine.problem is None


async def test_server_on_a_full_disk(small_disk, monkeypatch):
    """Publishers get 507, watchers are told and stay, /ready has the reason; all recovers by itself."""
    monkeypatch.setattr(engine_module, "RETRY", 0.02)
    engine = f"sqlite:{small_disk}/logs.db"
    body = {"type": "note", "data": "x" * 50_000}
    async with (
        sseserve.serve(port=0, engine=engine) as server,
        httpx.AsyncClient(base_url=server.url) as http,
        sseserve.client.watch(server.url, "s") as messages,
    ):
        assert (await http.post("/api/sessions/s/events", json=body)).status_code == 202
        received = [await anext(messages)]
        filler = fill(small_disk)
        while (response := await http.post("/api/sessions/s/events", json=body)).status_code == 202:
            pass
        assert response.status_code == 507
        assert response.json()["error"]["code"] == "insufficient_storage"
        assert "full" in response.json()["error"]["message"]
        ready = await http.get("/ready")
        assert ready.status_code == 503
        assert "full" in ready.json()["error"]["message"]
        assert (await http.get("/health")).status_code == 200
        while received[-1].event != "degraded":
            received.append(await anext(messages))
        filler.unlink()
        while received[-1].event != "restored":
            received.append(await anext(messages))
        assert (await http.get("/ready")).status_code == 200
        assert (await http.post("/api/sessions/s/events", json=body)).status_code == 202
        assert (await anext(messages)).event == "note"


# Retention


async def test_age_continues_after_a_restart(path):
    """By the time that has passed, but nothing is deleted at once: clients and producers may come back."""
    now, posix = 1000.0, 5000.0

    async def open_and_expire(file: OpenEngine, seconds: float) -> list[str]:
        nonlocal now
        now += seconds
        await file.engine.expire(lambda _id: False)
        return file.listener.removals

    async with open_file(path, lambda: now, lambda: posix, ttl=3600, idle_ttl=36000) as file:
        done = Progress(status="done", state=State.SUCCEEDED)
        await file.append("ended", progress=done)
        await file.append("short", progress=done, ttl=10.0)
        await file.append("active")
        now, posix = now + 5, posix + 5
    now, posix = 77.0, posix + 3000  # the monotonic clock of another boot
    async with open_file(path, lambda: now, lambda: posix, ttl=3600, idle_ttl=36000) as file:
        assert await open_and_expire(file, 9.9) == []
        assert await open_and_expire(file, 0.1) == ["short"]
        assert await open_and_expire(file, 584.9) == ["short"]
        assert await open_and_expire(file, 0.1) == ["short", "ended"]
        posix += 600
    now, posix = 0.0, posix + 1e6
    async with open_file(path, lambda: now, lambda: posix, ttl=3600, idle_ttl=36000) as file:
        assert await open_and_expire(file, 299.9) == []
        assert await open_and_expire(file, 0.1) == ["active"]


@pytest.mark.parametrize("jump", [1e8, -1e8])
async def test_jump_of_the_clock_of_day(path, jump):
    """Neither while the server runs nor before a restart does it make a session older."""
    now, posix = 0.0, 1e9

    async with open_file(path, lambda: now, lambda: posix, idle_ttl=1000) as file:
        await file.append("a")
        posix += jump
        await file.append("b")
        posix -= jump
    async with open_file(path, lambda: now, lambda: posix, idle_ttl=1000) as file:
        now = 999.0
        await file.engine.expire(lambda _id: False)
        assert file.listener.removals == []
        posix += jump  # set while the server runs, which ends soon after
        await file.append("c")
        await file.engine.delete("c", "e")
    posix -= 1e6  # set back while the server is away
    async with open_file(path, lambda: now, lambda: posix, idle_ttl=1000) as file:
        await file.engine.expire(lambda _id: False)
        now += 299
        await file.engine.expire(lambda _id: False)
        assert file.listener.removals == []
        now += 1
        await file.engine.expire(lambda _id: False)
        assert sorted(file.listener.removals) == ["a", "b"]


async def test_cleaning_that_fails(path, monkeypatch, caplog):
    """Is tried again, and said once."""
    monkeypatch.setattr(cleaning_module, "PAUSE", 0)
    monkeypatch.setattr(cleaning_module, "RETRY", 0.002)
    monkeypatch.setattr(cleaning_module, "CHECKPOINT_PAGES", 1)
    async with open_file(path) as file:
        writer, attempts = file.engine._writer, 0

        def fail(*_arguments: Any) -> Any:
            nonlocal attempts
            attempts += 1
            raise sqlite3.OperationalError("no")

        delete_logs, checkpoint = writer.delete_logs, writer.checkpoint
        writer.delete_logs = writer.checkpoint = fail
        await file.append()
        await file.engine.delete("s", "e")
        await wait_until(lambda: attempts > 10)
        writer.delete_logs, writer.checkpoint = delete_logs, checkpoint
        await wait_until(lambda: rows(path, "SELECT count(*) FROM events") == [(0,)])
    assert sorted(record.message for record in caplog.records if record.levelname == "WARNING") == [
        "cannot delete old events from the log, trying again: no",
        "cannot do a checkpoint, trying again: no",
    ]


async def test_the_wal_begins_again(path, monkeypatch):
    """Checkpoints copy what was committed into the file while commits go on."""
    monkeypatch.setattr(cleaning_module, "CHECKPOINT_PAGES", 1)
    data = b'"%s"' % (b"x" * 4000)
    async with open_file(path) as file:
        for _ in range(400):
            await file.append(data=data)
        await wait_until(lambda: path.stat().st_size > 400 * 4000)
        sizes = []
        while len(set(sizes)) == len(sizes) < 100:  # until it has not grown
            await file.append(data=data)
            sizes.append(Path(f"{path}-wal").stat().st_size)
        assert len(set(sizes)) < len(sizes)
    assert not Path(f"{path}-wal").exists()


async def test_the_file_shrinks(path, monkeypatch):
    """Deleted sessions and old events are deleted from the file in steps, also after a restart."""
    monkeypatch.setattr(cleaning_module, "PAUSE", 0)
    data = b'"%s"' % (b"x" * 4000)

    def pages() -> int:
        return rows(path, "PRAGMA page_count")[0][0]

    def is_clean() -> bool:
        left = rows(path, "SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM dropped)")
        return left == [(kept, 0)] and pages() < most_pages

    async with open_file(path, history_events=100) as file:
        monkeypatch.setattr(storage_module, "STEP_ROWS", 50)
        for session_id in ("a", "b"):
            for _ in range(300):
                await file.append(session_id, data=data, receipt=(f"{_}", Receipt("e", Control.CONTINUE)))
        kept, most_pages = 2 * 100 + 2 * (cleaning_module.SLACK - 1), 1000
        await wait_until(lambda: rows(path, "SELECT count(*) FROM events")[0][0] <= kept)
        assert await file.seqs("a") == list(range(201, 301))
        large = pages()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.engine.delete, "a", "e")
        nursery.cancel_scope.cancel()
    async with open_file(path, history_events=1) as file:
        await file.append("b", data=data)
        kept, most_pages = 1, large // 2
        await wait_until(is_clean)
        assert await file.seqs("b") == [301]
        with_receipts = rows(path, "SELECT DISTINCT position FROM receipts")
        assert with_receipts == rows(path, "SELECT position FROM sessions")
        assert rows(path, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("meanwhile", ["trimmed", "deleted"])
async def test_a_log_that_changes_while_old_events_are_deleted(autojump_clock, nursery, meanwhile):
    """One that was trimmed further is trimmed again; one that was deleted is not looked for."""
    steps: list[tuple[str, Any]] = []

    class State:
        def __init__(self, first: int) -> None:
            self.log, self.first = 1, first

    class Writer:
        def delete_events(self, log: int, first: int) -> bool:
            steps.append(("events", first))
            if len(steps) == 1:
                change = ([], [State(500)]) if meanwhile == "trimmed" else ([(1, None)], [])
                trio.from_thread.run_sync(cleaning.add, *change)
            return True

        def delete_logs(self, items: Sequence[Any]) -> int:
            steps.append(("logs", items))
            return len(items)

        def shrink(self) -> bool:
            steps.append(("shrink", None))
            return True

    cleaning: Any = cleaning_module.Cleaning(Writer(), trio.Lock())  # type: ignore[arg-type]
    cleaning.add([], [State(100)])
    nursery.start_soon(cleaning.run)
    while ("shrink", None) not in steps:
        await trio.sleep(1)
    second = ("events", 500) if meanwhile == "trimmed" else ("logs", [(1, None)])
    assert steps[:3] == [("events", 100), second, ("shrink", None)]


# Space


async def test_space_after_a_restart(path):
    """All that is stored counts, and those that ended longest ago are deleted first, whoever is older."""
    large = b'"%s"' % (b"x" * 3000)
    done = Progress(status="done", state=State.SUCCEEDED)
    async with open_file(path) as file:
        for session_id in "abcd":
            await file.append(session_id, data=large, receipt=("k", Receipt("r", Control.CONTINUE)))
        for session_id in "cab":
            await file.append(session_id, data=large, progress=done)
        total = file.engine._logs.total
    async with open_file(path, max_log_bytes=total + 1000) as file:
        assert file.engine._logs.total == total
        for _ in range(5):
            await file.append("d", data=large)
        assert file.listener.removals == ["c", "a"]


async def test_space_when_the_disk_is_full(small_disk):
    """What could not be stored or deleted is counted as it was."""
    large = b'"%s"' % (b"x" * 50_000)
    done = Progress(status="done", state=State.SUCCEEDED)
    async with open_file(small_disk / "logs.db", max_log_bytes=120_000) as file:
        await file.append("a", progress=done, data=large)
        total = file.engine._logs.total
        filler = fill(small_disk)
        for number in range(3):
            with pytest.raises(InsufficientStorage, match="disk"):
                await file.append(f"s{number}", data=large)
        assert (file.engine._logs.total, file.engine._pending.growth) == (total, 0)
        filler.unlink()
        await file.append("b", data=large)
        await file.append("c", data=large)
        assert file.listener.removals == ["a"]
        with pytest.raises(InsufficientStorage, match="max_log_bytes"):
            await file.append("d", data=large)
