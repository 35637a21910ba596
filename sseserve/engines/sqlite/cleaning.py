"""Background work on the file, so that commits need not wait for it.

``Cleaning`` deletes in small steps what retention has left behind, and lets the file shrink. ``Checkpoints``
copies what was committed from the WAL into the file, so that the WAL begins again.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import deque
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import trio

from .changes import LogState
from .readers import Reader
from .storage import Writer

__all__ = ["Checkpoints", "Cleaning"]

logger = logging.getLogger(__name__)

PAUSE = 0.02  # seconds between two steps
RETRY = 5.0  # seconds after a step that has failed
SLACK = 64  # events before the first one that are tolerated: deleting many at once is cheaper
CHECKPOINT_PAGES = 2000  # committed pages after which there is a checkpoint
STEP_LOGS = 64  # deleted logs that one step looks at


class Checkpoints:
    """Does checkpoints when much has been committed.

    The first half is done on a connection of its own, while commits go on. What those add meanwhile keeps the
    WAL from beginning again, so the second half, which is short, makes them wait.

    Args:
        path: of the file.
        writer: does the second half.
        writing: is held by whoever uses the writer.
    """

    def __init__(self, path: Path, writer: Writer, writing: trio.Lock) -> None:
        self._path = path
        self._writer = writer
        self._writing = writing
        self._pages = 0  # about how many have been committed since the last checkpoint
        self._wakeup = trio.Event()

    def add(self, sessions: int) -> None:
        """Take note of a commit that has changed so many sessions."""
        self._pages += 2 * sessions + 2
        if self._pages >= CHECKPOINT_PAGES:
            self._wakeup.set()

    async def run(self) -> None:
        """Do checkpoints until cancelled."""
        level = logging.WARNING
        reader = await trio.to_thread.run_sync(Reader, self._path)
        try:
            while True:
                await self._wakeup.wait()
                self._pages = 0
                self._wakeup = trio.Event()
                try:
                    await trio.to_thread.run_sync(reader.checkpoint)
                    async with self._writing:
                        await trio.to_thread.run_sync(self._writer.checkpoint)
                except sqlite3.Error as error:
                    logger.log(level, "cannot do a checkpoint, trying again: %s", error)
                    level = logging.DEBUG  # once is enough
                    await trio.sleep(RETRY)
                    self._wakeup.set()
                else:
                    level = logging.WARNING
        finally:
            reader.close()


class Cleaning:
    """What is to be deleted.

    Args:
        writer: deletes it.
        writing: is held by whoever uses the writer.
    """

    def __init__(self, writer: Writer, writing: trio.Lock) -> None:
        self._writer = writer
        self._writing = writing
        self._dropped: deque[tuple[int, int | None]] = deque()  # logs, with the position of a deleted session
        self._untrimmed: dict[int, int] = {}  # by log: events before this one are to be deleted
        self._trimmed: dict[int, int] = {}  # by log: events before this one are deleted
        self._wakeup = trio.Event()

    def add(self, dropped: Iterable[tuple[int, int | None]], states: Iterable[LogState]) -> None:
        """Take note of logs that are to be deleted, and of what is stored of others."""
        for item in dropped:
            self._dropped.append(item)
            self._trimmed.pop(item[0], None)
            self._untrimmed.pop(item[0], None)
        for state in states:
            if state.first - self._trimmed.get(state.log, 1) >= SLACK:
                self._untrimmed[state.log] = state.first
        if self._dropped or self._untrimmed:
            self._wakeup.set()

    async def run(self) -> None:
        """Clean up until cancelled."""
        level = logging.WARNING
        while True:
            try:
                async with self._writing:
                    is_done = await self._step()
            except sqlite3.Error as error:
                logger.log(level, "cannot delete old events from the log, trying again: %s", error)
                level = logging.DEBUG  # once is enough
                await trio.sleep(RETRY)
                continue
            level = logging.WARNING
            if is_done:
                await self._wakeup.wait()
                self._wakeup = trio.Event()
            else:
                await trio.sleep(PAUSE)

    async def _step(self) -> bool:
        """Do one step; return whether nothing is left to do."""
        if self._dropped:
            items = list(islice(self._dropped, STEP_LOGS))
            for _ in range(await trio.to_thread.run_sync(self._writer.delete_logs, items)):
                self._dropped.popleft()
        elif self._untrimmed:
            log, first = next(iter(self._untrimmed.items()))
            is_trimmed = await trio.to_thread.run_sync(self._writer.delete_events, log, first)
            # Unless the log has been dropped, or trimmed further, meanwhile.
            if is_trimmed and self._untrimmed.get(log) == first:
                del self._untrimmed[log]
                self._trimmed[log] = first
        else:
            return await trio.to_thread.run_sync(self._writer.shrink)
        return False
