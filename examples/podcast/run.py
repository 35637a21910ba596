"""A podcast: services elsewhere work on a job, watched with curl and in a page."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import httpx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import curl, example, options, post
from worker import work_for_ever


def main() -> None:
    with example(HERE, options(__doc__).parse_args()) as here:
        given = (here.server, here.files, here.args.pace)
        threading.Thread(target=work_for_ever, args=given, daemon=True).start()
        with httpx.Client(base_url=here.server) as client:
            asked = {"topics": ["technology"], "sources": ["techcrunch", "ars-technica"]}
            made = post(client, "/api/v1/jobs", asked)
        curl("-N", "-H", "Accept: text/event-stream", here.server + made["sseEndpoint"])
        curl(f"{here.server}/health")
        here.linger()


if __name__ == "__main__":
    main()
