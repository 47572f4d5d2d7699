"""`farthing train mite --sparse-attention`: train an indexer for a dense checkpoint in the two stages of
DeepSeek-V3.2-Exp (section 2.1), shortened.

1. `warmup`: the model is frozen and dense; the indexers learn attention's distribution.
2. `sparse`: attention reads the selected keys; the model learns the text, the indexers the distribution over
   the selected keys.

A control, `dense`, trains the model without an indexer for as many steps as the second stage. Each stage is a
resumable run in its own directory.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from farthing.files import replace_json
from farthing.model.forms import Index
from farthing_lab.train.data import Ids
from farthing_lab.train.export import from_tensors, load_checkpoint, save_checkpoint, to_tensors
from farthing_lab.train.finetune import Settings, Sources, Text, adam, determining, provenance, weights_sha256
from farthing_lab.train.loop import LoopConfig, Schedule, Trainer, check_start
from farthing_lab.train.model import DeepSeekLM, Indexer, Pick, largest, random_keys, recent

Stage = Literal["warmup", "sparse", "dense"]


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """The indexer and its training."""

    index_topk: int = 128
    index_n_heads: int = 8
    index_head_dim: int = 32
    warmup_tokens: int = 150_000
    lr: float = 1e-4  # the model
    index_lr: float = 4e-3
    mtp_weight: float = 0.3
    mtp_share: float = 0.25


def configured(overrides: Sequence[str]) -> tuple[SparseConfig, dict[str, int]]:
    """Parse NAME=VALUE overrides with JSON values. Returns the config and the overrides of `Settings`."""
    own = {f.name for f in dataclasses.fields(SparseConfig)}
    known = own | {"window", "batch_tokens", "eval_tokens", "heldout_every"}
    values: dict[str, Any] = {}
    for override in overrides:
        name, _, raw = override.partition("=")
        try:
            values[name] = json.loads(raw)
        except json.JSONDecodeError:
            raise ValueError(f"--set {override!r}: the value must be JSON, for example lr=0.0001") from None
        if name not in known:
            raise ValueError(f"--set {override!r}: unknown field; expected one of {', '.join(sorted(known))}")
    config = SparseConfig(**{k: v for k, v in values.items() if k in own})
    return config, {k: v for k, v in values.items() if k not in own}


def with_indexer(dense: DeepSeekLM, config: SparseConfig, seed: int) -> DeepSeekLM:
    """The same model with untrained indexers."""
    torch.manual_seed(seed)
    index = Index(config.index_n_heads, config.index_head_dim, config.index_topk)
    mixers = (dataclasses.replace(dense.cfg.latent, index=index),) * len(dense.cfg.mixers)  # all are alike
    model = DeepSeekLM(dataclasses.replace(dense.cfg, model_type="deepseek_v32", mixers=mixers))
    indexers = {k: v for k, v in to_tensors(model).items() if ".indexer." in k}
    from_tensors(model, to_tensors(dense) | indexers)
    model.set_compute_dtype(dense.compute_dtype)
    return model


def indexers(model: nn.Module) -> list[Indexer]:
    """The indexers of all layers, including the MTP layer."""
    return [m for m in model.modules() if isinstance(m, Indexer)]


def stage_loss(stage: Stage, model: DeepSeekLM, tokens: Tensor, config: SparseConfig) -> dict[str, Tensor]:
    """The loss of a stage for tokens [B, T + 1]."""
    if stage == "warmup":
        hidden = model(tokens[:, :-1])
        if model.mtp is not None:
            rows = max(1, round(len(tokens) * config.mtp_share))
            model.draft(hidden[:rows, :-1], tokens[:rows, 1:-1])
        losses = {}
    else:
        losses = model.loss(tokens, config.mtp_weight, config.mtp_share)
    found = [i.divergence for i in indexers(model) if i.divergence is not None]
    if found:
        divergence = torch.stack(found).mean()
        losses["divergence"] = divergence.detach()
        losses["loss"] = losses["loss"] + divergence if "loss" in losses else divergence
    return losses


def run_stage(
    stage: Stage, model: DeepSeekLM, text: Text, settings: Settings, config: SparseConfig, resume: bool,
    console: Console, given: dict[str, Any],
) -> Trainer | None:  # fmt: skip
    """Train `model` through a stage. Returns None if interrupted (its state is saved).

    given: the settings that a resumed run must share.
    """
    learned: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        p.requires_grad_(stage != "warmup" or ".indexer." in name)
        (learned if ".indexer." in name else rest).append(p)
    for indexer in indexers(model):
        indexer.dense = stage == "warmup"
    groups = [{"params": learned, "lr": config.index_lr}] if learned else []
    if stage != "warmup":
        groups.append({"params": rest, "lr": config.lr})
    loop = LoopConfig(
        settings.out / stage, None, config.warmup_tokens if stage == "warmup" else settings.tokens,
        Schedule(warmup=0.05, decay=0.5), threads=settings.threads, eval_minutes=2.0, save_minutes=1.0,
    )  # fmt: skip

    def score(trainer: Trainer) -> dict[str, float]:
        return {"eval_loss": float(nats(model, text.heldout, settings.window, 16).mean())}

    trainer = Trainer(
        model, [adam(groups)], text.batches, lambda t: text.micro_batches(settings),
        lambda module, tokens, t: stage_loss(stage, model, tokens, config), loop, evaluate=score,
        console=console,
    )  # fmt: skip
    trainer.settings = given
    if trainer.state_path.is_file():
        check_start(trainer.state_path, given, resume)
        trainer.load()
    console.print(f"stage {stage}: {loop.tokens:,} tokens")
    return trainer if trainer.progress >= 1 or trainer.run() else None


@torch.no_grad()
def nats(model: DeepSeekLM, documents: Sequence[Ids], window: int, count: int) -> Tensor:
    """Loss of every token in the first `count` full windows of the documents, [windows, window]."""
    training, rows = model.training, []
    model.eval()
    for ids in documents:
        for start in range(0, len(ids) - 1 - window, window):
            tokens = torch.from_numpy(ids[start : start + window + 1].astype("int64"))[None]
            logits = model.logits(model(tokens[:, :-1]))[0].float()
            rows.append(F.cross_entropy(logits, tokens[0, 1:], reduction="none"))
            if len(rows) == count:
                break
        if len(rows) == count:
            break
    model.train(training)
    return torch.stack(rows)


def compared(ours: Tensor, other: Tensor, seed: int = 0) -> dict[str, Any]:
    """Relative increase of perplexity over `other`, with a 95 % interval over resampled windows: for all
    tokens, and for those in a window's last quarter, where less than a third of the keys is read.
    """
    generator = torch.Generator().manual_seed(seed)
    late = ours.shape[1] * 3 // 4
    result: dict[str, Any] = {}
    for name, columns in (("all", slice(None)), ("late", slice(late, None))):
        rise = (ours - other)[:, columns].mean(1)
        picks = torch.randint(len(rise), (2000, len(rise)), generator=generator)
        low, high = rise[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
        result[name] = [round(math.expm1(x), 5) for x in (float(rise.mean()), low, high)]
    return result


def train_sparse(
    settings: Settings, config: SparseConfig, resume: bool = False, console: Console | None = None
) -> dict[str, Any] | None:
    """The complete run: writes OUT/checkpoint and OUT/sparse.json.

    Returns the summary, or None if interrupted (state is saved).
    """
    console = console or Console(stderr=True)
    sources = Sources.read(settings)
    given = determining(settings, config, sources)
    check_start(settings.out / "warmup" / "state.pt", given, resume)
    base = load_checkpoint(settings.model)
    base.set_compute_dtype(torch.bfloat16)
    count = max(1, settings.eval_tokens // settings.window)
    text = Text.load(settings, console, sources)

    def score(model: DeepSeekLM, pick: Pick = largest) -> Tensor:
        for indexer in indexers(model):
            indexer.dense, indexer.pick = False, pick
        found = nats(model, text.heldout, settings.window, count)
        for indexer in indexers(model):
            indexer.pick = largest
        return found

    model = with_indexer(base, config, settings.seed)
    scores = {"dense, not trained further": score(base), "untrained indexer": score(model)}
    torch.manual_seed(settings.seed)
    scores |= {"random keys": score(model, random_keys), "most recent keys": score(model, recent)}
    records = {}
    stages: tuple[tuple[Stage, DeepSeekLM, int], ...] = (
        ("warmup", model, 0), ("sparse", model, 1), ("dense", base, 1),
    )  # fmt: skip
    for stage, trained, order in stages:
        text = Text.load(dataclasses.replace(settings, seed=settings.seed + order), console, sources)
        trainer = run_stage(stage, trained, text, settings, config, resume, console, given)
        if trainer is None:
            return None
        records[stage] = {
            "minutes": trainer.active_seconds / 60,
            "budgets": trainer.budgets,
            "curve": trainer.record,
        }
        scores[stage] = score(trained)
        if stage == "sparse":
            scores["sparse, most recent keys"] = score(trained, recent)
    size = save_checkpoint(model, text.tokenizer, settings.out / "checkpoint", source=settings.model)
    summary = {
        **provenance(settings, config, text, sources),
        "checkpoint_sha256": weights_sha256(settings.out / "checkpoint"),
        "weights_bytes": size,
        "indexer_parameters": sum(p.numel() for i in indexers(model) for p in i.parameters()),
        "eval_windows": len(scores["dense"]),
        "perplexity": {name: math.exp(float(found.mean())) for name, found in scores.items()},
        "rise_over_dense": {name: compared(found, scores["dense"]) for name, found in scores.items()},
        "stages": records,
    }
    replace_json(settings.out / "sparse.json", summary)
    console.print(json.dumps(summary["rise_over_dense"], indent=1))
    return summary
