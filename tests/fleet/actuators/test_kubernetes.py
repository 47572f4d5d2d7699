"""/scale, Lease and SubjectAccessReview against a fake Kubernetes API, over HTTP."""

from __future__ import annotations

import asyncio
from pathlib import Path

import kubernetes
import pytest
import yaml

from farthing_fleet.actuators.base import ActuatorError
from farthing_fleet.actuators.kubernetes import (
    Elector,
    LeaseConfig,
    ScalePatch,
    Target,
    connect,
    status_of,
)
from farthing_fleet.types import Decision, Levels
from tests.fleet.doubles.kubernetes import FakeKubernetes


def decision(current: int, target: int) -> Decision:
    return Decision(
        time=0.0,
        current=current,
        target=target,
        action="up",
        decided_by="short",
        levels=Levels(),
        reason="test",
    )


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def elector(api: FakeKubernetes, identity: str, clock: Clock) -> Elector:
    config = LeaseConfig(name="farthing-fleet", namespace="prod", identity=identity)
    return Elector(connect(api.url), config, monotonic=clock)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("text", "plural"),
    [
        ("deployment/deepseek", "deployments"),
        ("StatefulSet/deepseek", "statefulsets"),
        ("leaderworkerset/deepseek", "leaderworkersets"),
    ],
)
async def test_scale_is_read_and_patched(text: str, plural: str) -> None:
    async with FakeKubernetes() as api:
        key = (plural, "prod", "deepseek")
        api.replicas[key] = 10
        actuator = ScalePatch(connect(api.url), Target.parse(text, "prod"))
        assert await actuator.current() == 10
        await actuator.apply(decision(10, 11))  # within the tolerance of an HPA
        assert api.replicas[key] == 11
        await actuator.apply(decision(11, 11))
        assert api.patches == [("deepseek", 11)]


@pytest.mark.anyio
async def test_scale_errors_name_the_target() -> None:
    async with FakeKubernetes() as api:
        actuator = ScalePatch(connect(api.url), Target.parse("deployment/none", "prod"))
        with pytest.raises(ActuatorError, match=r"deployment/none/scale: HTTP 404") as missing:
            await actuator.current()
        assert status_of(missing.value) == 404
        api.down = True
        with pytest.raises(ActuatorError, match="HTTP 500"):
            await actuator.current()
    with pytest.raises(ActuatorError, match="does not answer"):
        await actuator.current()
    with pytest.raises(ValueError, match=r"^kubernetes.target: got 'pod/x'.*deployment, statefulset"):
        Target.parse("pod/x", "prod")


@pytest.mark.anyio
async def test_one_of_two_leads_and_only_the_leader_scales() -> None:
    clock = Clock()
    async with FakeKubernetes() as api:
        api.replicas["deployments", "prod", "d"] = 1
        first, second = elector(api, "a", clock), elector(api, "b", clock)
        await first.turn()
        await second.turn()
        assert (first.leading, second.leading) == (True, False)
        target = Target.parse("deployment/d", "prod")
        await ScalePatch(connect(api.url), target, second).apply(decision(1, 5))
        assert api.patches == []
        await ScalePatch(connect(api.url), target, first).apply(decision(1, 5))
        assert api.patches == [("d", 5)]


@pytest.mark.anyio
async def test_lease_moves_only_after_its_holder_stops_renewing() -> None:
    clock = Clock()
    async with FakeKubernetes() as api:
        first, second = elector(api, "a", clock), elector(api, "b", clock)
        await first.turn()
        for _ in range(5):
            await second.turn()
            clock.now += 2.0
            await first.turn()
        assert first.leading
        await second.turn()  # observes the last renewal; from here on the first one is silent
        clock.now += 9.9
        await second.turn()
        assert first.leading and not second.leading
        clock.now += 0.2
        assert not first.leading  # steps down before another can take over
        await second.turn()
        assert not second.leading
        clock.now += 5.0
        await second.turn()
        assert second.leading
        assert api.leases["prod", "farthing-fleet"]["spec"]["leaseTransitions"] == 1
        await first.turn()
        assert not first.leading


@pytest.mark.anyio
async def test_lease_is_released_at_the_end() -> None:
    clock = Clock()
    async with FakeKubernetes() as api:
        first, second = elector(api, "a", clock), elector(api, "b", clock)
        await first.turn()
        await second.turn()
        await first.close()
        await second.turn()
        assert second.leading


@pytest.mark.anyio
async def test_concurrent_candidates_elect_one_leader() -> None:
    clock = Clock()
    async with FakeKubernetes() as api:
        electors = [elector(api, name, clock) for name in "abcd"]
        await asyncio.gather(*(e.turn() for e in electors), return_exceptions=True)
        assert sum(e.leading for e in electors) == 1


@pytest.mark.anyio
async def test_leader_without_an_api_stops_acting() -> None:
    clock = Clock()
    async with FakeKubernetes() as api:
        only = elector(api, "a", clock)
        await only.turn()
        api.down = True
        with pytest.raises(ActuatorError):
            await only.turn()
        assert only.leading
        clock.now += 10.1
        assert not only.leading
        api.down = False
        await only.turn()
        assert only.leading


def test_lease_times_must_be_in_order() -> None:
    with pytest.raises(ValueError, match="retry_s < renew_s < duration_s"):
        LeaseConfig(name="l", namespace="n", identity="i", renew_s=20.0)


def test_three_failed_renewals_in_a_row_cost_no_lead() -> None:
    config = LeaseConfig(name="l", namespace="n", identity="i")
    assert 4 * config.retry_s < config.renew_s  # the fourth succeeds in time


def test_connect_errors_name_accepted_values() -> None:
    with pytest.raises(ActuatorError, match="expected auto, kubeconfig or a URL"):
        connect("cluster")


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No kubeconfig and no service account; the path where a kubeconfig would be."""
    path = tmp_path / "kubeconfig"
    monkeypatch.setattr(kubernetes.config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    monkeypatch.setattr(kubernetes.config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    monkeypatch.setattr(kubernetes.config.incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(kubernetes.config.incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    for name in ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"):
        monkeypatch.delenv(name, raising=False)
    return path


@pytest.fixture
def pod(outside: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files and variables of a pod with a service account."""
    (outside.parent / "token").write_text("secret")
    (outside.parent / "ca.crt").write_text("certificate")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    return outside


def write_kubeconfig(path: Path) -> None:
    cluster = {"name": "home", "cluster": {"server": "https://home:6443"}}
    context = {"name": "home", "context": {"cluster": "home", "user": "me"}}
    user = {"name": "me", "user": {"token": "mine"}}
    path.write_text(
        yaml.safe_dump(
            {"clusters": [cluster], "contexts": [context], "users": [user], "current-context": "home"}
        )
    )


def test_a_pod_uses_its_service_account(pod: Path) -> None:
    configuration = connect("auto").configuration
    assert configuration.host == "https://10.0.0.1:443"
    assert configuration.auth_settings()["BearerToken"]["value"].lower() == "bearer secret"
    write_kubeconfig(pod)
    assert connect("auto").configuration.host == "https://10.0.0.1:443"
    assert connect("auto", "home").configuration.host == "https://home:6443"


def test_outside_a_pod_the_kubeconfig_is_used(outside: Path) -> None:
    with pytest.raises(ActuatorError, match="no Kubernetes API is configured"):
        connect("auto")
    write_kubeconfig(outside)
    assert connect("auto").configuration.host == "https://home:6443"
