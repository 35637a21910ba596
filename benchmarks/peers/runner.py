"""Runs the stages: contenders take turns, round by round, so that other load on the machine affects all."""

from __future__ import annotations

from collections.abc import Sequence

from ..load.process import BenchmarkError
from ..report.progress import Progress
from ..results import Results, Round, Scenario
from .contenders import Peer
from .plan import Plan
from .stages import Stage
from .testbed import Load, Testbed

__all__ = ["Runner", "count_rounds", "estimate", "select", "takes_part"]

Selection = list[tuple[Stage, list[Scenario]]]


def select(stages: Sequence[Stage], plan: Plan, names: Sequence[str] | None) -> Selection:
    """Return the stages with those of their scenarios that are named, by group, name or beginning of a name.

    Raises:
        ValueError: a name selects nothing.
    """
    if names is None:
        return [(stage, stage.scenarios(plan)) for stage in stages if stage.rounds(plan)]
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


def count_rounds(stage: Stage, plan: Plan, peer: Peer) -> int:
    """Return how many rounds of a stage a contender has."""
    rounds = max(stage.rounds(plan), 1)
    return min(rounds, plan.variant_rounds) if peer.groups is not None else rounds


def estimate(selection: Selection, plan: Plan, peers: Sequence[Peer]) -> float:
    """Return roughly how many seconds a run takes."""
    return sum(
        count_rounds(stage, plan, peer) * stage.seconds(plan)
        for stage, scenarios in selection
        for peer in peers
        if any(takes_part(peer, scenario) for scenario in scenarios) and not stage.unsupported(peer)
    )


class Runner:
    """A run. A contender that fails in a scenario is noted in the results, and the run goes on.

    Args:
        results: gets the scenarios with their rounds.
        plan: how much is measured.
        peers: the contenders that are here.
    """

    def __init__(self, results: Results, plan: Plan, peers: Sequence[Peer]) -> None:
        self._results, self._plan, self._peers = results, plan, peers

    def count(self, selection: Selection) -> int:
        """Return the number of steps: of rounds of contenders in scenarios."""
        return sum(
            count_rounds(stage, self._plan, peer)
            for stage, scenarios in selection
            for peer in self._peers
            for scenario in scenarios
            if takes_part(peer, scenario)
        )

    def run(self, selection: Selection, progress: Progress) -> None:
        """Run all rounds of the stages."""
        self._progress = progress
        self._load = Load()
        try:
            for stage, scenarios in selection:
                self._results.scenarios += scenarios
                rounds = {peer.name: count_rounds(stage, self._plan, peer) for peer in self._peers}
                for number in range(1, max(rounds.values(), default=0) + 1):
                    for peer in self._peers:
                        wanted = {each.name: each for each in scenarios if takes_part(peer, each)}
                        if wanted and number <= rounds[peer.name]:
                            self._take_turn(
                                stage, peer, wanted, number, f"{number}/{rounds[peer.name]} {peer.name}"
                            )
        finally:
            self._load.stop()

    def _take_turn(
        self, stage: Stage, peer: Peer, wanted: dict[str, Scenario], number: int, turn: str
    ) -> None:
        """Run one round of one contender in a stage."""
        plan, progress = self._plan, self._progress
        left = dict(wanted)
        progress.start(f"{stage.name} {turn}")
        if reason := stage.unsupported(peer):
            for name, scenario in wanted.items():
                scenario.skipped[peer.name] = reason
                progress.finish(f"{name} {turn}: skipped: {reason}")
            return
        try:
            with Testbed(peer, self._load, stage.channels(plan), plan) as bed:
                for name, outcome in stage.run(bed, plan, frozenset(wanted)):
                    scenario = left.pop(name)
                    if isinstance(outcome, str):
                        scenario.skipped[peer.name] = outcome
                        progress.finish(f"{name} {turn}: skipped: {outcome}")
                        continue
                    outcome.number = number
                    scenario.rounds.append(outcome)
                    progress.finish(f"{name} {turn}: {summarize(scenario, outcome)}")
                    for fault in outcome.faults:
                        progress.note(f"{name} {turn}: {fault}")
        except (BenchmarkError, OSError) as error:
            text = str(error) or type(error).__name__
            for name, scenario in left.items():
                self._results.failures.append(f"{name}, {peer.name}, round {number}: {text}")
                if not any(outcome.contender == peer.name for outcome in scenario.rounds):
                    scenario.skipped[peer.name] = f"failed: {text}"
                progress.finish(f"{name} {turn}: failed")
            progress.note(f"{stage.name} {turn}: failed: {text}")
            self._load.stop()  # its processes may be in the middle of something
            self._load = Load()


def summarize(scenario: Scenario, outcome: Round) -> str:
    """Return a line with the figures of a round and the CPU shares."""
    parts = [
        f"{format_number(outcome.values[figure.key])} {figure.unit}"
        for figure in scenario.figures
        if figure.shown and figure.key in outcome.values
    ]
    if outcome.load:
        parts.append(f"server {outcome.server_cpu:.0%}, load {outcome.load:.0%}")
    return ", ".join(parts)


def format_number(value: float) -> str:
    """Return a number with three significant digits or so."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
