"""/v1/chat/completions and /v1/completions: a conversation or prompts in, text out, streamed or not."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from fastapi import Body, FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from farthing.conversation.types import (
    Answer,
    CallArguments,
    CallStart,
    Conversation,
    Delta,
    Reasoning,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
    collect,
)
from farthing.conversation.types import Turn as ChatTurn
from farthing.engine.request import CompletionOutput, RequestOutput, SamplingParams, StructuredOutputsParams
from farthing.server.api.openai_protocol import (
    AllowedChoice,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorResponse,
    Function,
    Message,
    NamedChoice,
    NamedFunction,
    Thinking,
    TokenizeRequest,
)
from farthing.server.api.openai_protocol import Tool as ToolField
from farthing.server.errors import STATUSES, ApiError, Documented
from farthing.server.formats import thinking_of
from farthing.server.jobs import Job, Usage
from farthing.server.sampling import (
    IssuedCalls,
    chat_logprobs,
    chat_sampling,
    completion_logprobs,
    completion_params,
    prompt_logprobs,
    structured,
    structured_field,
)
from farthing.server.schema import CHAT, COMPLETIONS, FieldNames
from farthing.server.service import Service
from farthing.server.stream import OPENAI, ChunkWriter, EventStream, PiecedAnswer, Pieces, event, to_json
from farthing.server.turn import Turn, TurnRequest, Update, prompt_of
from farthing.server.work import decode, encode, submit

ERRORS: Documented = {status: {"model": ErrorResponse} for status in STATUSES}

# /v1/completions: prompts in, text out.


async def complete(service: Service, body: CompletionRequest, request: Request, client: str) -> Response:
    """Answer a completion request, streamed or as one document. Raises ApiError, ClientGone."""
    engine = service.require_engine()
    model = service.check_model(body.model)
    if body.suffix:
        raise ApiError(
            400, "suffix is not supported: the model was not trained to fill in the middle", param="suffix"
        )
    params = completion_params(body, engine.default_sampling)
    prompts, texts = await _prompts(service, body, client)
    job = await submit(
        service,
        client,
        prompts,
        params,
        priority=body.priority,
        cache_salt=body.cache_salt or "",
        kind="delta" if body.stream else "final",
        names=replace(COMPLETIONS, structured=structured_field(body, body.response_format)),
    )
    answer = _Answer(service, body, model, params, prompts, texts)
    if body.stream:
        chunks, headers = answer.stream(job), answer.usage.headers
        return EventStream(job, chunks, every=service.config.keep_alive, headers=headers)
    document = await job.guard(request.receive, answer.whole(job))
    if params.logprobs is not None or params.prompt_logprobs is not None:
        pieces, seconds = service.piece_writer, service.config.request_timeout
        response: Response = PiecedAnswer(document, pieces, client, seconds)
    else:
        response = Response(to_json(document), media_type="application/json")
    response.headers.update(answer.usage.headers())
    return response


async def _prompts(
    service: Service, body: CompletionRequest, client: str
) -> tuple[list[list[int]], list[str | None]]:
    """Token ids of each prompt, and its text if it was given as text."""
    prompt: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(prompt[0], int):
        prompt = [prompt]
    texts = [item if isinstance(item, str) else None for item in prompt]
    if isinstance(prompt[0], str):
        return await encode(service, prompt, body.add_special_tokens, client), texts
    return prompt, texts


@dataclass(slots=True)
class _Echo:
    """The text that echo prepends to a completion."""

    text: str
    tokens: list[int]
    positions: list[Any]  # log probabilities, if requested


class _Answer:
    """Converts the engine's outputs to documents."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        model: str,
        params: SamplingParams,
        prompts: list[list[int]],
        texts: list[str | None],
    ) -> None:
        self.body, self.params = body, params
        self._per_prompt = body.n or 1
        self.prompts, self.texts = prompts, texts
        self.tokenizer = service.require_engine().tokenizer
        self.token_texts, self.piece_writer = service.token_texts(), service.piece_writer
        self.envelope = {
            "id": f"cmpl-{body.request_id or uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self.usage = Usage(sum(len(prompt) for prompt in prompts), with_cost=body.x_farthing)
        self._offsets: dict[int, int] = {}  # by choice: characters so far
        self._echoes: dict[int, _Echo] = {}  # by prompt, the same for all of its choices

    async def whole(self, job: Job) -> dict[str, Any]:
        """The complete document."""
        choices: list[dict[str, Any]] = []
        async for position, output in job.outputs():
            self.usage.prompts[position] = output.metrics
            echo = self._echo(position, output)
            for completion in output.outputs:
                choice = self._choice(position, completion, echo)
                if self.body.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs, self.token_texts)
                choices.append(choice)
        choices.sort(key=lambda choice: int(choice["index"]))
        return self.envelope | {"choices": choices, "usage": self.usage.document(job)}

    async def stream(self, job: Job) -> AsyncIterator[str]:
        """Yield SSE chunks, one string per engine output."""
        writer = ChunkWriter(self.envelope, self.usage, job, self.body.stream_options)
        plain = not self.body.echo and self.body.logprobs is None
        async for position, output in job.outputs():
            self.usage.prompts[position] = output.metrics
            deltas = (self._delta(position, output, completion) for completion in output.outputs)
            if plain:
                chunks = [writer.chunk(d) for d in deltas if d["text"] or d["finish_reason"]]
                if chunks:
                    yield "".join(chunks)
                continue
            events = chain.from_iterable(event(writer.document(delta)) for delta in deltas)
            async for piece in self.piece_writer.pieces(events, job.client):
                yield piece
        if writer.with_usage:
            yield writer.chunk()

    def _delta(self, position: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """The choice of a chunk; a completion's first one starts with the echo."""
        first = position * self._per_prompt + completion.index not in self._offsets
        return self._choice(position, completion, self._echo(position, output) if first else None)

    def _choice(self, position: int, completion: CompletionOutput, echo: _Echo | None) -> dict[str, Any]:
        index = position * self._per_prompt + completion.index
        tokens, text = completion.token_ids, completion.text
        positions: list[Any] = completion.logprobs or []
        if self.body.max_tokens == 0:
            tokens, text, positions = [], "", []
        self.usage.completion_tokens += len(tokens)
        if echo:
            text, tokens, positions = echo.text + text, echo.tokens + tokens, echo.positions + positions
        logprobs = None
        if self.body.logprobs is not None:
            offset = self._offsets.get(index, 0)
            logprobs = completion_logprobs(tokens, positions, self.body.logprobs, self.token_texts, offset)
        self._offsets[index] = self._offsets.get(index, 0) + len(text)
        finish = "length" if self.body.max_tokens == 0 else completion.finish_reason
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish,
            "stop_reason": completion.stop_reason,
        }

    def _echo(self, position: int, output: RequestOutput) -> _Echo | None:
        if not self.body.echo:
            return None
        if position not in self._echoes:  # only a request's first output has the prompt's probabilities
            text = self.texts[position]
            if text is None:
                text = self.tokenizer.decode(self.prompts[position]) if self.tokenizer else ""
            echo = _Echo(text, self.prompts[position], list(output.prompt_logprobs or []))
            self._echoes[position] = echo
        return self._echoes[position]


# /v1/chat/completions: a conversation in, the next turn out.

_RESERVED = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "self"}


async def chat(service: Service, body: ChatCompletionRequest, request: Request, client: str) -> Response:
    """Answer a chat request, streamed or as one document. Raises ApiError, ClientGone."""
    engine = service.require_engine()
    model = service.check_model(body.model)
    constraint = structured(body, body.response_format)
    turn = Turn(
        service,
        TurnRequest(
            conversation=conversation_of(body),
            sampling=chat_sampling(body, engine.default_sampling),
            structured=constraint,
            thinking_budget=_budget(body),
            priority=body.priority,
            cache_salt=body.cache_salt or "",
            stream=bool(body.stream),
            with_cost=body.x_farthing,
            names=_names(body, constraint) if _RENAMING & body.model_fields_set else CHAT,
            ignored=() if body.thinking is None else _ignored(body.thinking),
        ),
        client,
    )
    await turn.begin()
    turn.job.identity = identity = f"chatcmpl-{body.request_id or uuid.uuid4().hex}"
    envelope = {"id": identity, "object": "", "created": int(time.time()), "model": model}
    return await turn.answer(request, _Writer(body, turn, envelope, service))


# the request


def conversation_of(body: ChatCompletionRequest) -> Conversation:
    """The conversation in a body. Raises ApiError (400)."""
    thinking = body.enable_thinking
    if body.thinking is not None and (wish := thinking_of(body.thinking.type)[0]) is not None:
        thinking = wish
    options = dict(body.chat_template_kwargs or {})
    if taken := _RESERVED & set(options):
        raise ApiError(
            400,
            f"chat_template_kwargs sets {sorted(taken)}; use other names",
            param="chat_template_kwargs",
        )
    for name in ("thinking", "enable_thinking"):
        if thinking is None and isinstance(options.get(name), bool):
            thinking = options[name]
    return Conversation(
        turns=turns_of(body.messages),
        tools=(*map(tool_of, body.tools or ()), *map(_function, body.functions or ())),
        choice=_choice(body) if body.tools or body.functions else ToolChoice(),
        parallel_calls=body.parallel_tool_calls is not False and not body.functions,
        thinking=thinking,
        effort=_effort(body),
        generate=body.add_generation_prompt,
        resume=body.continue_final_message,
        template_options=options,
    )


# Fields that a client may use instead of those in `CHAT`.
_RENAMING = {
    *("max_completion_tokens", "thinking", "reasoning", "enable_thinking", "response_format"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
}


def _names(body: ChatCompletionRequest, constraint: StructuredOutputsParams | None) -> FieldNames:
    """The names of the fields that the client used."""
    inner = body.thinking is not None and body.thinking.budget_tokens == _budget(body)
    return FieldNames(
        max_tokens="max_completion_tokens" if body.max_completion_tokens else "max_tokens",
        budget="thinking.budget_tokens" if inner else "max_thinking_tokens",
        effort="reasoning_effort" if body.reasoning_effort or not _effort(body) else "reasoning.effort",
        thinking="enable_thinking"
        if body.thinking is None and body.enable_thinking is not None
        else "thinking",
        structured=structured_field(body, body.response_format) if constraint else CHAT.structured,
    )


def _ignored(thinking: Thinking) -> tuple[str, ...]:
    _, known = thinking_of(thinking.type)
    return () if known else ("thinking.type",)


def _effort(body: ChatCompletionRequest) -> str | None:
    return body.reasoning_effort or (body.reasoning.effort if body.reasoning else None)


def _budget(body: ChatCompletionRequest) -> int | None:
    limits = [body.max_thinking_tokens, body.thinking.budget_tokens if body.thinking else None]
    return min((limit for limit in limits if limit is not None), default=None)


def turns_of(messages: list[Message]) -> tuple[ChatTurn, ...]:
    """The turns of messages. Raises ApiError (400) for results without a call."""
    turns = tuple(map(_turn, messages))
    if any(turn.calls or turn.role == "tool" for turn in turns):
        issued = IssuedCalls()
        return tuple(issued.add(t, f"messages[{at}].tool_call_id") for at, t in enumerate(turns))
    return turns


def _turn(message: Message) -> ChatTurn:
    calls = tuple(
        ToolCall(call.id or "", call.function.name, call.function.arguments)
        for call in message.tool_calls or ()
    )
    if (older := message.function_call) is not None:
        calls += (ToolCall("", older.name, older.arguments),)
    return ChatTurn(
        role="tool" if message.role == "function" else message.role,
        text=message.text,
        reasoning=message.reasoning_content or message.reasoning or "",
        calls=calls,
        call_id=message.tool_call_id,
        name=message.name,
        extra=message.model_extra or {},
    )


def tool_of(tool: ToolField) -> Tool:
    """One tool of a body."""
    return _function(tool.function)


def _function(function: Function) -> Tool:
    return Tool(function.name, function.description, function.parameters, function.strict)


def _choice(body: ChatCompletionRequest) -> ToolChoice:
    choice = body.tool_choice
    if isinstance(choice, NamedChoice):
        return ToolChoice("required", (choice.function.name,), single=True)
    if isinstance(choice, AllowedChoice):
        allowed = choice.allowed_tools
        return ToolChoice(allowed.mode, tuple(tool.function.name for tool in allowed.tools))
    if isinstance(body.function_call, NamedFunction):
        return ToolChoice("required", (body.function_call.name,), single=True)
    return ToolChoice(choice or body.function_call or "auto")


# the answer


class _Writer:
    """Converts updates to OpenAI's documents."""

    ending, opening = OPENAI, None

    def __init__(
        self, body: ChatCompletionRequest, turn: Turn, envelope: dict[str, Any], service: Service
    ) -> None:
        self._body, self._turn, self._envelope = body, turn, envelope
        self._service = service
        self.pieced = bool(body.logprobs) or body.prompt_logprobs is not None

    # whole

    async def whole(self) -> dict[str, Any]:
        """The complete document."""
        updates = await self._turn.whole()
        document = self._envelope | {
            "object": "chat.completion",
            "choices": [self._choice(update) for update in updates],
            "usage": self._turn.usage.document(self._turn.job),
        }
        if self._body.prompt_logprobs is not None:
            document["prompt_logprobs"] = prompt_logprobs(
                updates[0].prompt_logprobs, self._service.token_texts()
            )
        return document

    def _choice(self, update: Update) -> dict[str, Any]:
        answer = collect(update.deltas)
        return {
            "index": update.index,
            "message": self._message(answer),
            "logprobs": self._logprobs(update),
            "finish_reason": self._finish_reason(update),
            "stop_reason": update.stop_reason,
        }

    def _message(self, answer: Answer) -> dict[str, Any]:
        content = answer.text or (None if answer.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if answer.reasoning and self._body.include_reasoning:
            message["reasoning_content"] = message["reasoning"] = answer.reasoning
        calls = [
            {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
            for identity, name, arguments in answer.calls
        ]
        if calls and self._body.functions:
            message["function_call"] = calls[0]["function"]
        elif calls:
            message["tool_calls"] = calls
        return message

    # streamed

    async def stream(self) -> AsyncIterator[str]:
        """Yield SSE chunks, one string per engine output."""
        envelope = self._envelope | {"object": "chat.completion.chunk"}
        writer = ChunkWriter(envelope, self._turn.usage, self._turn.job, self._body.stream_options)
        begun: set[int] = set()
        async for updates in self._turn.updates():
            entries: list[dict[str, Any]] = []
            for update in updates:
                if update.index not in begun:
                    begun.add(update.index)
                    role = {"role": "assistant", "content": ""}
                    entries.append({"index": update.index, "delta": role, **_OPEN})
                entries += self._entries(update)
            if self._body.logprobs:
                events = chain.from_iterable(event(writer.document(entry)) for entry in entries)
                async for piece in self._service.piece_writer.pieces(events, self._turn.job.client):
                    yield piece
            elif entries:
                yield "".join(map(writer.chunk, entries))
        if writer.with_usage:
            yield writer.chunk()

    def _entries(self, update: Update) -> list[dict[str, Any]]:
        """`choices` entries of one update; a choice's last one has its finish reason."""
        deltas = [delta for delta in map(self._delta, update.deltas) if delta is not None]
        logprobs = self._logprobs(update) if self._body.logprobs and update.tokens else None
        if logprobs is not None and not deltas:
            deltas = [{"content": ""}]  # tokens whose text is held back already have probabilities
        entries = [{"index": update.index, "delta": delta, **_OPEN} for delta in deltas]
        if entries:
            entries[0]["logprobs"] = logprobs
        if update.finish is not None:
            end = {"finish_reason": self._finish_reason(update), "stop_reason": update.stop_reason}
            entries.append({"index": update.index, "delta": {}, **_OPEN, **end})
        return entries

    def _delta(self, delta: Delta) -> dict[str, Any] | None:
        match delta:
            case Text(text):
                return {"content": text}
            case Reasoning(text):
                named = {"reasoning_content": text, "reasoning": text}
                return named if self._body.include_reasoning else None
            case CallStart(index, identity, name):
                function = {"name": name, "arguments": ""}
                if self._body.functions:
                    return {"function_call": function}
                return {
                    "tool_calls": [{"index": index, "id": identity, "type": "function", "function": function}]
                }
            case CallArguments(index, text):
                if self._body.functions:
                    return {"function_call": {"arguments": text}}
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    # both

    def _finish_reason(self, update: Update) -> str:
        """ "tool_calls" if the model chose to call; a forced call ends with "stop", as with OpenAI, and so
        does one that a stop string cut off."""
        reason = update.finish or "stop"
        named = isinstance(self._body.tool_choice or self._body.function_call, NamedChoice | NamedFunction)
        if not update.calls or reason != "stop" or named or update.cut:
            return reason
        return "function_call" if self._body.functions else "tool_calls"

    def _logprobs(self, update: Update) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        top = self._body.top_logprobs or 0
        return chat_logprobs(update.logprobs or [], top, self._service.token_texts())


_OPEN: dict[str, Any] = {"logprobs": None, "finish_reason": None}  # of an entry before a choice's last one


# the routes


def add_routes(api: FastAPI, service: Service, streamed: Documented) -> None:
    """Add this API's routes. streamed: describes their answers in the OpenAPI document."""

    @api.post("/v1/completions", summary="Complete prompts", responses=streamed)
    async def completions(request: Request, body: CompletionRequest = Body()) -> Response:
        await service.unknown_fields.check(body, request.scope)
        return await complete(service, body, request, request.scope["client_name"])

    @api.post("/v1/chat/completions", summary="Answer a conversation", responses=streamed)
    async def chat_completions(request: Request, body: ChatCompletionRequest = Body()) -> Response:
        await service.unknown_fields.check(body, request.scope)
        return await chat(service, body, request, request.scope["client_name"])

    @api.post("/tokenize", summary="Text or a conversation to token ids")
    async def tokenize(request: Request, body: TokenizeRequest = Body()) -> Response:
        await service.unknown_fields.check(body, request.scope)
        engine = service.require_engine()
        service.check_model(body.model)
        client = request.scope["client_name"]
        if body.messages is None:
            (ids,) = await encode(service, [body.prompt or ""], body.add_special_tokens, client)
        else:
            conversation = Conversation(
                turns=turns_of(body.messages),
                tools=tuple(map(tool_of, body.tools or ())),
                generate=body.add_generation_prompt,
            )
            prompt = await prompt_of(service, await service.formats(), conversation, client)
            (ids,) = await encode(service, [prompt], False, client, "messages")
        document: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": engine.config.max_model_len,
            "tokens": Pieces(ids),
        }
        if body.return_token_strs and engine.tokenizer:
            text = engine.tokenizer.token_text
            document["token_strs"] = Pieces(map(text, ids))
        return PiecedAnswer(document, service.piece_writer, client, service.config.request_timeout)

    @api.post("/detokenize", summary="Token ids to text")
    async def detokenize(request: Request, body: DetokenizeRequest = Body()) -> Response:
        await service.unknown_fields.check(body, request.scope)
        service.check_model(body.model)
        return JSONResponse({"prompt": await decode(service, body.tokens, request.scope["client_name"])})
