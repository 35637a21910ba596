"""``sseserve doctor``: what stands between a client and a server, and what to change.

``wire`` shows HTTP as it comes, ``measure`` does everything at once, ``judge`` says what it means, and
``refusals`` what it means that the first request was not served. ``proxies`` knows whose line changes it, and
``report`` writes the table.
"""

from __future__ import annotations

import ssl
from http import HTTPStatus
from urllib.parse import urlsplit

from .judge import Check, Report, judge
from .measure import measure
from .records import Headers, Target
from .refusals import explain_refusal
from .report import render
from .wire import parse_seen, request

__all__ = ["Check", "Report", "diagnose", "render"]

_PORTS = {"http": 80, "https": 443}


def parse_url(url: str, ca: str | None = None) -> Target:
    """Read the URL of a server.

    Raises:
        ValueError: it is none.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in _PORTS or not parts.hostname or port == 0 or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is not a server URL (http://host:port)")
    default = _PORTS[parts.scheme]
    name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = port or default
    host = name if port == default else f"{name}:{port}"
    return Target(parts.scheme, parts.hostname, port, host, parts.path.rstrip("/"), ca)


async def diagnose(
    url: str, *, token: str | None = None, ca: str | None = None, origin: str | None = None, idle: float = 5.0
) -> Report:
    """Find out what stands between this machine and the server at ``url``.

    Args:
        url: of the server.
        token: a bearer token, if the server requires one.
        ca: path of the certificates (PEM) that are trusted with https; None: the system's.
        origin: of a page whose requests are tried; None: CORS is not checked.
        idle: how long streams are silent, in seconds: a shorter timeout of a proxy is found.

    Raises:
        CannotConnect: there is no such server, or it lets nobody in.
        ValueError: the URL is none.
    """
    target = parse_url(url, ca)
    headers: Headers = [] if token is None else [("Authorization", f"Bearer {token}")]
    try:
        first, body = await request(target, "/api/diagnostics", headers)
    except ssl.SSLCertVerificationError as error:
        cause = "browsers and clients do not connect: renew the certificate, or send the whole chain"
        return _stopped(
            url, Check("TLS", "problem", f"the certificate is not valid: {error.verify_message}", cause)
        )
    seen = parse_seen(body)
    if first.status == HTTPStatus.OK and seen is not None:
        measured = await measure(target, first, seen, headers, origin=origin, idle=idle)
        return judge(url, measured)
    return _stopped(url, explain_refusal(target, first, body, has_token=token is not None))


def _stopped(url: str, check: Check) -> Report:
    return Report(url, "", (), (check, Check("everything else", "not checked", "until this is solved")))
