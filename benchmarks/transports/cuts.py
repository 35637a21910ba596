"""Scenarios: what clients miss while the network is away, and how soon they have everything again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from ..report.progress import Progress
from ..results import Figure, Round, Scenario
from .bed import Bed, Plan, find_faults
from .clients import RECONNECT
from .network import CLEAN, Conditions, Network, missing

__all__ = ["cut_steps", "measure_cuts", "recovery_times"]

CLIENTS = 20
RATE = 10.0
BEFORE, AFTER = 0.5, 2.0  # seconds of publishing before the network goes, and after it is back


def cut_steps(plan: Plan) -> int:
    """Return the number of steps."""
    return 2 * plan.rounds


def measure_cuts(plan: Plan, progress: Progress) -> Iterator[Scenario]:
    """Take the network away, in two ways, from all transports at the same time."""
    figures = [
        Figure(key="median", label="until everything is there, median", unit="ms", better="less"),
        Figure(key="slowest", label="the same, slowest client", unit="ms", better="less", plot="none"),
        Figure(key="kept", label="updates missed, with a cursor", unit="updates", better="less", plot="none"),
        Figure(key="lost", label="updates missed, without a cursor", unit="updates", better="less"),
    ]
    parameters: dict[str, str | float] = {
        "clients": CLIENTS,
        "events per second": RATE,
        "seconds without network": plan.offline,
    }
    notes = [
        "The time is from when the network is back until a client has all that was published before.",
        "It is that of clients with a cursor; those of polling have none, and have the newest state only.",
        "Updates missed are those of one client on average. Twenty clients with a cursor and twenty without.",
    ]
    reset = Scenario(
        name="cut-reset",
        group="cuts",
        title="The device changes its network: all connections are lost",
        question="What is missed when connections break, and how soon is it there?",
        figures=figures,
        parameters=parameters,
        notes=[
            *notes,
            f"Clients know at once that their connection is lost, and try again every {RECONNECT:g} s.",
            "An EventSource of a browser waits for 3 to 5 s unless the server says otherwise (retry_ms).",
            "A WebSocket is opened again by the program that uses it, if it does.",
        ],
    )
    silence = Scenario(
        name="cut-silence",
        group="cuts",
        title="No signal for some seconds: packets are lost, connections remain",
        question="What is missed in a tunnel, and how soon is it there?",
        figures=figures,
        parameters=parameters,
        notes=[*notes, "TCP sends again what was lost, each time after twice as long."],
    )
    for scenario, needs_network in ((reset, False), (silence, True)):
        why = missing() if needs_network else None
        if why:
            scenario.skipped = dict.fromkeys(plan.transports, why)
        for number in range(1, plan.rounds + 1):
            progress.start(f"{scenario.title}: round {number} of {plan.rounds}")
            if not why:
                with ExitStack() as stack:
                    network = stack.enter_context(Network()) if needs_network else None
                    bed = stack.enter_context(Bed(network))
                    scenario.rounds += _cut(bed, network, plan, number)
            progress.finish(f"{scenario.name} {number}: {_describe(scenario, number)}")
        yield scenario


def _cut(bed: Bed, network: Network | None, plan: Plan, number: int) -> list[Round]:
    session = bed.new_session()
    groups = {
        (transport, keeps_cursor): bed.add_clients()
        for transport in plan.transports
        for keeps_cursor in (True, False)
        if not (keeps_cursor and transport == "polling")
    }
    for (transport, keeps_cursor), process in groups.items():
        bed.open(transport, session, CLIENTS, interval=1 / RATE, keeps_cursor=keeps_cursor, clients=process)
    count = int((BEFORE + plan.offline + AFTER) * RATE)
    cut = {} if network else {"cut_after": BEFORE, "offline": plan.offline}
    bed.start_publishing(session, 1, count, 1 / RATE)
    for process in groups.values():
        process.start("watch", until=count, patience=10.0, **cut)
    back = 0
    if network is not None:
        time.sleep(BEFORE)  # the clients are other processes
        network.change(Conditions(is_down=True))
        time.sleep(plan.offline)
        network.change(CLEAN)
        back = time.monotonic_ns()
    start = int(bed.publisher.result(120)["start"])
    seen = {key: process.result(120) for key, process in groups.items()}
    rounds = []
    for transport in plan.transports:
        without = seen[transport, False]
        watched = seen.get((transport, True), without)
        times = recovery_times(watched["arrivals"], back or watched["back"], start, 1 / RATE)
        values = {
            "median": statistics.median(times),
            "slowest": max(times),
            "lost": sum(without["missed"]) / CLIENTS,
        }
        faults = []
        if (transport, True) in seen:
            values["kept"] = sum(watched["missed"]) / CLIENTS
            faults = find_faults(transport, watched)
        rounds.append(
            Round(
                contender=transport,
                number=number,
                values=values,
                load=watched["load"],
                faults=faults,
                samples={"median": sorted(times)},
            )
        )
    return rounds


def recovery_times(
    arrivals: list[list[tuple[int, int]]], back: int, start: int, interval: float
) -> list[float]:
    """Return how long each client took until it had all that was published before the network was back.

    Args:
        arrivals: the numbers and times, in nanoseconds, of what each client got.
        back: when the network was back, in nanoseconds.
        start: when number 1 was to be published, likewise.
        interval: seconds between two.

    Returns:
        Milliseconds. A client that never had all is not in it.
    """
    last = 1 + int((back - start) / 1e9 / interval)
    firsts = [next((at for number, at in own if number >= last), None) for own in arrivals]
    return [max(at - back, 0) / 1e6 for at in firsts if at is not None]


def _describe(scenario: Scenario, number: int) -> str:
    def line(turn: Round) -> str:
        values: dict[str, Any] = turn.values
        text = f"{turn.contender} {values['median']:.0f} ms, missed {values.get('kept', 0):.1f}"
        return f"{text} or {values['lost']:.1f}" + (f" !! {turn.faults}" if turn.faults else "")

    return "; ".join(line(turn) for turn in scenario.rounds if turn.number == number) or "skipped"
