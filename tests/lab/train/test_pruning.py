"""Activity, pruning, schedule, back-off, resuming, and serving the result."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from typer.testing import CliRunner

from farthing.cli.errors import Exit
from farthing.hub import resolve_model
from farthing.model.config import ConfigError, ModelConfig
from farthing.model.inspect import model_cost
from farthing.model.load import load
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing_lab.cli.train import app
from farthing_lab.train.export import load_checkpoint, save_checkpoint
from farthing_lab.train.model import DeepSeekLM, MoE
from farthing_lab.train.need import Activity, Cut, measure, mlps, prices
from farthing_lab.train.pruning import (
    PruneConfig,
    PruneHook,
    apply_cut,
    build,
    candidates,
    feeds_of,
    mlp_parameters,
    train_prune,
)
from tests.lab.train.conftest import changed, learn, random_checkpoint, settings_of

QUIET = Console(quiet=True)


@pytest.fixture
def model(tiny: ModelConfig) -> DeepSeekLM:
    """Random weights of plausible size."""
    torch.manual_seed(0)
    made = DeepSeekLM(tiny)
    for p in made.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return made.eval()


def test_activity_matches_its_definition() -> None:
    activity = Activity.empty(2, 3, tau=0.5)
    c = torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0], [0.0, 0.0, 9.0]])
    activity.add(c, torch.tensor([0, 0, 1]), torch.tensor([2.0, 1.0, 1.0]))
    assert activity.tokens.tolist() == [2, 1]
    assert activity.active.tolist() == [[1, 2, 2], [0, 0, 1]]  # means are 3, 3 and 3: above 1.5
    assert activity.energy.tolist() == [[4 + 9, 16 + 9, 144 + 9], [0, 0, 81]]
    assert activity.busy() == pytest.approx(4 / 6)


def test_measured_contributions_match_the_model(model: DeepSeekLM) -> None:
    tokens = torch.randint(0, model.cfg.vocab_size, (2, 17))
    found = measure(model, tokens, 0.3)
    assert {name for name, _ in mlps(model)} == found.keys()
    assert int(found["layers.0.mlp"].tokens) == 32
    assert int(found["layers.1.mlp"].tokens.sum()) == 32 * model.cfg.num_experts_per_tok
    seen: list[torch.Tensor] = []
    model.layers[0].mlp.tap = lambda h: seen.append(h.flatten(0, 1))
    with torch.no_grad():
        model(tokens[:, :-1])
    model.layers[0].mlp.tap = None
    energy = (seen[0].square() * model.layers[0].mlp.down_proj.weight.square().sum(0)).sum(0)
    torch.testing.assert_close(found["layers.0.mlp"].energy[0], energy.detach(), rtol=1e-4, atol=1e-5)


def test_dropping_neurons_without_weights_changes_nothing(model: DeepSeekLM) -> None:
    tokens = torch.randint(0, model.cfg.vocab_size, (1, 20))
    keep = torch.arange(32)[torch.arange(32) % 2 == 0].expand(8, -1)
    moe = model.layers[1].mlp
    with torch.no_grad():
        moe.down[:, :, 1::2] = 0
    before = model(tokens)
    apply_cut(model, Cut("layers.1.mlp", "neurons", keep, 0.0, 0), [])
    torch.testing.assert_close(model(tokens), before)
    assert model.cfg.feed(1).experts.width == 16


def test_dropping_experts_preserves_the_others(model: DeepSeekLM) -> None:
    """Experts excluded by the bias are never selected, so their removal changes nothing."""
    tokens = torch.randint(0, model.cfg.vocab_size, (1, 20))
    gone = torch.tensor([1, 3, 4, 7])  # one of each of four groups
    moe = model.layers[2].mlp
    # Two experts per group: the group's score is their sum, so the excluded one must not sink its group.
    moe.gate.rule = dataclasses.replace(moe.gate.rule, top_k_groups=4)
    moe.gate.e_score_correction_bias[gone] = -100.0
    before = model(tokens)
    keep = torch.tensor([0, 2, 5, 6])
    apply_cut(model, Cut("layers.2.mlp", "experts", keep, 0.0, 0), [])
    torch.testing.assert_close(model(tokens), before)


def test_optimizer_state_shrinks_with_its_parameter(model: DeepSeekLM) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters()], lr=1e-3)
    model.train().loss(torch.randint(0, model.cfg.vocab_size, (2, 17)), 0.3)["loss"].backward()
    optimizer.step()
    moe = model.layers[1].mlp
    state = optimizer.state[moe.down]["exp_avg"].clone()
    keep = torch.stack([torch.randperm(32)[:16].sort().values for _ in range(8)])
    apply_cut(model, Cut("layers.1.mlp", "neurons", keep, 0.0, 0), [optimizer])
    for e in range(8):
        assert torch.equal(optimizer.state[moe.down]["exp_avg"][e], state[e][:, keep[e]])
    optimizer.step()  # shapes agree


def test_candidates_keep_routing_possible(model: DeepSeekLM) -> None:
    activities = measure(model, torch.randint(0, model.cfg.vocab_size, (2, 33)), 0.3)
    cuts = list(candidates(model, activities, PruneConfig(multiple=8)))
    assert all(c.kind == "neurons" for c in cuts)  # two experts per group, and a group needs two
    assert all(0 <= c.cost <= 1 and c.parameters > 0 for c in cuts)
    before = mlp_parameters(model)
    apply_cut(model, cuts[0], [])
    assert before - mlp_parameters(model) == cuts[0].parameters


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("layers.0.mlp", "neurons"),
        ("layers.1.mlp", "neurons"),
        ("layers.2.mlp.shared_experts", "neurons"),
        ("mtp.block.mlp", "neurons"),
        ("layers.2.mlp", "experts"),
    ],
)
def test_a_cut_is_priced_as_it_will_be(
    model: DeepSeekLM, name: str, kind: Literal["neurons", "experts"]
) -> None:
    tokens = torch.randint(0, model.cfg.vocab_size, (3, 19))
    module = model.get_submodule(name)
    if kind == "experts":
        module.gate.rule = dataclasses.replace(module.gate.rule, top_k_groups=4)  # type: ignore[union-attr]
        keep = torch.tensor([0, 3, 4, 6])  # one of two in each group, which scores the sum of its two best
        module.gate.e_score_correction_bias.zero_()  # type: ignore[union-attr]
    else:
        experts, width = measure(model, tokens, 0.3)[name].energy.shape
        keep = torch.stack([torch.randperm(width)[: width // 2].sort().values for _ in range(experts)])
    cut, state = Cut(name, kind, keep, 0.0, 1), copy.deepcopy(model.state_dict())
    other = Cut("layers.0.mlp", "neurons", torch.arange(model.cfg.intermediate_size)[None, 8:], 0.0, 1)
    price = prices(model, [other, cut], tokens, 0.3)[1]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    before = losses(model, tokens)
    apply_cut(model, cut, [])
    rise = [after - own for after, own in zip(losses(model, tokens), before, strict=True)]
    assert price == pytest.approx(0.3 * rise[1] if name.startswith("mtp") else rise[0], rel=1e-3, abs=1e-6)
    assert price != 0


def losses(model: DeepSeekLM, tokens: torch.Tensor) -> tuple[float, float]:
    """Next token and draft."""
    with torch.no_grad():
        hidden = model(tokens[:, :-1])
        guess = model.draft(hidden[:, :-1], tokens[:, 1:-1])
        return tuple(  # type: ignore[return-value]
            float(F.cross_entropy(model.logits(h).flatten(0, 1), tokens[:, at:].flatten()))
            for at, h in ((1, hidden), (2, guess))
        )


def test_units_of_least_measured_loss_go_first(checkpoint: Path, tmp_path: Path, sources: Path) -> None:
    settings = settings_of(checkpoint, tmp_path / "run", sources)
    learn(checkpoint, settings)
    config = PruneConfig(every=1, multiple=8, rank="loss", calibration_windows=4, price_windows=3)
    trainer, text, _ = build(settings, config, QUIET)
    model, hook = trainer.model, trainer.hooks[0]
    assert isinstance(model, DeepSeekLM) and isinstance(hook, PruneHook)
    position = text.batches.state_dict()
    batch = text.batches.next(config.calibration_windows, settings.window)
    text.batches.load_state_dict(position)
    cuts = list(candidates(model, measure(model, batch, config.tau), config))
    rises = prices(model, cuts, batch[:3], config.mtp_weight)
    best = min(range(len(cuts)), key=lambda i: rises[i] / cuts[i].parameters)
    trainer.tokens = settings.tokens // 10
    hook.before_step(trainer)
    event = hook.events[0]
    assert event["name"] == cuts[best].name and event["cost"] == pytest.approx(rises[best], abs=1e-5)


def test_run_prunes_and_the_engine_serves_the_result(
    checkpoint: Path,
    tmp_path: Path,
    sources: Path,
) -> None:
    settings = settings_of(checkpoint, tmp_path / "run", sources)
    config = PruneConfig(target=0.3, every=1, multiple=8, bound=10.0, calibration_windows=2)
    summary = train_prune(settings, config, console=QUIET)
    assert summary is not None and summary["removed"] >= 0.3
    shares = [e["removed"] for e in summary["events"]]
    assert shares == sorted(shares) and len(shares) > 3
    assert {"definition", "tau", "on_at_least", "busy_neurons"} <= summary["activity"].keys()
    out = tmp_path / "run" / "checkpoint"
    small = json.loads((out / "config.json").read_text())
    assert len(small["layer_sizes"]) == 4
    assert (out / "model.safetensors").stat().st_size < (checkpoint / "model.safetensors").stat().st_size
    _engine_agrees(out, load_checkpoint(out).eval())


def _engine_agrees(out: Path, trained: DeepSeekLM) -> None:
    ids = torch.randint(3, 300, (1, 24))
    with torch.no_grad():
        expected = trained.logits(trained(ids))[0]
    model = load(out, select("reference"))
    hidden = model.forward(ids[0], make_batch([24], [0], [range(2)], 16), model.new_cache(2, 16, "float32"))
    torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-3, atol=1e-3)


def test_pruning_pauses_while_the_loss_is_above_its_bound(
    checkpoint: Path,
    tmp_path: Path,
    sources: Path,
) -> None:
    settings = settings_of(checkpoint, tmp_path / "run", sources)
    trainer, _, _ = build(settings, PruneConfig(every=1, multiple=8), QUIET)
    hook = trainer.hooks[0]
    assert isinstance(hook, PruneHook)
    hook.rise = 1.0
    trainer.tokens = settings.tokens // 2
    hook.before_step(trainer)
    assert hook.events[-1]["event"] == "wait" and hook.waited > 0
    assert mlp_parameters(trainer.model) == hook.start  # type: ignore[arg-type]
    hook.rise = 0.0
    trainer.tokens = settings.tokens * 3 // 4
    hook.before_step(trainer)
    late = hook.removed(trainer.model)  # type: ignore[arg-type]
    assert 0 < late < 0.28  # the schedule also waited


def test_harmful_pruning_backs_off(checkpoint: Path, tmp_path: Path, sources: Path) -> None:
    """A trained model without recovery (zero learning rate): only the bound stops pruning."""
    settings = dataclasses.replace(settings_of(checkpoint, tmp_path / "a", sources), tokens=64 * 20)
    learn(checkpoint, settings)
    config = PruneConfig(target=0.6, end=0.5, every=1, multiple=8, calibration_windows=2, lr=0.0)

    def run(bound: float, out: str) -> dict[str, object]:
        own = dataclasses.replace(settings, out=tmp_path / out)
        summary = train_prune(own, dataclasses.replace(config, bound=bound), console=QUIET)
        assert summary is not None
        return summary

    free, bounded = run(10.0, "free"), run(0.02, "bounded")
    assert free["removed"] >= 0.6 and all(e["event"] != "wait" for e in free["events"])  # type: ignore
    kinds = [e["event"] for e in bounded["events"]]  # type: ignore[attr-defined]
    assert kinds[0] != "wait" and kinds[-1] == "wait"
    assert 0 < bounded["removed"] < 0.6  # type: ignore[operator]
    rises = {e["event"] == "wait": e["rise"] for e in bounded["events"]}  # type: ignore[attr-defined]
    assert rises[True] > 0.0198 >= rises[False]  # log(1.02)


def test_whole_experts_are_removed_and_the_engine_routes_among_the_rest(
    wide: ModelConfig, tmp_path: Path, sources: Path
) -> None:
    cfg = changed(wide, n_group=2, topk_group=2)  # four experts per group: two may be removed
    model = random_checkpoint(cfg, tmp_path / "model", sources)
    config = PruneConfig(target=0.3, every=1, multiple=96, bound=10.0, calibration_windows=2)  # no neurons
    summary = train_prune(settings_of(model, tmp_path / "run", sources), config, console=QUIET)
    assert summary is not None and summary["removed"] >= 0.3
    assert {e["event"] for e in summary["events"]} == {"experts"}
    out = tmp_path / "run" / "checkpoint"
    trained = load_checkpoint(out).eval()
    left = [len(m.down) for _, m in mlps(trained) if isinstance(m, MoE)]
    assert min(left) < 8 and all(n in (4, 6, 8) for n in left)
    for (_, m), n in zip([x for x in mlps(trained) if isinstance(x[1], MoE)], left, strict=True):
        assert m.gate.weight.shape[0] == len(m.gate.e_score_correction_bias) == n  # type: ignore[union-attr]
    _engine_agrees(out, trained)


def test_interrupted_run_resumes_with_its_sizes(
    checkpoint: Path,
    tmp_path: Path,
    sources: Path,
) -> None:
    config = PruneConfig(target=0.3, every=1, multiple=8, bound=10.0, calibration_windows=2)

    def run(out: Path, pause: int | None) -> dict[str, torch.Tensor]:
        settings = settings_of(checkpoint, out, sources)
        trainer, _, _ = build(settings, config, QUIET)
        while trainer.progress < 1:
            if trainer.step == pause:
                trainer.save()
                trainer, _, _ = build(settings, config, QUIET, resume=True)
                trainer.load()
                pause = None
            trainer.train_step()
        return trainer.model.state_dict()

    whole, parted = run(tmp_path / "a", None), run(tmp_path / "b", 4)
    assert whole.keys() == parted.keys()
    assert all(torch.equal(whole[name], parted[name]) for name in whole if not name.endswith("load"))


def test_sizes_round_trip_through_the_checkpoint(model: DeepSeekLM, tmp_path: Path, sources: Path) -> None:
    from farthing_lab.train import data

    keep = torch.arange(24).expand(8, -1)
    apply_cut(model, Cut("mtp.block.mlp", "neurons", keep, 0.0, 0), [])
    apply_cut(model, Cut("layers.0.mlp", "neurons", torch.arange(40)[None], 0.0, 0), [])
    apply_cut(model, Cut("layers.1.mlp.shared_experts", "neurons", torch.arange(16)[None], 0.0, 0), [])
    tokenizer = data.train_tokenizer((d.text for d in data.find_sources(sources)), model.cfg.vocab_size)
    save_checkpoint(model, tokenizer, tmp_path / "out", fp8=False)
    again = load_checkpoint(tmp_path / "out")
    assert again.cfg.feeds == feeds_of(model) == model.cfg.feeds
    moe = again.layers[1].mlp
    assert isinstance(moe, MoE) and moe.shared_experts.down_proj.weight.shape[1] == 16


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{}], "layer_sizes has 1 entries; expected one per layer, 6"),
        ([{"width": 3}] * 6, "expected a list of objects"),
        ([{"intermediate_size": 0}] * 6, r"layer_sizes\[0\].intermediate_size: got 0"),
        ([{"n_routed_experts": 20}] * 6, "n_group: got 8; expected a divisor of n_routed_experts = 20"),
    ],
)
def test_errors_name_wrong_layer_sizes(value: list[dict[str, int]], message: str) -> None:
    raw = json.loads((resolve_model("mite") / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(raw | {"layer_sizes": value})


def test_inspect_counts_the_parameters_of_unequal_layers() -> None:
    raw = json.loads((resolve_model("mite") / "config.json").read_text())
    whole = model_cost(ModelConfig.from_json(raw))
    own = [{"intermediate_size": 600}, {"n_routed_experts": 24}, {"moe_intermediate_size": 48}, {}, {}, {}]
    small = model_cost(ModelConfig.from_json(raw | {"layer_sizes": own}))
    experts = 8 * 3 * 64 * 256 + 8 * 256 + 8  # including their router rows
    width = (32 + 1) * 3 * 16 * 256
    assert whole.total_parameters - small.total_parameters == 40 * 3 * 256 + experts + width
    assert whole.active_routed_parameters - small.active_routed_parameters == 8 * 3 * 16 * 256


def test_command_fails_if_the_result_exceeds_its_bound(
    checkpoint: Path, tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ModelConfig.from_directory(checkpoint).feeds

    def measured(model: DeepSeekLM, *args: object) -> float:
        return 10.0 if model.cfg.feeds == whole else 10.34

    monkeypatch.setattr("farthing_lab.train.pruning.perplexity", measured)
    for i in range(200):  # one file in 25 is held out, by its hash
        lines = [f"x_{i}_{j} = {i * j} ** {j} + {i}  # number {j} of file {i}" for j in range(20)]
        (sources / f"more_{i:03}.py").write_text("\n".join(lines))
    arguments = [
        "prune", str(checkpoint), "-o", str(tmp_path / "run"), "--data", str(sources), "--target", "0.5",
        "--tokens", "640", "--window", "32", "--batch-tokens", "64", "--eval-tokens", "64", "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [*arguments, "--bound", "0.03"])
    summary = json.loads(result.stdout)
    assert not summary["within_bound"] and summary["relative_increase"] == pytest.approx(0.034)
    assert result.exit_code == Exit.WORSE
    assert "perplexity rose by 3.40%; the bound is 3.00% (--bound)" in result.stderr
    assert (tmp_path / "run" / "checkpoint" / "config.json").is_file()
    arguments[3] = str(tmp_path / "wide")
    assert CliRunner().invoke(app, [*arguments, "--bound", "0.035"]).exit_code == Exit.DONE
