"""What a benchmark has measured: the data of its JSON file, from which the reports are made.

A run has scenarios. In each, contenders (servers, or transports) take turns, round by round. A round has a
value for each of the scenario's figures. A figure's value for a contender is the median of its valid rounds.
"""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path
from typing import Literal

import msgspec

__all__ = ["Contender", "Decision", "Figure", "Machine", "Results", "Round", "Scenario", "describe_machine"]

BUSY = 0.9  # share of a core from which on the load generator may be what limits a round


class Contender(msgspec.Struct, kw_only=True):
    """A server or a transport. ``settings`` is the configuration that it runs with, as text."""

    name: str  # a key: "nchan"
    title: str  # for people: "nchan in nginx"
    version: str = ""
    language: str = ""
    settings: str = ""
    source: str = ""  # URL of the documentation that recommends these settings
    note: str = ""  # what a reader has to know to compare it fairly
    variant_of: str = ""  # the contender that this is, with other settings: no competitor of the subject
    is_limit: bool = False  # no server that one would use, but what the machine allows: never called the best


class Figure(msgspec.Struct, kw_only=True):
    """One of the values that a scenario measures. A key like ``"user+kernel"`` is the sum of two others.

    ``plot``: ``"bars"`` gives it a plot of its own. All ``"quantiles"`` of a scenario (p50, p99, max) make a
    plot, and so do all parts of a ``"stack"`` (user space, kernel); each of these has one unit. ``"none"`` is
    in the table only.
    """

    key: str
    label: str  # "deliveries per second"
    unit: str  # "deliveries/s", "ms", "KB", "B", "s", "CPU s"
    better: Literal["more", "less", "neither"]
    shown: bool = True  # in the tables and plots; else in the JSON file only
    plot: Literal["bars", "quantiles", "stack", "none"] = "bars"


class Round(msgspec.Struct, kw_only=True):
    """One round of one contender; the first has the number 1.

    ``values`` are by the figures' keys. ``load`` is the CPU time of the busiest process of the load
    generator, and ``server_cpu`` that of the server, as shares of one core. ``faults`` say what is wrong; a
    round with a fault is invalid. ``samples`` are distributions, such as quantiles of latencies in ms, by the
    keys of figures.
    """

    contender: str
    number: int
    values: dict[str, float] = {}
    load: float = 0.0
    server_cpu: float = 0.0
    faults: list[str] = []
    samples: dict[str, list[float]] = {}

    def get(self, key: str) -> float | None:
        """Return the value of a figure, or the sum of several; None if one is missing."""
        values = [self.values.get(part) for part in key.split("+")]
        return None if None in values else sum(value for value in values if value is not None)

    @property
    def is_load_bound(self) -> bool:
        """Whether the load generator may have been what limited it: the server may be faster."""
        return self.load > BUSY


class Scenario(msgspec.Struct, kw_only=True):
    """What was measured: a question, its parameters, the figures, and the rounds of all contenders.

    ``skipped`` says of contenders that are not in it why not. ``notes`` say what is to be known to read it.
    ``headline`` is the key of the figure that stands for the scenario in summaries; by default the first that
    is shown.
    """

    name: str  # a key: "fanout-1000-1"
    group: str  # what ``--only`` selects
    title: str
    question: str  # one sentence, for somebody who has never seen the project
    figures: list[Figure]
    parameters: dict[str, str | float] = {}
    rounds: list[Round] = []
    skipped: dict[str, str] = {}
    notes: list[str] = []
    headline: str = ""

    def of(self, contender: str, key: str) -> list[float]:
        """Return a figure's values in the valid rounds of a contender."""
        values = (turn.get(key) for turn in self.rounds if turn.contender == contender and not turn.faults)
        return [value for value in values if value is not None]

    def median(self, contender: str, key: str) -> float | None:
        """Return the median of a figure's values; None if no round is valid."""
        values = self.of(contender, key)
        return statistics.median(values) if values else None

    def ratio(self, contender: str, baseline: str, key: str) -> float | None:
        """Return the ratio of the medians of two contenders; None if there is none."""
        value, base = self.median(contender, key), self.median(baseline, key)
        return None if value is None or not base else value / base


class Machine(msgspec.Struct, kw_only=True):
    """The machine of a run. ``load`` is its load average when the run began."""

    cpu: str
    cores: int
    memory: float  # GiB
    system: str
    load: float


class Decision(msgspec.Struct, kw_only=True):
    """A row of a decision table: for which work which contender, and the figure that decides."""

    work: str
    choice: str  # the name of a contender, or other text
    because: str


class Results(msgspec.Struct, kw_only=True):
    """One run of a benchmark."""

    command: str  # "peers" or "transports"
    title: str
    question: str
    started: str  # ISO 8601, UTC
    seconds: float = 0.0
    quick: bool = False
    subject: str = ""  # the contender that the ratios are of
    machine: Machine
    versions: dict[str, str] = {}
    contenders: list[Contender] = []
    scenarios: list[Scenario] = []
    decisions: list[Decision] = []
    failures: list[str] = []

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a JSON file."""
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


def describe_machine() -> Machine:
    """Return the CPU, the number of usable cores, the memory, the system and the load average."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return Machine(
        cpu=model,
        cores=len(os.sched_getaffinity(0)),
        memory=memory,
        system=platform.platform(),
        load=os.getloadavg()[0],
    )
