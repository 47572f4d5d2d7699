"""Outputs that obey a grammar, through llguidance.

llguidance and not xgrammar: it computes a mask from the grammar's state directly (tens of microseconds,
no compilation of a whole automaton at the start of a request), covers more of JSON Schema, and can roll
back, which verifying drafts needs. It is an optional extra: `pip install 'farthing[structured]'`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farthing.engine.request import StructuredOutputsParams
from farthing.engine.tokenizer import Tokenizer

# Room for indentation, but a weak model cannot fill its budget with blanks.
_JSON: Any = {"whitespace_pattern": r"[ \n\t]{1,16}"}


class Matcher:
    """The state of one grammar along one completion."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher = matcher
        self._words = words

    @property
    def stopped(self) -> bool:
        """Nothing may follow any more."""
        return bool(self._matcher.is_stopped())

    def consume(self, token: int) -> None:
        """Advance. Raises ValueError if the grammar does not allow the token."""
        if not self._matcher.consume_token(token):
            raise ValueError(f"structured output: token {token} refused: {self._matcher.get_error()}")

    def valid_prefix(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` the grammar allows from here."""
        return int(self._matcher.validate_tokens(list(tokens))) if tokens else 0

    def masks(self, drafts: Sequence[int], vocab: int) -> NDArray[np.bool_]:
        """[1 + len(drafts), vocab]: what may follow the completion and each further draft."""
        bits = np.full((1 + len(drafts), self._words), -1, dtype=np.int32)
        consumed = 0
        for i in range(1 + len(drafts)):
            if self._matcher.is_stopped():
                break  # the drafts end the text here; what is drawn behind is not used
            self._matcher.unsafe_compute_mask_ptr(bits[i].ctypes.data, bits[i].nbytes)
            if i < len(drafts) and self._matcher.try_consume_tokens([drafts[i]]) == 1:
                consumed += 1
        if consumed:
            self._matcher.rollback(consumed)
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little").view(np.bool_)
        if allowed.shape[1] < vocab:
            allowed = np.pad(allowed, ((0, 0), (0, vocab - allowed.shape[1])))
        return allowed[:, :vocab]

    def copy(self) -> Matcher:
        """An independent matcher in the same state."""
        return Matcher(self._matcher.deep_copy(), self._words)


class GrammarCompiler:
    """Compiles constraints for one tokenizer. Thread-safe; built at the first use."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise ValueError(
                "structured_outputs needs llguidance, not installed here: pip install 'farthing[structured]'"
            ) from error
        if not tokenizer.eos_token_ids:
            raise ValueError("structured_outputs needs an end-of-sequence token; the tokenizer names none")
        size = max(vocab_size, tokenizer.vocab_size)
        self._words = (size + 31) // 32
        eos = list(tokenizer.eos_token_ids)
        self._tokenizer = LLTokenizer(tokenizer.backend.to_str(), n_vocab=size, eos_token=eos)

    def compile(self, params: StructuredOutputsParams) -> Matcher:
        """Raises ValueError naming the field whose constraint is not understood."""
        from llguidance import LLMatcher

        field, grammar = _grammar(params)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"structured_outputs.{field} is not accepted: {matcher.get_error()}")
        return Matcher(matcher, self._words)


def _grammar(params: StructuredOutputsParams) -> tuple[str, str]:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if params.json is not None or params.json_object:
        schema = {"type": "object"} if params.json is None else params.json
        try:
            schema = json.loads(schema) if isinstance(schema, str) else dict(schema)
            return "json", LLMatcher.grammar_from_json_schema(schema, defaults=_JSON)
        except (ValueError, TypeError) as error:
            raise ValueError(f"structured_outputs.json is not a JSON schema: {error}") from error
    if params.regex is not None:
        return "regex", LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        options = " | ".join(json.dumps(option, ensure_ascii=False) for option in params.choice)
        return "choice", LLMatcher.grammar_from_lark(f"start: {options}")
    assert params.grammar is not None
    grammar = any_to_lark(params.grammar)
    return "grammar", LLMatcher.grammar_from_lark(grammar)
