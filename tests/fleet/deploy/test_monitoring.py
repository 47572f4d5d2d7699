"""Rules fire as intended, alerts reach the controller, the dashboard queries existing metrics."""

from __future__ import annotations

import asyncio
import json
import shutil
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
    tests = shutil.copy(Path(__file__).with_name("rules_test.yaml"), tmp_path)
    promtool = require("promtool")
    for arguments in (("check", "rules", path), ("test", "rules", tests)):
        done = subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True)
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
