"""Watch a podcast job, on which other services work, with curl and in a page."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from common import curl, make_parser, post, run_example
from worker import process_jobs


def main() -> None:
    with run_example(FOLDER, make_parser(__doc__).parse_args()) as example:
        example.start_worker(process_jobs)
        with httpx.Client(base_url=example.server) as client:
            request = {"topics": ["technology"], "sources": ["techcrunch", "ars-technica"]}
            job = post(client, "/api/v1/jobs", request)
        curl("-N", "-H", "Accept: text/event-stream", example.server + job["sseEndpoint"])
        curl(f"{example.server}/health")
        example.serve_page()


if __name__ == "__main__":
    main()
