"""h2spec, which tests an HTTP/2 server (RFC 9113 and RFC 7541), over TCP and over TLS."""

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from certificates import Authority
from processes import ROOT, run_server
from programs import skip_without

PROGRAM = "github.com/summerwind/h2spec/cmd/h2spec"
CASES = 145
STREAM = "/api/sessions/done/status/stream"
# On a port that serves both versions, what is not the preface of HTTP/2 is a malformed request of HTTP/1.1:
# the connection ends with a 400, where h2spec expects nothing but its end.
ANSWERED = {"Sends invalid connection preface"}


@pytest.fixture(scope="module")
def h2spec(tmp_path_factory) -> Path:
    """The program, built from the modules that go.mod pins."""
    program = tmp_path_factory.mktemp("h2spec") / "h2spec"
    build = [skip_without("go"), "build", "-buildvcs=false", "-o", program, PROGRAM]
    done = subprocess.run(build, cwd=ROOT / "tests" / "h2spec", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def run_h2spec(h2spec: Path, url: str, path: str, report: Path) -> set[str]:
    """Run all cases against a server; return the descriptions of those that failed."""
    parts = urlsplit(url)
    target = ["--host", "127.0.0.1", "--port", str(parts.port), "--path", path]
    tls = ["--tls", "--insecure"] if parts.scheme == "https" else []
    command = [h2spec, *target, *tls, "--junit-report", report]
    subprocess.run(command, capture_output=True, timeout=100, check=False)
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert len(cases) == CASES
    assert not [case for case in cases if case.find("skipped") is not None]
    return {
        case.attrib["classname"]
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    }


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "path", ["/health", "/api/sessions/done/status/stream"], ids=["request", "event stream"]
)
def test_over_tcp(h2spec, tmp_path, path):
    """Also with an event stream, which is served by other code."""
    with run_server() as url:
        posted = httpx.post(f"{url}/api/sessions/done/progress", json={"status": "done"})
        assert posted.status_code == 202
        assert run_h2spec(h2spec, url, path, tmp_path / "report.xml") == ANSWERED


@pytest.mark.timeout(200)
def test_over_tls(h2spec, tmp_path):
    """With ALPN, where a connection is of one version of HTTP from its beginning."""
    certificate, key = Authority().issue().write(tmp_path)
    with run_server(tls_cert=certificate, tls_key=key) as url:
        assert run_h2spec(h2spec, url, "/health", tmp_path / "report.xml") == set()
