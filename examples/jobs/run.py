"""Watch video jobs with curl and in a page. They run inside the server, or in workers of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from common import Example, curl, make_parser, run_example


@contextmanager
def run_worker(example: Example, name: str) -> Iterator[None]:
    """Run a worker for the duration of the block."""
    options = ["--name", name, "--pace", str(example.args.pace)]
    process = subprocess.Popen([sys.executable, str(FOLDER / "worker.py"), example.server, *options])
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--workers", type=int, default=0, help="worker processes; 0: jobs run in the server")
    args = parser.parse_args()
    if args.workers:
        options = {"SSESERVE_JOB_WORKERS": "remote"}
    else:
        options = {"command": (str(FOLDER / "video_server.py"),), "VIDEO_PACE": str(args.pace)}
    with run_example(FOLDER, args, **options) as example, ExitStack() as stack:
        for number in range(1, args.workers + 1):
            stack.enter_context(run_worker(example, f"worker-{number}"))
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
