"""Fuzz for as long as it is told to: ``python tests/fuzz/run.py --hours 1``; see ``world`` for the invariant.

A script that breaks it is made as small as possible and written to ``corpus/``, as is one that reaches lines
of the server that no other script there has reached. The tests play all of them. Exit status 1: the invariant
was broken.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

from hypothesis import HealthCheck, given, settings  # noqa: E402
from targets import TARGETS, scripts  # noqa: E402
from world import Script, decode_script, encode_script, play  # noqa: E402

CORPUS = FOLDER / "corpus"
SOURCES = str(FOLDER.parent.parent / "sseserve")
EXAMPLES = 300  # of a target, before it is the next one's turn


@contextmanager
def traced(lines: set[tuple[str, int]]) -> Iterator[None]:
    """Note the lines of the server that run in the block."""

    def trace_lines(frame: FrameType, _event: str, _argument: Any) -> Any:
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace_lines

    def trace(frame: FrameType, _event: str, _argument: Any) -> Any:
        return trace_lines if frame.f_code.co_filename.startswith(SOURCES) else None

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


class Fuzzer:
    """Plays scripts; ``known`` are the lines that those of the corpus reach."""

    def __init__(self) -> None:
        self.known: set[tuple[str, int]] = set()
        self.played = 0
        self.broken = 0
        for path in sorted(CORPUS.glob("*/*")):
            with traced(self.known):
                play(decode_script(path.read_text()), **TARGETS[path.parent.name].settings)

    def save(self, name: str, script: Script, why: str) -> None:
        text = encode_script(script)
        path = CORPUS / name / hashlib.sha256(text.encode()).hexdigest()[:12]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"{name}/{path.name}: {why}", flush=True)

    def fuzz(self, name: str) -> None:
        """Play some scripts of a target."""
        last: Script = ()

        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(scripts(TARGETS[name]))
        def check(script: Script) -> None:
            nonlocal last
            last = script
            lines: set[tuple[str, int]] = set()
            self.played += 1
            with traced(lines):
                play(script, **TARGETS[name].settings)
            if new := lines - self.known:
                self.known |= new
                self.save(name, script, f"reaches {len(new)} more lines")

        try:
            check()
        except Exception:  # noqa: BLE001 - whatever it is, it is a finding
            traceback.print_exc()
            self.broken += 1
            self.save(name, last, "BREAKS THE INVARIANT")  # Hypothesis plays the smallest one last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all in turn")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.hours * 3600
    fuzzer = Fuzzer()
    while time.monotonic() < deadline:
        for name in arguments.target or TARGETS:
            if time.monotonic() < deadline:
                fuzzer.fuzz(name)
    print(f"{fuzzer.played:,} scripts, {fuzzer.broken} of them broke the invariant")
    return 1 if fuzzer.broken else 0


if __name__ == "__main__":
    sys.exit(main())
