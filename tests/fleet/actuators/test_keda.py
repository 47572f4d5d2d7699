"""The KEDA scaler over gRPC: the published protocol, and the answer to each call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from farthing_fleet.actuators import keda
from farthing_fleet.actuators.base import LastDecision
from farthing_fleet.actuators.keda import KedaScaler, messages, services
from tests.fleet import doubles
from tests.fleet.actuators.decided import decision

PROTO = Path(next(iter(doubles.__path__))) / "externalscaler.proto"


@pytest.fixture(scope="module")
def protocol() -> Any:
    """(messages, stub class)."""
    return messages, services.ExternalScalerStub


def test_protocol_is_the_published_one(tmp_path: Path) -> None:
    """The packaged file and KEDA's define the same messages and calls."""
    described = []
    for index, path in enumerate((PROTO, Path(keda.__file__).parent / "externalscaler.proto")):
        out = tmp_path / f"{index}.pb"
        flags = [f"-I{path.parent}", f"--descriptor_set_out={out}"]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *flags, str(path)], check=True)
        described.append(out.read_bytes())
    assert described[0] == described[1]


loaded = partial(decision, backlog=24.0, ttft_s=0.25)


@asynccontextmanager
async def serving(protocol: Any) -> AsyncIterator[tuple[Any, Any, LastDecision]]:
    messages, stub = protocol
    last_decision = LastDecision()
    scaler = KedaScaler(last_decision)
    port = await scaler.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield messages, stub(channel), last_decision
    await scaler.close()


@pytest.mark.anyio
async def test_an_address_that_cannot_be_bound_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[float] = []

    class Refusing:  # as grpc does; a real one leaves events to later tests' loops
        def add_registered_method_handlers(self, *given: Any) -> None: ...

        def add_generic_rpc_handlers(self, *given: Any) -> None: ...

        def add_insecure_port(self, address: str) -> int:
            raise RuntimeError("Failed to bind to address; set GRPC_VERBOSITY=debug …")

        async def stop(self, grace: float) -> None:
            stopped.append(grace)

    monkeypatch.setattr(grpc.aio, "server", Refusing)
    with pytest.raises(OSError, match=r"^keda.address: cannot listen on 203.0.113.1:80$"):
        await KedaScaler(LastDecision()).start("203.0.113.1:80")
    assert stopped, "closed"


def reference(messages: Any, **metadata: str) -> Any:
    return messages.ScaledObjectRef(name="deepseek", namespace="prod", scalerMetadata=metadata)


@pytest.mark.anyio
async def test_quotient_of_value_and_target_is_the_replica_count(protocol: Any) -> None:
    async with serving(protocol) as (messages, stub, last_decision):
        last_decision.post(loaded(11))
        ref = reference(messages)
        (spec,) = (await stub.GetMetricSpec(ref)).metricSpecs
        assert (spec.metricName, spec.targetSize, spec.targetSizeFloat) == ("desired_replicas", 1, 1.0)
        request = messages.GetMetricsRequest(scaledObjectRef=ref, metricName=spec.metricName)
        (value,) = (await stub.GetMetrics(request)).metricValues
        assert (value.metricValue, value.metricValueFloat) == (11, 11.0)


@pytest.mark.anyio
async def test_backlog_and_response_time_with_a_target_per_replica(protocol: Any) -> None:
    async with serving(protocol) as (messages, stub, last_decision):
        last_decision.post(loaded(11))
        for metric, target, expected in (
            ("queue_backlog", 4.0, 24.0),
            ("average_response_time", 0.2, 0.25),
        ):
            ref = reference(messages, metric=metric, target=str(target))
            (spec,) = (await stub.GetMetricSpec(ref)).metricSpecs
            assert (spec.metricName, spec.targetSizeFloat) == (metric, target)
            request = messages.GetMetricsRequest(scaledObjectRef=ref, metricName=metric)
            (value,) = (await stub.GetMetrics(request)).metricValues
            assert value.metricValueFloat == expected


@pytest.mark.anyio
async def test_is_active_and_its_stream(protocol: Any) -> None:
    async with serving(protocol) as (messages, stub, last_decision):
        ref = reference(messages)
        last_decision.post(loaded(3))
        assert (await stub.IsActive(ref)).result is True
        stream = stub.StreamIsActive(ref)
        assert (await stream.read()).result is True
        last_decision.post(loaded(0))
        assert (await stream.read()).result is False
        assert (await stub.IsActive(ref)).result is False
        last_decision.post(loaded(1))
        assert (await stream.read()).result is True
        stream.cancel()


@pytest.mark.anyio
async def test_missing_metrics_and_invalid_metadata_are_errors(protocol: Any) -> None:
    async def fails(awaitable: Any, code: grpc.StatusCode, text: str) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await awaitable
        assert caught.value.code() == code
        assert text in caught.value.details()

    async with serving(protocol) as (messages, stub, last_decision):
        ref = reference(messages)
        request = messages.GetMetricsRequest(scaledObjectRef=ref)
        await fails(stub.IsActive(ref), grpc.StatusCode.UNAVAILABLE, "outdated")
        await fails(stub.GetMetrics(request), grpc.StatusCode.UNAVAILABLE, "outdated")
        last_decision.post(loaded(3, backlog=None))
        wrong = reference(messages, metric="cpu")
        await fails(stub.GetMetricSpec(wrong), grpc.StatusCode.INVALID_ARGUMENT, "queue_backlog")
        wrong = reference(messages, metric="queue_backlog", target="-1")
        await fails(stub.GetMetricSpec(wrong), grpc.StatusCode.INVALID_ARGUMENT, "above 0")
        backlog = messages.GetMetricsRequest(
            scaledObjectRef=reference(messages, metric="queue_backlog", target="4")
        )
        await fails(stub.GetMetrics(backlog), grpc.StatusCode.UNAVAILABLE, "queue_backlog is missing")
