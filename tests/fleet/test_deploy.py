"""deploy/: everything renders, is valid against the published schemas, hangs together, and its rules
fire as they should.

Kustomize is kubectl's, Helm is Helm's own library, Kubernetes' schemas are those of its OpenAPI, custom
resources are checked against models made from their CRDs, and Prometheus' rules are tested by promtool.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import kubernetes_validate
import pytest
import yaml

from farthing.fleet.actuators.base import METRICS
from farthing.fleet.config import FleetConfig, load
from farthing.fleet.signals import PrometheusSource
from tests.fleet.doubles.replica import FakeReplica
from tests.fleet.doubles.services import alertmanager, prometheus, require

ROOT = Path(__file__).parents[2]
KUSTOMIZE = ROOT / "deploy" / "kustomize"
CHART = ROOT / "deploy" / "helm" / "farthing"
KUBERNETES = "1.32"
SETS = ["base", "overlays/scale", "overlays/keda", "overlays/hpa-signals", "overlays/multi-node"]
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "cert-manager": {"tls": {"certManager": True}},
    "scale": {"fleet": {"mode": "scale"}, "replicas": {"kind": "StatefulSet"}},
    "keda": {"fleet": {"mode": "keda"}},
    "bare": {
        "model": {"claim": ""},
        "apiKeysSecret": "",
        "monitoring": {"enabled": False},
        "networkPolicy": {"enabled": False},
    },
}

Object = dict[str, Any]


def kustomized(name: str) -> list[Object]:
    command = [require("kubectl"), "kustomize", str(KUSTOMIZE / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def charted(values: dict[str, Any], namespace: str = "prod") -> list[Object]:
    helm_python = pytest.importorskip("helm_python")
    with helm_python.Chart.load(str(CHART)) as chart:
        merged = chart.merge_values(values)
        rendered = chart.render(merged, name="farthing", namespace=namespace)
    files = (text for name, text in sorted(rendered.items()) if name.endswith(".yaml"))
    return [document for text in files for document in yaml.safe_load_all(text) if document]


@pytest.fixture(scope="module", params=[*SETS, *(f"helm:{name}" for name in VALUES)])
def objects(request: pytest.FixtureRequest) -> list[Object]:
    """Every object of one rendering."""
    kind, _, name = request.param.partition(":")
    return charted(VALUES[name]) if kind == "helm" else kustomized(request.param)


# ---- schemas ----


def _custom_model(api_version: str, kind: str) -> Any:
    """A model of a custom resource, made from its CRD by its package."""
    if api_version == "monitoring.coreos.com/v1":
        import cloudcoil.models.prometheus_operator.v1 as models
    elif api_version == "keda.sh/v1alpha1":
        import cloudcoil.models.keda.v1alpha1 as models
    elif api_version == "cert-manager.io/v1":
        import cloudcoil.models.cert_manager.v1 as models
    else:
        raise AssertionError(f"no schema for {api_version} {kind}")
    return getattr(models, kind)


def _same(given: Any, understood: Any, where: str) -> None:
    """Every field given was understood by the model: an unknown one would be dropped silently."""
    if isinstance(given, dict):
        assert isinstance(understood, dict), where
        for key, value in given.items():
            assert key in understood, f"{where}.{key} is not a field"
            _same(value, understood[key], f"{where}.{key}")
    elif isinstance(given, list):
        for index, (one, other) in enumerate(zip(given, understood, strict=True)):
            _same(one, other, f"{where}[{index}]")


def check_schema(item: Object) -> None:
    group = item["apiVersion"]
    if group == "leaderworkerset.x-k8s.io/v1":
        assert set(item["spec"]) <= {"replicas", "rolloutStrategy", "startupPolicy", "leaderWorkerTemplate"}
        template = item["spec"]["leaderWorkerTemplate"]
        assert set(template) <= {"leaderTemplate", "workerTemplate", "size", "restartPolicy"}
        for pod in (template["leaderTemplate"], template["workerTemplate"]):
            body = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": pod}
            kubernetes_validate.validate(body, KUBERNETES, strict=True)
    elif group.split("/")[0] in ("monitoring.coreos.com", "keda.sh", "cert-manager.io"):
        model = _custom_model(group, item["kind"]).model_validate(item)
        _same(item, model.model_dump(mode="json", by_alias=True, exclude_unset=True), item["kind"])
    else:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_every_object_meets_its_schema(objects: list[Object]) -> None:
    for item in objects:
        check_schema(item)


def test_schema_check_refuses_what_is_wrong() -> None:
    service = next(o for o in kustomized("base") if o["kind"] == "Service")
    service["spec"]["prots"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schema(service)
    rule = next(o for o in kustomized("base") if o["kind"] == "PrometheusRule")
    rule["spec"]["groups"][0]["rulez"] = []
    with pytest.raises(AssertionError, match="rulez is not a field"):
        check_schema(rule)


# ---- what must hold across objects ----


def _pods(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """(owner, labels, pod spec) of every pod template."""
    for item in objects:
        if item["kind"] in ("Deployment", "StatefulSet"):
            template = item["spec"]["template"]
            yield item["metadata"]["name"], template["metadata"]["labels"], template["spec"]
        elif item["kind"] == "LeaderWorkerSet":
            for role in ("leaderTemplate", "workerTemplate"):
                template = item["spec"]["leaderWorkerTemplate"][role]
                yield item["metadata"]["name"], template["metadata"]["labels"], template["spec"]


def test_pods_are_restricted(objects: list[Object]) -> None:
    for owner, _, pod in _pods(objects):
        assert pod["securityContext"]["runAsNonRoot"] is True, owner
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, owner
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True, owner
            assert security["allowPrivilegeEscalation"] is False, owner
            assert security["capabilities"] == {"drop": ["ALL"]}, owner
            assert container["resources"]["limits"]["memory"], owner
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}, owner


def test_probes_and_services_name_ports_that_exist(objects: list[Object]) -> None:
    for owner, _, pod in _pods(objects):
        for container in pod["containers"]:
            ports = {port["name"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe in container:
                    assert container[probe]["httpGet"]["port"] in ports, (owner, probe)
    for service in (o for o in objects if o["kind"] == "Service"):
        selector = service["spec"]["selector"].items()
        pods = [pod for _, labels, pod in _pods(objects) if selector <= labels.items()]
        assert pods, f"{service['metadata']['name']} selects nothing"
        ports = {port["name"] for pod in pods for c in pod["containers"] for port in c.get("ports", [])}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_monitors_find_services_and_their_ports(objects: list[Object]) -> None:
    for monitor in (o for o in objects if o["kind"] == "ServiceMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"].items()
        services = [
            o for o in objects if o["kind"] == "Service" and selector <= o["metadata"]["labels"].items()
        ]
        assert services, monitor["metadata"]["name"]
        ports = {port["name"] for service in services for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports


def _configuration(objects: list[Object], tmp_path: Path) -> FleetConfig:
    (text,) = (
        o["data"]["fleet.yaml"] for o in objects if o["kind"] == "ConfigMap" and "fleet.yaml" in o["data"]
    )
    (tmp_path / "fleet.yaml").write_text(text)
    return load(tmp_path / "fleet.yaml")


def test_controller_can_read_its_configuration_and_one_thing_scales(
    objects: list[Object], tmp_path: Path
) -> None:
    config = _configuration(objects, tmp_path)
    assert config.kubernetes is not None and config.kubernetes.target is not None
    kind, _, name = config.kubernetes.target.partition("/")
    assert any(o["kind"].lower() == kind and o["metadata"]["name"] == name for o in objects)
    by_hpa = [o for o in objects if o["kind"] == "HorizontalPodAutoscaler"]
    by_keda = [o for o in objects if o["kind"] == "ScaledObject"]
    assert len(by_hpa) + len(by_keda) + config.kubernetes.patch == 1
    assert (
        bool(by_hpa)
        == (config.external_metrics is not None)
        == any(o["kind"] == "APIService" for o in objects)
    )
    assert bool(by_keda) == (config.keda is not None)
    for hpa in by_hpa:
        assert config.external_metrics is not None
        assert (hpa["spec"]["minReplicas"], hpa["spec"]["maxReplicas"]) == (
            config.policy.min_replicas,
            config.policy.max_replicas,
        )
        for metric in hpa["spec"]["metrics"]:
            assert metric["external"]["metric"]["name"] in METRICS
            assert metric["external"]["metric"]["selector"]["matchLabels"] == config.external_metrics.labels


def test_rights_are_those_the_controller_uses(objects: list[Object], tmp_path: Path) -> None:
    config = _configuration(objects, tmp_path)
    roles = [o for o in objects if o["kind"] == "Role"]
    rules = [(r["apiGroups"], r["resources"], r["verbs"]) for role in roles for r in role["rules"]]
    assert (["apps"], ["deployments/scale", "statefulsets/scale"], ["get", "patch"]) in rules
    assert (["coordination.k8s.io"], ["leases"], ["get", "create", "update"]) in rules
    assert not any("*" in part for rule in rules for part in rule)
    bound = {o["roleRef"]["name"] for o in objects if o["kind"] in ("RoleBinding", "ClusterRoleBinding")}
    if config.external_metrics is not None:
        assert {"system:auth-delegator", "extension-apiserver-authentication-reader"} <= bound


def test_service_of_the_api_serves_what_the_apiservice_asks(objects: list[Object]) -> None:
    for api in (o for o in objects if o["kind"] == "APIService"):
        asked = api["spec"]["service"]
        service = next(
            o for o in objects if o["kind"] == "Service" and o["metadata"]["name"] == asked["name"]
        )
        assert service["metadata"]["namespace"] == asked["namespace"]
        assert asked["port"] in [port["port"] for port in service["spec"]["ports"]]
        injected = "cert-manager.io/inject-ca-from" in api["metadata"].get("annotations", {})
        assert injected != ("caBundle" in api["spec"])


# ---- Helm ----


def test_chart_lints_and_refuses_wrong_values() -> None:
    helm_python = pytest.importorskip("helm_python")
    report = helm_python.lint(str(CHART), strict=True)
    assert report["errors"] == []
    assert all(message["severity"] < 2 for message in report["messages"])
    for wrong in (
        {"fleet": {"mode": "magic"}},
        {"fleet": {"policy": {"capacity": 0}}},
        {"replicas": {"kind": "Pod"}},
    ):
        with pytest.raises(helm_python.HelmError), helm_python.Chart.load(str(CHART)) as chart:
            chart.render(chart.merge_values(wrong), name="x", namespace="x")


def test_chart_and_base_give_the_same_kinds() -> None:
    base = {o["kind"] for o in kustomized("base")}
    chart = {o["kind"] for o in charted(VALUES["cert-manager"])}
    assert chart == base - {"Namespace"}  # Helm is given its namespace


# ---- rules, alerts and the dashboard ----


def _rules(tmp_path: Path) -> tuple[Path, Object]:
    (rule,) = (o for o in kustomized("base") if o["kind"] == "PrometheusRule")
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": rule["spec"]["groups"]}))
    return path, rule["spec"]


def test_rules_fire_as_promtool_says(tmp_path: Path) -> None:
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
            "description": "Above 200 ms for 30 s. The policy asks for 1.5 times the current replicas.",
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
        {  # nothing is served: no division by zero, no alert
            "interval": "5s",
            "input_series": [series(f"{queue}_sum", "5x60"), series(f"{queue}_count", "9x60")],
            "alert_rule_test": [alerts("FarthingLatencyAbove200ms", "280s")],
        },
        {  # the controller is gone, then its decisions are old
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
                            "description": "The number of replicas is held. "
                            "Look at its log and at /health on port 9400.",
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
                            "summary": "The fleet controller decides without some of its signals.",
                            "description": "It never scales down meanwhile. "
                            "`farthing fleet explain` names what is missing.",
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
                            "summary": "3 replicas that were asked for are not ready after half an hour.",
                            "description": "They wait for nodes or do not load. Look at the pods' events.",
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


@pytest.mark.slow
def test_alert_reaches_alertmanager_and_the_controller(tmp_path: Path) -> None:
    """The real chain: a replica's /metrics, Prometheus with the shipped rule, Alertmanager."""
    _, spec = _rules(tmp_path)
    for group in spec["groups"]:
        group["interval"] = "250ms"
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "1s"  # 30 s in production

    async def test() -> None:
        async with FakeReplica(dialect="farthing", name="a") as replica:
            manager = alertmanager(tmp_path)
            address = await asyncio.to_thread(manager.__enter__)
            server = prometheus(tmp_path, [f"127.0.0.1:{replica.port}"], rules=spec, alertmanager=address)
            url, _ = await asyncio.to_thread(server.__enter__)
            source = PrometheusSource(url)
            try:
                async with aiohttp.ClientSession(f"http://{address}") as session:
                    names: set[str] = set()
                    while "FarthingLatencyAbove200ms" not in names:
                        replica.sums["queue"] = [replica.sums["queue"][0] + 1.0, replica.sums["queue"][1] + 2]
                        await asyncio.sleep(0.25)
                        async with session.get("/api/v2/alerts") as answer:
                            names = {alert["labels"]["alertname"] for alert in await answer.json()}
                firing = {a["labels"]["alertname"] for a in await source.alerts() if a["state"] == "firing"}
                assert "FarthingLatencyAbove200ms" in firing
            finally:
                await source.close()
                await asyncio.to_thread(server.__exit__, None, None, None)
                await asyncio.to_thread(manager.__exit__, None, None, None)

    asyncio.run(asyncio.wait_for(test(), 90))


def test_dashboard_asks_valid_questions_of_metrics_that_exist(tmp_path: Path) -> None:
    dashboard = json.loads((KUSTOMIZE / "base" / "dashboard.json").read_text())
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


# ---- the image ----


def test_image_is_non_root_and_says_how_to_ask_its_health() -> None:
    lines = [line.strip() for line in (ROOT / "deploy" / "Dockerfile").read_text().splitlines()]
    stages = [i for i, line in enumerate(lines) if line.startswith("FROM ")]
    final = lines[stages[-1] :]
    users = [line.split()[1] for line in final if line.startswith("USER ")]
    assert users and all(int(user.split(":")[0]) >= 10000 for user in users)
    assert any(line.startswith("HEALTHCHECK ") for line in final)
    assert 'ENTRYPOINT ["farthing"]' in final
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    for name in (name for names in copied for name in names if "*" not in name and name != "README.md"):
        assert (ROOT / name).exists(), name
