"""Every example from its one command to its end: its worker, its terminal clients, its page in Chromium."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page
from processes import ROOT, Chromium, Program, Proxy, install_node_packages
from programs import require_program

EXAMPLES = ROOT / "examples"
WORDS = (
    "The patient slept better this week. She walks to the harbour in the morning and writes a page "
    "before breakfast. We agreed to meet again in two weeks."
)
# Streams are asked to come back soon, so that no test waits for an EventSource that does.
ENVIRON = {"SSESERVE_RETRY_MS": "50"}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_node_packages(tmp_path_factory.mktemp("npm"))


def run(example: str, *options: str | Path, pace: float = 0.01, **environ: str) -> Program:
    require_program("curl")
    command = (sys.executable, EXAMPLES / example / "run.py", "--pace", str(pace), *options)
    return Program(*command, **ENVIRON, **environ)


def page_of(program: Program) -> str:
    """Wait until the terminal's part is over; return the page's address."""
    return program.wait_for_output(r"^Open (\S+) in a browser")[1]


def streamed(text: str) -> list[tuple[str, Any]]:
    """What curl has shown of event streams: names and data."""
    found = re.findall(r"^(?:event: (.*)\n)?data: (.*)\n", text, re.MULTILINE)
    return [(name or "message", json.loads(data)) for name, data in found]


def is_end(seen: list[Any], whole: list[Any]) -> bool:
    """Whether it is all but for a beginning, which whoever comes late finds summed up in a snapshot."""
    return len(seen) > 2 and seen == whole[-len(seen) :]


def items(page: Page) -> list[str]:
    return page.locator("#log li").all_inner_texts()


def test_interaction(chromium):
    """A page and curl see the same typed events: a broken recording, another attempt, the text."""
    with run("interaction") as program:
        url = page_of(program)
        events = streamed(program.output)
        log = [f"processing {data['progress']:g}" if name == "processing" else name for name, data in events]
        assert [name for name in log if not name.startswith("p")] == ["error", "transcription", "complete"]
        assert [at for at, name in enumerate(log) if name == "processing 0"] == [0, log.index("error") + 1]
        assert ("transcription", {"text": WORDS, "confidence": 0.95}) in events

        def look(page: Page) -> list[str]:
            page.goto(url)
            # The end of the stream: it comes back, and is told by 204 that there is nothing more.
            page.wait_for_function("document.getElementById('connection').textContent === 'closed'")
            assert page.inner_text("#text") == WORDS
            assert page.inner_text("#error").startswith("TRANSCRIPTION_FAILED: ")
            return items(page)

        shown, errors = chromium.visit(look)
        assert shown == log[:-1]  # its client does not know "complete"
        # Its listener reads the data of the connection's errors, which have none: twice, at its end.
        assert errors == ['"undefined" is not valid JSON'] * 2
        assert program.wait(signal.SIGINT) == 0


def test_sessions(chromium):
    """The Python client, curl, EventSource, WebSocket and a poll every two seconds agree."""
    with run("sessions", pace=0.05) as program:
        url = page_of(program)
        lines = re.findall(r"^\[(\w+)\] Progress: (\d+)% - (.*)$", program.output, re.MULTILINE)
        assert lines[-1] == ("complete", "100", "Session processing complete")
        assert ("progress", "85", "24 different words") in lines
        percents = [int(percent) for _, percent, _ in lines]
        assert len(percents) > 5
        assert percents == sorted(percents)
        # After the end: its last event alone, at once.
        ((name, last),) = streamed(program.output)
        assert (name, last["progress"], len(last["data"]["sha256"])) == ("complete", 100, 64)
        assert '"code":"session_not_found"' in program.output

        def look(page: Page) -> tuple[list[str], list[int]]:
            streams: list[int] = []
            page.on("response", lambda r: streams.append(r.status) if r.url.endswith("stream") else None)
            said: list[str] = []
            page.on("console", lambda message: said.append(message.text))
            page.goto(url)
            page.wait_for_selector("#success:visible")
            for way in ("ws", "poll"):
                end = f"document.getElementById('{way}-status').textContent.startsWith('processed: ')"
                page.wait_for_function(end)
                assert page.evaluate(f"document.getElementById('{way}').value") == 100
            return said, streams

        (said, streams), errors = chromium.visit(look)
        assert streams == [200]  # it closes its stream itself
        assert said[-2:] == ["Progress: 85% - 24 different words", "Processing complete!"]
        assert errors == []
        assert program.wait(signal.SIGINT) == 0


def test_podcast(chromium):
    """Statuses that came by Pub/Sub push reach curl and a page of another origin, which created its job."""
    with run("podcast", pace=0.05) as program:
        url = page_of(program)
        statuses = [data for _, data in streamed(program.output)]
        assert is_end([status["progress"] for status in statuses], [0, 15, 30, 50, 70, 95, 100])
        stages = ["queued", "retrieving-content", "processing-articles", "generating-summary"]
        assert is_end([*dict.fromkeys(status["stage"] for status in statuses)], stages)
        assert statuses[-1]["status"] == "completed"
        assert len(statuses[-1]["data"]["sha256"]) == 64

        def look(page: Page) -> tuple[list[str], list[int]]:
            streams: list[int] = []
            page.on("response", lambda r: streams.append(r.status) if r.url.endswith("events") else None)
            with page.expect_event("response", lambda r: r.status == 204):
                page.goto(url)
            assert page.evaluate("document.getElementById('progress').value") == 100
            return items(page), streams

        (shown, streams), _ = chromium.visit(look)
        words = ["2472 words, 23 different", "4938 words, 23 different"]
        messages = ["", "Retrieved techcrunch", "Retrieved ars-technica", *words]
        assert is_end(shown, [*messages, "Wrote podcast.md", "The podcast is ready"])
        assert streams == [200, 204]  # after its end an EventSource comes back once, and stops
        assert program.wait(signal.SIGINT) == 0


@pytest.mark.parametrize("react", ["mini-react", "react"])
def test_transcription(chromium, react, request):
    """The hook shows the statuses of the task, with mini-react.js and with React itself."""
    options = ("--react", request.getfixturevalue("node_modules")) if react == "react" else ()
    with run("transcription", *options, SSESERVE_THROTTLE="0.000001") as program:
        url = page_of(program)
        statuses = [data for _, data in streamed(program.output)]
        assert is_end([status["progress"] for status in statuses], [0, 10, 25, 50, 75, 90, 100])
        assert statuses[-1] | {"session_id": "", "timestamp": ""} == {
            "session_id": "",
            "status": "completed",
            "progress": 100,
            "message": "Transcription completed successfully!",
            "timestamp": "",
            "words": 28,
        }

        def look(page: Page) -> tuple[str, list[str], list[str]]:
            asked: list[str] = []
            page.on("request", lambda r: asked.append(r.url) if "/status" in r.url else None)
            page.goto(url)
            end = "document.getElementById('status')?.textContent.startsWith('completed: ')"
            page.wait_for_function(end)
            page.wait_for_function("document.getElementById('connection').textContent === 'disconnected'")
            assert page.inner_text("#error") == ""
            return page.evaluate("React.version ?? 'mini-react'"), asked

        (version, asked), errors = chromium.visit(look)
        assert version == ("18.3.1" if react == "react" else react)
        assert [path.rpartition("/")[2] for path in asked] == ["stream"]
        assert errors == []
        assert program.wait(signal.SIGINT) == 0


def test_transcription_without_streaming(chromium):
    """Where streaming is switched off the hook falls back to polling, and sees the end too."""
    with run("transcription", "--no-sse") as program:
        url = page_of(program)
        assert '"code":"sse_disabled"' in program.output

        def look(page: Page) -> list[str]:
            asked: list[str] = []
            page.on("response", lambda r: asked.append(f"{r.url.rpartition('/')[2]} {r.status}"))
            page.goto(url)
            page.wait_for_function("document.getElementById('status')?.textContent.startsWith('completed: ')")
            assert page.inner_text("#connection") == "error"
            return [answer for answer in asked if answer.startswith("st")]

        asked, _ = chromium.visit(look)
        assert "stream 503" in asked
        assert asked[-1] == "status 200"
        assert program.wait(signal.SIGINT) == 0


def test_jobs_in_the_terminal():
    """The video server generates a video phase by phase; another job is cancelled."""
    with run("jobs") as program:
        page_of(program)
        events = streamed(program.output)
        names = [name for name, _ in events]
        made = events[names.index("job-completed")][1]
        assert made["status"] == "Succeeded"
        events = events[: names.index("job-completed")]
        phases = [data["phase"] for name, data in events if name == "step-status"]
        assert phases == ["plan", "tts", "visuals", "compose", "render"]
        film, voice, subtitles = made["artifacts"]
        assert made["output"] == {
            "videoPath": film["path"],
            "subtitlePath": subtitles["path"],
            "sizeBytes": film["sizeBytes"],
        }
        content = Path(film["path"]).read_bytes()
        assert content.startswith(b"YUV4MPEG2 W160 H90 F6:1 ")
        assert len(content) == film["sizeBytes"] > 36 * 160 * 90
        assert Path(voice["path"]).read_bytes()[:4] == b"RIFF"
        assert Path(subtitles["path"]).read_text().count("-->") == 3
        assert '"correlationId":"from-the-terminal"' in program.output
        assert names[-1] == "job-cancelled"
        assert program.wait(signal.SIGINT) == 0
        assert not Path(film["path"]).exists()


def test_jobs_in_a_page(chromium):
    """SseClient comes back by itself when its stream breaks, and the panel lacks no event of its job."""
    with run("jobs", SSESERVE_DEMO_SECONDS="1.5") as program, ExitStack() as stack:
        url = page_of(program)
        server = httpx.get(f"{url}config").json()["server"]
        proxy = stack.enter_context(Proxy(server))

        def generate(page: Page, button: str) -> str:
            """Press a button; return the job."""
            with page.expect_response(lambda answer: answer.request.method == "POST") as made:
                page.click(button)
            job = made.value.json()
            assert made.value.headers["x-correlation-id"] == job["correlationId"]
            page.wait_for_selector("#cancel:enabled")
            return job["jobId"]

        def status(page: Page, wanted: str) -> None:
            page.wait_for_function(f"document.getElementById('status').textContent === '{wanted}'")

        def end(page: Page, wanted: str) -> list[str]:
            """Wait until the stream has been closed; return what the panel saw."""
            status(page, wanted)
            page.wait_for_selector("#cancel:disabled")
            assert page.inner_text("#error") == ""
            return items(page)

        def look(page: Page) -> dict[str, list[str]]:
            page.route("**/config", lambda route: route.fulfill(json={"server": proxy.url}))
            page.goto(url)
            seen = {}
            job = generate(page, "#generate")
            seen[job] = end(page, "Succeeded")
            assert page.locator("#artifacts li").first.inner_text().startswith("film.y4m video/x-yuv4mpeg, ")

            job = generate(page, "#demo")
            page.click("#pause")
            status(page, "Paused")
            with page.expect_request(lambda request: "last_event_id=" in request.url):
                proxy.disconnect_all()
            page.click("#pause")
            seen[job] = end(page, "Succeeded")
            links = page.eval_on_selector_all("#artifacts a", "links => links.map((a) => a.href)")
            assert len(links) > 1
            assert [httpx.get(link).status_code for link in links] == [200] * len(links)

            job = generate(page, "#demo")
            page.click("#cancel")
            seen[job] = end(page, "Cancelled")
            return seen

        seen, errors = chromium.visit(look)
        assert all("ERR_" in error for error in errors)  # Chromium's own word on the broken connection
        for job, shown in seen.items():
            whole = httpx.get(f"{server}/api/jobs/{job}/events", params={"replay": "1"}).text
            # What is asked of the worker is not the panel's concern.
            ids = re.findall(r"^id: (.*)\nevent: (?!control)(.*)$", whole, re.MULTILINE)
            assert [tuple(item.split()[:2]) for item in shown] == ids
        assert program.wait(signal.SIGINT) == 0
