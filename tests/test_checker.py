"""The checker finds what is wrong with a history, and nothing in one that is right."""

from __future__ import annotations

from functools import partial

import pytest
from checker.check import check
from checker.history import Complete, History, Joined, Message, Observation, Publish
from checker.schedule import PROFILES, dump_steps, generate, load_steps
from checker.shrink import shrink

EVENTS = 6  # of the log of ``example``: created, four notes and progress in turn, the end


def event(seq: int, payload: str | None = None, epoch: str = "e1") -> Message:
    """An event of the log: note at an even seq, progress at an odd one, at last the end."""
    payload = f"p{seq}" if payload is None else payload
    if seq % 2 == 0 and seq != EVENTS:
        return Message("note", {"payload": payload}, f"{epoch}-{seq}")
    name = "complete" if seq == EVENTS else "progress"
    return Message(name, {"message": "" if seq == 1 else payload}, f"{epoch}-{seq}")


def snapshot(seq: int, epoch: str = "e1") -> Message:
    """What a client gets first at ``seq``: the last progress, with the cursor of the last event."""
    payload = "" if seq < 3 else f"p{min(seq, EVENTS) - (seq % 2 == 0 and seq < EVENTS)}"
    return Message("complete" if seq == EVENTS else "progress", {"message": payload}, f"{epoch}-{seq}")


def resume(status: str, missed: int) -> Message:
    return Message("resume", {"status": status, "missed": missed})


def join(cursor: str | None, tick: int = 0, transport: str = "sse") -> Joined:
    return Joined(cursor, transport, tick)


def publish(seq: int, epoch: str = "e1", **changes: object) -> Publish:
    kind = "end" if seq == EVENTS else "progress" if seq % 2 else "note"
    fields = {"outcome": "acknowledged", "cursor": f"{epoch}-{seq}", **changes}
    return Publish(f"p{seq}", kind, 10 * seq, 10 * seq + 5, **fields)


def example(**changes: object) -> History:
    """A history in which all is well: one client throughout, one that reconnects, one that polls."""
    history = History(
        publishes=[publish(seq) for seq in range(2, EVENTS + 1)],
        clients=[
            [join(None), snapshot(1), *map(event, range(2, EVENTS + 1)), Complete()],
            [
                *(join(None), snapshot(2), event(3)),
                *(join("e1-3", 40, "ws"), resume("ok", 0), event(4), event(5)),
                *(join("e1-5", 50, "poll"), resume("ok", 0), event(6), Complete()),
            ],
            [join(None, 0, "poll"), event(1), event(2), event(3), event(4), event(5), event(6)],
        ],
        logs=[[event(seq) for seq in range(1, EVENTS + 1)]] * 2,
    )
    for name, value in changes.items():
        setattr(history, name, value)
    return history


def rules(history: History) -> set[str]:
    return {violation.rule for violation in check(history)}


def with_client(*observations: Observation, **changes: object) -> History:
    return example(clients=[list(observations)], **changes)


def with_second_log(**changes: object) -> History:
    """The log was replaced after the third event, and one client saw both."""
    old = [join(None), snapshot(1), event(2), event(3)]
    new = [join("e1-3"), resume("reset", 1), snapshot(1, "e2")]
    log = [event(1, epoch="e2"), *(event(seq, f"n{seq}", "e2") for seq in range(2, EVENTS + 1))]
    publishes = [publish(2), publish(3)]
    publishes += [
        Publish(f"n{seq}", publish(seq).kind, 50 + seq, 51 + seq, "acknowledged", f"e2-{seq}")
        for seq in range(2, EVENTS + 1)
    ]
    history = example(clients=[[*old, *new, *log[1:]]], logs=[log], publishes=publishes, deletions=1)
    for name, value in changes.items():
        setattr(history, name, value)
    return history


RIGHT = {
    "all is well": example,
    "no answer, and stored": lambda: example(
        publishes=[*example().publishes[:-1], publish(6, outcome="in doubt", cursor=None)]
    ),
    "no answer, and not stored": lambda: example(
        publishes=[*example().publishes, Publish("x", "note", 1, 2, "in doubt")]
    ),
    "refused": lambda: example(publishes=[*example().publishes, Publish("x", "note", 1, 2, "refused")]),
    "another log": with_second_log,
    "the session was deleted": lambda: with_client(
        *(join(None), snapshot(2), Message("deleted", {}), join("e1-2"), resume("ok", 0)),
        *map(event, range(3, 7)),
        deletions=1,
    ),
    "a gap": lambda: with_client(
        *(join(None), snapshot(1), join("e1-1"), resume("gap", 4), snapshot(5), event(6)),
        history_events=3,
        logs=[[event(4), event(5), event(6)]],
    ),
    "a gap during the replay": lambda: with_client(
        *(join(None), snapshot(1), join("e1-1"), resume("ok", 0), event(2)),
        *(resume("gap", 3), snapshot(5), event(6)),
        history_events=2,
    ),
    "conflated": lambda: with_client(join(None), snapshot(2), event(4), event(5), event(6), conflated=1),
    "disconnected because it reads too slowly": lambda: with_client(
        *(join(None), snapshot(2), Message("overflow", {}), join("e1-2"), resume("ok", 0)),
        *map(event, range(3, 7)),
    ),
}

EXTRA = event(7, "p9")

WRONG = {
    "a problem": (lambda: example(problems=["a crash"]), "problem"),
    "an event is not delivered": (
        lambda: with_client(join(None), snapshot(2), event(3), event(5), event(6)),
        "missing",
    ),
    "an event is missed while reconnecting": (
        lambda: with_client(
            join(None), snapshot(2), join("e1-2"), resume("ok", 0), event(4), event(5), event(6)
        ),
        "missing",
    ),
    "progress is missing that no instance has conflated": (
        lambda: with_client(join(None), snapshot(2), event(4), event(5), event(6)),
        "missing",
    ),
    "more progress is missing than was conflated": (
        lambda: example(clients=[[join(None), snapshot(2), event(4), event(5), event(6)]] * 2, conflated=1),
        "missing",
    ),
    "an event is delivered twice": (
        lambda: with_client(join(None), snapshot(2), event(3), event(3), event(4), event(5), event(6)),
        "backwards",
    ),
    "an event is delivered again after reconnecting": (
        lambda: with_client(join(None), snapshot(3), join("e1-3"), resume("ok", 0), *map(event, range(3, 7))),
        "backwards",
    ),
    "events are delivered in another order": (
        lambda: with_client(join(None), snapshot(2), event(4), event(3), event(5), event(6)),
        "backwards",
    ),
    "an acknowledged event is not in the log": (
        lambda: example(
            logs=[[event(seq) for seq in range(1, 6)] + [event(6)], []],
            publishes=[*example().publishes, Publish("x", "note", 1, 2, "acknowledged", "e1-9")],
        ),
        "lost",
    ),
    "an event was acknowledged, and another is in its place": (
        lambda: example(
            publishes=[*example().publishes[:-1], Publish("x", "end", 60, 65, "acknowledged", "e1-6")]
        ),
        "replaced",
    ),
    "one place was acknowledged twice": (
        lambda: example(publishes=[*example().publishes, Publish("x", "note", 1, 2, "acknowledged", "e1-4")]),
        "replaced",
    ),
    "two clients see different events": (
        lambda: example(
            clients=[
                *example().clients,
                [join(None), snapshot(3), event(4, "p2"), event(5), event(6)],
            ]
        ),
        "replaced",
    ),
    "a client sees other bytes of the same payload": (
        lambda: example(
            clients=[
                *example().clients,
                [
                    join(None),
                    snapshot(3),
                    Message("note", {"payload": "p4", "fill": "x"}, "e1-4"),
                    event(5),
                    event(6),
                ],
            ]
        ),
        "replaced",
    ),
    "a retried request is stored twice": (
        lambda: example(
            publishes=[publish(2), publish(4), publish(6)],
            logs=[[event(1), event(2), event(3, "p2"), event(4), event(5, "p4"), event(6)]],
            clients=[],
        ),
        "doubled",
    ),
    "a retried request is stored in the next attempt too": (
        lambda: with_second_log(
            deletions=0, attempts=1, logs=[[event(1, epoch="e2"), event(2, "p2", "e2"), event(6, "n6", "e2")]]
        ),
        "doubled",
    ),
    "an event overtakes one that was acknowledged before": (
        lambda: example(
            publishes=[
                *(publish(2), publish(3), Publish("p4", "note", 52, 53, "acknowledged", "e1-4")),
                *(Publish("p5", "progress", 44, 45, "acknowledged", "e1-5"), publish(6)),
            ]
        ),
        "order",
    ),
    "no verdict": (
        lambda: with_client(join(None), snapshot(2), join("e1-2"), *map(event, range(3, 7))),
        "untold",
    ),
    "another log without a reset": (
        lambda: with_second_log(
            clients=[
                [
                    *(join(None), snapshot(1), event(2), event(3)),
                    *(event(seq, f"n{seq}", "e2") for seq in range(4, 7)),
                ]
            ]
        ),
        "untold",
    ),
    "another log, and the verdict is ok": (
        lambda: with_second_log(
            clients=[
                [
                    *(join(None), snapshot(1), event(2), event(3), join("e1-3"), resume("ok", 0)),
                    *(event(seq, f"n{seq}", "e2") for seq in range(4, 7)),
                ]
            ]
        ),
        "untold",
    ),
    "a session that nobody has deleted": (
        lambda: with_client(join(None), snapshot(5), Message("deleted", {}), event(6)),
        "untold",
    ),
    "a gap that need not be": (
        lambda: with_client(join(None), snapshot(1), join("e1-1"), resume("gap", 4), snapshot(5), event(6)),
        "verdict",
    ),
    "another number of events is missed than said": (
        lambda: with_client(
            *(join(None), snapshot(1), join("e1-1"), resume("gap", 3), snapshot(5), event(6)),
            history_events=3,
        ),
        "verdict",
    ),
    "a reset to the same log": (
        lambda: with_client(join(None), snapshot(1), join("e1-1"), resume("reset", 5), snapshot(5), event(6)),
        "verdict",
    ),
    "a reset without a reason": (partial(with_second_log, deletions=0), "epoch"),
    "a snapshot that is older than its cursor": (
        lambda: with_client(join(None), Message("progress", {"message": "p3"}, "e1-5"), event(6)),
        "snapshot",
    ),
    "a snapshot that lacks what was acknowledged before": (
        lambda: with_client(join(None, 48), snapshot(3), *map(event, range(4, 7))),
        "snapshot",
    ),
    "the log goes on after its end": (
        lambda: example(logs=[[*(event(seq) for seq in range(1, 7)), EXTRA]]),
        "terminal",
    ),
    "a client is told too early that it has everything": (
        lambda: with_client(join(None), snapshot(5), Complete(), join("e1-5"), resume("ok", 0), event(6)),
        "terminal",
    ),
    "the log has no end": (lambda: example(logs=[[event(1), event(2)]]), "terminal"),
    "the log has a gap": (lambda: example(logs=[[event(1), *map(event, range(3, 7))]]), "log"),
    "the log was trimmed too much": (lambda: example(logs=[[event(4), event(5), event(6)]]), "log"),
    "the instances have different logs": (
        lambda: example(logs=[[event(5), event(6)], [event(6)]], history_events=1),
        "log",
    ),
    "an event that nobody has published": (
        lambda: example(publishes=example().publishes[1:]),
        "log",
    ),
    "an event that was refused": (
        lambda: example(publishes=[publish(2, outcome="refused", cursor=None), *example().publishes[1:]]),
        "log",
    ),
    "a client does not get to the end": (lambda: with_client(join(None), snapshot(5)), "converge"),
    "a client saw nothing": (lambda: with_client(), "converge"),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_a_right_history(make):
    assert check(make()) == []


@pytest.mark.parametrize(("make", "rule"), WRONG.values(), ids=WRONG)
def test_a_wrong_history(make, rule):
    assert rule in rules(make())


# Schedules


@pytest.mark.parametrize("profile", PROFILES)
def test_a_seed_makes_its_schedule(profile):
    schedules = [generate(profile, seed) for seed in range(50)]
    assert schedules == [generate(profile, seed) for seed in range(50)]
    actions = {step.action for schedule in schedules for step in schedule.steps}
    assert actions >= set(PROFILES[profile].actions)
    steps = schedules[0].steps
    assert load_steps(dump_steps(steps)) == steps


async def test_a_failing_schedule_is_reduced():
    """To the steps that make it fail together, wherever they are in it."""
    runs = []

    async def fails(steps: list[int]) -> bool:
        runs.append(steps)
        return 3 in steps and 40 in steps[steps.index(3) :]

    assert await shrink(range(50), fails) == [3, 40]
    assert len(runs) < 60


async def test_reducing_ends_in_time():
    async def fails(steps: list[int]) -> bool:
        return False

    assert await shrink([1, 2, 3, 4], fails, until=lambda: True) == [1, 2, 3, 4]
