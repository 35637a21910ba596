"""Run programs in a pseudo-terminal and read its screen. All calls block: for tests without async."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

import pyte
from processes import ROOT, TIMEOUT

__all__ = ["Terminal"]


class Terminal:
    """A program in a terminal. ``screens`` are the different contents that its screen has had, in order."""

    def __init__(self, *command: str | Path, columns: int = 80, **environ: str) -> None:
        self._screen = pyte.Screen(columns, 24)
        self._stream = pyte.ByteStream(self._screen)
        self._changed = threading.Condition()
        self.screens: list[str] = []
        self._next = 0  # the first screen that ``wait_for`` looks at
        self._controller, program = pty.openpty()
        self._set_size(columns)
        self._process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm-256color", **environ},
            stdin=program,
            stdout=program,
            stderr=program,
            start_new_session=True,
            # Opened by a session leader it becomes the controlling terminal, whose Ctrl-C is a signal.
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )
        os.close(program)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # At the end of the program, reading its terminal fails with EIO.
        with suppress(OSError):
            while data := os.read(self._controller, 65536):
                with self._changed:
                    self._stream.feed(data)
                    self.screens.append(self._text())
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(TIMEOUT)
        os.close(self._controller)

    def _text(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def _set_size(self, columns: int) -> None:
        fcntl.ioctl(self._controller, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    @property
    def text(self) -> str:
        """What is on the screen, without the empty space on the right and at the bottom."""
        with self._changed:
            return self._text()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a screen that matches the regular expression; return the match.

        It is the first that does after those that were waited for before, however soon it was replaced.
        """

        def search() -> re.Match[str] | None:
            for number in range(self._next, len(self.screens)):
                if match := re.search(pattern, self.screens[number], re.MULTILINE):
                    self._next = number
                    return match
            return None

        with self._changed:
            self._changed.wait_for(lambda: search() or not self._reader.is_alive(), TIMEOUT)
            match = search()
        assert match, f"no screen matches {pattern!r}; the last is\n{self.text}"
        return match

    def resize(self, columns: int) -> None:
        """Resize the window, which the kernel tells the program by a signal. Lines are cut, not rewrapped."""
        with self._changed:
            self._screen.resize(columns=columns)
            self._set_size(columns)

    def type(self, keys: bytes) -> None:
        os.write(self._controller, keys)

    def wait(self) -> int:
        """Wait until the program exits; return its exit status."""
        status = self._process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        return status
