"""Evaluate a model, or compare two models with a confidence interval.

Everything runs through `farthing.model` on the chosen backend, so the serving path itself is evaluated.
Legend: T tokens of a batch of windows; D hidden size; V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from farthing.compress.corpus import Corpus, Window, batches
from farthing.compress.statistics import Interval, ratio_interval
from farthing.model import DecoderModel
from farthing.ops import Batch, LatentCache, make_batch

BLOCK = 16
ROWS = 512  # logit rows per chunk, to never materialize [T, V]
BROKEN = "the model's logits are NaN or infinite on this text: its weights are broken or overflow"
Progress = Callable[[int], None]  # called with the tokens done since the last call


@dataclass(frozen=True, slots=True)
class Quality:
    """One model on one text. mtp_acceptance is None for a model without an MTP layer."""

    perplexity: float
    bits_per_byte: float | None
    mtp_acceptance: float | None
    tokens: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Model B compared with model A on the same tokens; the interval is paired."""

    perplexity_a: float
    perplexity_b: float
    relative_increase: float  # perplexity_b / perplexity_a - 1
    interval: tuple[float, float]  # of relative_increase
    confidence: float
    kl: float  # mean KL(A || B) of the next-token distributions, nats
    greedy_agreement: float
    bits_per_byte_a: float | None
    bits_per_byte_b: float | None
    tokens: int
    windows: int

    def verdict(self, max_drop: float) -> Verdict:
        """Whether the interval of the increase is below `max_drop`, above it, or includes it."""
        low, high = self.interval
        if high <= max_drop:
            return Verdict("pass", max_drop, None)
        if low > max_drop:
            return Verdict("fail", max_drop, None)
        margin = abs(max_drop - self.relative_increase)
        half = (high - low) / 2
        decidable = margin > 0 and math.isfinite(half)
        needed = math.ceil(self.tokens * (half / margin) ** 2) if decidable else None
        return Verdict("cannot tell", max_drop, needed)

    def to_json(self) -> dict[str, Any]:
        """The document of `farthing eval --against --json`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "interval": list(self.interval)
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a model is at most `max_drop` worse."""

    answer: Literal["pass", "fail", "cannot tell"]
    max_drop: float
    tokens_needed: int | None  # estimated tokens needed to decide

    def __str__(self) -> str:
        text = f"{self.answer}: at most {self.max_drop:.2%} asked"
        return f"{text}; about {self.tokens_needed:,} tokens would decide" if self.tokens_needed else text


def evaluate(
    model: DecoderModel,
    corpus: Corpus,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
    with_drafts: bool = True,
) -> Quality:
    """Perplexity, bits per byte and MTP acceptance.

    Acceptance: at every position the MTP layer drafts the token after next from the true next token. The
    draft is accepted if the model, given the text so far, would greedily choose the same token.
    """
    loss, drafts, accepted = 0.0, 0, 0
    for step in _steps(model, corpus.windows, batch_tokens):
        greedy = []
        for rows, logits in _logits(model, step.hidden):
            loss += float(_nll(logits, step.targets[rows]).sum())
            greedy.append(logits.argmax(-1))
        if model.mtp and with_drafts:
            n, hits = _drafts(model, step, torch.cat(greedy))
            drafts, accepted = drafts + n, accepted + hits
        if progress:
            progress(len(step.targets))
    if not math.isfinite(loss):
        raise ValueError(BROKEN + located(model, corpus.windows))
    return Quality(
        perplexity=_exp(loss / corpus.tokens),
        bits_per_byte=_bits(loss, corpus),
        mtp_acceptance=accepted / drafts if drafts else None,
        tokens=corpus.tokens,
        bytes=corpus.bytes,
    )


@dataclass(frozen=True, slots=True)
class Baseline:
    """A model's hidden states on a text; its norm and head recompute all logits from them."""

    hidden: list[Tensor]  # [T, D] of each batch, after the last layer
    tail: DecoderModel  # at least norm and head


def remember(
    model: DecoderModel, corpus: Corpus, batch_tokens: int = 4096, progress: Progress | None = None
) -> list[Tensor]:
    """The `hidden` of a Baseline: D numbers per token, where log-probabilities would need V."""
    hidden = []
    for step in _steps(model, corpus.windows, batch_tokens):
        hidden.append(step.hidden.clone())
        if progress:
            progress(len(step.targets))
    return hidden


def compare(
    a: DecoderModel,
    b: DecoderModel,
    corpus: Corpus,
    batch_tokens: int = 4096,
    confidence: float = 0.95,
) -> Comparison:
    """Compare B with A, window by window. Raises ValueError if the vocabularies differ."""
    return compare_with(Baseline(remember(a, corpus, batch_tokens), a), b, corpus, batch_tokens, confidence)


def compare_with(
    a: Baseline,
    b: DecoderModel,
    corpus: Corpus,
    batch_tokens: int = 4096,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> Comparison:
    """`compare` without A in memory; `batch_tokens` must be that of `remember`."""
    if a.tail.config.vocab_size != b.config.vocab_size:
        raise ValueError(
            f"vocab_size is {b.config.vocab_size} in B and {a.tail.config.vocab_size} in A; "
            "expected models with the same tokenizer"
        )
    loss_a, loss_b, kl, agree = 0.0, 0.0, 0.0, 0
    differences: list[float] = []
    for left, right in zip(a.hidden, _steps(b, corpus.windows, batch_tokens), strict=True):
        difference = []
        for (rows, p), (_, q) in zip(_logits(a.tail, left), _logits(b, right.hidden), strict=True):
            nll_a, nll_b = _nll(p, right.targets[rows]), _nll(q, right.targets[rows])
            loss_a, loss_b = loss_a + float(nll_a.sum()), loss_b + float(nll_b.sum())
            difference.append(nll_b - nll_a)
            log_p = p.log_softmax(-1)
            kl += float((log_p.exp() * (log_p - q.log_softmax(-1))).sum(dtype=torch.float64))
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        differences += [float(d.sum()) for d in torch.cat(difference).split(right.lengths)]
        if progress:
            progress(len(right.targets))
    if not math.isfinite(loss_a):
        raise ValueError(f"A: {BROKEN}")
    interval = ratio_interval(differences, [w.tokens for w in corpus.windows], confidence)
    return Comparison(
        perplexity_a=_exp(loss_a / corpus.tokens),
        perplexity_b=_exp(loss_b / corpus.tokens),
        relative_increase=_growth((loss_b - loss_a) / corpus.tokens),
        interval=_relative(interval),
        confidence=confidence,
        kl=kl / corpus.tokens,
        greedy_agreement=agree / corpus.tokens,
        bits_per_byte_a=_bits(loss_a, corpus),
        bits_per_byte_b=_bits(loss_b, corpus),
        tokens=corpus.tokens,
        windows=len(corpus.windows),
    )


@dataclass(frozen=True, slots=True)
class _Step:
    """One batch of windows after the forward pass."""

    hidden: Tensor  # [T, D]
    targets: Tensor  # [T]
    lengths: list[int]
    batch: Batch
    cache: LatentCache


def window_losses(
    model: DecoderModel, corpus: Corpus, batch_tokens: int = 4096, counts: Tensor | None = None
) -> list[float]:
    """Loss of each window in nats; adds the tokens routed to each expert to counts [L, E] int64."""
    losses: list[float] = []
    for step in _steps(model, corpus.windows, batch_tokens, counts):
        nll = torch.cat([_nll(logits, step.targets[rows]) for rows, logits in _logits(model, step.hidden)])
        losses += [float(part.sum()) for part in nll.split(step.lengths)]
    return losses


def _steps(
    model: DecoderModel, windows: Sequence[Window], batch_tokens: int, counts: Tensor | None = None
) -> Iterator[_Step]:
    cache: LatentCache | None = None
    for group in batches(windows, batch_tokens):
        lengths = [w.tokens for w in group]
        batch, blocks = paged_batch(lengths)
        if cache is None or cache.num_blocks < blocks:
            dtype: Literal["float32", "bfloat16"] = (
                "float32" if model.ops.dtype == torch.float32 else "bfloat16"
            )
            cache = model.new_cache(blocks, BLOCK, dtype)
        ids = torch.cat([w.ids[:-1] for w in group])
        hidden = model.forward(ids, batch, cache, counts)
        yield _Step(hidden, torch.cat([w.ids[1:] for w in group]), lengths, batch, cache)


def located(model: DecoderModel, windows: Sequence[Window]) -> str:
    """Which part of a broken model to look at, to append to an error; "" if the first window shows none."""
    (step,) = _steps(model, windows[:1], 1)
    where = model.first_not_finite(windows[0].ids[:-1], step.batch, step.cache)
    return "" if where is None else f"; the first output that is not finite is that of {where}"


def paged_batch(lengths: Sequence[int]) -> tuple[Batch, int]:
    """A batch of whole sequences in consecutive blocks, and its number of blocks."""
    tables, first = [], 0
    for n in lengths:
        count = -(-n // BLOCK)
        tables.append(range(first, first + count))
        first += count
    return make_batch(lengths, [0] * len(lengths), tables, BLOCK), first


def _logits(model: DecoderModel, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(hidden), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, model.logits(hidden[rows].contiguous()).float()


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target), float64 [n]; infinite where logits are NaN or infinite."""
    nats = (logits.logsumexp(-1) - logits.gather(1, targets.unsqueeze(1)).squeeze(1)).double()
    return nats.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=math.inf)


def _drafts(model: DecoderModel, step: _Step, greedy: Tensor) -> tuple[int, int]:
    """(drafts made, drafts accepted) of the MTP layer: position i drafts the model's choice at i + 1."""
    drafted = model.draft(step.targets, step.hidden, step.batch, step.cache)
    guesses = []
    for start in range(0, len(drafted), ROWS):
        guesses.append(model.draft_logits(drafted[start : start + ROWS].contiguous()).argmax(-1))
    n = hits = 0
    for guess, choice in zip(torch.cat(guesses).split(step.lengths), greedy.split(step.lengths), strict=True):
        n += len(guess) - 1
        hits += int((guess[:-1] == choice[1:]).sum())
    return n, hits


def _bits(loss: float, corpus: Corpus) -> float | None:
    return loss / math.log(2) / corpus.bytes if corpus.bytes else None


def _relative(log_interval: Interval) -> tuple[float, float]:
    return _growth(log_interval.low), _growth(log_interval.high)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _growth(x: float) -> float:
    return math.expm1(x) if x < 700 else math.inf
