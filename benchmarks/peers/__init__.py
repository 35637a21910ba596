"""Compare sseserve with other servers on this machine: throughput, latency, memory, and when things go wrong.

    python -m benchmarks peers [--quick] [--only many,accept] [--contenders sseserve,nchan] [--output DIR]

Contenders take turns, round by round, so that other load on the machine affects all of them; a figure is the
median of its rounds. README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ..load.process import BenchmarkError, raise_file_limit
from ..results import Contender, Results, Scenario, describe_machine
from .contenders import PEERS, Peer
from .plan import QUICK, Plan
from .runner import Runner, estimate, format_number, select
from .scenarios import GROUPS, STAGES

__all__ = ["main", "measure"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
SUBJECT = "sseserve"


def measure(
    plan: Plan, *, only: Sequence[str] | None = None, peers: Sequence[Peer] = PEERS, quick: bool = False
) -> Results:
    """Run the scenarios with the contenders that are here, and print what is measured.

    Raises:
        ValueError: ``only`` names a scenario that does not exist.
    """
    raise_file_limit()
    selection = select(STAGES, plan, only)
    results = Results(
        command="peers",
        title="sseserve beside other servers",
        question="How fast is sseserve, and what does it cost, beside what one would use instead?",
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=quick,
        subject=SUBJECT,
        machine=describe_machine(),
        versions=collect_versions(),
    )
    began = time.monotonic()
    present = []
    for peer in peers:
        version = ""
        missing = peer.missing()
        if not missing:
            try:
                version = peer.version()
                present.append(peer)
            except (BenchmarkError, OSError) as error:
                missing = f"failed: {error}"
                results.failures.append(f"{peer.name}: {error}")
        results.contenders.append(describe(peer, version, missing))
        print_contender(results.contenders[-1], missing)
        if missing:
            for _, scenarios in selection:
                for scenario in scenarios:
                    scenario.skipped[peer.name] = missing
    machine = results.machine
    print(f"\n{machine.cores} x {machine.cpu}, {machine.memory:.0f} GiB, load {machine.load:.2f}")
    if machine.load > 0.5:
        print("Warning: the machine is not idle; do not publish figures from this run.", file=sys.stderr)
    minutes = estimate(selection, plan, present) / 60
    print(f"{len(present)} contenders, about {minutes:.0f} minutes\n", flush=True)
    Runner(results, plan, present, lambda line: print(f"  {line}", flush=True)).run(selection)
    results.seconds = time.monotonic() - began
    return results


def describe(peer: Peer, version: str, missing: str) -> Contender:
    """Return a contender as the results have it."""
    return Contender(
        name=peer.name,
        title=peer.title,
        version=version,
        language=peer.language,
        settings="" if missing else peer.settings(),
        source=peer.source,
        note=peer.note,
        is_limit=peer.is_limit,
    )


def print_contender(contender: Contender, missing: str) -> None:
    """Print a contender with its settings, or why it is skipped."""
    if missing:
        print(f"{contender.name}: skipped: {missing}")
        return
    print(f"{contender.name}: {contender.title}, {contender.version}")
    source = [f"as recommended in {contender.source}"] if contender.source else []
    for line in [*contender.settings.splitlines(), *source]:
        print(f"    {line}")


def collect_versions() -> dict[str, str]:
    """Return the versions of Python, the kernel and the libraries of sseserve."""
    versions = {"python": sys.version.split()[0], "kernel": os.uname().release}
    for package in ("trio", "hypercorn", "h11", "trio-websocket"):
        versions[package] = importlib.metadata.version(package)
    return versions


def print_table(results: Results) -> None:
    """Print the medians in Markdown, with their ranges, and the ratios to the subject."""
    names = [contender.name for contender in results.contenders]
    names = [
        name
        for name in names
        if any(turn.contender == name for scenario in results.scenarios for turn in scenario.rounds)
    ]
    print(f"\n| scenario | figure | {' | '.join(names)} |")
    print(f"|---|---|{'---|' * len(names)}")
    for scenario in results.scenarios:
        for figure in scenario.figures:
            if figure.shown:
                cells = [_cell(results, scenario, name, figure.key) for name in names]
                print(f"| {scenario.title} | {figure.label}, {figure.unit} | {' | '.join(cells)} |")


def _cell(results: Results, scenario: Scenario, name: str, key: str) -> str:
    values = scenario.of(name, key)
    median = scenario.median(name, key)
    if median is None:
        return "-"
    text = format_number(median)
    if len(values) > 1:
        text += f" ({format_number(min(values))} - {format_number(max(values))})"
    ratio = scenario.ratio(results.subject, name, key)
    if ratio is not None and name != results.subject:
        text += f" x{ratio:.2f}"
    return text + (
        " (load)" if any(turn.is_load_bound for turn in scenario.rounds if turn.contender == name) else ""
    )


def main() -> int:
    """Run the selected scenarios; return 1 if sseserve failed in one or a client of it missed an event."""
    parser = argparse.ArgumentParser(description="Compare sseserve with other servers on this machine.")
    parser.add_argument("--quick", action="store_true", help="run one short round of each, as a check")
    parser.add_argument("--only", help=f"some of {','.join(GROUPS)}, or names of scenarios (default: all)")
    names = ",".join(peer.name for peer in PEERS)
    parser.add_argument("--contenders", help=f"some of {names} (default: all that are here)")
    parser.add_argument("--rounds", type=int, help="rounds of each scenario")
    parser.add_argument("--output", type=Path, help="directory of the results (default: named by the time)")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    if options.rounds:
        plan = dataclasses.replace(
            plan, rounds=options.rounds, many_rounds=options.rounds, stalled_rounds=options.rounds
        )
    peers = PEERS
    if options.contenders is not None:
        wanted = options.contenders.split(",")
        if unknown := set(wanted) - {peer.name for peer in PEERS}:
            parser.error(f"--contenders: there is no {', '.join(sorted(unknown))}; there are {names}")
        peers = tuple(peer for peer in PEERS if peer.name in wanted)
    try:
        results = measure(
            plan, only=options.only.split(",") if options.only else None, peers=peers, quick=options.quick
        )
    except ValueError as error:
        parser.error(f"--only: {error}")
    print_table(results)
    started = datetime.fromisoformat(results.started)
    directory = options.output or RESULTS / f"peers-{started:%Y%m%d-%H%M%S}"
    results.save(directory / "results.json")
    print(f"\nResults written to {directory} after {results.seconds:.0f} s.")
    return 1 if find_faults(results) else 0


def find_faults(results: Results) -> bool:
    """Print what went wrong; return whether sseserve is concerned."""
    faults = [
        (turn.contender, f"{scenario.name}, {turn.contender}, round {turn.number}: {fault}")
        for scenario in results.scenarios
        for turn in scenario.rounds
        for fault in turn.faults
    ]
    faults += [(failure.split(", ")[-2].split(":")[0], failure) for failure in results.failures]
    for _, fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        print("Every client received every event exactly once and in order.")
    return any(name.startswith(SUBJECT) for name, _ in faults)
