"""Kill a SQLite server again and again under load, and count what was lost.

    python -m benchmarks sqlite-kill [--kills 200] [--seed 1] [--durability normal|full]

Publishers retry each request under its Idempotency-Key until it is acknowledged; watchers resume with their
cursors over SSE, WebSocket and long-poll. The exit status is 1 if an acknowledged event is not in the log or
did not reach every watcher once and in order, or if a watcher was told anything but that it goes on where it
was.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from checker.killing import run_kills


def main() -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="how often (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="of what is published and when it is killed")
    parser.add_argument("--durability", choices=["normal", "full"], default="normal")
    options = parser.parse_args()

    def report(number: int) -> None:
        if number % 20 == 0:
            print(f"{number} kills after {time.monotonic() - started_at:.0f} s", flush=True)

    started_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sqlite-kill-") as folder:
        path = Path(folder) / "logs.db"
        result = trio.run(
            lambda: run_kills(
                path, options.kills, options.seed, durability=options.durability, on_kill=report
            )
        )
    counts = result.counts
    figures = {
        "seed": options.seed,
        "kills": result.kills,
        "acknowledged": counts["acknowledged"],
        "received by watchers": counts["events"],
        "resumed": counts["ok"],
        "lost": result.count("lost", "missing", "converge"),
        "doubled": result.count("doubled"),
        "reordered": result.count("order", "backwards", "replaced"),
        "resets": counts["reset"] + counts["gap"],
        "other violations": len(result.violations)
        - result.count("lost", "missing", "converge", "doubled", "order", "backwards", "replaced"),
    }
    print(", ".join(f"{name} {value}" for name, value in figures.items()))
    for violation in result.violations:
        print(violation, file=sys.stderr)
    return 1 if result.violations or figures["resets"] else 0
