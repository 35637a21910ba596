"""Runs the stages: contenders take turns, round by round, so that other load on the machine affects all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..load.process import BenchmarkError
from ..results import Results, Round, Scenario
from .contenders import Peer
from .plan import Plan
from .stages import Stage
from .testbed import Load, Testbed

__all__ = ["Runner", "estimate", "format_number", "select"]

Selection = list[tuple[Stage, list[Scenario]]]


def select(stages: Sequence[Stage], plan: Plan, names: Sequence[str] | None) -> Selection:
    """Return the stages with those of their scenarios that are named, by group, name or beginning of a name.

    Raises:
        ValueError: a name selects nothing.
    """
    if names is None:
        return [(stage, stage.scenarios(plan)) for stage in stages]
    selection = []
    unused = set(names)
    for stage in stages:
        chosen = []
        for scenario in stage.scenarios(plan):
            matching = {
                name
                for name in names
                if name in (scenario.group, scenario.name) or scenario.name.startswith(f"{name}-")
            }
            unused -= matching
            if matching:
                chosen.append(scenario)
        if chosen:
            selection.append((stage, chosen))
    if unused:
        raise ValueError(f"there is no scenario {', '.join(sorted(unused))}")
    return selection


def takes_part(peer: Peer, scenario: Scenario) -> bool:
    """Return whether a contender takes part in a scenario."""
    return peer.groups is None or scenario.group in peer.groups


def estimate(selection: Selection, plan: Plan, peers: Sequence[Peer]) -> float:
    """Return roughly how many seconds a run takes."""
    return sum(
        stage.rounds(plan) * stage.seconds(plan)
        for stage, scenarios in selection
        for peer in peers
        if any(takes_part(peer, scenario) for scenario in scenarios)
    )


class Runner:
    """A run. A contender that fails in a scenario is noted in the results, and the run goes on.

    Args:
        results: gets the scenarios with their rounds.
        plan: how much is measured.
        peers: the contenders that are here.
        report: is called with a line for each round.
    """

    def __init__(
        self,
        results: Results,
        plan: Plan,
        peers: Sequence[Peer],
        report: Callable[[str], None],
    ) -> None:
        self._results, self._plan, self._peers = results, plan, peers
        self._report = report
        self._load = Load()

    def run(self, selection: Selection) -> None:
        """Run all rounds of the stages."""
        try:
            for stage, scenarios in selection:
                self._results.scenarios += scenarios
                rounds = stage.rounds(self._plan)
                for number in range(1, rounds + 1):
                    for peer in self._peers:
                        wanted = {each.name: each for each in scenarios if takes_part(peer, each)}
                        if wanted:
                            self._take_turn(stage, peer, wanted, number, f"{number}/{rounds} {peer.name}")
        finally:
            self._load.stop()

    def _take_turn(
        self, stage: Stage, peer: Peer, wanted: dict[str, Scenario], number: int, turn: str
    ) -> None:
        """Run one round of one contender in a stage."""
        plan = self._plan
        left = dict(wanted)
        try:
            with Testbed(peer, self._load, stage.channels(plan), plan.size) as bed:
                for name, outcome in stage.run(bed, plan, frozenset(wanted)):
                    scenario = left.pop(name)
                    if isinstance(outcome, str):
                        scenario.skipped[peer.name] = outcome
                        self._report(f"{name} {turn}: skipped, {outcome}")
                        continue
                    outcome.number = number
                    scenario.rounds.append(outcome)
                    self._report(f"{name} {turn}: {summarize(scenario, outcome)}")
        except (BenchmarkError, OSError) as error:
            for name, scenario in left.items():
                self._results.failures.append(f"{name}, {peer.name}, round {number}: {error}")
                if not any(outcome.contender == peer.name for outcome in scenario.rounds):
                    scenario.skipped[peer.name] = f"failed: {error}"
            self._report(f"{', '.join(left)} {turn}: FAILED: {error}")
            self._load.stop()  # its processes may be in the middle of something
            self._load = Load()


def summarize(scenario: Scenario, outcome: Round) -> str:
    """Return a line with the figures of a round, the CPU shares, and its faults."""
    parts = [
        f"{format_number(outcome.values[figure.key])} {figure.unit}"
        for figure in scenario.figures
        if figure.shown and figure.key in outcome.values
    ]
    if outcome.load:
        parts.append(f"server {outcome.server_cpu:.0%}, load {outcome.load:.0%}")
    return ", ".join(parts) + (f" !! {'; '.join(outcome.faults)}" if outcome.faults else "")


def format_number(value: float) -> str:
    """Return a number with three significant digits or so."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
