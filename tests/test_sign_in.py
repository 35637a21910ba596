"""The pages of a server with authentication, in Chromium: a token, tickets, expiry, revocation, a cookie."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import tokens
from playwright.sync_api import Page, Request, expect
from processes import Chromium, run_server
from test_page import CARDS, press, read_cards, wait_cards


def make_token(subject: str, role: str | None = None, *, seconds: float = 3600, **claims: Any) -> str:
    """Make a token that expires in that many seconds."""
    return tokens.make_token(sub=subject, role=role, exp=time.time() + seconds, **claims)


SERVICE = tokens.bearer(make_token("worker", "service"))
ADMIN = tokens.bearer(make_token("operator", "admin"))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with run_server(jwt_key=tokens.SECRET, demo_seconds=1, drain=1) as url:
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


def create(url: str, session_id: str, owner: str = "patient-7") -> None:
    body = {"session_id": session_id, "owner": owner}
    httpx.post(f"{url}/api/sessions", json=body, headers=SERVICE).raise_for_status()


def publish(url: str, session_id: str, **update: Any) -> None:
    path = f"{url}/api/sessions/{session_id}/progress"
    httpx.post(path, json=update, headers=SERVICE).raise_for_status()


def revoke(url: str, **what: str) -> None:
    httpx.post(f"{url}/api/revocations", json=what, headers=ADMIN).raise_for_status()


def sign_in(page: Page, token: str) -> None:
    """Give the form a token, and wait until it is accepted."""
    give(page, token)
    expect(page.locator("#sign-in")).to_be_hidden()


def give(page: Page, token: str) -> None:
    page.get_by_label("Token", exact=True).fill(token)
    page.keyboard.press("Enter")


def note_requests(page: Page) -> list[Request]:
    """Return a list that gets each request of the page, and each WebSocket's URL."""
    requests: list[Request] = []
    page.on("request", lambda request: requests.append(request))
    return requests


def wait_connected(page: Page) -> None:
    wait_cards(page, "cards.length === 3 && cards.every((card) => card.state === 'connected')")


def test_a_token_is_asked_for_and_sent(url, chromium):
    """A wrong token is refused with a reason; with a right one all three transports connect.

    The token is in the header of requests to the API and in the storage of the tab, and nowhere else.
    """
    create(url, "asked")
    token = make_token("patient-7", "patient")

    def scenario(page: Page) -> None:
        requests, sockets = note_requests(page), []
        page.on("websocket", lambda socket: sockets.append(socket.url))
        page.goto(f"{url}/#asked")
        field = page.get_by_label("Token", exact=True)
        expect(field).to_be_focused()
        expect(field).to_have_attribute("type", "password")
        expect(page.locator("#sign-in")).to_contain_text("This server requires a token.")
        expect(page.locator("#watch")).to_be_hidden()
        for wrong in ("two words", token[:-2] + "xx"):
            give(page, wrong)
            expect(page.locator("#token-error")).not_to_be_empty()
            expect(field).to_have_attribute("aria-invalid", "true")
            expect(page.locator("#sign-in-submit")).to_have_text("Continue")
        sign_in(page, token)
        wait_connected(page)
        publish(url, "asked", progress=20)
        wait_cards(page, "cards.every((card) => card.percent === '20%')")
        expect(page.locator("#account-name")).to_have_text("Signed in as patient-7 (patient)")
        expect(page.locator("#curl")).to_contain_text('-H "Authorization: Bearer $TOKEN"')
        sent = [r for r in requests if r.headers.get("authorization") == f"Bearer {token}"]
        assert {r.url.split("?")[0].rpartition("/")[2] for r in sent} >= {
            "stream",
            "tickets",
            "events",
            "status",
        }
        assert not [r for r in requests if "/api/" not in r.url and "authorization" in r.headers]
        assert not [r for r in requests if token in r.url] + [s for s in sockets if token in s]
        (socket,) = sockets
        assert parse_qs(urlsplit(socket).query)["ticket"]
        assert page.evaluate("[document.cookie, localStorage.length]") == ["", 0]
        # Only this tab has it: after a reload too.
        page.reload()
        wait_connected(page)
        page.get_by_role("button", name="Sign out").click()
        expect(page.locator("#sign-in")).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0

    chromium.visit(scenario)


def test_each_connection_of_a_websocket_has_a_fresh_ticket(url, chromium):
    """It reconnects with its cursor and another ticket, and misses nothing."""
    create(url, "tickets")

    def scenario(page: Page) -> list[dict[str, str]]:
        sockets: list[dict[str, str]] = []

        def note(socket: Any) -> None:
            sockets.append({name: value for name, (value,) in parse_qs(urlsplit(socket.url).query).items()})

        page.on("websocket", note)
        page.goto(f"{url}/#tickets")
        sign_in(page, make_token("patient-7", "patient"))
        wait_connected(page)
        press(page, "Disconnect WebSocket")
        publish(url, "tickets", progress=30)
        publish(url, "tickets", progress=40)
        wait_cards(page, "cards[0].percent === '40%'")
        press(page, "Reconnect WebSocket")
        wait_cards(page, "cards[1].percent === '40%' && cards[1].events === cards[0].events")
        assert read_cards(page)[1]["note"] == "Resumed: caught up on 2 events, none lost."
        return sockets

    sockets, _errors = chromium.visit(scenario)
    first, second = sockets
    assert first["ticket"] != second["ticket"]
    assert first["last_event_id"] == second["last_event_id"]  # of the page's snapshot


def test_what_a_token_may_not_do_is_said(url, chromium):
    """What the server forbids is named; another person's session looks like one that does not exist."""
    create(url, "own")
    create(url, "foreign", owner="patient-8")

    def scenario(page: Page) -> None:
        page.goto(f"{url}/#own")
        sign_in(page, make_token("patient-7", "patient"))
        wait_connected(page)  # a session that has been loaded takes the place of an earlier error
        press(page, "Start demo job")
        expect(page.locator("#error")).to_contain_text("may not create")
        texts = []
        for name in ("foreign", "unknown"):
            page.evaluate(f"location.hash = '{name}'")
            expect(page.locator("#error")).to_contain_text("may not watch")
            texts.append(page.locator("#error").inner_text().split("request")[0])
            expect(page.get_by_text("Loading…")).to_be_hidden()
            expect(page.locator("#sign-in")).to_be_hidden()  # another token would be another user's
            page.evaluate("location.hash = 'own'")
            expect(page.locator("#error")).to_be_hidden()
        assert texts[0] == texts[1]
        names = page.locator("#sessions .session-name").all_inner_texts()
        assert "own" in names
        assert "foreign" not in names

    chromium.visit(scenario)


def test_a_new_token_extends_the_streams(url, chromium):
    """The page says that the token expires; with a new one no stream is interrupted when it has."""
    create(url, "expiring")

    def scenario(page: Page) -> None:
        page.goto(f"{url}/#expiring")
        expires_at = time.time() + 5
        sign_in_expiring(page, make_token("patient-7", "patient", seconds=5))
        wait_connected(page)
        give(page, "wrong")
        expect(page.locator("#token-error")).not_to_be_empty()
        sign_in(page, make_token("patient-7", "patient", jti="the second"))
        page.wait_for_function("end => Date.now() > end", arg=expires_at * 1000 + 500)
        publish(url, "expiring", progress=50)
        wait_cards(page, "cards.every((card) => card.percent === '50%')")
        cards = read_cards(page)
        # A long-poll is responded to, and asked again with the new token.
        assert [card["reconnects"] for card in cards[:2]] == ["0", "0"]
        expect(page.locator("#sign-in")).to_be_hidden()

    chromium.visit(scenario)


def sign_in_expiring(page: Page, token: str) -> None:
    """Give the form a token that is about to expire, which the page then says."""
    give(page, token)
    expect(page.locator("#sign-in-title")).to_have_text("Your token is about to expire")
    expect(page.locator("#sign-in-reason")).to_contain_text("Your token expires in ")


def test_a_revoked_token_is_asked_for_again(url, chromium):
    """The streams end at once; with another token they go on from their cursors."""
    create(url, "revoked")

    def scenario(page: Page) -> None:
        page.goto(f"{url}/#revoked")
        sign_in(page, make_token("patient-7", "patient", jti="revoked"))
        wait_connected(page)
        revoke(url, token_id="revoked")
        expect(page.locator("#sign-in-reason")).to_have_text("The token was revoked.")
        wait_cards(page, "cards.every((card) => card.state === 'refused')")
        expect(page.locator("#account")).to_be_hidden()
        assert page.evaluate("sessionStorage.length") == 0
        publish(url, "revoked", progress=60)
        sign_in(page, make_token("patient-7", "patient", jti="another"))
        wait_cards(page, "cards.every((card) => card.state === 'connected' && card.percent === '60%')")
        assert {card["missed"] for card in read_cards(page)} == {"0"}

    chromium.visit(scenario)


def test_dashboard(url, chromium):
    """The dashboard asks, shows what the token may see, asks again after a revocation, and goes on."""
    create(url, "listed")
    create(url, "hidden", owner="patient-8")

    def scenario(page: Page) -> None:
        requests = note_requests(page)
        page.clock.install()
        page.goto(f"{url}/dashboard")
        expect(page.locator("#sign-in")).to_be_visible()
        page.clock.fast_forward(30_000)  # nothing is requested while a token is asked for
        expect(page.locator("table")).to_be_hidden()
        sign_in(page, make_token("patient-7", "patient", jti="dashboard"))
        expect(page.locator("#connection")).to_have_text("connected")
        rows = page.locator("#rows")
        expect(rows).to_contain_text("listed")
        expect(rows).not_to_contain_text("hidden")
        revoke(url, token_id="dashboard")
        expect(page.locator("#sign-in-reason")).to_have_text("The token was revoked.")
        expect(page.locator("#connection")).to_have_text("refused")
        publish(url, "listed", progress=70)
        sign_in(page, make_token("patient-7", "patient", jti="dashboard 2"))
        expect(page.locator("#connection")).to_have_text("connected")
        expect(rows.locator("tr", has_text="listed")).to_contain_text("70%")
        # Another user's token: nothing of what the first one saw stays.
        page.get_by_role("button", name="Sign out").click()
        sign_in_expiring(page, make_token("patient-8", "patient", seconds=25))
        expect(rows).to_contain_text("hidden")
        expect(rows).not_to_contain_text("listed")
        # The page was refused three times, and accepted as often.
        assert len([r for r in requests if r.url.endswith("/api/streams/sessions")]) == 6

    chromium.visit(scenario)


def test_another_users_token_shows_nothing_of_the_first(url, chromium):
    """A token of another subject, given when the first is about to expire, starts the page afresh."""
    create(url, "first", owner="patient-7")

    def scenario(page: Page) -> None:
        page.goto(f"{url}/#first")
        sign_in_expiring(page, make_token("patient-7", "patient", seconds=20))
        wait_connected(page)
        sign_in(page, make_token("patient-9", "patient"))
        expect(page.locator("#account-name")).to_have_text("Signed in as patient-9 (patient)")
        expect(page.locator("#error")).to_contain_text("may not watch")
        assert page.evaluate(f"({CARDS})().map((card) => card.state)") == ["not connected"] * 3

    chromium.visit(scenario)


def test_a_cookie_needs_no_form(url, chromium):
    """With a token in the cookie, which a login page has set, everything works, changes too."""
    create(url, "cookie")

    def scenario(page: Page) -> None:
        page.goto(f"{url}/#cookie")
        expect(page.locator("#sign-in")).to_be_visible()
        token = make_token("patient-7", "patient")
        # Browsers take 127.0.0.1 for secure.
        cookie = {"name": "__Host-sseserve", "value": token, "url": url.replace("http", "https")}
        page.context.add_cookies([{**cookie, "secure": True, "httpOnly": True, "sameSite": "Strict"}])
        page.evaluate("dispatchEvent(new Event('focus'))")  # the user returns from the login page
        expect(page.locator("#sign-in")).to_be_hidden()
        requests = note_requests(page)
        wait_connected(page)
        press(page, "Cancel")
        expect(page.locator("#job-state")).to_have_text("cancelled")
        expect(page.locator("#account")).to_be_hidden()
        assert not [r for r in requests if "authorization" in r.headers or r.url.endswith("/api/tickets")]

    chromium.visit(scenario)


def test_files_are_loaded_with_the_token(url, chromium):
    """Previews and downloads work; what is not of the API does not get the token."""

    def scenario(page: Page) -> None:
        page.goto(url)
        sign_in(page, make_token("operator", "admin"))
        press(page, "Start demo job")
        expect(page.locator("#job-state")).to_have_text("succeeded")
        page.wait_for_function("() => document.querySelector('.preview-image')?.naturalWidth > 0")
        expect(page.locator(".captions li").first).to_contain_text(" s")
        page.evaluate("""() => {
            const make = URL.createObjectURL;
            URL.createObjectURL = (blob) => { window.savedType = blob.type; return make.call(URL, blob); };
        }""")
        link = page.locator("#files a", has_text=".srt")
        with page.expect_download() as download:
            link.click()
        assert download.value.suggested_filename == link.inner_text()
        # A blob is of this origin: as a page it could read the token.
        assert page.evaluate("window.savedType") == "application/octet-stream"
        requests = note_requests(page)
        image = {"name": "icon", "type": "image/svg+xml", "url": "/static/icon.svg"}
        captions = {"name": "captions", "type": "text/vtt", "url": "/static/captions.vtt"}
        publish(url, "elsewhere", progress=1, artifacts=[image, captions])
        page.evaluate("location.hash = 'elsewhere'")
        icon = "() => document.querySelector('.preview-image[alt$=icon]')?.naturalWidth > 0"
        page.wait_for_function(icon)
        expect(page.locator(".captions")).to_have_text("The captions could not be loaded.")
        loaded = [r for r in requests if r.url.endswith(("/static/icon.svg", "/static/captions.vtt"))]
        assert len(loaded) >= 2
        assert not [r for r in loaded if "authorization" in r.all_headers()]

    chromium.visit(scenario)


def test_without_authentication_nothing_changes(chromium):
    """No form, no ticket, no header: the pages are as they were."""

    def scenario(page: Page) -> None:
        requests = note_requests(page)
        page.goto(url)
        press(page, "Start demo job")
        wait_cards(page, "cards.length === 3 && cards.every((card) => Number(card.events) > 1)")
        for locator in ("#sign-in", "#account"):
            expect(page.locator(locator)).to_be_hidden()
        assert not [r for r in requests if "authorization" in r.headers or "ticket" in r.url]

    with run_server(demo_seconds=2, drain=1) as url:
        chromium.visit(scenario)
