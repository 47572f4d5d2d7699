"""Validates a request and creates its sequences, in the caller's thread."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np

from farthing.config import EngineConfig
from farthing.conversation.scan import plain
from farthing.engine.constraints import All, Constraint, ReasoningBudget, Vocabulary
from farthing.engine.generation import Generation
from farthing.engine.request import OutputKind, Request, SamplingParams, StructuredOutputsParams
from farthing.engine.sampler import NO_PROMPT, PromptTokens, SamplingState, mix, no_token_left, stream_seed
from farthing.engine.sandbox.sandbox import Sandbox
from farthing.engine.structured import (
    GrammarCompiler,
    Matcher,
    Openers,
    TokenTexts,
    TriggeredGrammar,
    constrained_field,
    too_slow,
)
from farthing.engine.tokenizer import Tokenizer
from farthing.model.config import ModelConfig


class Admission:
    """Validation of requests. Every rejection is a ValueError that names the field and the value."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        tokenizer: Tokenizer | None,
        sandbox: Sandbox | None = None,
    ) -> None:
        """sandbox: examines grammars; without it structured outputs are refused."""
        assert config.max_model_len is not None
        self._config = config
        self._vocab = model.vocab_size
        self._tokenizer = tokenizer
        self._max_len = config.max_model_len
        self._eos = frozenset(model.eos_token_ids) | frozenset(tokenizer.eos_token_ids if tokenizer else ())
        self._sandbox = sandbox
        self._grammars: GrammarCompiler | None = None
        self._texts: TokenTexts | None = None
        self._lock = threading.Lock()
        self._checked: SamplingParams | None = None  # the last whose token ids are valid
        self._vocabulary: tuple[SamplingParams | None, Vocabulary] = (None, Vocabulary(None, ()))  # the last
        self._seed = mix(config.seed)
        self._numbers = itertools.count()  # of requests
        self._ids = itertools.count()  # of sequences

    def admit(
        self,
        prompt: str | Seq[int],
        params: SamplingParams,
        *,
        request_id: str | None,
        priority: int,
        cache_salt: str,
        kind: OutputKind,
        add_special_tokens: bool,
        prompt_text: str | None,
        client: str = "",
    ) -> tuple[Request, list[Generation]]:
        """The request and its n completions."""
        if isinstance(prompt, str):
            ids = self.need_tokenizer("a text prompt").encode(prompt, add_special_tokens)
            prompt_text = plain(prompt)
        else:
            ids = list(prompt)
        self._check(ids, params)
        matcher: Constraint | None = None
        limits = params.structured_outputs, params.calls, params.reasoning, params.bad_words
        if any(limits) or params.allowed_token_ids is not None:
            matcher = self._constraint(params, client)
        if matcher is not None or params.min_tokens > 0:
            self._check_first_token(params, matcher)
        number = next(self._numbers)
        request = Request(
            request_id=request_id or f"request-{number}",
            prompt_token_ids=ids,
            params=params,
            prompt=prompt_text,
            priority=priority,
            cache_salt=cache_salt,
            client=client,
            kind=kind,
            arrival_time=time.time(),
        )
        # A request without a seed gets one that is reproducible for a given engine seed.
        seed = params.seed if params.seed is not None else self._seed + number
        penalized = PromptTokens(ids) if params.repetition_penalty != 1 else NO_PROMPT
        return request, [
            self._generation(request, i, 0 if params.greedy else stream_seed(seed, i), matcher, penalized)
            for i in range(params.n)
        ]

    def need_tokenizer(self, what: str) -> Tokenizer:
        """The tokenizer; raises a ValueError naming the feature that requires it."""
        if self._tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer; this engine was built with skip_tokenizer_init=True")
        return self._tokenizer

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        if not ids:
            raise ValueError("prompt is empty; expected at least one token")
        if len(ids) >= self._max_len:
            raise ValueError(
                f"prompt has {len(ids)} tokens; expected at most {self._max_len - 1}, "
                f"max_model_len - 1, so that one can follow"
            )
        self._check_ids("prompt", ids)
        if params is not self._checked:  # the prompts of one request share it
            self._check_ids("logit_bias", params.logit_bias)
            self._check_ids("stop_token_ids", params.stop_token_ids)
            self._check_ids("allowed_token_ids", params.allowed_token_ids)
            self._checked = params
        if params.stop:
            self.need_tokenizer("stop")
        if params.probe is not None and self._config.num_ranks > 1:
            raise ValueError(f"probe: got {params.probe!r} with {self._config.num_ranks} ranks; expected one")

    def _check_ids(self, field: str, tokens: Iterable[int] | None) -> None:
        for token in tokens or ():
            if not isinstance(token, int) or not 0 <= token < self._vocab:
                raise ValueError(f"{field} has {token!r}; expected a token id in [0, {self._vocab})")

    def _check_first_token(self, params: SamplingParams, matcher: Constraint | None) -> None:
        ends = self._ends(params) if params.min_tokens > 0 else ()
        if matcher is None:
            left = len(ends) < self._vocab
        else:
            (allowed,) = matcher.masks([], self._vocab)
            left = bool(np.delete(allowed, list(ends)).any())
        if not left:
            raise ValueError(no_token_left(params))

    def _ends(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens of the model that end a completion. A tokenizer may name others that the model lacks."""
        eos = frozenset() if params.ignore_eos else self._eos
        ends = eos | frozenset(params.stop_token_ids or ())
        return tuple(sorted(token for token in ends if token < self._vocab))

    def _constraint(self, params: SamplingParams, client: str) -> Constraint | None:
        """All constraints on the next token, combined; None if there are none."""
        parts: list[Constraint] = []
        grammar: Constraint | None = None
        answer = params.structured_outputs
        if params.calls is not None and not params.calls.openers:
            answer = params.calls.constraint
        if answer is not None:
            grammar = self._matcher(answer, client)
        if params.reasoning is not None:
            grammar = ReasoningBudget(params.reasoning, grammar, sorted(self._eos))
        if params.calls is not None and params.calls.openers:
            fresh = self._matcher(params.calls.constraint, client)
            grammar = TriggeredGrammar(fresh, Openers(params.calls.openers, self._token_texts()), grammar)
        if grammar is not None:
            parts.append(grammar)
        if params.bad_words or params.allowed_token_ids is not None:
            parts.append(self._vocabulary_of(params, client))
        return All(parts) if len(parts) > 1 else next(iter(parts), None)

    def _vocabulary_of(self, params: SamplingParams, client: str) -> Vocabulary:
        """Made once for the prompts of one request, which share `params`."""
        made_for, vocabulary = self._vocabulary
        if made_for is not params:
            bad = self._bad_tokens(params.bad_words or (), client)
            vocabulary = Vocabulary(params.allowed_token_ids, bad)
            self._vocabulary = params, vocabulary
        return vocabulary.copy()

    def _bad_tokens(self, words: Seq[str], client: str) -> list[list[int]]:
        """The tokens of each word, at the start of a text and after a space."""
        if not words:
            return []
        self.need_tokenizer("bad_words")
        assert self._sandbox is not None
        texts = [text for word in words for text in (word, " " + word.lstrip())]
        return [ids for ids in self._sandbox.encode_now(texts, False, client) if ids]

    def _matcher(self, constraint: StructuredOutputsParams, client: str) -> Matcher:
        tokenizer = self.need_tokenizer("structured_outputs")
        assert self._sandbox is not None
        sandbox = self._sandbox
        with self._lock:
            if self._grammars is None:
                self._grammars = GrammarCompiler(tokenizer, self._vocab)
        grammar = sandbox.grammar(constraint, client).result()
        field = constrained_field(constraint)
        return self._grammars.build(
            grammar,
            field,
            lambda: sandbox.condemn(constraint, too_slow(field)),
            client,
        )

    def _token_texts(self) -> TokenTexts:
        with self._lock:
            if self._texts is None:
                self._texts = TokenTexts(self.need_tokenizer("calls"), self._vocab)
            return self._texts

    def _generation(
        self, request: Request, index: int, seed: int, matcher: Constraint | None, prompt: PromptTokens
    ) -> Generation:
        params, ids = request.params, request.prompt_token_ids
        room = self._max_len - len(ids)
        max_output = room if params.max_tokens is None else min(room, params.max_tokens)
        state = SamplingState(
            params=params,
            seed=seed,
            prompt=prompt,
            end_ids=self._ends(params) if params.min_tokens else (),
            matcher=matcher if matcher is None or index == 0 else matcher.copy(),
        )
        return Generation(
            request,
            index,
            state,
            id=next(self._ids),
            max_output=max_output,
            order=request.arrival_time + request.priority * self._config.priority_step,
            eos_ids=self._eos,
            tokenizer=self._tokenizer,
        )
