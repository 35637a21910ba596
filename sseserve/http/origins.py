"""Which hosts a request may be for, and which pages may make it. No I/O.

A browser lets any page send requests to a server that its user can reach, such as one on localhost. Two
checks keep those pages out. A program sends no ``Origin``, and the host that its user has given it.

- ``Host`` must be a name of this server. Otherwise a page could make its own name resolve to this server's
  address (DNS rebinding), and so count as a page of this server, which may read everything.
- A request that changes something, and a WebSocket, must not come from a page of another origin. CORS does
  not prevent that: it hides the response (Fetch Standard, section 3.2), and not even that of a WebSocket
  (RFC 6455, section 10.2). ``Sec-Fetch-Site`` says it too (W3C, Fetch Metadata Request Headers, section 2.4),
  also of requests without an ``Origin``, and of http pages whose host is that of an https server.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import ip_address
from urllib.parse import urlsplit

from ..errors import BadRequest, Forbidden, HostNotAllowed
from .messages import Request
from .routing import Kind, Match

__all__ = ["Origins", "check_host", "is_loopback"]

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:@/\\?#\[\]]+))(?::\d*)?")
# What a message shows of a header field: one that was folded may have other fields in it, and so a token.
_WORD = re.compile(r"[\x21-\x7e]{1,256}")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Origins:
    """The hosts and origins of one server.

    Always allowed are ``localhost``, the addresses of the loopback interface, and ``hosts``. A server that
    listens elsewhere too has other addresses, and names in its own network: any IP address and any name
    without a dot is allowed then, as the owner of a page cannot make those resolve to something else.

    Args:
        hosts: the addresses that the server listens on; none: on a unix socket only.
        allowed_hosts: more names, without a port; ``.a.example``: a.example and all below it; ``*``: any.
        cors_origins: the other origins whose pages may do everything; ``*``: all.
    """

    def __init__(
        self, hosts: Sequence[str], *, allowed_hosts: Sequence[str] = (), cors_origins: Sequence[str] = ()
    ) -> None:
        self._hosts = hosts
        self._is_local = all(map(is_loopback, hosts))
        self.reload(allowed_hosts=allowed_hosts, cors_origins=cors_origins)

    def reload(self, *, allowed_hosts: Sequence[str], cors_origins: Sequence[str]) -> None:
        """Replace what is allowed."""
        self._names = {name.lower() for name in (*self._hosts, *allowed_hosts)}
        self._origins = cors_origins
        self._allows = lru_cache(maxsize=16)(self._is_allowed)  # most requests have the same host

    def check(self, request: Request, match: Match, *, is_open: bool) -> None:
        """Check a request's ``Host`` and ``Origin``.

        Args:
            request: to be checked.
            match: its route.
            is_open: everybody may do everything, so ``*`` in ``cors_origins`` means changes, too. With
                authentication it does not: a browser may send its user's credentials along.

        Raises:
            BadRequest: its ``Host`` is malformed.
            HostNotAllowed: it is for another host.
            Forbidden: it comes from a page of another origin.
        """
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if host and not self._allows(host):
            check_host(request)
            shown = repr(host) if _WORD.fullmatch(host) else "this"
            raise HostNotAllowed(
                f"{shown} is not a host of this server; if it should be, add its name to the setting "
                f"allowed_hosts (SSESERVE_ALLOWED_HOSTS)"
            )
        if request.method in _SAFE_METHODS and match.route.kind is not Kind.SOCKET:
            return
        if origin in self._origins or (is_open and "*" in self._origins):
            return
        is_own = request.headers.get("sec-fetch-site", "none") in ("same-origin", "none")
        if is_own and (origin is None or _is_same_host(origin, host)):
            return
        is_word = origin is not None and "@" not in origin and _WORD.fullmatch(origin)
        shown = f"the origin {origin}" if is_word else "another origin"
        raise Forbidden(
            f"a page of {shown} may not do this here; add it to the setting cors_origins "
            f"(SSESERVE_CORS_ORIGINS), or let a proxy pass the Host header on unchanged, with its port"
        )

    def _is_allowed(self, host: str) -> bool:
        if "*" in self._names:
            return True
        if (parts := _HOST.fullmatch(host.lower())) is None:
            return False
        name = (parts[1] or parts[2]).removesuffix(".")
        if name in self._names or name == "localhost" or is_loopback(name):
            return True
        if any(name.endswith(suffix) or name == suffix[1:] for suffix in self._names if suffix[:1] == "."):
            return True
        return not self._is_local and ("." not in name or _is_address(name))


def check_host(request: Request) -> None:
    """Raise BadRequest if a request's ``Host`` is malformed (RFC 9112, section 3.2)."""
    host = request.headers.get("host", "")
    if host and _HOST.fullmatch(host.lower()) is None:
        raise BadRequest(
            "the field Host must be a host name or an address, with a port if it is another than usual"
        )


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    """Return whether a host is the loopback interface, by its name or address."""
    return name == "localhost" or (_is_address(name) and ip_address(name).is_loopback)


def _is_same_host(origin: str, host: str) -> bool:
    """Whether an origin has this ``Host``. A proxy may have terminated TLS, so the scheme does not count."""
    try:
        page, ours = urlsplit(origin), urlsplit(f"{origin.partition(':')[0]}://{host}")
        # An app in a web view may have a scheme of its own, and any host: capacitor://localhost.
        if not page.hostname or (default := {"http": 80, "https": 443}.get(page.scheme)) is None:
            return False
        return (page.hostname, page.port or default) == (ours.hostname, ours.port or default)
    except ValueError:
        return False
