"""From what was measured to what is wrong, why, and what to change. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

import msgspec

from .proxies import Change, Proxy, changes, recognize, server_change
from .records import Measured, Response, Stream

__all__ = ["CURSOR", "LATE", "Check", "Report", "Status", "judge"]

Status = Literal["ok", "warning", "problem", "not checked"]

CURSOR = "doctor-1"  # is sent as ``Last-Event-ID``
LATE = 0.1  # seconds that an event may be later than an ordinary response
LEEWAY = 30.0  # seconds by which clocks may differ before the server rejects tokens
CLOCK_WARNING = 5.0  # seconds
EXPIRY_WARNING = 14.0  # days until a certificate expires
LIMITED = 429  # Too Many Requests
MARGIN = 5.0  # seconds by which a proxy should be more patient than the server is silent
DAY = 86_400.0


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one check has found.

    Attributes:
        name: of the check.
        status: the result.
        text: what was measured.
        cause: why that is a problem.
        changes: what to change.
        hint: another way out, or how to check more.
    """

    name: str
    status: Status
    text: str
    cause: str = ""
    changes: tuple[Change, ...] = ()
    hint: str = ""


class Report(msgspec.Struct, frozen=True):
    """All checks of one server. ``version``: of the server; empty if it is not known."""

    url: str
    version: str
    proxies: tuple[Proxy, ...]
    checks: tuple[Check, ...]

    @property
    def has_problems(self) -> bool:
        """Whether there is something to change."""
        return any(check.status == "problem" for check in self.checks)


def judge(url: str, measured: Measured) -> Report:
    """Return what was found."""
    m = measured
    responses = [m.first, *(s.response for s in (m.asked, m.plain, m.quiet) if s.response is not None)]
    seen_names = [*m.seen.names, *(m.plain.seen.names if m.plain.seen is not None else ())]
    proxies = recognize([response.headers for response in responses], seen_names, m.error_page)
    checks = [judge_one(m, proxies) for judge_one in _JUDGES]
    return Report(url, m.seen.version, tuple(proxies), tuple(checks))


def _tls(m: Measured, _proxies: list[Proxy]) -> Check:
    if m.target.scheme != "https":
        return Check("TLS", "ok", "not used")
    if m.tls is None or m.tls.expires_at is None:
        return Check("TLS", "not checked", "a second connection failed")
    days = (m.tls.expires_at - m.now) / DAY
    date = datetime.fromtimestamp(m.tls.expires_at, UTC).date()
    text = f"{m.tls.version}; the certificate is valid until {date}"
    if days < EXPIRY_WARNING:
        return Check("TLS", "warning", f"{text}, {max(days, 0):.0f} days", "it expires soon: renew it")
    return Check("TLS", "ok", text)


def _version(m: Measured, proxies: list[Proxy]) -> Check:
    offered = "HTTP/2" if m.tls is not None and m.tls.protocol == "h2" else f"HTTP/{m.first.http_version}"
    if 'h3="' in (m.first.field("alt-svc") or "") or "h3=" in (m.first.field("alt-svc") or ""):
        offered += " and HTTP/3"
    seen = m.plain.seen or m.seen
    text = f"{offered} here, HTTP/{seen.http_version} at the server"
    if seen.http_version == "1.0":
        return Check(
            "HTTP version",
            "problem",
            text,
            "HTTP/1.0 has no chunks, so a stream that was cut looks complete",
            changes("HTTP/1.0", proxies),
        )
    if m.target.scheme == "https" and not offered.startswith("HTTP/2"):
        return Check(
            "HTTP version",
            "warning",
            text,
            "a browser opens six streams at most to a host without HTTP/2",
            changes("HTTP/2", proxies),
        )
    return Check("HTTP version", "ok", text)


def _buffering(m: Measured, proxies: list[Proxy]) -> Check:
    name, stream = "buffering", m.plain
    if stream.response is None or stream.response.status != 200:
        return Check(name, "problem", f"the stream was not opened: {_outcome(stream.response)}")
    if not stream.arrivals:
        what = "no event came" if stream.end == "timeout" else "the stream was cut before its first event"
        return Check(name, "problem", what, "the proxy collects the response", changes("buffering", proxies))
    if stream.is_collected:
        late = stream.longest_delay(m.offset)
        text = f"{len(stream.arrivals)} events came together, up to {late:.1f} s late"
        if _coding(m.asked) is not None:
            return Check(name, "problem", text, "the proxy compresses streams, see below")
        cause = f"the proxy collects {_amount(m)}"
        return Check(name, "problem", text, cause, changes("buffering", proxies))
    delay = stream.delay(m.offset)
    if delay > LATE:
        cause = "the proxy waits for more before it passes an event on"
        return Check(name, "problem", f"events come {delay:.2f} s late", cause, changes("buffering", proxies))
    return Check(name, "ok", f"events come {1000 * delay:.0f} ms after they were sent")


def _amount(m: Measured) -> str:
    """Say how much is collected."""
    if m.blocks is None or not m.blocks.arrivals:
        return "the response"
    first = min(arrival.received for arrival in m.blocks.arrivals)
    before = sum(arrival.sent - m.offset < first for arrival in m.blocks.arrivals)
    if before == len(m.blocks.arrivals):
        return "the response to its end"
    return f"about {before} KiB of the response before it passes them on"


def _compression(m: Measured, proxies: list[Proxy]) -> Check:
    name = "compression"
    if m.asked.response is None or m.asked.response.status != 200:
        return Check(name, "not checked", f"the stream was not opened: {_outcome(m.asked.response)}")
    coding, unasked = _coding(m.asked), _coding(m.plain)
    if coding is None and unasked is None:
        return Check(name, "ok", "streams are not compressed")
    text = f"streams are compressed ({coding or unasked})" + (", also unasked" if unasked else "")
    fix = changes("compression", proxies, {"prefix": m.target.path})
    if m.asked.is_collected or not m.asked.arrivals:
        return Check(name, "problem", f"{text}, and late", "compression holds events back", fix)
    cause = "it costs memory for each stream, and other compressors hold events back"
    return Check(name, "warning", text, cause, fix)


def _coding(stream: Stream) -> str | None:
    coding = stream.response.field("content-encoding") if stream.response is not None else None
    return None if coding == "identity" else coding


def _idle(m: Measured, proxies: list[Proxy]) -> Check:
    """Judge what was silent: a stream, a WebSocket, and a request that is responded to late."""
    name = "idle cut-off"
    cuts: list[tuple[str, float, str]] = []
    # Varnish marks every response but those that it passes on unseen.
    is_piped = "varnish" in {proxy.kind for proxy in proxies} and m.first.field("x-varnish") is None
    stream = "silent WebSocket" if is_piped else "silent stream"
    if m.quiet.response is not None and m.quiet.response.status == 200 and not m.quiet.finished:
        how = "" if m.quiet.end == "cut" else ", as if they were complete"
        cuts.append((f"streams{how}", m.quiet.silence, stream))
    if m.poll.status not in (200, LIMITED):
        cuts.append(("long-polls", m.poll.seconds, stream))
    if m.socket.status == 101 and m.socket.arrivals and not m.socket.finished:
        cuts.append(("WebSockets", m.socket.silence, "silent WebSocket"))
    heartbeat = m.seen.heartbeat
    if not cuts:
        text = f"none within {m.idle:g} s of silence"
        if m.idle >= heartbeat:
            return Check(name, "ok", f"{text}; the server is silent for {heartbeat:g} s at most")
        hint = f"the server is silent for up to {heartbeat:g} s: --idle {heartbeat + MARGIN:g} tries that"
        return Check(name, "not checked", text, hint=hint)
    shortest = min(seconds for _, seconds, _ in cuts)
    text = "; ".join(f"{what} are cut after {seconds:.1f} s of silence" for what, seconds, _ in cuts)
    fixes: tuple[Change, ...] = ()
    for what in dict.fromkeys(what for _, _, what in cuts):
        fixes += tuple(change for change in changes(what, proxies) if change not in fixes)
    is_late = [what for what, _, _ in cuts] != ["long-polls"] and shortest > heartbeat
    cause = f"the server is silent for up to {heartbeat:g} s"
    if is_late:
        return Check(name, "ok", f"{text}; the server is silent for {heartbeat:g} s at most")
    hint = ""
    if shortest >= 2:
        hint = f"or let heartbeats come more often: SSESERVE_HEARTBEAT={int(shortest / 2)}"
    return Check(name, "problem", text, cause, fixes, hint)


def _socket(m: Measured, proxies: list[Proxy]) -> Check:
    name, socket = "WebSocket", m.socket
    if socket.status == 101 and socket.arrivals and socket.ponged:
        return Check(name, "ok", "opens, answers a ping, brings events")
    if socket.status == 101:
        missing = "no event" if not socket.arrivals else "no answer to a ping"
        return Check(name, "problem", f"opens, but {missing} comes", "the proxy does not pass frames on")
    if socket.status == LIMITED:
        return Check(name, "not checked", "the server has reached a limit of streams (429)")
    text = "the handshake was " + (
        "not answered" if socket.status is None else f"answered with {socket.status}"
    )
    cause = {426: "the fields Upgrade and Connection do not reach the server"}.get(
        socket.status or 0, "the proxy does not pass the handshake on"
    )
    return Check(name, "problem", text, cause, changes("WebSocket", proxies))


def _publishing(m: Measured, proxies: list[Proxy]) -> Check:
    name, body = "publishing", m.body
    if body.status is None:
        return Check(
            name, "problem", "a body in parts was not answered", "", changes("request buffering", proxies)
        )
    if body.status != 200:
        cause = "the proxy does not take a body without a length" if body.status in (411, 413) else ""
        text = f"a body in parts was answered with {body.status}"
        return Check(name, "problem", text, cause, changes("request buffering", proxies))
    if body.is_collected:
        return Check(
            name,
            "problem",
            "the lines of a batch reach the server together, at its end",
            "the proxy collects the request, so watchers see progress only when the worker has finished",
            changes("request buffering", proxies),
        )
    if not body.continued:
        return Check(
            name, "warning", "each line at once; Expect: 100-continue is not answered", "curl waits a second"
        )
    return Check(name, "ok", "each line of a batch reaches the server at once")


def _headers(m: Measured, proxies: list[Proxy]) -> Check:
    name = "request headers"
    if (seen := m.asked.seen) is None:
        return Check(name, "not checked", "no stream was opened")
    wanted = {"Last-Event-ID": "streams would not resume", "Cookie": "pages would not be signed in"}
    if m.has_token:
        wanted["Authorization"] = "nobody would be signed in"
    missing = [field for field in wanted if field.lower() not in seen.names]
    if seen.fields.get("last-event-id", CURSOR) != CURSOR:
        missing.append("Last-Event-ID")
    if not missing:
        return Check(name, "ok", f"{', '.join(wanted)} reach the server")
    fixes: tuple[Change, ...] = ()
    for field in missing:
        values = {"name": field, "variable": f"http_{field.lower().replace('-', '_')}"}
        fixes += changes("header", proxies, values)
    text = f"{', '.join(missing)} {'does' if len(missing) == 1 else 'do'} not reach the server"
    return Check(name, "problem", text, "; ".join(wanted[field] for field in missing), fixes)


def _host(m: Measured, proxies: list[Proxy]) -> Check:
    if m.seen.host == m.target.host:
        return Check("Host", "ok", "reaches the server unchanged")
    return Check(
        "Host",
        "problem",
        f"{m.target.host} reaches the server as {m.seen.host}",
        "the server takes its own pages for those of another origin",
        changes("Host", proxies),
    )


def _address(m: Measured, proxies: list[Proxy]) -> Check:
    name, seen = "client address", m.seen
    if seen.proxy or (seen.proxy_header == "proxy-protocol" and proxies):
        return Check(name, "ok", f"{seen.address}, as the proxy says")
    sent = [field for field in ("x-forwarded-for", "forwarded") if field in seen.fields]
    if not sent and not proxies:
        return Check(name, "ok", seen.address)
    fixes: tuple[Change, ...] = ()
    if not sent:
        fixes += changes("address", proxies)
    if not seen.proxy_header:
        fixes += (server_change(f"SSESERVE_TRUSTED_PROXIES={seen.address}"),)
    if sent == ["forwarded"] and seen.proxy_header != "forwarded":
        fixes += (server_change("SSESERVE_PROXY_HEADER=forwarded"),)
    return Check(
        name,
        "warning",
        f"every client counts as {seen.address}, the proxy",
        "limits of addresses apply to all clients together",
        fixes,
    )


def _cache(m: Measured, proxies: list[Proxy]) -> Check:
    name = "cache"
    fix = changes("cache", proxies, {"prefix": m.target.path})
    for response, seen in m.repeated:
        if seen is not None and seen.id != response.id:
            text = "a response is that to an earlier request"
            return Check(name, "problem", text, "the proxy stores what the server says it must not", fix)
    for stream in (m.asked, m.plain, m.twin, m.quiet):
        if stream.seen is not None and stream.response is not None and stream.seen.id != stream.response.id:
            text = "a stream is that of another client"
            return Check(name, "problem", text, "the proxy stores or shares streams", fix)
    if not m.repeated:
        return Check(name, "not checked", "no response came")
    return Check(name, "ok", "nothing is stored")


def _cors(m: Measured, proxies: list[Proxy]) -> Check:
    name = "CORS"
    if m.origin is None or m.cors is None:
        hint = "--origin https://app.example.com tries pages of that origin"
        return Check(name, "not checked", "pages of other origins", hint=hint)
    allow = server_change(f"SSESERVE_CORS_ORIGINS={m.origin}")
    for what, response in (("preflight", m.cors.preflight), ("request", m.cors.response)):
        if response is None:
            return Check(name, "problem", f"a {what} of {m.origin} was not answered")
        values = [value for key, value in response.headers if key == "access-control-allow-origin"]
        if len(values) > 1:
            cause = "the proxy adds Access-Control-Allow-Origin too, and a browser rejects two"
            text = f"a {what} of {m.origin} is allowed twice"
            return Check(name, "problem", text, cause, changes("CORS", proxies))
        if values and values[0] in (m.origin, "*") and response.status < 300:
            continue
        text = f"a {what} of {m.origin} is not allowed"
        if what == "preflight" and not response.is_server:
            cause = f"the proxy answers it itself, with {response.status}"
            return Check(name, "problem", text, cause, changes("CORS", proxies))
        if values:
            cause = f"only {values[0]} is allowed"
            return Check(name, "problem", text, cause, (*changes("CORS", proxies), allow))
        return Check(name, "problem", text, "the server does not list it", (allow,))
    return Check(name, "ok", f"pages of {m.origin} may read")


def _clock(m: Measured, _proxies: list[Proxy]) -> Check:
    ahead = "ahead of" if m.offset > 0 else "behind"
    text = f"the server's is {abs(m.offset):.1f} s {ahead} this machine's"
    if abs(m.offset) > LEEWAY + m.round_trip:
        cause = "tokens made by one clock are expired, or not yet valid, by the other: synchronize both (NTP)"
        return Check("clock", "problem", text, cause)
    if abs(m.offset) > CLOCK_WARNING + m.round_trip:
        cause = f"from {LEEWAY:g} s on tokens are rejected: synchronize both (NTP)"
        return Check("clock", "warning", text, cause)
    return Check("clock", "ok", f"within {max(abs(m.offset) + m.round_trip, 0.1):.1f} s of this machine's")


def _leaving(m: Measured, proxies: list[Proxy]) -> Check:
    name = "leaving"
    if m.noticed is None:
        return Check(name, "not checked", "no stream was seen open by the process that was asked")
    if m.noticed:
        return Check(name, "ok", "the server learns that a client has left")
    return Check(
        name,
        "problem",
        "the server does not learn that a client has left",
        "the proxy keeps its stream to the server open; it counts for the limits of streams",
        changes("leaving", proxies),
    )


def _outcome(response: Response | None) -> str:
    return "no response" if response is None else f"status {response.status}"


_JUDGES: tuple[Callable[[Measured, list[Proxy]], Check], ...] = (
    *(_tls, _version, _buffering, _compression, _idle, _socket, _publishing, _headers, _host, _address),
    *(_cache, _cors, _clock, _leaving),
)
