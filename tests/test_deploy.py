"""The examples of examples/deploy: each is checked by its format, and run as its platform would run it.

No container engine and no platform runs here. A test reads an example, starts the command that it names with
the variables that it sets, streams a job from that, stops it as the platform does, and resumes the stream.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import kubernetes_validate
import pytest
import yaml
from deployments import (
    ADMIN,
    BIN,
    DEPLOY,
    Job,
    over_http,
    publish_in_redis,
    run_command,
    serve_and_restart,
    settings_of,
    watch_to_the_end,
    watch_until_stopped,
)
from ports import free_port
from processes import ROOT, Program
from programs import skip_without
from reverse_proxies import Configuration, run_proxy
from tokens import SECRET

LIBRARIES = sysconfig.get_path("purelib")
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"


class Image(NamedTuple):
    """What a Dockerfile says of its last stage: the variables and the command."""

    environ: dict[str, str]
    entrypoint: list[str]
    command: list[str]
    health: list[str]
    stop_signal: str


def instructions(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile with their arguments, a continued line as one."""
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line)]


@pytest.fixture(scope="module")
def image() -> Image:
    last = dict(instructions(DOCKERFILE.read_text()))
    environ = dict(part.split("=", 1) for part in shlex.split(last["ENV"]))
    health = last["HEALTHCHECK"].partition("CMD ")[2]
    return Image(
        environ,
        json.loads(last["ENTRYPOINT"]),
        json.loads(last["CMD"]),
        json.loads(health),
        last["STOPSIGNAL"],
    )


def check_schema(path: Path, schema: str) -> None:
    """Check a file against a JSON Schema that check-jsonschema has: those of schemastore.org."""
    command = [BIN / "check-jsonschema", "--builtin-schema", f"vendor.{schema}", path]
    process = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert process.returncode == 0, process.stdout


def load_yaml(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


# Docker


@pytest.mark.timeout(150)  # pip, twice, where other work is running
def test_the_image_is_built_and_serves(tmp_path, image):
    """The steps of the Dockerfile are run in a folder, with what they copy; what they install is run."""
    source, target = tmp_path / "src", tmp_path / "opt"
    target.mkdir()
    first, *_ = DOCKERFILE.read_text().split("\nFROM ")[1:]
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split()
    for name, arguments in instructions(first):
        if name == "COPY":
            *paths, folder = arguments.split()
            for path in paths:
                assert f"!{path}" in ignored  # it is sent to the builder
                if (ROOT / path).is_dir():
                    shutil.copytree(ROOT / path, source / folder)
                else:
                    (source / folder).mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / path, source / folder)
        elif name == "RUN":
            # The libraries are those of the tests.
            environ = {**os.environ, **dict.fromkeys(("PIP_NO_DEPS", "PIP_NO_INDEX"), "1")}
            environ |= {"PIP_NO_BUILD_ISOLATION": "0", "PYTHONPATH": LIBRARIES}  # pip: "0" means none
            process = subprocess.run(
                ["sh", "-euc", arguments.replace("/opt/", f"{target}/")],
                cwd=source,
                env=environ,
                capture_output=True,
                text=True,
                check=False,
            )
            assert process.returncode == 0, process.stdout + process.stderr

    port = free_port()
    environ = {name: text.replace("/opt/", f"{target}/") for name, text in image.environ.items()}
    environ |= {"PYTHONPATH": LIBRARIES, "PORT": str(port), "SSESERVE_JWT_KEY": SECRET, "SSESERVE_DRAIN": "1"}
    environ |= {"SSESERVE_ENGINE": f"sqlite:{tmp_path / 'jobs.db'}"}
    path = environ["PATH"].partition(":")[0]
    assert {entry.name for entry in Path(path).iterdir()} >= {"sseserve", "python3"}

    def is_healthy() -> bool:
        return subprocess.run([f"{path}/{image.health[0]}", *image.health[1:]], env=environ).returncode == 0

    def begin(client: httpx.Client) -> Job:
        client.post("/api/sessions", json={"session_id": "j"}).raise_for_status()
        return Job("/api/sessions/j/status/stream", over_http(client, "j"))

    def start() -> Program:
        return Program(f"{path}/{image.entrypoint[0]}", *image.entrypoint[1:], *image.command, **environ)

    with start() as server:
        server.wait_for_output("serving at")
        assert is_healthy()
        server.wait(signal.SIGKILL)
        assert not is_healthy()
    serve_and_restart(start, f"http://127.0.0.1:{port}", begin)


def test_the_dockerfile(image):
    """It passes hadolint; it runs the server itself, which gets the signals, as a user without rights."""
    process = subprocess.run([BIN / "hadolint", DOCKERFILE], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout
    user, _, group = dict(instructions(DOCKERFILE.read_text()))["USER"].partition(":")
    assert int(user) == int(group) > 0
    assert (image.entrypoint, image.command, image.stop_signal) == (["sseserve"], ["serve"], "SIGTERM")


def test_compose(tmp_path, image, redis):
    """Two servers behind Caddy: a stream goes on at the other one when its own is stopped."""
    check_schema(DEPLOY / "docker" / "compose.yaml", "compose-spec")
    compose = load_yaml("docker/compose.yaml")
    service = compose["services"]["sseserve-1"]
    assert service == compose["services"]["sseserve-2"]
    assert settings_of(service["environment"]).drain + 2 < int(service["stop_grace_period"].removesuffix("s"))
    key = tmp_path / "sseserve.key"
    key.write_text(SECRET)
    environ = {**image.environ, **service["environment"]}
    environ["REDIS_URL"] = environ["REDIS_URL"].replace("redis://redis:6379/0", redis.url)
    environ["SSESERVE_JWT_KEY"] = environ["SSESERVE_JWT_KEY"].replace("/run/secrets/sseserve_key", str(key))
    ports = [free_port(), free_port()]
    text = (DEPLOY / "docker" / "Caddyfile").read_text()
    # The first one is asked first, so that the stream is there.
    text = text.replace("sseserve-1:8000 sseserve-2:8000", "127.0.0.1:8000")
    upstreams = " ".join(f"127.0.0.1:{port}" for port in ports)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                run_command([*image.entrypoint, *image.command], {**environ, "SSESERVE_PORT": str(port)})
            )
            for port in ports
        ]
        for server in servers:
            server.wait_for_output("serving at")
        caddy = Configuration("caddy", text.replace("flush_", "lb_policy first\n\t\tflush_"))
        url, _ = stack.enter_context(run_proxy(tmp_path, caddy, f"http://{upstreams}"))
        with httpx.Client(base_url=url, headers=ADMIN, timeout=10) as client:
            client.post("/api/sessions", json={"session_id": "j"}).raise_for_status()
            job = Job("/api/sessions/j/status/stream", over_http(client, "j"))
            cursor = watch_until_stopped(client, job, lambda: servers[0].wait(signal.SIGTERM))
            with client.stream("GET", job.stream) as response:  # at once: an EventSource gives up at a 502
                assert response.status_code == 200
            watch_to_the_end(client, job, cursor)
            assert servers[1].wait(signal.SIGTERM) == 0


# Kubernetes


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    """The objects by their kinds."""
    objects = yaml.safe_load_all((DEPLOY / "kubernetes" / "sseserve.yaml").read_text())
    return {item["kind"]: item for item in objects}


def test_kubernetes_manifests(manifests):
    """Each is valid, and they find each other."""
    for item in manifests.values():
        kubernetes_validate.validate(item, "1.33", strict=True)
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (port,) = manifests["Service"]["spec"]["ports"]
    assert port["targetPort"] in [port["name"] for port in container["ports"]]
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    ((path,),) = (rule["http"]["paths"] for rule in manifests["Ingress"]["spec"]["rules"])
    assert path["backend"]["service"] == {
        "name": manifests["Service"]["metadata"]["name"],
        "port": {"name": port["name"]},
    }
    host = manifests["Ingress"]["spec"]["rules"][0]["host"]
    assert {"name": "SSESERVE_ALLOWED_HOSTS", "value": host} in container["env"]
    # preStop and the drain fit into the time that a Pod has.
    drain = settings_of({item["name"]: item["value"] for item in container["env"] if "value" in item}).drain
    wait = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert wait + drain + 5 <= pod["terminationGracePeriodSeconds"]


def service_variables(name: str, port: int) -> dict[str, str]:
    """Return what a Service puts into each container (Kubernetes, "Discovering services")."""
    url = f"tcp://10.96.0.7:{port}"
    names = (f"{name}_PORT", f"{name}_PORT_{port}_TCP")
    return {
        **dict.fromkeys(names, url),
        f"{name}_SERVICE_HOST": "10.96.0.7",
        f"{name}_SERVICE_PORT": str(port),
        f"{name}_SERVICE_PORT_HTTP": str(port),
        f"{name}_PORT_{port}_TCP_PROTO": "tcp",
        f"{name}_PORT_{port}_TCP_PORT": str(port),
        f"{name}_PORT_{port}_TCP_ADDR": "10.96.0.7",
    }


def test_kubernetes_serves(image, manifests, redis):
    """The container's command with its variables; the probes are those of a kubelet."""
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    secret = {"redis-url": redis.url, "jwt-key": SECRET}
    assert pod["enableServiceLinks"] is False
    # A cluster that sets them all the same, or a manifest without that line, does no harm.
    services = (("KUBERNETES", 443), ("SSESERVE", 80), ("REDIS", 6379))
    environ = {name: text for service in services for name, text in service_variables(*service).items()}
    for item in container["env"]:
        if "value" in item:
            environ[item["name"]] = item["value"]
        else:
            assert item["valueFrom"]["secretKeyRef"]["name"] == "sseserve"
            environ[item["name"]] = secret[item["valueFrom"]["secretKeyRef"]["key"]]
    assert environ["SSESERVE_PORT"] == str(container["ports"][0]["containerPort"])
    port = free_port()
    environ |= {**image.environ, "SSESERVE_PORT": str(port)}

    def start() -> Program:
        return run_command([*image.entrypoint, *container["args"]], environ)

    with start() as server:
        server.wait_for_output("serving at")
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container[name]["httpGet"]
            assert probe["port"] == container["ports"][0]["name"]
            url = f"http://127.0.0.1:{port}{probe['path']}"
            assert httpx.get(url, headers={"Host": "10.244.0.7:8000"}).status_code == 200
        assert server.wait(signal.SIGTERM) == 0

    def begin(client: httpx.Client) -> Job:
        client.post("/api/sessions", json={"session_id": "visit-7"}).raise_for_status()
        publish = publish_in_redis(redis, "session:visit-7:updates", session_id="visit-7")
        return Job("/api/sessions/visit-7/status/stream", publish)

    serve_and_restart(start, f"http://127.0.0.1:{port}", begin)


# Google Cloud Run


@pytest.fixture(scope="module")
def cloud_run() -> dict[str, list[str]]:
    """The options of ``gcloud run deploy`` with their values, with all substitutions made."""
    build = load_yaml("cloud-run/cloudbuild.yaml")
    values = {**build["substitutions"], "PROJECT_ID": "project-7"}
    arguments = build["steps"][-1]["args"]
    assert arguments[:3] == ["run", "deploy", "sse-service"]
    options: dict[str, list[str]] = {}
    for argument in arguments[3:]:
        name, _, value = argument.partition("=")
        substituted = re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], value)
        options.setdefault(name.removeprefix("--"), []).append(substituted)
    return options


def test_cloud_run_has_the_figures(cloud_run):
    """Those of the system that ran this service before, and what they need to be true of a server."""
    check_schema(DEPLOY / "cloud-run" / "cloudbuild.yaml", "cloudbuild")
    names = ("timeout", "min-instances", "max-instances", "concurrency", "cpu", "memory")
    assert [cloud_run[name] for name in names] == [["3600"], ["1"], ["5"], ["1000"], ["1"], ["1Gi"]]
    settings = settings_of(dict(text.split("=", 1) for text in cloud_run["set-env-vars"]))
    assert settings.drain < 10 - 2  # Cloud Run kills an instance 10 seconds after SIGTERM
    assert settings.max_age is not None
    assert settings.max_age < 3600  # so that a stream ends with retry: before Cloud Run cuts it
    assert settings.redis_host == "10.0.0.3"


def test_cloud_run_knows_the_options(cloud_run):
    """``gcloud`` has them all, where it is installed."""
    command = [skip_without("gcloud"), "run", "deploy", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    known = set(re.findall(r"--(?:\[no-\])?([\w-]+)", re.sub(r"\x1b\[[\d;]*m", "", process.stdout)))
    assert {name.removeprefix("no-") for name in cloud_run} <= known


def test_cloud_run_serves(image, cloud_run, redis):
    """A job of the podcast generator: created over HTTP, published through Redis, streamed and drained."""
    port = free_port()
    environ = {**image.environ, **dict(text.split("=", 1) for text in cloud_run["set-env-vars"])}
    secrets = [text.partition("=")[0] for text in cloud_run["set-secrets"]]
    assert secrets == ["SSESERVE_JWT_KEY"]
    # What the platform sets, with another port and the Redis of the test.
    environ |= {"PORT": str(port), "K_SERVICE": "sse-service", "K_REVISION": "sse-service-1"}
    environ |= {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(redis.port), "SSESERVE_JWT_KEY": SECRET}

    def begin(client: httpx.Client) -> Job:
        created = client.post("/api/v1/jobs", json={"topics": ["technology"]}).raise_for_status().json()
        channel = f"job:{created['jobId']}:updates"
        return Job(created["sseEndpoint"], publish_in_redis(redis, channel, jobId=created["jobId"]))

    def start() -> Program:
        return run_command([*image.entrypoint, *image.command], environ)

    serve_and_restart(start, f"http://127.0.0.1:{port}", begin)


# Render


def test_render_serves(redis):
    """A transcription: the start command with the variables of the Blueprint."""
    services = {service["name"]: service for service in load_yaml("render/render.yaml")["services"]}
    web, store = services["coaching-api"], services["coaching-redis"]
    environ = {}
    for variable in web["envVars"]:
        match variable:
            case {"key": key, "value": value}:
                environ[key] = value
            case {"key": key, "generateValue": True}:
                environ[key] = SECRET
            case {"key": key, "fromService": {"type": kind, "name": name, "property": "connectionString"}}:
                assert (kind, name) == (store["type"], store["name"])
                environ[key] = redis.url
    assert (environ["ENABLE_SSE"], environ["SSE_CONNECTION_TIMEOUT"]) == ("true", "300")
    settings = settings_of(environ)
    assert (settings.idle_timeout, settings.enable_sse) == (300, True)
    assert settings.drain < 30 - 2  # Render kills a service that many seconds after SIGTERM

    port = free_port()
    environ["PORT"] = str(port)
    command = [word.replace("$PORT", environ["PORT"]) for word in shlex.split(web["startCommand"])]

    def begin(client: httpx.Client) -> Job:
        client.post("/api/sessions", json={"session_id": "upload-7"}).raise_for_status()
        publish = publish_in_redis(redis, "transcription:status:upload-7", session_id="upload-7")
        return Job("/api/v1/sessions/upload-7/status/stream", publish)

    serve_and_restart(lambda: run_command(command, environ), f"http://127.0.0.1:{port}", begin)


# AWS


def test_ecs_serves(image, redis):
    """The container of the task definition: its command, its variables and its health check."""
    definition = json.loads((DEPLOY / "aws" / "task-definition.json").read_text())
    (container,) = definition["containerDefinitions"]
    environ = {item["name"]: item["value"] for item in container["environment"]}
    assert settings_of(environ).drain + 5 < container["stopTimeout"]
    secrets = {"SSESERVE_JWT_KEY": SECRET, "REDIS_URL": redis.url}
    assert [item["name"] for item in container["secrets"]] == list(secrets)
    port = free_port()
    assert environ["SSESERVE_PORT"] == str(container["portMappings"][0]["containerPort"])
    environ |= {**image.environ, **secrets, "SSESERVE_PORT": str(port)}
    kind, program, *arguments = container["healthCheck"]["command"]
    assert kind == "CMD"
    check = [BIN / program, *(text.replace(":8000/", f":{port}/") for text in arguments)]

    def start() -> Program:
        return run_command([*image.entrypoint, *container["command"]], environ)

    def begin(client: httpx.Client) -> Job:
        assert subprocess.run(check, check=False).returncode == 0
        client.post("/api/sessions", json={"session_id": "visit-8"}).raise_for_status()
        return Job("/api/sessions/visit-8/status/stream", over_http(client, "visit-8"))

    serve_and_restart(start, f"http://127.0.0.1:{port}", begin)
    assert subprocess.run(check, check=False, stderr=subprocess.DEVNULL).returncode != 0
