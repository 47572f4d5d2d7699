"""Renderings of deploy/ for the tests: every kustomize set, and the chart with relevant values."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fleet.doubles.services import require

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "farthing"
SETS = [
    "kustomize/base",
    "kustomize/overlays/keda",
    "kustomize/overlays/multi-node",
]
EXAMPLES = ["examples/inference-gateway"]
LONG = "a-release-name-of-the-fifty-three-characters-helm-all"  # 53, Helm's limit
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "scale": {"fleet": {"mode": "scale"}, "replicas": {"kind": "StatefulSet"}},
    "no-gateway": {"gateway": {"enabled": False}},
    "bare": {
        "model": {"claim": ""},
        "apiKeysSecret": "",
        "monitoring": {"enabled": False},
        "networkPolicy": {"enabled": False},
    },
    "long-name": {},
}

Object = dict[str, Any]


def kustomized(name: str) -> list[Object]:
    """Every object of a set, by its directory under deploy/."""
    done = subprocess.run(
        [require("kubectl"), "kustomize", str(DEPLOY / name)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def charted(values: dict[str, Any], namespace: str = "prod", name: str = "farthing") -> list[Object]:
    """Every object of the chart with `values` overriding its defaults."""
    helm_python = pytest.importorskip("helm_python")
    with helm_python.Chart.load(str(CHART)) as chart:
        rendered = chart.render(chart.merge_values(values), name=name, namespace=namespace)
    files = (text for path, text in sorted(rendered.items()) if path.endswith(".yaml"))
    return [document for text in files for document in yaml.safe_load_all(text) if document]


def rendered(param: str) -> list[Object]:
    """The objects of a set's directory, or of `helm:VALUES`."""
    kind, _, name = param.partition(":")
    if kind != "helm":
        return kustomized(param)
    return charted(VALUES[name], name=LONG if name == "long-name" else "farthing")


def pods(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """(owner, labels, pod spec) of every pod template."""
    for item in objects:
        if item["kind"] in ("Deployment", "StatefulSet"):
            template = item["spec"]["template"]
            yield item["metadata"]["name"], template["metadata"]["labels"], template["spec"]
        elif item["kind"] == "LeaderWorkerSet":
            for role in ("leaderTemplate", "workerTemplate"):
                template = item["spec"]["leaderWorkerTemplate"][role]
                yield item["metadata"]["name"], template["metadata"]["labels"], template["spec"]
