"""Restart instances in turn, under load, behind nginx; count the events that clients lose or get twice.

    python -m benchmarks rolling-restart [--clients 2000] [--instances 3] [--rate 50]

README.md describes what is measured. Exit status: 0 if every client got every event once and in order,
1 if not.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from ..load.process import BenchmarkError, raise_file_limit
from .deployment import Deployment
from .traffic import Load, report


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Restart all instances, and return what the clients have got."""
    with (
        Deployment(options.instances, raise_file_limit(), options.engine, drain=options.drain) as deployment,
        Load(
            deployment,
            clients=options.clients,
            sessions=options.sessions,
            rate=options.rate,
            patience=options.patience,
        ) as load,
    ):
        time.sleep(options.pause)  # load before the first restart
        failures = []
        for index in range(options.instances):
            began = time.monotonic()
            status = deployment.stop(index)
            stopped = time.monotonic() - began
            deployment.replace(index)
            replaced = time.monotonic() - began
            load.wait_until_open()
            print(
                f"instance {index + 1}: exit status {status} after {stopped:.1f} s, "
                f"replaced after {replaced:.1f} s, all streams open after {time.monotonic() - began:.1f} s",
                flush=True,
            )
            if status:
                failures.append(f"instance {index + 1} ended with status {status}")
            time.sleep(options.pause)  # load between two restarts
        result = load.finish()
    result["failures"] += failures
    return result


def main() -> int:
    """Run the measurement, and print what was lost."""
    parser = argparse.ArgumentParser(description="Restart instances in turn, and count what clients lose.")
    parser.add_argument("--clients", type=int, default=2000, help="number of EventSource clients (2000)")
    parser.add_argument("--instances", type=int, default=3, help="number of instances (3)")
    parser.add_argument("--sessions", type=int, default=20, help="number of sessions and publishers (20)")
    parser.add_argument("--rate", type=float, default=50.0, help="events per second, of all publishers (50)")
    parser.add_argument("--drain", type=float, default=4.0, help="the instances' drain, in seconds (4)")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds between two restarts (3)")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds to wait for missing events at the end (10)"
    )
    parser.add_argument("--engine", help="URL of the instances' Redis (default: one is run)")
    options = parser.parse_args()
    try:
        result = run(options)
    except (BenchmarkError, OSError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print(f"clients: {options.clients}, sessions: {options.sessions}, instances: {options.instances}")
    return 0 if report(result) else 1
