"""Rules that a Kubernetes API server enforces but JSON schemas do not: names, labels, ports, probes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.fleet.deploy.rendering import EXAMPLES, Object, kustomized, pods

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # DNS-1123 label
SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
SERVICE = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # DNS-1035 label
QUALIFIED = re.compile(r"[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?")
PATH = re.compile(r"(?!\.{1,2}$)[^/%]{1,253}")  # RBAC allows every segment of a path
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def port_name(name: str) -> bool:
    """IANA service name: up to 15 of [a-z0-9-], with a letter, no hyphen at an end or next to another."""
    return bool(
        re.fullmatch(r"(?!.*--)[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?", name) and re.search("[a-z]", name)
    )


def _name_rule(item: Object) -> re.Pattern[str]:
    if item["apiVersion"].startswith("rbac."):
        return PATH
    return {"Service": SERVICE, "Namespace": LABEL}.get(item["kind"], SUBDOMAIN)


def check_names(item: Object) -> None:
    name = item["metadata"]["name"]
    assert _name_rule(item).fullmatch(name), f"{item['kind']} {name}"
    if item["kind"] in ("Deployment", "StatefulSet", "LeaderWorkerSet"):
        assert len(name) <= 63, name  # becomes part of the pods' labels
    for labels in found(item, ("labels", "matchLabels", "selector")):
        check_labels(labels, f"{item['kind']} {name}")


def check_labels(labels: Any, where: str) -> None:
    if not isinstance(labels, dict) or any(isinstance(value, dict | list) for value in labels.values()):
        return  # a selector object, whose matchLabels are found separately
    for key, value in labels.items():
        prefix, _, plain = key.rpartition("/")
        assert QUALIFIED.fullmatch(plain), f"{where}: label {key}"
        assert not prefix or SUBDOMAIN.fullmatch(prefix), f"{where}: label {key}"
        assert isinstance(value, str), f"{where}: label {key} = {value!r}"
        assert value == "" or QUALIFIED.fullmatch(value), f"{where}: label {key} = {value!r}"


def found(value: Any, names: tuple[str, ...]) -> Iterator[Any]:
    """Every value under one of `names`, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in names:
                yield inner
            yield from found(inner, names)
    elif isinstance(value, list):
        for inner in value:
            yield from found(inner, names)


def check_pods(objects: list[Object]) -> None:
    for owner, _, pod in pods(objects):
        names = [port["name"] for c in pod["containers"] for port in c.get("ports", [])]
        assert len(names) == len(set(names)), owner
        assert all(map(port_name, names)), (owner, names)
        assert all(LABEL.fullmatch(c["name"]) for c in pod["containers"]), owner
        assert all(LABEL.fullmatch(volume["name"]) for volume in pod["volumes"]), owner
        for container in pod["containers"]:
            own = {port["name"] for port in container.get("ports", [])}
            own |= {port["containerPort"] for port in container.get("ports", [])}
            for probe in (container[name] for name in PROBES if name in container):
                port = probe.get("httpGet", probe.get("tcpSocket", probe.get("grpc")))["port"]
                assert port in own, (owner, port)


def check_services(objects: list[Object]) -> None:
    for service in (o for o in objects if o["kind"] == "Service"):
        ports = service["spec"]["ports"]
        assert len({port["name"] for port in ports}) == len(ports)
        for port in ports:
            assert LABEL.fullmatch(port["name"]), port
            target = port["targetPort"]
            assert isinstance(target, int) or port_name(target), port


def check_network_policies(objects: list[Object]) -> None:
    for policy in (o for o in objects if o["kind"] == "NetworkPolicy"):
        selector = policy["spec"]["podSelector"].get("matchLabels", {}).items()
        chosen = [pod for _, labels, pod in pods(objects) if selector <= labels.items()]
        known = {port["name"] for pod in chosen for c in pod["containers"] for port in c.get("ports", [])}
        for rule in policy["spec"].get("ingress", []):
            for port in (entry["port"] for entry in rule.get("ports", [])):
                assert isinstance(port, int) or port_name(port), port
                assert not chosen or isinstance(port, int) or port in known, (
                    policy["metadata"]["name"],
                    port,
                )


def check_all(objects: list[Object]) -> None:
    for item in objects:
        check_names(item)
    check_pods(objects)
    check_services(objects)
    check_network_policies(objects)
    keys = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects]
    assert len(keys) == len(set(keys))


def test_names_ports_and_labels_are_accepted(objects: list[Object]) -> None:
    check_all(objects)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_have_valid_names(name: str) -> None:
    check_all(kustomized(name))


def _deployment(objects: list[Object]) -> Object:
    return next(o for o in objects if o["kind"] == "Deployment" and o["metadata"]["name"] == "farthing-fleet")


def _long_port(objects: list[Object]) -> None:
    _deployment(objects)["spec"]["template"]["spec"]["containers"][0]["ports"][0]["name"] = "metrics-of-fleet"


def _absent_probe_port(objects: list[Object]) -> None:
    container = _deployment(objects)["spec"]["template"]["spec"]["containers"][0]
    container["livenessProbe"]["httpGet"]["port"] = "metrix"


def _long_label(objects: list[Object]) -> None:
    _deployment(objects)["spec"]["template"]["metadata"]["labels"]["farthing.dev/x"] = "a" * 64


def _upper_case(objects: list[Object]) -> None:
    _deployment(objects)["metadata"]["name"] = "Farthing-fleet"


def _absent_policy_port(objects: list[Object]) -> None:
    policy = next(o for o in objects if o["kind"] == "NetworkPolicy" and o["metadata"]["name"] == "farthing")
    policy["spec"]["ingress"][0]["ports"] = [{"port": "https"}]


@pytest.mark.parametrize(
    "spoil", [_long_port, _absent_probe_port, _long_label, _upper_case, _absent_policy_port]
)
def test_check_rejects_what_an_api_server_rejects(spoil: Callable[[list[Object]], None]) -> None:
    objects = kustomized("kustomize/base")
    spoil(objects)
    with pytest.raises(AssertionError):
        check_all(objects)
