"""Measure sseserve beside nchan, in one run on one machine, and print figures and ratios.

    python benchmarks/bench.py [--quick] [--only fanout,latency,idle,accept,ws,stalled]

The servers take turns, round by round, so that whatever else the machine does falls on both; each figure
is the median of its rounds. See README.md for what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measurements import GROUPS, QUICK, Measure, Plan, Stage, faults_of, measures
from process import BenchError, raise_file_limit
from servers import NCHAN, OURS, OURS_WS, versions

RESULTS = Path(__file__).resolve().parent / "results"


def play(measure: Measure, plan: Plan, files: int) -> dict[str, list[dict[str, Any]]]:
    """Run all rounds of a measurement, the targets in turn."""
    rounds: dict[str, list[dict[str, Any]]] = {target.name: [] for target in measure.targets}
    for number in range(measure.rounds):
        for target in measure.targets:
            with Stage(target, plan, files) as stage:
                seen = measure.run(stage)
            rounds[target.name].append(seen)
            print(
                f"  {measure.name} {number + 1}/{measure.rounds} {target.name}: {_line(measure, seen)}",
                flush=True,
            )
    return rounds


def _line(measure: Measure, seen: dict[str, Any]) -> str:
    """Say what one round has brought, and who was busy: near 100 %, the watchers are what is measured."""
    key, _, unit = measure.shown[0]
    parts = [f"{_figure(seen[key])} {unit}"]
    if "server_cpu" in seen:
        parts.append(f"server CPU {seen['server_cpu']:.0%}")
    if "watcher_cpu" in seen:
        parts.append(f"watchers {seen['watcher_cpu']:.0%}")
    if "stalled_cut" in seen:
        parts.append(f"{_figure(seen['rate'])} events/s reached, alone {_figure(seen['p99_alone'])} ms")
        parts.append(f"{seen['stalled_cut']} stalled cut, {seen['stalled_told']} told why")
    return ", ".join(parts) + (f" !! {faults}" if (faults := faults_of(seen)) else "")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _cell(values: list[float]) -> str:
    """Show a median and, if there is more than one round, the range."""
    middle = _figure(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({_figure(min(values))} - {_figure(max(values))})"


def _ratio(values: list[float] | None, base: list[float] | None) -> float | None:
    if not values or not base or statistics.median(base) <= 0:
        return None
    return statistics.median(values) / statistics.median(base)


def report(done: list[tuple[Measure, dict[str, list[dict[str, Any]]]]]) -> list[dict[str, Any]]:
    """Print the table in Markdown; return its rows."""
    rows: list[dict[str, Any]] = []
    for measure, rounds in done:
        for key, label, unit in measure.shown:
            values = {name: [seen[key] for seen in all_seen] for name, all_seen in rounds.items()}
            ours, theirs, socket = (values.get(target.name) for target in (OURS, NCHAN, OURS_WS))
            if theirs:
                row = {"label": label, "unit": unit, "ours": ours, "beside": theirs, "base": NCHAN.name}
                rows.append({**row, "ratio": _ratio(ours, theirs)})
            if socket:
                row = {"label": f"{label}, WebSocket", "unit": unit, "ours": socket, "beside": ours}
                rows.append({**row, "base": "own SSE", "ratio": _ratio(socket, ours)})
    print("\n| measurement | unit | sseserve | beside it | | ratio |\n|---|---|---|---|---|---|")
    for row in rows:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        cells = f"{_cell(row['ours'])} | {_cell(row['beside'])} | {row['base']} | **{ratio}**"
        print(f"| {row['label']} | {row['unit']} | {cells} |")
    return rows


def _machine() -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text()
    model = next(
        (line.partition(": ")[2] for line in text.splitlines() if line.startswith("model name")), "?"
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }


def main() -> int:
    """Run what was asked for; exit status 1 if a measurement failed or a client did not get everything."""
    parser = argparse.ArgumentParser(description="Measure sseserve beside nchan.")
    parser.add_argument("--quick", action="store_true", help="one short round of each, to see that all works")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"some of {','.join(GROUPS)}")
    options = parser.parse_args()
    groups = {name for name in options.only.split(",") if name}
    if unknown := groups - set(GROUPS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    plan = QUICK if options.quick else Plan()
    files = raise_file_limit()
    start = datetime.now(UTC)
    begun = time.monotonic()
    done: list[tuple[Measure, dict[str, list[dict[str, Any]]]]] = []
    failure = ""
    chosen = measures(plan, groups)
    try:
        about = versions(files, nchan=any(NCHAN in measure.targets for measure in chosen))
        machine = _machine()
        print(", ".join(f"{name} {value}" for name, value in about.items()))
        print(f"{machine['cores']} x {machine['cpu']}, {files} files, load {machine['load']:.2f}", flush=True)
        if machine["load"] > 0.5:
            print("The machine is not idle: figures of this run are not to be quoted.", file=sys.stderr)
        for measure in chosen:
            done.append((measure, play(measure, plan, files)))  # noqa: PERF401  # what is done stays if one fails
    except (BenchError, OSError) as error:
        failure = str(error)
        print(f"FAILED: {failure}", file=sys.stderr)
    if not done:
        return 1
    rows = report(done)
    faults = [
        f"{measure.name}, {name}, round {number}: {fault}"
        for measure, rounds in done
        for name, all_seen in rounds.items()
        for number, seen in enumerate(all_seen, 1)
        if (fault := faults_of(seen))
    ]
    if faults:
        print("\n" + "\n".join(faults))
    elif any("expected" in seen for _, rounds in done for all_seen in rounds.values() for seen in all_seen):
        print("\nEvery client got every event, once and in order.")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{start:%Y%m%d-%H%M%S}.json"
    everything = {
        "started": start.isoformat(),
        "seconds": time.monotonic() - begun,
        "versions": about,
        "machine": machine,
        "plan": asdict(plan),
        "table": rows,
        "rounds": {measure.name: rounds for measure, rounds in done},
        "faults": faults,
        "failure": failure,
    }
    path.write_text(json.dumps(everything, indent=1) + "\n")
    print(f"Written to {path}, {everything['seconds']:.0f} s.")
    return 1 if failure or faults else 0


if __name__ == "__main__":
    sys.exit(main())
