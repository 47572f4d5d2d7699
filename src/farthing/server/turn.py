"""One assistant turn for any API: render the conversation, submit it, parse the output, answer."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from farthing.conversation.base import THINK
from farthing.conversation.types import CallArguments, CallStart, Conversation, Delta, collect
from farthing.conversation.types import Turn as ChatTurn
from farthing.engine.request import (
    CompletionOutput,
    FinishReason,
    Position,
    ReasoningParams,
    Rendering,
    StructuredOutputsParams,
)
from farthing.server.errors import ApiError
from farthing.server.formats import (
    IGNORED_HEADER,
    Grammars,
    ModelFormat,
    ModelFormats,
    Reading,
    grammars_of,
    ignored_fields,
    with_known_effort,
)
from farthing.server.jobs import Usage
from farthing.server.memory import Prompt
from farthing.server.sampling import build_params
from farthing.server.schema import CHAT, FieldNames
from farthing.server.stream import Ending, EventStream, PiecedAnswer, to_json
from farthing.server.work import encode, render, submit

if TYPE_CHECKING:
    from farthing.server.jobs import Job
    from farthing.server.service import Service

log = logging.getLogger(__name__)

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


# One assistant turn: what it owns, from the request to the last delta.


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


class Writer(Protocol):
    """Converts the updates of a turn to the documents of one API."""

    @property
    def ending(self) -> Ending:
        """The events after the last update."""

    @property
    def opening(self) -> Callable[[], str] | None:
        """Writes the API's first events, unless they were written; None: it has none."""

    @property
    def pieced(self) -> bool:
        """Whether the whole document contains `Pieces`."""

    def stream(self) -> AsyncIterator[str]:
        """SSE events, one string per engine output."""

    async def whole(self) -> dict[str, Any]:
        """The complete document."""


class _Completion:
    """One completion of the prompt, as far as it has been read."""

    def __init__(self, reading: Reading) -> None:
        self.parser = reading.parser()
        reasons = reading.tags is not None or reading.format.form.whole
        self.counter = reading.counter() if reasons else None
        self.tokens: list[int] = []
        self.deltas: list[Delta] = []


class Turn:
    """The assistant's turn: the conversation, its prompt, the job that continues it, and the parsers of its
    completions. `begin`, then iterate `updates` once, under the job's guard.
    """

    job: Job
    usage: Usage

    def __init__(self, service: Service, request: TurnRequest, client: str) -> None:
        self._service, self._request, self._client = service, request, client
        self._conversation = request.conversation
        self._prompt, self._tokenized = "", Prompt([])
        self._head: list[int] = []  # tokens with which the answer is made to begin
        self._completions: dict[int, _Completion] = {}  # by index
        self._ignored = request.ignored

    async def begin(self) -> Turn:
        """Render, encode and submit. If it raises ApiError, no request was started."""
        request, service = self._request, self._service
        formats = service.chosen_formats or await service.formats()
        whole = request.conversation
        await (self._write_truncated(formats) if request.truncate else self._write(formats, whole))
        conversation = self._conversation
        with_calls = bool(conversation.tools) or conversation.has_calls
        chosen = _format_of(formats, conversation)
        tags = chosen.form.tags
        max_tokens = request.sampling.get("max_tokens")
        within = tags or chosen.form.within
        opened = within is not None and self._prompt.rstrip().endswith(within.open.rstrip())
        grammars = Grammars()
        if request.structured is not None or conversation.tools:
            grammars = grammars_of(conversation, request.structured, chosen, formats, max_tokens)
            if grammars.whole and not opened:
                tags = None  # the grammar applies from the first token on
        answer = within.close if opened and tags is None and within is not None else chosen.form.answer
        if answer and grammars.structured is not None and not conversation.resume:
            (self._head,) = await encode(service, [answer], False, self._client, request.names.prompt)
            opened = False
        raw = request.sampling.get("skip_special_tokens") is False
        marked = {} if grammars.listed and tags is None else chosen.markup
        self._reading = Reading(
            format=chosen,
            conversation=conversation,
            tags=tags,
            opened=opened,
            listed=grammars.listed,
            tokens=(tokens := frozenset(marked.values())),
            meaningless=frozenset() if raw else tokens & chosen.form.markup,
            calls=with_calls or chosen.form.whole,
        )
        ids = self._tokenized.ids + self._head
        self.usage = Usage(len(ids), with_cost=request.with_cost)
        self.job = await submit(
            service,
            self._client,
            [ids],
            build_params(self._sampling(formats, grammars, marked)),
            priority=request.priority,
            cache_salt=request.cache_salt,
            kind="delta" if request.stream else "final",
            names=replace(request.names, structured="tools") if grammars.listed else request.names,
        )
        if (latest := self._tokenized.latest) is not None:
            service.answers.continued[latest] += 1
        wishes = request.conversation.effort, request.conversation.thinking, request.thinking_budget
        if any(wish is not None for wish in wishes):
            self._ignored += ignored_fields(
                request.conversation, request.thinking_budget, request.names, chosen, opened=opened
            )
        if self._ignored:
            what, form = ", ".join(self._ignored), chosen.form.name
            log.warning("ignored %s: the chat format %r has nothing to map it to", what, form)
        return self

    async def count(self) -> int:
        """How many tokens the prompt has. Raises ApiError."""
        formats, request = await self._service.formats(), self._request
        whole = request.conversation
        await (self._write_truncated(formats) if request.truncate else self._write(formats, whole))
        return len(self._tokenized.ids)

    async def updates(self) -> AsyncIterator[list[Update]]:
        """Yield the updates of each engine output. Raises ApiError if the engine fails."""
        async for _, output in self.job.outputs():
            self.usage.prompts[0] = output.metrics
            yield [self._read(completion, output.prompt_logprobs) for completion in output.outputs]

    async def whole(self) -> list[Update]:
        """One update per choice, in order."""
        updates = [update async for each in self.updates() for update in each]
        return sorted(updates, key=lambda update: update.index)

    async def answer(self, http: Request, writer: Writer) -> Response:
        """The response, streamed or as one document, with the header that names the fields that were ignored.
        Raises ApiError, ClientGone."""
        config = self._service.config
        if self._request.stream:
            stream = writer.stream()
            response: Response = EventStream(
                self.job, stream, writer.ending, opening=writer.opening, every=config.keep_alive,
                headers=self.usage.headers,
            )  # fmt: skip
        else:
            document = await self.job.guard(http.receive, writer.whole())
            if writer.pieced:
                pieces, seconds = self._service.piece_writer, config.request_timeout
                response = PiecedAnswer(document, pieces, self._client, seconds)
            else:
                response = Response(to_json(document), media_type="application/json")
            response.headers.update(self.usage.headers())
        if self._ignored:
            response.headers[IGNORED_HEADER] = ", ".join(self._ignored)
        return response

    # the prompt

    async def _write(self, formats: ModelFormats, conversation: Conversation) -> None:
        """Render and encode a conversation."""
        prompt = await prompt_of(self._service, formats, conversation, self._client, self._request.names)
        (ids,) = await encode(self._service, [prompt], False, self._client, self._request.names.prompt)
        assert formats.tokenizer is not None  # or there would be no prompt
        tokenized = self._service.answers.prompt(self._client, ids, formats.tokenizer)
        self._conversation, self._prompt, self._tokenized = conversation, prompt, tokenized

    async def _write_truncated(self, formats: ModelFormats) -> None:
        """The same for as much of the conversation as fits next to the answer; for all of it if nothing does,
        so that the error tells its length."""
        longest = self._service.require_engine().config.max_model_len
        assert longest is not None
        room = longest - (self._request.sampling.get("max_tokens") or 1)

        async def attempt(conversation: Conversation) -> tuple[Conversation, str, Prompt] | None:
            try:
                await self._write(formats, conversation)
            except ApiError as error:
                if error.code != "context_length_exceeded":
                    raise
                return None
            fits = len(self._tokenized.ids) <= room
            return (conversation, self._prompt, self._tokenized) if fits else None

        written = await fitting(self._request.conversation, attempt)
        if written is None:
            await self._write(formats, self._request.conversation)
        else:
            self._conversation, self._prompt, self._tokenized = written

    # what the engine samples

    def _sampling(
        self, formats: ModelFormats, grammars: Grammars, marked: Mapping[int, str]
    ) -> dict[str, Any]:
        """Fields of SamplingParams."""
        reading, conversation = self._reading, self._conversation
        values = {**self._request.sampling, "marked_token_ids": frozenset(marked)}
        if (conversation.tools or conversation.has_calls) and not conversation.offered:
            # The model would imitate the calls in its history, and the client would get an empty answer.
            unwanted = (reading.format.form.calling or reading.format.form.markup) & reading.tokens
            values["bad_words"] = [*(values.get("bad_words") or ()), *sorted(unwanted)] or None
        if reading.format.stops:
            values["stop_token_ids"] = [*(values.get("stop_token_ids") or ()), *reading.format.stops]
        budget = self._request.thinking_budget
        bounded = reading.tags is not None and (budget is not None or (reading.opened and grammars.whole))
        if bounded and reading.format.close:
            values["reasoning"] = ReasoningParams(
                end=reading.format.close, start=reading.format.tags[0], open=reading.opened, budget=budget
            )
        return values | {"structured_outputs": grammars.structured, "calls": grammars.calls}

    # the answer

    def _read(self, output: CompletionOutput, prompt_logprobs: Any) -> Update:
        completion = self._completions.get(output.index)
        if completion is None:
            completion = self._completions[output.index] = _Completion(self._reading)
        parser, counter, ended = completion.parser, completion.counter, output.finish_reason is not None
        if counter is not None:
            before = counter.tokens
            counter.push(output.token_ids, parser.reasoning, parser.calling)
            self.usage.reasoning_tokens += counter.tokens - before
        deltas = parser.push(output.text, last=ended)
        completion.tokens += output.token_ids
        completion.deltas += deltas
        self.usage.completion_tokens += len(output.token_ids)
        whole = output.finish_reason in ("stop", "length") and not isinstance(output.stop_reason, str)
        if whole and not self._reading.listed:  # or the client does not get what the model wrote
            answer = self._head + completion.tokens
            self._service.answers.remember(self._client, self._tokenized, answer)
        return Update(
            index=output.index,
            deltas=self._wanted(deltas) if parser.calls else deltas,
            tokens=output.token_ids,
            logprobs=output.logprobs,
            prompt_logprobs=prompt_logprobs,
            finish=output.finish_reason,
            stop_reason=output.stop_reason,
            calls=parser.calls if self._conversation.offered else 0,
            cut=isinstance(output.stop_reason, str) and _amid_call(completion.deltas),
        )

    def _wanted(self, deltas: list[Delta]) -> list[Delta]:
        """Keep only the first call if parallel calls are off, and none without tools that may be called."""
        limit = 1 if self._conversation.offered else 0
        if limit and self._conversation.parallel_calls:
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


def _format_of(formats: ModelFormats, conversation: Conversation) -> ModelFormat:
    """The format of a conversation."""
    uses_tools = bool(conversation.offered) or conversation.has_calls
    return formats.tools if uses_tools else formats.plain


async def prompt_of(
    service: Service,
    formats: ModelFormats,
    conversation: Conversation,
    client: str,
    names: FieldNames = CHAT,
) -> str:
    """The prompt of a conversation, with marks in text that is not to become control tokens. Raises ApiError
    (400) if the format cannot express it."""
    if formats.tokenizer is None:
        raise ApiError(400, "the model is served without a tokenizer, and so without a chat template")
    chosen = _format_of(formats, conversation)
    if conversation.effort is not None:
        conversation = with_known_effort(conversation, chosen.form)
    if conversation.has_calls:
        conversation = conversation.with_results_in_call_order()
    rendering = Rendering(
        conversation,
        None if chosen.own else chosen.form.name,
        chosen.form.tags or THINK,
        formats.control,
        formats.efforts,
        service.require_engine().config.trust_special_tokens,
    )
    return await render(service, rendering, client, names.prompt)


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
