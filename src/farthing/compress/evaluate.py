"""Evaluate a model on held-out text, or compare two models with a confidence interval.

Everything runs through `farthing.model` on the chosen backend, so the serving path itself is evaluated.
Legend: T tokens of a batch of windows; D hidden size; V vocabulary.
"""

from __future__ import annotations

import json
import math
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from farthing.engine.tokenizer import Tokenizer as Served
from farthing.model import DecoderModel, ModelConfig
from farthing.ops import Batch, LatentCache, make_batch


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided confidence interval around an estimate."""

    estimate: float
    low: float
    high: float


def ratio_interval(sums: Sequence[float], counts: Sequence[int], confidence: float = 0.95) -> Interval:
    """sum(sums) / sum(counts), where each pair is one cluster (a window of correlated tokens).

    The ratio estimator's linearized variance (Cochran 1977, section 6.4) with Student's t over the clusters.
    With a single cluster the interval is infinite. A non-finite sum makes estimate and bounds infinite, since
    a model that predicts NaN is certainly worse.
    """
    if not sums or len(sums) != len(counts):
        raise ValueError(f"{len(sums)} sums with {len(counts)} counts; expected the same positive number")
    total, clusters = sum(counts), len(sums)
    if not all(map(math.isfinite, sums)):
        return Interval(math.inf, math.inf, math.inf)
    estimate = math.fsum(sums) / total
    if clusters < 2:
        return Interval(estimate, -math.inf, math.inf)
    residual = math.fsum((s - estimate * n) ** 2 for s, n in zip(sums, counts, strict=True))
    error = math.sqrt(residual * clusters / (clusters - 1)) / total
    half = student_t(0.5 + confidence / 2, clusters - 1) * error
    return Interval(estimate, estimate - half, estimate + half)


def student_t(p: float, freedom: int) -> float:
    """The p-quantile of Student's t: exact for 1 and 2 degrees, else the Cornish-Fisher expansion
    (Abramowitz and Stegun 26.7.5), good to 1 % from 3 degrees on at the usual levels."""
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z, v = NormalDist().inv_cdf(p), float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v ** (i + 1) for i, term in enumerate(terms))


def proportion_interval(wins: int, losses: int, total: int, confidence: float = 0.95) -> Interval:
    """Difference of two paired proportions, (wins - losses) / total, by the normal approximation
    of the discordant pairs (McNemar); for top-1 accuracy of B against A on the same images."""
    if total < 1:
        raise ValueError(f"total: got {total}; expected at least one pair")
    estimate = (wins - losses) / total
    spread = math.sqrt(max(wins + losses - (wins - losses) ** 2 / total, 1.0)) / total
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * spread
    return Interval(estimate, estimate - half, estimate + half)


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive tokens of one document: each of ids[1:] is predicted from those before it.

    A file has one JSON object per line: {"text": …} or {"ids": […]}.
    """

    ids: Tensor  # [n + 1] int64
    document: int

    @property
    def tokens(self) -> int:
        """Number of predictions."""
        return len(self.ids) - 1


@dataclass(frozen=True, slots=True)
class Corpus:
    """Windows and the size of their text in bytes (0 if only ids are known)."""

    windows: list[Window]
    bytes: int

    @property
    def tokens(self) -> int:
        """Total number of predictions."""
        return sum(w.tokens for w in self.windows)


def halves(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Two parts of about equal size without a common document: one to choose on, one to evaluate on.

    Raises ValueError for a single document. Bytes are unknown in either part.
    """
    documents = {w.document for w in corpus.windows}
    if len(documents) < 2:
        raise ValueError(
            "the data has one document; expected at least two, one to choose on and one to evaluate on"
        )
    parts: tuple[list[Window], list[Window]] = ([], [])
    tokens = [0, 0]
    for number in sorted(documents):
        own = [w for w in corpus.windows if w.document == number]
        smaller = int(tokens[1] < tokens[0])
        parts[smaller].extend(own)
        tokens[smaller] += sum(w.tokens for w in own)
    return Corpus(parts[0], 0), Corpus(parts[1], 0)


def check_data(data: Path, option: str = "data") -> None:
    """Raise FileNotFoundError if there is no such file. `option` names it in the error."""
    if not data.is_file():
        raise FileNotFoundError(
            f"{option}: got {str(data)!r}, which does not exist; expected JSON lines with 'text' or 'ids'"
        )


def load_corpus(
    data: Path,
    model: Path,
    config: ModelConfig,
    window: int,
    max_tokens: int | None = None,
    option: str = "data",
) -> Corpus:
    """Whole documents of `data`, until `max_tokens` is reached; at most the model's context per window.

    `model` is the directory with the tokenizer, `config` gives the vocabulary size. `option` names `data` in
    errors. Raises ValueError or FileNotFoundError.
    """
    check_data(data, option)
    window = min(window, config.max_position_embeddings)
    return windows_of(
        _documents(data, model, config), window, max_tokens, f"{option}: got {str(data)!r}, which"
    )


Documents = Iterator[tuple[list[int], int, bool]]  # ids, bytes, and whether a BOS begins every window


def windows_of(
    documents: Documents, window: int, max_tokens: int | None = None, named: str = "the text"
) -> Corpus:
    """Documents -> windows of `window` predictions, every token predicted once.

    A model that never reads a text without BOS has it in front of every window: without one, Gemma's
    perplexity triples. `named` begins the error about documents without text.
    """
    if window < 1:
        raise ValueError(f"window: got {window}; expected at least 1 token")
    windows: list[Window] = []
    tokens = total = 0
    for number, (ids, size, begun) in enumerate(documents):
        if max_tokens is not None and tokens >= max_tokens:
            break
        row = torch.tensor(ids, dtype=torch.int64)
        pieces = [row[i : i + window + 1].clone() for i in range(0, len(ids) - 1, window)]
        for piece in pieces if begun else ():
            piece[0] = row[0]
        windows += [Window(piece, number) for piece in pieces]
        tokens += max(len(ids) - 1, 0)
        total += size
    if not windows:
        raise ValueError(f"{named} has no token to predict; expected at least one document of two tokens")
    return Corpus(windows, total)


def _documents(data: Path, model: Path, config: ModelConfig) -> Documents:
    encode: Encoder | None = None
    with data.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{data}:{number} is not JSON ({error})") from error
            ids: list[int]
            begun = False
            if isinstance(row, dict) and isinstance(row.get("ids"), list):
                ids, size = row["ids"], 0
            elif isinstance(row, dict) and isinstance(row.get("text"), str):
                encode = encode or Encoder.of(model, config)
                ids, size, begun = encode(row["text"]), _utf8_size(row["text"]), encode.always
            else:
                raise ValueError(f"{data}:{number} has neither 'text' nor 'ids'; expected one of them")
            _check_ids(ids, config.vocab_size, f"{data}:{number}")
            yield ids, size, begun


def _check_ids(ids: list[int], vocab_size: int, where: str) -> None:
    """Raise ValueError naming the first id that the model has no embedding for."""
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise ValueError(
                f"{where}: token id {str(i)[:40]}; expected a whole number from 0 to {vocab_size - 1}"
            )


def _utf8_size(text: str) -> int:
    return len(text.encode(errors="replace"))  # JSON may contain lone surrogates


@dataclass(frozen=True, slots=True)
class Encoder:
    """Text -> token ids after one BOS, from which the first token is predicted."""

    tokenizer: Tokenizer
    front: list[int]
    always: bool  # serving puts it in front of every text

    @classmethod
    def of(cls, model: Path, config: ModelConfig) -> Encoder:
        """With the BOS of config.json, or, where it names none as for GGUF files, with what serving puts in
        front."""
        if not (file := model / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{file} does not exist; expected a tokenizer, or data given as 'ids'")
        served, bos = Served.from_directory(model), config.bos_token_id
        whole, plain = (served.encode("a", special)[:1] for special in (True, False))
        front = whole if whole != plain else []  # a template may append tokens alone
        return cls(served.backend, front if bos is None else [bos], bool(front) and bos in (None, *front))

    def __call__(self, text: str) -> list[int]:
        return [*self.front, *self.tokenizer.encode(text, add_special_tokens=False).ids]


def calibration_corpus(
    model: Path, config: ModelConfig, held_out: Path | None, tokens: int, window: int, seed: int = 0
) -> Corpus:
    """About `tokens` tokens of the Python standard library, without the files named in `held_out`.

    These sources are available wherever Python is, and calibration needs no labels.
    """
    encode = Encoder.of(model, config)
    window = min(window, config.max_position_embeddings)
    excluded = set(_paths(held_out)) if held_out and held_out.is_file() else set()
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        f for f in root.rglob("*.py")
        if "site-packages" not in f.parts and not _excluded(f.relative_to(root), excluded)
    )  # fmt: skip
    random.Random(seed).shuffle(files)
    if not files:
        raise FileNotFoundError(f"no Python sources under {root}; expected a calibration file")

    def documents() -> Documents:
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            ids = encode(text)[: window + 1]  # many files, one window each
            _check_ids(ids, config.vocab_size, f"{model / 'tokenizer.json'}")
            yield ids, len(text.encode()), encode.always

    return windows_of(documents(), window, tokens)


def _paths(held_out: Path) -> Iterator[str]:
    with held_out.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield str(json.loads(line).get("path", ""))


def _excluded(file: Path, excluded: set[str]) -> bool:
    return any(str(file).endswith(name) or name.endswith(str(file)) for name in excluded if name)


def batches(windows: Sequence[Window], tokens: int) -> Iterator[list[Window]]:
    """Batches of consecutive windows, about `tokens` tokens each."""
    batch: list[Window] = []
    size = 0
    for window in windows:
        if batch and size + window.tokens > tokens:
            yield batch
            batch, size = [], 0
        batch.append(window)
        size += window.tokens
    if batch:
        yield batch


PAGE = 16
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
) -> Baseline:
    """A model to compare others with: D numbers per token, where log-probabilities would need V."""
    hidden = []
    for step in _steps(model, corpus.windows, batch_tokens):
        hidden.append(step.hidden.clone())
        if progress:
            progress(len(step.targets))
    return Baseline(hidden, model)


def compare(
    a: DecoderModel,
    b: DecoderModel,
    corpus: Corpus,
    batch_tokens: int = 4096,
    confidence: float = 0.95,
) -> Comparison:
    """Compare B with A, window by window. Raises ValueError if the vocabularies differ."""
    first, second = (remember(model, corpus, batch_tokens) for model in (a, b))
    return compare_with(first, second, corpus, confidence)


def compare_with(a: Baseline, b: Baseline, corpus: Corpus, confidence: float = 0.95) -> Comparison:
    """`compare` with neither model in memory."""
    if a.tail.config.vocab_size != b.tail.config.vocab_size:
        raise ValueError(
            f"vocab_size is {b.tail.config.vocab_size} in B and {a.tail.config.vocab_size} in A; "
            "expected models with the same tokenizer"
        )
    loss_a, loss_b, kl, agree = 0.0, 0.0, 0.0, 0
    differences: list[float] = []
    for group, left, right in zip(_groups(corpus.windows, a.hidden), a.hidden, b.hidden, strict=True):
        targets, difference = _targets(group), []
        for (rows, p), (_, q) in zip(_logits(a.tail, left), _logits(b.tail, right), strict=True):
            nll_a, nll_b = _nll(p, targets[rows]), _nll(q, targets[rows])
            loss_a, loss_b = loss_a + float(nll_a.sum()), loss_b + float(nll_b.sum())
            difference.append(nll_b - nll_a)
            log_p = p.log_softmax(-1)
            kl += float((log_p.exp() * (log_p - q.log_softmax(-1))).sum(dtype=torch.float64))
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        differences += [float(d.sum()) for d in torch.cat(difference).split([w.tokens for w in group])]
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


def _groups(windows: Sequence[Window], hidden: Sequence[Tensor]) -> Iterator[list[Window]]:
    """The windows of each batch of hidden states."""
    left = iter(windows)
    for part in hidden:
        group: list[Window] = []
        while sum(w.tokens for w in group) < len(part):
            group.append(next(left))
        yield group


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
    for group, ids, batch, blocks in paged_batches(windows, model.config, batch_tokens):
        cache = cache_for(model, blocks, cache)
        hidden = model.forward(ids, batch, cache, counts)
        yield _Step(hidden, _targets(group), [w.tokens for w in group], batch, cache)


def paged_batches(
    windows: Sequence[Window], config: ModelConfig, tokens: int = 4096
) -> Iterator[tuple[list[Window], Tensor, Batch, int]]:
    """(windows, their ids, batch, blocks of a cache) of about `tokens` tokens each."""
    for group in batches(windows, tokens):
        batch, blocks = paged_batch([w.tokens for w in group], page_of(config))
        ids = torch.cat([w.ids[:-1] for w in group])
        yield group, ids, replace(batch, ids=ids), blocks


def cache_for(model: DecoderModel, blocks: int, cache: LatentCache | None) -> LatentCache:
    """A cache with so many blocks: the given one if it has as many."""
    if cache is not None and cache.num_blocks >= blocks:
        return cache
    dtype: Literal["float32", "bfloat16"] = "float32" if model.ops.dtype == torch.float32 else "bfloat16"
    return model.new_cache(blocks, page_of(model.config), dtype)


def page_of(config: ModelConfig) -> int:
    """Tokens of a block of a model's cache."""
    return -(-PAGE // config.block_tokens) * config.block_tokens


def _targets(group: Sequence[Window]) -> Tensor:
    return torch.cat([w.ids[1:] for w in group])


def located(model: DecoderModel, windows: Sequence[Window]) -> str:
    """Which part of a broken model to look at, to append to an error; "" if the first window shows none."""
    (step,) = _steps(model, windows[:1], 1)
    where = model.first_not_finite(windows[0].ids[:-1], step.batch, step.cache)
    return "" if where is None else f"; the first output that is not finite is that of {where}"


def paged_batch(lengths: Sequence[int], page: int = PAGE) -> tuple[Batch, int]:
    """A batch of whole sequences in consecutive blocks, and its number of blocks."""
    tables, first = [], 0
    for n in lengths:
        count = -(-n // page)
        tables.append(range(first, first + count))
        first += count
    return make_batch(lengths, [0] * len(lengths), tables, page), first


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
