"""A request in the engine and its completions: tokens become text, and something says stop."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from farthing.engine.detokenizer import Detokenizer, StopChecker
from farthing.engine.request import (
    CompletionOutput,
    FinishReason,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
)
from farthing.engine.sampler import Logprobs, SamplingState
from farthing.engine.sequence import Sequence
from farthing.engine.stream import RequestStream
from farthing.engine.tokenizer import Tokenizer


@dataclass(slots=True)
class Drafting:
    """What speculation has learnt of one drafter on one completion."""

    hits: float = 0.8  # share of the drafts tried that were right, moving average
    pause: int = 0  # steps to go without


class Generation:
    """One completion."""

    def __init__(
        self,
        index: int,
        state: SamplingState,
        max_output: int,
        eos_ids: frozenset[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        params = state.params
        self.index = index
        self.sampling = state
        self.max_output = max_output
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.last_token_time = 0.0
        self.drafting = (Drafting(), Drafting())  # by drafter
        self.drafted_by = 0
        self._params = params
        self._eos = frozenset() if params.ignore_eos else eos_ids
        self._stop_ids = frozenset(params.stop_token_ids or ())
        self._tokenizer = tokenizer
        self._text = None
        if tokenizer is not None and params.detokenize:
            self._text = Detokenizer(tokenizer, params.skip_special_tokens)
        self._stops = StopChecker(params.stop_strings, params.include_stop_str_in_output)
        self._new_text: list[str] = []
        self._new_tokens: list[int] = []
        self._new_logprobs: list[Logprobs] = []
        self._cumulative = 0.0

    def push(self, token: int, logprobs: Logprobs | None) -> bool:
        """Take one token. True if it ends the completion. ValueError if the grammar refuses it."""
        state, params = self.sampling, self._params
        state.push(token)
        self._new_tokens.append(token)
        if params.logprobs is not None and logprobs is not None:
            self._cumulative += logprobs[token].logprob
            self._new_logprobs.append(self._decoded(logprobs))
        # min_tokens itself is the sampler's: it forbids ending tokens until then.
        armed = state.num_output >= params.min_tokens
        if token in self._eos:
            return self._end("stop", None, token)
        if token in self._stop_ids and armed:
            return self._end("stop", token, token)
        if self._text is not None:
            self._new_text.append(self._stops.push(self._text.push(token), armed))
            if self._stops.found is not None:
                return self._end("stop", self._stops.found)
        if state.matcher is not None:
            state.matcher.consume(token)
            if state.matcher.stopped:
                return self._end("stop", None)
        if state.num_output >= self.max_output:
            return self._end("length", None)
        return False

    def abort(self, reason: FinishReason = "abort") -> None:
        """End it from outside."""
        self._end(reason, None)

    def take(self) -> CompletionOutput:
        """What is new since the last call."""
        output = CompletionOutput(
            index=self.index,
            text="".join(self._new_text),
            token_ids=self._new_tokens,
            cumulative_logprob=None if self._params.logprobs is None else self._cumulative,
            logprobs=None if self._params.logprobs is None else self._new_logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        self._new_text, self._new_tokens, self._new_logprobs = [], [], []
        return output

    def _end(self, reason: FinishReason, stop: int | str | None, token: int | None = None) -> bool:
        self.finish_reason, self.stop_reason = reason, stop
        if self._text is None or self._stops.found is not None:
            return True
        if token is not None and self._params.include_stop_str_in_output:
            self._new_text.append(self._stops.flush() + self._text.push(token) + self._text.flush())
        else:
            self._new_text.append(self._stops.flush() + self._text.flush())
        return True

    def _decoded(self, logprobs: Logprobs) -> Logprobs:
        return decoded(logprobs, self._tokenizer)


def decoded(logprobs: Logprobs, tokenizer: Tokenizer | None) -> Logprobs:
    """With the text of each token."""
    if tokenizer is None:
        return logprobs
    return {t: Logprob(entry.logprob, entry.rank, tokenizer.token_text(t)) for t, entry in logprobs.items()}


@dataclass(slots=True, eq=False)
class RequestState:
    """A request between submit and its last output."""

    request: Request
    stream: RequestStream
    metrics: RequestMetrics
    sequences: list[Sequence] = field(default_factory=list)
    unfinished: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    reported_prompt: bool = False

    def output(self, moved: Seq[Generation]) -> RequestOutput:
        """News of the generations that moved. The metrics are a copy, valid for this moment."""
        prompt_logprobs = None
        if not self.reported_prompt and self.prompt_logprobs is not None:
            prompt_logprobs, self.reported_prompt = self.prompt_logprobs, True
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=[g.take() for g in moved],
            finished=self.unfinished == 0,
            metrics=replace(self.metrics),
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self.metrics.cached_tokens,
        )
