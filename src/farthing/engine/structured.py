"""Outputs constrained by a grammar, over the whole text or from a trigger on, within a client's mask time.

llguidance is used instead of xgrammar because it computes masks directly from the grammar's state (tens of
microseconds, without compiling a complete automaton at the start of a request), covers more of JSON Schema,
and can roll back, as required for verifying drafts. It is the optional extra
`structured`.

A grammar is untrusted: compiling it may take minutes or overflow the native stack. `examine` runs in a
child process (see `sandbox`); the engine only builds grammars that `examine` has returned.
"""

from __future__ import annotations

import json
import random
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as _Tokenizer

from farthing.conversation.scan import MARK, marked
from farthing.conversation.strict import MAX_CHARACTERS
from farthing.engine.constraints import Constraint, Masks, Refused
from farthing.engine.request import StructuredOutputsParams
from farthing.engine.tokenizer import Tokenizer
from farthing.shares import Shares

# Limits the time that one client's grammars may take on the engine's thread, which computes all masks.

FREE_SECONDS = 0.0003  # per mask; ordinary masks take less, even with 128,000 tokens
OWN_SECONDS = 0.002  # beyond that; a grammar that used less is not rejected
_CREDIT_SECONDS = 0.1
_REFILL = 0.05  # seconds of credit per second


class MaskTime:
    """The credit of each client. One mask may overdraw it; `examine` and the limits bound that mask's time.
    Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._shares = Shares(_CREDIT_SECONDS, _REFILL, clock=clock)
        self._lock = threading.Lock()

    def spent(self, client: str) -> bool:
        """Whether a client's credit is used up."""
        with self._lock:
            return self._shares.room(client) <= 0

    def charge(self, client: str, seconds: float) -> None:
        """Deduct time for masks."""
        with self._lock:
            self._shares.charge(client, seconds)


MAX_DEPTH = 64  # maximum nesting of a schema, and of brackets in a regex or grammar
MAX_VALUES = 32_768  # maximum values in a schema
MAX_CHOICES = 16_384
MAX_BUILD_SECONDS = 0.25  # to compile; `examine` rejects slower grammars. 16,000 choices take 0.1 s
MAX_MASK_SECONDS = 0.05  # for one token's mask; likewise. 1,000 optional properties take 0.02 s
OVERSPENT = (
    "structured_outputs is too complex: the grammars of this key that are in use take too long per token; "
    "expected simpler or fewer ones"
)
_TRIED_TOKENS = 64  # sampled by `examine`
# A row of a schema with n optional properties has 4n items. Ordinary schemas and regexes with 120,000 tokens
# need a quarter of the fuel; nested repetitions use any amount of it, 0.1 s here.
_LIMITS: Any = {
    "max_items_in_row": 16_000,
    "step_max_items": 30_000,
    "max_lexer_states": 20_000,
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 20_000,
}

_OPENING, _CLOSING = ([ord(character) for character in brackets] for brackets in ("([{", ")]}"))

# Between two tokens: a blank, or a new line and its indentation. A weak model fills its budget with any more.
_JSON: Any = {"whitespace_pattern": r"( |\n[ \t]{0,8})"}


def too_slow(field: str) -> str:
    """The error for a constraint that takes too long to compile or to use."""
    return (
        f"structured_outputs.{field} is too complex: it takes more than {1000 * MAX_BUILD_SECONDS:g} ms to "
        f"compile or {1000 * MAX_MASK_SECONDS:g} ms for one token; expected a simpler one"
    )


class _Cost:
    """Time spent on the copies of one matcher, and its limits."""

    __slots__ = ("_client", "_credit", "_on_slow", "_over", "field")

    def __init__(self, field: str, credit: MaskTime, client: str, on_slow: Callable[[], None]) -> None:
        """client: "" is not charged, as it has no other clients to delay."""
        self.field = field  # the constraint's field
        self._credit, self._client, self._on_slow = credit, client, on_slow
        self._over = 0.0  # seconds beyond the free time

    @property
    def exhausted(self) -> bool:
        """Whether the client's credit is used up and this grammar contributed to it."""
        return self._over > OWN_SECONDS and self._credit.spent(self._client)

    def charge(self, seconds: float, masks: int = 0) -> bool:
        """Add seconds. Returns whether the grammar is too slow regardless of credit."""
        over = seconds - masks * FREE_SECONDS
        if over > 0 and self._client:
            self._over += over
            self._credit.charge(self._client, over)
        if seconds <= MAX_MASK_SECONDS * max(1, masks):
            return False
        self._on_slow()
        return True


class Matcher:
    """The state of one grammar within one completion."""

    def __init__(self, matcher: Any, words: int, cost: _Cost) -> None:
        self._matcher = matcher
        self._words = words
        self._cost = cost
        self._refusal: str | None = None  # the reason if no further mask is computed

    @property
    def stopped(self) -> bool:
        """Whether the text is complete and no token may follow."""
        return bool(self._matcher.is_stopped())

    def consume(self, token: int) -> None:
        """Advance by a token. Raises Refused if it is not allowed, or the grammar is too slow."""
        if self._refusal is not None:
            raise Refused(self._refusal)
        began = time.thread_time()
        accepted = self._matcher.consume_token(token)
        self._cost.charge(time.thread_time() - began, masks=1)
        if not accepted:
            why, name = _brief(self._matcher.get_error()), f"structured_outputs.{self._cost.field}"
            if "too many" in why:  # states, expressions or items: see _LIMITS
                raise Refused(f"{name} is too complex ({why}); expected a simpler one")
            raise Refused(f"{name}: token {token} is not allowed: {why}")

    def valid_prefix(self, tokens: Sequence[int]) -> int:
        """Number of leading `tokens` that the grammar allows."""
        if not tokens or self._refusal is not None:
            return 0
        began = time.thread_time()
        valid = int(self._matcher.validate_tokens(list(tokens)))
        self._cost.charge(time.thread_time() - began, masks=len(tokens))
        return valid

    def masks(self, drafts: Sequence[int], vocab: int) -> NDArray[np.bool_]:
        """[1 + len(drafts), vocab]: tokens allowed after the completion and after each further draft."""
        bits = np.full((1 + len(drafts), self._words), -1, dtype=np.int32)
        if self._refusal is None and self._cost.exhausted:
            self._refusal = OVERSPENT
        if self._refusal is None:
            self._compute(bits, drafts)
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little").view(np.bool_)
        if allowed.shape[1] < vocab:
            allowed = np.pad(allowed, ((0, 0), (0, vocab - allowed.shape[1])))
        return allowed[:, :vocab]

    def _compute(self, bits: NDArray[np.int32], drafts: Sequence[int]) -> None:
        consumed = 0
        began = time.thread_time()
        for i in range(1 + len(drafts)):
            if self._matcher.is_stopped():
                break  # the drafts end the text; later samples are unused
            self._matcher.unsafe_compute_mask_ptr(bits[i].ctypes.data, bits[i].nbytes)
            if i < len(drafts) and self._matcher.try_consume_tokens([drafts[i]]) == 1:
                consumed += 1
        if consumed:
            self._matcher.rollback(consumed)
        if self._cost.charge(time.thread_time() - began, masks=1 + len(drafts)):
            self._refusal = too_slow(self._cost.field)

    def copy(self) -> Matcher:
        """An independent matcher in the same state."""
        return Matcher(self._matcher.deep_copy(), self._words, self._cost)


_INSTALL = "pip install --upgrade llguidance"


class GrammarCompiler:
    """Compiles constraints for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Raises ValueError if llguidance is missing or too old, or the tokenizer has no end-of-sequence
        token."""
        try:
            from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise ValueError(f"structured_outputs needs llguidance: {_INSTALL}") from error
        if not tokenizer.eos_token_ids:
            raise ValueError("structured_outputs needs an end-of-sequence token; the tokenizer names none")
        size = max(vocab_size, tokenizer.vocab_size)
        eos = list(tokenizer.eos_token_ids)
        self.vocab_size = size
        self.mask_time = MaskTime()
        self._words = (size + 31) // 32
        try:
            wrapper = TokenizerWrapper(_LiteralTokenizer(tokenizer, size, eos))
            self._limits = LLParserLimits(verbose_errors=False, **_LIMITS)
            self._tokenizer = LLTokenizer(wrapper, n_vocab=size, eos_token=eos)
        except (TypeError, AttributeError) as error:  # its interface has changed with its versions
            raise ValueError(
                f"structured_outputs does not work with llguidance {version('llguidance')} ({error}): "
                f"{_INSTALL}"
            ) from error

    def compile(self, params: StructuredOutputsParams) -> Matcher:
        """Translate and build. Raises ValueError with the field of an invalid constraint."""
        return self.build(translate(params), constrained_field(params))

    def build(
        self,
        grammar: str,
        field: str,
        on_slow: Callable[[], None] = lambda: None,
        client: str = "",
    ) -> Matcher:
        """A matcher for a grammar that `examine` returned. Raises ValueError. Releases the GIL.

        field: the constraint's field, for errors. on_slow: called if a mask is so slow that the grammar must
        not be used again. client: charged for the masks.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise ValueError(f"structured_outputs.{field} is not accepted: {_brief(matcher.get_error())}")
        return Matcher(matcher, self._words, _Cost(field, self.mask_time, client, on_slow))


class _LiteralTokenizer:
    """The tokenizer interface of llguidance: every token's bytes, and the tokenization of literal text.

    A grammar's literal is text even if it equals a special token, so it is split without added tokens.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, eos: Sequence[int]) -> None:
        from llguidance import LLTokenizer

        whole = tokenizer.backend.to_str()
        native = LLTokenizer(whole, n_vocab=size, eos_token=list(eos))
        self.eos_token_id = eos[0]
        self.tokens = [native.decode_bytes([token]) for token in range(size)]
        self.special_token_ids = [
            token for token in range(size) if native.is_special_token(token) or token in tokenizer.control_ids
        ]
        plain = json.loads(whole) | {"added_tokens": [], "post_processor": None}
        self._plain = _Tokenizer.from_str(json.dumps(plain))

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode()
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids


def examine(compiler: GrammarCompiler, params: StructuredOutputsParams) -> str:
    """Check, translate and compile a constraint, and sample some tokens. Returns the grammar's text.

    Raises ValueError if it is invalid, or if compiling it or a mask takes too long for the engine. May also
    run forever or crash the process: call it in a child.
    """
    grammar, field = translate(params), constrained_field(params)
    began = time.thread_time()
    matcher = compiler.build(grammar, field)
    if time.thread_time() - began > MAX_BUILD_SECONDS:
        raise ValueError(too_slow(field))
    rng = random.Random(0)
    for _ in range(_TRIED_TOKENS):
        if matcher.stopped:
            break
        (allowed,) = matcher.masks([], compiler.vocab_size)
        candidates = np.flatnonzero(allowed)
        if not len(candidates):
            raise ValueError(f"structured_outputs.{field} allows no token")
        matcher.consume(int(candidates[rng.randrange(len(candidates))]))
    return grammar


def constrained_field(params: StructuredOutputsParams) -> str:
    """The field with the constraint."""
    return next(field.name for field in fields(params) if getattr(params, field.name) not in (None, False))


def check_size(params: StructuredOutputsParams) -> None:
    """Raises ValueError for a constraint that is too large or too deep to be looked at, in linear time."""
    if isinstance(params.json, str):
        _check_text("json", params.json)
    elif params.json is not None:
        _check_schema(params.json)
    for field in ("regex", "grammar"):
        if (text := getattr(params, field)) is not None:
            _check_text(field, text)
    options = params.choice or ()
    if len(options) > MAX_CHOICES or sum(map(len, options)) > MAX_CHARACTERS:
        raise ValueError(
            f"structured_outputs.choice has {len(options)} options of {sum(map(len, options))} characters; "
            f"expected at most {MAX_CHOICES} of {MAX_CHARACTERS} together"
        )


def translate(params: StructuredOutputsParams) -> str:
    """A constraint as llguidance's grammar. Raises ValueError naming the field that is not accepted."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if params.json is not None or params.json_object:
        schema = _schema(params)
        try:
            return str(LLMatcher.grammar_from_json_schema(schema, defaults=_JSON))
        except (ValueError, TypeError) as error:
            raise ValueError(f"structured_outputs.json is not a JSON schema: {error}") from error
    if params.regex is not None:
        return str(LLMatcher.grammar_from_regex(params.regex))
    if params.choice is not None:
        # One terminal: the lexer walks a trie of the options instead of the parser a list of rules.
        options = " | ".join(json.dumps(option, ensure_ascii=False) for option in params.choice)
        return str(LLMatcher.grammar_from_lark(f"start: OPTION\nOPTION: {options}"))
    assert params.grammar is not None
    try:
        return str(LLMatcher.grammar_from_lark(any_to_lark(params.grammar)))
    except (ValueError, TypeError, KeyError, IndexError, AssertionError) as error:
        raise ValueError(f"structured_outputs.grammar is not a grammar: {error}") from error


def _schema(params: StructuredOutputsParams) -> dict[str, Any]:
    if params.json is None:
        return {"type": "object"}
    schema = params.json
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"structured_outputs.json is not JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise ValueError(f"structured_outputs.json: got {type(schema).__name__}; expected an object")
    _check_schema(schema)
    return dict(schema)


def _check_schema(schema: Mapping[str, Any]) -> None:
    values = characters = 0
    stack: list[tuple[Any, int]] = [(schema, 1)]
    while stack:
        value, depth = stack.pop()
        values += 1
        if isinstance(value, str):
            characters += len(value)
        if isinstance(value, Mapping):
            characters += sum(len(str(key)) for key in value)
            stack.extend((inner, depth + 1) for inner in value.values())
        elif isinstance(value, list | tuple):
            stack.extend((inner, depth + 1) for inner in value)
        if depth > MAX_DEPTH or values > MAX_VALUES or characters > MAX_CHARACTERS:
            raise ValueError(
                f"structured_outputs.json is too large; expected at most {MAX_DEPTH} levels, "
                f"{MAX_VALUES} values and {MAX_CHARACTERS} characters"
            )


def _check_text(field: str, text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"structured_outputs.{field} has {len(text)} characters; expected at most {MAX_CHARACTERS}"
        )
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    depth = np.cumsum(np.isin(codes, _OPENING).astype(np.int32) - np.isin(codes, _CLOSING))
    if len(depth) and depth.max() > MAX_DEPTH:
        raise ValueError(
            f"structured_outputs.{field} is nested {depth.max()} brackets deep; expected at most {MAX_DEPTH}"
        )


def _brief(error: str) -> str:
    text = " ".join(error.replace("<non-verbose/>", "").split())
    return text if len(text) <= 300 else text[:297] + "..."


_MARK = MARK.encode("utf-8", "surrogatepass")


class TokenTexts:
    """The bytes of every token, sorted, to find those that begin with a prefix.

    Those of control tokens follow a mark, so that no other tokens spell the same.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self._control = frozenset(map(tokenizer.token_text, tokenizer.control_ids))
        self._bytes = [tokenizer.token_bytes(token) for token in range(vocab)]
        for token in tokenizer.control_ids:
            if token < vocab:
                self._bytes[token] = _MARK + self._bytes[token]
        order = sorted(range(vocab), key=self._bytes.__getitem__)
        self._sorted = [self._bytes[token] for token in order]
        self._order = order

    def of(self, token: int) -> bytes:
        """The bytes of a token."""
        return self._bytes[token]

    def spelled(self, text: str) -> bytes:
        """The bytes of a text, with every control token in it as that token."""
        return marked(text, self._control).encode("utf-8", "surrogatepass")

    def longer_than(self, prefix: bytes) -> list[int]:
        """Tokens that begin with a prefix and continue after it."""
        at = bisect_left(self._sorted, prefix)
        tokens = []
        while at < len(self._sorted) and self._sorted[at].startswith(prefix):
            if len(self._sorted[at]) > len(prefix):
                tokens.append(self._order[at])
            at += 1
        return tokens

    def running_past(self, text: bytes) -> list[int]:
        """Tokens that contain a whole text and continue after it."""
        return [token for token, piece in enumerate(self._bytes) if text in piece[:-1]]


class Openers:
    """Recognizes opening strings at the end of a text. Immutable; shared by the completions of a request."""

    def __init__(self, openers: Sequence[str], texts: TokenTexts) -> None:
        self._openers = list(map(texts.spelled, openers))
        self._texts = texts
        self._reach = max(map(len, self._openers)) - 1
        whole = [texts.running_past(opener) for opener in self._openers]
        self._contained = sorted({token for tokens in whole for token in tokens})
        self._past: dict[bytes, list[int]] = {}  # rest of an opener -> tokens that run past it

    def after(self, tail: bytes, token: int) -> tuple[bytes, bool]:
        """The end of the text after one more token, and whether an opening string is complete."""
        text = tail + self._texts.of(token)
        opened = any(text.endswith(opener) for opener in self._openers)
        return text[-self._reach :] if self._reach else b"", opened

    def forbidden(self, tail: bytes) -> list[int]:
        """Tokens that would complete an opening string and run past it: the grammar begins at its end."""
        tokens = list(self._contained)
        for opener in self._openers:
            for size in range(1, len(opener)):
                if tail.endswith(opener[:size]):
                    rest = opener[size:]
                    if rest not in self._past:
                        self._past[rest] = self._texts.longer_than(rest)
                    tokens += self._past[rest]
        return tokens


class TriggeredGrammar:
    """A constraint of parts of a text; `outside` constrains the free text.

    The grammar of a part applies from each occurrence of an opening string until the grammar ends.

    A grammar for the whole answer cannot enforce a schema on tool calls and still allow a free-text answer.
    Free text needs no masks, except for the few tokens that would run past an opening string.
    """

    __slots__ = ("_fresh", "_inside", "_openers", "_outside", "_tail")

    def __init__(self, fresh: Matcher, openers: Openers, outside: Constraint | None = None) -> None:
        """fresh: the grammar's state right after an opening string; it is copied and never advanced."""
        self._fresh, self._openers, self._outside = fresh, openers, outside
        self._inside: Matcher | None = None
        self._tail = b""  # of the free text

    @property
    def stopped(self) -> bool:
        """Nothing may follow any more."""
        return self._inside is None and self._outside is not None and self._outside.stopped

    def consume(self, token: int) -> None:
        """Advance. Raises ValueError if the token is not allowed."""
        if self._inside is not None:
            self._inside.consume(token)
            if self._inside.stopped:
                self._inside, self._tail = None, b""
            return
        if self._outside is not None:
            self._outside.consume(token)
        self._tail, opened = self._openers.after(self._tail, token)
        if opened:
            self._inside = self._fresh.copy()

    def valid_prefix(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` are allowed from here."""
        if not tokens:
            return 0
        here = self.copy()
        for position, token in enumerate(tokens):
            if not here._allows(token):
                return position
            here.consume(token)
        return len(tokens)

    def masks(self, drafts: Sequence[int], vocab: int) -> Masks:
        """[1 + len(drafts), vocab]: what may follow the completion and each further draft."""
        allowed = np.ones((1 + len(drafts), vocab), dtype=np.bool_)
        here = self.copy() if drafts else self
        for position in range(1 + len(drafts)):
            if here.stopped:
                break
            allowed[position] = here._row(vocab)
            if position < len(drafts):
                if not allowed[position, drafts[position]]:
                    break  # the draft is refused: what follows it is not used
                here.consume(drafts[position])
        return allowed

    def copy(self) -> TriggeredGrammar:
        """An independent constraint in the same state."""
        outside = None if self._outside is None else self._outside.copy()
        twin = TriggeredGrammar(self._fresh, self._openers, outside)
        twin._inside = None if self._inside is None else self._inside.copy()
        twin._tail = self._tail
        return twin

    def _row(self, vocab: int) -> Masks:
        source = self._inside or self._outside
        row = np.ones(vocab, dtype=np.bool_) if source is None else source.masks([], vocab)[0]
        if self._inside is None:
            row[[token for token in self._openers.forbidden(self._tail) if token < vocab]] = False
        return row

    def _allows(self, token: int) -> bool:
        source = self._inside or self._outside
        if source is not None and source.valid_prefix([token]) == 0:
            return False
        return self._inside is not None or token not in self._openers.forbidden(self._tail)
