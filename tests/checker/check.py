"""What must be true of every history.

1. ``replaced``: one epoch and seq stand for one event, for everybody, in every response.
2. ``lost``: what was acknowledged is in the log where its response said, unless the log was trimmed.
3. ``doubled``: what was published once is in a log once, whatever was retried.
4. ``order``: a request that began after another was acknowledged is behind it.
5. ``missing``, ``backwards``: a client gets the next event, and no other, unless it is told otherwise.
6. ``untold``: a client that joins with a cursor is told how that went; another epoch begins with ``reset``.
7. ``verdict``: what it is told is true: what was missed, and that it could not have been sent.
8. ``snapshot``: it has the last progress before it, and all that was acknowledged before it was asked for.
9. ``terminal``: nothing follows the end, and the end is reached.
10. ``log``: every instance returns the same log, without gaps, of what was published and of nothing else.
11. ``epoch``: a log begins another epoch only for a reason.
12. ``converge``: at the end every client has everything.
"""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

from sseserve.model import Cursor

from .history import TERMINAL_EVENTS, Complete, History, Joined, Message, Publish, payload_of

__all__ = ["Violation", "check"]

Place = tuple[str, int]  # epoch and seq


class Violation(NamedTuple):
    """A rule that a history violates, and where."""

    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


def check(history: History) -> list[Violation]:
    """Return everything that a history violates; nothing if all is well."""
    return _Check(history).run()


def _place(cursor: Cursor) -> Place:
    return cursor.epoch, cursor.seq


def _content(message: Message) -> str:
    return f"{message.event} {json.dumps(message.data, sort_keys=True)}"


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:120]}... ({len(text)} characters)"


class _Check:
    def __init__(self, history: History) -> None:
        self.history = history
        self.violations: list[Violation] = []
        self.events: dict[Place, Message] = {}  # everything that anybody got as an event
        self.payloads: dict[Place, str] = {}
        self.places: dict[str, set[Place]] = defaultdict(set)  # of a payload
        self.acknowledged: dict[Place, Publish] = {}
        self.dropped = 0  # progress events that a client did not get, and that may have been conflated
        self.snapshots: list[tuple[str, Place, Message]] = []
        # Events that a client did not get: who, the first and the last.
        self.skipped: list[tuple[str, Place, int]] = []
        self.completed: list[tuple[str, Place | None]] = []

    def run(self) -> list[Violation]:
        for problem in self.history.problems:
            self.violate("problem", problem)
        self.read_acknowledgements()
        for number, log in enumerate(self.history.logs):
            self.check_log(f"the log of instance {number}", log)
        final = self.check_end()
        for number, observations in enumerate(self.history.clients):
            self.check_client(f"client {number}", observations, final)
        self.check_skipped()
        self.check_completed()
        self.check_snapshots()
        self.check_terminals()
        self.check_acknowledged(final)
        self.check_payloads()
        self.check_order()
        self.check_epochs()
        return self.violations

    def violate(self, rule: str, text: str) -> None:
        self.violations.append(Violation(rule, text))

    # What is where

    def read_acknowledgements(self) -> None:
        for publish in self.history.publishes:
            if publish.outcome != "acknowledged":
                continue
            cursor = Cursor.parse(publish.cursor or "")
            if cursor is None:
                self.violate("lost", f"{publish.payload} was acknowledged without a cursor")
                continue
            place = _place(cursor)
            if (other := self.acknowledged.get(place)) is not None:
                self.violate(
                    "replaced", f"{cursor} was acknowledged to {other.payload} and {publish.payload}"
                )
            self.acknowledged[place] = publish
            self.note_payload(place, publish.payload)

    def note_event(self, who: str, place: Place, message: Message) -> None:
        known = self.events.setdefault(place, message)
        if known is not message and _content(known) != _content(message):
            self.violate(
                "replaced",
                f"{message.id} is {_short(_content(known))}, but to {who} {_short(_content(message))}",
            )
        if (payload := payload_of(message)) is not None:
            self.note_payload(place, payload)

    def note_payload(self, place: Place, payload: str) -> None:
        if self.payloads.setdefault(place, payload) != payload:
            self.violate("replaced", f"{'-'.join(map(str, place))} is {self.payloads[place]} and {payload}")
        self.places[payload].add(place)

    # Logs

    def check_log(self, who: str, log: list[Message]) -> None:
        for message in log:
            if (cursor := message.place) is None:
                self.violate("log", f"{who} has {message}")
            else:
                self.note_event(who, _place(cursor), message)
        places = [cursor for message in log if (cursor := message.place) is not None]
        for before, after in pairwise(places):
            if (after.epoch, after.seq) != (before.epoch, before.seq + 1):
                self.violate("log", f"in {who} {after} follows {before}")
        if places and len(places) < min(places[-1].seq, self.history.history_events):
            self.violate("log", f"{who} has {len(places)} events, though it keeps more")

    def check_end(self) -> Place | None:
        """Compare the logs; return the end of the last one."""
        ends = set()
        for number, log in enumerate(self.history.logs):
            if not log or log[-1].event not in TERMINAL_EVENTS:
                self.violate("terminal", f"the log of instance {number} does not end with a terminal event")
            ends.add((len(log), log[-1].id if log else None))
        if len(ends) > 1:
            self.violate("log", f"the instances return different logs: {sorted(ends, key=str)}")
        last = next((log[-1].place for log in self.history.logs if log), None)
        return None if last is None else _place(last)

    # Clients

    def check_client(self, who: str, observations: list, final: Place | None) -> None:
        position: Place | None = None
        expected = "nothing"
        verdict: dict = {}
        tick = 0
        for observation in observations:
            if isinstance(observation, Joined):
                tick = observation.tick
                expected = "verdict"
                if observation.cursor is None:
                    expected = "first" if observation.transport == "poll" else "snapshot"
                verdict = {}
                continue
            if isinstance(observation, Complete):
                self.completed.append((who, position))
                continue
            message = observation
            if message.event == "resume":
                if expected == "snapshot" and not verdict:
                    self.violate("verdict", f"{who} came without a cursor and got {message.data}")
                verdict = message.data
                if verdict["status"] == "ok":
                    if expected != "verdict" or verdict["missed"]:
                        self.violate("verdict", f"{who} got {verdict} in the middle of a stream")
                    expected = "next"
                else:
                    expected = "snapshot"
                continue
            if (cursor := message.place) is None:
                self.check_notice(who, message)
                continue
            place = _place(cursor)
            if expected == "verdict":
                self.violate("untold", f"{who} came with a cursor and got {message.id} without a verdict")
                expected = "next"
            if expected == "snapshot":
                self.check_snapshot_place(who, position, verdict, place, tick)
                self.snapshots.append((who, place, message))
            else:
                if expected == "next":
                    self.check_next(who, position, place)
                self.note_event(who, place, message)
            position, expected, verdict = place, "next", {}
        if final is not None and position != final:
            self.violate("converge", f"{who} is at {position}, the log ends at {final}")

    def check_notice(self, who: str, message: Message) -> None:
        if message.event == "deleted":
            if not (self.history.deletions or self.history.losses):
                self.violate("untold", f"{who} was told that the session was deleted, which nobody did")
        elif message.event not in ("overflow", "degraded", "restored"):
            self.violate("log", f"{who} got {message}")

    def check_next(self, who: str, position: Place | None, place: Place) -> None:
        assert position is not None
        (epoch, before), (now, seq) = position, place
        if epoch != now:
            self.violate("untold", f"{who} was at {epoch}-{before} and got {now}-{seq} without a reset")
        elif seq <= before:
            self.violate("backwards", f"{who} was at {epoch}-{before} and got {now}-{seq}")
        elif seq > before + 1:
            self.skipped.append((who, (epoch, before + 1), seq - 1))

    def check_snapshot_place(
        self, who: str, position: Place | None, verdict: dict, place: Place, tick: int
    ) -> None:
        epoch, seq = place
        if verdict.get("status") == "gap" and position is not None:
            behind = seq - position[1]
            if position[0] != epoch:
                self.violate("verdict", f"{who} was at {position}, told of a gap and sent to {place}")
            elif verdict["missed"] != behind:
                self.violate("verdict", f"{who} was told of {verdict['missed']} missed, it was {behind}")
            elif behind <= self.history.history_events:
                self.violate("verdict", f"{who} missed {behind} that the log keeps, from {position}")
        elif verdict.get("status") == "reset" and position is not None:
            if position[0] == epoch and not self.history.losses:
                self.violate("verdict", f"{who} was at {position}, told of a reset and sent to {place}")
            if verdict["missed"] != seq:
                self.violate("verdict", f"{who} was told of {verdict['missed']} missed, it was {seq}")
        if self.history.losses:
            return
        for (acknowledged_epoch, number), publish in self.acknowledged.items():
            if acknowledged_epoch == epoch and number > seq and publish.ended < tick:
                self.violate("snapshot", f"{who} got {place} after {publish.cursor} was acknowledged")
                return

    def check_skipped(self) -> None:
        """Progress that nobody needs any more may be dropped for a slow client, and is counted then."""
        for who, (epoch, first), last in self.skipped:
            names = [self.kind_at((epoch, seq)) for seq in range(first, last + 1)]
            self.dropped += len(names)
            if any(name != "progress" for name in names) or self.dropped > self.history.conflated:
                self.violate("missing", f"{who} did not get {epoch}-{first} to {epoch}-{last} ({names})")

    def kind_at(self, place: Place) -> str | None:
        if place in self.events:
            return self.events[place].event
        return self.acknowledged[place].kind if place in self.acknowledged else None

    def check_completed(self) -> None:
        for who, place in self.completed:
            if place is None or (place in self.events and self.events[place].event not in TERMINAL_EVENTS):
                self.violate("terminal", f"{who} was told at {place} that nothing follows")

    def check_snapshots(self) -> None:
        for who, (epoch, seq), message in self.snapshots:
            for number in range(seq, 0, -1):
                kind = self.kind_at((epoch, number))
                if kind is None:
                    break  # nobody knows what is there
                if kind in ("progress", "end", *TERMINAL_EVENTS):
                    newest = self.payloads.get((epoch, number))
                    if newest != payload_of(message):
                        self.violate(
                            "snapshot",
                            f"{who} got {payload_of(message)} at {message.id}, {newest} was the last",
                        )
                    break

    # All together

    def check_terminals(self) -> None:
        ends: dict[str, int] = {}
        for (epoch, seq), message in self.events.items():
            if message.event in TERMINAL_EVENTS:
                ends[epoch] = min(seq, ends.get(epoch, seq))
        for epoch, seq in {*self.events, *self.acknowledged}:
            if seq > ends.get(epoch, seq):
                self.violate("terminal", f"{epoch}-{seq} follows the end at {epoch}-{ends[epoch]}")

    def check_acknowledged(self, final: Place | None) -> None:
        if final is None:
            return
        stored = {_place(cursor) for log in self.history.logs for message in log if (cursor := message.place)}
        first = min(seq for _, seq in stored)
        for (epoch, seq), publish in self.acknowledged.items():
            if epoch == final[0] and seq >= first and (epoch, seq) not in stored:
                self.violate("lost", f"{publish.payload} was acknowledged at {publish.cursor}")

    def check_payloads(self) -> None:
        outcomes = {publish.payload: publish.outcome for publish in self.history.publishes}
        # A request that was given up may arrive when the session has been deleted, or tried again.
        may_return = self.history.deletions + self.history.attempts + self.history.losses
        for payload, places in self.places.items():
            outcome = outcomes.get(payload)
            if outcome is None:
                self.violate("log", f"nobody has published {payload!r}, which is at {sorted(places)}")
            elif outcome == "refused" and not may_return:
                self.violate("log", f"{payload} was refused, but is at {sorted(places)}")
            epochs = {epoch for epoch, _ in places}
            # A loss may take the event and its receipt, and a log that has another epoch keeps what is left.
            may_repeat = self.history.deletions + self.history.losses
            if len(places) > len(epochs) or (len(epochs) > 1 and not may_repeat):
                self.violate("doubled", f"{payload} is at {sorted(places)}")

    def check_order(self) -> None:
        by_epoch: dict[str, list[tuple[int, Publish]]] = defaultdict(list)
        for (epoch, seq), publish in self.acknowledged.items():
            by_epoch[epoch].append((seq, publish))
        for acknowledged in by_epoch.values():
            latest: Publish | None = None
            for _, publish in sorted(acknowledged, key=lambda item: item[0]):
                if latest is not None and publish.ended < latest.began:
                    self.violate(
                        "order",
                        f"{publish.payload} at {publish.cursor} was acknowledged before "
                        f"{latest.payload} at {latest.cursor} was sent",
                    )
                if latest is None or publish.began > latest.began:
                    latest = publish

    def check_epochs(self) -> None:
        epochs = sorted({epoch for epoch, _ in {*self.events, *self.acknowledged}})
        reasons = self.history.deletions + self.history.attempts
        if not self.history.losses and len(epochs) > 1 + reasons:
            self.violate("epoch", f"the log has had the epochs {', '.join(epochs)} for {reasons} reasons")
