"""Let Redis hang, or crash and start again, under load; print how soon all are served again.

    python -m benchmarks redis-outage [--clients 500] [--instances 2] [--seconds 10] [--way hang|crash]

README.md describes what is measured. Exit status: 0 if every client got every event once and in order,
1 if not.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from typing import Any

from ..load.process import BenchmarkError, raise_file_limit
from .deployment import Deployment, Redis
from .traffic import Load, report

TIMEOUT = 60.0  # for all publishers to be acknowledged again


def run(options: argparse.Namespace, way: str) -> dict[str, Any]:
    """Take Redis away for a while, and return what the clients have got."""
    with (
        Redis(appendonly=way == "crash") as redis,
        Deployment(options.instances, raise_file_limit(), redis.url) as deployment,
        Load(
            deployment,
            clients=options.clients,
            sessions=options.sessions,
            rate=options.rate,
            patience=options.patience,
        ) as load,
    ):
        time.sleep(options.pause)  # load before
        if way == "hang":
            redis.signal(signal.SIGSTOP)
            time.sleep(options.seconds)  # the outage
            redis.signal(signal.SIGCONT)
        else:
            redis.kill()
            time.sleep(options.seconds)  # the outage
            redis.run()
        back = time.monotonic()
        first = wait_until_acknowledged(load, back, 1)
        wait_until_acknowledged(load, back, len(load.publishers))
        delivered = load.wait_until_delivered()
        print(
            f"Redis was away for {options.seconds:g} s ({way}); since it is back: "
            f"first publish acknowledged after {first - back:.2f} s, "
            f"all clients have all that was acknowledged after {delivered - back:.2f} s",
            flush=True,
        )
        time.sleep(options.pause)  # load after
        return load.finish()


def wait_until_acknowledged(load: Load, since: float, number: int) -> float:
    """Wait until so many publishers were acknowledged since a time; return the time of the first one."""
    while True:
        times = [p.acknowledged_at for p in load.publishers if p.acknowledged_at > since]
        if len(times) >= number:
            return min(times)
        if time.monotonic() - since > TIMEOUT:
            raise BenchmarkError(
                f"only {len(times)} publishers were acknowledged {TIMEOUT:g} s after the outage"
            )
        time.sleep(0.005)  # between two looks


def main() -> int:
    """Run the measurement in each way, and print what was lost."""
    parser = argparse.ArgumentParser(description="Take Redis away, and measure how soon all is well again.")
    parser.add_argument("--clients", type=int, default=500, help="number of EventSource clients (500)")
    parser.add_argument("--instances", type=int, default=2, help="number of instances (2)")
    parser.add_argument("--sessions", type=int, default=20, help="number of sessions and publishers (20)")
    parser.add_argument("--rate", type=float, default=50.0, help="events per second, of all publishers (50)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the outage (10)")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds of load before and after it (3)")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds to wait for missing events at the end (10)"
    )
    parser.add_argument("--way", choices=("hang", "crash"), help="one of the two ways (default: both)")
    options = parser.parse_args()
    succeeded = True
    for way in (options.way,) if options.way else ("hang", "crash"):
        try:
            result = run(options, way)
        except (BenchmarkError, OSError) as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
        succeeded &= report(result)
    return 0 if succeeded else 1
