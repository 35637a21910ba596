"""``examples/monitoring``: what Prometheus and promtool say of the rules, and of the dashboard's queries.

Grafana itself is not run.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import trio
from harness import ServerHarness
from ports import free_port
from processes import Program, run_server, wait_until
from programs import require_program
from test_metrics import read

MONITORING = Path(__file__).resolve().parent.parent / "examples" / "monitoring"
ALERTS = MONITORING / "alerts.yml"
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
LABELS = 'job="sseserve",instance="a"'
HISTOGRAM = ('le="0.1"', 'le="0.5"', 'le="1.0"', 'le="2.5"', 'le="+Inf"')


def histogram(name: str, slow: int) -> dict[str, str]:
    """A histogram of which every minute 100 observations are quick, and ``slow`` take two seconds."""
    return {
        f"{name}_bucket{{{LABELS},{bound}}}": f"0+{100 + slow * (number > 2)}x60"
        for number, bound in enumerate(HISTOGRAM)
    }


def slow_and_quick(name: str) -> tuple[dict[str, str], dict[str, str]]:
    return histogram(name, 20), histogram(name, 0)


def series(name: str, values: str, *labels: str) -> dict[str, str]:
    return {f"{name}{{{','.join((LABELS, *labels))}}}": values}


# What each alert is for, and the same that is no reason for it yet. Values are one minute apart.
CASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "SseserveDown": (series("up", "0x60"), series("up", "1x60")),
    "SseserveEngineDown": (series("sseserve_engine_up", "0x60"), series("sseserve_engine_up", "1x60")),
    "SseserveAppendFailures": (
        series("sseserve_append_failures_total", "0x30 0+1x30"),
        series("sseserve_append_failures_total", "7x60"),
    ),
    "SseserveServerErrors": (
        series("sseserve_responses_total", "0+90x60", 'status="200"')
        | series("sseserve_responses_total", "0+10x60", 'status="503"'),
        series("sseserve_responses_total", "0+90x60", 'status="404"')
        | series("sseserve_responses_total", "0+1x60", 'status="500"'),
    ),
    "SseserveSlowDelivery": slow_and_quick("sseserve_delivery_seconds"),
    "SseserveSlowAppends": slow_and_quick("sseserve_append_seconds"),
    "SseserveRedisLag": slow_and_quick("sseserve_redis_lag_seconds"),
    "SseserveEventLoopBlocked": slow_and_quick("sseserve_event_loop_lag_seconds"),
    "SseserveGaps": (
        series("sseserve_resumes_total", "0x50 0+1x10", 'status="gap"'),
        series("sseserve_resumes_total", "0+9x60", 'status="ok"'),
    ),
    "SseserveResets": (
        series("sseserve_resumes_total", "0+5x60", 'status="reset"')
        | series("sseserve_reconnects_total", "0+9x60"),
        series("sseserve_resumes_total", "0+5x60", 'status="reset"')
        | series("sseserve_reconnects_total", "0+90x60"),
    ),
    "SseserveSlowClients": (
        series("sseserve_streams_cut_total", "0+600x60")
        | series("sseserve_streams", "100x60", 'transport="sse"', 'dialect="jobs"'),
        series("sseserve_streams_cut_total", "0+6x60")
        | series("sseserve_streams", "100x60", 'transport="sse"', 'dialect="jobs"'),
    ),
    "SseserveReconnections": (
        series("sseserve_streams_opened_total", "0+600x60", 'transport="sse"', 'dialect="jobs"')
        | series("sseserve_streams", "100x60", 'transport="sse"', 'dialect="jobs"'),
        series("sseserve_streams_opened_total", "0+60x60", 'transport="sse"', 'dialect="jobs"')
        | series("sseserve_streams", "100x60", 'transport="sse"', 'dialect="jobs"'),
    ),
    "SseserveRefusals": (
        series("sseserve_refused_total", "0+120x60", 'limit="publish_rate"'),
        series("sseserve_refused_total", "0+12x60", 'limit="publish_rate"'),
    ),
    "SseserveConnectionsNearLimit": (
        series("sseserve_connections", "900x60") | series("process_max_fds", "1024x60"),
        series("sseserve_connections", "800x60") | series("process_max_fds", "1024x60"),
    ),
    "SseserveFailedSessions": (
        series("sseserve_sessions_finished_total", "0+1x60", 'state="failed"')
        | series("sseserve_sessions_finished_total", "0+1x60", 'state="lost"')
        | series("sseserve_sessions_finished_total", "0+1x60", 'state="succeeded"'),
        series("sseserve_sessions_finished_total", "0+1x60", 'state="failed"')
        | series("sseserve_sessions_finished_total", "0+9x60", 'state="succeeded"'),
    ),
    "SseserveLostWorkers": (
        series("sseserve_leases_lost_total", "0x50 1x10"),
        series("sseserve_leases_lost_total", "1x60"),
    ),
    "SseserveJobsWaiting": (
        series("sseserve_jobs_waiting", "3x60"),
        series("sseserve_jobs_waiting", "3x50 0x10"),
    ),
    "SseserveBackgroundFailures": (
        series("sseserve_background_failures_total", "0x50 1x10", 'service="leases"'),
        series("sseserve_background_failures_total", "1x60", 'service="leases"'),
    ),
}


def run_promtool(*arguments: str | Path) -> None:
    promtool = require_program("promtool")
    ran = subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def queries() -> list[str]:
    """Return the queries of the dashboard, with values for its variables."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return [q.replace("$__rate_interval", "1m").replace("$instance", ".*") for q in found]


def test_files_are_valid(tmp_path):
    """To promtool: the configuration, the rules, and each query of the dashboard as a rule."""
    run_promtool("check", "config", MONITORING / "prometheus.yml")
    rules = [{"record": f"panel:{n}", "expr": query} for n, query in enumerate(queries())]
    path = tmp_path / "queries.yml"
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    run_promtool("check", "rules", path)


def test_each_alert_fires(tmp_path):
    """When what it is for lasts, and not before."""
    names = re.findall(r"alert: (\w+)", ALERTS.read_text())
    assert sorted(names) == sorted(CASES)
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in case.items()],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})',
                    "eval_time": "59m",
                    "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                }
            ],
        }
        for alert, cases in CASES.items()
        for fires, case in zip((True, False), cases, strict=True)
    ]
    path = tmp_path / "test.yml"
    path.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests}))
    run_promtool("test", "rules", path)


async def test_all_metrics_exist_and_are_shown(autojump_clock, nursery):
    """What the rules and the dashboard ask for is what the server has, and the dashboard shows all of it."""
    harness = ServerHarness(nursery)
    await harness.post("/api/sessions/s/progress", {"progress": 1})
    stream = await harness.stream("/api/sessions/s/status/stream")
    await stream.disconnect()
    await harness.stream("/api/sessions/s/status/stream")
    await trio.sleep(1)
    exported = {re.sub(r"_(bucket|count|sum)$", "", name.partition("{")[0]) for name in await read(harness)}
    exported.add("sseserve_channel_messages_total")  # which is only there with Redis
    asked = {name for query in queries() for name in re.findall(r"(?:sseserve|process)_\w+", query)}
    in_rules = set(re.findall(r"(?:sseserve|process)_\w+", ALERTS.read_text()))
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked} == exported
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in in_rules} <= exported


def test_dashboard_can_be_imported():
    """Each panel has an id and a place of its own, and asks the data source that is chosen."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        taken = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        cells |= taken
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "instance"]


def test_prometheus_scrapes_a_server(tmp_path):
    """A real Prometheus takes the metrics without an error, and can evaluate the rules."""
    prometheus, port = require_program("prometheus"), free_port()
    with run_server() as url:
        httpx.post(f"{url}/api/sessions/s/progress", json={"progress": 1}).raise_for_status()
        config = (MONITORING / "prometheus.yml").read_text().replace("15s", "100ms")
        path = tmp_path / "prometheus.yml"
        path.write_text(
            config.replace("127.0.0.1:8000", url.removeprefix("http://")).replace("alerts.yml", str(ALERTS))
        )
        data = f"--storage.tsdb.path={tmp_path / 'data'}"
        listen = f"--web.listen-address=127.0.0.1:{port}"
        with Program(prometheus, f"--config.file={path}", data, listen):

            def ask(query: str) -> list[dict[str, Any]]:
                try:
                    answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query})
                except httpx.TransportError:
                    return []  # it is starting
                if answer.status_code == 503:
                    return []  # so it is
                return answer.json().get("data", {}).get("result", [])

            def health_of_rules() -> set[str]:
                groups = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
                return {rule["health"] for rule in groups[0]["rules"]}

            (events,) = wait_until(lambda: ask("sseserve_events_total"), "a scrape")
            assert events["value"][1] == "1"
            assert ask('up{job="sseserve"}')[0]["value"][1] == "1"
            wait_until(lambda: health_of_rules() == {"ok"}, "the rules")
