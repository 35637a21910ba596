"""Several instances of sseserve over one Redis, behind nginx with the configuration of examples/deploy."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from ..load.process import BenchmarkError
from ..servers import ROOT, Server, find_nginx, free_port

__all__ = ["DEPLOY", "NGINX_MAIN", "Deployment", "Program", "Redis"]

DEPLOY = ROOT / "examples" / "deploy"
TIMEOUT = 20.0

NGINX_MAIN = """\
{user}
daemon off;
worker_processes 1;
worker_rlimit_nofile {files};
pid {directory}/pid;
error_log stderr error;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    scgi_temp_path {directory}/scgi;
    uwsgi_temp_path {directory}/uwsgi;
    keepalive_requests 1000000000;
    include {directory}/site.conf;
}}
"""


class Program:
    """A running program with files of its own, which it finds again when it is started again."""

    def __init__(self, name: str, port: int) -> None:
        self.name, self.port = name, port
        self.directory = Path(tempfile.mkdtemp(prefix=f"sseserve-bench-{name}-"))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str | Path) -> None:
        """Start it; returns when its port can be connected to."""
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + TIMEOUT
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"{self.name} did not start:\n{self.log()}")
            time.sleep(0.02)  # between two attempts: it is another process

    def log(self) -> str:
        """Return the end of its output."""
        return (self.directory / "log").read_text(errors="replace")[-2000:]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(TIMEOUT)
        shutil.rmtree(self.directory, ignore_errors=True)


class Redis(Program):
    """A redis-server. ``appendonly``: what it holds survives the process; otherwise it saves nothing."""

    def __init__(self, *, appendonly: bool = False) -> None:
        super().__init__("redis-server", free_port())
        self._appendonly = "yes" if appendonly else "no"

    def __enter__(self) -> Redis:
        self.run()
        return self

    def run(self) -> None:
        """Start it, again if it was killed."""
        if (binary := shutil.which("redis-server")) is None:
            raise BenchmarkError("redis-server is not installed")
        files = (
            "--dir",
            self.directory,
            "--save",
            "",
            "--appendonly",
            self._appendonly,
            "--appendfsync",
            "always",
        )
        self.start(binary, "--port", str(self.port), "--bind", "127.0.0.1", *files)

    def signal(self, number: int) -> None:
        """Send it a signal, such as SIGSTOP."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash does."""
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(TIMEOUT)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


class _Nginx(Program):
    def __init__(self, upstreams: list[int], files: int) -> None:
        super().__init__("nginx", free_port())
        self._upstreams = upstreams
        self._files = files

    def __enter__(self) -> _Nginx:
        instances = (DEPLOY / "nginx-instances.conf").read_text()
        servers = [line for line in instances.splitlines() if line.strip().startswith("server ")]
        ours = [re.sub(r":\d+", f":{port}", servers[0]) for port in self._upstreams]
        instances = instances.replace("\n".join(servers), "\n".join(ours))
        before, _, rest = (DEPLOY / "nginx.conf").read_text().partition("upstream sseserve {")
        site = before + instances + rest.partition("\n}\n")[2]
        site = site.replace("listen 80;", f"listen 127.0.0.1:{self.port} backlog=4096;")
        (self.directory / "site.conf").write_text(site)
        main = self.directory / "nginx.conf"
        main.write_text(
            NGINX_MAIN.format(
                user="user root;" if os.geteuid() == 0 else "",
                directory=self.directory,
                files=self._files,
                connections=self._files - 100,
            )
        )
        self.start(find_nginx(), "-p", self.directory, "-c", main, "-e", "stderr")
        return self


class Deployment:
    """Instances behind nginx; ``port`` is nginx's.

    Args:
        count: of instances.
        files: the limit of open files.
        engine: URL of the instances' engine; None: a redis-server is run for them.
        settings: of the instances, by their names.
    """

    def __init__(self, count: int, files: int, engine: str | None = None, **settings: object) -> None:
        self._files = files
        self._engine = engine
        self._settings = settings
        self._ports = [free_port() for _ in range(count)]
        self.instances: list[Server] = []
        self._stack = ExitStack()

    def __enter__(self) -> Deployment:
        with ExitStack() as stack:
            if self._engine is None:
                self._engine = stack.enter_context(Redis()).url
            stack.callback(self._stop)
            self.instances += map(self._start, self._ports)
            self.nginx = stack.enter_context(_Nginx(self._ports, self._files))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def port(self) -> int:
        return self.nginx.port

    def _start(self, port: int) -> Server:
        return Server(port=port, engine=self._engine, **self._settings)

    def _stop(self) -> None:
        for instance in self.instances:
            instance.stop()

    def stop(self, index: int) -> int:
        """Stop an instance with SIGTERM; return its exit status."""
        self.instances[index].stop()
        return self.instances[index].status

    def replace(self, index: int) -> None:
        """Start an instance in the place of one that was stopped."""
        self.instances[index] = self._start(self._ports[index])
