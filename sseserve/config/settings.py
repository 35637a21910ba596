"""All settings: type, default, and what is said of each."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import quote

from msgspec import Meta

from .about import About
from .access import AccessSettings, Count, Positive

__all__ = ["Settings"]

_DIALECT = "what the dialect says"
_NO_LIMIT = "no limit"


class Settings(AccessSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings. Times are in seconds and sizes in bytes, unless the name says otherwise."""

    auto_create: Annotated[
        bool,
        About(
            "Publishing to a session that does not exist creates it",
            "a publisher then needs no request before its first update",
            heading="Sessions",
        ),
    ] = True
    ttl: Annotated[
        Positive,
        About(
            "How long a session is kept after its end",
            "clients that come late still see how it ended",
            "seconds",
        ),
    ] = 3600.0
    idle_ttl: Annotated[
        Positive,
        About(
            "How long a session that has not ended is kept after its last update",
            "a publisher that is gone would otherwise leave its sessions for ever",
            "seconds",
        ),
    ] = 86400.0
    max_sessions: Annotated[
        Count,
        About("Maximum number of sessions", "each takes memory of the server or of Redis", "sessions"),
    ] = 100_000
    history_events: Annotated[
        Count,
        About(
            "Maximum number of events in a session's log",
            "a client that was away for longer gets the current state and no history",
            "events",
        ),
    ] = 10_000
    history_bytes: Annotated[
        Count, About("Maximum size of the events in a session's log", "events may be large", "bytes")
    ] = 4 * 2**20

    job_workers: Annotated[
        Literal["server", "remote"],
        About(
            "Where jobs run: in this server, or claimed by workers elsewhere",
            "with remote the server itself runs only demonstrations",
            heading="Jobs",
        ),
    ] = "server"
    max_running_jobs: Annotated[
        Count,
        About(
            "Maximum number of jobs that run in the server at once",
            "they share its cores with the streams",
            "jobs",
        ),
    ] = 4
    max_waiting_jobs: Annotated[
        Count,
        About(
            "Maximum number of jobs that wait to run", "a longer queue would only delay the refusal", "jobs"
        ),
    ] = 1000
    demo_seconds: Annotated[
        Positive, About("How long a demonstration takes", "it is long enough to be watched", "seconds")
    ] = 20.0

    buffer_events: Annotated[
        Count,
        About(
            "Maximum number of events that wait for one client, which reads slowly",
            "beyond that it is disconnected, and resumes from its cursor",
            "events",
            heading="Streams",
        ),
    ] = 1024
    buffer_bytes: Annotated[
        Count,
        About(
            "Maximum size of what waits for one client",
            "it bounds the memory that slow clients take",
            "bytes",
        ),
    ] = 256 * 1024
    retry_ms: Annotated[
        Count | None,
        About(
            "Reconnection time that streams ask their clients for",
            "clients wait a few seconds by themselves",
            "milliseconds",
            unset="left to the client",
        ),
    ] = None
    heartbeat: Annotated[
        Positive | None,
        About(
            "Time between two heartbeats of an idle stream",
            "proxies close connections on which nothing is sent, often after 60 seconds",
            "seconds",
            unset=_DIALECT,
        ),
    ] = None
    max_age: Annotated[
        Positive | None,
        About(
            "Maximum age of a stream, in the dialects that have one; the client then reconnects",
            "some platforms end every request after an hour",
            "seconds",
            unset=_DIALECT,
        ),
    ] = None
    idle_timeout: Annotated[
        Positive | None,
        About(
            "Time without an event after which a stream ends, in the dialects that have one",
            "nobody needs a stream of a session that has stopped",
            "seconds",
            unset=_DIALECT,
        ),
    ] = None
    throttle: Annotated[
        Positive | None,
        About(
            "Minimum time between two updates of the percentage, in the dialects that have one",
            "people cannot read faster",
            "seconds",
            unset=_DIALECT,
        ),
    ] = None
    max_streams_per_user: Annotated[
        Count | None,
        About(
            "Maximum number of streams of one user (without authentication: one address), on all instances",
            "one user must not use up what all share",
            "streams",
            unset=_NO_LIMIT,
            reloads=True,
        ),
    ] = 1000
    max_streams_per_session: Annotated[
        Count | None,
        About(
            "Maximum number of streams of one session, on all instances",
            "the time of one publish grows with them",
            "streams",
            unset=_NO_LIMIT,
            reloads=True,
        ),
    ] = 20_000
    max_streams: Annotated[
        Count | None,
        About(
            "Maximum number of streams of this process",
            "connections must be left for publishers",
            "streams",
            unset="nine tenths of the connections",
            reloads=True,
        ),
    ] = None
    max_streams_per_address: Annotated[
        Count | None,
        About(
            "Maximum number of streams of one address (IPv6: one /64) in this process",
            "one machine must not use up what all share",
            "streams",
            unset=_NO_LIMIT,
            reloads=True,
        ),
    ] = 1000
    enable_sse: Annotated[
        bool,
        About(
            "Serve streams; without them the dialects that can do without are polled",
            "some networks let no stream through",
        ),
    ] = True
    send_timeout: Annotated[
        Positive,
        About(
            "How long one write of at most 64 KiB may take before the connection is closed",
            "a client that reads nothing would otherwise keep its connection for ever",
            "seconds",
        ),
    ] = 20.0

    max_connections: Annotated[
        Count | None,
        About(
            "Maximum number of connections of this process",
            "each needs a file descriptor",
            "connections",
            unset="the limit of open files (ulimit -n), less 64",
            heading="Connections and requests",
            reloads=True,
        ),
    ] = None
    request_timeout: Annotated[
        Positive,
        About(
            "Time to read a request's head, or the next bytes of its body at 1 KiB/s or more",
            "a client that sends slowly would otherwise keep a connection busy",
            "seconds",
        ),
    ] = 10.0
    ndjson_timeout: Annotated[
        Positive,
        About(
            "Time until the next line of a body of NDJSON begins",
            "a worker sends its lines as it works",
            "seconds",
        ),
    ] = 3600.0
    keep_alive: Annotated[
        Positive,
        About(
            "How long a connection may be idle between two requests",
            "longer than the 60 seconds of most load balancers, which must be the ones to close it",
            "seconds",
        ),
    ] = 75.0
    max_body: Annotated[
        Count,
        About(
            "Maximum size of a request's body, or of one line of NDJSON", "a body is kept in memory", "bytes"
        ),
    ] = 2**20
    drain: Annotated[
        Positive,
        About(
            "Time from SIGTERM to the exit of the process, in which clients are told to reconnect",
            "Docker kills after 10 seconds, Kubernetes after 30",
            "seconds",
        ),
    ] = 4.0
    max_head: Annotated[
        Count,
        About("Maximum size of a request's line and header fields", "a head is kept in memory", "bytes"),
    ] = 16 * 1024
    max_event: Annotated[
        Count,
        About("Maximum size of the data of one event or update", "each is sent to every watcher", "bytes"),
    ] = 256 * 1024

    max_connections_per_address: Annotated[
        Count | None,
        About(
            "Maximum number of connections of one address (IPv6: one /64)",
            "one machine must not use up what all share",
            "connections",
            unset=_NO_LIMIT,
            heading="Limits of each address and user",
            reloads=True,
        ),
    ] = 2000
    connect_rate: Annotated[
        Positive | None,
        About(
            "Maximum rate at which one client opens streams; in a burst ten times as much",
            "a client that reconnects in a loop costs as much as many clients",
            "per second",
            unset=_NO_LIMIT,
            reloads=True,
        ),
    ] = 100.0
    publish_rate: Annotated[
        Positive | None,
        About(
            "Maximum rate at which one client publishes updates and events; in a burst ten times as much",
            "one publisher must not delay all others",
            "per second",
            unset=_NO_LIMIT,
            reloads=True,
        ),
    ] = 2000.0
    ticket_rate: Annotated[
        Positive | None,
        About(
            "Maximum rate at which one client makes tickets, or refreshes; in a burst ten times as much",
            "each ticket is kept for up to a minute",
            "per second",
            unset=_NO_LIMIT,
            reloads=True,
        ),
    ] = 20.0
    limit_loopback: Annotated[
        bool,
        About(
            "Limit addresses of the loopback interface, too",
            "workers and a proxy on this machine send the requests of many",
            reloads=True,
        ),
    ] = False
    max_sessions_per_owner: Annotated[
        Count | None,
        About(
            "Maximum number of sessions of one owner, on all instances",
            "one user must not use up what all share",
            "sessions",
            unset=_NO_LIMIT,
        ),
    ] = 10_000
    max_log_bytes: Annotated[
        Count | None,
        About(
            "Maximum size of all logs and receipts together; ended sessions are deleted first",
            "the memory or the disk would otherwise fill up",
            "bytes",
            unset=_NO_LIMIT,
        ),
    ] = 2**30

    engine: Annotated[
        str | None,
        About(
            "Where logs live: memory:, sqlite:PATH, redis://HOST:PORT/DB, rediss://... or unix://PATH",
            "logs in memory end with the process; several instances share a Redis",
            unset="the Redis that is named below, otherwise memory:",
            heading="Engine",
        ),
    ] = None
    redis_url: Annotated[
        str | None,
        About(
            "URL of the Redis of the channels, and of the engine unless that is named",
            "platforms give it in REDIS_URL",
            unset="that of redis_host, or none",
        ),
    ] = None
    redis_host: Annotated[
        str | None,
        About("Host of that Redis", "platforms give it in REDIS_HOST", unset="no Redis is named by its host"),
    ] = None
    redis_port: Annotated[
        Annotated[int, Meta(ge=1, le=65535)],
        About("Port of redis_host", "6379 is what Redis listens on by default"),
    ] = 6379
    redis_password: Annotated[
        str | None,
        About("Password of redis_host", "a Redis that others can reach needs one", unset="no password"),
    ] = None
    durability: Annotated[
        Literal["full", "normal"],
        About(
            "Whether each commit of sqlite: waits for the disk (full)",
            "with normal a power cut may undo the last commits, a crash of the server does not",
        ),
    ] = "normal"

    redis_channels: Annotated[
        tuple[str, ...] | None,
        About(
            "Redis channels of other systems that are read: sessions, jobs_v1, transcription",
            "their publishers need no change",
            unset="all, if a Redis is named",
            heading="Redis channels of other systems",
        ),
    ] = None
    redis_publish: Annotated[
        tuple[str, ...],
        About(
            "Redis channels of other systems that are written: sessions, jobs_v1, transcription",
            "their subscribers need no change",
        ),
    ] = ()

    @property
    def engine_url(self) -> str:
        """The URL of the engine: the one that is named, else that of the Redis that is named, else memory."""
        if self.engine is not None:
            return self.engine
        return self._named_redis or "memory:"

    @property
    def channels_url(self) -> str | None:
        """The URL of the Redis of the channels: the one that is named, else that of the engine, else None."""
        return self._named_redis or (self.engine_url if self.is_shared else None)

    @property
    def is_shared(self) -> bool:
        """Whether other instances may have the same logs: they are in Redis."""
        return not self.engine_url.startswith(("memory:", "sqlite:"))

    @property
    def _named_redis(self) -> str | None:
        if self.redis_url is not None:
            return self.redis_url
        if self.redis_host is None:
            return None
        host = f"[{self.redis_host}]" if ":" in self.redis_host else self.redis_host
        password = "" if self.redis_password is None else f":{quote(self.redis_password, safe='')}@"
        return f"redis://{password}{host}:{self.redis_port}/0"
