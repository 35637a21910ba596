"""The pages and what they are made of, and the demonstration job that they start."""

from __future__ import annotations

import hashlib
import mimetypes
import random
from functools import cache, partial
from importlib.resources import files

from .. import demo
from ..context import Context
from ..errors import NotFound, Unavailable
from ..http import Answer, Request, json_answer
from ..routes import Kind, Match, Route

__all__ = ["HANDLERS", "STATIC"]

STATIC = Route("GET", "/static/{name}", Kind.WEB, "static", "What the pages are made of")
MAX_DEMOS = 10  # demonstration jobs that run at the same time
PACE = 20.0  # seconds that one takes
TITLE = "Demonstration"

_POLICY = (
    ("Content-Security-Policy", "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
)
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".svg": "image/svg+xml"}


@cache
def _file(folder: str, name: str) -> tuple[bytes, str, str] | None:
    """A packaged file: its bytes, media type and entity tag. Only names that are there are read."""
    found = {item.name: item for item in files(__package__).joinpath(folder).iterdir() if item.is_file()}
    if name not in found:
        return None
    body = found[name].read_bytes()
    suffix = name[name.rfind(".") :]
    kind = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    return body, kind, f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"'


def _serve(folder: str, name: str, asked: Request) -> Answer:
    if (found := _file(folder, name)) is None:
        raise NotFound(f"nothing lives at {asked.path}")
    body, kind, tag = found
    if kind.startswith("text/"):
        kind += "; charset=utf-8"
    headers = (("Content-Type", kind), ("ETag", tag), ("Cache-Control", "no-cache"), *_POLICY)
    if tag in asked.headers.get("if-none-match", ""):
        return Answer(304, headers=headers)
    return Answer(200, body, headers)


async def index(_context: Context, _match: Match, asked: Request) -> Answer:
    return _serve("templates", "index.html", asked)


async def dashboard(_context: Context, _match: Match, asked: Request) -> Answer:
    return _serve("templates", "dashboard.html", asked)


async def static(_context: Context, match: Match, asked: Request) -> Answer:
    return _serve("static", match.params["name"], asked)


async def start_demo(context: Context, _match: Match, _asked: Request) -> Answer:
    """Start a job in this process; it works without any configuration."""
    running = [s for s in await context.tracker.sessions() if s.title == TITLE and not s.ended]
    if len(running) >= MAX_DEMOS:
        raise Unavailable(f"{MAX_DEMOS} demonstration jobs are running already")
    session = await context.tracker.create(title=TITLE)
    seed = random.getrandbits(32)
    job = partial(demo.work, context.tracker, session.id, seed=seed, pace=PACE, store=context.artifacts)
    context.nursery.start_soon(job)
    base = f"/api/sessions/{session.id}"
    links = {"status": f"{base}/status", "stream": f"{base}/status/stream", "ws": f"{base}/status/ws"}
    return json_answer(202, {"session_id": session.id, "links": links}, (("Location", links["status"]),))


async def artifact(context: Context, match: Match, asked: Request) -> Answer:
    found = context.artifacts.get(match.params["id"], match.params["name"])
    if found is None:
        raise NotFound(f"nothing lives at {asked.path}")
    kind, body = found
    return Answer(200, body, (("Content-Type", kind), *_POLICY))


HANDLERS = {
    "index": index,
    "dashboard": dashboard,
    "static": static,
    "demo": start_demo,
    "artifact": artifact,
}
