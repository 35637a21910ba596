"""The pages, their files, and the files that demonstration jobs have made."""

from __future__ import annotations

import hashlib
import mimetypes
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from ..demo.worker import DemoRunner
from ..errors import NotFound
from ..http.messages import Request, Response, matches_tag
from ..http.routing import Match
from ..progress.tracker import Tracker
from .dispatch import Handler

__all__ = ["PageHandlers"]

_COMMON = (("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"))
# A page runs its own scripts only, sends nothing elsewhere, and cannot be framed. Blobs: files that it has
# fetched with a token.
_SOURCES = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_POLICY = (("Content-Security-Policy", _SOURCES), *_COMMON)
# Whatever a file of a job is: never a page or a script of this origin, whose pages hold a token. A page can
# still show it as an image or a film.
_DOWNLOAD_POLICY = (
    ("Content-Security-Policy", "default-src 'none'; sandbox; frame-ancestors 'none'"),
    ("Content-Disposition", "attachment"),
    *_COMMON,
)
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".svg": "image/svg+xml"}


class _File(NamedTuple):
    """A packaged file; ``tag`` is its entity tag."""

    body: bytes
    media_type: str
    tag: str


@cache
def _files(folder: str) -> dict[str, _File]:
    """Return the packaged files of a folder by name. All of them are read at once, so that a request for
    another name keeps nothing.
    """
    items = files(__package__).joinpath(folder).iterdir()
    return {item.name: _read(item.name, item.read_bytes()) for item in items if item.is_file()}


def _read(name: str, body: bytes) -> _File:
    suffix = name[name.rfind(".") :]
    media_type = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    if media_type.startswith("text/"):
        media_type += "; charset=utf-8"
    return _File(body, media_type, f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"')


def _respond(folder: str, name: str, request: Request) -> Response:
    if (file := _files(folder).get(name)) is None:
        raise NotFound(f"there is nothing at {request.path}")
    headers = (("ETag", file.tag), ("Cache-Control", "no-cache"), *_POLICY)
    if matches_tag(request.headers.get("if-none-match", ""), file.tag):
        return Response(304, headers=headers)
    return Response(200, file.body, (("Content-Type", file.media_type), *headers))


class PageHandlers:
    """The handlers of pages and files; ``demo`` has what demonstration jobs have made."""

    def __init__(self, tracker: Tracker, demo: DemoRunner) -> None:
        self._tracker = tracker
        self._demo = demo

    def handlers(self) -> dict[str, Handler]:
        """The handlers by the names that the table of routes has for them."""
        return {
            "index": self.index,
            "dashboard": self.dashboard,
            "docs": self.docs,
            "static": self.static,
            "artifact": self.artifact,
        }

    async def index(self, request: Request, _match: Match) -> Response:
        return _respond("templates", "index.html", request)

    async def dashboard(self, request: Request, _match: Match) -> Response:
        return _respond("templates", "dashboard.html", request)

    async def docs(self, request: Request, _match: Match) -> Response:
        return _respond("templates", "docs.html", request)

    async def static(self, request: Request, match: Match) -> Response:
        return _respond("static", match.params["name"], request)

    async def artifact(self, request: Request, match: Match) -> Response:
        file = await self._demo.find_file(self._tracker, match.params["id"], match.params["name"])
        if file is None:
            raise NotFound(f"there is nothing at {request.path}")
        media_type, content = file
        return Response(200, content, (("Content-Type", media_type), *_DOWNLOAD_POLICY))
