"""Writes the log in a thread, so that whoever logs never waits for standard error.

Standard error may be a pipe whose reader has stopped: a write would wait for ever, and the event loop with
it. What waits is bounded: beyond ``MAX_WAITING`` lines are dropped, and the next one that is written says how
many. Lines of several processes on one pipe are not mixed up: a write has whole lines, and is atomic
(pipe(7)) unless a single line has more than 4 KiB.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque

from .lines import Line

__all__ = ["BackgroundHandler"]

MAX_WAITING = 16 * 2**20  # bytes: the last lines of 50,000 streams
FLUSH = 1.0  # seconds at most that the end of the process waits for what is left to be written


class BackgroundHandler(logging.Handler):
    """Formats records at once, and writes them in a thread.

    Args:
        descriptor: of the file that is written to.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._waiting: deque[bytes] = deque()
        self._size = 0  # bytes that wait, or are being written
        self._dropped = 0  # lines
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_idle = False  # the thread waits
        self._is_closed = False
        self._has_given_up = False  # the last ``flush`` has

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written; drop it if too much waits."""
        try:
            data = self._encode(record)
        except Exception as error:  # noqa: BLE001 - whatever was logged: the server goes on
            place = f"{record.pathname}:{record.lineno}"
            data = self._note(Line("a record cannot be formatted", place=place, error=repr(error)))
        with self._changed:
            if self._size + len(data) > MAX_WAITING or self._is_closed:
                self._dropped += 1
                return
            if self._dropped:
                note = self._note(Line("lines were dropped, as nobody reads them", count=self._dropped))
                self._waiting.append(note)
                self._size += len(note)
                self._dropped = 0
            self._waiting.append(data)
            self._size += len(data)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            elif self._is_idle:
                self._changed.notify_all()

    def _encode(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode(errors="backslashreplace") + b"\n"

    def _note(self, line: Line) -> bytes:
        return self._encode(logging.LogRecord(__name__, logging.WARNING, __file__, 0, line, (), None))

    def flush(self) -> None:
        """Wait until everything is written, but not for longer than ``FLUSH``."""
        deadline = time.monotonic() + FLUSH
        with self._changed:
            while self._size and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            self._has_given_up = bool(self._size)

    def close(self) -> None:
        """Flush, and end the thread."""
        if not self._has_given_up:  # logging.shutdown has flushed already
            self.flush()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        super().close()

    def _run(self) -> None:
        while data := self._take():
            self._write(data)
            with self._changed:
                self._size -= len(data)
                if not self._size:
                    self._changed.notify_all()

    def _take(self) -> bytes:
        """Wait for lines, and take what one write may hold; empty: the handler is closed."""
        with self._changed:
            self._is_idle = True
            while not self._waiting and not self._is_closed:
                self._changed.wait()
            self._is_idle = False
            taken: list[bytes] = []
            size = 0
            while self._waiting and (not taken or size + len(self._waiting[0]) <= select.PIPE_BUF):
                taken.append(self._waiting.popleft())
                size += len(taken[-1])
        return b"".join(taken)

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # whoever shares it has made it so
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError:
                return  # nobody reads it any more
