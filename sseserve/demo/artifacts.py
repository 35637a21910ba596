"""The files that demonstration jobs have made, in memory."""

from __future__ import annotations

import msgspec

__all__ = ["ArtifactStore", "File"]


class File(msgspec.Struct, frozen=True):
    """Something that the job made. ``type`` is a media type."""

    name: str
    type: str
    content: bytes


class ArtifactStore:
    """The files of the last ``jobs`` jobs, in memory; older ones can be made again."""

    def __init__(self, jobs: int = 20) -> None:
        self._jobs = jobs
        self._files: dict[str, dict[str, File]] = {}

    def put(self, session_id: str, files: tuple[File, ...]) -> None:
        """Keep a job's files; the oldest job's make room for them."""
        self._files.pop(session_id, None)
        self._files[session_id] = {file.name: file for file in files}
        while len(self._files) > self._jobs:
            del self._files[next(iter(self._files))]

    def get(self, session_id: str, name: str) -> tuple[str, bytes] | None:
        """Return the media type and the content of a file, None if there is no such file any more."""
        file = self._files.get(session_id, {}).get(name)
        return None if file is None else (file.type, file.content)
