"""The command: its options, the contenders that are here, and what comes out."""

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

from .. import report
from ..load.process import BenchmarkError, raise_file_limit
from ..report.progress import Progress
from ..results import Contender, Results, describe_machine
from .contenders import PEERS, Peer
from .plan import QUICK, Plan
from .runner import Runner, estimate, select, takes_part
from .scenarios import GROUPS, STAGES

__all__ = ["find_faults", "main", "measure"]

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
        if not Runner(results, plan, [peer]).count(selection):
            continue  # it takes part in nothing that is selected
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
                    if takes_part(peer, scenario):
                        scenario.skipped[peer.name] = missing
    machine = results.machine
    print(f"\n{machine.cores} x {machine.cpu}, {machine.memory:.0f} GiB, load {machine.load:.2f}")
    if machine.load > 0.5:
        print("Warning: the machine is not idle; do not publish figures from this run.", file=sys.stderr)
    minutes = max(1, round(estimate(selection, plan, present) / 60))
    print(f"{len(present)} contenders, about {minutes} minute{'' if minutes == 1 else 's'}\n", flush=True)
    runner = Runner(results, plan, present)
    with Progress(runner.count(selection)) as progress:
        runner.run(selection, progress)
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
        variant_of=peer.variant_of,
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
            plan,
            **dict.fromkeys(
                ("rounds", "variant_rounds", "many_rounds", "stalled_rounds", "payload_rounds"),
                options.rounds,
            ),
        )
    peers = PEERS
    if options.contenders is not None:
        wanted = options.contenders.split(",")
        if unknown := set(wanted) - {peer.name for peer in PEERS}:
            parser.error(f"--contenders: there is no {', '.join(sorted(unknown))}; there are {names}")
        peers = tuple(peer for peer in PEERS if peer.name in wanted)
        plan = dataclasses.replace(plan, variant_rounds=max(plan.variant_rounds, 1))  # they are named
    only = options.only.split(",") if options.only else None
    try:
        select(STAGES, plan, only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    results = measure(plan, only=only, peers=peers, quick=options.quick)
    started = datetime.fromisoformat(results.started)
    directory = options.output or RESULTS / f"peers-{started:%Y%m%d-%H%M%S}"
    print(report.write(results, directory))
    print(f"Written after {results.seconds:.0f} s: {directory / 'report.html'}")
    faults = find_faults(results)
    for fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        print("Every client received every event exactly once and in order.")
    return 1 if any(name == SUBJECT or name.startswith(f"{SUBJECT}-") for name in faults.values()) else 0


def find_faults(results: Results) -> dict[str, str]:
    """Return what went wrong in the rounds and what failed, each with the name of the contender."""
    faults = {
        f"{scenario.name}, {turn.contender}, round {turn.number}: {fault}": turn.contender
        for scenario in results.scenarios
        for turn in scenario.rounds
        for fault in turn.faults
    }
    names = [contender.name for contender in results.contenders]
    for failure in results.failures:
        where = failure.partition(": ")[0]
        faults[failure] = next((name for name in names if name in where.split(", ")), "")
    return faults
