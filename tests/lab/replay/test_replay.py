"""The replay: exact queue, the policy's rule, detection of trace formats, one JSON document."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from farthing_fleet.forecast.history import trailing_max
from farthing_lab.cli.replay import app
from farthing_lab.replay.policies import FixedRule, HpaRule, deviations
from farthing_lab.replay.rate import Setting, View, simulate
from farthing_lab.replay.requests import Fleet, requests_of
from farthing_lab.replay.run import POLICIES, Replay, ReplayConfig, base_of
from farthing_lab.replay.servers import Times
from farthing_lab.replay.trace import EXAMPLE, RequestTrace, rate_load, read_trace
from farthing_lab.series import Series


def test_static_fleet_is_billed_for_its_time_and_keeps_the_slo() -> None:
    load = np.full((720, 2), 3.0)
    result = simulate(load, FixedRule(np.full((240, 2), 4)), Setting(capacity=1.0))
    assert result.instance_hours.tolist() == pytest.approx([4.0, 4.0])
    assert result.slo.tolist() == [1.0, 1.0]
    assert result.changes.tolist() == [0, 0]


def test_slo_is_missed_once_the_queue_exceeds_two_seconds() -> None:
    load = np.full((720, 1), 1.1)  # backlog grows by 0.1 a second: two seconds after 20 s
    result = simulate(load, FixedRule(np.ones((240, 1), np.int64)), Setting(capacity=1.0))
    assert result.slo[0] == pytest.approx(20 / 3600, rel=1e-6)


def test_replica_serves_after_the_load_time_and_is_billed_from_launch() -> None:
    plan = np.ones((240, 1), np.int64)
    plan[40:] = 2
    result = simulate(np.full((720, 1), 0.5), FixedRule(plan), Setting(capacity=1.0, load_time_s=600))
    assert result.ready[79] == 1 and result.ready[80] == 2
    assert result.instance_hours[0] == pytest.approx(1 + 200 * 15 / 3600)


def test_starting_replicas_end_first_and_ready_ones_drain() -> None:
    plan = np.full((240, 1), 2, np.int64)
    plan[10:20] = 5
    plan[20:] = 1
    setting = Setting(capacity=1.0, load_time_s=600, drain_s=30)
    result = simulate(np.full((720, 1), 0.5), FixedRule(plan), setting)
    assert result.ready[20] == 1
    assert result.instance_hours[0] == pytest.approx((20 * 2 + 10 * 3 + 220) * 15 / 3600 + 30 / 3600)


def test_hpa_ignores_ten_percent_and_delays_scale_down() -> None:
    load = np.concatenate([np.full((30, 1), 10.0), np.full((1, 1), 10.9), np.full((60, 1), 5.0)])
    rule, current = HpaRule(load, 1.0, 1.0, 15.0), 10
    seen = []
    for tick in range(len(load)):
        zero = np.zeros(1)
        current = int(
            rule.decide(View(tick, tick * 15.0, np.array([current]), np.array([current]), zero, zero))[0]
        )
        seen.append(current)
    assert set(seen[:50]) == {10}
    assert seen[-1] == 5


@pytest.mark.slow
def test_front_page_says_what_a_replay_gives_and_the_best_of_all_rules() -> None:
    """The cheapest short rule that keeps the default's share is named beside it, also where it is cheaper."""
    made = Replay(read_trace(EXAMPLE), ReplayConfig(load_time_s=120.0))
    rows = {name: made.outcome(name, 0.0)[0] for name in ("farthing", "keda", "published")}
    found = [(row["instance_hours"], row["slo"]) for row in rows.values()]
    best = made.best(rows["farthing"]["slo"])
    assert best is not None
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    told = " ".join(readme[readme.index("Scaling, by replay") :].split("\n\n")[0].split())
    for hours, share in (*found, best[:0:-1]):
        percent = f"{100 * share:.2f}".rstrip("0").rstrip(".")
        assert re.search(rf"{hours:,.0f}( replica-hours)? at {percent} %", told), (hours, share)


@pytest.mark.parametrize(("cold_start_s", "replicas"), [(10.0, 1), (120.0, 5), (600.0, 64), (1200.0, 20)])
def test_a_constant_load_changes_nothing(cold_start_s: float, replicas: int) -> None:
    """In half a day with 10 % of noise; `slow` tests the rest."""
    assert changes(cold_start_s, replicas, 72) == 0


@pytest.mark.slow
@pytest.mark.parametrize("cold_start_s", [10.0, 30.0, 120.0, 600.0, 1200.0])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 6, 8, 13, 20, 40, 64])
def test_a_constant_load_changes_nothing_in_two_days(cold_start_s: float, replicas: int) -> None:
    assert changes(cold_start_s, replicas, 288) == 0


def changes(cold_start_s: float, replicas: int, steps: int) -> int:
    """Changes of the fleet on a constant load that needs so many replicas at 80 %."""
    series = Series(0.0, 600.0, np.full(steps, 0.8 * replicas), "constant")
    made = Replay(series, ReplayConfig(load_time_s=cold_start_s, capacity=1.0))
    result = made.run(made.rule("farthing", 0.7))
    assert result.slo.min() > 0.999999
    return int(result.changes.max())


def test_noise_has_mean_one_and_its_own_seed() -> None:
    load = rate_load(Series(0, 600, np.full(144, 5.0)), 5.0, 3)
    assert load.mean() == pytest.approx(5.0, rel=0.01)
    assert load.std(axis=0) == pytest.approx(0.5, rel=0.1)
    assert not np.array_equal(load[:, 0], load[:, 1])


def test_example_needs_fewer_hours_than_any_short_rule() -> None:
    """The share in time is the policy's own, the parameters of the others are chosen in hindsight."""
    series = read_trace(EXAMPLE)
    assert isinstance(series, Series)
    made = Replay(series, ReplayConfig(load_time_s=600.0))
    row, _ = made.outcome("farthing", 0.995)
    assert row["slo"] > 0.97 and sum(row["rules"].values()) == pytest.approx(1.0, abs=0.01)
    best = made.best(row["slo"])
    assert best is not None and row["instance_hours"] < 1.03 * best[2]


def test_short_rules_are_what_they_say() -> None:
    load = np.array([[1.0], [5.0], [2.0], [2.0], [2.0]])
    assert trailing_max(load, 3)[:, 0].tolist() == [1, 5, 5, 5, 2]
    assert deviations(load, 2)[:, 0].tolist() == [1, 3 + 2 * 2, 3.5 + 2 * 1.5, 2, 2]


def test_cli_prints_one_json_document_with_every_policy() -> None:
    result = CliRunner().invoke(app, ["--seeds", "1", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert list(document["policies"]) == list(POLICIES)
    ours = document["policies"]["farthing"]
    for name, row in document["policies"].items():
        assert {"instance_hours", "slo", "parameters"} <= set(row)
        assert 0 <= row["slo"] <= 1 and row["instance_hours"] > 0
        if name.startswith("best-"):
            assert row["slo"] >= ours["slo"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "magic"], "magic"),
        (["none.csv"], "does not exist"),
        (["--utilization", "1.5"], "utilization"),
        (["--seeds", "0"], "seeds"),
        (["--capacity", "0"], "capacity"),
    ],
)
def test_cli_errors_name_the_problem(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_names_of_policies() -> None:
    assert base_of("best-hpa") == "hpa"
    with pytest.raises(ValueError, match="expected one of"):
        base_of("best-static")


def requests_file(path: Path, kind: str) -> Path:
    random = np.random.default_rng(0)
    at = np.sort(random.uniform(0, 1200, 900))
    if kind == "azure":
        lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
        lines += [f"2023-11-16 18:{int(t // 60):02d}:{t % 60:010.7f},300,50" for t in at]
    else:
        lines = [
            json.dumps({"timestamp": int(t * 1000), "input_length": 300, "output_length": 50}) for t in at
        ]
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return path


@pytest.mark.parametrize("kind", ["azure", "mooncake"])
def test_request_traces_are_recognized_and_replayed(tmp_path: Path, kind: str) -> None:
    path = requests_file(tmp_path / "trace.gz", kind)
    trace = read_trace(path)
    assert isinstance(trace, RequestTrace) and len(trace) == 900
    arguments = [str(path), "--policy", "static,hpa,farthing", "--seeds", "1", "--load-time", "60", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["policies"]
    assert rows["static"]["slo"] > 0.9
    assert rows["static"]["instance_hours"] > 0
    assert list(rows) == ["static", "hpa", "farthing"]


@pytest.mark.parametrize("option", [["--policy", "best-hpa"], ["--picture", "x.png"]])
def test_options_of_rate_traces_are_refused_for_requests(tmp_path: Path, option: list[str]) -> None:
    path = requests_file(tmp_path / "trace.gz", "azure")
    result = CliRunner().invoke(app, [str(path), *option])
    assert result.exit_code != 0
    assert "expected a rate trace for" in " ".join(result.output.split())


def test_the_rules_that_ran_are_named() -> None:
    result = CliRunner().invoke(app, ["--policy", "farthing"])
    assert result.exit_code == 0, result.output
    assert "% highest of" in " ".join(result.output.split())


def test_a_fleet_bills_drains_and_routes() -> None:
    trace = RequestTrace("t", np.array([0.0, 0.0, 1.0]), np.array([100, 100, 100]), np.array([10, 10, 10]))
    times = Times(prefill_s=0.001, base_s=0.01, share_s=0.0)
    fleet = Fleet(times, 60.0, 512)
    fleet.start(2)
    for job in requests_of(trace):
        fleet.route(0.0, job)
    assert [replica.requests for replica in fleet.replicas] == [2, 1]
    fleet.scale(1.0, 1)
    fleet.scale(2.0, 3)
    fleet.scale(3.0, 2)  # a starting one goes first
    fleet.settle(10.0)
    assert len(fleet.done) == 3 and fleet.current == 2 and fleet.changes == 3
    assert fleet.bill(10.0) == pytest.approx(10 + 10 + 8 + 1)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="noise: got inf; expected"):
        ReplayConfig(noise=float("inf"))


def test_errors_for_unknown_formats_list_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="TIMESTAMP,ContextTokens"):
        read_trace(path)
    path.write_text('{"timestamp": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_trace(path)


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "p.png"
    result = CliRunner().invoke(app, ["--seeds", "1", "--policy", "hpa", "--picture", str(target), "--json"])
    assert result.exit_code == 0, result.output
    assert target.read_bytes()[:4] == b"\x89PNG"
