"""A request in the engine and its completions: tokens become text, and stop conditions end it."""

from __future__ import annotations

import codecs
from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream

from farthing.conversation.scan import MARK
from farthing.engine.request import (
    CompletionOutput,
    FinishReason,
    Position,
    Request,
    RequestMetrics,
    RequestOutput,
    RequestStream,
)
from farthing.engine.sampler import SamplingState
from farthing.engine.sequence import Sequence, Status
from farthing.engine.tokenizer import Tokenizer


class Detokenizer:
    """Text of one sequence. The results of `push` and `flush` concatenate to the full decoded text."""

    __slots__ = ("_decoder", "_marked", "_skip", "_stream", "_tokenizer")

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, marked: Collection[int] = ()
    ) -> None:
        """marked: tokens whose text follows MARK, and is not skipped even if they are special."""
        self._tokenizer, self._marked = tokenizer, marked
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stream = None if tokenizer.byte_level else DecodeStream(skip_special_tokens=skip_special_tokens)

    def push(self, token: int) -> str:
        """Characters completed by this token."""
        if token in self._marked:
            return self.flush() + MARK + self._tokenizer.token_text(token)
        if self._stream is not None:
            return self._stream.step(self._tokenizer.backend, token) or ""
        if token in self._skip:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The remainder at the end: U+FFFD for an incomplete character."""
        return "" if self._stream is not None else self._decoder.decode(b"", final=True)


class StopChecker:
    """Finds stop strings in a stream of text and holds back a possible beginning of one."""

    __slots__ = ("_begun", "_held", "_include", "_stops", "stop")

    def __init__(self, stops: Seq[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._begun = [0] * len(self._stops)  # length of each stop string matched at the text's end
        self._include = include
        self._held = ""
        self.stop: str | None = None

    def push(self, text: str, armed: bool = True) -> str:
        """Text that is safe to emit. Unless `armed` (min_tokens), all text is, and nothing stops."""
        if not self._stops:
            return text
        new, text = text, self._held + text
        self._held = ""
        if not armed:
            self._begun = [0] * len(self._stops)
            return text
        hits = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, _, self.stop = min(hits)
            return text[: at + len(self.stop)] if self._include else text[:at]
        begun = zip(self._stops, self._begun, strict=True)
        self._begun = [_begun(stop, count, new) for stop, count in begun]
        ready = len(text) - max(self._begun)
        self._held = text[ready:]
        return text[:ready]

    def flush(self) -> str:
        """The held-back text, which turned out not to be a stop string."""
        text, self._held = self._held, ""
        return text


def _begun(stop: str, count: int, text: str) -> int:
    """Length of the longest prefix of `stop` at the end of the text, given the length before `text`.

    `text` does not complete it. Knuth, Morris and Pratt 1977: linear in the text, whatever the strings.
    """
    borders = _borders(stop)
    for character in text:
        while count and stop[count] != character:
            count = borders[count - 1]
        count += stop[count] == character
    return count


@lru_cache(maxsize=1024)
def _borders(stop: str) -> tuple[int, ...]:
    """For each prefix of `stop`: the length of its longest proper border (the KMP failure function)."""
    borders = [0]
    for character in stop[1:]:
        count = borders[-1]
        while count and stop[count] != character:
            count = borders[count - 1]
        borders.append(count + (stop[count] == character))
    return tuple(borders)


FIRST_PAUSE = 48  # steps for which a completion pauses a drafter that does not pay; later pauses are longer


@dataclass(slots=True)
class Drafting:
    """Speculation statistics of one drafter on one completion."""

    hits: float = 0.8  # accepted share of the verified drafts, moving average
    pause: int = 0  # steps left before the drafter is tried again
    patience: int = FIRST_PAUSE  # length of the next pause


class Generation(Sequence):
    """One completion of a request: the sequence that the scheduler plans, its sampling state and its text."""

    __slots__ = (
        "_cumulative", "_eos", "_new_logprobs", "_new_text", "_new_tokens", "_stop_ids", "_stops", "_text",
        "drafted_by", "drafting", "finish_reason", "index", "last_token_time", "parent",
        "sampling", "stop_reason",
    )  # fmt: skip
    parent: RequestState  # set by `Engine.submit`

    def __init__(
        self,
        request: Request,
        index: int,
        sampling: SamplingState,
        *,
        id: int,
        max_output: int,
        order: float,
        eos_ids: frozenset[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        """index: among the request's n completions. id: unique among all sequences of an engine."""
        params, prompt = request.params, request.prompt_token_ids
        super().__init__(
            id=id,
            tokens=list(prompt),
            num_prompt=len(prompt),
            max_len=len(prompt) + max_output,
            order=order,
            salt=request.cache_salt,
            client=request.client,
            read_cache=params.prompt_logprobs is None,
            scored=params.prompt_logprobs is not None,
        )
        self.index, self.sampling = index, sampling
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.last_token_time = 0.0
        self.drafting = (Drafting(), Drafting())  # by drafter
        self.drafted_by = 0
        self._eos = frozenset() if params.ignore_eos else eos_ids
        self._stop_ids = frozenset(params.stop_token_ids or ())
        self._text = None
        if tokenizer is not None and params.detokenize:
            self._text = Detokenizer(tokenizer, params.skip_special_tokens, params.marked_token_ids)
        self._stops: StopChecker | None = None
        if params.stop:
            self._stops = StopChecker(params.stop_strings, params.include_stop_str_in_output)
        self._new_text: list[str] = []
        self._new_tokens: list[int] = []
        self._new_logprobs: list[Position] = []
        self._cumulative = 0.0

    @property
    def active(self) -> bool:
        """Running and not finished: the next step computes it."""
        return self.status is Status.RUNNING and self.finish_reason is None

    def push(self, token: int, logprobs: Position | None) -> bool:
        """Append one sampled token to the output. True if it ends the completion.

        Raises ValueError if the grammar refuses the token. The scheduler appends it to `tokens`.
        """
        state, params = self.sampling, self.sampling.params
        state.push(token)
        self._new_tokens.append(token)
        if params.logprobs is not None and logprobs is not None:
            self._cumulative += logprobs.logprob
            self._new_logprobs.append(logprobs)
        # The sampler enforces min_tokens by masking the ending tokens until then.
        armed = state.num_output >= params.min_tokens
        if token in self._eos:
            return self._end("stop", None, token)
        if token in self._stop_ids and armed:
            return self._end("stop", token, token)
        if self._text is not None:
            text = self._text.push(token)
            if self._stops is not None:
                text = self._stops.push(text, armed)
            self._new_text.append(text)
            if self._stops is not None and self._stops.stop is not None:
                return self._end("stop", self._stops.stop)
        if state.matcher is not None:
            state.matcher.consume(token)
            if state.matcher.stopped:
                return self._end("stop", None)
        if state.num_output >= self.max_len - self.num_prompt:
            return self._end("length", None)
        return False

    def abort(self, reason: FinishReason = "abort") -> None:
        """End the completion from outside."""
        self._end(reason, None)

    def take(self) -> CompletionOutput:
        """The output since the last call."""
        wanted = self.sampling.params.logprobs is not None
        output = CompletionOutput(
            index=self.index,
            text="".join(self._new_text),
            token_ids=self._new_tokens,
            cumulative_logprob=self._cumulative if wanted else None,
            logprobs=self._new_logprobs if wanted else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        self._new_text, self._new_tokens, self._new_logprobs = [], [], []
        return output

    def _end(self, reason: FinishReason, stop: int | str | None, token: int | None = None) -> bool:
        self.finish_reason, self.stop_reason = reason, stop
        if self._text is None or (self._stops is not None and self._stops.stop is not None):
            return True
        if self._stops is not None:
            self._new_text.append(self._stops.flush())
        if token is not None and self.sampling.params.include_stop_str_in_output:
            self._new_text.append(self._text.push(token))
        self._new_text.append(self._text.flush())
        return True


@dataclass(slots=True, eq=False)
class RequestState:
    """A request between submit and its last output."""

    request: Request
    stream: RequestStream
    metrics: RequestMetrics
    generations: list[Generation]
    unfinished: int = 0
    prompt_logprobs: list[Position | None] | None = None
    reported_prompt: bool = False
    probe: NDArray[np.float32] | None = None

    def output(self, moved: Seq[Generation]) -> RequestOutput:
        """New output of the given completions, with a copy of the current metrics."""
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
            probe=self.probe,
        )
