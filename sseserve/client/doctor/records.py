"""What is measured between a client and the server. No I/O, no clock. Times are POSIX seconds, or seconds."""

from __future__ import annotations

import math
from statistics import median
from typing import Literal

import msgspec

__all__ = [
    "Arrival",
    "Body",
    "Cors",
    "End",
    "Headers",
    "Measured",
    "Poll",
    "Response",
    "Seen",
    "Socket",
    "Stream",
    "Target",
    "Tls",
    "field",
]

Headers = list[tuple[str, str]]

# How a response ends: as HTTP says, by a connection that was closed or reset before, or not in time.
End = Literal["complete", "cut", "timeout"]


class Target(msgspec.Struct, frozen=True):
    """The server, by its URL: ``host`` is the value of the field, ``path`` a prefix without a final slash.

    ``ca`` is the path of the certificates that are trusted; None: the system's.
    """

    scheme: str
    name: str
    port: int
    host: str
    path: str
    ca: str | None = None


class Response(msgspec.Struct):
    """The head of a response to the request ``id``. ``interim``: the statuses before it, such as 100."""

    status: int
    http_version: str
    headers: Headers
    interim: list[int] = []
    id: str = ""

    def field(self, name: str) -> str | None:
        """Return the value of a field; those of several joined by commas (RFC 9110, section 5.3)."""
        return field(self.headers, name)

    @property
    def is_server(self) -> bool:
        """Whether the server has made it for this request, not a proxy, and not for an earlier one."""
        return self.field("x-request-id") == self.id


def field(headers: Headers, name: str) -> str | None:
    """Return the value of a field; None: there is none."""
    values = [value for key, value in headers if key == name]
    return ", ".join(values) if values else None


class Seen(msgspec.Struct, frozen=True):
    """A request as the server has received it; see ``/api/diagnostics``."""

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


class Arrival(msgspec.Struct, frozen=True):
    """An event: when the server has sent it, by its clock, and when it came, by the local clock."""

    sent: float
    received: float


class Stream(msgspec.Struct):
    """An event stream.

    Attributes:
        response: None: there was none.
        seen: its request, as the server has received it; None: that was never told.
        arrivals: its events.
        end: how the response ended.
        finished: the server has said that this is the end.
        silence: seconds from the last bytes to the end.
        latency: seconds that an ordinary response took from the server meanwhile, if that was measured.
    """

    response: Response | None = None
    seen: Seen | None = None
    arrivals: list[Arrival] = msgspec.field(default_factory=list)
    end: End = "timeout"
    finished: bool = False
    silence: float = 0.0
    latency: float = 0.0

    @property
    def is_collected(self) -> bool:
        """Whether the events came closer together than they were sent."""
        if len(self.arrivals) < 3:
            return False
        first, last = self.arrivals[0], self.arrivals[-1]
        return last.received - first.received < (last.sent - first.sent) / 2

    def delay(self, offset: float) -> float:
        """Return how much later than an ordinary response an event comes, in seconds.

        The median, as a busy machine delays some of them.
        """
        if not self.arrivals:
            return math.inf
        return max(median(a.received - (a.sent - offset) for a in self.arrivals) - self.latency, 0.0)

    def longest_delay(self, offset: float) -> float:
        """Return how late the latest event came, in seconds."""
        return max(0.0, *(a.received - (a.sent - offset) for a in self.arrivals))


class Socket(msgspec.Struct):
    """A WebSocket. ``status`` of its handshake; ``ponged``: a ping was answered. The rest as of a stream."""

    status: int | None = None
    seen: Seen | None = None
    arrivals: list[Arrival] = msgspec.field(default_factory=list)
    ponged: bool = False
    end: End = "timeout"
    finished: bool = False
    silence: float = 0.0


class Poll(msgspec.Struct):
    """A request that is responded to late. ``status`` None: it was not; ``seconds`` until then."""

    status: int | None = None
    seconds: float = 0.0


class Body(msgspec.Struct):
    """A body that was sent in parts. ``status`` of the response; ``parts``: when they came, and their sizes.

    ``continued``: a 100 came in time for a request that has asked for it.
    """

    status: int | None = None
    parts: list[tuple[float, int]] = msgspec.field(default_factory=list)
    continued: bool | None = None

    @property
    def is_collected(self) -> bool:
        """Whether the parts came at once."""
        return bool(self.parts) and self.parts[-1][0] - self.parts[0][0] < 0.1

    @property
    def is_delayed(self) -> bool:
        """Whether the parts, or the 100, came too late."""
        return self.is_collected or self.continued is False


class Cors(msgspec.Struct):
    """The responses to a page of another origin: to its preflight, and to its request."""

    preflight: Response | None = None
    response: Response | None = None


class Tls(msgspec.Struct):
    """The version, until when the certificate is valid, and the protocol chosen by ALPN."""

    version: str
    expires_at: float | None
    protocol: str | None


class Measured(msgspec.Struct, kw_only=True):
    """Everything that was measured.

    Attributes:
        target: the server.
        now: when.
        origin: that of the page whose requests were tried; None: none was.
        idle: how long streams were silent.
        first: the response to the first request, and that as the server has received it.
        offset: how far the server's clock is ahead, known to within ``round_trip``.
        error_page: the response to what is no request.
        asked, plain: streams whose clients accept compression, and do not.
        twin: one like ``plain`` at the same time.
        blocks: one of many larger events, if those of ``plain`` were collected.
        quiet: one that was silent.
        socket: a WebSocket, which was silent too.
        repeated: two equal requests, each with what the server has received.
        noticed: the server has learned that a client had left; None: that cannot be said.
    """

    target: Target
    now: float
    origin: str | None
    has_token: bool
    idle: float
    first: Response
    seen: Seen
    offset: float
    round_trip: float
    tls: Tls | None = None
    error_page: str = ""
    asked: Stream = msgspec.field(default_factory=Stream)
    plain: Stream = msgspec.field(default_factory=Stream)
    twin: Stream = msgspec.field(default_factory=Stream)
    blocks: Stream | None = None
    quiet: Stream = msgspec.field(default_factory=Stream)
    socket: Socket = msgspec.field(default_factory=Socket)
    poll: Poll = msgspec.field(default_factory=Poll)
    body: Body = msgspec.field(default_factory=Body)
    cors: Cors | None = None
    repeated: list[tuple[Response, Seen | None]] = msgspec.field(default_factory=list)
    noticed: bool | None = None
