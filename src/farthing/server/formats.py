"""The chat formats of the served model: how its answers are parsed and constrained, and how it reasons."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from farthing.conversation import forced
from farthing.conversation.base import EFFORTS, CallParser, ChatFormat, ControlTokens, NoCalls, Tags
from farthing.conversation.output import (
    ListedCalls,
    NamedCall,
    OutputParser,
    PlainParser,
    ReasoningCounter,
)
from farthing.conversation.select import Checkpoint, Habits, choose
from farthing.conversation.strict import call_grammar, forced_grammar
from farthing.conversation.types import Conversation
from farthing.engine.request import CallParams, StructuredOutputsParams
from farthing.server.errors import ApiError
from farthing.server.schema import FieldNames

if TYPE_CHECKING:
    from farthing.engine.engine import Engine
    from farthing.engine.tokenizer import Tokenizer
    from farthing.server.config import ServerConfig

log = logging.getLogger(__name__)

# A chat format in terms of the model's tokens. Nothing of it depends on a request.


@dataclass(frozen=True, slots=True)
class ModelFormat:
    """A chat format with the ids of its tokens in the model's tokenizer."""

    form: ChatFormat
    own: bool  # the model's own template renders it
    stops: tuple[int, ...]  # end a turn, besides the model's own
    ends: frozenset[int]  # end an answer: these and the model's own
    markup: Mapping[int, str]  # its markup that consists of control tokens
    tags: tuple[int | None, int | None]  # of the reasoning, where each is a single token
    close: tuple[int, ...]  # the tokens of the tag that closes it


@dataclass(frozen=True, slots=True)
class ModelFormats:
    """The chat formats of an engine's model."""

    plain: ModelFormat
    tools: ModelFormat  # for conversations with tools: another one if the own template never prints them
    tokenizer: Tokenizer | None
    control: ControlTokens
    efforts: tuple[str, ...]  # values of reasoning_effort that the own template accepts
    capabilities: tuple[str, ...]  # as `Chosen` has them

    @classmethod
    async def of(cls, engine: Engine, config: ServerConfig) -> ModelFormats:
        """Choose by the command line, the checkpoint's template, which is probed, and its tokenizer."""
        tokenizer = engine.tokenizer
        own = None if tokenizer is None or tokenizer.trusted_template else tokenizer.chat_template
        checkpoint = Checkpoint(
            engine.model_config.model_type,
            own,
            lambda token: tokenizer is not None and tokenizer.backend.token_to_id(token) is not None,
            await _habits(engine) if own is not None else Habits(),
        )
        reasoning = config.reasoning_parser
        chosen = choose(checkpoint, engine.config.chat_template, config.tool_call_parser, reasoning)
        if chosen.template is None:
            log.info("chat format: %s", chosen.plain.name)
        else:
            with_tools = "" if chosen.tools is chosen.plain else f"; {chosen.tools.name} with tools"
            habits = checkpoint.habits.described
            log.info("chat format: the model's template, which %s%s", habits, with_tools)
        plain = _in_tokens(chosen.plain, tokenizer, own=chosen.template is not None)
        tools = plain if chosen.tools is chosen.plain else _in_tokens(chosen.tools, tokenizer, own=False)
        control = _control(tokenizer)
        return cls(plain, tools, tokenizer, control, chosen.efforts, chosen.capabilities)

    def special_id(self, text: str) -> int | None:
        """The token id of a text that is a single control token, which no text in a grammar matches."""
        return None if self.tokenizer is None else _special_id(self.tokenizer, text)


def _in_tokens(form: ChatFormat, tokenizer: Tokenizer | None, *, own: bool) -> ModelFormat:
    if tokenizer is None:
        return ModelFormat(form, own, (), frozenset(), {}, (None, None), ())
    token_id = tokenizer.backend.token_to_id
    stops = tuple(token for stop in form.stops if (token := token_id(stop)) is not None)
    tags = (form.tags.open, form.tags.close) if form.tags else ()
    markup = ((_special_id(tokenizer, text), text) for text in (*form.markup, *tags))
    return ModelFormat(
        form,
        own,
        stops,
        frozenset((*stops, *tokenizer.eos_token_ids)),
        {token: text for token, text in markup if token is not None},
        (token_id(form.tags.open), token_id(form.tags.close)) if form.tags else (None, None),
        tuple(tokenizer.encode(form.tags.close, add_special_tokens=False)) if form.tags else (),
    )


def _special_id(tokenizer: Tokenizer, text: str) -> int | None:
    token: int | None = tokenizer.backend.token_to_id(text)
    return token if token in tokenizer.control_ids else None


def _control(tokenizer: Tokenizer | None) -> ControlTokens:
    default = ControlTokens()
    if tokenizer is None:
        return default
    bos = tokenizer.bos_token
    if bos is None:
        bos = default.bos if tokenizer.backend.token_to_id(default.bos) is not None else ""
    return ControlTokens(bos, tokenizer.eos_token or "")


async def _habits(engine: Engine) -> Habits:
    """The habits of the model's template, found in the sandbox, because a template is a program."""
    if engine.sandbox is None:
        return Habits()
    try:
        return Habits.of_document(await asyncio.wrap_future(engine.sandbox.habits()))
    except (ValueError, RuntimeError) as error:
        log.warning("the model's chat template failed: %s", error)
        return Habits()


def made_for(model: str, word: str) -> bool:
    """Whether a model's name or files tell that it was trained to `embed` or `rerank`."""
    return word in model.lower() or (word == "embed" and (Path(model) / "modules.json").is_file())


# The grammar of an answer: the client's, or the one of required or restricted tool calls.


@dataclass(frozen=True, slots=True)
class Grammars:
    """At most one of the two is set."""

    structured: StructuredOutputsParams | None = None  # of the whole answer
    calls: CallParams | None = None
    listed: bool = False  # `structured` forces calls as JSON instead of the model's format

    @property
    def whole(self) -> bool:
        """Whether a grammar applies from the beginning of the answer."""
        return self.structured is not None or (self.calls is not None and not self.calls.openers)


def grammars_of(
    conversation: Conversation,
    structured: StructuredOutputsParams | None,
    format: ModelFormat,
    formats: ModelFormats,
    room: int | None = None,
) -> Grammars:
    """structured: the client's constraint, used if no call is required. room: the answer's maximum number of
    tokens. Raises ApiError (400)."""
    required = conversation.choice.mode == "required"
    if structured is not None and not required:
        return Grammars(structured)
    syntax = format.form.syntax
    try:
        if required:
            grammar = forced_grammar(conversation, syntax, formats.special_id, room)
        else:
            grammar = call_grammar(conversation, syntax, formats.special_id)
    except ValueError as error:
        raise ApiError(400, str(error), param="tools", code="invalid_value") from error
    if grammar is not None:
        return Grammars(calls=CallParams(openers=grammar.openers, grammar=grammar.grammar))
    if required:
        return Grammars(StructuredOutputsParams(json=forced.schema(conversation, room)), listed=True)
    return Grammars()


# How the text of an answer is parsed.


@dataclass(frozen=True, slots=True)
class Reading:
    """How output text is parsed into deltas."""

    format: ModelFormat
    conversation: Conversation
    tags: Tags | None  # None: reasoning is not parsed
    opened: bool  # the prompt ends inside the reasoning
    listed: bool  # calls are JSON forced by a grammar instead of the model's format
    tokens: frozenset[str]  # markup that arrives as special tokens, each after a mark
    meaningless: frozenset[str]  # of these, the ones that are not shown where no call may be
    calls: bool  # the answer may hold calls, or the format's parser reads every answer

    def parser(self) -> OutputParser | PlainParser:
        """A parser for one completion."""
        if self.calls or self.tags is not None:
            return OutputParser(self._calls(), self.tags, self.opened, self.tokens)
        return PlainParser(self.meaningless)

    def counter(self) -> ReasoningCounter:
        """A counter of one completion's reasoning tokens."""
        return ReasoningCounter(*self.format.tags, self.opened)

    def _calls(self) -> CallParser:
        conversation = self.conversation
        if self.listed:
            return NamedCall(conversation.choice.names[0]) if conversation.choice.single else ListedCalls()
        if self.calls:
            form = self.format.form
            parser = form.calls(conversation.tools, self.tokens)
            if self.opened and form.within is not None:
                parser.push(form.within.open)
            return parser
        return NoCalls(self.meaningless)


# What a client requests of the reasoning, mapped to what the chat format can do. Clients send these fields
# to every model, so what a format cannot do is ignored, with a warning in the log and in a header.

IGNORED_HEADER = "X-Farthing-Ignored"  # names of the fields
SWITCHES = {"thinking", "enable_thinking"}  # passed to the chat template unchanged
_THINKING = {"enabled": True, "disabled": False, "adaptive": None, "auto": None}


def thinking_of(kind: str | None) -> tuple[bool | None, bool]:
    """What `thinking.type` says: whether to reason, and whether the word is known."""
    return (None, True) if kind is None else (_THINKING.get(kind), kind in _THINKING)


def with_known_effort(conversation: Conversation, form: ChatFormat) -> Conversation:
    """The conversation with the nearest effort that the format knows, of two the higher one."""
    effort, levels = conversation.effort, [word for word in form.efforts if word != "none"]
    if effort is None or effort in form.efforts:
        return conversation
    if effort not in EFFORTS or not form.efforts or (effort == "none" and "none" not in form.efforts):
        effort = None
    elif levels:
        wanted = EFFORTS.index(effort)
        effort = min(levels, key=lambda word: (abs(EFFORTS.index(word) - wanted), -EFFORTS.index(word)))
    return replace(conversation, effort=effort)


def ignored_fields(
    conversation: Conversation, budget: int | None, names: FieldNames, format: ModelFormat, *, opened: bool
) -> tuple[str, ...]:
    """The fields that the format cannot follow. opened: the prompt ends inside the reasoning."""
    effort, thinking, form = conversation.effort, conversation.thinking, format.form
    if format.own and conversation.template_options.keys() & SWITCHES:
        thinking = None
    switched = "none" in form.efforts
    always = form.reasons and (opened or not switched)  # or there is no telling
    never = not form.reasons and not form.efforts
    fields: list[str] = []
    if effort == "none":
        fields += [names.effort] * always
    elif effort is not None:
        fields += [names.effort] * (effort not in EFFORTS or not form.efforts)
    if thinking is not None:
        fields += [names.thinking] * (never if thinking else always)
    if budget is not None and form.tags is None:
        fields.append(names.budget)
    return tuple(fields)
