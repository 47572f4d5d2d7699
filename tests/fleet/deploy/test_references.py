"""References between objects: selectors, ports, permissions, the controller's configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from farthing_fleet.config import FleetConfig, load
from tests.fleet.deploy.rendering import CHART, ROOT, Object, charted, kustomized, pods


def test_pods_are_restricted(objects: list[Object]) -> None:
    for owner, _, pod in pods(objects):
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


def test_probes_and_services_use_existing_ports(objects: list[Object]) -> None:
    for owner, _, pod in pods(objects):
        for container in pod["containers"]:
            ports = {port["name"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe in container:
                    assert container[probe]["httpGet"]["port"] in ports, (owner, probe)
    for service in (o for o in objects if o["kind"] == "Service"):
        selector = service["spec"]["selector"].items()
        chosen = [pod for _, labels, pod in pods(objects) if selector <= labels.items()]
        assert chosen, f"{service['metadata']['name']} selects nothing"
        ports = {port["name"] for pod in chosen for c in pod["containers"] for port in c.get("ports", [])}
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


def test_controller_reads_its_configuration_and_only_one_component_scales(
    objects: list[Object], tmp_path: Path
) -> None:
    config = _configuration(objects, tmp_path)
    assert config.kubernetes is not None and config.kubernetes.target is not None
    kind, _, name = config.kubernetes.target.partition("/")
    assert any(o["kind"].lower() == kind and o["metadata"]["name"] == name for o in objects)
    by_keda = [o for o in objects if o["kind"] == "ScaledObject"]
    assert len(by_keda) + config.kubernetes.patch == 1
    for trigger in (trigger for o in by_keda for trigger in o["spec"]["triggers"]):
        assert "farthing:fleet_desired_replicas" in trigger["metadata"]["query"]
        assert trigger["metadata"]["ignoreNullValues"] == "false"  # else a missing gauge counts as 0
    for scaled in by_keda:
        limits = scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"]
        assert limits == (config.policy.min_replicas, config.policy.max_replicas)


def test_permissions_are_those_the_controller_uses(objects: list[Object]) -> None:
    roles = [o for o in objects if o["kind"] == "Role"]
    rules = [(r["apiGroups"], r["resources"], r["verbs"]) for role in roles for r in role["rules"]]
    assert (["apps"], ["deployments/scale", "statefulsets/scale"], ["get", "patch"]) in rules
    assert (["coordination.k8s.io"], ["leases"], ["get", "create", "update"]) in rules
    assert not any("*" in part for rule in rules for part in rule)
    assert not any(o["kind"].startswith("ClusterRole") for o in objects)


def test_chart_lints_and_rejects_wrong_values() -> None:
    helm_python = pytest.importorskip("helm_python")
    report = helm_python.lint(str(CHART), strict=True)
    assert report["errors"] == []
    assert all(message["severity"] < 2 for message in report["messages"])
    for wrong in (
        {"fleet": {"mode": "hpa"}},
        {"fleet": {"policy": {"capacity": 0}}},
        {"replicas": {"kind": "Pod"}},
    ):
        with pytest.raises(helm_python.HelmError), helm_python.Chart.load(str(CHART)) as chart:
            chart.render(chart.merge_values(wrong), name="x", namespace="x")


def test_chart_and_base_render_the_same_kinds() -> None:
    base = {o["kind"] for o in kustomized("kustomize/base")}
    chart = {o["kind"] for o in charted({"fleet": {"mode": "scale"}})}
    assert chart == base - {"Namespace"}  # Helm gets its namespace as an argument


def test_image_is_non_root_and_has_a_health_check() -> None:
    lines = [line.strip() for line in (ROOT / "deploy" / "Dockerfile").read_text().splitlines()]
    starts = [i for i, line in enumerate(lines) if line.startswith("FROM ")]
    stages = [lines[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    packed, full = stages[-2:]  # the same except for what they copy
    assert packed[0] == "FROM runtime AS packed" and full[0] == "FROM runtime"
    final = next(stage for stage in stages if stage[0].endswith(" AS runtime"))
    users = [line.split()[1] for line in final if line.startswith("USER ")]
    assert users and all(int(user.split(":")[0]) >= 10000 for user in users)
    assert any(line.startswith("HEALTHCHECK ") for line in final)
    assert 'ENTRYPOINT ["farthing"]' in final
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    for name in (name for names in copied for name in names if "*" not in name and name != "README.md"):
        assert (ROOT / name).exists(), name
