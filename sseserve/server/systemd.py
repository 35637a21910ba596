"""What systemd gives a service, and what it is told: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3).

No library is needed: these are environment variables and datagrams. Without them nothing here does anything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import MutableMapping

from ..errors import ConfigError

__all__ = ["Notifier", "inherited_sockets"]

log = logging.getLogger(__name__)

FIRST = 3  # the first file descriptor that is passed


def inherited_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """Return the listening sockets that were passed to this process; none: there are none, or another's.

    They are closed in programs that this one starts, and the variables are removed.

    Args:
        environ: the environment.

    Raises:
        ConfigError: one of them is no listening stream socket.
    """
    pid, number, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not number.isdecimal():
        return []
    names_of = dict(enumerate(names.split(":"), FIRST))
    with contextlib.ExitStack() as on_error:
        sockets = []
        for descriptor in range(FIRST, FIRST + int(number)):
            name = names_of.get(descriptor, "")
            what = f"the file descriptor {descriptor}{name and f' ({name})'} that was passed in LISTEN_FDS"
            try:
                os.set_inheritable(descriptor, False)
                opened = on_error.enter_context(socket.socket(fileno=descriptor))
            except OSError as error:
                raise ConfigError(f"{what} is no socket: {error.strerror}") from error
            is_stream = opened.type == socket.SOCK_STREAM
            if not is_stream or not opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise ConfigError(
                    f"{what} is no stream socket that listens: a socket unit needs ListenStream=, Accept=no"
                )
            sockets.append(opened)
        on_error.pop_all()
        return sockets


class Notifier:
    """Tells the service manager how this service is; does nothing if none asks for it.

    Nothing waits, and nothing fails: the service manager may be gone, or slow.

    Args:
        environ: the environment; what says whom to tell is removed from it.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        # A path, or an abstract socket.
        self._address = "\0" + address[1:] if address[:1] == "@" else address if address[:1] == "/" else None
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        is_watched = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        #: Seconds after which a service that does not say that it is alive is ended; None: it need not.
        self.watchdog = int(usec) / 1e6 if is_watched and self._address is not None else None

    def ready(self, status: str) -> None:
        """Say that the service serves, or has been reloaded, and what it does."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Say that the service reloads its configuration, until it is ``ready`` again."""
        # When the reload began, by the clock that systemd reads, too.
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """Say that the service stops."""
        self._send("STOPPING=1", "STATUS=stopping: streams reconnect, requests end")

    def alive(self) -> None:
        """Say that the service is alive."""
        self._send("WATCHDOG=1")

    def _send(self, *assignments: str) -> None:
        if self._address is None:
            return
        lines = [assignment.replace("\n", " ") for assignment in assignments]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
                datagrams.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, self._address)
        except OSError as error:
            log.warning("cannot tell the service manager %s: %s", lines[0], error.strerror)
