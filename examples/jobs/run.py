"""Video jobs: a studio in the server makes films, watched with curl and in a page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import curl, example, options


def main() -> None:
    args = options(__doc__).parse_args()
    studio = (str(HERE / "studio.py"),)
    with example(HERE, args, command=studio, STUDIO_PACE=str(args.pace)) as here:
        brief = json.dumps({"brief": "A boat leaves. It is a bright morning. Nobody waves."})
        made = curl(f"{here.server}/api/jobs", "-H", "X-Correlation-ID: from-the-terminal", "-d", brief)
        job = f"{here.server}/api/jobs/{json.loads(made)['jobId']}"
        curl("-N", f"{job}/events?replay=1")
        curl(job)
        cancelled = json.loads(curl("-X", "POST", f"{here.server}/api/quick/demo"))["jobId"]
        curl("-X", "POST", f"{here.server}/api/jobs/{cancelled}/cancel")
        curl("-N", f"{here.server}/api/jobs/{cancelled}/events")
        here.linger()


if __name__ == "__main__":
    main()
