"""What a contender is: a server, how it is run as its documentation recommends for load, and its requests."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...load.publishers import PublishRequest
from ...servers import ServerProcess

__all__ = ["SSE_HEADERS", "Peer"]

SSE_HEADERS = "Host: 127.0.0.1\r\nAccept: text/event-stream\r\n"


class Peer:
    """A contender. A subclass is one server with its settings.

    ``name`` is the key, ``title`` is for people, ``source`` the URL of the documentation of the settings,
    ``note`` what is to be known to compare it fairly. ``publish_lines`` publishes several events, one a line.
    ``variant_of`` is the name of the contender that this is with other settings, and ``groups`` are those
    that such a variant takes part in; None: all.
    """

    name: str
    title: str
    language: str
    source: str = ""
    note: str = ""
    is_limit = False
    variant_of = ""
    groups: frozenset[str] | None = None
    watch_status = b"HTTP/1.1 200"
    publish: PublishRequest
    publish_lines: PublishRequest | None = None
    no_lines = "takes one event a request"
    no_replay = ""  # why it cannot replay events to a client that comes back; "" if it can

    def missing(self) -> str:
        """Return why it cannot be run here, and how to get it; an empty string if it can."""
        return ""

    def version(self) -> str:
        """Return its version, and those of the parts that matter."""
        raise NotImplementedError

    def settings(self) -> str:
        """Return the configuration that it is run with, as text."""
        raise NotImplementedError

    def start(self) -> ServerProcess:
        """Start it on a free port.

        Raises:
            BenchmarkError: it does not start.
        """
        raise NotImplementedError

    def prepare(self, server: ServerProcess, channels: Sequence[str]) -> None:
        """Do what the channels need before they are watched."""

    def watch(self, channel: str, cursor: str = "") -> bytes:
        """Return the request that opens a stream of a channel, after a cursor if there is one."""
        last = f"Last-Event-ID: {cursor}\r\n" if cursor else ""
        return f"GET {self.watch_path(channel)} HTTP/1.1\r\n{SSE_HEADERS}{last}\r\n".encode()

    def find_cursor(self, data: bytes) -> str:
        """Return the cursor of the last event in what a client has received; "" if there is none."""
        found = re.findall(rb"^id: ?(\S+)", data, re.MULTILINE)
        return found[-1].decode() if found else ""

    def watch_path(self, channel: str) -> str:
        """Return the path of a channel's stream."""
        raise NotImplementedError
