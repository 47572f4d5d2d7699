"""`farthing train prune`: shrink a trained checkpoint."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from farthing.files import replace_json
from farthing.model.config import LayerSizes
from farthing.train.activity import busy_share, measure, share_deciles
from farthing.train.distill import distillation
from farthing.train.export import load_checkpoint, save_checkpoint
from farthing.train.finetune import (
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
from farthing.train.loop import LoopConfig, Schedule, Trainer
from farthing.train.model import DeepSeekLM
from farthing.train.need import information, need_deciles, needed_share, needs, random_twin, threshold
from farthing.train.picture import plot
from farthing.train.pruning import PruneConfig, PruneHook, mlp_parameters, model_of
from farthing.train.resume import check_start

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
    sizes = []
    for i in range(model.cfg.num_hidden_layers + model.cfg.num_nextn_predict_layers):
        prefix = f"layers.{i}.mlp." if i < model.cfg.num_hidden_layers else "mtp.block.mlp."
        if f"{prefix}gate_up" in state:
            experts, _, width, _ = state[f"{prefix}gate_up"].shape
            shared = len(state[f"{prefix}shared_experts.gate_proj.weight"])
            sizes.append(LayerSizes(None, experts, width, shared))
        else:
            sizes.append(LayerSizes(len(state[f"{prefix}gate_proj.weight"])))
    return DeepSeekLM(dataclasses.replace(model.cfg, layer_sizes=tuple(sizes))).to(settings.device)


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
        "layer_sizes": [dataclasses.asdict(s) for s in model.cfg.layer_sizes],
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
