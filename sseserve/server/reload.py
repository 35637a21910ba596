"""Reloading the settings on SIGHUP, and telling that from a terminal that was closed.

1. What was read is taken as a whole, or not at all: a file that is wrong changes nothing, and is logged.
2. The log says of each setting that differs what it was and is, without secrets, or that it needs a restart.
3. Whether tokens are needed is not changed: the streams that are open would have none, or need none.
4. A terminal that is closed stops the server, unless nohup(1) has started it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec

from ..auth import open_authenticator
from ..config import Change, Settings, changes
from ..errors import ConfigError
from ..logs import set_levels
from .tls import open_certificates

__all__ = ["Reload", "Reloader", "Terminal", "plan"]

log = logging.getLogger(__name__)

_KEYS = frozenset({"jwt_key", "jwks_url", "jwt_issuer", "jwt_audience", "issuers"})


class Terminal:
    """The terminal that controls this process, if one does."""

    def __init__(self) -> None:
        self._is_there = _has_terminal()
        # nohup(1) ignores the signal.
        self.stops = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN

    def was_closed(self) -> bool:
        """Return whether it is gone since the last call: then that is why there is a SIGHUP."""
        was_there, self._is_there = self._is_there, _has_terminal()
        return was_there and not self._is_there


def _has_terminal() -> bool:
    # It cannot be opened when it is hung up, nor when the leader of its session has ended (tty(4)).
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True


class Reload(msgspec.Struct, frozen=True):
    """What is to be reloaded.

    Args:
        settings: those to go on with.
        taken: what differs in them.
        left: what differs in those that were read, but needs a restart.
    """

    settings: Settings
    taken: list[Change]
    left: list[Change]

    def describe(self, *, has_new_files: bool) -> str:
        """Return a sentence on what was changed."""
        parts = [str(change) for change in self.taken]
        if has_new_files:
            parts.append("the files of keys or certificates have changed")
        sentence = f"reloaded the settings: {'; '.join(parts) or 'nothing has changed'}"
        if self.left:
            sentence += f". Needs a restart: {'; '.join(map(str, self.left))}"
        return sentence


class Reloader:
    """Reads the settings again.

    Args:
        settings: those of the running server.
        reread: reads them as at the start; None: they are the same, and only files of keys are read again.
    """

    def __init__(self, settings: Settings, reread: Callable[[], Settings] | None) -> None:
        self.settings = settings
        self._reread = reread
        self._files: object = None  # what stands for their contents, as far as it is known

    def check(self) -> None:
        """Check what the settings name besides their values.

        Raises:
            ConfigError: a key or a certificate cannot be used.
        """
        self._files = _read_files(self.settings)

    def reload(self, apply: Callable[[Settings], None]) -> bool:
        """Read the settings, and have them applied; log what has changed, or why nothing has.

        Args:
            apply: goes on with other settings. It raises ConfigError if they cannot be used.

        Returns:
            Whether they were applied.
        """
        try:
            planned = plan(self.settings, self.settings if self._reread is None else self._reread())
            files = _read_files(planned.settings)
            apply(planned.settings)
        except ConfigError as error:
            log.error("cannot reload the settings, so nothing is changed: %s", error)
            return False
        has_new_files = files != self._files
        self.settings, self._files = planned.settings, files
        # Before the level is set: a reload is always logged.
        log.info("%s", planned.describe(has_new_files=has_new_files))
        set_levels(planned.settings.log_level, access_log=planned.settings.access_log)
        return True


def plan(running: Settings, wanted: Settings) -> Reload:
    """Return what of the settings that were read a running server can take."""
    taken, left = changes(running, wanted)
    if running.has_token_keys != wanted.has_token_keys:
        left += [change for change in taken if change.name in _KEYS]
        taken = [change for change in taken if change.name not in _KEYS]
    fields = {change.name: getattr(wanted, change.name) for change in taken}
    return Reload(msgspec.structs.replace(running, **fields), taken, left)


def _read_files(settings: Settings) -> object:
    """Read the files of keys and certificates as the server does; return what changes with their contents.

    Raises:
        ConfigError: they cannot be used.
    """
    open_authenticator(settings)
    open_certificates(settings.tls_cert, settings.tls_key)
    keys = [settings.jwt_key, *(issuer.key for issuer in settings.issuers)]
    paths = [key.removeprefix("file:") for key in keys if key is not None and key.startswith("file:")]
    paths += [path for path in (settings.tls_cert, settings.tls_key) if path is not None]
    try:
        return [hashlib.sha256(Path(path).read_bytes()).digest() for path in paths]
    except OSError as error:  # it has gone since it was read above
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
