"""nginx, HAProxy, Caddy, Apache httpd and Varnish before a server: by default, and as in examples/deploy."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
from ports import free_port
from processes import ROOT, Program, wait_until
from programs import require_program

__all__ = ["CONFIGURATIONS", "DEPLOY", "Configuration", "run_proxy"]

DEPLOY = ROOT / "examples" / "deploy"

# The main configuration of nginx, which includes a site's. All files that nginx writes are in the folder.
NGINX_MAIN = """
{user}
worker_processes 1;
worker_shutdown_timeout 1s;
pid {folder}/pid;
error_log stderr notice;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    scgi_temp_path {folder}/scgi;
    uwsgi_temp_path {folder}/uwsgi;
    include {folder}/sseserve.conf;
}}
"""
NGINX_GZIP = "gzip on; gzip_types text/event-stream application/json;"  # which the example's must switch off
NGINX_DEFAULT = """
server {
    listen 80;
    location / { proxy_pass http://127.0.0.1:8000; }
}
"""
# The timeouts are those of Debian's /etc/haproxy/haproxy.cfg.
HAPROXY_DEFAULT = """
defaults
    mode http
    timeout connect 5000
    timeout client 50000
    timeout server 50000
frontend default
    bind :80
    default_backend sseserve
backend sseserve
    server sseserve 127.0.0.1:8000
"""
CADDY_DEFAULT = """
{
}
:80 {
	reverse_proxy 127.0.0.1:8000
}
"""

CADDY_H2 = """127.0.0.1:8000 {
		transport http {
			versions h2c 2
		}
	}
"""

# The main configuration of Apache httpd. All files that it writes are in the folder.
APACHE_MAIN = """
ServerRoot {folder}
DefaultRuntimeDir {folder}
PidFile {folder}/pid
Mutex file:{folder} default
ServerName localhost
{user}
Listen 127.0.0.1:{port}
ErrorLog /dev/stderr
LogLevel notice
GracefulShutdownTimeout 1
{modules}
Include {folder}/sseserve.conf
"""
_MODULES = Path("/usr/lib/apache2/modules")  # Debian's
APACHE_MODULES = (
    *("mpm_event", "authz_core", "deflate", "env", "filter", "reqtimeout", "setenvif"),  # Debian's default
    *("proxy", "proxy_http"),
)
APACHE_GZIP = "AddOutputFilterByType DEFLATE text/event-stream application/json\n"
APACHE_DEFAULT = """
<VirtualHost *:80>
    ProxyPass / http://127.0.0.1:8000/
</VirtualHost>
"""


class Configuration(NamedTuple):
    """A proxy's configuration, and what the proxy does with it."""

    program: str
    text: str
    websocket_status: int | None = 101  # of the response to a handshake; None: by version
    streams_requests: bool = True
    shows_cuts: bool | None = (
        True  # it does not complete a response that the server did not; None: by version
    )
    passes_host: bool = True
    options: tuple[str, ...] = ()  # of the command


CONFIGURATIONS = {
    # It speaks HTTP/1.0 to the server, where a response ends with its connection, and collects requests.
    "nginx-default": Configuration(
        "nginx",
        NGINX_DEFAULT,
        websocket_status=426,
        streams_requests=False,
        shows_cuts=False,
        passes_host=False,
    ),
    "nginx": Configuration("nginx", NGINX_GZIP + (DEPLOY / "nginx.conf").read_text()),
    "haproxy-default": Configuration("haproxy", HAPROXY_DEFAULT),
    "haproxy": Configuration("haproxy", (DEPLOY / "haproxy.cfg").read_text()),
    "haproxy-h2": Configuration(
        "haproxy", (DEPLOY / "haproxy.cfg").read_text().replace("127.0.0.1:8000", "127.0.0.1:8000 proto h2")
    ),
    # 2.6 completes a response that the server did not: https://github.com/caddyserver/caddy/pull/5952
    "caddy-default": Configuration("caddy", CADDY_DEFAULT, shows_cuts=None),
    "caddy": Configuration("caddy", (DEPLOY / "Caddyfile").read_text(), shows_cuts=None),
    # 2.6 cannot open WebSockets over HTTP/2 (RFC 8441).
    "caddy-h2": Configuration(
        "caddy",
        CADDY_DEFAULT.replace("127.0.0.1:8000", CADDY_H2),
        websocket_status=None,
        shows_cuts=None,
    ),
    "apache-default": Configuration(
        "apache2", APACHE_DEFAULT, websocket_status=426, streams_requests=False, passes_host=False
    ),
    "apache": Configuration("apache2", APACHE_GZIP + (DEPLOY / "apache.conf").read_text()),
    "varnish": Configuration(
        "varnishd", (DEPLOY / "varnish.vcl").read_text(), options=("-p", "pipe_timeout=3600")
    ),
}


def _replace(text: str, *replacements: tuple[str, str]) -> str:
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def _nginx(folder: Path, text: str, port: int, upstream: str) -> list[str | Path]:
    site = _replace(text, ("127.0.0.1:8000", upstream), ("listen 80;", f"listen 127.0.0.1:{port};"))
    (folder / "sseserve.conf").write_text(site)
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(NGINX_MAIN.format(folder=folder, user=user))
    return ["-p", folder, "-c", folder / "nginx.conf", "-g", "daemon off;"]


def _haproxy(folder: Path, text: str, port: int, upstream: str) -> list[str | Path]:
    path = folder / "haproxy.cfg"
    path.write_text(_replace(text, ("127.0.0.1:8000", upstream), ("bind :80\n", f"bind 127.0.0.1:{port}\n")))
    return ["-W", "-db", "-f", path]


def _caddy(folder: Path, text: str, port: int, upstream: str) -> list[str | Path]:
    path = folder / "Caddyfile"
    text = text.replace("\n{\n", "\n{\n\tadmin off\n").replace("grace_period 10s", "grace_period 1s")
    site = f"\n:{port} {{\n\tbind 127.0.0.1\n"
    path.write_text(_replace(text, ("127.0.0.1:8000", upstream), ("\n:80 {\n", site)))
    return ["run", "--adapter", "caddyfile", "--config", path]


def _apache(folder: Path, text: str, port: int, upstream: str) -> list[str | Path]:
    site = _replace(text, ("127.0.0.1:8000", upstream), ("<VirtualHost *:80>", f"<VirtualHost *:{port}>"))
    (folder / "sseserve.conf").write_text(site)
    modules = "".join(f"LoadModule {name}_module {_MODULES}/mod_{name}.so\n" for name in APACHE_MODULES)
    # Started by root, it serves as another user.
    user = "User www-data\nGroup www-data" if os.geteuid() == 0 else ""
    path = folder / "apache2.conf"
    path.write_text(APACHE_MAIN.format(folder=folder, port=port, user=user, modules=modules))
    return ["-D", "FOREGROUND", "-d", folder, "-f", path]


def _varnish(folder: Path, text: str, port: int, upstream: str) -> list[str | Path]:
    path = folder / "default.vcl"
    host, _, backend = upstream.partition(":")
    addresses = ('.host = "127.0.0.1";', f'.host = "{host}";'), ('.port = "8000";', f'.port = "{backend}";')
    path.write_text(_replace(text, *addresses))
    listen = ["-a", f"127.0.0.1:{port}", "-s", "malloc,16m"]
    compiler = "cc_command=exec gcc -fpic -shared -o %o %s"  # without optimization: it is a second faster
    parameters = ("-p", "thread_pools=1", "-p", compiler)
    return ["-F", "-f", path, "-n", folder / "varnish", "-j", "none", *listen, *parameters]


COMMANDS: dict[str, Callable[[Path, str, int, str], list[str | Path]]] = {
    "nginx": _nginx,
    "haproxy": _haproxy,
    "caddy": _caddy,
    "apache2": _apache,
    "varnishd": _varnish,
}


@contextmanager
def run_proxy(folder: Path, configuration: Configuration, upstream: str) -> Iterator[tuple[str, Program]]:
    """Run a proxy in front of a server; ``folder`` is for its files. The block gets its URL."""
    binary, port = require_program(configuration.program), free_port()
    arguments = COMMANDS[configuration.program](folder, configuration.text, port, urlsplit(upstream).netloc)
    url = f"http://127.0.0.1:{port}"
    command = (binary, *arguments, *configuration.options)
    with Program(*command, XDG_DATA_HOME=str(folder), XDG_CONFIG_HOME=str(folder)) as program:
        wait_until(lambda: program.has_exited or _is_ready(url), configuration.program)
        assert not program.has_exited, program.output
        yield url, program
        if configuration.program != "apache2":  # which waits 10 seconds for streams that say nothing
            assert program.wait(signal.SIGTERM) in (0, 128 + signal.SIGTERM), program.output  # 143: HAProxy


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False
