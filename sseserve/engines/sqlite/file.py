"""The file of the SQLite engine: whose it is, which schema it has, and that one process has it.

The file belongs to us if its ``application_id`` says so; its ``user_version`` counts the migrations that it
has had. A process that writes holds an exclusive flock(2) on it, which ends with the process, however it
ends. SQLite's own locks are of another kind (fcntl(2)), so others may read the file meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Literal, Self

from ...errors import ConfigError, EngineUnavailable, InsufficientStorage, SseserveError

__all__ = [
    "APPLICATION_ID",
    "MIGRATIONS",
    "FileGone",
    "LogFile",
    "boot_id",
    "check_file",
    "check_in_place",
    "connect",
    "open_for_reading",
    "path_of",
    "refusal",
    "storage_error",
]

APPLICATION_ID = 0x73736576  # "ssev"
BUSY_TIMEOUT = 5.0  # seconds to wait for a program that reads the file, such as sqlite3(1)
CACHE = 16 * 1024  # KiB of pages

# What makes each version of the schema out of the one before; that of an empty file is 0. Never change one
# that was released: add another.
#
# sessions: one row each. ``position`` orders them by age. ``log`` is the number of its log, of which the
# events from ``first`` on count. ``size`` is what events and receipts take, ``receipts_size`` the receipts'
# part, by ``Event.weight`` and ``receipt_size``. ``touched`` is when it was last written, on the clock of the
# table clock. ``record`` is the session as JSON.
# events: ``place`` is the number of the log in the upper 32 bits and ``seq`` in the lower. As the key of rows
# it keeps a log's events together.
# dropped: logs, and sessions by position, that are deleted in the background.
# clock: for how many seconds the file has been in use, and the POSIX time at which it said so. ``boot`` is
# the id of the boot under which commits were made that a power cut may undo; NULL if there are none.
# revocations: of tokens, each until when it is kept (POSIX seconds).
MIGRATIONS = (
    """
    CREATE TABLE sessions (
        position INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        log INTEGER NOT NULL,
        first INTEGER NOT NULL,
        size INTEGER NOT NULL,
        receipts INTEGER NOT NULL,
        receipts_size INTEGER NOT NULL,
        touched REAL NOT NULL,
        record BLOB NOT NULL
    );
    CREATE TABLE events (
        place INTEGER PRIMARY KEY,
        weight INTEGER NOT NULL,
        body BLOB NOT NULL
    );
    CREATE TABLE receipts (
        position INTEGER NOT NULL,
        number INTEGER NOT NULL,
        key TEXT NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (position, number)
    ) WITHOUT ROWID;
    CREATE TABLE dropped (log INTEGER PRIMARY KEY, position INTEGER);
    CREATE TABLE clock (id INTEGER PRIMARY KEY CHECK (id = 1), seconds REAL NOT NULL, posix REAL NOT NULL);
    INSERT INTO clock VALUES (1, 0, 0);
    """,
    "ALTER TABLE clock ADD COLUMN boot TEXT;",
    "CREATE TABLE revocations (value BLOB PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID;",
)


def boot_id() -> str:
    """Return the id of this boot of the operating system; if there is none, one that nobody else has."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return secrets.token_hex(16)


def path_of(url: str) -> Path:
    """Return the path in ``sqlite:PATH``; a relative one is below the working directory.

    Raises:
        ConfigError: there is none.
    """
    text = url.removeprefix("sqlite:")
    if not text:
        raise ConfigError("the engine sqlite: needs the path of a file, such as sqlite:/var/lib/logs.db")
    if text == ":memory:":
        raise ConfigError("the engine sqlite: needs a file; logs in memory are the engine memory:")
    if text.startswith("//") and not text.startswith("///"):
        path = text.lstrip("/")
        raise ConfigError(f"the engine {url!r} names a host; write sqlite:{path} or sqlite:/{path}")
    if "\0" in text:
        raise ConfigError("the path of the engine sqlite: contains a NUL character")
    return Path(os.path.abspath(text))


def connect(path: Path, durability: Literal["full", "normal"] = "normal") -> sqlite3.Connection:
    """Return a connection that begins no transactions by itself, and may be used by any thread in turn."""
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False, cached_statements=64
    )
    try:
        connection.execute(f"PRAGMA synchronous = {durability}")
        connection.execute(f"PRAGMA cache_size = -{CACHE}")
    except BaseException:
        connection.close()
        raise
    return connection


class LogFile:
    """A file that this process has for itself, with the newest schema. Use as a context manager.

    Args:
        path: of the file; it is created if there is none.

    Raises:
        ConfigError: it cannot be opened, is not ours, was written by a newer version, or another process has
            it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _lock(path)
        try:
            with closing(connect(path)) as connection:
                _check(path, connection)
                _prepare(connection)
        except sqlite3.Error as error:
            _unlock(self._lock)
            raise refusal(path, error) from error
        except BaseException:
            _unlock(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file up. All connections must have been closed before."""
        _unlock(self._lock)


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Return a connection that only reads, also while a server writes.

    Raises:
        ConfigError: there is no such file, it is not ours, or its schema is another one than this program's.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    connection = None
    try:
        connection = connect(path)
        connection.execute("PRAGMA query_only = 1")
        _check(path, connection)
        version = _pragma(connection, "user_version")
        if not version:
            raise ConfigError(f"{path} is empty")
        if version < len(MIGRATIONS):
            raise ConfigError(
                f"{path} has the schema {version} of an older sseserve, this is {len(MIGRATIONS)}: start a "
                "server with it once, which converts it"
            )
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise refusal(path, error) from error
    except ConfigError:
        if connection is not None:
            connection.close()
        raise
    return connection


def check_file(path: Path) -> None:
    """Check that a server could open a file, or create it. One that has it open now does not matter.

    Raises:
        ConfigError: it could not.
    """
    if path.is_dir():
        raise _cannot_open(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    if not path.exists():
        if not path.parent.is_dir():
            raise _cannot_open(path, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise _cannot_open(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        return
    if not os.access(path, os.R_OK | os.W_OK):
        raise _cannot_open(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    try:
        with closing(connect(path)) as connection:
            connection.execute("PRAGMA query_only = 1")
            _check(path, connection)
    except sqlite3.Error as error:
        raise refusal(path, error) from error


def _cannot_open(path: Path, error: OSError) -> ConfigError:
    hints = {
        FileNotFoundError: f"create the directory {path.parent} first",
        PermissionError: f"let the user of this process write to {path.parent} and to the file",
        IsADirectoryError: f"name a file in it, such as sqlite:{path}/logs.db",
    }
    hint = hints.get(type(error))
    reason = f"cannot open {path}: {error.strerror}"
    return ConfigError(reason if hint is None else f"{reason}; {hint}")


# What this process has open. Closing a second descriptor of such a file, even one that got no lock, would
# take SQLite's own locks away.
_in_use: set[tuple[int, int]] = set()


class FileGone(sqlite3.Error):
    """The file was deleted, moved or replaced: what is stored there now would be lost."""


def check_in_place(path: Path) -> None:
    """Raise FileGone unless the file at ``path`` is the one that this process has."""
    try:
        status = path.stat()
    except OSError:
        status = None
    if status is None or (status.st_dev, status.st_ino) not in _in_use:
        raise FileGone(
            f"the file of the server's log, {path.name}, was deleted, moved or replaced: put it back, or "
            "restart the server"
        )


def _in_use_elsewhere(path: Path) -> ConfigError:
    return ConfigError(
        f"another server has {path} open: stop it, or give this one a file of its own "
        "(several servers share logs with the engine redis://)"
    )


def _lock(path: Path) -> int:
    with suppress(OSError):
        status = path.stat()
        if (status.st_dev, status.st_ino) in _in_use:
            raise _in_use_elsewhere(path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _cannot_open(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise _in_use_elsewhere(path) from error
        raise ConfigError(f"cannot lock {path}: {error.strerror}; it must be on a local disk") from error
    status = os.fstat(descriptor)
    _in_use.add((status.st_dev, status.st_ino))
    return descriptor


def _unlock(descriptor: int) -> None:
    status = os.fstat(descriptor)
    os.close(descriptor)
    _in_use.discard((status.st_dev, status.st_ino))


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    (value,) = connection.execute(f"PRAGMA {name}").fetchone()
    assert isinstance(value, int)
    return value


def _check(path: Path, connection: sqlite3.Connection) -> None:
    """Refuse what is not ours, without a change to it."""
    application_id = _pragma(connection, "application_id")
    version = _pragma(connection, "user_version")
    if application_id != APPLICATION_ID:
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if application_id or version or tables:
            raise ConfigError(f"{path} is the database of another program: name another file")
    elif version > len(MIGRATIONS):
        raise ConfigError(
            f"{path} was written by a newer sseserve (schema {version}, this one knows {len(MIGRATIONS)}): "
            "install that version, or name another file"
        )


def _prepare(connection: sqlite3.Connection) -> None:
    """Bring the file to the newest schema."""
    version = _pragma(connection, "user_version")
    if not version:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only possible before there are tables
    connection.execute("PRAGMA journal_mode = WAL")
    for number, statements in enumerate(MIGRATIONS[version:], version + 1):
        connection.executescript(
            f"BEGIN IMMEDIATE; {statements};"
            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {number}; COMMIT"
        )


def storage_error(error: sqlite3.Error) -> SseserveError:
    """Return what publishers get when SQLite cannot store."""
    if isinstance(error, FileGone):
        return EngineUnavailable(str(error))
    name = getattr(error, "sqlite_errorname", None) or type(error).__name__
    if name.startswith("SQLITE_FULL"):
        return InsufficientStorage("the disk of the server's log is full")
    if name.startswith(("SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return InsufficientStorage(f"the server's log cannot be written: {error} ({name})")
    return EngineUnavailable(f"the server's log cannot be used: {error} ({name})")


def refusal(path: Path, error: Exception) -> ConfigError:
    """Return why a file cannot be opened."""
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_NOTADB":
        return ConfigError(f"{path} is not an SQLite database: name another file")
    if name.startswith("SQLITE_CORRUPT") or not isinstance(error, sqlite3.Error):
        return ConfigError(f"{path} is damaged ({error}): see sseserve log check, or name another file")
    return ConfigError(f"cannot use {path}: {error}")
