"""What the instances of one server agree on besides the logs: who of them is there, and who leads.

An instance is a process that serves the sessions of one engine. Where several can, the leader does what must
be done once: it judges leases, and ends the jobs of instances that are gone.
"""

from __future__ import annotations

import secrets
from typing import Protocol

import trio

__all__ = ["Coordination", "LocalCoordination", "new_instance"]


class Coordination(Protocol):
    """One instance's view of all of them."""

    @property
    def instance(self) -> str:
        """The id of this instance; each start of a process has another one."""

    @property
    def is_leader(self) -> bool:
        """Whether this instance leads now. Two may think so for a moment, which must do no harm."""

    def is_gone(self, instance: str) -> bool:
        """Return whether an instance is known to have stopped. In doubt it has not."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Join the other instances, report that it has started, and leave them when cancelled."""

    def announce_job(self) -> None:
        """Let the other instances know that a job waits. Does not wait."""

    async def wait_for_news(self) -> None:
        """Wait until another instance announces a job or is gone, or this one begins to lead."""


class LocalCoordination:
    """The coordination of an engine that only one instance can use."""

    is_leader = True

    def __init__(self) -> None:
        self.instance = new_instance()

    def is_gone(self, instance: str) -> bool:
        return instance != self.instance

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    def announce_job(self) -> None:
        pass

    async def wait_for_news(self) -> None:
        await trio.sleep_forever()


def new_instance() -> str:
    """Return an id for an instance."""
    return secrets.token_hex(4)
