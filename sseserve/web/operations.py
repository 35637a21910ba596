"""For those who run it: health, readiness, metrics, and the description of the API."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from ..context import Context
from ..dialects.sessions import ProgressRecord
from ..errors import Unavailable
from ..http.messages import Answer, Request, json_answer
from ..http.routes import ROUTES, Kind, Match, Route
from ..model import Artifact

__all__ = ["HANDLERS"]

BUSIEST = 100  # sessions whose watchers are counted


async def health(context: Context, _match: Match, _asked: Request) -> Answer:
    subscribers = context.broker.subscribers()
    streams = sum(s.encoding.protocol == "sse" for s in subscribers)
    figures = {
        "status": "ok",
        "version": context.version,
        "uptime": round(context.uptime, 1),
        "connections": context.connections,
        "streams": streams,
        "sockets": len(subscribers) - streams,
        "sessions": await context.engine.count(),
    }
    if context.authenticate is None:  # else the ids are not for everybody
        figures["connections_per_job"] = context.broker.busiest(BUSIEST)
    return json_answer(200, figures, (("Cache-Control", "no-store"),))


async def ready(context: Context, _match: Match, _asked: Request) -> Answer:
    if context.stopping.is_set():
        raise Unavailable("the server is about to stop")
    return json_answer(200, {"status": "ready"}, (("Cache-Control", "no-store"),))


async def metrics(context: Context, _match: Match, _asked: Request) -> Answer:
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return Answer(200, context.metrics.render(), (("Content-Type", kind),))


_QUERY = {
    "list": ["state", "limit"],
    "status": ["wait"],
    "stream": ["last_event_id"],
    "socket": ["last_event_id"],
    "history": ["after", "limit", "wait"],
}
_STATUS = {"create": "201", "delete": "204", "demo": "202", "socket": "101"}


def _operation(route: Route) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    parameters += [
        {"name": n, "in": "query", "schema": {"type": "string"}} for n in _QUERY.get(route.name, ())
    ]
    good: dict[str, Any] = {"description": route.summary}
    if route.kind is Kind.STREAM:
        good["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    elif route.name == "status":
        good["content"] = {"application/json": {"schema": {"$ref": "#/components/schemas/ProgressRecord"}}}
    status = _STATUS.get(route.name, "202" if route.body is not None else "200")
    refused = {"description": "Refused", "content": {"application/json": {"schema": {"$ref": _ERROR}}}}
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "parameters": parameters,
        "responses": {status: good, "default": refused},
    }
    if (body := route.body) is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        content = {"application/json": {"schema": schema}}
        if route.name == "events":
            content["application/x-ndjson"] = {"schema": schema}
        operation["requestBody"] = {"content": content}
    return operation


_ERROR = "#/components/schemas/Error"
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "request_id"],
            "properties": {name: {"type": "string"} for name in ("code", "message", "request_id")},
        }
    },
}


def _document(version: str) -> dict[str, Any]:
    """Describe the table of routes as OpenAPI 3.1."""
    kinds = [
        *dict.fromkeys(route.body for route in ROUTES if route.body is not None),
        ProgressRecord,
        Artifact,
    ]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "sseserve", "version": version},
        "paths": paths,
        "components": {"schemas": {**schemas, "Error": _ERROR_SCHEMA}},
    }


async def openapi(context: Context, _match: Match, _asked: Request) -> Answer:
    return json_answer(200, _document(context.version))


HANDLERS = {"health": health, "ready": ready, "metrics": metrics, "openapi": openapi}
