"""The command: runs the scenarios and writes the results."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from ..load.process import BenchmarkError
from ..report import write
from ..report.progress import Progress
from ..results import Results, Scenario, describe_machine
from ..servers import ROOT
from .bed import CONTENDERS, Plan
from .conditions import (
    condition_steps,
    first_steps,
    measure_conditions,
    measure_first,
    measure_proxies,
    proxy_steps,
)
from .cuts import cut_steps, measure_cuts
from .decisions import decide
from .latency import latency_steps, measure_latency, measure_memory, memory_steps
from .wire import measure_wire, wire_steps

__all__ = ["GROUPS", "QUICK", "main", "run"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
QUICK = Plan(
    rounds=1,
    seconds=1.0,
    loads=((1, 10), (1000, 10)),
    idle_clients=300,
    idle_seconds=16.0,
    opens=3,
    offline=1.0,
    firsts=((False, False), (True, True)),
    sites=("default", "ours"),
    conditions=("loss",),
    settle=0.5,
)


class Group(NamedTuple):
    """Scenarios that are measured together, and the number of their steps."""

    measure: Callable[[Plan, Progress], Iterator[Scenario]]
    steps: Callable[[Plan], int]


GROUPS = {
    "latency": Group(measure_latency, latency_steps),
    "memory": Group(measure_memory, memory_steps),
    "wire": Group(measure_wire, wire_steps),
    "first": Group(measure_first, first_steps),
    "cuts": Group(measure_cuts, cut_steps),
    "proxy": Group(measure_proxies, proxy_steps),
    "network": Group(measure_conditions, condition_steps),
}


def run(plan: Plan, groups: list[str], progress: Progress, *, quick: bool = False) -> Results:
    """Run the scenarios of some groups. One that fails is in ``failures``, and the others go on."""
    results = Results(
        command="transports",
        title="SSE or WebSocket?",
        question="Which transport brings the progress of long work to a browser, and what does each cost?",
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=quick,
        subject="sse",
        machine=describe_machine(),
        versions=_collect_versions(),
        contenders=CONTENDERS,
    )
    began = time.monotonic()
    for group in groups:
        try:
            for scenario in GROUPS[group].measure(plan, progress):
                results.scenarios.append(scenario)  # one by one: a failure keeps the earlier ones
        except (BenchmarkError, OSError) as error:
            results.failures.append(f"{group}: {error}")
            progress.note(f"FAILED: {group}: {error}")
    results.decisions = decide(results)
    results.seconds = time.monotonic() - began
    return results


def _collect_versions() -> dict[str, str]:
    """Return the versions of Python, the libraries of both sides, and the revision."""
    versions = {"python": sys.version.split()[0], "kernel": os.uname().release}
    for package in ("sseserve", "trio", "h11", "wsproto", "h2", "hypercorn"):
        versions[package] = importlib.metadata.version(package)
    if (git := shutil.which("git")) is not None:
        command = [git, "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
        versions["commit"] = done.stdout.strip() or "?"
    return versions


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
    plan = QUICK if options.quick else Plan()
    with Progress(sum(GROUPS[group].steps(plan) for group in groups)) as progress:
        results = run(plan, groups, progress, quick=options.quick)
    directory = options.output or RESULTS / f"transports-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    print(write(results, directory))
    faults = [
        f"{scenario.name}, {turn.contender}, round {turn.number}: {fault}"
        for scenario in results.scenarios
        for turn in scenario.rounds
        for fault in turn.faults
    ]
    print(*faults, f"{directory / 'report.html'}: after {results.seconds:.0f} s", sep="\n", file=sys.stderr)
    return 1 if faults or results.failures else 0
