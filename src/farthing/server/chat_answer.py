"""Turns the engine's outputs into chat documents: text, reasoning and tool calls, streamed or whole."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from farthing.engine.request import CompletionOutput
from farthing.engine.tokenizer import Tokenizer
from farthing.server.events import chunk_frame, quote
from farthing.server.jobs import Job
from farthing.server.logprobs import chat_logprobs
from farthing.server.protocol import ChatCompletionRequest, NamedChoice
from farthing.server.reasoning import ReasoningParser, split_reasoning
from farthing.server.tools import (
    ArgumentsParser,
    CallArguments,
    CallStart,
    Content,
    DeepSeekParser,
    Event,
    JsonListParser,
    PlainParser,
    ToolParser,
)
from farthing.server.usage import Usage


class Choice:
    """One choice of a stream: text in, delta objects (as JSON) out."""

    def __init__(self, tools: ToolParser, prompt_opens: bool | None, single_call: bool) -> None:
        self.tools = tools
        self.reasoning = None if prompt_opens is None else ReasoningParser(prompt_opens)
        self.plain = self.reasoning is None and isinstance(tools, PlainParser)
        self.begun = False
        self._single_call = single_call

    def push(self, text: str) -> list[str]:
        """Deltas of one more piece of text."""
        if self.plain:
            return [f'{{"content":{quote(text)}}}'] if text else []
        if self.reasoning is None:
            return self._deltas(self.tools.push(text))
        return self._parts(self.reasoning.push(text))

    def finish(self) -> list[str]:
        """Deltas of what the parsers still hold."""
        deltas = self._parts(self.reasoning.finish()) if self.reasoning else []
        return deltas + self._deltas(self.tools.finish())

    def _parts(self, parts: list[Any]) -> list[str]:
        deltas: list[str] = []
        for kind, text in parts:
            if kind == "reasoning":
                deltas.append(f'{{"reasoning_content":{quote(text)}}}')
            else:
                deltas += self._deltas(self.tools.push(text))
        return deltas

    def _deltas(self, events: list[Event]) -> list[str]:
        return [_delta(event) for event in _wanted(events, self._single_call)]


def _wanted(events: list[Event], single_call: bool) -> list[Event]:
    """Without parallel calls only the first one counts."""
    return [e for e in events if not single_call or isinstance(e, Content) or e.index == 0]


def _delta(event: Event) -> str:
    if isinstance(event, Content):
        return f'{{"content":{quote(event.text)}}}'
    if isinstance(event, CallStart):
        function = f'{{"name":{quote(event.name)},"arguments":""}}'
        head = f'{{"tool_calls":[{{"index":{event.index},"id":{quote(event.id)},"type":"function",'
        return f'{head}"function":{function}}}]}}'
    return f'{{"tool_calls":[{{"index":{event.index},"function":{{"arguments":{quote(event.text)}}}}}]}}'


class ChatAnswer:
    """Documents of one chat request. prompt_opens: see chat._reasoning."""

    def __init__(
        self,
        *,
        body: ChatCompletionRequest,
        model: str,
        identity: str,
        created: int,
        prompt_tokens: int,
        tokenizer: Tokenizer | None,
        prompt_opens: bool | None,
    ) -> None:
        self.body, self.model, self.id, self.created = body, model, identity, created
        self.tokenizer, self.prompt_opens = tokenizer, prompt_opens
        self.usage = Usage(prompt_tokens, with_cost=body.x_farthing)
        self._single_call = body.parallel_tool_calls is False

    # whole

    async def whole(self, job: Job) -> dict[str, Any]:
        """The complete document."""
        choices: list[dict[str, Any]] = []
        async for _, output in job.outputs():
            self.usage.cached_tokens += output.num_cached_tokens
            choices += [self._whole_choice(completion) for completion in output.outputs]
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": sorted(choices, key=lambda choice: int(choice["index"])),
            "usage": self.usage.document(job),
        }

    def _whole_choice(self, completion: CompletionOutput) -> dict[str, Any]:
        self.usage.completion_tokens += len(completion.token_ids)
        reasoning, text = "", completion.text
        if self.prompt_opens is not None:
            reasoning, text = split_reasoning(text, self.prompt_opens)
            if reasoning and self.tokenizer:
                self.usage.reasoning_tokens += len(self.tokenizer.encode(reasoning, False))
        tools = self._tool_parser()
        content, calls = _collect(_wanted(tools.push(text) + tools.finish(), self._single_call))
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
        if reasoning and self.body.include_reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion),
            "finish_reason": self._finish_reason(completion, bool(calls)),
            "stop_reason": completion.stop_reason,
        }

    # streamed

    async def stream(self, job: Job) -> AsyncIterator[str]:
        """SSE chunks. What one output brings goes out as one string."""
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        head, tail = chunk_frame(self.id, "chat.completion.chunk", self.created, self.model, with_usage)
        choices: dict[int, Choice] = {}
        async for _, output in job.outputs():
            if output.finished:
                self.usage.cached_tokens += output.num_cached_tokens
            pieces: list[str] = []
            for completion in output.outputs:
                choice = choices.get(completion.index)
                if choice is None:
                    choice = Choice(self._tool_parser(), self.prompt_opens, self._single_call)
                    choices[completion.index] = choice
                for piece in self._chunks(choice, completion):
                    pieces += (head, piece, tail)
            if pieces:
                yield "".join(pieces)
        if with_usage:
            yield f'{head}],"usage":{json.dumps(self.usage.document(job))}}}\n\n'

    def _chunks(self, choice: Choice, completion: CompletionOutput) -> list[str]:
        """`choices` entries of one engine output; the first one names the role, the last one the reason."""
        count = len(completion.token_ids)
        self.usage.completion_tokens += count
        if choice.reasoning is not None and choice.reasoning.reasoning:
            self.usage.reasoning_tokens += count
        deltas = choice.push(completion.text)
        if completion.finish_reason is not None:
            deltas += choice.finish()
        if not self.body.include_reasoning:
            deltas = [delta for delta in deltas if not delta.startswith('{"reasoning_content"')]
        head = f'{{"index":{completion.index},"delta":'
        entries = []
        if not choice.begun:
            choice.begun = True
            entries.append(
                f'{head}{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}'
            )
        logprobs = "null"
        if self.body.logprobs and completion.token_ids:
            logprobs = json.dumps(self._logprobs(completion))
            deltas = deltas or ['{"content":""}']  # tokens whose text is held back still have probabilities
        for delta in deltas:
            entries.append(f'{head}{delta},"logprobs":{logprobs},"finish_reason":null}}')
            logprobs = "null"
        if completion.finish_reason is not None:
            reason = quote(self._finish_reason(completion, choice.tools.calls > 0))
            stop = json.dumps(completion.stop_reason)
            entries.append(f'{head}{{}},"logprobs":null,"finish_reason":{reason},"stop_reason":{stop}}}')
        return entries

    # both

    def _tool_parser(self) -> ToolParser:
        choice = self.body.tool_choice
        if isinstance(choice, NamedChoice):
            return ArgumentsParser(choice.function.name)
        if choice == "required":
            return JsonListParser()
        return DeepSeekParser() if self.body.tools and choice != "none" else PlainParser()

    def _finish_reason(self, completion: CompletionOutput, called: bool) -> str:
        """ "tool_calls" where the model chose to call; a call by name ends with "stop", as OpenAI's does."""
        reason = completion.finish_reason or "stop"
        named = isinstance(self.body.tool_choice, NamedChoice)
        return "tool_calls" if called and reason == "stop" and not named else reason

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(
            completion.token_ids, completion.logprobs or [], self.body.top_logprobs or 0, self.tokenizer
        )


def _collect(events: list[Event]) -> tuple[str, list[dict[str, Any]]]:
    """(text, tool calls) of a whole answer's events."""
    text: list[str] = []
    calls: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, Content):
            text.append(event.text)
        elif isinstance(event, CallStart):
            function = {"name": event.name, "arguments": ""}
            calls.append({"id": event.id, "type": "function", "function": function})
        elif isinstance(event, CallArguments):
            calls[event.index]["function"]["arguments"] += event.text
    return "".join(text), calls
