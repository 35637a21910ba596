"""Each example from its command to its end: its worker, its terminal clients, its page in Chromium."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from playwright.sync_api import Page, Request
from processes import ROOT, Chromium, Program, Proxy, install_node_packages, wait_until
from programs import require_program

from sseserve.sse import Decoder

EXAMPLES = ROOT / "examples"
TRANSCRIPT = (
    "The patient slept better this week. She walks to the harbour in the morning and writes a page "
    "before breakfast. We agreed to meet again in two weeks."
)
# A short reconnection time, so that no test waits long for an EventSource to reconnect.
ENVIRON = {"SSESERVE_RETRY_MS": "50"}
SEEDS_HOOK = ROOT / "tests" / "seed_clients" / "useTranscriptionStatusSSE.js"
STATUS = "document.getElementById('status')?.textContent"  # of the transcription page


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_node_packages(tmp_path_factory.mktemp("npm"))


def run(example: str, *options: str | Path, pace: float = 0.01, **environ: str) -> Program:
    """Start an example; its worker waits ``pace`` seconds after each step."""
    require_program("curl")
    command = (sys.executable, EXAMPLES / example / "run.py", "--pace", str(pace), *options)
    return Program(*command, **ENVIRON, **environ)


def wait_for_page(program: Program) -> str:
    """Wait until the terminal clients have ended; return the page's address."""
    return program.wait_for_output(r"^Open (\S+) in a browser")[1]


def begin(url: str) -> dict[str, Any]:
    """Start a session as an example's page does."""
    begun: dict[str, Any] = httpx.post(f"{url}begin").json()
    return begun


def parse_events(text: str) -> list[tuple[str, Any]]:
    """Return the events in curl's output: names and data. Lines of the server's log may be between them."""
    matches = re.findall(r"^(?:event: (.*)\n(?:(?!event: |data: ).+\n)*)?data: (.*)\n", text, re.MULTILINE)
    return [(name or "message", json.loads(data)) for name, data in matches]


def is_tail(seen: list[Any], whole: list[Any]) -> bool:
    """Whether ``seen`` is the end of ``whole``, whose beginning a late watcher gets only as a snapshot."""
    return len(seen) > 2 and seen == whole[-len(seen) :]


def log_items(page: Page) -> list[str]:
    return page.locator("#log li").all_inner_texts()


@pytest.mark.parametrize("example", ["interaction", "jobs", "podcast", "sessions", "transcription"])
def test_pages_share_a_style(chromium, example):
    """Each page has the shared style, in light and dark, and fits the narrowest screens."""
    with run(example) as program:
        url = wait_for_page(program)

        def scenario(page: Page) -> str:
            page.set_viewport_size({"width": 320, "height": 640})
            page.goto(url)
            assert page.evaluate("document.documentElement.scrollWidth") == 320
            return page.evaluate("getComputedStyle(document.body).backgroundColor")

        colors = {chromium.visit(scenario, color_scheme=scheme)[0] for scheme in ("light", "dark")}
        assert colors == {"rgb(245, 246, 248)", "rgb(17, 21, 27)"}
        assert program.wait(signal.SIGINT) == 0


def test_interaction(chromium):
    """A page and curl get the same typed events: a failed attempt, another one, the transcript."""
    with run("interaction") as program:
        url = wait_for_page(program)
        events = parse_events(program.output)
        log = [f"processing {data['progress']:g}" if name == "processing" else name for name, data in events]
        assert [name for name in log if not name.startswith("p")] == ["error", "transcription", "complete"]
        assert [at for at, name in enumerate(log) if name == "processing 0"] == [0, log.index("error") + 1]
        assert ("transcription", {"text": TRANSCRIPT, "confidence": 0.95}) in events

        def scenario(page: Page) -> list[str]:
            page.goto(url)
            # At the end of the stream EventSource reconnects, and 204 closes it.
            page.wait_for_function("document.getElementById('connection').textContent.endsWith('ended.')")
            assert page.inner_text("#text") == TRANSCRIPT
            assert page.inner_text("#stage") == "transcribed"
            assert page.inner_text("#error") == ""  # the second attempt has succeeded
            return log_items(page)

        rendered, errors = chromium.visit(scenario)
        log[log.index("error")] = "error TRANSCRIPTION_FAILED"
        assert rendered == log[:-1]  # the page has no listener for "complete"
        # The page's listener parses the data of connection errors, which have none: twice, at the end.
        assert errors == ['"undefined" is not valid JSON'] * 2
        assert program.wait(signal.SIGINT) == 0


@pytest.mark.parametrize("event_source", ["PollingEventSource", "EventSource"])
def test_sessions(chromium, event_source):
    """The Python client, curl, EventSource (the browser's own too), WebSocket and polling every 2 s agree."""
    with run("sessions", pace=0.05) as program:
        url = wait_for_page(program)
        lines = re.findall(r"^\[(\w+)\] Progress: (\d+)% - (.*)$", program.output, re.MULTILINE)
        assert lines[-1] == ("complete", "100", "Session processing complete")
        assert ("progress", "85", "24 different words") in lines
        percents = [int(percent) for _, percent, _ in lines]
        assert len(percents) > 5
        assert percents == sorted(percents)
        # After the end a watcher gets the final event alone: the therapist, and the first to use the ticket.
        (name, last), second = parse_events(program.output)
        assert (name, last["progress"], len(last["data"]["sha256"])) == ("complete", 100, 64)
        assert second == (name, last)
        codes = re.findall(r'"code":"(\w+)"', program.output)
        assert codes == ["forbidden", "forbidden", "session_not_found", "invalid_token"]

        def scenario(page: Page) -> tuple[list[str], list[int]]:
            streams: list[int] = []
            page.on("response", lambda r: streams.append(r.status) if "/status/stream?" in r.url else None)
            console: list[str] = []
            page.on("console", lambda message: console.append(message.text))
            if event_source == "EventSource":
                script = """import { takeTicket } from "./sign-in.js";
                    import { session } from "./view.js";
                    const ticket = await takeTicket((await session).session_id);
                    export class PollingEventSource extends EventSource {
                        constructor(url) { super(`${url}?ticket=${ticket}`); }
                    }"""
                answer = {"content_type": "text/javascript", "body": script}
                page.route("**/polling-event-source.js", lambda route: route.fulfill(**answer))
            page.goto(url)
            page.wait_for_selector("#success:visible")
            for transport, status in (("sse", "complete"), ("ws", "processed"), ("poll", "processed")):
                end = f"document.getElementById('{transport}-status').textContent.startsWith('{status}: ')"
                page.wait_for_function(end)
                assert page.evaluate(f"document.getElementById('{transport}').value") == 100
                assert page.get_attribute(f"#{transport}", "data-state") == "succeeded"
            return console, streams

        (console, streams), errors = chromium.visit(scenario)
        assert streams == [200]  # the page closes its stream itself
        assert console[-2:] == ["Progress: 85% - 24 different words", "Processing complete!"]
        assert errors == []
        assert program.wait(signal.SIGINT) == 0


@pytest.mark.parametrize("missing", ["EventSource", "streams"])
def test_sessions_without_streams(chromium, missing):
    """The client falls back to polling, and sees the end."""
    with run("sessions", pace=0.05) as program:
        url = wait_for_page(program)

        def scenario(page: Page) -> list[str]:
            if missing == "EventSource":
                page.add_init_script("delete window.EventSource")
            page.route("**/status/stream?*", lambda route: route.fulfill(status=503))
            paths: list[str] = []
            page.on("request", lambda r: paths.append(urlsplit(r.url).path.rpartition("/")[2]))
            page.goto(url)
            page.wait_for_selector("#success:visible")
            assert page.evaluate("document.getElementById('sse').value") == 100
            assert page.inner_text("#sse-transport") == "Polling instead of Server-Sent Events"
            return paths

        paths, _ = chromium.visit(scenario)
        assert paths.count("stream") == (1 if missing == "streams" else 0)
        assert program.wait(signal.SIGINT) == 0


def test_sessions_client_survives_a_broken_stream(chromium):
    """The stream resumes where it broke; its client logs the error, and all transports show the end."""
    with run("sessions", pace=0.05) as program, ExitStack() as stack:
        url = wait_for_page(program)
        begun = begin(url)
        proxy = stack.enter_context(Proxy(begun["server"]))

        def scenario(page: Page) -> list[str]:
            streams: list[str] = []
            page.on("request", lambda r: streams.append(r.url) if "/status/stream?" in r.url else None)
            page.route("**/begin", lambda route: route.fulfill(json=begun | {"server": proxy.url}))
            page.goto(url)
            page.wait_for_function("document.getElementById('sse').value > 0")
            proxy.disconnect_all()
            page.wait_for_selector("#success:visible")
            for transport in ("sse", "ws", "poll"):
                page.wait_for_function(f"document.getElementById('{transport}').value === 100")
            return streams

        streams, errors = chromium.visit(scenario)
        # Each connection has a ticket of its own, and the second one the cursor.
        first, second = (parse_qs(urlsplit(url).query) for url in streams)
        assert first["ticket"] != second["ticket"]
        assert "last_event_id" not in first
        assert second["last_event_id"]
        assert any("SSE connection error" in error for error in errors)
        assert program.wait(signal.SIGINT) == 0


def test_sessions_of_somebody_else(chromium):
    """The therapist may watch the patient's session; another patient is told that they may not."""
    with run("sessions", pace=0.05) as program:
        url = wait_for_page(program)

        def scenario(page: Page) -> str:
            page.goto(url)
            page.click("[data-user=therapist-2][href]")
            page.wait_for_selector("#success:visible")
            assert page.inner_text("#user") == "therapist-2"
            page.click("[data-user=patient-8][href]")
            page.wait_for_selector("#error:not(:empty)")
            assert page.evaluate("document.getElementById('sse').value") == 0
            return page.inner_text("#error")

        error, _ = chromium.visit(scenario)
        assert "may not watch" in error
        assert program.wait(signal.SIGINT) == 0


def test_podcast(chromium):
    """Statuses from Pub/Sub push reach curl and a page of another origin, which created its job."""
    with run("podcast", pace=0.05) as program:
        url = wait_for_page(program)
        statuses = [data for _, data in parse_events(program.output)]
        assert is_tail([status["progress"] for status in statuses], [0, 15, 30, 50, 70, 95, 100])
        stages = ["queued", "retrieving-content", "processing-articles", "generating-summary"]
        assert is_tail([*dict.fromkeys(status["stage"] for status in statuses)], stages)
        assert statuses[-1]["status"] == "completed"
        assert len(statuses[-1]["data"]["sha256"]) == 64

        def scenario(page: Page) -> tuple[list[str], list[int]]:
            streams: list[int] = []
            page.on("response", lambda r: streams.append(r.status) if r.url.endswith("events") else None)
            with page.expect_event("response", lambda r: r.status == 204):
                page.goto(url)
            assert page.evaluate("document.getElementById('progress').value") == 100
            return log_items(page), streams

        (rendered, streams), _ = chromium.visit(scenario)
        words = ["2472 words, 23 different", "4938 words, 23 different"]
        messages = ["Retrieved techcrunch", "Retrieved ars-technica", *words]
        assert is_tail(rendered, [*messages, "Wrote podcast.md", "The podcast is ready"])
        assert streams == [200, 204]  # after the end EventSource reconnects once, and stops
        assert program.wait(signal.SIGINT) == 0


@pytest.mark.parametrize("react", ["mini-react", "react", "the seed's hook"])
def test_transcription(chromium, react, request):
    """The hook renders the task's statuses, with mini-react.js and with React; so does the seed's own."""
    options = ("--react", request.getfixturevalue("node_modules")) if react == "react" else ()
    with run("transcription", *options, pace=0.05, SSESERVE_THROTTLE="0.000001") as program:
        url = wait_for_page(program)
        statuses = [data for _, data in parse_events(program.output)]
        assert is_tail([status["progress"] for status in statuses], [0, 10, 25, 50, 75, 90, 100])
        assert statuses[-1] | {"session_id": "", "timestamp": ""} == {
            "session_id": "",
            "status": "completed",
            "progress": 100,
            "message": "Transcription completed successfully!",
            "timestamp": "",
            "words": 28,
        }

        def scenario(page: Page) -> tuple[str, list[str], list[str]]:
            requests: list[str] = []
            page.on("request", lambda r: requests.append(r.url) if "/status" in r.url else None)
            if react == "the seed's hook":
                page.route("**/useTranscriptionStatusSSE.js", lambda route: route.fulfill(path=SEEDS_HOOK))
            page.goto(url)
            page.wait_for_function(f"{STATUS} === 'completed'")
            assert page.inner_text("#message") == "Transcription completed successfully!"
            assert page.get_attribute("#progress", "data-state") == "succeeded"
            # Beside a success nothing says that a connection is missing.
            assert (page.inner_text("#connection"), page.inner_text("#error")) == ("", "")
            return page.evaluate("React.version ?? 'mini-react'"), requests

        (version, requests), errors = chromium.visit(scenario)
        assert version == ("18.3.1" if react == "react" else "mini-react")
        assert [path.rpartition("/")[2] for path in requests] == ["stream"]
        assert errors == []
        assert program.wait(signal.SIGINT) == 0


def test_transcription_without_streaming(chromium):
    """With streaming switched off the hook falls back to polling, and gets the end too."""
    with run("transcription", "--no-sse") as program:
        url = wait_for_page(program)
        assert '"code":"sse_disabled"' in program.output

        def scenario(page: Page) -> list[str]:
            responses: list[str] = []
            page.on("response", lambda r: responses.append(f"{r.url.rpartition('/')[2]} {r.status}"))
            begun = begin(url) | {"options": {"reconnectDelay": 10}}
            page.route("**/begin", lambda route: route.fulfill(json=begun))
            page.goto(url)
            page.wait_for_function(f"{STATUS} === 'completed'")
            assert (page.inner_text("#connection"), page.inner_text("#error")) == ("", "")
            return [response for response in responses if response.startswith("st")]

        responses, _ = chromium.visit(scenario)
        # The first attempt and three more.
        assert [r for r in responses if r.startswith("stream")] == ["stream 503"] * 4
        assert responses[-1] == "status 200"
        assert program.wait(signal.SIGINT) == 0


class HookTest:
    """The transcription example's page, watching a session that the test publishes to."""

    def __init__(self, program: Program) -> None:
        self.url = wait_for_page(program)
        self.server = httpx.get(f"{self.url}config").json()["server"]
        self.proxy = Proxy(self.server)
        self.requests: list[str] = []  # "stream" or "status"
        self.publish(10)

    def publish(self, progress: int, status: str = "processing") -> None:
        body = {"status": status, "progress": progress, "message": f"at {progress}"}
        httpx.post(f"{self.server}/api/v1/sessions/s/status", json=body).raise_for_status()

    def count_streams(self) -> int:
        """Return how many streams the server has open."""
        metrics = httpx.get(f"{self.server}/metrics").text
        pattern = r'^sseserve_streams\{dialect="transcription",.*\} (\d+)\.0$'
        return sum(map(int, re.findall(pattern, metrics, re.MULTILINE)))

    def open(self, page: Page, **options: Any) -> None:
        """Open the page, and wait until it shows the current status."""
        page.on("request", self._note)
        begun = {"server": self.proxy.url, "session_id": "s", "options": options}
        page.route("**/begin", lambda route: route.fulfill(json=begun))
        # What the page has shown of its connection, in order.
        page.add_init_script(
            "window.shown = []; new MutationObserver(() => { for (const id of ['connection', 'error']) {"
            " const text = document.getElementById(id)?.textContent;"
            " if (text && shown.at(-1) !== text) shown.push(text); } })"
            ".observe(document, {subtree: true, childList: true, characterData: true})"
        )
        page.goto(self.url)
        self.wait_for(page, 10)

    def _note(self, request: Request) -> None:
        if "/api/" in request.url:
            self.requests.append(request.url.rpartition("/")[2])

    def wait_for(self, page: Page, progress: int) -> None:
        page.wait_for_function(f"document.getElementById('message')?.textContent === 'at {progress}'")

    def wait_for_connection(self, page: Page, text: str) -> None:
        page.wait_for_function(f"document.getElementById('connection')?.textContent === '{text}'")


@pytest.fixture
def hook() -> Iterator[HookTest]:
    with run("transcription") as program:
        hook = HookTest(program)
        with hook.proxy:
            yield hook
        assert program.wait(signal.SIGINT) == 0


def test_hook_has_one_stream_however_often_it_breaks(chromium, hook):
    """Each break is followed by one request, and the server never has a second stream of the page."""

    def scenario(page: Page) -> None:
        hook.open(page)
        for number in range(1, 6):
            with page.expect_request("**/stream"):
                hook.proxy.disconnect_all()
            hook.wait_for_connection(page, "Live")
            hook.publish(10 + number)
            hook.wait_for(page, 10 + number)
            assert hook.count_streams() == 1
        hook.publish(100, "completed")
        page.wait_for_function(f"{STATUS} === 'completed'")

    chromium.visit(scenario)
    assert hook.requests == ["stream"] * 6
    assert hook.count_streams() == 0


def test_hook_polls_after_three_attempts(chromium, hook):
    """When the server responds with errors, and the page says so; polling gets the end."""

    def scenario(page: Page) -> list[str]:
        hook.open(page, reconnectDelay=10)
        page.route("**/stream", lambda route: route.fulfill(status=502))
        hook.proxy.disconnect_all()
        hook.wait_for_connection(page, "Polling")
        hook.publish(50)
        hook.wait_for(page, 50)
        hook.publish(100, "completed")
        page.wait_for_function(f"{STATUS} === 'completed'")
        return page.evaluate("shown")

    shown, _ = chromium.visit(scenario)
    assert hook.requests[:4] == ["stream"] * 4
    assert set(hook.requests[4:]) == {"status"}
    assert {"Connection lost", "Connection lost. Retrying..."} < set(shown)
    assert hook.count_streams() == 0


def test_hook_polls_without_eventsource(chromium, hook):
    """A browser that has none gets the statuses too."""

    def scenario(page: Page) -> None:
        page.add_init_script("delete window.EventSource")
        hook.open(page)
        hook.publish(100, "failed")
        page.wait_for_function(f"{STATUS} === 'failed'")

    chromium.visit(scenario)
    assert set(hook.requests) == {"status"}


def test_hook_pauses_while_the_page_is_hidden(chromium, hook):
    """There is neither a stream nor polling then; afterwards the page has the current status."""

    def scenario(page: Page) -> None:
        def set_hidden(hidden: bool) -> None:
            page.evaluate(
                "(value) => { Object.defineProperty(document, 'hidden', {value, configurable: true});"
                " document.dispatchEvent(new Event('visibilitychange')); }",
                hidden,
            )

        hook.open(page, reconnectDelay=10)
        set_hidden(True)
        wait_until(lambda: hook.count_streams() == 0, "no stream")
        hook.publish(60)
        with page.expect_request("**/stream"):
            set_hidden(False)
        hook.wait_for(page, 60)
        assert hook.count_streams() == 1
        assert hook.requests == ["stream", "stream"]
        # Polling is paused too.
        page.route("**/stream", lambda route: route.fulfill(status=502))
        hook.proxy.disconnect_all()
        hook.wait_for_connection(page, "Polling")
        set_hidden(True)
        hook.wait_for_connection(page, "Not connected")
        hook.publish(70)
        page.unroute("**/stream")
        set_hidden(False)
        hook.wait_for(page, 70)
        hook.wait_for_connection(page, "Live")

    chromium.visit(scenario)


def test_planned_end_of_an_idle_stream_is_no_error(chromium):
    """The server ends idle streams; the hook's stream comes back, and the page never says that it is lost."""
    with run("transcription", SSE_CONNECTION_TIMEOUT="1") as program:
        hook = HookTest(program)

        def scenario(page: Page) -> list[str]:
            hook.open(page)
            with page.expect_request("**/stream"):
                pass
            hook.wait_for_connection(page, "Live")
            hook.publish(20)
            hook.wait_for(page, 20)
            return page.evaluate("shown")

        with hook.proxy:
            shown, errors = chromium.visit(scenario)
        assert set(shown) <= {"Not connected", "Connecting", "Live"}
        assert errors == []
        assert program.wait(signal.SIGINT) == 0


def test_jobs_in_the_terminal():
    """The server generates a video phase by phase; another job is cancelled."""
    with run("jobs") as program:
        wait_for_page(program)
        events = parse_events(program.output)
        names = [name for name, _ in events]
        result = events[names.index("job-completed")][1]
        assert result["status"] == "Succeeded"
        events = events[: names.index("job-completed")]
        phases = [data["phase"] for name, data in events if name == "step-status"]
        assert phases == ["plan", "tts", "visuals", "compose", "render"]
        film, voice, subtitles = result["artifacts"]
        assert result["output"] == {
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


def test_jobs_in_workers_of_their_own():
    """Two worker processes claim the jobs of a server that runs none itself."""
    with run("jobs", "--workers", "2") as program:
        url = wait_for_page(program)
        events = parse_events(program.output)
        names = [name for name, _ in events]
        result = events[names.index("job-completed")][1]
        assert result["output"]["sizeBytes"] == Path(result["output"]["videoPath"]).stat().st_size
        assert result["output"]["subtitlePath"].endswith("film.srt")
        server = httpx.get(f"{url}config").json()["server"]
        briefs = ("A boat.", "", "Nobody.")
        created = [httpx.post(f"{server}/api/jobs", json={"brief": brief}) for brief in briefs]
        ends = []
        for job in (response.json()["jobId"] for response in created):
            stream = parse_events(httpx.get(f"{server}/api/jobs/{job}/events", timeout=20).text)
            ends.append((stream[-1][0], stream[-1][1].get("errorCode")))
            assert len(re.findall(rf"^worker-[12]: job {job}$", program.output, re.MULTILINE)) == 1
        assert ends == [("job-completed", None), ("job-failed", "validation_error"), ("job-completed", None)]
        assert program.wait(signal.SIGINT) == 0


def test_jobs_in_a_page(chromium):
    """SseClient reconnects when its stream breaks, and the panel misses no event of its job."""
    with run("jobs", SSESERVE_DEMO_SECONDS="1.5") as program, ExitStack() as stack:
        url = wait_for_page(program)
        server = httpx.get(f"{url}config").json()["server"]
        proxy = stack.enter_context(Proxy(server))

        def generate(page: Page, button: str) -> str:
            """Press a button; return the job."""
            with page.expect_response(lambda response: response.request.method == "POST") as created:
                page.click(button)
            job = created.value.json()
            assert created.value.headers["x-correlation-id"] == job["correlationId"]
            page.wait_for_selector("#cancel:enabled")
            return job["jobId"]

        def wait_for_status(page: Page, status: str) -> None:
            page.wait_for_function(f"document.getElementById('status').textContent === '{status}'")

        def wait_for_end(page: Page, status: str) -> list[str]:
            """Wait until the stream has been closed; return what the panel saw."""
            wait_for_status(page, status)
            page.wait_for_selector("#cancel:disabled")
            assert page.inner_text("#error") == ""
            return page.locator("#log li").all_text_contents()

        def scenario(page: Page) -> dict[str, list[str]]:
            page.route("**/config", lambda route: route.fulfill(json={"server": proxy.url}))
            page.goto(url)
            seen = {}
            job = generate(page, "#generate")
            seen[job] = wait_for_end(page, "Succeeded")
            assert page.locator("#artifacts li").first.inner_text().startswith("film.y4m video/x-yuv4mpeg, ")

            job = generate(page, "#demo")
            page.click("#pause")
            wait_for_status(page, "Paused")
            with page.expect_request(lambda request: "last_event_id=" in request.url):
                proxy.disconnect_all()
            page.click("#pause")
            seen[job] = wait_for_end(page, "Succeeded")
            links = page.eval_on_selector_all("#artifacts a", "links => links.map((a) => a.href)")
            assert len(links) > 1
            assert [httpx.get(link).status_code for link in links] == [200] * len(links)

            job = generate(page, "#demo")
            page.click("#cancel")
            seen[job] = wait_for_end(page, "Cancelled")
            return seen

        seen, errors = chromium.visit(scenario)
        assert all("ERR_" in error for error in errors)  # Chromium's own message about the broken connection
        for job, rendered in seen.items():
            assert_saw_all(server, job, rendered)
        assert program.wait(signal.SIGINT) == 0


def assert_saw_all(server: str, job: str, rendered: list[str]) -> None:
    """Check that the panel shows each event of a job once and in order, but for control events."""
    whole = httpx.get(f"{server}/api/jobs/{job}/events", params={"replay": "1"}).content
    ids = [(e.id, e.event) for e in Decoder().feed(whole) if e.event != "control"]
    assert [tuple(item.split()[:2]) for item in rendered] == ids


def test_recovery_in_the_jobs_page(chromium):
    """A failure shows its message, Retry and View Logs; a reload shows the same job; leaving closes it."""
    with run("jobs", SSESERVE_DEMO_SECONDS="1.5") as program:
        url = wait_for_page(program)
        server = httpx.get(f"{url}config").json()["server"]

        def scenario(page: Page) -> None:
            page.goto(url)
            assert page.is_hidden("#recovery")
            page.fill("#brief", " ")
            page.click("#generate")
            page.wait_for_selector("#retry:visible")
            assert page.inner_text("#error") == "the brief is empty"
            page.click("#view-logs")
            assert "job-failed" in page.locator("#log li").last.inner_text()
            failed = page.url
            correlation = httpx.get(f"{server}/api/jobs/{failed.partition('#')[2]}").json()["correlationId"]
            assert page.inner_text("#correlation") == correlation
            page.reload()
            page.wait_for_selector("#retry:visible")
            with page.expect_response(lambda response: response.request.method == "POST") as created:
                page.click("#retry")
            assert created.value.json()["request"] == {"brief": " "}
            page.wait_for_url(f"**#{created.value.json()['jobId']}")
            assert page.url != failed

            page.click("#demo")
            page.wait_for_function("document.getElementById('status').textContent === 'Running'")
            page.click("#pause")
            page.wait_for_function("document.getElementById('status').textContent === 'Paused'")
            assert page.is_hidden("#recovery")
            running = page.url.partition("#")[2]
            page.reload()
            page.wait_for_function("document.getElementById('pause').textContent === 'Resume'")
            page.goto("about:blank")
            record = f"{server}/api/v1/jobs/{running}"
            wait_until(lambda: httpx.get(record).json()["connections"] == 0, "the stream is closed")
            page.go_back()
            page.wait_for_selector("#pause:enabled")
            page.click("#pause")
            page.wait_for_function("document.getElementById('status').textContent === 'Succeeded'")
            assert_saw_all(server, running, page.locator("#log li").all_text_contents())

        _, errors = chromium.visit(scenario)
        assert errors == []
        assert program.wait(signal.SIGINT) == 0


@pytest.mark.parametrize("reason", ["blocked", "missing"])
def test_websocket_fallback_of_the_jobs_page(chromium, reason):
    """Where event streams are blocked, or the browser has none, the panel gets every event by WebSocket."""
    with run("jobs", SSESERVE_DEMO_SECONDS="1.5") as program:
        url = wait_for_page(program)
        server = httpx.get(f"{url}config").json()["server"]

        def fail_to_connect(page: Page) -> None:
            for attempt in range(1, 6):
                delay = 1000 * 2 ** (attempt - 1)
                text = f"Connection lost. Reconnecting in {delay} ms (attempt {attempt})"
                page.wait_for_function(f"document.getElementById('message').textContent === '{text}'")
                page.clock.run_for(delay)  # the page's clock stands still otherwise

        def scenario(page: Page) -> None:
            if reason == "blocked":
                page.clock.install(time=0)
                page.clock.pause_at(1000)
                page.route("**/events?*", lambda route: route.abort())
            else:
                page.add_init_script("delete window.EventSource")
            page.goto(url)
            page.click("#demo")
            if reason == "blocked":
                fail_to_connect(page)
            page.wait_for_function("document.getElementById('status').textContent === 'Succeeded'")
            assert page.inner_text("#transport") == "WebSocket"
            job = page.url.partition("#")[2]
            assert_saw_all(server, job, page.locator("#log li").all_text_contents())
            if reason == "blocked":
                page.route_web_socket("**/ws?*", lambda socket: socket.close(code=1011))
                page.click("#demo")
                fail_to_connect(page)
                fail_to_connect(page)
                page.wait_for_selector("#retry:visible")
                assert page.inner_text("#error") == "Connection failed"

        _, errors = chromium.visit(scenario)
        assert all("ERR_" in error for error in errors)
        assert program.wait(signal.SIGINT) == 0


# The end of an example


@pytest.mark.parametrize(
    ("example", "moment"),
    [
        ("interaction", "data: "),
        ("jobs", "data: "),
        ("podcast", "data: "),
        ("podcast", "Open "),
        ("sessions", r"\[progress\]"),
        ("transcription", "data: "),
    ],
)
def test_ctrl_c(example, moment):
    """It ends without a traceback: in the middle of its work, or while it serves its page as it says."""
    with run(example, pace=0.05 if moment != "Open " else 0.0) as program:
        program.wait_for_output(f"^{moment}")
        program.press_ctrl_c()
        assert program.wait() == (0 if moment == "Open " else 130)
        assert "Traceback" not in program.output


def test_sessions_without_requests(tmp_path):
    """The client's library is no dependency of the package: the message says how to install it."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['requests'] = None\n")
    with run("sessions", PYTHONPATH=str(tmp_path)) as program:
        assert program.wait() == 1
        assert program.output == (
            f"this example requires requests: {sys.executable} -m pip install requests\n"
        )


def child_processes(pid: int) -> set[int]:
    """Return the processes that a process has started, and those that they have."""
    pids: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            pids |= {child} | child_processes(child)
    return pids


class CeleryExample(Program):
    """Ends what it has started even if a test fails: its worker has a session of its own."""

    def __exit__(self, *error: object) -> None:
        if not self.has_exited:
            self.wait(signal.SIGTERM)
        super().__exit__(*error)


def run_celery(*options: str) -> Program:
    """Start the Celery example with a short recording."""
    require_program("curl")
    require_program("redis-server")
    command = (sys.executable, EXAMPLES / "celery" / "run.py", "--words", "12", *options)
    return CeleryExample(*command, **ENVIRON, SSESERVE_THROTTLE="0.000001")


def check_celery_output(output: str) -> None:
    """A watcher of the first server has got all statuses, and the second one has the last."""
    statuses = [data for _, data in parse_events(output)]
    labels = [*dict.fromkeys((status["status"], status.get("attempt")) for status in statuses)]
    expected = [("processing", 1), ("retrying", None), ("processing", 2), ("completed", 2)]
    assert is_tail(labels, [("queued", None), *expected])
    percents = [status["progress"] for status in statuses]
    assert percents == sorted(percents)
    assert statuses[-1]["text"] == " ".join(TRANSCRIPT.split()[:12])
    assert output.count(json.dumps(statuses[-1], separators=(",", ":"))) == 2


def test_celery(chromium):
    """A task of a Celery worker is retried once, and watched on both servers, to the same end."""
    with run_celery() as program:
        url = wait_for_page(program)
        check_celery_output(program.output)
        processes = child_processes(program.pid)

        def scenario(page: Page) -> tuple[list[list[str]], str]:
            page.set_viewport_size({"width": 320, "height": 640})
            page.goto(url)
            page.wait_for_selector(".log li")
            cards = page.locator("#watchers .card")
            cards.nth(0).locator(".state", has_text="retrying").wait_for()
            cards.nth(0).locator(".move").click()
            for at in (0, 1):
                cards.nth(at).get_by_text("Ended on server 2").wait_for()
            assert page.inner_text("#text") == " ".join(TRANSCRIPT.split()[:12])
            assert page.evaluate("document.documentElement.scrollWidth") == 320
            logs = [cards.nth(at).locator(".log li").all_inner_texts() for at in (0, 1)]
            return logs, page.evaluate("getComputedStyle(document.body).backgroundColor")

        ((first, second), color), errors = chromium.visit(scenario, color_scheme="dark")
        assert color == "rgb(17, 21, 27)"
        assert errors == []
        assert (first[0], second[0]) == ("connected to server 1", "connected to server 2")
        moved = first.index("connected to server 2")
        assert first[moved + 1] == "resumed: ok, 0 missed"
        del first[moved : moved + 2]
        # Each begins with the status at that time.
        length = min(len(first), len(second)) - 2
        assert length > 12
        # Of statuses that come together a server sends the last, as the dialect has a throttle.
        first, second = first[-length:], second[-length:]
        common = SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
        assert sum(block.size for block in common) >= length - 3
        assert first[-1] == second[-1]

        def without_second_server(page: Page) -> None:
            begun = begin(url)
            page.route("**/begin", lambda route: route.fulfill(json=begun))
            page.route(f"{begun['servers'][1]}/**", lambda route: route.abort())
            page.goto(url)
            page.locator(".connection", has_text="Connected to server 1").nth(1).wait_for()

        chromium.visit(without_second_server)

        def without_redis(page: Page) -> None:
            body = 'event: degraded\ndata: {"reason":"no Redis"}\n\nevent: restored\ndata: {}\n\n'
            headers = {"Content-Type": "text/event-stream", "Access-Control-Allow-Origin": "*"}
            page.route("**/status/stream", lambda route: route.fulfill(headers=headers, body=body))
            page.goto(url)
            for text in ("degraded: no Redis", "restored"):
                page.locator(".log li", has_text=text).nth(1).wait_for()

        chromium.visit(without_redis)
        assert program.wait(signal.SIGTERM) == 0
        assert len(processes) >= 5
        assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]


def test_celery_over_http():
    """The worker publishes to one of the servers."""
    with run_celery("--http", "--once") as program:
        assert program.wait() == 0
        check_celery_output(program.output)
