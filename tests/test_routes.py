"""The table of routes: every row is matched, and no other path."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseserve.http.routes import ROUTES
from sseserve.http.routing import Kind


@pytest.mark.parametrize("route", list(ROUTES), ids=lambda route: f"{route.method} {route.path}")
def test_every_route_matches_its_path(route):
    """With the values of its parameters, and only for its method."""
    match = ROUTES.match(route.method, route.path.replace("{id}", "job-1").replace("{name}", "a.txt"))
    assert match is not None
    assert match.route is route
    assert match.params == {
        name: value for name, value in [("id", "job-1"), ("name", "a.txt")] if "{" + name + "}" in route.path
    }


def test_routes_are_unique():
    """By method and path, and by name."""
    assert len({(route.method, route.path) for route in ROUTES}) == len(list(ROUTES))
    assert len({route.name for route in ROUTES}) == len(list(ROUTES))


def test_methods_of_route_kinds():
    """Streams use GET and publishing uses POST, so a browser's GET never publishes."""
    methods = {Kind.STREAM: "GET", Kind.SOCKET: "GET", Kind.PUBLISH: "POST"}
    assert {(route.kind, route.method) for route in ROUTES if route.kind in methods} == set(methods.items())


@given(st.text(min_size=1).filter(lambda text: text.isprintable()))
def test_percent_encoded_ids(session_id):
    """An id with slashes, percent signs or other scripts reaches the handler decoded."""
    try:
        path = f"/api/sessions/{quote(session_id, safe='')}/status/stream"
    except UnicodeEncodeError:
        return
    match = ROUTES.match("GET", path)
    assert match is not None
    assert (match.route.name, match.params) == ("stream", {"id": session_id})


@pytest.mark.parametrize(
    "path",
    ["", "*", "/api", "/api/", "/api/sessions/", "/api/sessions//status", "/api/sessions/a/status/",
     "/api/sessions/a/status/streams", "/api/sessions/a/b/status", "//", "/API/sessions", "/api/sessions/a?b",
     "/api%2Fsessions", "http://example.com/api/sessions", "/health/", "/{}", "/api/artifacts/a"],
)  # fmt: skip
def test_paths_without_a_route(path):
    """Paths match as a whole, case-sensitively and without a trailing slash."""
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
def test_methods_of_a_path(path, allowed):
    """Sorted, for the Allow header; empty for an unknown path."""
    assert ROUTES.methods(path) == allowed
    assert all(ROUTES.match(method, path) for method in allowed)
    assert ROUTES.match("PATCH", path) is None
