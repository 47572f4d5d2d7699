"""Requests and outputs. Names follow vLLM's, so that switching only changes an import.

This module imports no torch: a client of the engine can describe requests without loading it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from farthing.engine.logprobs import Position

FinishReason = Literal["stop", "length", "abort", "error"]
OutputKind = Literal["delta", "final"]

GREEDY_BELOW = 1e-5  # temperatures below this are greedy, as in vLLM
MAX_LOGPROBS = 128
SMALLEST_TOP_P = 1e-30  # float32 rounds smaller ones to 0


class EngineError(RuntimeError):
    """A request, or the whole engine, failed while running."""

    metrics: RequestMetrics | None = None  # what the request had used, where it alone failed


class RequestAtFault(EngineError):
    """A running request cannot continue because of its own parameters (HTTP 400)."""


class QueueFull(EngineError):
    """The waiting queue is at its bound; try again later (HTTP 429)."""


class EngineFailed(EngineError):
    """The engine has failed, and every request with it; another replica may answer (HTTP 503)."""


class EngineStopped(EngineError):
    """The engine is shutting down and accepts no requests (HTTP 503)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Constrain the output. Exactly one field is set."""

    json: Mapping[str, Any] | str | None = None  # a JSON schema
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None  # Lark, or GBNF as llama.cpp writes it
    json_object: bool | None = None  # any JSON object

    def __post_init__(self) -> None:
        chosen = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if len(chosen) != 1:
            names = ", ".join(f.name for f in fields(self))
            raise ValueError(
                f"structured_outputs sets {chosen or 'nothing'}; expected exactly one of {names}"
            )
        if self.choice is not None and (isinstance(self.choice, str) or not all(self.choice)):
            raise ValueError(f"choice: got {self.choice!r}; expected a list of non-empty strings")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningParams:
    """Location and budget of the reasoning. Structured output starts after it."""

    end: tuple[int, ...]  # the tokens of its closing tag
    start: int | None = None  # its opening tag, where that is one token
    open: bool = True  # the prompt has already opened it
    budget: int | None = None  # tokens of reasoning at most, the tags not counted; None: no limit

    def __post_init__(self) -> None:
        if not self.end:
            raise ValueError("reasoning.end: got no tokens; expected those of the closing tag")
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"reasoning.budget: got {self.budget}; expected at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallParams:
    """Tool calls in free text: after each of `openers` the grammar holds until it ends.

    Without openers there is no free text: the grammar is that of the whole answer.
    """

    openers: tuple[str, ...]
    grammar: str  # Lark, of what follows an opener

    def __post_init__(self) -> None:
        if not all(self.openers):
            raise ValueError(f"calls.openers: got {self.openers!r}; expected non-empty strings")

    @property
    def constraint(self) -> StructuredOutputsParams:
        """The grammar alone."""
        return StructuredOutputsParams(grammar=self.grammar)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample, when to stop, what to report. Raises ValueError naming the field at fault."""

    n: int = 1  # completions of the same prompt
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0 or -1: all
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the most likely token
    repetition_penalty: float = 1.0  # over prompt and output; divides positive logits, multiplies negative
    presence_penalty: float = 0.0  # subtracted once for a token in the output
    frequency_penalty: float = 0.0  # subtracted for each occurrence in the output
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None  # None: drawn from the engine's seed
    max_tokens: int | None = 16  # None: up to max_model_len
    min_tokens: int = 0  # no stop of any kind before
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # of the k most likely tokens and the sampled one, from the raw logits
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    marked_token_ids: frozenset[int] = frozenset()  # in the text, conversation.marks.MARK precedes each
    detokenize: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    reasoning: ReasoningParams | None = None
    calls: CallParams | None = None  # not together with structured_outputs
    bad_words: Sequence[str] | None = None  # texts the output never holds, as the tokenizer splits them
    allowed_token_ids: Sequence[int] | None = None  # no other token is drawn

    def __post_init__(self) -> None:
        for name, low, high, kind in _RANGES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            accepted = (int,) if kind is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, accepted) or not low <= value <= high:
                raise ValueError(f"{name}: got {value!r}; expected {kind.__name__} in [{low}, {high}]")
        if self.top_p < SMALLEST_TOP_P:
            raise ValueError(f"top_p: got {self.top_p!r}; expected a float in [{SMALLEST_TOP_P}, 1]")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens: got {self.min_tokens}; expected at most max_tokens = {self.max_tokens}"
            )
        if self.stop_strings and not self.detokenize:
            raise ValueError("detokenize: got False; expected True with stop strings")
        if self.calls is not None and self.structured_outputs is not None:
            raise ValueError("calls: got a value with structured_outputs; expected one of them")
        if not all(self.stop_strings):
            raise ValueError(f"stop: got {self.stop!r}; expected non-empty strings")
        for token, bias in (self.logit_bias or {}).items():
            if not isinstance(token, int) or not -100 <= bias <= 100:
                raise ValueError(
                    f"logit_bias has {token!r}: {bias!r}; expected token id: bias in [-100, 100]"
                )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


_RANGES: tuple[tuple[str, float, float, type], ...] = (
    ("n", 1, 128, int),
    ("temperature", 0, 100, float),
    ("top_k", -1, 2**31, int),
    ("top_p", 0, 1, float),
    ("min_p", 0, 1, float),
    ("repetition_penalty", 0.01, 100, float),
    ("presence_penalty", -2, 2, float),
    ("frequency_penalty", -2, 2, float),
    ("seed", -(2**63), 2**64, int),
    ("max_tokens", 1, 2**31, int),
    ("min_tokens", 0, 2**31, int),
    ("logprobs", 0, MAX_LOGPROBS, int),
    ("prompt_logprobs", 0, MAX_LOGPROBS, int),
)
_OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}


@dataclass(slots=True)
class RequestMetrics:
    """What a request used. Times are `time.time()` seconds; 0.0: has not happened."""

    arrival_time: float = 0.0
    first_scheduled_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0
    prefill_tokens: int = 0  # prompt tokens computed, recomputation after preemption included
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    decode_tokens: int = 0  # output tokens
    # Wall time of the engine's steps, shared over the tokens of each step.
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n completions. In a delta, text, token_ids and logprobs hold what is new."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[Position] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or stop token id that ended it

    @property
    def finished(self) -> bool:
        """Whether this completion is whole."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """News of a request. In a delta, `outputs` holds only the completions that moved."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[Position | None] | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A checked request on its way to the engine's thread."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None
    priority: int = 0  # smaller is more urgent
    cache_salt: str = ""  # requests share cached prefixes only under the same salt
    client: str = ""  # whose request it is: clients share the engine fairly
    kind: OutputKind = "delta"
    arrival_time: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)
