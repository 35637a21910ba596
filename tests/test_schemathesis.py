"""schemathesis over ``/openapi.json``: no response above 500, and every one is as its row says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import jwt
import pytest
from processes import ROOT, Program

KEY = "0123456789abcdef0123456789abcdef"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
)
# Whose requests, the phase, and how many examples of each operation where the document does not bound them.
RUNS = [
    ("without authentication", "coverage", 1),
    ("without authentication", "fuzzing", 3),
    ("without authentication", "stateful", 3),
    ("with few rights", "fuzzing", 3),
    ("with all rights", "fuzzing", 3),
    ("without a token", "fuzzing", 3),
]


def make_token(**claims: object) -> str:
    return jwt.encode({"sub": "s", "iat": int(time.time()), "exp": int(time.time()) + 600, **claims}, KEY)


def run_schemathesis(
    directory: Path, url: str, phase: str, examples: int, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run it with the same examples every time; what it caches goes into ``directory``."""
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{url}/openapi.json", "--no-color"]
    command += ["--phases", phase, "--max-examples", str(examples), "--checks", ",".join(CHECKS)]
    command += ["--generation-deterministic", "--continue-on-failure", "--request-timeout", "10"]
    command += ["--exclude-path", "/api/streams/sessions", *arguments]  # a stream that has no end
    hooks = {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **hooks},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("client", "phase", "examples"), RUNS)
def test_requests_get_what_the_document_says(tmp_path, client, phase, examples):
    """Whatever they are, and whoever makes them."""
    admin = make_token(role="admin")
    tokens = {
        "with all rights": admin,
        "with few rights": make_token(sseserve={"watch": ["ended"], "publish": ["r*"]}),
    }
    is_open = client == "without authentication"
    environ = {"SSESERVE_DEMO_SECONDS": "0.1"} | ({} if is_open else {"SSESERVE_JWT_KEY": KEY})
    with Program(sys.executable, "-m", "sseserve", "serve", "--port", "0", **environ) as server:
        url = server.wait_for_output(r"serving at (\S+)")[1]
        headers = {} if is_open else {"Authorization": f"Bearer {admin}"}
        with httpx.Client(base_url=url, headers=headers) as publisher:
            publisher.post("/api/sessions/running/progress", json={"progress": 5}).raise_for_status()
            publisher.post("/api/sessions/ended/progress", json={"status": "done"}).raise_for_status()
        arguments = ["--header", f"Authorization:Bearer {tokens[client]}"] if client in tokens else []
        result = run_schemathesis(tmp_path, url, phase, examples, *arguments)
        assert result.returncode == 0, result.stdout[-8000:] + result.stderr
        assert re.search(r"[1-9]\d* generated, [1-9]\d* passed", result.stdout), result.stdout
        log = [line for line in server.output.splitlines() if re.search(r" ERROR |Traceback", line)]
        assert log == []
