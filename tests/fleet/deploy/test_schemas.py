"""Every object meets the published schema: Kubernetes' OpenAPI, and models generated from the CRDs."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest

from tests.fleet.deploy.rendering import EXAMPLES, Object, kustomized

KUBERNETES = "1.32"
UNPUBLISHED = ("inference.networking.k8s.io", "gateway.networking.k8s.io")  # no models of their CRDs on PyPI


def _custom_model(api_version: str, kind: str) -> Any:
    """A model of a custom resource, generated from its CRD by its package."""
    if api_version == "monitoring.coreos.com/v1":
        import cloudcoil.models.prometheus_operator.v1 as models
    elif api_version == "keda.sh/v1alpha1":
        import cloudcoil.models.keda.v1alpha1 as models
    else:
        raise AssertionError(f"no schema for {api_version} {kind}")
    return getattr(models, kind)


def _same(given: Any, understood: Any, where: str) -> None:
    """Check that the model kept every given field: unknown ones are dropped silently."""
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
    elif group.split("/")[0] in UNPUBLISHED:
        assert {"metadata", "spec"} <= set(item)
    elif group.split("/")[0] in ("monitoring.coreos.com", "keda.sh"):
        model = _custom_model(group, item["kind"]).model_validate(item)
        _same(item, model.model_dump(mode="json", by_alias=True, exclude_unset=True), item["kind"])
    else:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_every_object_meets_its_schema(objects: list[Object]) -> None:
    for item in objects:
        check_schema(item)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_meet_their_schemas(name: str) -> None:
    for item in kustomized(name):
        check_schema(item)


def test_schema_check_rejects_invalid_objects() -> None:
    service = next(o for o in kustomized("kustomize/base") if o["kind"] == "Service")
    service["spec"]["prots"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schema(service)
    rule = next(o for o in kustomized("kustomize/base") if o["kind"] == "PrometheusRule")
    rule["spec"]["groups"][0]["rulez"] = []
    with pytest.raises(AssertionError, match="rulez is not a field"):
        check_schema(rule)
