"""Run seeded fault schedules and check what publishers were told against what clients saw; see ``checker``.

python tests/fault_schedules.py --profile redis --schedules 1000 --seed 1
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path

import trio
from checker.campaign import Campaign
from checker.schedule import PROFILES, generate, load_steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(";")[0])
    parser.add_argument("--profile", choices=PROFILES, default="memory", help="the engine, and its faults")
    parser.add_argument("--schedules", type=int, default=1, help="how many, one seed after another")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", help="run these instead of those that the seed makes; JSON")
    parser.add_argument("--processes", action="store_true", help="run each instance as a process")
    parser.add_argument("--no-shrink", action="store_true", help="do not reduce what fails")
    arguments = parser.parse_args()
    # What is logged with a traceback is a failure of its schedule, and is printed there.
    logger = logging.getLogger("sseserve")
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    with (
        tempfile.TemporaryDirectory(prefix="fault-schedules-") as folder,
        Campaign(
            arguments.profile,
            Path(folder),
            processes=arguments.processes,
            reduce=not arguments.no_shrink,
        ) as campaign,
    ):
        if arguments.steps is not None:
            schedule = generate(arguments.profile, arguments.seed)
            steps = load_steps(arguments.steps)
            for _ in range(arguments.schedules):
                for violation in trio.run(campaign.attempt, schedule._replace(steps=steps)):
                    campaign.failures.append(str(violation))
                    print(violation, flush=True)
        else:
            started_at = time.monotonic()
            for seed in range(arguments.seed, arguments.seed + arguments.schedules):
                known = len(campaign.failures)
                trio.run(campaign.run, [seed])
                for failure in campaign.failures[known:]:
                    print(failure, flush=True)
            print(f"{arguments.schedules} schedules in {time.monotonic() - started_at:.1f} s")
        print(", ".join(f"{name}: {count}" for name, count in campaign.counts.items()))
        print(f"{len(campaign.failures)} failed")
        return bool(campaign.failures)


if __name__ == "__main__":
    raise SystemExit(main())
