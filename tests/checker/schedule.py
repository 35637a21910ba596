"""Makes the steps of a run from a seed. Pure: the same seed and profile always give the same steps."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["PROFILES", "Profile", "Schedule", "Step", "dump_steps", "generate", "load_steps"]

TRANSPORTS = ("sse", "ws", "poll")


class Step(NamedTuple):
    """One step: what is done, to which publisher, client or instance, and how much or how."""

    action: str
    who: int = 0
    amount: int = 0
    how: str = ""


class Profile(NamedTuple):
    """What may happen.

    Args:
        instances: of the server.
        actions: the actions by how often they are chosen.
        history: numbers of events that a log may keep.
        losses: actions that may lose what was acknowledged; clients must then be told.
    """

    instances: int
    actions: dict[str, int]
    history: Sequence[int] = (10, 40, 10_000)
    losses: Sequence[str] = ()


class Schedule(NamedTuple):
    """A run. ``settings`` are the server's."""

    profile: str
    seed: int
    publishers: int
    clients: int
    history_events: int
    buffer_events: int
    steps: list[Step]


_CLIENTS = {"publish": 30, "run": 14, "move": 14, "away": 4, "stall": 6, "catch up": 2}
_SESSIONS = {"delete": 1, "attempt": 1}
_REDIS = {
    "kill": 3,
    "drain": 3,
    "kill redis": 2,
    "pause redis": 2,
    "cut": 3,
    "block": 3,
    "drop pubsub": 3,
}

PROFILES = {
    "memory": Profile(1, {**_CLIENTS, **_SESSIONS, "kill": 1, "drain": 1}, losses=["kill", "drain"]),
    "sqlite": Profile(1, {**_CLIENTS, **_SESSIONS, "kill": 4, "drain": 4}),
    "shared": Profile(3, {**_CLIENTS, **_SESSIONS, "kill": 3, "drain": 3, "cut": 3, "drop pubsub": 3}),
    "redis": Profile(3, {**_CLIENTS, **_SESSIONS, **_REDIS}),
    # A replica that follows for the first time makes Redis begin another generation: that is like a loss.
    "redis-loss": Profile(
        3, {**_CLIENTS, **_REDIS, "lose": 4, "save": 3, "lag": 4}, losses=["lose", "kill redis", "lag"]
    ),
}

# A fault and what ends it, a few steps later.
_ENDS = {
    "away": "back",
    "stall": "read on",
    "kill": "start",
    "kill redis": "start redis",
    "pause redis": "continue redis",
    "cut": "heal",
    "block": "heal",
    "lag": "catch up replica",
}


def generate(profile_name: str, seed: int) -> Schedule:
    """Return the schedule of a seed."""
    choice = random.Random(f"{profile_name} {seed}")
    profile = PROFILES[profile_name]
    publishers, clients = choice.randint(2, 4), choice.randint(2, 4)
    # Few kinds of faults in one run, but many of each: then they meet.
    faults = [name for name in profile.actions if name not in ("publish", "run", "move")]
    chosen = set(choice.sample(faults, min(len(faults), choice.randint(1, 4)))) | {"publish", "run", "move"}
    if "lose" in profile.losses:
        chosen |= {"lose", "save", "lag"}
    actions = {name: weight for name, weight in profile.actions.items() if name in chosen}
    steps: list[Step] = []
    due: dict[int, list[Step]] = {}  # what ends a fault, by the number of the step that it comes before
    for number in range(choice.randint(10, 30)):
        steps += due.pop(number, [])
        action = choice.choices(list(actions), list(actions.values()))[0]
        step = _step(choice, action, profile, publishers, clients)
        steps.append(step)
        if action in _ENDS:
            due.setdefault(number + choice.randint(1, 8), []).append(step._replace(action=_ENDS[action]))
    return Schedule(
        profile_name,
        seed,
        publishers,
        clients,
        choice.choice(profile.history),
        choice.choice((4, 1024)),
        steps,
    )


def _step(choice: random.Random, action: str, profile: Profile, publishers: int, clients: int) -> Step:
    instance = choice.randrange(profile.instances)
    match action:
        case "publish":
            kinds = ("note", "progress", "mixed", "large", "hasty", "impatient")
            return Step(action, choice.randrange(publishers), choice.randint(1, 12), choice.choice(kinds))
        case "run" | "catch up":  # until so many requests are answered, or all clients have everything
            return Step(action, 0, choice.randint(1, 12))
        case "move":
            return Step(action, choice.randrange(clients), instance, choice.choice(TRANSPORTS))
        case "away" | "stall":
            return Step(action, choice.randrange(clients))
        case "block":
            return Step(action, instance, 0, choice.choice(("requests", "responses", "both")))
        case "kill redis" | "save" | "lag":
            return Step(action)
        case "lose":
            return Step(action, 0, 0, choice.choice(("all", "since save", "fail over")))
        case _:
            return Step(action, instance)


def dump_steps(steps: Sequence[Step]) -> str:
    """Return steps as JSON."""
    return json.dumps([list(step) for step in steps], separators=(",", ":"))


def load_steps(text: str) -> list[Step]:
    """Return the steps that ``dump_steps`` has written."""
    return [Step(*step) for step in json.loads(text)]
