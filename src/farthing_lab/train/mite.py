"""The training recipe of the embedded model: architecture, data, schedule."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor, nn

from farthing.memory import keep_freed_memory
from farthing.model.config import ModelConfig
from farthing.tokenizer_file import read_tokenizer
from farthing_lab.train import data
from farthing_lab.train.evaluate import evaluate
from farthing_lab.train.export import load_checkpoint, model_of, save_checkpoint, to_json
from farthing_lab.train.fp8 import Fp8Config, Fp8Hook, use_fp8
from farthing_lab.train.loop import (
    BaseHook,
    LoopConfig,
    Muon,
    Schedule,
    Trainer,
    check_start,
    plain,
    split_parameters,
)
from farthing_lab.train.model import DeepSeekLM

MITE = ModelConfig.from_json(
    {
        "model_type": "deepseek_v3",
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 640,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 5,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": 32,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
)


MITE_V4 = ModelConfig.from_json(
    {
        "model_type": "deepseek_v4",
        "vocab_size": MITE.vocab_size,
        "hidden_size": MITE.hidden_size,
        "moe_intermediate_size": MITE.moe_intermediate_size,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "head_dim": 64,
        "qk_rope_head_dim": 32,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "compress_ratios": [0, 4, 128, 4, 128],
        "compress_rope_theta": 10000.0,
        "index_n_heads": 4,
        "index_head_dim": 64,
        "index_topk": 128,
        "n_routed_experts": MITE.n_routed_experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 1.5,
        "num_hash_layers": 1,
        "max_position_embeddings": MITE.max_position_embeddings,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
)
ARCHITECTURES = {"v3": MITE, "v4": MITE_V4}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All hyperparameters of the run. Stages are (progress from which it applies, value)."""

    model: ModelConfig = MITE
    heldout_every: int = 25
    muon_lr: float = 0.02
    muon_decay: float = 0.1
    adam_lr: float = 0.004
    adam_decay: float = 0.0
    schedule: Schedule = dataclasses.field(default_factory=lambda: Schedule(warmup=0.01, decay=0.5))
    window_stages: tuple[tuple[float, int], ...] = ((0.0, 512), (0.5, 1024), (0.8, 2048))
    batch_stages: tuple[tuple[float, int], ...] = ((0.0, 8192),)
    micro_tokens: int = 8192
    mtp_weight_stages: tuple[tuple[float, float], ...] = ((0.0, 0.3),)
    mtp_share_stages: tuple[tuple[float, float], ...] = ((0.0, 0.25), (0.6, 0.5))
    mtp_greedy_stages: tuple[tuple[float, bool], ...] = ((0.0, False), (0.6, True))
    balance_speed: float = 0.003
    precision: str = "bf16"  # or "fp8"
    fp8_scaling: Literal["current", "delayed"] = "current"
    fp8_gradients: Literal["e4m3", "e5m2"] = "e4m3"
    fp8_margin: int = 3  # powers of two above the largest recent amax, for delayed scaling
    eval_tokens: int = 30_000

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp8"):
            raise ValueError(f"precision: got {self.precision!r}; expected 'bf16' or 'fp8'")

    def at(self, stages: tuple[tuple[float, Any], ...], progress: float) -> Any:
        """The value of the current stage."""
        return [value for start, value in stages if progress >= start][-1]


class BalanceHook(BaseHook):
    """Auxiliary-loss-free load balancing: one bias update per step, scaled with the learning rate."""

    def __init__(self, speed: float) -> None:
        self.speed = speed

    def after_step(self, trainer: Trainer) -> None:
        """Update the biases and record the worst expert's load over the mean."""
        assert isinstance(trainer.model, DeepSeekLM)
        trainer.metrics["max_load"] = trainer.model.rebalance(self.speed * trainer.metrics["lr"])


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The training and held-out text with its tokenizer."""

    tokenizer: Tokenizer
    train: list[data.Document]
    heldout: list[data.Document]


def prepare_corpus(recipe: Recipe, out: Path, documents: Sequence[data.Document], console: Console) -> Corpus:
    """Split the sources, and train the tokenizer (or load the one in `out` when resuming)."""
    train, heldout = data.split(documents, recipe.heldout_every)
    path = out / "tokenizer.json"
    if path.is_file():
        tokenizer = read_tokenizer(path)
    else:
        console.print(f"training a byte-level BPE of {recipe.model.vocab_size} entries")
        tokenizer = data.train_tokenizer((d.text for d in train), recipe.model.vocab_size)
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(path), pretty=False)
    return Corpus(tokenizer, train, heldout)


def build_trainer(
    recipe: Recipe, corpus: Corpus, config: LoopConfig, seed: int, console: Console, device: str = "cpu"
) -> Trainer:
    """A trainer ready to `run()` or to `load()` and run."""
    torch.manual_seed(seed)
    model = model_of(recipe.model, torch.bfloat16).to(device)
    hooks: list[BaseHook] = [BalanceHook(recipe.balance_speed)]
    if recipe.precision == "fp8":
        fp8 = Fp8Config(recipe.fp8_scaling, recipe.fp8_gradients, margin=recipe.fp8_margin)
        hooks.append(Fp8Hook(use_fp8(model, fp8)))
    matrices, rest = split_parameters(model)
    optimizers = [
        Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.muon_decay),
        torch.optim.AdamW(
            rest, lr=recipe.adam_lr, betas=(0.9, 0.98), eps=1e-10, weight_decay=recipe.adam_decay
        ),
    ]
    batches = data.PackedBatches(data.encode(corpus.tokenizer, corpus.train), seed)
    heldout = data.encode(corpus.tokenizer, corpus.heldout)
    texts = [d.text for d in corpus.heldout]
    console.print(
        f"{len(corpus.train)} files to train on ({batches.tokens:,} tokens), {len(corpus.heldout)} held out "
        f"({sum(map(len, heldout)):,} tokens); {model.describe()}"
    )

    def micro_batches(trainer: Trainer) -> list[tuple[Tensor, int]]:
        length = recipe.at(recipe.window_stages, trainer.progress)
        total = recipe.at(recipe.batch_stages, trainer.progress)
        rows = max(1, recipe.micro_tokens // length)
        count = max(1, total // (rows * length))
        return [(batches.next(rows, length).to(device), rows * length) for _ in range(count)]

    def loss(module: nn.Module, tokens: Tensor, trainer: Trainer) -> dict[str, Tensor]:
        assert isinstance(module, DeepSeekLM)
        mtp = (recipe.mtp_weight_stages, recipe.mtp_share_stages, recipe.mtp_greedy_stages)
        return module.loss(tokens, *(recipe.at(stages, trainer.progress) for stages in mtp))

    def score(trainer: Trainer) -> dict[str, float]:
        """Score on windows of the current training length: longer ones would measure extrapolation."""
        assert isinstance(trainer.model, DeepSeekLM)
        length = recipe.at(recipe.window_stages, trainer.progress)
        return evaluate(trainer.model, heldout, texts, length=length, max_tokens=recipe.eval_tokens)

    def on_save(trainer: Trainer) -> None:
        assert isinstance(trainer.model, DeepSeekLM)
        save_checkpoint(trainer.model, corpus.tokenizer, trainer.config.out / "checkpoint")

    return Trainer(
        model,
        optimizers,
        batches,
        micro_batches,
        loss,
        config,
        hooks=hooks,
        evaluate=score,
        on_save=on_save,
        console=console,
    )


def finish(trainer: Trainer, corpus: Corpus, recipe: Recipe, max_tokens: int | None = None) -> dict[str, Any]:
    """Score the stored FP8 model on the held-out files (or their first `max_tokens`); write training.json,
    loss.png and their sample.
    """

    out = trainer.config.out / "checkpoint"
    assert isinstance(trainer.model, DeepSeekLM)
    size = save_checkpoint(trainer.model, corpus.tokenizer, out)
    stored = load_checkpoint(out)
    stored.set_compute_dtype(torch.bfloat16)
    ids = data.encode(corpus.tokenizer, corpus.heldout)
    result = evaluate(stored.eval(), ids, [d.text for d in corpus.heldout], max_tokens=max_tokens)
    summary: dict[str, Any] = {
        "heldout": {k: round(v, 5) for k, v in result.items()},
        "window": recipe.model.max_position_embeddings,
        "minutes": round(trainer.active_seconds / 60, 2),
        "tokens": trainer.tokens,
        "budgets": trainer.budgets,
        "tokens_per_second": round(trainer.tokens / trainer.active_seconds, 1),
        "cores": trainer.config.threads,
        "python": platform.python_version(),
        "weights_bytes": size,
        "model": stored.describe(),
        "recipe": dataclasses.asdict(recipe) | {"model": to_json(recipe.model)},
        "curve": trainer.record,
    }
    (out / "training.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    plot(trainer.record, out / "loss.png")
    write_heldout(corpus.heldout, out / "heldout.jsonl")
    return summary


def write_heldout(documents: list[data.Document], path: Path, limit: int = 250_000) -> None:
    """Write a spread of the held-out files as {"path", "text"} lines, at most `limit` bytes."""
    small = [d for d in documents if len(d.text) <= 40_000]
    total = sum(len(d.text.encode()) for d in small)
    step = max(1, round(total / limit))
    rows, size = [], 0
    for document in small[::step] + [d for i, d in enumerate(small) if i % step]:
        n = len(document.text.encode())
        if size + n <= limit:
            rows.append(json.dumps({"path": document.path, "text": document.text}, ensure_ascii=False))
            size += n
    path.write_text("\n".join(rows) + "\n", "utf-8")


def plot(record: list[dict[str, float]], path: Path) -> None:
    """Training loss and held-out bits per byte over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tokens = [p["tokens"] / 1e6 for p in record]
    figure, left = plt.subplots(figsize=(6.4, 3.6), dpi=90)
    left.plot(tokens, [p["main"] for p in record], color="tab:gray", label="training loss")
    left.set_xlabel("million tokens")
    left.set_ylabel("training loss, nats per token")
    right = left.twinx()
    right.plot(tokens, [p["bits_per_byte"] for p in record], color="tab:red", label="held-out")
    right.set_ylabel("held-out bits per byte")
    figure.legend(loc="upper right", bbox_to_anchor=(0.88, 0.88), frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def apply_settings(recipe: Recipe, settings: list[str]) -> Recipe:
    """Apply NAME=VALUE overrides to fields of the recipe or its model; VALUE is JSON."""
    own = {f.name for f in dataclasses.fields(Recipe)} - {"model", "schedule"}
    inner = set(to_json(recipe.model))
    timing = {f.name for f in dataclasses.fields(Schedule)}
    for setting in settings:
        name, _, raw = setting.partition("=")
        try:
            value = json.loads(raw)
        except json.JSONDecodeError:
            raise ValueError(f"--set {setting!r}: expected a JSON value, for example muon_lr=0.02") from None
        if isinstance(value, list) and name in own:
            value = tuple(map(tuple, value))
        change: dict[str, Any] = {name: value}
        if name in own:
            recipe = dataclasses.replace(recipe, **change)
        elif name in inner:
            model = ModelConfig.from_json(to_json(recipe.model) | change)
            recipe = dataclasses.replace(recipe, model=model)
        elif name in timing:
            recipe = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, **change))
        else:
            raise ValueError(
                f"--set {setting!r}: unknown field; expected one of {', '.join(sorted(own | inner | timing))}"
            )
    return recipe


def determining(recipe: Recipe, seed: int, documents: Sequence[data.Document]) -> dict[str, Any]:
    """What a resumed run must share with the stored one: the recipe, the seed and the text."""
    text = hashlib.sha256()
    data.add_hash(text, documents)
    own = dataclasses.asdict(recipe) | {"model": to_json(recipe.model)}
    return plain(own | {"seed": seed, "data": f"sha256 {text.hexdigest()[:16]}"})


def train_mite(
    out: Path,
    minutes: float | None,
    tokens: int | None,
    resume: bool,
    root: Path | None,
    device: str,
    threads: int,
    seed: int,
    settings: list[str],
    precision: str = "bf16",
    eval_steps: int | None = None,
    final_tokens: int | None = None,
    arch: str = "v3",
) -> dict[str, Any] | None:
    """Train the embedded model. Returns the summary, or None if interrupted (state is saved)."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device!r}: expected auto, cpu or cuda")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(stderr=True)
    keep_freed_memory()
    torch.set_num_threads(threads)
    recipe = apply_settings(Recipe(ARCHITECTURES[arch], precision=precision), settings)
    documents = data.find_sources(root)
    given = determining(recipe, seed, documents)
    check_start(out / "state.pt", given, resume)
    config = LoopConfig(
        out, minutes, tokens, schedule=recipe.schedule, eval_steps=eval_steps, threads=threads,
        wall_clock=device != "cpu",
    )  # fmt: skip
    corpus = prepare_corpus(recipe, out, documents, console)
    trainer = build_trainer(recipe, corpus, config, seed, console, device)
    trainer.settings = given
    if resume:
        trainer.load()
    if not trainer.run():
        return None
    summary = finish(trainer, corpus, recipe, final_tokens)
    console.print(f"held-out: {summary['heldout']}; checkpoint in {out / 'checkpoint'}")
    return summary
