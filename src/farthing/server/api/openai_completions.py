"""/v1/completions: prompts in, text out."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from farthing.engine.request import CompletionOutput, RequestOutput, SamplingParams
from farthing.server.errors import ApiError
from farthing.server.events import ChunkWriter, EventStream, to_json
from farthing.server.jobs import Job
from farthing.server.logprobs import completion_logprobs, prompt_logprobs
from farthing.server.names import COMPLETIONS
from farthing.server.pieces import PiecedAnswer, event
from farthing.server.protocol import CompletionRequest
from farthing.server.sampling import completion_params, structured_field
from farthing.server.service import Service
from farthing.server.usage import Usage


async def complete(service: Service, body: CompletionRequest, request: Request, client: str) -> Response:
    """Answer a completion request, streamed or as one document. Raises ApiError, ClientGone."""
    engine = service.require_engine()
    model = service.check_model(body.model)
    if body.suffix:
        raise ApiError(
            400, "suffix is not supported: the model was not trained to fill in the middle", param="suffix"
        )
    if body.best_of not in (None, body.n or 1):
        why = f"best_of: got {body.best_of}; expected n, which is {body.n or 1}: answers are not ranked"
        raise ApiError(400, f"{why}; request more with n and logprobs, and choose", param="best_of")
    params = completion_params(body, engine.default_sampling)
    prompts, texts = await _prompts(service, body, client)
    job = await service.open(
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
        return EventStream(job, answer.stream(job), every=service.config.keep_alive)
    document = await job.guard(request.receive, answer.whole(job))
    if params.logprobs is not None or params.prompt_logprobs is not None:
        return PiecedAnswer(document, service.turns, client, service.config.request_timeout)
    return Response(to_json(document), media_type="application/json")


async def _prompts(
    service: Service, body: CompletionRequest, client: str
) -> tuple[list[list[int]], list[str | None]]:
    """Token ids of each prompt, and its text if it was given as text."""
    prompt: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(prompt[0], int):
        prompt = [prompt]
    texts = [item if isinstance(item, str) else None for item in prompt]
    if isinstance(prompt[0], str):
        return await service.encode_all(prompt, body.add_special_tokens, client), texts
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
        self.token_texts, self.turns = service.token_texts(), service.turns
        self.envelope = {
            "id": f"cmpl-{body.request_id or uuid.uuid4().hex}",
            "object": "text_completion",
            "created": service.now(),
            "model": model,
        }
        self.usage = Usage(sum(len(prompt) for prompt in prompts), with_cost=body.x_farthing)
        self._offsets: dict[int, int] = {}  # by choice: characters so far
        self._echoes: dict[int, _Echo] = {}  # by prompt, the same for all of its choices

    async def whole(self, job: Job) -> dict[str, Any]:
        """The complete document."""
        choices: list[dict[str, Any]] = []
        async for position, output in job.outputs():
            self.usage.cached_tokens += output.num_cached_tokens
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
        writer = ChunkWriter(self.envelope, self.usage, self.body.stream_options, job)
        plain = not self.body.echo and self.body.logprobs is None
        async for position, output in job.outputs():
            if output.finished:
                self.usage.cached_tokens += output.num_cached_tokens
            deltas = (self._delta(position, output, completion) for completion in output.outputs)
            if plain:
                chunks = [writer.chunk(d) for d in deltas if d["text"] or d["finish_reason"]]
                if chunks:
                    yield "".join(chunks)
                continue
            events = chain.from_iterable(event(writer.document(delta)) for delta in deltas)
            async for piece in self.turns.pieces(events, job.client):
                yield piece
        if last := writer.last():
            yield last

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
