"""What ``sseserve doctor`` asks of a server, to find out what is between them. No I/O, no clock."""

from __future__ import annotations

import msgspec

from .messages import Request
from .routing import Match, number_parameter

__all__ = [
    "FIELDS",
    "MAX_EVENTS",
    "MAX_INTERVAL",
    "MAX_NAME",
    "MAX_QUIET",
    "MAX_SIZE",
    "Probe",
    "SeenRequest",
]

# What a probe costs at most: one stream for less than two hours, and less than a megabyte.
MAX_EVENTS = 50
MAX_INTERVAL = 10.0  # seconds
MAX_SIZE = 16_384  # bytes
MAX_QUIET = 3600.0  # seconds
MAX_NAME = 64  # characters

# The fields that a proxy adds or changes; those that may hold a secret are not among them.
FIELDS = (
    *("accept-encoding", "connection", "expect", "forwarded", "last-event-id", "transfer-encoding"),
    *("upgrade", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip"),
)


class SeenRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it has reached the server.

    Attributes:
        id: the request's id.
        instance: the id of the server's instance.
        version: of the server.
        time: when it was served, in POSIX seconds.
        http_version: "1.0", "1.1" or "2".
        host: its ``Host``.
        address: that which limits and logs count it as.
        proxy: the trusted proxy whose header names that address; empty: no header was believed.
        proxy_header: the header that is believed of trusted proxies; empty: there are none.
        fields: the values of the header fields that proxies add or change.
        names: of all header fields, in lower case.
        heartbeat: for how many seconds a stream is silent at most.
        is_open: whether the probe that the request names is open in this process.
    """

    id: str
    instance: str
    version: str
    time: float
    http_version: str
    host: str
    address: str
    proxy: str
    proxy_header: str
    fields: dict[str, str]
    names: list[str]
    heartbeat: float
    is_open: bool = False


class Probe(msgspec.Struct, frozen=True):
    """What a diagnostic stream sends: events with the time, then nothing for a while, then its end.

    Attributes:
        request: that opened it.
        events: how many.
        interval: seconds between them.
        size: of the text in each of them, in bytes.
        quiet: seconds of silence before the end.
        name: by which a client can ask whether it is open; empty: it has none.
    """

    request: Request
    events: int
    interval: float
    size: int
    quiet: float
    name: str

    @classmethod
    def of(cls, request: Request, match: Match) -> Probe:
        """Read it from a request.

        Raises:
            Invalid: a number is too large, or none.
        """
        query = request.query
        return cls(
            request,
            int(number_parameter(query, match, "events", 0)),
            number_parameter(query, match, "interval", 1),
            int(number_parameter(query, match, "size", 0)),
            number_parameter(query, match, "quiet", 0),
            query.get("name", "")[:MAX_NAME],
        )
