"""/v1/completions: prompts in, text out."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from farthing.engine.request import CompletionOutput, RequestOutput, SamplingParams
from farthing.server.errors import ApiError
from farthing.server.events import EventStream, chunk_frame, quote
from farthing.server.jobs import Job
from farthing.server.logprobs import completion_logprobs
from farthing.server.protocol import CompletionRequest
from farthing.server.sampling import completion_params
from farthing.server.service import Service
from farthing.server.usage import Usage


async def complete(service: Service, body: CompletionRequest, request: Request, client: str) -> Response:
    """Answer a completion request, streamed or whole. Raises ApiError, ClientGone."""
    engine = service.require_engine()
    model = service.check_model(body.model)
    if body.suffix:
        raise ApiError(
            400, "suffix is not supported: the model was not trained to fill in the middle", param="suffix"
        )
    if body.best_of not in (None, body.n):
        raise ApiError(400, f"best_of is {body.best_of}; expected n = {body.n}", param="best_of")
    params = completion_params(body, engine.default_sampling)
    prompts, texts = await _prompts(service, body, client)
    job = await service.open(
        client,
        prompts,
        params,
        priority=body.priority,
        cache_salt=body.cache_salt or "",
        kind="delta" if body.stream else "final",
    )
    answer = _Answer(service, body, model, params, prompts, texts)
    if body.stream:
        return EventStream(job, answer.stream(job))
    document = await job.guard(request.receive, answer.whole(job))
    return Response(json.dumps(document), media_type="application/json")


async def _prompts(
    service: Service, body: CompletionRequest, client: str
) -> tuple[list[list[int]], list[str | None]]:
    """Token ids of each prompt, and its text where it was given as text."""
    prompt: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(prompt[0], int):
        prompt = [prompt]
    texts = [item if isinstance(item, str) else None for item in prompt]
    if isinstance(prompt[0], str):
        return await service.encode_all(prompt, body.add_special_tokens, client), texts
    return prompt, texts


@dataclass(slots=True)
class _Echo:
    """What echo puts before a completion."""

    text: str
    tokens: list[int]
    positions: list[Any]  # log probabilities, where asked for


class _Answer:
    """Turns the engine's outputs into documents."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        model: str,
        params: SamplingParams,
        prompts: list[list[int]],
        texts: list[str | None],
    ) -> None:
        self.body, self.model, self.params = body, model, params
        self.prompts, self.texts = prompts, texts
        self.tokenizer = service.require_engine().tokenizer
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", service.now()
        self.usage = Usage(sum(len(prompt) for prompt in prompts), with_cost=body.x_farthing)
        self._offsets: dict[int, int] = {}  # by choice: characters so far
        self._echoes: dict[int, _Echo] = {}  # by prompt; every choice of a prompt begins with the same

    async def whole(self, job: Job) -> dict[str, Any]:
        """The complete document."""
        choices: list[dict[str, Any]] = []
        async for position, output in job.outputs():
            self.usage.cached_tokens += output.num_cached_tokens
            echo = self._echo(position, output)
            for completion in output.outputs:
                choices.append(self._choice(position, completion, echo))
        choices.sort(key=lambda choice: int(choice["index"]))
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": self.usage.document(job),
        }

    async def stream(self, job: Job) -> AsyncIterator[str]:
        """SSE chunks. What one output brings goes out as one string."""
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        head, tail = chunk_frame(self.id, "text_completion", self.created, self.model, with_usage)
        plain = not self.body.echo and self.body.logprobs is None
        async for position, output in job.outputs():
            if output.finished:
                self.usage.cached_tokens += output.num_cached_tokens
            pieces: list[str] = []
            for completion in output.outputs:
                if plain and completion.finish_reason is None:
                    self.usage.completion_tokens += len(completion.token_ids)
                    if not completion.text:
                        continue
                    index = position * self.body.n + completion.index
                    text = quote(completion.text)
                    choice = f'{{"index":{index},"text":{text},"logprobs":null,"finish_reason":null}}'
                else:
                    choice = json.dumps(self._delta(position, output, completion))
                pieces += (head, choice, tail)
            if pieces:
                yield "".join(pieces)
        if with_usage:
            yield f'{head}],"usage":{json.dumps(self.usage.document(job))}}}\n\n'

    def _delta(self, position: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """A chunk's choice; a completion's first one carries the echo."""
        first = position * self.body.n + completion.index not in self._offsets
        return self._choice(position, completion, self._echo(position, output) if first else None)

    def _choice(self, position: int, completion: CompletionOutput, echo: _Echo | None) -> dict[str, Any]:
        index = position * self.body.n + completion.index
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
            logprobs = completion_logprobs(tokens, positions, self.body.logprobs, self.tokenizer, offset)
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
        if position not in self._echoes:  # only a request's first output has the prompt's log probabilities
            text = self.texts[position]
            if text is None:
                text = self.tokenizer.decode(self.prompts[position]) if self.tokenizer else ""
            echo = _Echo(text, self.prompts[position], list(output.prompt_logprobs or []))
            self._echoes[position] = echo
        return self._echoes[position]
