"""Compare sseserve with nchan in one run on one machine; print figures and ratios.

    python -m benchmarks peers [--quick] [--only fanout,latency,idle,accept,ws,stalled,token]

The servers take turns, round by round, so that other load on the machine affects both; each figure is the
median of its rounds. README.md describes what is measured and how to read the figures.
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

from ..load.process import BenchmarkError, raise_file_limit
from ..servers import NCHAN, SSESERVE, SSESERVE_TOKEN, SSESERVE_WS, collect_versions
from .measurements import GROUPS, QUICK, Measurement, Plan, Testbed, describe_faults, select_measurements

RESULTS = Path(__file__).resolve().parents[1] / "results"


def run_rounds(measurement: Measurement, plan: Plan, files: int) -> dict[str, list[dict[str, Any]]]:
    """Run all rounds of a measurement, alternating the targets; return the results by target name."""
    rounds: dict[str, list[dict[str, Any]]] = {target.name: [] for target in measurement.targets}
    for number in range(measurement.rounds):
        for target in measurement.targets:
            with Testbed(target, plan, files) as testbed:
                result = measurement.run(testbed)
            rounds[target.name].append(result)
            position = f"{measurement.name} {number + 1}/{measurement.rounds} {target.name}"
            print(f"  {position}: {_summarize(measurement, result)}", flush=True)
    return rounds


def _summarize(measurement: Measurement, result: dict[str, Any]) -> str:
    """Return a line with the result of one round and the CPU shares of the server and the watchers."""
    key, _, unit = measurement.figures[0]
    parts = [f"{_format_number(result[key])} {unit}"]
    if "server_cpu" in result:
        parts.append(f"server CPU {result['server_cpu']:.0%}")
    if "watcher_cpu" in result:
        parts.append(f"watchers {result['watcher_cpu']:.0%}")
    if "stalled_cut" in result:
        parts.append(f"{_format_number(result['rate'])} events/s")
        parts.append(f"p99 without stalled clients {_format_number(result['p99_alone'])} ms")
        parts.append(f"{result['stalled_cut']} stalled clients disconnected")
        parts.append(f"{result['stalled_told']} sent the reason")
    return ", ".join(parts) + (f" !! {faults}" if (faults := describe_faults(result)) else "")


def _format_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _format_values(values: list[float]) -> str:
    """Return the median and, if there is more than one round, the range."""
    median = _format_number(statistics.median(values))
    if len(values) == 1:
        return median
    return f"{median} ({_format_number(min(values))} - {_format_number(max(values))})"


def _ratio(values: list[float] | None, baseline: list[float] | None) -> float | None:
    if not values or not baseline or statistics.median(baseline) <= 0:
        return None
    return statistics.median(values) / statistics.median(baseline)


def report(completed: list[tuple[Measurement, dict[str, list[dict[str, Any]]]]]) -> list[dict[str, Any]]:
    """Print the table in Markdown; return its rows as they go into the JSON result."""
    rows: list[dict[str, Any]] = []
    for measurement, rounds in completed:
        for key, label, unit in measurement.figures:
            values = {name: [result[key] for result in results] for name, results in rounds.items()}
            sseserve, nchan, websocket, token = (
                values.get(target.name) for target in (SSESERVE, NCHAN, SSESERVE_WS, SSESERVE_TOKEN)
            )
            if nchan:
                row = {"label": label, "unit": unit, "ours": sseserve, "beside": nchan, "base": NCHAN.name}
                rows.append({**row, "ratio": _ratio(sseserve, nchan)})
            if websocket:
                row = {"label": f"{label}, WebSocket", "unit": unit, "ours": websocket, "beside": sseserve}
                rows.append({**row, "base": "own SSE", "ratio": _ratio(websocket, sseserve)})
            if token:
                row = {"label": f"{label}, with a token", "unit": unit, "ours": token, "beside": sseserve}
                rows.append({**row, "base": "without", "ratio": _ratio(token, sseserve)})
    print("\n| measurement | unit | sseserve | baseline | compared with | ratio |\n|---|---|---|---|---|---|")
    for row in rows:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        figures = f"{_format_values(row['ours'])} | {_format_values(row['beside'])}"
        print(f"| {row['label']} | {row['unit']} | {figures} | {row['base']} | **{ratio}** |")
    return rows


def _describe_machine() -> dict[str, Any]:
    """Return the CPU, the number of usable cores, the system and the load average."""
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
    """Run the selected measurements; return 1 if one failed or a client missed an event, else 0."""
    parser = argparse.ArgumentParser(description="Compare sseserve with nchan.")
    parser.add_argument("--quick", action="store_true", help="run one short round of each, as a check")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"some of {','.join(GROUPS)} (default: all)")
    options = parser.parse_args()
    groups = {name for name in options.only.split(",") if name}
    if unknown := groups - set(GROUPS):
        parser.error(f"--only: unknown measurement: {', '.join(sorted(unknown))}")
    plan = QUICK if options.quick else Plan()
    files = raise_file_limit()
    started_at = datetime.now(UTC)
    started = time.monotonic()
    completed: list[tuple[Measurement, dict[str, list[dict[str, Any]]]]] = []
    failure = ""
    selected = select_measurements(plan, groups)
    try:
        with_nchan = any(NCHAN in measurement.targets for measurement in selected)
        versions = collect_versions(files, nchan=with_nchan)
        machine = _describe_machine()
        print(", ".join(f"{name} {value}" for name, value in versions.items()))
        machine_text = f"{machine['cores']} x {machine['cpu']}, load {machine['load']:.2f}"
        print(f"{machine_text}, {files} file descriptors", flush=True)
        if machine["load"] > 0.5:
            print("Warning: the machine is not idle; do not publish figures from this run.", file=sys.stderr)
        for measurement in selected:
            rounds = run_rounds(measurement, plan, files)
            completed.append((measurement, rounds))  # one by one: a failure keeps the earlier results
    except (BenchmarkError, OSError) as error:
        failure = str(error)
        print(f"FAILED: {failure}", file=sys.stderr)
    if not completed:
        return 1
    rows = report(completed)
    faults = [
        f"{measurement.name}, {name}, round {number}: {fault}"
        for measurement, rounds in completed
        for name, results in rounds.items()
        for number, result in enumerate(results, 1)
        if (fault := describe_faults(result))
    ]
    if faults:
        print("\n" + "\n".join(faults))
    elif any(
        "expected" in result for _, rounds in completed for results in rounds.values() for result in results
    ):
        print("\nEvery client received every event exactly once and in order.")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{started_at:%Y%m%d-%H%M%S}.json"
    output = {
        "started": started_at.isoformat(),
        "seconds": time.monotonic() - started,
        "versions": versions,
        "machine": machine,
        "plan": asdict(plan),
        "table": rows,
        "rounds": {measurement.name: rounds for measurement, rounds in completed},
        "faults": faults,
        "failure": failure,
    }
    path.write_text(json.dumps(output, indent=1) + "\n")
    print(f"Results written to {path} after {output['seconds']:.0f} s.")
    return 1 if failure or faults else 0
