"""Which proxies stand before a server, and which line of whose configuration changes what. No I/O.

``tests/test_doctor_proxies.py`` tries them on the proxies that can run there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import msgspec

from .records import Headers, field

__all__ = ["NAMES", "SERVER", "Change", "Proxy", "changes", "recognize", "server_change"]

SERVER = "sseserve"


class Proxy(msgspec.Struct, frozen=True):
    """A kind of proxy; ``version`` as it names itself, empty if it does not."""

    kind: str
    version: str = ""

    def __str__(self) -> str:
        return f"{NAMES[self.kind]} {self.version}".rstrip()


class Change(msgspec.Struct, frozen=True):
    """A change of a configuration.

    Attributes:
        proxy: whose: a key of ``NAMES``.
        place: where, such as a block.
        lines: that belong there, instead of any others of the same directive.
        remove: how lines begin that must not be there.
    """

    proxy: str
    place: str
    lines: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()


NAMES = {
    "nginx": "nginx",
    "haproxy": "HAProxy",
    "caddy": "Caddy",
    "apache": "Apache httpd",
    "varnish": "Varnish",
    "envoy": "Envoy",
    "aws": "AWS load balancer",
    "google": "Google Cloud",
    "cloudflare": "Cloudflare",
    SERVER: "sseserve",
}
# Those whose lines are shown where none was recognised.
_COMMON = ("nginx", "haproxy", "caddy", "apache", "varnish")

_VERSION = r"(?:/(\d[\w.]*))?"
_SERVER_FIELDS = {
    "nginx": re.compile(rf"\b(?:nginx|openresty){_VERSION}", re.IGNORECASE),
    "apache": re.compile(rf"\bApache{_VERSION}"),
    "caddy": re.compile(rf"\bCaddy{_VERSION}"),
    "envoy": re.compile(rf"\benvoy{_VERSION}"),
    "aws": re.compile(rf"\bawselb{_VERSION}"),
    "google": re.compile(rf"\bGoogle Frontend{_VERSION}|\bgws{_VERSION}"),
    "cloudflare": re.compile(rf"\bcloudflare{_VERSION}"),
}
_VIA = {
    "varnish": re.compile(r"\bvarnish(?: \(Varnish/([\w.]+)\))?", re.IGNORECASE),
    "caddy": re.compile(r"\bCaddy()"),
    "google": re.compile(r"\bgoogle()"),
    "apache": re.compile(r"\(Apache/?([\w.]*)[^)]*\)"),
}
# Fields that only one kind of proxy adds: to responses, or to requests.
_FIELDS = {
    "x-varnish": "varnish",
    "cf-ray": "cloudflare",
    "x-envoy-upstream-service-time": "envoy",
    "x-envoy-expected-rq-timeout-ms": "envoy",
    "x-amzn-trace-id": "aws",
    "x-cloud-trace-context": "google",
}
# What is in the response to what is no request, of those that do not name themselves.
_PAGES = {
    "haproxy": re.compile(r"<h1>400 Bad request</h1>\nYour browser sent an invalid request\."),
    "varnish": re.compile(r"\AHTTP/1\.1 400 Bad Request\r\n\r\n\Z"),
}


def recognize(responses: Iterable[Headers], request_fields: Iterable[str], error_page: str) -> list[Proxy]:
    """Return the proxies that can be told, each once.

    Args:
        responses: the header fields of responses.
        request_fields: the names of those that have reached the server.
        error_page: the response to what is no request.
    """
    found: dict[str, str] = {}

    def note(kind: str, version: str = "") -> None:
        found[kind] = found.get(kind) or version

    for headers in (*responses, _parse_page(error_page)):
        for fields, name in ((_SERVER_FIELDS, "server"), (_VIA, "via")):
            value = field(headers, name) or ""
            for kind, pattern in fields.items():
                if (match := pattern.search(value)) is not None:
                    note(kind, next(filter(None, match.groups()), ""))
        for name, kind in _FIELDS.items():
            if field(headers, name) is not None:
                note(kind)
    for name in request_fields:
        if name in _FIELDS:
            note(_FIELDS[name])
    for kind, pattern in _PAGES.items():
        if pattern.search(error_page):
            note(kind)
    return [Proxy(kind, version) for kind, version in found.items()]


def _parse_page(page: str) -> Headers:
    lines = page.partition("\r\n\r\n")[0].split("\r\n")[1:]
    fields = [line.partition(":") for line in lines]
    return [(name.lower(), value.strip()) for name, _, value in fields]


def changes(
    what: str, proxies: Iterable[Proxy], values: Mapping[str, str] | None = None
) -> tuple[Change, ...]:
    """Return what to change at the proxies that were recognised.

    If none of them can do it, another one stands behind them: then what to change at any common one.

    Args:
        what: a key of ``_CHANGES``.
        proxies: those that were recognised.
        values: for the names in braces in the lines.
    """
    known = _CHANGES[what]
    kinds = [proxy.kind for proxy in proxies if known.get(proxy.kind)] or list(_COMMON)

    def fill(texts: tuple[str, ...]) -> tuple[str, ...]:
        for name, value in (values or {}).items():
            texts = tuple(text.replace(f"{{{name}}}", value) for text in texts)
        return texts

    return tuple(
        Change(kind, change.place, fill(change.lines), fill(change.remove))
        for kind in kinds
        for change in known.get(kind, ())
    )


def server_change(line: str) -> Change:
    """Return a change of the server's environment."""
    return Change(SERVER, "environment", (line,))


def _at(place: str, *lines: str, remove: tuple[str, ...] = ()) -> Change:
    return Change("", place, lines, remove)


_CHANGES: dict[str, dict[str, tuple[Change, ...]]] = {
    "buffering": {
        "nginx": (_at("location", "proxy_buffering off;"),),
        "haproxy": (_at("defaults", "option http-no-delay"),),
        "caddy": (
            _at("reverse_proxy", "flush_interval -1", remove=("buffer_responses", "response_buffers")),
        ),
        "apache": (_at("ProxyPass", "flushpackets=on", remove=("SetOutputFilter BUFFER",)),),
        "varnish": (_at("vcl_backend_response", "set beresp.do_stream = true;"),),
    },
    "compression": {
        "nginx": (_at("location", "gzip off;"),),
        "haproxy": (_at("backend", remove=("compression algo",)),),
        "caddy": (_at("site", "@plain not path {prefix}/api/*", "encode @plain gzip"),),
        "apache": (_at("VirtualHost", "SetEnv no-gzip 1", "SetEnv no-brotli 1"),),
        "varnish": (_at("vcl_backend_response", "set beresp.do_gzip = false;"),),
    },
    "silent stream": {
        "nginx": (_at("location", "proxy_read_timeout 3600s;"),),
        "haproxy": (_at("defaults", "timeout server 1h", "timeout client 1h"),),
        "caddy": (_at("transport", remove=("read_timeout", "response_header_timeout")),),
        "apache": (_at("ProxyPass", "timeout=3600"), _at("VirtualHost", "TimeOut 3600")),
        "varnish": (_at("backend", ".first_byte_timeout = 3600s;", ".between_bytes_timeout = 3600s;"),),
        "envoy": (_at("route", "timeout: 0s", "idle_timeout: 3600s"),),
        "aws": (_at("load balancer attributes", "idle_timeout.timeout_seconds=3600"),),
        "google": (_at("backend service or Cloud Run service", "--timeout=3600"),),
        "cloudflare": (),  # 100 seconds, which only its largest plan can change
    },
    "silent WebSocket": {
        "nginx": (_at("location", "proxy_read_timeout 3600s;"),),
        "haproxy": (_at("defaults", "timeout tunnel 1h"),),
        "caddy": (_at("transport", remove=("read_timeout", "response_header_timeout")),),
        "apache": (_at("ProxyPass", "timeout=3600"), _at("VirtualHost", "ProxyWebsocketIdleTimeout 3600")),
        "varnish": (_at("varnishd", "-p pipe_timeout=3600"),),
        "aws": (_at("load balancer attributes", "idle_timeout.timeout_seconds=3600"),),
        "google": (_at("backend service or Cloud Run service", "--timeout=3600"),),
    },
    "HTTP/1.0": {
        "nginx": (_at("location", "proxy_http_version 1.1;"),),
        "apache": (_at("VirtualHost", remove=("SetEnv force-proxy-request-1.0", "SetEnv downgrade-1.0")),),
    },
    "HTTP/2": {
        "nginx": (_at("server", "listen 443 ssl http2;"),),
        "haproxy": (_at("frontend", "bind :443 ssl crt /etc/haproxy/site.pem alpn h2,http/1.1"),),
        "caddy": (_at("servers", "protocols h1 h2 h3"),),
        "apache": (_at("VirtualHost", "Protocols h2 http/1.1"),),
    },
    "WebSocket": {
        "nginx": (
            _at(
                "location",
                "proxy_http_version 1.1;",
                "proxy_set_header Upgrade $http_upgrade;",
                "proxy_set_header Connection $http_connection;",
            ),
        ),
        "haproxy": (_at("frontend or backend", remove=("http-request del-header Upgrade",)),),
        "caddy": (_at("transport", remove=("versions",)),),
        "apache": (_at("ProxyPass", "upgrade=websocket"),),
        "varnish": (
            _at("vcl_recv", "if (req.http.Upgrade) { return (pipe); }"),
            _at(
                "vcl_pipe",
                "set bereq.http.Upgrade = req.http.Upgrade;",
                "set bereq.http.Connection = req.http.Connection;",
            ),
        ),
    },
    "request buffering": {
        "nginx": (_at("location", "proxy_request_buffering off;", "proxy_http_version 1.1;"),),
        "haproxy": (_at("defaults", remove=("option http-buffer-request",)),),
        "caddy": (_at("reverse_proxy", remove=("buffer_requests", "request_buffers")),),
        "apache": (_at("VirtualHost", "SetEnv proxy-prefetch-nonblocking 1"),),
        "varnish": (_at("vcl_recv", remove=("std.cache_req_body",)),),
    },
    "header": {
        "nginx": (_at("location", "proxy_set_header {name} ${variable};"),),
        "haproxy": (_at("frontend or backend", remove=("http-request del-header {name}",)),),
        "caddy": (_at("reverse_proxy", remove=("header_up -{name}",)),),
        "apache": (_at("VirtualHost", remove=("RequestHeader unset {name}",)),),
        "varnish": (_at("vcl_recv", remove=("unset req.http.{name};",)),),
    },
    "Host": {
        "nginx": (_at("location", "proxy_set_header Host $http_host;"),),
        "haproxy": (_at("frontend or backend", remove=("http-request set-header Host",)),),
        "caddy": (_at("reverse_proxy", remove=("header_up Host",)),),
        "apache": (_at("VirtualHost", "ProxyPreserveHost On"),),
        "varnish": (_at("vcl_recv", remove=("set req.http.Host", "set req.http.host")),),
    },
    "address": {
        "nginx": (_at("location", "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"),),
        "haproxy": (_at("defaults", "option forwardfor"),),
        "caddy": (_at("reverse_proxy", remove=("header_up -X-Forwarded-For",)),),
        "apache": (_at("VirtualHost", "ProxyAddHeaders On"),),
        "varnish": (_at("vcl_recv", remove=("unset req.http.X-Forwarded-For",)),),
    },
    "cache": {
        "nginx": (_at("location", "proxy_cache off;"),),
        "haproxy": (_at("frontend or backend", remove=("http-request cache-use",)),),
        "apache": (_at("VirtualHost", "CacheDisable /"),),
        "varnish": (
            _at("vcl_recv", 'if (req.url ~ "^{prefix}/api/" && !req.http.Upgrade) { return (pass); }'),
        ),
    },
    "CORS": {
        "nginx": (_at("location", remove=("add_header Access-Control-Allow-",)),),
        "haproxy": (_at("frontend or backend", remove=("http-response add-header Access-Control-Allow-",)),),
        "caddy": (_at("site", remove=("header Access-Control-Allow-", "header +Access-Control-Allow-")),),
        "apache": (
            _at("VirtualHost", remove=("Header add Access-Control-", "Header always set Access-Control-")),
        ),
        "varnish": (_at("vcl_deliver", remove=("set resp.http.Access-Control-Allow-",)),),
    },
    "leaving": {
        "nginx": (_at("location", "proxy_ignore_client_abort off;"),),
        "varnish": (_at("vcl_recv", "return (pipe);"),),
    },
}
