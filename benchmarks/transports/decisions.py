"""The decision table: for which work which transport, by the figures of the run. Pure.

Each row compares one figure of the transports that can do the work. Those within a tenth of the best count as
equal, and of these the first of ``PREFERENCE`` is taken: the one that asks least of the program at the other
end. A row whose figures were not measured is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from ..results import Decision, Results
from .protocols import POLL_INTERVAL

__all__ = ["decide"]

# An EventSource reconnects and resumes by itself, and is HTTP for everything in between.
PREFERENCE = ("sse", "sse-h2", "websocket", "long-poll", "polling")
PUSHED = ("sse", "sse-h2", "websocket")
TITLES = {
    "sse": "SSE",
    "websocket": "WebSocket",
    "long-poll": "long polling",
    "polling": "polling",
    "sse-h2": "SSE over HTTP/2",
}
EQUAL = 1.1


class _Figures:
    """The medians of a run."""

    def __init__(self, results: Results) -> None:
        self._scenarios = {scenario.name: scenario for scenario in results.scenarios}

    def get(self, scenario: str, key: str, transport: str) -> float | None:
        found = self._scenarios.get(scenario)
        return None if found is None else found.median(transport, key)

    def all(self, scenario: str, key: str, transports: Sequence[str] = PREFERENCE) -> dict[str, float]:
        """Return a figure of those transports that have it."""
        values = {name: self.get(scenario, key, name) for name in transports}
        return {name: value for name, value in values.items() if value is not None}

    def busiest(self) -> str | None:
        """Return the name of the scenario of latency with the most deliveries per second."""
        loads = {
            name: float(scenario.parameters["clients"]) * float(scenario.parameters["events per second"])
            for name, scenario in self._scenarios.items()
            if scenario.group == "latency"
        }
        return max(loads, key=lambda name: loads[name], default=None)


def decide(results: Results) -> list[Decision]:
    """Return the rows for which the run has the figures."""
    figures = _Figures(results)
    rows = [row(figures) for row in _ROWS]
    titles = {contender.name: contender.title for contender in results.contenders}
    return [
        msgspec.structs.replace(row, choice=titles.get(row.choice, row.choice))
        for row in rows
        if row is not None
    ]


def _choose(values: dict[str, float]) -> str:
    least = min(values.values())
    return next(name for name in PREFERENCE if name in values and values[name] <= least * EQUAL)


def _list(values: dict[str, float], unit: str, digits: int = 0) -> str:
    ordered = sorted(values.items(), key=lambda item: item[1])
    return ", ".join(f"{TITLES[name]} {value:,.{digits}f} {unit}".rstrip() for name, value in ordered)


def _one_job(figures: _Figures) -> Decision | None:
    served = figures.all("proxy-default", "served")
    ages = {
        name: value for name, value in figures.all("proxy-default", "p50").items() if served.get(name) == 100
    }
    if not ages:
        return None
    refused = [TITLES[name] for name, value in served.items() if value == 0]
    because = f"Age of an update behind nginx as it is installed: {_list(ages, 'ms')}."
    if refused:
        because += f" Refused: {', '.join(refused)}."
    # A difference that nobody sees decides nothing.
    visible = {name: max(value, 20.0) for name, value in ages.items()}
    return Decision(work="The progress of one job on a page", choice=_choose(visible), because=because)


def _many_jobs(figures: _Figures) -> Decision | None:
    values = figures.all("wire-idle", "bytes", PUSHED)
    if not values:
        return None
    return Decision(
        work="Many jobs on one page, or in many tabs",
        choice=min(values, key=lambda name: values[name]),
        because=f"Bytes in an idle minute for each of ten streams: {_list(values, 'B')}. "
        "A browser opens at most six HTTP/1.1 connections to a host, besides WebSockets; all streams of "
        "HTTP/2 share one.",
    )


def _control(figures: _Figures) -> Decision | None:
    idle = figures.get("wire-idle", "bytes", "polling")
    update = figures.get("wire-update", "bytes", "websocket")
    if idle is None or update is None:
        return None
    request = idle * POLL_INTERVAL / 60
    return Decision(
        work="The client sends often, too: input, positions, audio",
        choice="websocket",
        because="Only a WebSocket carries both directions. "
        f"A message takes {update:,.0f} B with all it holds; a request of a browser and its response "
        f"take {request:,.0f} B. For a button now and then that does not matter.",
    )


def _unknown_proxy(figures: _Figures) -> Decision | None:
    values = figures.all("proxy-buffering", "p50")
    arrived = figures.all("proxy-buffering", "arrived")
    if not values:
        return None
    return Decision(
        work="A proxy that you do not control, which buffers",
        choice=_choose(values),
        because=f"Age of an update behind nginx with its buffers: {_list(values, 'ms')}; "
        f"arrived in time: {_list(arrived, '%')}. "
        "A server that sends X-Accel-Buffering: no, as this one does, switches nginx's buffers off.",
    )


def _script(figures: _Figures) -> Decision | None:
    values = figures.all("first-near-tcp", "first")
    if "polling" not in values:
        return None
    return Decision(
        work="A script or a cron job that looks now and then",
        choice="polling",
        because=f"One request, and nothing stays open. The state is there after {values['polling']:.1f} ms, "
        f"as with a stream ({TITLES['sse']} {values.get('sse', 0):.1f} ms).",
    )


def _mobile(figures: _Figures) -> Decision | None:
    kept = figures.all("cut-reset", "kept")
    values = {
        name: value
        for name, value in figures.all("cut-reset", "median").items()
        if kept.get(name) == 0  # those that miss nothing
    }
    lost = figures.all("cut-reset", "lost")
    if not values:
        return None
    return Decision(
        work="A phone that changes its network",
        choice=_choose(values),
        because=f"With a cursor nothing is missed, and everything is there after: {_list(values, 'ms')}. "
        f"Updates missed without one: {_list(lost, '')}. "
        "An EventSource sends its cursor by itself; for a WebSocket the program has to.",
    )


def _idle(figures: _Figures) -> Decision | None:
    values = figures.all("memory", "memory", (*PUSHED, "long-poll"))
    if not values:
        return None
    return Decision(
        work="Thousands of watchers of which few see something happen",
        choice=_choose(values),
        because=f"Memory of the server for each: {_list(values, 'KB', 1)}.",
    )


def _busy(figures: _Figures) -> Decision | None:
    scenario = figures.busiest()
    values = {} if scenario is None else figures.all(scenario, "cpu", (*PUSHED, "long-poll"))
    if scenario is None or not values:
        return None
    ages = figures.all(scenario, "p99", (*PUSHED, "long-poll"))
    return Decision(
        work="Many updates to many watchers",
        choice=_choose(values),
        because=f"CPU of the server for 1,000 deliveries: {_list(values, 'ms', 1)}; "
        f"age of the latest 1 %: {_list(ages, 'ms')}.",
    )


def _loss(figures: _Figures) -> Decision | None:
    values = figures.all("network-loss", "p99", PUSHED)
    if not values:
        return None
    far = figures.all("network-loss", "p50", ("long-poll",))
    because = f"Age of the latest 1 % when 2 % of packets are lost: {_list(values, 'ms')}."
    if far:
        because += f" Long polling asks for each update first: its median is {far['long-poll']:.0f} ms."
    return Decision(work="A poor network", choice=_choose(values), because=because)


def _frugal(figures: _Figures) -> Decision | None:
    values = figures.all("wire-update", "bytes")
    if not values:
        return None
    return Decision(
        work="Updates come faster than anybody needs to see them, and data is dear",
        choice=_choose(values),
        because=f"Bytes for each of ten updates per second: {_list(values, 'B')}. "
        f"Polling sees one state every {POLL_INTERVAL:g} seconds, and pays for it when nothing happens, too.",
    )


_ROWS: tuple[Callable[[_Figures], Decision | None], ...] = (
    _one_job,
    _many_jobs,
    _control,
    _unknown_proxy,
    _script,
    _mobile,
    _idle,
    _busy,
    _loss,
    _frugal,
)
