"""The short-term level: members use no future data; the mixture follows the best and keeps its coverage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from farthing_fleet.forecast.base import Series
from farthing_fleet.forecast.growth import FEATURES, History, memory, trailing_max
from farthing_fleet.forecast.lstm import LSTM, LSTMConfig, Network, Pretrained
from farthing_fleet.forecast.members import Member, quantile_fit
from farthing_fleet.forecast.short import (
    BLOCKS,
    MIXTURE,
    SHORT_MODELS,
    Mixture,
    ShortConfig,
    ShortLevel,
    ShortTerm,
    capped,
    make_members,
    walk,
)
from farthing_lab.replay.backtest import backtest_short


def walks(steps: int, runs: int = 1, seed: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    """Random-walk loads."""
    moves = np.random.default_rng(seed).normal(0, 0.02, (steps, runs))
    return np.asarray(100 * np.exp(np.cumsum(moves, axis=0) * 0.5))


@pytest.mark.parametrize("name", [*MIXTURE, *BLOCKS])
def test_members_use_no_future_data(name: str) -> None:
    load = walks(900, 2)
    other = load.copy()
    other[700:] *= 3
    made = []
    for values in (load, other):
        (member,) = make_members(ShortConfig(model=name))
        member.fit(History(values[:600], 60.0, 600.0))
        made.append(member.quantiles(History(values, 60.0, 600.0), 600)[:100])
    assert made[0].shape == (100, 2, 2)
    assert np.array_equal(made[0], made[1])
    assert np.isfinite(made[0]).all() and (made[0][..., 1] >= made[0][..., 0] - 1e-12).all()


@pytest.mark.parametrize("name", [*MIXTURE, *BLOCKS])
def test_members_forecast_the_same_incrementally_and_at_once(name: str) -> None:
    """A controller's forecasts per minute equal a replay's over days."""
    load = walks(4000)
    whole = History(load, 60.0, 600.0)
    first, second = (make_members(ShortConfig(model=name))[0] for _ in range(2))
    for member in (first, second):
        member.fit(whole.head(3500))
    at_once = first.quantiles(whole, 3900)
    for row in (0, 7, 99):
        now = whole.head(3901 + row)
        back = max(memory(now), 2880) + now.lead
        one = second.quantiles(now.tail(back + 1), back)
        assert np.allclose(one[-1], at_once[row], atol=2e-3), row


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
def test_features_ignore_the_scale_of_the_load(factor: float) -> None:
    load = walks(300)
    plain, scaled = History(load, 60.0, 600.0), History(load * factor, 60.0, 600.0)
    assert plain.features.shape == (300, 1, FEATURES)
    assert np.allclose(plain.features, scaled.features, atol=1e-6)
    assert np.allclose(plain.sequences, scaled.sequences, atol=1e-6)
    assert np.allclose(plain.target, scaled.target, atol=1e-6)


def test_zero_load_is_finite() -> None:
    history = History(np.zeros((200, 1)), 60.0, 600.0)
    made, _ = walk(history, ShortConfig())
    assert np.isfinite(made.p90).all() and (made.p90 < 1e-6).all()


def test_mixture_keeps_coverage_and_follows_the_best_member() -> None:
    random = np.random.default_rng(0)
    mixture, covered, lead = Mixture(2, 1, 5), [], 5
    truths = random.normal(0, 0.1, 8000)
    for step, truth in enumerate(truths):
        if step >= lead:
            mixture.learn(np.array([truths[step - lead]]))
        good, bad = truth + random.normal(0, 0.02), 0.3 * random.normal()
        mixed = mixture.step(np.array([[good], [bad]]), np.array([[good], [bad]]), np.ones(1))
        covered.append(truth <= mixed.p90[0])
    assert 0.86 <= np.mean(covered[1000:]) <= 0.94
    assert mixture.weights()[0, 0] > 0.95


def test_sum_of_members_with_independent_errors_is_calibrated_too() -> None:
    """Each covers 90 %; their mean, whose error is smaller, would cover 96 % with the same offsets."""
    random = np.random.default_rng(0)
    mixture, covered = Mixture(2, 1, 1), []
    for truth in random.normal(0, 0.1, 6000):
        members = truth + random.normal(0, 0.1, (2, 1))
        covered.append(truth <= mixture.step(members, members, np.ones(1)).p90[0])
        mixture.learn(np.array([truth]))
    assert 0.88 <= np.mean(covered[1000:]) <= 0.92


def test_gaps_of_the_traffic_do_not_spoil_the_mixture() -> None:
    values = np.full(288, 10.0)
    for gap in (slice(60, 66), slice(120, 140), slice(200, 240)):
        values[gap] = 0.0
    members = ("regression", "growth", "last-value")
    series, pinball = Series(0.0, 600.0, values), {}
    for name in ("mixture", *members):
        report = backtest_short(series, ShortConfig(model=name, members=members), 600.0)
        pinball[name] = report["pinball"]
    assert pinball["mixture"] <= 1.25 * min(pinball[name] for name in members)


def test_medians_have_weights_of_their_own() -> None:
    """The second member knows the median, the first the upper quantile."""
    mixture, truths = Mixture(2, 1, 1), np.random.default_rng(0).normal(0, 0.1, 2000)
    for truth in truths:
        medians, uppers = np.array([[-0.5], [0.0]]), np.array([[truth + 0.01], [0.13]])
        mixed = mixture.step(medians, uppers, np.ones(1))
        mixture.learn(np.array([truth]))
    assert abs(mixed.p50[0]) < 0.01
    assert mixed.weights[0, 0] > 0.95


def test_quantile_regression_finds_the_quantile() -> None:
    random = np.random.default_rng(1)
    rows = np.c_[random.normal(size=4000), np.ones(4000)]
    truth = 2 * rows[:, 0] + random.exponential(1.0, 4000)
    weights = quantile_fit(rows, truth, np.ones(4000), 0.9, np.zeros(2), 1e-3, 300)
    assert weights == pytest.approx([2.0, np.log(10)], abs=0.12)


def test_lstm_fine_tuning_learns_a_new_load() -> None:
    period = np.tile(np.r_[np.full(20, 50.0), np.full(20, 100.0)], 60)[:, None]
    load = period * np.random.default_rng(2).normal(1, 0.01, period.shape)
    history = History(load, 60.0, 600.0)
    lstm = LSTM([Network()], LSTMConfig(epochs=6, learning_rate=5e-3, least_leads=10))
    origins = history.tail(600)

    def loss(member: Member) -> float:
        miss = origins.target[:, 0] - member.quantiles(origins, 0)[: len(origins.target), 0, 1]
        return float(np.maximum(0.9 * miss, -0.1 * miss).mean())

    before = loss(lstm)
    lstm.fit(history.head(1800))
    assert loss(lstm) < 0.75 * before


def test_packaged_weights_load_and_others_are_rejected(tmp_path: Path) -> None:
    shipped = Pretrained.read()
    shipped.save(tmp_path / "again.safetensors")
    again = Pretrained.read(tmp_path / "again.safetensors")
    history = History(walks(200), 60.0, 600.0)
    assert np.allclose(shipped.lstm().quantiles(history, 100), again.lstm().quantiles(history, 100))
    wrong = Pretrained(shipped.networks, shipped.start, shipped.centre[:-1], shipped.spread[:-1])
    wrong.save(tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="features; expected"):
        Pretrained.read(tmp_path / "wrong.safetensors")


def test_forecast_names_the_dominant_member_and_its_weight() -> None:
    short = ShortTerm(ShortConfig(lead_s=600.0))
    assert short.forecast(0.0) is None
    load = walks(400)[:, 0]
    for minute, value in enumerate(load):
        short.observe(minute * 60.0, float(value))
        if minute == 200:
            assert short.retrain(minute * 60.0) and not short.retrain(minute * 60.0 + 60)
    made = short.forecast(len(load) * 60.0)
    assert made is not None and made.source in MIXTURE
    assert made.weight is not None and 0.2 <= made.weight <= 1
    assert made.p90[0] >= made.p50[0] > 0


def test_production_and_replay_run_the_same_level() -> None:
    load = walks(500)
    config = ShortConfig(lead_s=600.0, retrain_s=1e9)
    short = ShortTerm(config)
    for minute, value in enumerate([*load[:, 0], 0.0]):
        short.observe(minute * 60.0, float(value))
        if minute % 3 == 0:
            short.forecast(minute * 60.0)
    history = History(load, 60.0, 600.0)
    made, _ = walk(history, config)
    forecast = short.forecast(500 * 60.0)
    assert forecast is not None
    assert forecast.p90[0] == pytest.approx(capped(made.p90, history)[-1, 0], rel=2e-3)


@pytest.mark.parametrize("model", ["mixture", "growth"])
def test_bound_is_a_multiple_of_the_highest_load_from_the_first_minute(model: str) -> None:
    """Two minutes in ten have five times the load; a share of the highest load after six hours."""
    load = np.where(np.arange(480) % 10 < 2, 40.0, 8.0)[:, None]
    history = History(load, 60.0, 615.0)
    made, _ = walk(history, ShortConfig(model=model, retrain_s=1e9))
    bound, level = capped(made.p90, history), history.level
    assert (bound <= 2 * trailing_max(level, 480)).all()
    assert (bound[360:] <= level.max()).all()


def test_level_accepts_any_load_and_learns_in_order() -> None:
    history = History(walks(300, 3), 60.0, 600.0)
    config = ShortConfig(members=("growth", "last-value"))
    pieces = ShortLevel(make_members(config), 3, history.lead)
    at_once = ShortLevel(make_members(config), 3, history.lead)
    parts = [pieces.advance(history.head(end), begin) for begin, end in ((0, 100), (100, 101), (101, 300))]
    assert np.allclose(np.concatenate([p.p90 for p in parts]), at_once.advance(history, 0).p90)


@pytest.mark.parametrize("model", SHORT_MODELS)
def test_every_model_can_be_backtested(model: str) -> None:
    values = walks(400)[:, 0]
    report = backtest_short(Series(0.0, 600.0, values), ShortConfig(model=model), 600.0)
    assert {"wape", "coverage", "pinball", "skill_vs_last", "weights"} <= set(report)
    assert 0.75 <= report["coverage"] / 100 <= 1.0


def test_lead_of_seconds_is_forecast_on_a_grid_of_seconds() -> None:
    assert ShortConfig(lead_s=615.0).grid_s == ShortConfig(lead_s=60.0).grid_s == 60.0
    config = ShortConfig(lead_s=6.0)
    assert config.grid_s == 1.0
    level = ShortTerm(config)
    for second in range(40):  # a ramp
        level.observe(float(second), 5.0 + 0.2 * second)
    made = level.forecast(40.0)
    assert made is not None and made.step_s == 6.0  # before the first minute is over
    assert 12.8 < made.p90[0] < 25.0
