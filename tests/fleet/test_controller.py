"""The control loop: logs, metrics, actions, failures; its configuration and command line."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import aiohttp
import pytest
from typer.testing import CliRunner

from farthing.files import read
from farthing_fleet.actuators.base import ActuatorError
from farthing_fleet.cli import app
from farthing_fleet.config import FleetConfig, PolicyConfig, SignalsConfig, load
from farthing_fleet.controller import Controller, load_state
from farthing_fleet.decision_log import read_log
from farthing_fleet.metrics import FleetMetrics, MetricsServer
from farthing_fleet.policy import Policy
from farthing_fleet.rehearsal import Plan
from farthing_fleet.run import run_controller
from farthing_fleet.types import Decision, Snapshot
from tests.fleet.doubles.kubernetes import FakeKubernetes
from tests.fleet.doubles.replica import FakeReplica
from tests.fleet.doubles.services import free_port

POLICY = PolicyConfig(capacity=1.0, interval_s=0.05, cold_start_s=1.0, stale_after_s=5.0)


class Source:
    """Signals set by the test."""

    def __init__(self, **signals: object) -> None:
        self.signals: dict[str, object] = {
            "request_rate": 1.0,
            "backlog": 0.0,
            "queue_time_s": 0.0,
            "ready": 2,
            **signals,
        }
        self.time = 1000.0

    async def read(self, current: int) -> Snapshot:
        return Snapshot(time=self.time, current=current, **self.signals)  # type: ignore[arg-type]

    async def close(self) -> None:
        """No-op."""


class Recorder:
    """An actuator that records requested targets."""

    def __init__(self, count: int | None = 2) -> None:
        self.count, self.asked, self.broken = count, list[int](), False

    async def start(self) -> None:
        """No-op."""

    async def current(self) -> int | None:
        if self.broken:
            raise ActuatorError("the API is away")
        return self.count

    async def apply(self, decision: Decision) -> None:
        if self.broken:
            raise ActuatorError("the API is away")
        self.asked.append(decision.target)
        self.count = decision.target

    async def close(self) -> None:
        """No-op."""


def controller(tmp_path: Path, source: Source, actuator: Recorder, **options: object) -> Controller:
    return Controller(
        Policy(POLICY),
        source,
        actuator,
        log_path=tmp_path / "decisions.jsonl",
        wall=lambda: source.time,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.anyio
async def test_turn_decides_logs_exposes_and_applies(tmp_path: Path) -> None:
    source, actuator = Source(request_rate=3.5), Recorder()
    loop = controller(tmp_path, source, actuator)
    decision = await loop.turn()
    assert decision is not None
    assert (decision.current, decision.target, decision.action) == (2, 5, "up")
    assert actuator.asked == [5]
    assert loop.metrics.last == decision
    assert read_log(tmp_path / "decisions.jsonl") == [decision]


@pytest.mark.anyio
async def test_advice_is_logged_and_never_applied(tmp_path: Path) -> None:
    actuator = Recorder()
    loop = controller(tmp_path, Source(request_rate=3.5), actuator, advise=True)
    decision = await loop.turn()
    assert decision is not None and decision.target == 5
    assert actuator.asked == []


@pytest.mark.anyio
async def test_forecast_and_learned_capacity_reach_the_policy(tmp_path: Path) -> None:
    class Estimates:
        seen: list[Snapshot] = []  # noqa: RUF012
        maintained = 0

        def observe(self, now: float, snapshot: Snapshot) -> None:
            self.seen.append(snapshot)

        def plan(self, now: float) -> Plan:
            return Plan(4.6, 3.5, 3.0, 1.31, "test")

        def capacity(self) -> float:
            return 2.0

        def maintain(self, now: float) -> None:
            self.maintained += 1
            raise RuntimeError("this fit fails")

    estimates = Estimates()
    loop = controller(tmp_path, Source(), Recorder(), estimates=estimates)
    decision = await loop.turn()
    assert decision is not None
    assert (decision.decided_by, decision.target) == ("short", 5)
    await asyncio.sleep(0.05)
    await loop.turn()  # the failed fit stops nothing
    assert len(estimates.seen) == 2 and estimates.maintained >= 1
    assert loop.metrics.failures._value.get() >= 1


@pytest.mark.anyio
async def test_unreachable_actuator_is_an_alarm_and_nothing_is_applied(tmp_path: Path) -> None:
    source, actuator = Source(), Recorder()
    loop = controller(tmp_path, source, actuator)
    await loop.turn()
    asked = list(actuator.asked)
    actuator.broken = True
    source.signals["request_rate"] = 10.0
    decision = await loop.turn()
    assert decision is not None
    assert any("the API is away" in alarm for alarm in decision.alarms)
    assert actuator.asked == asked
    actuator.broken = False
    decision = await loop.turn()
    assert decision is not None and decision.target == 15
    assert actuator.asked[-1] == 15


@pytest.mark.anyio
async def test_without_a_count_requested_or_ready_replicas_are_used(tmp_path: Path) -> None:
    class Others(Recorder):
        async def apply(self, decision: Decision) -> None:
            """No-op: an HPA acts."""

    source = Source(ready=None)
    loop = controller(tmp_path, source, Others(None))
    assert await loop.turn() is None  # nothing is known
    source.signals.update(ready=4, request_rate=3.5)
    decision = await loop.turn()
    assert decision is not None and (decision.current, decision.target) == (4, 5)
    source.signals.update(ready=None, request_rate=0.1)  # most replicas stopped reporting
    for each in (loop, controller(tmp_path, source, Others(None))):  # also after a restart
        decision = await each.turn()
        assert decision is not None and (decision.current, decision.target) == (5, 5)


@pytest.mark.anyio
async def test_loop_survives_a_bug_and_keeps_its_state(tmp_path: Path) -> None:
    class Broken(Source):
        turns = 0

        async def read(self, current: int) -> Snapshot:
            self.turns += 1
            if self.turns == 1:
                raise ZeroDivisionError
            return await super().read(current)

    stop, source = asyncio.Event(), Broken(request_rate=3.5)
    loop = controller(tmp_path, source, Recorder(), state_path=tmp_path / "policy.json")
    task = asyncio.create_task(loop.run(stop))
    while not loop.metrics.last:
        await asyncio.sleep(0.01)
    stop.set()
    await task
    assert loop.metrics.failures._value.get() == 1
    state = load_state(tmp_path / "policy.json")
    assert state is not None and state.last_change == 1000.0
    (tmp_path / "policy.json").write_text("{")
    assert load_state(tmp_path / "policy.json") is None


@pytest.mark.anyio
async def test_metrics_server_shows_the_last_decision_and_its_age(tmp_path: Path) -> None:
    now = [0.0]
    metrics = FleetMetrics(monotonic=lambda: now[0])
    server = MetricsServer(metrics, max_age_s=10.0)
    port = await server.start("127.0.0.1", 0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        assert (await session.get("/decision")).status == 404
        assert (await session.get("/health")).status == 200
        loop = controller(tmp_path, Source(request_rate=3.5, cold_start_s=4.0), Recorder(), metrics=metrics)
        decision = await loop.turn()
        text = await (await session.get("/metrics")).text()
        assert "farthing:fleet_desired_replicas 5.0" in text
        assert "farthing:fleet_short_replicas 5.0" in text
        assert "farthing:fleet_cold_start_seconds 4.0" in text
        assert "farthing:fleet_target_utilization 0.7" in text
        assert 'farthing:fleet_decisions_total{action="up"} 1.0' in text
        assert decision is not None
        assert (await (await session.get("/decision")).json())["reason"] == decision.reason
        now[0] = 11.0
        assert (await session.get("/health")).status == 503
    await server.close()


# ---- configuration ----

YAML = """
policy: {capacity: 2, target_utilization: 0.6}
signals: {prometheus: "http://prometheus:9090", metrics: vllm}
kubernetes: {target: deployment/deepseek, namespace: prod}
state: /tmp/state
"""


def test_configuration_is_read(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(YAML)
    config = load(tmp_path / "fleet.yaml")
    assert config.policy == PolicyConfig(capacity=2.0, target_utilization=0.6)
    assert config.kubernetes is not None and config.kubernetes.target == "deployment/deepseek"
    assert config.state == Path("/tmp/state")


def test_an_interval_that_would_rehearse_for_minutes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text("policy: {capacity: 2, interval_s: 0.05}")
    with pytest.raises(
        ValueError, match=r"fleet.yaml: policy.interval_s: got 0.05; expected 1 or more seconds$"
    ):
        load(tmp_path / "fleet.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"polcy": {}}, r"polcy: unknown field; expected one of policy, signals"),
        ({"policy": {"capacity": "two"}}, r"policy.capacity: got 'two'; expected a number"),
        (
            {"policy": {"capacity": 1, "target_utilization": 2}},
            r"policy.target_utilization: got 2.0; expected in \(0, 1\]",
        ),
        ({"policy": {}}, r"policy: .*capacity"),
        (
            {"policy": {"capacity": 1, "latency_metric": "p99"}},
            r"policy.latency_metric: got 'p99'; expected one of",
        ),
        ({"signals": {"metrics": "tgi"}}, r"signals.metrics: got 'tgi'; expected auto"),
        ({"signals": []}, r"signals: got \[\]; expected a mapping"),
        ({"metrics": "9400"}, r"^metrics: got '9400'; expected HOST:PORT"),
        ({"advise": "yes"}, r"advise: got 'yes'; expected true or false"),
    ],
)
def test_configuration_errors_name_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(FleetConfig, {"policy": {"capacity": 1.0}, **change})


# ---- the whole controller against fakes ----


@pytest.mark.anyio
async def test_run_scales_a_deployment_by_replica_metrics(tmp_path: Path) -> None:
    async with FakeKubernetes() as api, FakeReplica(name="a") as replica:
        key = ("deployments", "prod", "deepseek")
        api.replicas[key] = 1
        config = read(
            FleetConfig,
            {
                "policy": {"capacity": 1.0, "interval_s": 0.1, "cold_start_s": 1.0},
                "signals": {"replicas": [replica.url], "window_s": 1.0},
                "kubernetes": {"api": api.url, "namespace": "prod", "target": "deployment/deepseek"},
                "state": str(tmp_path),
                "metrics": "127.0.0.1:0",
            },
        )
        stop = asyncio.Event()
        task = asyncio.create_task(run_controller(config, stop))
        async with aiohttp.ClientSession() as session:
            while api.replicas[key] == 1:  # queue time of 1 s: above 0.2 s for 0.2 s
                await session.put(replica.url + "/_signals", json={"queue": [1.0, 1], "ttft": [1.0, 1]})
                await asyncio.sleep(0.05)
        stop.set()
        await task
        assert api.leases["prod", "farthing-fleet"]["spec"]["holderIdentity"] == ""  # released


@pytest.mark.anyio
async def test_target_is_named_in_errors() -> None:
    async with FakeKubernetes() as api:
        signals = {"replicas": ["http://127.0.0.1:1"]}
        kubernetes = {"api": api.url, "namespace": "prod", "target": "b"}
        config = read(FleetConfig, {"policy": {"capacity": 1}, "signals": signals, "kubernetes": kubernetes})
        with pytest.raises(ValueError, match=r"target: got 'b'; expected KIND/NAME"):
            await run_controller(config, asyncio.Event())


@pytest.mark.anyio
async def test_run_errors_name_what_is_missing() -> None:
    config = FleetConfig(policy=POLICY, signals=SignalsConfig(), metrics="127.0.0.1:0")
    with pytest.raises(ValueError, match="signals: expected `prometheus`"):
        await run_controller(config, asyncio.Event())


# ---- the command line ----


@pytest.mark.anyio
async def test_explain_prints_the_last_decisions(tmp_path: Path) -> None:
    source = Source()
    loop = controller(tmp_path, source, Recorder())
    for rate in (1.0, 3.5, 3.5):
        source.signals["request_rate"] = rate
        await loop.turn()
    runner = CliRunner()
    shown = runner.invoke(app, ["explain", "--state", str(tmp_path), "--last", "2"])
    assert shown.exit_code == 0
    assert "up 2 -> 5  decided by short" in shown.stdout
    assert "load is 3.5 requests/s, needs 5" in shown.stdout
    document = json.loads(
        runner.invoke(app, ["explain", "--state", str(tmp_path), "--changes", "--json"]).stdout
    )
    assert [d["target"] for d in document] == [5]
    missing = runner.invoke(app, ["explain", "--state", str(tmp_path / "none")])
    assert missing.exit_code == 2
    assert "does not exist" in missing.output


def test_command_line_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("policy: {capacity: 0}")
    result = CliRunner().invoke(app, ["run", str(tmp_path / "f.yaml")])
    assert result.exit_code == 2
    assert "policy.capacity: got 0.0" in result.output
    assert "Traceback" not in result.output


@pytest.mark.anyio
async def test_run_exits_cleanly_on_sigterm(tmp_path: Path) -> None:
    async with FakeReplica(name="a") as replica:
        config = {
            "policy": {"capacity": 1.0, "interval_s": 1.0},
            "signals": {"replicas": [replica.url]},
            "state": str(tmp_path / "state"),
            "metrics": f"127.0.0.1:{free_port()}",
        }
        (tmp_path / "fleet.yaml").write_text(json.dumps(config))
        command = ("-m", "farthing.cli.app", "fleet", "run", str(tmp_path / "fleet.yaml"), "--advise")
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stderr=asyncio.subprocess.PIPE
        )
        log = tmp_path / "state" / "decisions.jsonl"
        try:
            while not log.exists():
                await asyncio.sleep(0.02)
            process.terminate()
            _, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        assert process.returncode == 0, errors
        assert read_log(log)[-1].current == 1
