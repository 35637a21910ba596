"""nchan: a module of nginx, in C."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from ...load.process import BenchmarkError, raise_file_limit
from ...load.publishers import PublishRequest
from ...servers import ServerProcess, find_nginx, free_port
from .base import Peer

__all__ = ["Nchan"]

MODULES = [
    Path(directory) / "ngx_nchan_module.so"
    for directory in ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules")
]

# One worker, since sseserve is one process. The message buffer is as long as sseserve's default history.
CONFIG = """\
load_module {module};
daemon off;
user {user};
worker_processes 1;
worker_rlimit_nofile {files};
pid {directory}/nginx.pid;
error_log stderr warn;
events {{ worker_connections {connections}; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  keepalive_requests 1000000000;
  keepalive_timeout 600s;
  nchan_shared_memory_size 512M;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location = /ready {{ return 200 "$nchan_version"; }}
    location ~ ^/pub/(.+)$ {{
      nchan_publisher;
      nchan_channel_id $1;
      nchan_message_buffer_length 10000;
      nchan_message_timeout 1h;
    }}
    location ~ ^/sub/(.+)$ {{
      nchan_subscriber eventsource;
      nchan_channel_id $1;
      nchan_subscriber_first_message newest;
    }}
  }}
}}
"""


class Nchan(Peer):
    name = "nchan"
    title = "nchan"
    language = "C"
    source = "https://nchan.io/#performance"
    note = (
        "A module of nginx, with one worker process. It writes to all subscribers before it responds to the "
        "publisher, and sends no pings, which is its default. It leaves Nagle's algorithm on for "
        "subscribers."
    )
    publish = PublishRequest("/pub/*")

    def missing(self) -> str:
        how = "apt-get install nginx libnginx-mod-nchan"
        try:
            find_nginx()
        except BenchmarkError as error:
            return f"{error}: {how}"
        return "" if self._module else f"nginx has no nchan module: {how}"

    @property
    def _module(self) -> Path | None:
        return next((path for path in MODULES if path.exists()), None)

    def version(self) -> str:
        shown = subprocess.run([find_nginx(), "-v"], capture_output=True, text=True, timeout=10).stderr
        nginx = match[1] if (match := re.search(r"nginx/(\S+)", shown)) else "?"
        with self.start() as server:
            return f"{server.request('GET', '/ready')[1].decode() or '?'}, nginx {nginx}"

    def settings(self) -> str:
        wanted = ("worker_", "keepalive", "nchan_", "listen", "access_log")
        lines = [line.strip() for line in CONFIG.replace("{{", "{").replace("}}", "}").splitlines()]
        return "\n".join(line for line in lines if line.startswith(wanted) and "{" not in line.split(";")[0])

    def start(self) -> ServerProcess:
        port, files = free_port(), raise_file_limit()

        def command(directory: Path) -> list[str]:
            config = directory / "nginx.conf"
            config.write_text(
                CONFIG.format(
                    module=self._module,
                    directory=directory,
                    files=files,
                    connections=files - 100,
                    port=port,
                    user="root" if os.geteuid() == 0 else "nobody",  # ignored unless it is started by root
                )
            )
            return [find_nginx(), "-p", str(directory), "-c", str(config), "-e", "stderr"]

        return ServerProcess(self.title, command, port=port, ready="/ready")

    def watch_path(self, channel: str) -> str:
        return f"/sub/{channel}"
