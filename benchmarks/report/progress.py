"""Say how far a run is: a progress bar in a terminal, a line for each finished step elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Self, TextIO

__all__ = ["Progress"]

_BAR_WIDTH = 20


class Progress:
    """The progress of a run of known length.

        with Progress(120) as progress:
            progress.start("fan-out to 1,000: nchan, round 2 of 5")
            ...
            progress.finish("fan-out to 1,000: nchan: 1,160,000 deliveries/s")

    Args:
        total: the number of steps; finish those that are skipped too.
        file: where it is written; standard error by default, so that standard output has the results only.
        clock: returns the time in seconds.
    """

    def __init__(
        self, total: int, file: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file = file or sys.stderr
        self._is_terminal = self._file.isatty()
        self._clock = clock
        self._total = total
        self._finished = 0
        self._started = clock()
        self._step = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._is_terminal:
            self._write("\n")  # what is printed next stands below the bar

    def start(self, step: str) -> None:
        """Show what is being done; in a terminal only."""
        self._step = step
        self._draw()

    def finish(self, line: str) -> None:
        """Count a step as done. ``line`` says what came of it, and is printed outside a terminal only."""
        self._finished += 1
        if not self._is_terminal:
            elapsed = self._clock() - self._started
            self._write(f"[{self._finished}/{self._total}, {_format_time(elapsed)}] {line}\n")
        self._draw()

    def note(self, line: str) -> None:
        """Print a line that must not be missed, such as a fault; in a terminal above the bar."""
        self._write(f"\r\x1b[K{line}\n" if self._is_terminal else f"{line}\n")
        self._draw()

    def _draw(self) -> None:
        if not self._is_terminal:
            return
        done = self._finished / self._total if self._total else 1.0
        bar = ("#" * round(done * _BAR_WIDTH)).ljust(_BAR_WIDTH, "-")
        text = f"[{bar}] {self._finished}/{self._total}"
        if 0 < done < 1:
            left = (self._clock() - self._started) * (1 - done) / done
            text += f", about {_format_time(left)} left"
        columns = shutil.get_terminal_size().columns
        # A line that is too long would wrap, and the next one would be drawn below it.
        self._write(f"\r{f'{text}  {self._step}'[: columns - 1]}\x1b[K")

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


def _format_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
