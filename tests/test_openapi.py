"""The contract in a row of the table of routes is what the server does, and what ``/openapi.json`` says."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import msgspec
import pytest

import sseserve
from sseserve import Grant
from sseserve.http.routes import ROUTES
from sseserve.http.routing import COMMON_ERRORS, Kind, Route
from sseserve.http.schemas import Error

STATUS = base64.b64encode(b'{"jobId":"running","status":"processing","progress":50}').decode()

# The body of a request that succeeds, by the route's name; those without one need none.
BODIES: dict[str, Any] = {
    "create": {"session_id": "new", "title": "t"},
    "progress": {"progress": 60},
    "events": {"type": "note", "data": {"a": 1}},
    "interact": {"type": "transcription", "data": {"text": "hello"}},
    "create_job": {"title": "t", "brief": {"topic": "x"}},
    "job_progress": {"stage": "render", "progress": 10},
    "pubsub": {"message": {"data": STATUS, "messageId": "1"}},
    "transcription_status": {"status": "processing", "progress": 70},
    "ticket": {"sessions": ["running"]},
    "revoke": {"subject": "ann"},
}
TOKENS = {"ticket", "refresh", "revoke"}  # routes that need authentication
DOCUMENTED = [route for route in ROUTES if route.documented]
ANSWERED = [route for route in DOCUMENTED if route.kind in (Kind.REQUEST, Kind.PUBLISH)]


def path_of(route: Route, session_id: str) -> str:
    return route.path.replace("{id}", session_id).replace("{name}", "script.txt")


async def authenticate(_request):
    return Grant("root", "admin")


@pytest.mark.parametrize("route", ANSWERED, ids=lambda route: route.name)
async def test_a_request_gets_what_its_row_says(route):
    """A successful request: one of the statuses, and a body of the type that the row has for it."""
    async with (
        sseserve.serve(
            port=0, demo_seconds=0.01, authenticate=authenticate if route.name in TOKENS else None
        ) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
    ):
        await server.tracker.update("running", progress=40, stage="render", message="m")
        session_id = "running"
        if route.name == "artifact":
            session_id = (await client.post("/api/quick/demo")).json()["session_id"]
            await client.get(f"/api/sessions/{session_id}/events?after=x-0&wait=9")
            while not (await server.tracker.get(session_id)).ended:
                await client.get(f"/api/sessions/{session_id}/status?wait=1")
        response = await client.request(route.method, path_of(route, session_id), json=BODIES.get(route.name))
    assert response.status_code in route.responses, response.text
    content = route.responses[response.status_code]
    if isinstance(content, str):
        media_type = response.headers["content-type"].partition(";")[0]
        assert content in ("*/*", media_type)
    elif content is None:
        assert response.content == b""
    else:
        assert response.headers["content-type"] == "application/json"
        decoded = msgspec.json.decode(response.content, type=content)
        # Nothing is sent that the type does not have.
        assert msgspec.json.decode(msgspec.json.encode(decoded)).keys() >= response.json().keys()


@pytest.mark.parametrize("route", [r for r in ANSWERED if "{id}" in r.path], ids=lambda route: route.name)
async def test_an_error_is_one_that_its_row_lists(route):
    """A session that does not exist, or a body that is not JSON: a listed status, in the one shape."""
    async with (
        sseserve.serve(port=0, auto_create=False) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
    ):
        response = await client.request(route.method, path_of(route, "none"), json=BODIES.get(route.name))
    assert response.status_code in {error.status for error in route.errors}
    error = msgspec.json.decode(response.content, type=Error).error
    assert error.code in {error.code for error in route.errors}


async def test_the_document_has_every_row_and_all_of_it():
    """Each operation has its parameters, its body, and exactly the statuses of its row."""
    async with (
        sseserve.serve(port=0) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
    ):
        document = (await client.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    assert {method for path in document["paths"].values() for method in path} == {"get", "post", "delete"}
    assert sum(map(len, document["paths"].values())) == len(DOCUMENTED)
    for route in DOCUMENTED:
        operation = document["paths"][route.path][route.method.lower()]
        assert operation["operationId"] == route.name
        assert set(operation["responses"]) == {
            *map(str, route.responses),
            *(str(error.status) for error in (*route.errors, *COMMON_ERRORS)),
        }
        names = [parameter["name"] for parameter in operation["parameters"]]
        assert names == [*route.parameters, *(query.name for query in route.query)]
        assert ("requestBody" in operation) == (route.body is not None or route.any_body)


async def test_every_reference_of_the_document_leads_somewhere():
    """All schemas that are referred to are there."""
    async with (
        sseserve.serve(port=0) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
    ):
        document = (await client.get("/openapi.json")).json()
    text = json.dumps(document)
    names = {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names
    assert names == set(document["components"]["schemas"])
