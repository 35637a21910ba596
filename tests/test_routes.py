"""The table of paths: every row is found, and nothing else."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseserve.http.routes import ROUTES, Kind


@pytest.mark.parametrize("route", list(ROUTES), ids=lambda route: f"{route.method} {route.path}")
def test_every_route_is_found_by_its_path(route):
    """With the values of its parameters, by its method alone."""
    found = ROUTES.match(route.method, route.path.replace("{id}", "job-1").replace("{name}", "a.txt"))
    assert found is not None
    assert found.route is route
    assert found.params == {
        name: value for name, value in [("id", "job-1"), ("name", "a.txt")] if "{" + name + "}" in route.path
    }


def test_no_two_routes_are_the_same():
    """Neither by method and path nor by name."""
    assert len({(route.method, route.path) for route in ROUTES}) == len(list(ROUTES))
    assert len({route.name for route in ROUTES}) == len(list(ROUTES))


def test_what_is_watched_is_got_and_what_is_published_posted():
    """Kinds go with methods, so that a browser's GET never publishes."""
    wanted = {Kind.STREAM: "GET", Kind.SOCKET: "GET", Kind.PUBLISH: "POST"}
    assert {(route.kind, route.method) for route in ROUTES if route.kind in wanted} == set(wanted.items())


@given(st.text(min_size=1).filter(lambda text: text.isprintable()))
def test_any_id_survives_its_percent_encoding(session_id):
    """Slashes, percent signs, other scripts: what a client encodes is what the handler gets."""
    try:
        path = f"/api/sessions/{quote(session_id, safe='')}/status/stream"
    except UnicodeEncodeError:
        return
    found = ROUTES.match("GET", path)
    assert found is not None
    assert (found.route.name, found.params) == ("stream", {"id": session_id})


@pytest.mark.parametrize(
    "path",
    ["", "*", "/api", "/api/", "/api/sessions/", "/api/sessions//status", "/api/sessions/a/status/",
     "/api/sessions/a/status/streams", "/api/sessions/a/b/status", "//", "/API/sessions", "/api/sessions/a?b",
     "/api%2Fsessions", "http://example.com/api/sessions", "/health/", "/{}", "/api/artifacts/a"],
)  # fmt: skip
def test_what_has_no_route(path):
    """Paths match as a whole, by case and without a slash at the end."""
    assert ROUTES.match("GET", path) is None


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/api/sessions", ["GET", "POST"]),
        ("/api/sessions/a", ["DELETE"]),
        ("/api/sessions/a/events", ["GET", "POST"]),
        ("/", ["GET"]),
        ("/nowhere", []),
    ],
)
def test_the_methods_of_a_path(path, allowed):
    """Sorted, for the Allow header; none where there is nothing."""
    assert ROUTES.methods(path) == allowed
    assert all(ROUTES.match(method, path) for method in allowed)
    assert ROUTES.match("PATCH", path) is None
