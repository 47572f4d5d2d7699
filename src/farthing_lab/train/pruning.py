"""Progressive pruning: neurons and whole experts are removed gradually while the model trains.

The share of MLP parameters removed follows a cubic schedule. At every event, contributions are measured
(`need.py`) on fresh text and the units of the least energy per parameter, or those without which the loss
rises least (`need.py`), are removed, in any layer: a multiple of 32 neurons of every expert of a layer, of
a shared expert or of a dense MLP, or one expert of every router group of a layer. Parameters and optimizer
state shrink, so training gets faster too. While the model's perplexity exceeds its teacher's by more than a
bound, nothing is removed and the schedule waits.

Shapes: E experts, I neurons, D hidden, G router groups.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from farthing.files import replace_json
from farthing.model.forms import Feed
from farthing_lab.compress.masks import cubic_sparsity
from farthing_lab.train.evaluate import distillation, plot
from farthing_lab.train.export import load_checkpoint, save_checkpoint
from farthing_lab.train.finetune import (
    Settings,
    Sources,
    Text,
    adam,
    curve,
    determining,
    freeze_top,
    perplexity,
    provenance,
    weights_sha256,
)
from farthing_lab.train.loop import BaseHook, LoopConfig, Schedule, Trainer, check_start
from farthing_lab.train.model import MLP, DeepSeekLM, Linear, MoE, layer_sizes
from farthing_lab.train.need import (
    Activity,
    Cut,
    busy_share,
    information,
    measure,
    mlps,
    need_deciles,
    needed_share,
    needs,
    prices,
    random_twin,
    share_deciles,
    threshold,
)


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """How much is removed, when, and what pauses it."""

    target: float = 0.28  # share of the MLP parameters to remove
    begin: float = 0.02  # progress at which the schedule begins
    end: float = 0.6  # progress at which it ends; then the model recovers
    every: int = 6  # steps between events
    # What is removed: experts save memory, neurons arithmetic as well, because a token visits as many experts
    # as before.
    units: Literal["both", "neurons", "experts"] = "both"
    # Neurons are removed in multiples of this. The 4-bit kernels need a multiple of 32 inputs, and compute
    # multiples of 64 faster: with other widths, down projections stay 16-bit and decoding gets slower.
    multiple: int = 32
    # How units are ranked: by their energy, or by the rise of the loss without them on text of the training
    # files, which costs a few forward passes per event.
    rank: Literal["energy", "loss"] = "energy"
    tau: float = 0.3
    bound: float = 0.03  # pause above this relative increase of perplexity over the teacher's
    # Tokens of a removed expert go to the next best one, so less is lost than the expert's energy.
    expert_share: float = 0.3
    calibration_windows: int = 16
    price_windows: int = 8  # of those, on which removals are tried
    lr: float = 3e-4
    hard: float = 0.5  # weight of the text's cross entropy in the loss; the rest is distillation
    mtp_weight: float = 0.3
    mtp_share: float = 0.25

    def __post_init__(self) -> None:
        for name in ("target", "begin", "end", "hard"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a share in [0, 1]")
        for name in ("tau", "bound"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a number >= 0")
        if self.end <= self.begin:
            raise ValueError(f"end: got {self.end}; expected more than begin = {self.begin}")
        for name in ("every", "multiple", "calibration_windows", "price_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least 1")


def mlp_parameters(model: DeepSeekLM) -> int:
    """Parameters of all gate, up and down projections, without routers."""
    total = 0
    for _, module in mlps(model):
        if isinstance(module, MoE):
            total += module.gate_up.numel() + module.down.numel()
        else:
            total += sum(p.weight.numel() for p in (module.gate_proj, module.up_proj, module.down_proj))
    return total


def candidates(model: DeepSeekLM, activities: dict[str, Activity], config: PruneConfig) -> Iterator[Cut]:
    """Every possible removal."""
    layer_energy = _layer_energy(activities)
    for name, module in mlps(model):
        activity = activities[name]
        whole = layer_energy[_layer(name)]
        per_neuron = 3 * _hidden(module)
        experts, width = activity.energy.shape
        if width > config.multiple and config.units != "experts":
            ordered = activity.energy.sort(dim=1)
            keep = ordered.indices[:, config.multiple :].sort(dim=1).values
            cost = float(ordered.values[:, : config.multiple].sum()) / whole
            yield Cut(name, "neurons", keep, cost, experts * config.multiple * per_neuron)
        if config.units == "neurons":
            continue
        if isinstance(module, MoE) and (kept := _experts_to_keep(module, activity)) is not None:
            gone = torch.ones(experts, dtype=torch.bool)
            gone[kept] = False
            cost = float(activity.energy[gone].sum()) / whole * config.expert_share
            yield Cut(name, "experts", kept, cost, int(gone.sum()) * width * per_neuron)


def _experts_to_keep(module: MoE, activity: Activity) -> Tensor | None:
    """All but the lowest-energy expert of each group, or None if routing would need more."""
    rule, experts = module.gate.rule, len(module.down)
    left = experts // rule.num_groups - 1
    if left < min(2, experts) or left * rule.top_k_groups < rule.top_k:
        return None
    worth = activity.energy.sum(1).view(rule.num_groups, -1)
    best = worth.topk(left, dim=1).indices + torch.arange(rule.num_groups)[:, None] * worth.shape[1]
    return best.flatten().sort().values


def _layer(name: str) -> str:
    return name.removesuffix(".shared_experts")


def _layer_energy(activities: dict[str, Activity]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, activity in activities.items():
        found[_layer(name)] = found.get(_layer(name), 0.0) + float(activity.energy.sum())
    return found


def _hidden(module: MLP | MoE) -> int:
    return module.down.shape[1] if isinstance(module, MoE) else module.down_proj.weight.shape[0]


def apply_cut(model: DeepSeekLM, cut: Cut, optimizers: list[torch.optim.Optimizer]) -> None:
    """Shrink the parameters, their optimizer state and the model's config."""
    module = model.get_submodule(cut.name)
    keep = cut.keep
    if isinstance(module, MLP):
        rows = keep[0]
        for part in (module.gate_proj, module.up_proj):
            _cut(part.weight, lambda t: t[rows], optimizers)
        _cut(module.down_proj.weight, lambda t: t[:, rows], optimizers)
    elif isinstance(module, MoE) and cut.kind == "neurons":
        e = torch.arange(len(keep))[:, None]
        _cut(module.gate_up, lambda t: t.transpose(1, 2)[e, keep].transpose(1, 2), optimizers)
        _cut(module.down, lambda t: t.transpose(1, 2)[e, keep].transpose(1, 2), optimizers)
    elif isinstance(module, MoE):
        for p in (module.gate_up, module.down, module.gate.weight):
            _cut(p, lambda t: t[keep], optimizers)
        gate = module.gate
        gate.e_score_correction_bias = gate.e_score_correction_bias[keep].clone()
        gate.load = gate.load[keep].clone()
        gate.rule = dataclasses.replace(gate.rule, num_experts=len(keep))
    model.cfg = dataclasses.replace(model.cfg, feeds=feeds_of(model))


def _cut(p: Tensor, f: Callable[[Tensor], Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
    old = p.shape
    for optimizer in optimizers:
        state = optimizer.state.get(p, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == old:
                state[key] = f(value).contiguous()
    p.grad = None
    p.data = f(p.data).contiguous()


def feeds_of(model: DeepSeekLM) -> tuple[Feed, ...]:
    """The feed-forwards of the model's config with the current sizes of every layer, MTP layer last."""
    blocks = [*model.layers, *([model.mtp.block] if model.mtp is not None else [])]
    found = []
    for feed, block in zip(model.cfg.feeds, blocks, strict=False):
        mlp = block.mlp
        if isinstance(mlp, MoE):
            shared = mlp.shared_experts.gate_proj
            assert isinstance(shared, Linear)
            found.append(_sized(feed, mlp.gate_up.shape[0], mlp.gate_up.shape[2], shared.weight.shape[0]))
        else:
            assert isinstance(mlp, MLP)
            found.append(dataclasses.replace(feed, width=mlp.gate_proj.weight.shape[0]))
    return (*found, *model.cfg.feeds[len(found) :])


def _sized(feed: Feed, count: int, width: int, shared: int) -> Feed:
    assert feed.experts is not None
    router = dataclasses.replace(feed.experts.router, num_experts=count)
    experts = dataclasses.replace(feed.experts, router=router, width=width, shared=shared)
    return dataclasses.replace(feed, experts=experts)


class PruneHook(BaseHook):
    """Follows the schedule: measures, removes, and waits while the loss is too high."""

    def __init__(self, config: PruneConfig, text: Text, settings: Settings, start: int, console: Console):
        self.config, self.text, self.settings, self.console = config, text, settings, console
        self.start = start  # MLP parameters at the start
        self.rise = 0.0  # smoothed, nats per token
        self.waited = 0.0  # progress by which the schedule lags
        self.last = 0.0  # progress at the last event
        self.events: list[dict[str, Any]] = []

    def before_step(self, trainer: Trainer) -> None:
        """Prune if an event is due."""
        if trainer.step % self.config.every or trainer.progress < self.config.begin:
            return
        model = model_of(trainer.model)
        since, self.last = trainer.progress - self.last, trainer.progress
        if torch.tensor(self.rise).expm1() > self.config.bound:
            self.waited += since
            self._note(trainer, {"event": "wait", "removed": self.removed(model)})
            return
        wanted = self._wanted(trainer.progress - self.waited)
        if self.removed(model) >= wanted:
            return
        batch = self.text.batches.next(self.config.calibration_windows, self.settings.window)
        activities = measure(model, batch, self.config.tau)
        busy = busy_share(activities)
        known: dict[tuple[str, str, int], float] = {}
        while self.removed(model) < wanted:
            choices = self._priced(model, candidates(model, activities, self.config), batch, known)
            cut = min(choices, key=lambda c: c.cost / c.parameters, default=None)
            if cut is None:
                break
            apply_cut(model, cut, trainer.optimizers)
            seen = activities[cut.name]
            (seen.keep_neurons if cut.kind == "neurons" else seen.keep_experts)(cut.keep)
            what = {
                "event": cut.kind,
                "name": cut.name,
                "kept": cut.keep.shape[-1],
                "cost": round(cut.cost, 5),
            }
            self._note(trainer, what | {"removed": round(self.removed(model), 4), "busy": round(busy, 4)})

    def _priced(
        self, model: DeepSeekLM, cuts: Iterator[Cut], tokens: Tensor, known: dict[tuple[str, str, int], float]
    ) -> list[Cut]:
        """The cuts with their cost by `config.rank`. Rises of the loss are kept in `known` for this event."""
        found = list(cuts)
        if self.config.rank == "energy":
            return found
        new = [cut for cut in found if _key(cut) not in known]
        rises = prices(model, new, tokens[: self.config.price_windows], self.config.mtp_weight)
        known |= {_key(cut): rise for cut, rise in zip(new, rises, strict=True)}
        return [dataclasses.replace(cut, cost=known[_key(cut)]) for cut in found]

    def after_step(self, trainer: Trainer) -> None:
        """Update the smoothed rise of the loss."""
        self.rise = 0.9 * self.rise + 0.1 * trainer.metrics["rise"]
        trainer.metrics["removed"] = self.removed(model_of(trainer.model))

    @property
    def paused(self) -> bool:
        """Whether the bound held an event back."""
        return any(event["event"] == "wait" for event in self.events)

    def removed(self, model: DeepSeekLM) -> float:
        """Share of the MLP parameters removed."""
        return 1 - mlp_parameters(model) / self.start

    def _wanted(self, progress: float) -> float:
        scale = 1_000_000  # the schedule counts whole steps
        begin, end = int(self.config.begin * scale), int(self.config.end * scale)
        return cubic_sparsity(int(progress * scale), begin, end, self.config.target)

    def _note(self, trainer: Trainer, what: dict[str, Any]) -> None:
        row = {"step": trainer.step, "tokens": trainer.tokens, "rise": round(self.rise, 5), **what}
        self.events.append(row)
        self.console.print(" ".join(f"{k}={v}" for k, v in row.items()))

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position, and the sizes needed to build the model before loading it."""
        return {
            "rise": self.rise, "waited": self.waited, "last": self.last, "events": self.events,
            "start": self.start,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position."""
        for name in ("rise", "waited", "last", "events", "start"):
            setattr(self, name, state[name])


def _key(cut: Cut) -> tuple[str, str, int]:
    return cut.name, cut.kind, cut.keep.shape[-1]


def model_of(module: nn.Module) -> DeepSeekLM:
    """The trainer's model, which is a DeepSeekLM here."""
    assert isinstance(module, DeepSeekLM)
    return module


# `farthing train prune`: shrink a trained checkpoint.

NEED_WINDOWS = 16  # of held-out text on which the need of every slice is measured


def build(
    settings: Settings,
    config: PruneConfig,
    console: Console,
    resume: bool = False,
    sources: Sources | None = None,
) -> tuple[Trainer, Text, DeepSeekLM]:
    """A trainer ready to run (or, with `resume`, to load), its text, and the unpruned teacher."""
    torch.manual_seed(settings.seed)
    text = Text.load(settings, console, sources)
    teacher = load_checkpoint(settings.model).to(settings.device).eval()
    student = copy.deepcopy(teacher)
    start = mlp_parameters(student)
    if resume:
        student = _with_sizes_of(settings, student)
    for model in (teacher, student):
        model.set_compute_dtype(torch.bfloat16)
    freeze_top(student)
    optimizer = adam([{"params": [p for p in student.parameters() if p.requires_grad], "lr": config.lr}])
    loop = LoopConfig(
        settings.out, None, settings.tokens, Schedule(warmup=0.02, decay=0.5), threads=settings.threads,
        eval_minutes=1.0, save_minutes=2.0,
    )  # fmt: skip

    def loss(module: nn.Module, tokens: Tensor, trainer: Trainer) -> dict[str, Tensor]:
        return distillation(
            model_of(module), teacher, tokens, config.hard, config.mtp_weight, config.mtp_share
        )

    def score(trainer: Trainer) -> dict[str, float]:
        value = perplexity(model_of(trainer.model), text.heldout, settings.window, settings.eval_tokens)
        return {"perplexity": value}

    trainer = Trainer(
        student, [optimizer], text.batches, lambda t: text.micro_batches(settings), loss, loop,
        [PruneHook(config, text, settings, start, console)], evaluate=score, console=console,
    )  # fmt: skip
    return trainer, text, teacher


def _with_sizes_of(settings: Settings, model: DeepSeekLM) -> DeepSeekLM:
    """A model with the sizes that the interrupted run had reached."""
    file = settings.out / "state.pt"
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["model"]
    feeds = []
    for i, feed in enumerate(model.cfg.feeds):
        prefix = f"layers.{i}.mlp." if i < model.cfg.num_hidden_layers else "mtp.block.mlp."
        if f"{prefix}gate_up" in state:
            experts, _, width, _ = state[f"{prefix}gate_up"].shape
            feeds.append(_sized(feed, experts, width, len(state[f"{prefix}shared_experts.gate_proj.weight"])))
        elif f"{prefix}gate_proj.weight" in state:
            feeds.append(dataclasses.replace(feed, width=len(state[f"{prefix}gate_proj.weight"])))
        else:
            feeds.append(feed)  # of an MTP layer that the model does not have
    return DeepSeekLM(dataclasses.replace(model.cfg, feeds=tuple(feeds))).to(settings.device)


def train_prune(
    settings: Settings, config: PruneConfig, resume: bool = False, console: Console | None = None
) -> dict[str, Any] | None:
    """Prune a checkpoint: write OUT/checkpoint, OUT/prune.json and OUT/prune.png.

    Returns the summary, or None if interrupted (state is saved).
    """
    console = console or Console(stderr=True)
    sources = Sources.read(settings)
    given = determining(settings, config, sources)
    check_start(settings.out / "state.pt", given, resume)
    trainer, text, teacher = build(settings, config, console, resume, sources)
    trainer.settings = given
    if resume:
        trainer.load()
    if not trainer.run():
        return None
    model, hook = model_of(trainer.model), trainer.hooks[0]
    assert isinstance(hook, PruneHook)
    removed = hook.removed(model)
    if removed < config.target:
        console.print(
            f"removed {removed:.1%} (target {config.target:.1%}): "
            + ("paused by --bound" if hook.paused else "nothing more to remove in a run of this length")
        )
    before = perplexity(teacher, text.heldout, settings.window, settings.eval_tokens)
    after = perplexity(model, text.heldout, settings.window, settings.eval_tokens)
    out = settings.out / "checkpoint"
    summary: dict[str, Any] = {
        "removed": removed,
        "target": config.target,
        "activity": _activity(teacher, model, text, settings, config),
        "perplexity": {"before": before, "after": after},
        "relative_increase": after / before - 1,
        "bound": config.bound,
        "within_bound": after / before - 1 <= config.bound,
        "weights_bytes": save_checkpoint(model, text.tokenizer, out, source=settings.model),
        **provenance(settings, config, text, sources),
        "checkpoint_sha256": weights_sha256(out),
        "layer_sizes": layer_sizes(model.cfg),
        "minutes": trainer.active_seconds / 60,
        "tokens": trainer.tokens,
        "budgets": trainer.budgets,
        "events": hook.events,
        "curve": trainer.record,
    }
    replace_json(settings.out / "prune.json", summary)
    steps = [(0.0, 0.0), *((e["tokens"], e["removed"]) for e in hook.events), (trainer.tokens, removed)]
    plot(
        settings.out / "prune.png", {"held-out": curve(trainer, "perplexity")}, "perplexity",
        {"removed": steps}, "share of MLP parameters removed", {"unpruned": summary["perplexity"]["before"]},
    )  # fmt: skip
    return summary


def _activity(
    teacher: DeepSeekLM, model: DeepSeekLM, text: Text, settings: Settings, config: PruneConfig
) -> dict[str, Any]:
    """Activity and need of the neurons on held-out text: before, after, and with random weights."""
    ids = [d for d in text.heldout if len(d) > settings.window][:NEED_WINDOWS]
    rows = [torch.from_numpy(d[: settings.window + 1].astype("int64")) for d in ids]
    tokens = torch.stack(rows).to(settings.device)
    models = {"before": teacher, "after": model, "random": random_twin(teacher, settings.seed)}
    slices = {name: needs(net, tokens) for name, net in models.items()}
    least = threshold(slices["before"])
    activities = {name: measure(net, tokens, config.tau) for name, net in models.items()}
    return {
        "definition": "|h_j| ||W_down[:, j]|| > tau * the token's mean over the MLP's neurons",
        "tau": config.tau,
        "on_at_least": 0.5,
        "tokens": tokens.shape[0] * settings.window,
        "busy_neurons": {name: busy_share(found) for name, found in activities.items()},
        "active_share_deciles": {name: share_deciles(found) for name, found in activities.items()},
        "need_definition": "information about the text (nats per token better than token frequencies) lost "
        "without a slice of neurons, less two standard errors, per share of the MLP parameters",
        "information": {name: float(information(net, tokens).mean()) for name, net in models.items()},
        "need_threshold": least,
        "needed_parameters": {name: needed_share(found, least) for name, found in slices.items()},
        "need_deciles": {name: need_deciles(found) for name, found in slices.items()},
        "need_slices": {
            name: [[s.name, s.parameters, round(s.need, 5), s.need >= least] for s in found]
            for name, found in slices.items()
            if name != "random"
        },
    }
