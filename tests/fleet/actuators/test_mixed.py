"""Variants over the API: the policy's number becomes the cheapest mix, launches before removals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from farthing.fleet.actuators.base import ActuatorError
from farthing.fleet.actuators.kubernetes import connect
from farthing.fleet.actuators.mixed import MixedScale
from farthing.fleet.actuators.scale import ScalePatch, Target
from farthing.fleet.config import KubernetesConfig
from farthing.fleet.decisions import Decision, Levels
from farthing.fleet.variants import Variant
from farthing.reader import read
from tests.fleet.doubles.kubernetes import FakeKubernetes

KINDS = [Variant("large", 9.0, 4.0), Variant("small", 2.4), Variant("spot", 1.0, 1.0, True, 10)]


def decision(current: int, target: int) -> Decision:
    return Decision(0.0, current, target, "up", "short", Levels(short=target), "test")


@pytest.mark.anyio
async def test_mix_follows_the_target(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeKubernetes() as api:
        for name, count in (("large", 1), ("small", 0), ("spot", 0)):
            api.replicas["deployments", "prod", name] = count
        client = connect(api.url)
        targets = [ScalePatch(client, Target("deployment", v.name, "prod")) for v in KINDS]
        actuator = MixedScale(KINDS, targets, spot_share=0.5)
        assert await actuator.current() == 4
        await actuator.apply(decision(4, 8))  # half of it on spot
        assert await actuator.current() == 8
        assert api.replicas["deployments", "prod", "spot"] == 4
        await actuator.apply(decision(8, 8))
        assert len(api.patches) == 1
        api.patches.clear()
        kinds = [replace(KINDS[0], price=20.0), *KINDS[1:]]  # now the large one is expensive
        await MixedScale(kinds, targets, spot_share=0.5).apply(decision(8, 9))
        assert [name for name, _ in api.patches][-1] == "large"  # launches first
        assert await actuator.current() >= 9
        api.down = True
        with pytest.raises(ActuatorError):
            await actuator.apply(decision(9, 20))


def test_configuration_accepts_a_target_or_variants() -> None:
    kind = {"name": "a", "target": "deployment/a", "price": 2.0}
    made = read(KubernetesConfig, {"variants": [kind]})
    assert made.variants[0].size == 1.0
    with pytest.raises(ValueError, match="target and variants are both set"):
        read(KubernetesConfig, {"variants": [kind], "target": "deployment/b"})
    with pytest.raises(ValueError, match=r"spot_share: got 2\.0"):
        read(KubernetesConfig, {"variants": [kind], "spot_share": 2.0})
