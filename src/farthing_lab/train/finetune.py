"""Text, batches and evaluation shared by all runs that start from a trained checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from farthing.checkpoint.reader import Checkpoint
from farthing.files import replace
from farthing.tokenizer_file import read_tokenizer
from farthing_lab.train import data
from farthing_lab.train.data import Ids
from farthing_lab.train.loop import Trainer, plain
from farthing_lab.train.model import DeepSeekLM


@dataclasses.dataclass(frozen=True)
class Settings:
    """Length and shape of a fine-tuning run."""

    model: Path
    out: Path
    tokens: int = 500_000
    window: int = 512
    batch_tokens: int = 4096
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    root: Path | None = None  # directory of .py files; None: the standard library
    heldout_every: int = 25
    eval_tokens: int = 12_000

    def __post_init__(self) -> None:
        for name in ("tokens", "window", "batch_tokens", "threads", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a positive number")
        if self.batch_tokens < self.window:
            raise ValueError(
                f"batch_tokens: got {self.batch_tokens}; expected at least window = {self.window}"
            )


@dataclasses.dataclass(frozen=True)
class Sources:
    """The files that determine a run, read and hashed once."""

    documents: list[data.Document]
    text: str  # hash of what determines the token ids: the tokenizer, the held-out rule and the files
    weights: str  # hash of the base weights

    @classmethod
    def read(cls, settings: Settings) -> Sources:
        """Raises FileNotFoundError for a checkpoint without a tokenizer, CheckpointError for none at all."""
        file = settings.model / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; expected a checkpoint with a tokenizer")
        documents = data.find_sources(settings.root)
        text = hashlib.sha256(f"{sha256(file)} {settings.heldout_every}".encode())
        data.add_hash(text, documents)
        return cls(documents, text.hexdigest(), weights_sha256(settings.model))


@dataclasses.dataclass(frozen=True)
class Text:
    """The checkpoint's tokenizer, batches of the training files, and the token ids of the held-out files."""

    tokenizer: Tokenizer
    batches: data.PackedBatches
    heldout: list[Ids]

    @classmethod
    def load(cls, settings: Settings, console: Console | None = None, sources: Sources | None = None) -> Text:
        """Split the files as in training and tokenize them with the checkpoint's tokenizer."""
        sources = sources or Sources.read(settings)
        documents, key = sources.documents, sources.text
        tokenizer = read_tokenizer(settings.model / "tokenizer.json")
        cache = settings.out / "text.npz"
        ids = _cached(cache, key)
        if ids is None:
            if cache.exists():
                (console or Console(stderr=True)).print(
                    f"{cache} is unreadable or of another text, tokenizer or held-out rule; writing it again"
                )
            train, heldout = data.split(documents, settings.heldout_every)
            if not train or not heldout:
                raise ValueError(
                    f"{len(documents)} files leave {len(train)} for training and {len(heldout)} held out "
                    f"(one in {settings.heldout_every}); expected more files"
                )
            settings.out.mkdir(parents=True, exist_ok=True)
            ids = data.encode(tokenizer, train), data.encode(tokenizer, heldout)
            _store(cache, key, *ids)
        return cls(tokenizer, data.PackedBatches(ids[0], settings.seed), ids[1])

    def micro_batches(self, settings: Settings) -> list[tuple[Tensor, int]]:
        """One step's batch and its number of tokens."""
        rows = settings.batch_tokens // settings.window
        tokens = self.batches.next(rows, settings.window).to(settings.device)
        return [(tokens, rows * settings.window)]


def _cached(path: Path, key: str) -> tuple[list[Ids], list[Ids]] | None:
    """The stored ids for training and held out, or None if there are none with this key."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as parts:
            if str(parts["key"]) != key:
                return None
            train, heldout = (np.split(parts[n], parts[f"{n}_ends"]) for n in ("train", "heldout"))
    except (zipfile.BadZipFile, pickle.UnpicklingError, ValueError, KeyError, EOFError):
        return None
    return train, heldout


def _store(path: Path, key: str, train: list[Ids], heldout: list[Ids]) -> None:
    """Cache the token ids so that a resumed run does not split and tokenize again."""
    arrays: dict[str, Any] = {"key": np.array(key)}
    for name, rows in (("train", train), ("heldout", heldout)):
        arrays[name] = np.concatenate(rows)
        arrays[f"{name}_ends"] = np.cumsum([len(r) for r in rows])[:-1]
    replace(path, lambda file: _write(file, arrays))


def _write(file: Path, arrays: Mapping[str, Any]) -> None:
    with file.open("wb") as stream:  # numpy would add .npz to a name
        np.savez(stream, **arrays)


@torch.no_grad()
def window_nats(model: DeepSeekLM, documents: Sequence[Ids], window: int, max_tokens: int) -> Tensor:
    """(loss in nats, tokens) of consecutive windows of whole documents, until `max_tokens` are scored:
    [windows, 2] float64.
    """
    rows: list[tuple[float, int]] = []
    training = model.training
    model.eval()
    for ids in documents:
        body = ids[:-1].astype(np.int64)
        for start in range(0, len(body) - 1, window):
            tokens = torch.from_numpy(body[start : start + window + 1])[None].to(model.embed_tokens.device)
            logits = model.logits(model(tokens[:, :-1]))[0].float()
            loss = float(F.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
            rows.append((loss, tokens.shape[1] - 1))
        if sum(count for _, count in rows) >= max_tokens:
            break
    model.train(training)
    return torch.tensor(rows, dtype=torch.float64)


def perplexity(model: DeepSeekLM, documents: Sequence[Ids], window: int, max_tokens: int) -> float:
    """Perplexity over the windows of `window_nats`."""
    nats, count = window_nats(model, documents, window, max_tokens).sum(0).tolist()
    return math.exp(nats / count)


def resampled(found: Mapping[str, Tensor], draws: int = 2000, seed: int = 0) -> dict[str, Tensor]:
    """Mean loss of every model over the same resampled windows, [draws]; `found` are its `window_nats`."""
    windows = len(next(iter(found.values())))
    picks = torch.randint(windows, (draws, windows), generator=torch.Generator().manual_seed(seed))
    sums = {name: rows[picks].sum(1) for name, rows in found.items()}
    return {name: s[:, 0] / s[:, 1] for name, s in sums.items()}


def interval(values: Tensor) -> list[float]:
    """The central 95 % of resampled values, as [low, high]."""
    return [round(x, 5) for x in values.quantile(values.new_tensor([0.025, 0.975])).tolist()]


def provenance(settings: Settings, config: Any, text: Text, sources: Sources) -> dict[str, Any]:
    """What determines a run: its settings, and hashes of the base weights and of the held-out tokens."""
    return {
        "settings": {
            k: v.name if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()
        },
        "config": dataclasses.asdict(config),
        "base_sha256": sources.weights,
        "text_sha256": hashlib.sha256(b"".join(d.tobytes() for d in text.heldout)).hexdigest(),
    }


def determining(settings: Settings, config: Any, sources: Sources) -> dict[str, Any]:
    """What a resumed run must share with the stored one: settings, weights and text, but not its length."""
    free = ("model", "out", "tokens", "threads", "device", "root", "warmup_tokens")
    values = {
        f.name: getattr(part, f.name)
        for part in (settings, config)
        for f in dataclasses.fields(part)
        if f.name not in free
    }
    weights = hashlib.sha256(sources.weights.encode()).hexdigest()
    hashes = {"model": f"sha256 {weights[:16]}", "data": f"sha256 {sources.text[:16]}"}
    return plain(values | hashes)


def sha256(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(model: Path) -> str:
    """Hash of a checkpoint's weight file; with several files, of their hashes in order of name."""
    hashes = [sha256(file) for file in Checkpoint.open(model).files()]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def adam(groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW without weight decay."""
    return torch.optim.AdamW(list(groups), betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)


def freeze_top(model: DeepSeekLM) -> None:
    """Freeze embedding, head and routers at the teacher's values."""
    for name, p in model.named_parameters():
        if "embed_tokens" in name or "lm_head" in name or name.endswith("mlp.gate.weight"):
            p.requires_grad_(False)


def curve(trainer: Trainer, key: str) -> list[tuple[float, float]]:
    """(tokens, value) pairs of one recorded metric."""
    return [(p["tokens"], p[key]) for p in trainer.record if key in p]
