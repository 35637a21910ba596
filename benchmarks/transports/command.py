"""The command: runs the scenarios and writes the results."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from ..load.process import BenchmarkError, raise_file_limit
from ..results import Results, Scenario, describe_machine
from ..servers import collect_versions
from .bed import CONTENDERS, Plan
from .latency import measure_latency, measure_memory

__all__ = ["GROUPS", "QUICK", "main", "run"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
QUICK = Plan(rounds=1, seconds=2.0, loads=((1, 10), (100, 10), (1000, 10)), idle_clients=300)
GROUPS: dict[str, Callable[[Plan, Callable[[str], None]], Iterator[Scenario]]] = {
    "latency": measure_latency,
    "memory": measure_memory,
}


def run(plan: Plan, groups: list[str], say: Callable[[str], None], *, quick: bool = False) -> Results:
    """Run the scenarios of some groups. One that fails is in ``failures``, and the others go on."""
    results = Results(
        command="transports",
        title="SSE or WebSocket?",
        question="Which transport brings the progress of long work to a browser, and what does each cost?",
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=quick,
        subject="sse",
        machine=describe_machine(),
        versions=collect_versions(raise_file_limit(), nchan=False),
        contenders=CONTENDERS,
    )
    began = time.monotonic()
    for group in groups:
        try:
            for scenario in GROUPS[group](plan, say):
                results.scenarios.append(scenario)  # one by one: a failure keeps the earlier ones
        except (BenchmarkError, OSError) as error:
            results.failures.append(f"{group}: {error}")
            say(f"FAILED: {group}: {error}")
    results.seconds = time.monotonic() - began
    return results


def main() -> int:
    """Run the command; return 1 if a scenario failed, or a client missed an event that it was promised."""
    parser = argparse.ArgumentParser(description="Compare the transports of one server.")
    parser.add_argument("--quick", action="store_true", help="one short round of each, as a check")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"some of {','.join(GROUPS)}; default: all")
    parser.add_argument("--output", type=Path, help="directory of the results")
    options = parser.parse_args()
    groups = [name for name in options.only.split(",") if name]
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"--only: unknown: {', '.join(sorted(unknown))}")
    if describe_machine().load > 0.5:
        print("Warning: the machine is not idle; do not publish figures from this run.", file=sys.stderr)
    results = run(QUICK if options.quick else Plan(), groups, _say, quick=options.quick)
    directory = options.output or RESULTS / f"transports-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    results.save(directory / "results.json")
    faults = [
        f"{scenario.name}, {turn.contender}, round {turn.number}: {fault}"
        for scenario in results.scenarios
        for turn in scenario.rounds
        for fault in turn.faults
    ]
    print(*faults, f"Results in {directory}, after {results.seconds:.0f} s.", sep="\n")
    return 1 if faults or results.failures else 0


def _say(text: str) -> None:
    print(f"  {text}", flush=True)
