"""Rules fire as intended, alerts reach the controller, the dashboard queries existing metrics."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import aiohttp
import pytest
import yaml

from tests.fleet.deploy.rendering import CHART, Object, kustomized
from tests.fleet.doubles.replica import FakeReplica
from tests.fleet.doubles.services import alertmanager, prometheus, require


def _rules(tmp_path: Path) -> tuple[Path, Object]:
    (rule,) = (o for o in kustomized("kustomize/base") if o["kind"] == "PrometheusRule")
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": rule["spec"]["groups"]}))
    return path, rule["spec"]


def test_rules_pass_promtool(tmp_path: Path) -> None:
    path, _ = _rules(tmp_path)
    labels = 'namespace="farthing",model_name="deepseek-v3"'
    queue = "farthing:request_queue_time_seconds"

    def series(name: str, values: str, more: str = labels) -> Object:
        return {"series": f"{name}{{{more}}}", "values": values}

    def alerts(name: str, at: str, *found: Object) -> Object:
        return {"eval_time": at, "alertname": name, "exp_alerts": list(found)}

    latency = {
        "exp_labels": {"severity": "warning", "namespace": "farthing", "model_name": "deepseek-v3"},
        "exp_annotations": {
            "summary": "Requests of deepseek-v3 wait 300ms on average.",
            "description": "Above 200 ms for 30 s. The policy requests 1.5 times the current replicas.",
        },
    }
    tests = [
        {  # 10 requests and 1 s of waiting in 5 s: 100 ms; from the second minute on 3 s: 300 ms
            "interval": "5s",
            "input_series": [
                series(f"{queue}_sum", "0+1x24 27+3x36"),
                series(f"{queue}_count", "0+10x60"),
                series("farthing:fleet_decision_age_seconds", "1x60", "x=''"),
            ],
            "alert_rule_test": [
                alerts("FarthingLatencyAbove200ms", "110s"),
                alerts("FarthingLatencyAbove200ms", "280s", latency),
                alerts("FarthingFleetSilent", "280s"),
            ],
            "promql_expr_test": [
                {
                    "expr": "farthing:queue_time_seconds:mean1m",
                    "eval_time": "110s",
                    "exp_samples": [
                        {"labels": f"farthing:queue_time_seconds:mean1m{{{labels}}}", "value": 0.1},
                    ],
                }
            ],
        },
        {  # no traffic: no division by zero, no alert
            "interval": "5s",
            "input_series": [series(f"{queue}_sum", "5x60"), series(f"{queue}_count", "9x60")],
            "alert_rule_test": [alerts("FarthingLatencyAbove200ms", "280s")],
        },
        {  # the controller is gone, then its decisions are outdated
            "interval": "30s",
            "input_series": [series("farthing:fleet_desired_replicas", "3x10", "job='f'")],
            "alert_rule_test": [
                alerts(
                    "FarthingFleetSilent",
                    "4m",
                    {
                        "exp_labels": {"severity": "critical"},
                        "exp_annotations": {
                            "summary": "The fleet controller has made no decision for two minutes.",
                            "description": "The number of replicas stays unchanged. "
                            "Check the controller's log and /health on port 9400.",
                        },
                    },
                )
            ],
        },
        {
            "interval": "1m",
            "input_series": [
                series("farthing:fleet_alarm", "1x10", "kind='signals'"),
                series("farthing:fleet_desired_replicas", "4x40", "job='f'"),
                series("farthing:fleet_realtime_replicas", "6x40", "job='f'"),
                series("farthing:ready", "1x40", "pod='a'"),
            ],
            "alert_rule_test": [
                alerts(
                    "FarthingSignalsMissing",
                    "5m",
                    {
                        "exp_labels": {"severity": "warning", "kind": "signals"},
                        "exp_annotations": {
                            "summary": "The fleet controller is missing some of its signals.",
                            "description": "It does not scale down until they return. "
                            "`farthing fleet explain` lists the missing signals.",
                        },
                    },
                ),
                alerts("FarthingAtMaximum", "9m"),
                alerts("FarthingReplicasNotReady", "29m"),
                alerts(
                    "FarthingReplicasNotReady",
                    "31m",
                    {
                        "exp_labels": {"severity": "warning"},
                        "exp_annotations": {
                            "summary": "3 requested replicas are not ready after 30 minutes.",
                            "description": "They are waiting for nodes or failing to load. "
                            "Check the pods' events.",
                        },
                    },
                ),
            ],
        },
    ]
    (tmp_path / "tests.yaml").write_text(
        yaml.safe_dump({"rule_files": [str(path)], "evaluation_interval": "5s", "tests": tests})
    )
    promtool = require("promtool")
    checked = subprocess.run([promtool, "check", "rules", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    done = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / "tests.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.anyio
@pytest.mark.slow
async def test_alert_reaches_alertmanager_and_the_controller(tmp_path: Path) -> None:
    """The real chain: a replica's /metrics, Prometheus with the packaged rule, Alertmanager."""
    _, spec = _rules(tmp_path)
    for group in spec["groups"]:
        group["interval"] = "250ms"
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "1s"  # 30 s in production

    async with FakeReplica(dialect="farthing", name="a") as replica:
        manager = alertmanager(tmp_path)
        address = await asyncio.to_thread(manager.__enter__)
        server = prometheus(tmp_path, [f"127.0.0.1:{replica.port}"], rules=spec, alertmanager=address)
        url, _ = await asyncio.to_thread(server.__enter__)
        try:
            async with aiohttp.ClientSession(f"http://{address}") as session:
                names: set[str] = set()
                while "FarthingLatencyAbove200ms" not in names:
                    replica.sums["queue"] = [replica.sums["queue"][0] + 1.0, replica.sums["queue"][1] + 2]
                    await asyncio.sleep(0.25)
                    async with session.get("/api/v2/alerts") as answer:
                        names = {alert["labels"]["alertname"] for alert in await answer.json()}
                async with session.get(f"{url}/api/v1/alerts") as answer:
                    alerts = (await answer.json())["data"]["alerts"]
            firing = {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}
            assert "FarthingLatencyAbove200ms" in firing
        finally:
            await asyncio.to_thread(server.__exit__, None, None, None)
            await asyncio.to_thread(manager.__exit__, None, None, None)


def test_dashboard_queries_are_valid_and_use_existing_metrics(tmp_path: Path) -> None:
    dashboard = json.loads((CHART / "files" / "dashboard.json").read_text())
    questions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(questions) > 10
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
    rules = [
        {"record": f"check:{index}", "expr": question.replace("$namespace", "x")}
        for index, question in enumerate(questions)
    ]
    path = tmp_path / "dashboard-rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([require("promtool"), "check", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
