"""What it means that the first request was not served. No I/O, no clock."""

from __future__ import annotations

import msgspec

from ..errors import CannotConnect
from .judge import Check
from .proxies import Change, changes, recognize, server_change
from .records import Response, Target

__all__ = ["explain_refusal"]


class _Error(msgspec.Struct):
    code: str
    message: str


class _Body(msgspec.Struct):
    error: _Error


def explain_refusal(target: Target, response: Response, body: bytes, *, has_token: bool) -> Check:
    """Return the check of what stands in the way.

    Raises:
        CannotConnect: that is not between the client and the server.
    """
    try:
        error: _Error | None = msgspec.json.decode(body, type=_Body).error
    except msgspec.DecodeError:
        error = None
    fixes: tuple[Change, ...]
    proxies = recognize([response.headers], (), "")
    who = " and ".join(map(str, proxies)) or target.host
    status = response.status
    if error is None:
        raise CannotConnect(_explain_other(response, who))
    if error.code == "host_not_allowed":
        if f"'{target.host}'" in error.message:
            cause = "the server serves only the names that it knows"
            fixes = (server_change(f"SSESERVE_ALLOWED_HOSTS={target.name}"),)
        else:
            cause = f"the proxy does not pass {target.host} on: {error.message}"
            fixes = changes("Host", proxies)
        return Check("Host", "problem", f"the server rejects every request ({status})", cause, fixes)
    if status == 401 and has_token and 'error="' not in (response.field("www-authenticate") or ""):
        values = {"name": "Authorization", "variable": "http_authorization"}
        return Check(
            "request headers",
            "problem",
            "Authorization does not reach the server",
            "nobody can be signed in",
            changes("header", proxies, values),
        )
    if status == 401 and not has_token:
        raise CannotConnect("the server requires a token: give one with --token or SSESERVE_TOKEN")
    if status == 404:
        raise CannotConnect(
            f"the server at {target.host} has no {target.path}/api/diagnostics: it is an older one, "
            f"or its URL has another path"
        )
    raise CannotConnect(f"the server has rejected the request with {status}: {error.message}")


def _explain_other(response: Response, who: str) -> str:
    status = response.status
    if 300 <= status < 400 and (location := response.field("location")) is not None:
        return f"{who} redirects to {location.removesuffix('/api/diagnostics')}: give that URL"
    if status in (502, 503, 504):
        return f"{who} answers with {status}: it does not reach the server"
    return f"{who} answers with {status}, and not as sseserve does: is the URL that of the server?"
