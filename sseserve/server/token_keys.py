"""What verifies tokens, and what fetches keys for that; both change when the settings are reloaded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import trio

from ..auth import open_authenticator, open_push_authenticator
from ..config import Settings
from ..metrics import Counters
from .supervision import supervise

if TYPE_CHECKING:
    from ..auth.authenticator import Authenticator
    from ..auth.jwks import RemoteKeys

__all__ = ["TokenKeys"]


class TokenKeys:
    """The authenticators of one server.

    ``authenticator`` verifies the tokens of requests; None: the settings name no key, or a program decides
    itself. ``push`` verifies those of Pub/Sub's pushes; None: they are as others.

    Args:
        settings: name the keys.
        nursery: runs what fetches keys that come with a reload.
        counters: count its failures.
        by_program: a program decides who makes a request.
        clock: returns POSIX seconds.

    Raises:
        ConfigError: a key cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        nursery: trio.Nursery,
        counters: Counters,
        *,
        by_program: bool,
        clock: Callable[[], float],
    ) -> None:
        self._nursery = nursery
        self._counters = counters
        self._clock = clock
        self.authenticator = None if by_program else open_authenticator(settings, clock=clock)
        is_open = self.authenticator is None and not by_program
        self.push = open_push_authenticator(settings, is_open=is_open, clock=clock)
        self._fetches: dict[RemoteKeys, trio.CancelScope] = {}

    def services(self) -> list[Callable[[], Awaitable[None]]]:
        """Return the tasks that must run as long as requests are served."""
        services: list[Callable[[], Awaitable[None]]] = [
            partial(self._fetch, f"jwks {number}", keys) for number, keys in enumerate(self._remote, 1)
        ]
        if self.push is not None:
            services.append(partial(self._fetch, "pubsub jwks", self.push.keys))
        return services

    @property
    def _remote(self) -> Sequence[RemoteKeys]:
        return () if self.authenticator is None else self.authenticator.remote_keys

    async def _fetch(self, name: str, keys: RemoteKeys) -> None:
        with trio.CancelScope() as self._fetches[keys]:
            await supervise(name, keys.run, self._counters)

    def replace(self, settings: Settings) -> Authenticator | None:
        """Verify tokens with the keys that the settings name now; files of keys are read again.

        Keys that were fetched stay where their URL does.

        Raises:
            ConfigError: they cannot be used. Nothing has changed then.
        """
        if self.authenticator is None:
            return None
        before = self._remote
        opened = open_authenticator(settings, clock=self._clock, known=before)
        assert opened is not None  # that would need a restart
        self.authenticator = opened
        for keys in set(before) - set(self._remote):
            if (scope := self._fetches.pop(keys, None)) is not None:
                scope.cancel()
        for number, keys in enumerate(self._remote, 1):
            if keys not in before:
                self._nursery.start_soon(self._fetch, f"jwks {number}", keys)
        return opened
