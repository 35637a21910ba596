"""The therapy service's Python client: ``python client.py SERVER SESSION TOKEN``."""

# Unchanged from the service.  # ruff: noqa: I001
# fmt: off
import requests
import json
import sys


def stream_session_progress(server: str, session_id: str, token: str):
    """Stream session progress using SSE"""
    url = f"{server}/api/sessions/{session_id}/status/stream"
    headers = {"Authorization": f"Bearer {token}"}

    with requests.get(url, headers=headers, stream=True) as response:
        response.raise_for_status()

        for line in response.iter_lines():
            if not line:
                continue

            line = line.decode('utf-8')

            if line.startswith('event:'):
                event_type = line.split(':', 1)[1].strip()
            elif line.startswith('data:'):
                data_str = line.split(':', 1)[1].strip()
                data = json.loads(data_str)

                print(f"[{event_type}] Progress: {data['progress']}% - {data['message']}")

                if event_type in ['complete', 'error']:
                    break


# Usage
if __name__ == "__main__":
    stream_session_progress(*sys.argv[1:4])
