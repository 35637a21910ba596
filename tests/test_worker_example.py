"""The Cloudflare Worker of examples/deploy, in workerd, the runtime of Workers, in front of a real server."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import trio
from deployments import DEPLOY, Job, over_http, run_command, serve_and_restart
from ports import free_port
from processes import Program, install_node_packages, run_server, wait_until
from tokens import SECRET

from sseserve.client import watch

# The configuration of workerd, the runtime of Cloudflare's Workers.
WORKERD = """
using Workerd = import "/workerd/workerd.capnp";
const config :Workerd.Config = (
  services = [
    (name = "worker", worker = (
      modules = [(name = "worker.js", esModule = embed "worker.js")],
      compatibilityDate = "{date}",
      bindings = [(name = "ORIGIN", text = "{origin}")],
      globalOutbound = "network",
    )),
    (name = "network", network = (allow = ["private"])),
  ],
  sockets = [(name = "http", address = "127.0.0.1:{port}", http = (), service = "worker")],
);
"""


@pytest.fixture(scope="module")
def workerd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    packages = install_node_packages(tmp_path_factory.mktemp("workerd"), "workerd")
    return packages / "@cloudflare" / "workerd-linux-64" / "bin" / "workerd"


@pytest.fixture
def run_worker(workerd, tmp_path) -> Iterator[Callable[[str], str]]:
    """Return what runs the Worker in front of a server, and returns its URL."""
    settings = tomllib.loads((DEPLOY / "cloudflare" / "wrangler.toml").read_text())
    assert list(settings["vars"]) == ["ORIGIN"]
    shutil.copy(DEPLOY / "cloudflare" / settings["main"], tmp_path / "worker.js")

    with ExitStack() as stack:

        def run(origin: str) -> str:
            port = free_port()
            config = tmp_path / "config.capnp"
            config.write_text(WORKERD.format(date=settings["compatibility_date"], origin=origin, port=port))
            program = stack.enter_context(Program(workerd, "serve", config))
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: program.has_exited or status_of(url), "workerd to respond")
            assert not program.has_exited, program.output
            return url

        yield run


def status_of(url: str) -> int:
    """Return the status of a response; 0 if there is none."""
    try:
        return httpx.get(f"{url}/api/").status_code
    except httpx.TransportError:
        return 0


def test_the_worker_passes_streams_on(run_worker, tmp_path):
    """A job is streamed through the Worker, its server drained and started again, and the stream resumed."""
    port = free_port()
    environ = {"SSESERVE_PORT": str(port), "SSESERVE_JWT_KEY": SECRET}
    environ["SSESERVE_ENGINE"] = f"sqlite:{tmp_path / 'jobs.db'}"

    def begin(client: httpx.Client) -> Job:
        client.post("/api/sessions", json={"session_id": "j"}).raise_for_status()
        return Job("/api/sessions/j/status/stream", over_http(client, "j"))

    url = run_worker(f"http://127.0.0.1:{port}")
    serve_and_restart(lambda: run_command(["sseserve", "serve"], environ), url, begin)


def test_the_worker_keeps_what_a_request_says(run_worker):
    """The server sees the client's own address and fields, and with a heartbeat that it has left."""
    with run_server(drain=1, heartbeat=0.1, trusted_proxies="127.0.0.1") as server_url:
        # What Cloudflare sets, and what a client claims.
        headers = {"CF-Connecting-IP": "192.0.2.7", "X-Forwarded-For": "198.51.100.9", "X-Client": "a"}
        with httpx.Client(base_url=run_worker(server_url), headers=headers) as client:
            seen = client.get("/api/diagnostics").json()
            assert (seen["address"], seen["proxy"]) == ("192.0.2.7", "127.0.0.1")
            assert seen["host"] == urlsplit(server_url).netloc
            assert {"x-client", "cache-control"} <= set(seen["names"])  # the latter is of "no-store"
            client.post("/api/sessions", json={"session_id": "j"})
            with client.stream("GET", "/api/sessions/j/status/stream") as response:
                assert next(response.iter_lines())
            watchers = "/api/sessions/j/watchers"
            wait_until(lambda: client.get(watchers).json()["total"] == 0, "the stream to end")


async def test_the_worker_passes_websockets_on(run_worker):
    """Each message arrives before the next one is published."""
    with run_server(drain=1) as server_url, trio.fail_after(20):
        url = run_worker(server_url)
        async with httpx.AsyncClient(base_url=server_url) as publisher:
            await publisher.post("/api/sessions", json={"session_id": "j"})
            async with watch(url, "j", transport="ws", retry_timeout=0) as messages:
                assert (await anext(messages)).data["status"] == "queued"
                for percent in (20, 40):
                    await publisher.post("/api/sessions/j/progress", json={"progress": percent})
                    assert (await anext(messages)).data["progress"] == percent
                await publisher.post("/api/sessions/j/progress", json={"status": "done"})
                assert [message.event async for message in messages] == ["complete"]
