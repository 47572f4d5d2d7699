"""Samples tokens from hidden states.

Every random number is a function of (the completion's seed, the index of the output token), so a request
gets the same tokens in any batch, after preemption, and with or without speculation: a draft is accepted
exactly if it is the token that this sampler draws in its place (see speculation.py).

The draw itself is an op of the backend (`Ops.sample`).

Legend: n rows (one for each token to draw); D hidden size; V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from farthing.engine.constraints import Constraint, Refused
from farthing.engine.request import SamplingParams, Table
from farthing.ops.api import require_finite
from farthing.ops.arrays import gather, host, largest, like, log_softmax, where
from farthing.ops.sampling import Filters
from farthing.ops.sampling import sample as sample_in_torch

if TYPE_CHECKING:
    from torch import Tensor

_MASK64 = (1 << 64) - 1

Pick = Callable[["Tensor", "Tensor", Filters | None], "Tensor"]  # `Ops.sample`


class Head(Protocol):
    """The part of the model that turns hidden states into logits."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, V] float32."""

    def top_logits(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(values [n, k], ids [n, k], logsumexp [n])."""

    def greedy(self, hidden: Tensor) -> list[int]:
        """The most likely token per row."""


class PromptTokens:
    """The distinct tokens of a prompt, shared by its completions."""

    __slots__ = ("_index", "tokens")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens = frozenset(tokens)
        self._index: Tensor | None = None

    def index(self, x: Tensor) -> Tensor:
        """The ids as int64 on the device of x, created once since there may be many."""
        if self._index is None:
            self._index = _index(self.tokens, x)
        return self._index


NO_PROMPT = PromptTokens()


@dataclass(slots=True, eq=False)
class SamplingState:
    """Sampling state of one completion."""

    params: SamplingParams
    seed: int
    prompt: PromptTokens = NO_PROMPT  # unless repetition_penalty needs it
    end_ids: tuple[int, ...] = ()  # forbidden before min_tokens
    matcher: Constraint | None = None
    num_output: int = 0
    dead_end: int | None = None  # index of the output token without any allowed token in the last step
    counts: Counter[int] = field(default_factory=Counter)
    plain: bool = field(init=False)  # greedy over unmodified logits
    penalized: bool = field(init=False)

    def __post_init__(self) -> None:
        p = self.params
        self.penalized = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        edited = self.penalized or p.logit_bias or self.matcher is not None
        self.plain = p.greedy and not edited

    def push(self, token: int) -> None:
        """Account for a token appended to the output. Raises Refused if no token was allowed there."""
        if self.num_output == self.dead_end:
            raise Refused(no_token_left(self.params))
        self.num_output += 1
        if self.penalized:
            self.counts[token] += 1


@dataclass(frozen=True, slots=True)
class Row:
    """One token to sample: the one after the completion so far and `drafts[:ahead]`."""

    state: SamplingState
    drafts: tuple[int, ...] = ()
    ahead: int = 0

    @property
    def index(self) -> int:
        """Index of the token in the output."""
        return self.state.num_output + self.ahead


def sample(
    head: Head, hidden: Tensor, rows: Sequence[Row], pick: Pick | None = None
) -> tuple[list[int], Table | None]:
    """Sample one token per row of hidden [n, D]. The table is None if no row requests logprobs."""
    wanted = [row.state.params.logprobs for row in rows]
    top = max((k for k in wanted if k is not None), default=None)
    if all(  # each token is the argmax of the raw logits
        row.state.plain and row.state.num_output + row.ahead >= row.state.params.min_tokens for row in rows
    ):
        if top is None:
            return head.greedy(hidden), None
        values, ids, total = head.top_logits(hidden, max(1, top))
        require_finite(total[:, None])
        return ids[:, 0].tolist(), _table(ids[:, :1], ids, values - total[:, None])
    logits = head.logits(hidden)
    require_finite(logits)
    raw = log_softmax(logits) if top is not None else None
    tokens = sample_logits(edit(logits, rows), rows, pick)
    return tokens, None if raw is None or top is None else report(raw, tokens, top)


def edit(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Apply logit_bias, penalties, min_tokens and the grammar to logits [n, V], in place."""
    for i, row in enumerate(rows):
        state, params = row.state, row.state.params
        if params.logit_bias:
            index = _index(params.logit_bias, logits)
            logits[i, index] += _floats(params.logit_bias.values(), logits)
        if state.penalized:
            _penalize(logits[i], row)
        if row.index < params.min_tokens and state.end_ids:
            logits[i, list(state.end_ids)] = float("-inf")
        if state.matcher is not None and row.ahead == 0:
            _constrain(logits[i : i + 1 + len(row.drafts)], state, row.drafts)
    return logits


def no_token_left(params: SamplingParams) -> str:
    """The error for limits that together exclude every token."""
    limits = {
        "structured_outputs": params.structured_outputs is not None,
        "allowed_token_ids": params.allowed_token_ids is not None,
        "bad_words": bool(params.bad_words),
        "min_tokens": params.min_tokens > 0,
        "reasoning": params.reasoning is not None,
        "tools": params.calls is not None,
    }
    names = " and ".join(name for name, is_set in limits.items() if is_set)
    return f"{names} exclude every token; expected limits that leave at least one"


def sample_logits(logits: Tensor, rows: Sequence[Row], pick: Pick | None = None) -> list[int]:
    """Sample one token per row from edited logits [n, V]."""
    pick = pick or sample_in_torch
    params = [row.state.params for row in rows]
    greedy = [i for i, p in enumerate(params) if p.greedy]
    random = [i for i, p in enumerate(params) if not p.greedy]
    tokens = [0] * len(rows)
    if greedy:
        _store(tokens, greedy, logits[greedy].argmax(-1))
    if not random:
        return tokens
    heat = _floats([params[i].temperature for i in random], logits)
    scaled = (logits[random] if greedy else logits) / heat[:, None]
    uniforms = [uniform(rows[i].state.seed, rows[i].index) for i in random]
    u = like(np.array(uniforms), logits)
    for filtered in (False, True):
        at = [j for j, i in enumerate(random) if _is_filtered(params[i]) == filtered]
        if at:
            where = [random[j] for j in at]
            every = len(at) == len(random)
            z, v = (scaled, u) if every else (scaled[at], u[at])
            _store(tokens, where, pick(z, v, _filters([params[i] for i in where], z) if filtered else None))
    return tokens


def report(raw: Tensor, tokens: Sequence[int], top: int) -> Table:
    """Log-probabilities raw [n, V] -> those of the given tokens and of the `top` likeliest."""
    index = _index(tokens, raw)[:, None]
    own = gather(raw, index)
    above = (raw > own).sum(-1)
    values, ids = largest(raw, top)
    return _table(index, ids, values, own, above + 1)


def _table(
    tokens: Tensor, ids: Tensor, values: Tensor, own: Tensor | None = None, ranks: Tensor | None = None
) -> Table:
    """own, ranks: of tokens [n, 1]; None: they are the most likely ones."""
    own = values[:, :1] if own is None else own
    return Table(
        np.concatenate((host(tokens), host(ids)), 1, dtype=np.int32, casting="same_kind"),
        np.concatenate((host(own), host(values)), 1, dtype=np.float32),
        np.ones(len(ids), np.int32) if ranks is None else host(ranks).astype(np.int32),
    )


def uniform(seed: int, index: int) -> float:
    """A number in (0, 1) determined by its arguments alone (SplitMix64, Steele et al. 2014)."""
    z = mix(seed + (index + 1) * 0x9E3779B97F4A7C15)
    return ((z >> 12) + 0.5) * 2.0**-52


def mix(z: int) -> int:
    """SplitMix64's finalizer on 64 bits."""
    z &= _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def stream_seed(seed: int, stream: int) -> int:
    """The seed of the `stream`-th completion of a request."""
    return mix(mix(seed) + stream * 0xD1342543DE82EF95)


def _penalize(logits: Tensor, row: Row) -> None:
    params, counts = row.state.params, row.state.counts
    if row.ahead:
        counts = counts + Counter(row.drafts[: row.ahead])
    if params.repetition_penalty != 1:
        prompt = row.state.prompt
        for seen in (prompt.index(logits), _index(counts.keys() - prompt.tokens, logits)):
            v = logits[seen]
            logits[seen] = where(v > 0, v / params.repetition_penalty, v * params.repetition_penalty)
    if counts and (params.presence_penalty or params.frequency_penalty):
        often = _floats(counts.values(), logits)
        logits[_index(counts, logits)] -= params.frequency_penalty * often + params.presence_penalty


def _index(tokens: Iterable[int], x: Tensor) -> Tensor:
    return like(np.fromiter(tokens, np.int64), x)


def _floats(values: Iterable[float], x: Tensor) -> Tensor:
    return like(np.fromiter(values, np.float32), x)


def _constrain(logits: Tensor, state: SamplingState, drafts: Sequence[int]) -> None:
    """Mask the tokens that the constraints forbid in logits [1 + len(drafts), V].

    A row without any allowed token stays as it is, and `state` refuses the token that is drawn from it.
    """
    assert state.matcher is not None
    allowed = state.matcher.masks(drafts, logits.shape[1])
    possible = allowed
    early = state.params.min_tokens - state.num_output  # rows that must not end the completion
    if early > 0 and state.end_ids:
        possible = allowed.copy()
        possible[:early, list(state.end_ids)] = False
    dead = np.flatnonzero(~possible.any(axis=1))
    state.dead_end = state.num_output + int(dead[0]) if len(dead) else None
    allowed[dead] = True
    logits[like(~allowed, logits)] = float("-inf")


def _store(tokens: list[int], where: Sequence[int], values: Tensor) -> None:
    for i, token in zip(where, values.tolist(), strict=True):
        tokens[i] = token


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _filters(params: Sequence[SamplingParams], x: Tensor) -> Filters:
    """Of rows x [n, V], on its device."""
    vocabulary = x.shape[1]
    return Filters(
        _index([p.top_k if p.top_k > 0 else vocabulary for p in params], x),
        _floats([p.top_p for p in params], x),
        _floats([p.min_p for p in params], x),
    )
