"""Scenarios: delay, loss and little bandwidth; nginx in front; and the time to the first event."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack

from ..report.progress import Progress
from ..results import Figure, Round, Scenario
from .bed import Bed, Delivery, Plan, describe
from .connection import Address
from .latency import DELIVERY
from .network import CLEAN, Conditions, Network, missing
from .proxy import BUFFERING, DEFAULT, OURS, Nginx, missing_nginx

__all__ = [
    "condition_steps",
    "first_steps",
    "measure_conditions",
    "measure_first",
    "measure_proxies",
    "proxy_steps",
]

CLIENTS = 10
RATE = 10.0
FAR = Conditions(delay=0.05)
CONDITIONS = {
    "delay": ("a delay of 50 ms each way", FAR),
    "loss": ("a delay of 50 ms each way, and 2 % of packets lost", Conditions(delay=0.05, loss=0.02)),
    "bandwidth": ("512 kbit/s, and a delay of 50 ms each way", Conditions(delay=0.05, rate=512_000)),
}
SITES = {
    "default": ("nginx with its default configuration", DEFAULT),
    "buffering": ("nginx by default, in front of a server that does not switch its buffers off", BUFFERING),
    "ours": ("nginx with examples/deploy/nginx.conf", OURS),
}


def condition_steps(plan: Plan) -> int:
    """Return the number of steps."""
    return len(plan.conditions) * plan.rounds * len(plan.transports)


def measure_conditions(plan: Plan, progress: Progress) -> Iterator[Scenario]:
    """Publish over a link that is made worse."""
    why = missing()
    for key in plan.conditions:
        title, conditions = CONDITIONS[key]
        scenario = Scenario(
            name=f"network-{key}",
            group="network",
            title=f"Latency over a network with {title}",
            question="How old is an update when a client has read it?",
            parameters={"clients": CLIENTS, "events per second": RATE, "network": title},
            figures=DELIVERY,
            notes=[
                "From the time when it was to be published; if it is skipped, until a newer one is seen.",
            ],
        )
        if why:
            scenario.skipped = dict.fromkeys(plan.transports, why)
            for _ in range(plan.rounds * len(plan.transports)):
                progress.finish(f"{scenario.name}: skipped")
            yield scenario
            continue
        with Network() as network, Bed(network) as bed:
            scenario.notes.append(
                "The delay, the losses and the rate are netem's, of the kernel."
                if network.has_netem
                else "The delay, the losses and the rate are those of a process that forwards each IP packet."
            )
            for number in range(1, plan.rounds + 1):
                for transport in plan.transports:
                    progress.start(f"{scenario.title}: {transport}, round {number} of {plan.rounds}")
                    network.change(conditions)
                    turn = Delivery(bed, transport, watchers=CLIENTS, rate=RATE, seconds=plan.seconds).round(
                        number
                    )
                    network.change(CLEAN)
                    scenario.rounds.append(turn)
                    progress.finish(f"{scenario.name} {describe(turn)}")
        yield scenario


def proxy_steps(plan: Plan) -> int:
    """Return the number of steps."""
    return len(plan.sites) * len(plan.transports)


def measure_proxies(plan: Plan, progress: Progress) -> Iterator[Scenario]:
    """Publish to clients behind nginx with several configurations."""
    why = missing_nginx()
    for key in plan.sites:
        title, site = SITES[key]
        scenario = Scenario(
            name=f"proxy-{key}",
            group="proxy",
            title=f"Behind {title}",
            question="Which transports work behind a proxy, and how late are updates then?",
            parameters={"clients": CLIENTS, "events per second": RATE, "proxy": "nginx, TLS"},
            figures=[
                Figure(key="served", label="clients served", unit="%", better="more", plot="none"),
                Figure(key="first", label="connect to first event", unit="ms", better="less"),
                Figure(key="arrived", label="updates arrived in time", unit="%", better="more", plot="none"),
                *DELIVERY,
            ],
            notes=[
                "In time: within six seconds after the last one was published, or superseded by then.",
                "SSE over HTTP/2 is HTTP/2 up to nginx, and HTTP/1 from there on.",
            ],
            headline="p50",
        )
        if why:
            scenario.skipped = dict.fromkeys(plan.transports, why)
            for _ in plan.transports:
                progress.finish(f"{scenario.name}: skipped")
            yield scenario
            continue
        with Bed() as bed, Nginx(site, bed) as nginx:
            for transport in plan.transports:
                progress.start(f"{scenario.title}: {transport}")
                buffers = site is BUFFERING
                turn = _deliver_behind(bed, nginx.address, transport, plan.seconds, buffers=buffers)
                scenario.rounds.append(turn)
                text = describe(turn) if turn.values["served"] else f"{transport}: refused"
                progress.finish(f"{scenario.name} {text}")
        yield scenario


def _deliver_behind(bed: Bed, address: Address, transport: str, seconds: float, *, buffers: bool) -> Round:
    delivery = Delivery(
        bed, transport, watchers=CLIENTS, rate=RATE, seconds=seconds, address=address, waits=not buffers
    )
    if delivery.refused or delivery.seen["refused"]:
        return Round(contender=transport, number=1, values={"served": 0.0})
    seen, turn = delivery.seen, delivery.round(1)
    turn.values["arrived"] = 100 * sum(last for last in seen["last"]) / delivery.deliveries
    turn.faults = [] if buffers else turn.faults  # what waits in nginx is late, not lost
    turn.values["served"] = 100.0
    if seen["first"]:
        turn.values["first"] = statistics.median(seen["first"])
    return turn


def first_steps(plan: Plan) -> int:
    """Return the number of steps."""
    return len(plan.firsts) * len(plan.transports)


def measure_first(plan: Plan, progress: Progress) -> Iterator[Scenario]:
    """Open one client after another: near and far, with TCP alone and with TLS."""
    for far, tls in plan.firsts:
        where = "over a round trip of 100 ms" if far else "on loopback"
        how = "through TLS and nginx" if tls else "over TCP"
        scenario = Scenario(
            name=f"first-{'far' if far else 'near'}-{'tls' if tls else 'tcp'}",
            group="first",
            title=f"Time to the first event {where}, {how}",
            question="How long does a page wait from connecting until it shows the state?",
            parameters={"opened": plan.opens, "network": where, "connection": how},
            figures=[Figure(key="first", label="connect to first event", unit="ms", better="less")],
            notes=["One client after another, each with a new connection. The session has a state."],
        )
        why = (missing() if far else None) or (missing_nginx() if tls else None)
        with ExitStack() as stack:
            if why:
                scenario.skipped = dict.fromkeys(plan.transports, why)
            else:
                network = stack.enter_context(Network()) if far else None
                bed = stack.enter_context(Bed(network))
                address = stack.enter_context(Nginx(OURS, bed)).address if tls else bed.address
                if network is not None:
                    network.change(FAR)
            for transport in plan.transports:
                progress.start(f"{scenario.title}: {transport}")
                if not why:
                    scenario.rounds.append(_open_one_by_one(bed, address, transport, plan.opens))
                values = scenario.rounds[-1].values if scenario.rounds else {}
                progress.finish(f"{scenario.name} {transport}: {values or 'skipped'}")
        yield scenario


def _open_one_by_one(bed: Bed, address: Address, transport: str, number: int) -> Round:
    session = bed.new_session()
    times = [bed.open(transport, session, 1, address=address)["first"][0] for _ in range(number)]
    bed.clients.call("close")
    values = {"first": statistics.median(times)}
    return Round(contender=transport, number=1, values=values, samples={"first": sorted(times)})
