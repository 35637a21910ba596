"""Runs the schedules of many seeds, and reduces those that fail."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import trio

from .check import Violation, check
from .cluster import MemoryStore, SQLiteStore, Store
from .history import summarize
from .instances import Instance, LocalInstance, MakeEngine, ProcessInstance
from .redis_store import RedisStore, shorten_timeouts
from .runner import run_schedule
from .schedule import PROFILES, Schedule, Step, dump_steps, generate
from .shrink import shrink

__all__ = ["Campaign", "run_together"]

REPEAT = 3  # times that a list of steps is run before it counts as one that does not fail: time matters in it
SHRINK_FOR = 60.0  # seconds
SHOWN = 5  # violations of a failure


class Campaign:
    """Runs schedules of one profile, one after another.

    Args:
        profile: see ``schedule.PROFILES``.
        folder: for the files of the engines.
        processes: each instance is a process of its own, and a kill is a kill -9.
        reduce: whether to shrink what fails.
        store: instead of that of the profile.
        make_engine: returns what makes the engine of the instance of that number.
    """

    def __init__(
        self,
        profile: str,
        folder: Path,
        *,
        processes: bool = False,
        reduce: bool = True,
        store: Store | None = None,
        make_engine: Callable[[int], MakeEngine] | None = None,
    ) -> None:
        self.profile = profile
        self._folder = folder
        self._processes = processes
        self._reduce = reduce
        self._stack = ExitStack()
        self._store = store
        self._make_engine = make_engine
        self.counts: Counter[str] = Counter()  # see ``history.summarize``
        self.failures: list[str] = []

    def __enter__(self) -> Campaign:
        self._store = self._store or self._open_store()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _open_store(self) -> Store:
        match self.profile:
            case "sqlite":
                return SQLiteStore(self._folder)
            case "redis" | "redis-loss":
                loses = bool(PROFILES[self.profile].losses)
                store = RedisStore(self._folder, PROFILES[self.profile].instances, loses=loses)
                self._stack.callback(store.close)
                self._stack.enter_context(shorten_timeouts())
                return store
            case _:
                return MemoryStore()

    def _instance(self, number: int) -> Instance:
        if not self._processes:
            return LocalInstance(None if self._make_engine is None else self._make_engine(number))
        return ProcessInstance(self._folder / f"instance{number}.log")

    async def run(self, seeds: Iterable[int]) -> None:
        """Run the schedules of these seeds; what fails is described in ``failures``."""
        for seed in seeds:
            schedule = generate(self.profile, seed)
            if violations := await self.attempt(schedule):
                self.failures.append(await self._describe(schedule, violations))

    async def attempt(self, schedule: Schedule) -> list[Violation]:
        """Run one schedule."""
        assert self._store is not None
        if self._processes:
            # Nobody counts what they have conflated.
            schedule = schedule._replace(buffer_events=100_000)
        history = await run_schedule(self._store, schedule, self._instance)
        self.counts.update(summarize(history))
        self.counts["schedules"] += 1
        return check(history)

    async def _describe(self, schedule: Schedule, violations: list[Violation]) -> str:
        steps = schedule.steps
        if self._reduce:

            async def fails(shorter: list[Step]) -> bool:
                nonlocal violations
                for _ in range(REPEAT):
                    if found := await self.attempt(schedule._replace(steps=shorter)):
                        violations = found
                        return True
                return False

            deadline = trio.current_time() + SHRINK_FOR
            steps = await shrink(steps, fails, until=lambda: trio.current_time() >= deadline)
        command = ["python", "tests/fault_schedules.py", "--profile", schedule.profile]
        command += ["--processes"] * self._processes
        command += ["--seed", str(schedule.seed), "--steps", dump_steps(steps)]
        lines = [f"{schedule.profile}, seed {schedule.seed}, {len(steps)} of {len(schedule.steps)} steps:"]
        lines += [f"  {str(violation)[:2000]}" for violation in violations[:SHOWN]]
        if len(violations) > SHOWN:
            lines.append(f"  and {len(violations) - SHOWN} more")
        lines += [f"  {step}" for step in steps]
        return "\n".join([*lines, f"  again: {shlex.join(command)}"])


async def run_together(profile: str, seeds: Iterable[int], folder: Path, count: int) -> Campaign:
    """Run the schedules of these seeds in ``count`` campaigns at once, each with a store of its own.

    Returns:
        A campaign with the failures and the counts of all.
    """
    together = Campaign(profile, folder)
    remaining = iter(seeds)
    with ExitStack() as stack:
        campaigns = [stack.enter_context(Campaign(profile, folder / str(n))) for n in range(count)]
        async with trio.open_nursery() as nursery:
            for campaign in campaigns:
                nursery.start_soon(campaign.run, remaining)
    for campaign in campaigns:
        together.counts += campaign.counts
        together.failures += campaign.failures
    return together
