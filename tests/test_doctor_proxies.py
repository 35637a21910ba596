"""``sseserve doctor`` and real proxies: it names the lines of bad configurations, and these lines help."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from processes import run_server
from proxy_changes import apply_changes
from reverse_proxies import (
    APACHE_DEFAULT,
    CONFIGURATIONS,
    HAPROXY_DEFAULT,
    NGINX_DEFAULT,
    Configuration,
    run_proxy,
)

from sseserve.client.doctor import Report, diagnose

IDLE = 1.6  # seconds of silence, as long as the server is silent
VARNISH_PASS = ("return (pipe);", "if (req.http.Upgrade) { return (pipe); }\n return (pass);\n")
BACKEND_RESPONSE = ("sub vcl_pipe {", "sub vcl_backend_response {\n%s\n}\nsub vcl_pipe {")
APACHE_HEADERS = "LoadModule headers_module /usr/lib/apache2/modules/mod_headers.so\n"

HTTP_1_0, BUFFERING, COMPRESSION, IDLE_CUT = "HTTP version", "buffering", "compression", "idle cut-off"
WEBSOCKET, PUBLISHING, HEADERS, HOST = "WebSocket", "publishing", "request headers", "Host"
ADDRESS, CACHE, LEAVING = "client address", "cache", "leaving"


class Bad(NamedTuple):
    """A bad configuration.

    ``changed``: what makes the good one bad, or another text instead. ``lines``: what is to be named by each
    check that is not ok, with "-" before what is to be removed. ``others``: whether others may fail, too.
    """

    good: str
    changed: tuple[tuple[str, str], ...] | str
    lines: dict[str, list[str]]
    options: tuple[str, ...] = ()
    others: bool = False

    @property
    def configuration(self) -> Configuration:
        good = CONFIGURATIONS[self.good]
        if isinstance(self.changed, str):
            return good._replace(text=self.changed)
        text = good.text
        for old, new in self.changed:
            assert old in text, old
            text = text.replace(old, new, 1)
        return good._replace(text=text, options=self.options or good.options)


NGINX_WEBSOCKET = [
    "proxy_http_version 1.1;",
    "proxy_set_header Upgrade $http_upgrade;",
    "proxy_set_header Connection $http_connection;",
]
NGINX_BODY = ["proxy_request_buffering off;", "proxy_http_version 1.1;"]
NGINX_HOST = ["proxy_set_header Host $http_host;"]
NGINX_ADDRESS = ["proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"]
VARNISH_WEBSOCKET = [
    "if (req.http.Upgrade) { return (pipe); }",
    "set bereq.http.Upgrade = req.http.Upgrade;",
    "set bereq.http.Connection = req.http.Connection;",
]
CADDY_FLUSH = "flush_interval -1 # forward all responses at once, not only event streams"

BAD = {
    "nginx: by default": Bad(
        "nginx",
        NGINX_DEFAULT.replace("{ proxy_pass", "{\n        proxy_pass").replace("; }", ";\n    }"),
        {
            HTTP_1_0: ["proxy_http_version 1.1;"],
            WEBSOCKET: NGINX_WEBSOCKET,
            PUBLISHING: NGINX_BODY,
            HOST: NGINX_HOST,
            ADDRESS: NGINX_ADDRESS,
        },
    ),
    "nginx: HTTP/1.0 to the server": Bad(
        "nginx",
        (("proxy_http_version 1.1;", ""),),
        {HTTP_1_0: ["proxy_http_version 1.1;"], PUBLISHING: NGINX_BODY},
    ),
    "nginx: buffers what it compresses": Bad(
        "nginx",
        (
            ("gzip off;", "gzip on;\ngzip_types text/event-stream;"),
            ("proxy_buffering off;", "proxy_buffering on;\nproxy_ignore_headers X-Accel-Buffering;"),
        ),
        {COMPRESSION: ["gzip off;"]},
    ),
    "nginx: compresses": Bad(
        "nginx",
        (("gzip off;", "gzip on;\ngzip_types text/event-stream;"),),
        {COMPRESSION: ["gzip off;"]},
    ),
    "nginx: short read timeout": Bad(
        "nginx",
        (("proxy_read_timeout 3600s", "proxy_read_timeout 1s"),),
        {IDLE_CUT: ["proxy_read_timeout 3600s;"]},
    ),
    "nginx: fields, and requests": Bad(
        "nginx",
        (
            ("proxy_set_header Upgrade $http_upgrade;", ""),
            ("proxy_set_header Host $http_host;", ""),
            ("proxy_request_buffering off;", 'proxy_set_header Last-Event-ID "";'),
            ("proxy_set_header X-Forwarded-For", "proxy_set_header X-A"),
        ),
        {
            WEBSOCKET: NGINX_WEBSOCKET,
            PUBLISHING: NGINX_BODY,
            HEADERS: ["proxy_set_header Last-Event-ID $http_last_event_id;"],
            HOST: NGINX_HOST,
            ADDRESS: NGINX_ADDRESS,
        },
    ),
    "nginx: port lost": Bad("nginx", (("Host $http_host;", "Host $host;"),), {HOST: NGINX_HOST}),
    "nginx: caches": Bad(
        "nginx",
        (
            ("upstream sseserve {", "proxy_cache_path cache keys_zone=all:1m;\nupstream sseserve {"),
            ("proxy_buffering off;", "proxy_ignore_headers Cache-Control X-Accel-Buffering;"),
            ("proxy_cache off;", "proxy_cache all;\nproxy_cache_valid 200 1m;\n"),
        ),
        {CACHE: ["proxy_cache off;"]},
        others=True,
    ),
    "haproxy: by default": Bad(
        "haproxy",
        HAPROXY_DEFAULT,
        {BUFFERING: ["option http-no-delay"], ADDRESS: ["option forwardfor"]},
    ),
    "haproxy: short server timeout": Bad(
        "haproxy",
        (("timeout server 1h", "timeout server 1s"),),
        {IDLE_CUT: ["timeout server 1h", "timeout client 1h"]},
    ),
    "haproxy: fields, and requests": Bad(
        "haproxy",
        (
            ("option forwardfor", "option http-buffer-request\n    option forwardfor"),
            ("bind :80\n", "bind :80\n    http-request set-header Host internal\n"),
            ("bind :80\n", "bind :80\n    http-request del-header Upgrade\n"),
            ("bind :80\n", "bind :80\n    http-request del-header Last-Event-ID\n"),
        ),
        {
            WEBSOCKET: ["-http-request del-header Upgrade"],
            PUBLISHING: ["-option http-buffer-request"],
            HEADERS: ["-http-request del-header Last-Event-ID"],
            HOST: ["-http-request set-header Host"],
        },
    ),
    "haproxy: short tunnel timeout": Bad(
        "haproxy", (("timeout tunnel 1h", "timeout tunnel 1s"),), {IDLE_CUT: ["timeout tunnel 1h"]}
    ),
    "caddy: collects responses": Bad(
        "caddy",
        ((CADDY_FLUSH, "buffer_responses"),),
        {BUFFERING: ["flush_interval -1", "-buffer_responses", "-response_buffers"]},
        others=True,  # the response to a handshake, too
    ),
    "caddy: fields, and requests": Bad(
        "caddy",
        (
            (CADDY_FLUSH, f"{CADDY_FLUSH}\nbuffer_requests\nheader_up -Last-Event-ID"),
            (CADDY_FLUSH, f"{CADDY_FLUSH}\nheader_up Host {{upstream_hostport}}"),
        ),
        {
            PUBLISHING: ["-buffer_requests", "-request_buffers"],
            HEADERS: ["-header_up -Last-Event-ID"],
            HOST: ["-header_up Host"],
        },
    ),
    "caddy: compresses": Bad(
        "caddy",
        (("\treverse_proxy", "\tencode gzip\n\treverse_proxy"),),
        {COMPRESSION: ["@plain not path /api/*", "encode @plain gzip"]},
    ),
    "caddy: short read timeout": Bad(
        "caddy",
        ((CADDY_FLUSH, f"{CADDY_FLUSH}\ntransport http {{\nread_timeout 1s\n}}"),),
        {IDLE_CUT: ["-read_timeout", "-response_header_timeout"]},
    ),
    "caddy: HTTP/2 to the server": Bad(
        "caddy",
        ((CADDY_FLUSH, f"{CADDY_FLUSH}\ntransport http {{\nversions h2c 2\n}}"),),
        {WEBSOCKET: ["-versions"]},
    ),
    "apache: by default": Bad(
        "apache",
        APACHE_DEFAULT,
        {
            WEBSOCKET: ["upgrade=websocket"],
            PUBLISHING: ["SetEnv proxy-prefetch-nonblocking 1"],
            HOST: ["ProxyPreserveHost On"],
        },
    ),
    "apache: short timeout": Bad(
        "apache",
        (("timeout=3600", "timeout=1"), ("TimeOut 3600", "TimeOut 60")),
        {IDLE_CUT: ["timeout=3600", "TimeOut 3600"]},
    ),
    "apache: HTTP/1.0 to the server": Bad(
        "apache",
        (("SetEnv no-gzip 1", "SetEnv no-gzip 1\nSetEnv force-proxy-request-1.0 1"),),
        {
            HTTP_1_0: ["-SetEnv force-proxy-request-1.0", "-SetEnv downgrade-1.0"],
            WEBSOCKET: ["upgrade=websocket"],
            PUBLISHING: ["SetEnv proxy-prefetch-nonblocking 1"],
        },
    ),
    "apache: compresses, and fields": Bad(
        "apache",
        (
            ("<VirtualHost", f"{APACHE_HEADERS}<VirtualHost"),
            (
                "SetEnv no-gzip 1",
                "AddOutputFilterByType DEFLATE text/event-stream\nRequestHeader unset Last-Event-ID",
            ),
        ),
        {
            COMPRESSION: ["SetEnv no-gzip 1", "SetEnv no-brotli 1"],
            HEADERS: ["-RequestHeader unset Last-Event-ID"],
        },
    ),
    "varnish: by default": Bad(
        "varnish",
        (("return (pipe);", ""), ("if (req.http.Upgrade) {", "if (false) {")),
        {WEBSOCKET: VARNISH_WEBSOCKET},
    ),
    "varnish: collects responses": Bad(
        "varnish",
        (VARNISH_PASS, (BACKEND_RESPONSE[0], BACKEND_RESPONSE[1] % "set beresp.do_stream = false;")),
        {BUFFERING: ["set beresp.do_stream = true;"], LEAVING: []},
    ),
    "varnish: compresses": Bad(
        "varnish",
        (VARNISH_PASS, (BACKEND_RESPONSE[0], BACKEND_RESPONSE[1] % "set beresp.do_gzip = true;")),
        {COMPRESSION: ["set beresp.do_gzip = false;"], BUFFERING: [], LEAVING: []},
    ),
    "varnish: caches": Bad(
        "varnish",
        (
            ("return (pipe);", "if (req.http.Upgrade) { return (pipe); }\n return (hash);\n"),
            (BACKEND_RESPONSE[0], BACKEND_RESPONSE[1] % "set beresp.ttl = 60s; return (deliver);"),
        ),
        {CACHE: ['if (req.url ~ "^/api/" && !req.http.Upgrade) { return (pass); }']},
        others=True,
    ),
    "varnish: short timeouts": Bad(
        "varnish",
        (
            VARNISH_PASS,
            (".first_byte_timeout = 3600s", ".first_byte_timeout = 1s"),
            (".between_bytes_timeout = 3600s", ".between_bytes_timeout = 1s"),
        ),
        {IDLE_CUT: [".first_byte_timeout = 3600s;", ".between_bytes_timeout = 3600s;"]},
    ),
    "varnish: short pipe timeout, and fields": Bad(
        "varnish",
        (("return (pipe);", 'set req.http.Host = "internal";\nunset req.http.Cookie;\nreturn (pipe);'),),
        {
            IDLE_CUT: ["-p pipe_timeout=3600"],
            HEADERS: ["-unset req.http.Cookie;"],
            HOST: ["-set req.http.Host", "-set req.http.host"],
        },
        options=("-p", "pipe_timeout=1"),
    ),
}
PROXIES = sorted({bad.good for bad in BAD.values()})


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    with run_server(drain=1, allowed_hosts="*", trusted_proxies="127.0.0.1", heartbeat=IDLE) as url:
        yield url


def diagnose_all(
    folder: Path, server_url: str, configurations: dict[str, Configuration]
) -> dict[str, Report]:
    """Run a proxy for each configuration, and the doctor before all of them."""
    urls: dict[str, str] = {}
    reports: dict[str, Report] = {}
    started, ended = threading.Barrier(len(configurations) + 1), threading.Event()

    def run(name: str, configuration: Configuration) -> None:
        place = folder / re.sub(r"\W+", "-", name)
        place.mkdir(parents=True)
        try:
            with run_proxy(place, configuration, server_url) as (url, _):
                urls[name] = url
                started.wait()
                ended.wait()
        except threading.BrokenBarrierError:
            pass  # another one could not be started
        except BaseException:
            started.abort()
            raise

    async def diagnose_one(name: str, url: str) -> None:
        reports[name] = await diagnose(url, idle=IDLE)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for name, url in urls.items():
                nursery.start_soon(diagnose_one, name, url)

    # Starting and stopping one after the other would take most of the time.
    with ThreadPoolExecutor(len(configurations)) as threads:
        running = [threads.submit(run, *item) for item in configurations.items()]
        try:
            with suppress(threading.BrokenBarrierError):
                started.wait()
                trio.run(main)
        finally:
            ended.set()
        for proxy in running:
            proxy.result()
    return reports


def failed(report: Report) -> dict[str, list[str]]:
    """The lines that each check names that is not ok."""
    return {
        check.name: [
            line
            for change in check.changes
            for line in (*change.lines, *(f"-{beginning}" for beginning in change.remove))
        ]
        for check in report.checks
        if check.status != "ok" and check.name != "CORS"
    }


def test_good_configurations(tmp_path, server_url):
    """Of those in examples/deploy it says that all is ok, and it recognizes the proxy."""
    good = {name: CONFIGURATIONS[name] for name in PROXIES}
    for name, report in diagnose_all(tmp_path, server_url, good).items():
        assert failed(report) == {}, name
        assert [proxy.kind for proxy in report.proxies] == [name]
        assert not report.has_problems


@pytest.mark.parametrize("proxy", PROXIES)
def test_bad_configurations(tmp_path, server_url, proxy):
    """It names exactly the lines, and with these lines all is ok."""
    bad = {name: case for name, case in BAD.items() if case.good == proxy}
    configurations = {name: case.configuration for name, case in bad.items()}
    reports = diagnose_all(tmp_path / "bad", server_url, configurations)
    better = {}
    for name, case in bad.items():
        report = reports[name]
        assert [known.kind for known in report.proxies] == [proxy], name
        named = failed(report)
        if case.others:
            named = {check: named.get(check, []) for check in case.lines}
        assert named == case.lines, (name, report)
        changes = [change for check in report.checks for change in check.changes if check.name in case.lines]
        assert {change.proxy for change in changes} == {proxy}
        better[name] = apply_changes(case.configuration, changes)
    reports = diagnose_all(tmp_path / "better", server_url, better)
    assert {name: failed(report) for name, report in reports.items()} == {name: {} for name in bad}
