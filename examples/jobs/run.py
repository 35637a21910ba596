"""Watch video jobs, which run inside the server, with curl and in a page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from common import curl, make_parser, run_example


def main() -> None:
    args = make_parser(__doc__).parse_args()
    command = (str(FOLDER / "video_server.py"),)
    with run_example(FOLDER, args, command=command, VIDEO_PACE=str(args.pace)) as example:
        jobs = f"{example.server}/api/jobs"
        brief = json.dumps({"brief": "A boat leaves. It is a bright morning. Nobody waves."})
        response = curl(jobs, "-H", "X-Correlation-ID: from-the-terminal", "-d", brief)
        job = f"{jobs}/{json.loads(response)['jobId']}"
        curl("-N", f"{job}/events?replay=1")
        curl(job)
        response = curl("-X", "POST", f"{example.server}/api/quick/demo")
        demo_job = f"{jobs}/{json.loads(response)['jobId']}"
        curl("-X", "POST", f"{demo_job}/cancel")
        curl("-N", f"{demo_job}/events")
        example.serve_page()


if __name__ == "__main__":
    main()
