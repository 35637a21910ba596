"""What the figures of a run say: who is best in what, by how much, and how sure that is. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..results import Contender, Figure, Results, Scenario

__all__ = [
    "Comparison",
    "Standing",
    "Summary",
    "compare",
    "format_number",
    "format_ratio",
    "headlines",
    "shown_figures",
    "summarize",
]

TIMES = "\N{MULTIPLICATION SIGN}"
LEVEL = 0.05  # medians that differ by at most this share count as equal


@dataclass(frozen=True)
class Standing:
    """How a contender did in one figure of a scenario.

    ``busy`` and ``invalid`` count its rounds in which the load generator may have been the limit, and those
    with faults. ``ratio`` is to the median of the subject. ``is_level``: not the best, nor clearly behind.
    """

    contender: Contender
    values: tuple[float, ...]
    median: float | None
    ratio: float | None
    rounds: int
    busy: int
    invalid: int
    is_best: bool = False
    is_level: bool = False


@dataclass(frozen=True)
class Comparison:
    """All contenders in one figure of a scenario, in the order of the run.

    ``ranked`` are those that can be compared, the best first: it is empty if the figure is neither better
    when more nor when less, and lacks contenders without a valid round, those that only show a limit, and
    variants of the subject.
    """

    scenario: Scenario
    figure: Figure
    standings: tuple[Standing, ...]
    ranked: tuple[Standing, ...]

    def of(self, name: str) -> Standing | None:
        """Return the standing of a contender; None if it has none."""
        return next((each for each in self.standings if each.contender.name == name), None)

    @property
    def leaders(self) -> tuple[Standing, ...]:
        """The best, and those that are level with it."""
        return tuple(each for each in self.ranked if each.is_best or each.is_level)

    def best_except(self, name: str) -> Standing | None:
        """Return the best standing of the other contenders; None if there is none."""
        return next((each for each in self.ranked if each.contender.name != name), None)


@dataclass(frozen=True)
class Summary:
    """The scenarios by how the subject did in their headlines; ``unranked``: those it was not in."""

    ahead: tuple[Comparison, ...]
    level: tuple[Comparison, ...]
    behind: tuple[Comparison, ...]
    unranked: tuple[Comparison, ...]


def compare(results: Results, scenario: Scenario, figure: Figure) -> Comparison:
    """Compare all contenders of a scenario in one of its figures.

    The best is the one with the best median, if there are at least two to compare. A contender is level with
    it if the ranges of their rounds overlap, or their medians differ by at most 5 %.
    """
    titles = {each.name: each for each in results.contenders}
    present = {each.contender for each in scenario.rounds}
    names = [name for name in titles if name in present] + sorted(present - set(titles))
    standings = []
    for name in names:
        rounds = [each for each in scenario.rounds if each.contender == name]
        standings.append(
            Standing(
                contender=titles.get(name) or Contender(name=name, title=name),
                values=tuple(scenario.of(name, figure.key)),
                median=scenario.median(name, figure.key),
                ratio=scenario.ratio(name, results.subject, figure.key),
                rounds=len(rounds),
                busy=sum(each.is_load_bound for each in rounds),
                invalid=sum(bool(each.faults) for each in rounds),
            )
        )
    ranked = [
        each
        for each in standings
        if each.values
        and not each.contender.is_limit
        and not (results.subject and each.contender.variant_of == results.subject)
    ]
    ranked.sort(key=lambda each: each.median or 0.0, reverse=figure.better == "more")
    if figure.better == "neither" or len(ranked) < 2:
        return Comparison(scenario, figure, tuple(standings), ())
    best = ranked[0]
    marked = {best.contender.name: replace(best, is_best=True)}
    for each in ranked[1:]:
        marked[each.contender.name] = replace(each, is_level=_is_level(each, best))
    return Comparison(
        scenario,
        figure,
        tuple(marked.get(each.contender.name, each) for each in standings),
        tuple(marked[each.contender.name] for each in ranked),
    )


def _is_level(one: Standing, best: Standing) -> bool:
    if min(one.values) <= max(best.values) and min(best.values) <= max(one.values):
        return True
    one_median, best_median = one.median or 0.0, best.median or 0.0
    return abs(one_median - best_median) <= LEVEL * max(abs(one_median), abs(best_median))


def shown_figures(scenario: Scenario) -> list[Figure]:
    """Return the figures of a scenario that reports show."""
    return [figure for figure in scenario.figures if figure.shown]


def headlines(results: Results) -> list[Comparison]:
    """Return one comparison for each scenario that has figures: of the figure that stands for it."""
    comparisons = []
    for scenario in results.scenarios:
        figures = shown_figures(scenario)
        named = [figure for figure in scenario.figures if figure.key == scenario.headline]
        if figures or named:
            comparisons.append(compare(results, scenario, (named or figures)[0]))
    return comparisons


def summarize(results: Results) -> Summary:
    """Sort the scenarios by how the subject did."""
    ahead: list[Comparison] = []
    level: list[Comparison] = []
    behind: list[Comparison] = []
    unranked: list[Comparison] = []
    for comparison in headlines(results):
        standing = next((each for each in comparison.ranked if each.contender.name == results.subject), None)
        if standing is None:
            unranked.append(comparison)
        elif standing not in comparison.leaders:
            behind.append(comparison)
        else:
            (ahead if len(comparison.leaders) == 1 else level).append(comparison)
    return Summary(tuple(ahead), tuple(level), tuple(behind), tuple(unranked))


def format_number(value: float) -> str:
    """Return a number for people: three significant digits, all digits of whole numbers below 10,000."""
    if float(value).is_integer() and abs(value) < 10_000:
        return f"{value:,.0f}"
    rounded = float(f"{value:.3g}")
    if abs(rounded) >= 100:
        return f"{rounded:,.0f}"
    return (
        f"{rounded:.1f}" if abs(rounded) >= 10 else f"{rounded:.2f}" if abs(rounded) >= 1 else f"{rounded:g}"
    )


def format_ratio(ratio: float) -> str:
    """Return a ratio such as ``0.45``, with a multiplication sign."""
    if ratio >= 100:
        return f"{float(f'{ratio:.2g}'):,.0f}{TIMES}"
    if ratio >= 10:
        return f"{ratio:.0f}{TIMES}"
    return f"{ratio:.2f}{TIMES}" if ratio >= 0.1 or not ratio else f"{ratio:.2g}{TIMES}"
