"""One assistant turn for any API: fit and render the conversation, submit it, parse the output."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response

from farthing.conversation import forced
from farthing.conversation.base import THINK, CallParser, ChatFormat, NoCalls, Tags
from farthing.conversation.output import ListedCalls, NamedCall, OutputParser, ReasoningCounter
from farthing.conversation.scan import plain
from farthing.conversation.strict import call_grammar, forced_grammar
from farthing.conversation.types import CallArguments, CallStart, Conversation, Delta, collect
from farthing.conversation.types import Turn as ChatTurn
from farthing.conversation.untrusted import unmarked
from farthing.engine.request import (
    CallParams,
    CompletionOutput,
    FinishReason,
    Position,
    ReasoningParams,
    Rendering,
    StructuredOutputsParams,
)
from farthing.server.errors import ApiError
from farthing.server.formats import ModelFormats
from farthing.server.jobs import Usage
from farthing.server.sampling import build_params
from farthing.server.schema import CHAT, FieldNames
from farthing.server.thinking import IGNORED_HEADER, ignored, mapped, warn

if TYPE_CHECKING:
    from farthing.server.jobs import Job
    from farthing.server.service import Service


# The grammar of an answer: the client's, or the one of required or restricted tool calls.


@dataclass(frozen=True, slots=True)
class Grammars:
    """At most one of the two is set."""

    structured: StructuredOutputsParams | None  # of the whole answer
    calls: CallParams | None
    listed: bool = False  # `structured` forces calls as JSON instead of the model's format

    @property
    def whole(self) -> bool:
        """Whether a grammar applies from the beginning of the answer."""
        return self.structured is not None or (self.calls is not None and not self.calls.openers)


def grammars(
    conversation: Conversation,
    structured: StructuredOutputsParams | None,
    form: ChatFormat,
    formats: ModelFormats,
    room: int | None = None,
) -> Grammars:
    """structured: the client's constraint, used if no call is required. room: the answer's maximum number of
    tokens. Raises ApiError (400)."""
    required = conversation.choice.mode == "required"
    if structured is not None and not required:
        return Grammars(structured, None)
    try:
        if required:
            found = forced_grammar(conversation, form.syntax, formats.special_id, room)
        else:
            found = call_grammar(conversation, form.syntax, formats.special_id)
    except ValueError as error:
        raise ApiError(400, str(error), param="tools", code="invalid_value") from error
    if found is not None:
        return Grammars(None, CallParams(openers=found.openers, grammar=found.grammar))
    if required:
        return Grammars(StructuredOutputsParams(json=forced.schema(conversation, room)), None, listed=True)
    return Grammars(None, None)


# Drops the oldest turns of a conversation until it fits the model's context.

T = TypeVar("T")
_FIXED = ("system", "developer")


def droppable(turns: tuple[ChatTurn, ...]) -> list[tuple[int, int]]:
    """Ranges of turns that may be dropped, oldest first: requests, and answers with the results of their
    calls. Instructions, the last request and the last turns are kept."""
    starts = [
        at
        for at, turn in enumerate(turns)
        if turn.role in ("user", "assistant") or (turn.role in _FIXED and at and turns[at - 1].role == "tool")
    ]
    ranges = list(pairwise([*starts, len(turns)]))
    requests = [at for at, turn in enumerate(turns) if turn.role == "user"]
    kept = {*requests[-1:], *starts[-1:]}
    return [(start, end) for start, end in ranges if start not in kept and turns[start].role not in _FIXED]


def without(conversation: Conversation, dropped: list[tuple[int, int]]) -> Conversation:
    """A conversation without the turns in these ranges, except instructions."""
    gone = {at for start, end in dropped for at in range(start, end)}
    turns = tuple(turn for at, turn in enumerate(conversation.turns) if at not in gone or turn.role in _FIXED)
    return replace(conversation, turns=turns)


async def fitting(
    conversation: Conversation, attempt: Callable[[Conversation], Awaitable[T | None]]
) -> T | None:
    """The result for as much of a conversation as fits; None if nothing does.

    attempt: returns None if the prompt is too long. Bisection renders a long conversation only a few times.
    """
    result = await attempt(conversation)
    ranges = droppable(conversation.turns)
    if result is not None or not ranges:
        return result
    result = await attempt(without(conversation, ranges))
    low, high = 1, len(ranges)  # dropping `high` ranges is enough, if any number is
    while result is not None and low < high:
        middle = (low + high) // 2
        found = await attempt(without(conversation, ranges[:middle]))
        if found is None:
            low = middle + 1
        else:
            result, high = found, middle
    return result


# One assistant turn for any API: render the conversation, submit it, parse the output into deltas.

R = TypeVar("R", bound=Response)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """The parameters of an API request. sampling: fields of SamplingParams."""

    conversation: Conversation
    sampling: Mapping[str, Any] = field(default_factory=dict)
    structured: StructuredOutputsParams | None = None
    thinking_budget: int | None = None  # maximum number of reasoning tokens
    priority: int = 0
    cache_salt: str = ""
    stream: bool = False
    with_cost: bool = False
    names: FieldNames = CHAT
    truncate: bool = False  # drop the oldest turns of a conversation that is too long
    ignored: tuple[str, ...] = ()  # fields with values that mean nothing to any format


@dataclass(frozen=True, slots=True)
class Update:
    """An update of one choice. finish: None until its last update."""

    index: int
    deltas: list[Delta]
    tokens: list[int]
    logprobs: list[Position] | None
    prompt_logprobs: list[Position | None] | None
    finish: FinishReason | None
    stop_reason: int | str | None
    calls: int  # tool calls started so far
    cut: bool  # a stop string ended the answer amid a call


@dataclass(frozen=True, slots=True)
class Reading:
    """How output text is parsed into deltas."""

    formats: ModelFormats
    form: ChatFormat
    conversation: Conversation
    tags: Tags | None  # None: reasoning is not parsed
    opened: bool  # the prompt ends inside the reasoning
    listed: bool  # calls are JSON forced by a grammar instead of the model's format
    tokens: frozenset[str]  # markup that arrives as special tokens, each after a mark
    raw: bool  # the client wants to see special tokens

    def parser(self) -> OutputParser:
        """A parser for one choice."""
        return OutputParser(self._calls(), self.tags, self.opened, self.tokens)

    def counter(self) -> ReasoningCounter:
        """A counter of one choice's reasoning tokens."""
        if self.tags is None:
            return ReasoningCounter(None, None, opened=False)
        formats, tags = self.formats, self.tags
        return ReasoningCounter(formats.token_id(tags.open), formats.token_id(tags.close), self.opened)

    def _calls(self) -> CallParser:
        conversation = self.conversation
        if self.listed:
            return NamedCall(conversation.choice.names[0]) if conversation.choice.single else ListedCalls()
        if conversation.tools or conversation.has_calls:
            return self.form.calls(conversation.tools, self.tokens)
        return NoCalls(frozenset() if self.raw else self.tokens & self.form.markup)


class _Choice:
    """The state of one choice."""

    def __init__(self, reading: Reading) -> None:
        self.parser, self.counter = reading.parser(), reading.counter()
        self.tokens: list[int] = []
        self.deltas: list[Delta] = []


class Turn:
    """A turn in flight. Iterate `updates` once, under the job's guard."""

    def __init__(
        self,
        job: Job,
        usage: Usage,
        reading: Reading,
        remember: Callable[[list[int], list[Delta], bool], None],
        ignored: tuple[str, ...] = (),
    ) -> None:
        """remember: takes the tokens and deltas of an answer, and whether it is complete. ignored: fields of
        the request."""
        self._ignored = ignored
        self.job, self.usage = job, usage
        self._reading, self._remember = reading, remember
        self._choices: dict[int, _Choice] = {}

    async def updates(self) -> AsyncIterator[list[Update]]:
        """Yield the updates of each engine output. Raises ApiError if the engine fails."""
        async for _, output in self.job.outputs():
            self.usage.cached_tokens = output.num_cached_tokens
            yield [self._read(completion, output.prompt_logprobs) for completion in output.outputs]

    def answer(self, response: R) -> R:
        """A response with the header that names the fields that were ignored, if any."""
        if self._ignored:
            response.headers[IGNORED_HEADER] = ", ".join(self._ignored)
        return response

    async def whole(self) -> list[Update]:
        """One update per choice, in order."""
        found = [update async for updates in self.updates() for update in updates]
        return sorted(found, key=lambda update: update.index)

    def _read(self, completion: CompletionOutput, prompt_logprobs: Any) -> Update:
        choice = self._choices.get(completion.index)
        if choice is None:
            choice = self._choices[completion.index] = _Choice(self._reading)
        parser, counter, before = choice.parser, choice.counter, choice.counter.tokens
        counter.push(completion.token_ids, parser.reasoning, parser.calling)
        deltas = parser.push(completion.text)
        if completion.finish_reason is not None:
            deltas += parser.finish()
        choice.tokens += completion.token_ids
        choice.deltas += deltas
        if completion.finish_reason is not None and completion.stop_reason is None:
            self._remember(choice.tokens, choice.deltas, completion.finish_reason == "stop")
        self.usage.completion_tokens += len(completion.token_ids)
        self.usage.reasoning_tokens += counter.tokens - before
        return Update(
            index=completion.index,
            deltas=self._wanted(deltas),
            tokens=completion.token_ids,
            logprobs=completion.logprobs,
            prompt_logprobs=prompt_logprobs,
            finish=completion.finish_reason,
            stop_reason=completion.stop_reason,
            calls=parser.calls if self._reading.conversation.offered else 0,
            cut=isinstance(completion.stop_reason, str) and _amid_call(choice.deltas),
        )

    def _wanted(self, deltas: list[Delta]) -> list[Delta]:
        """Keep only the first call if parallel calls are off, and none without tools that may be called."""
        conversation = self._reading.conversation
        limit = 1 if conversation.offered else 0
        if limit and conversation.parallel_calls:
            return deltas
        return [
            delta
            for delta in deltas
            if not isinstance(delta, CallStart | CallArguments) or delta.index < limit
        ]


def _amid_call(deltas: list[Delta]) -> bool:
    """Whether the last call's arguments are incomplete."""
    calls = collect(deltas).calls
    if not calls:
        return False
    _, _, arguments = calls[-1]
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        return True
    return False


async def begin(service: Service, request: TurnRequest, client: str) -> Turn:
    """Render, encode and submit. If it raises ApiError, no request was started."""
    formats = await service.formats()
    conversation, prompt, ids = await _prompt(service, request, client)
    form = formats.of_conversation(conversation)
    room = request.sampling.get("max_tokens")
    limits = grammars(conversation, request.structured, form, formats, room)
    opened = form.tags is not None and prompt.rstrip().endswith(form.tags.open)
    # A grammar starts after reasoning opened by the prompt, otherwise at the first token.
    tags = form.tags if not limits.whole or opened else None
    marked = formats.markup(form) if tags is not None or not limits.listed else {}
    reading = Reading(
        formats=formats,
        form=form,
        conversation=conversation,
        tags=tags,
        opened=opened,
        listed=limits.listed,
        tokens=frozenset(marked.values()),
        raw=request.sampling.get("skip_special_tokens") is False,
    )
    values = dict(request.sampling) | {"marked_token_ids": frozenset(marked)}
    if not conversation.offered and (conversation.tools or conversation.has_calls):
        # The model would imitate the calls in its history, and the client would get an empty answer.
        unwanted = form.markup & frozenset(marked.values())
        values["bad_words"] = [*(values.get("bad_words") or ()), *sorted(unwanted)] or None
    values["stop_token_ids"] = [*(values.get("stop_token_ids") or ()), *formats.stops(form)] or None
    job = await service.open(
        client,
        [ids],
        build_params(
            values
            | {
                "structured_outputs": limits.structured,
                "calls": limits.calls,
                "reasoning": _reasoning(tags, opened, request.thinking_budget, limits.whole, formats),
            }
        ),
        priority=request.priority,
        cache_salt=request.cache_salt,
        kind="delta" if request.stream else "final",
        names=replace(request.names, structured="tools") if limits.listed else request.names,
    )

    def remember(tokens: list[int], deltas: list[Delta], stopped: bool) -> None:
        if limits.listed:
            return
        answer = collect(deltas)
        if stopped or (answer.text and not answer.calls):  # reasoning or a call cannot be closed midway
            ended = stopped and tokens[-1] in formats.ends(form)
            service.answers.remember(client, prompt, ids + tokens, answer, ended)

    own = formats.source(form) is not None
    unused = request.ignored + ignored(
        request.conversation, request.thinking_budget, request.names, form, opened=opened, own=own
    )
    warn(unused, form)
    return Turn(job, Usage(len(ids), with_cost=request.with_cost), reading, remember, unused)


async def count(service: Service, request: TurnRequest, client: str) -> int:
    """How many tokens the prompt of a request has. Raises ApiError."""
    return len((await _prompt(service, request, client))[2])


async def _prompt(service: Service, request: TurnRequest, client: str) -> tuple[Conversation, str, list[int]]:
    """The conversation, perhaps without its oldest turns, its prompt and the prompt's tokens."""

    async def written(conversation: Conversation) -> tuple[Conversation, str, list[int]]:
        prompt = await render(service, conversation, client, request.names)
        return conversation, prompt, await _encode(service, conversation, prompt, client, request.names)

    async def attempt(conversation: Conversation) -> tuple[Conversation, str, list[int]] | None:
        try:
            found = await written(conversation)
        except ApiError as error:
            if error.code != "context_length_exceeded":
                raise
            return None
        return found if len(found[2]) <= room else None

    if not request.truncate:
        return await written(request.conversation)
    longest = service.require_engine().config.max_model_len
    assert longest is not None
    room = longest - (request.sampling.get("max_tokens") or 1)
    return await fitting(request.conversation, attempt) or await written(request.conversation)


async def _encode(
    service: Service, conversation: Conversation, prompt: str, client: str, names: FieldNames
) -> list[int]:
    """The prompt's tokens, reusing the sampled tokens of the latest answer from this server."""
    turns, tokenizer = conversation.turns, (await service.formats()).tokenizer
    said = [position for position, turn in enumerate(turns) if turn.role == "assistant"]
    for position in reversed(said[-2:]):
        entry = service.answers.recall(client, turns[position], prompt)
        if entry is None or tokenizer is None:
            continue
        until = replace(conversation, turns=turns[: position + 1], generate=False, resume=False)
        head = await render(service, until, client, names)
        if not prompt.startswith(head) or entry.reasoning not in plain(head[entry.characters :]):
            continue  # the format now writes this turn differently, for instance without its reasoning
        tokens = entry.tokens.tolist()
        if not entry.ended:
            tokens += (await service.formats()).ending(head)
        elif not head.endswith(tokenizer.token_text(tokens[-1])):
            tokens.pop()  # the answer's end token is rendered with the next turn
        return tokens + await service.encode(prompt[len(head) :], False, client, names.prompt)
    return await service.encode(prompt, False, client, names.prompt)


def _reasoning(
    tags: Tags | None, opened: bool, budget: int | None, constrained: bool, formats: ModelFormats
) -> ReasoningParams | None:
    """The engine's reasoning parameters; None if it needs none."""
    if tags is None or formats.tokenizer is None or (budget is None and not (constrained and opened)):
        return None
    return ReasoningParams(
        end=tuple(formats.tokenizer.encode(tags.close, add_special_tokens=False)),
        start=formats.token_id(tags.open),
        open=opened,
        budget=budget,
    )


async def render(service: Service, conversation: Conversation, client: str, names: FieldNames = CHAT) -> str:
    """The prompt of a conversation, with marks in text that is not to become control tokens. Raises ApiError
    (400) if the format cannot express it."""
    engine, formats = service.require_engine(), await service.formats()
    form = formats.of_conversation(conversation)
    if engine.tokenizer is None:
        raise ApiError(400, "the model is served without a tokenizer, and so without a chat template")
    rendering = Rendering(
        mapped(conversation.with_results_in_call_order(), form),
        form.name if formats.source(form) is None else None,
        form.tags or THINK,
        formats.control,
        formats.chosen.efforts,
        engine.config.trust_special_tokens,
    )
    try:
        return await service.prompt(rendering, client, names.prompt)
    except ApiError as error:
        error.message = unmarked(error.message)
        raise


# The events of a turn with one answer, for APIs whose streams are a sequence of named events.


async def events_of(
    turn: Turn,
    opening: Callable[[], str],
    delta: Callable[[Delta], Sequence[str]],
    end: Callable[[Update], Sequence[str]],
) -> AsyncIterator[str]:
    """Yield SSE events, one string per engine output. opening: empty if those events were sent."""
    async for updates in turn.updates():
        (update,) = updates
        events = [opening()]
        for each in update.deltas:
            events += delta(each)
        if update.finish is not None:
            events += end(update)
        if text := "".join(events):
            yield text
