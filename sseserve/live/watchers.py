"""How many watch what. Each change and each question costs the same, however many sessions and watchers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..dialects import Encoding

__all__ = ["WatcherCounts"]


class WatcherCounts:
    """Counts of one broker's watchers: by encoding, and by session."""

    def __init__(self) -> None:
        self.total = 0
        self.by_encoding: dict[Encoding, int] = {}
        # The sessions by their number of watchers: there are few different numbers.
        self._sessions: dict[int, dict[str, None]] = {}
        self.on_change: Callable[[str, int], None] | None = None  # is called with a session's new number
        # Is called with a session when a watcher of any kind comes or leaves.
        self.on_watcher: Callable[[str], None] = lambda _session_id: None

    def add(self, encoding: Encoding, change: int) -> None:
        """Count a watcher, of one session or of several, more (1) or less (-1)."""
        self.total += change
        count = self.by_encoding.get(encoding, 0) + change
        if count:
            self.by_encoding[encoding] = count
        else:
            del self.by_encoding[encoding]

    def move(self, session_id: str, before: int, after: int) -> None:
        """Note that a session has ``after`` watchers instead of ``before``."""
        if before:
            sessions = self._sessions[before]
            del sessions[session_id]
            if not sessions:
                del self._sessions[before]
        if after:
            self._sessions.setdefault(after, {})[session_id] = None
        if self.on_change is not None:
            self.on_change(session_id, after)

    def most_watched(self) -> Iterator[tuple[str, int]]:
        """Yield the sessions and their number of watchers, the most watched first."""
        for count in sorted(self._sessions, reverse=True):
            for session_id in self._sessions[count]:
                yield session_id, count
