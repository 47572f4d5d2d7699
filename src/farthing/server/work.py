"""What a request makes the server compute before and in the engine, within the limits of its client: chat
templates, tokenizing, grammars, and the submission to the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from farthing.conversation.untrusted import unmarked
from farthing.engine.request import (
    EngineStopped,
    QueueFull,
    Rendering,
    SamplingParams,
    StructuredOutputsParams,
)
from farthing.server.errors import ApiError
from farthing.server.jobs import Job, unless_gone
from farthing.server.schema import COMPLETIONS, FieldNames, about_grammar
from farthing.shares import Busy

if TYPE_CHECKING:
    from farthing.engine.engine import Engine
    from farthing.engine.request import OutputKind, RequestStream
    from farthing.engine.sandbox.sandbox import Sandbox
    from farthing.server.service import Service

T = TypeVar("T")

_AT_ONCE = 32  # sequences submitted per iteration of the event loop


# Conversations and texts to tokens.


async def encode(
    service: Service,
    texts: Sequence[str],
    add_special_tokens: bool,
    client: str,
    param: str = "prompt",
    plain: bool = False,
) -> list[list[int]]:
    """Token ids of each text. Raises ApiError: 400 if the model has no tokenizer or a text cannot fit its
    context, 429 if the client has too much work waiting. param: the field to name in errors. plain: nothing
    in a text becomes a control token."""
    longest = max(map(len, texts), default=0)
    return await _within_limits(
        service,
        lambda sandbox: sandbox.encode(texts, add_special_tokens, client, plain),
        client,
        param,
        longest,
    )


async def decode(service: Service, ids: list[int], client: str) -> str:
    """The text of token ids. Raises ApiError: 400 for more ids than fit the model's context, 429 if the
    client has too much work waiting."""
    longest = service.require_engine().config.max_model_len
    if longest is not None and len(ids) > longest:
        raise ApiError(
            400,
            f"tokens has {len(ids)} ids; expected at most {longest}, which is max_model_len",
            param="tokens",
            code="context_length_exceeded",
        )
    return await _within_limits(service, lambda sandbox: sandbox.decode(ids, client), client, "tokens")


async def render(service: Service, rendering: Rendering, client: str, param: str) -> str:
    """The prompt of a conversation, with marks in text that is not to become control tokens. Raises ApiError:
    400, also if the format cannot express it or it cannot fit the model's context, and 429."""
    longest = service.require_engine().config.max_model_len
    assert longest is not None
    try:
        return await _within_limits(
            service,
            lambda sandbox: sandbox.prompt(rendering, longest, client),
            client,
            param,
            rendering.conversation.characters,
        )
    except ApiError as error:
        error.message = unmarked(error.message)
        raise


async def _within_limits(
    service: Service,
    work: Callable[[Sandbox], Future[T]],
    client: str,
    param: str,
    characters: int = 0,
) -> T:
    """The result of a client's work on a text, in the sandbox or, if that is short, right here."""
    engine = service.require_engine()
    sandbox = engine.sandbox
    if sandbox is None:
        raise ApiError(400, "the model is served without a tokenizer; expected token ids", param=param)
    if characters > (engine.config.max_model_len or 0):  # as a token has at least one character
        check_length(engine, characters, param)
    if service.quotas is not None:
        service.quotas.admit_work(client, sandbox.seconds_of(client))
    try:
        result = work(sandbox)
        return result.result() if result.done() else await unless_gone(asyncio.wrap_future(result))
    except Busy as error:
        raise ApiError(429, str(error), reason="queue_full", retry_after=1) from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, str(error), param=param, code="invalid_value") from error
    except RuntimeError as error:
        raise ApiError(503, str(error), code="not_ready", retry_after=5) from error


def check_length(engine: Engine, characters: int, param: str) -> None:
    """Raises ApiError (400) for a text of so many characters that it cannot fit the model's context."""
    assert engine.tokenizer is not None and engine.config.max_model_len is not None
    longest = engine.tokenizer.max_characters(engine.config.max_model_len)
    if characters > longest:
        raise ApiError(
            400,
            f"{param} has {characters} characters; expected at most {longest}, which is more than "
            f"{engine.config.max_model_len} tokens can hold",
            param=param,
            code="context_length_exceeded",
        )


# Prompts to the engine.


async def submit(
    service: Service,
    client: str,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    *,
    priority: int = 0,
    cache_salt: str = "",
    kind: OutputKind = "delta",
    names: FieldNames = COMPLETIONS,
) -> Job:
    """Submit prompts to the engine. After an ApiError (400, 429 or 503) nothing runs."""
    engine = service.require_engine()
    _check_prompts(engine, prompts, params, names)
    if params.structured_outputs is not None:
        await _check_grammar(service, params.structured_outputs, client, names.structured)
    if params.calls is not None:
        await _check_grammar(service, params.calls.constraint, client, "tools")
    if service.held.present or len(prompts) > 1:  # an idle engine accepts any single prompt
        service.check_room(client, len(prompts), params.n)
    if service.quotas is not None:
        service.quotas.admit(client, sum(map(len, prompts)))
    salt = service.salt(client, cache_salt)
    start = partial(
        engine.submit,
        params=params,
        priority=priority,
        cache_salt=salt,
        kind=kind,
        client=client if service.several_keys else "",
    )
    job = service.begin(client, len(prompts) * params.n)
    try:
        if any((params.structured_outputs, params.calls, params.bad_words, params.allowed_token_ids)):
            # Compiling a grammar, or reading 1,024 words or 262,144 ids, can take long.
            job.streams += await _submit_in_turn(engine, start, prompts, client)
        else:
            for number, prompt in enumerate(prompts, start=1):
                job.streams.append(start(prompt))
                if number % max(1, _AT_ONCE // params.n) == 0:
                    await asyncio.sleep(0)
    except BaseException as error:
        job.close()
        raise _refusal(service, error) from error
    if service.cache_digest.is_read:
        service.cache_digest.remember(prompts, salt)
    if kind == "delta":
        job.bound_unread()
    return job


def _check_prompts(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams, names: FieldNames
) -> None:
    limit = engine.config.max_model_len
    for prompt in prompts:
        if not prompt:
            raise ApiError(400, "the prompt is empty; expected at least one token", param=names.prompt)
        wanted = params.max_tokens or 1
        if limit is None or len(prompt) + wanted <= limit:
            continue
        got = f"the prompt has {len(prompt)} tokens"
        if len(prompt) < limit:
            param = names.max_tokens
            why = f"{got} and {param} is {wanted}; expected at most {limit} together"
        else:
            param = names.prompt
            why = f"{param}: {got}; expected at most {limit} with the answer"
        raise ApiError(400, why, param=param, code="context_length_exceeded")


async def _check_grammar(
    service: Service, constraint: StructuredOutputsParams, client: str, param: str
) -> None:
    try:
        await _within_limits(service, lambda sandbox: sandbox.grammar(constraint, client), client, param)
    except ApiError as error:
        if error.status == 400:
            error.message = about_grammar(error.message, param)
        raise


async def _submit_in_turn(
    engine: Engine, start: Callable[[list[int]], RequestStream], prompts: Sequence[list[int]], client: str
) -> list[RequestStream]:
    """Submit in a thread, in the sandbox's fair order; nothing if the client disconnects meanwhile."""
    call = partial(_submit_all, start, prompts)
    if engine.sandbox is None:
        return await asyncio.to_thread(call)
    submitted = engine.sandbox.here(call, client)
    try:
        return await asyncio.wrap_future(submitted)
    except asyncio.CancelledError:
        submitted.add_done_callback(_abandon)
        raise


def _submit_all(
    start: Callable[[list[int]], RequestStream], prompts: Sequence[list[int]]
) -> list[RequestStream]:
    streams: list[RequestStream] = []
    try:
        for prompt in prompts:
            streams.append(start(prompt))
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    return streams


def _abandon(submitted: Future[list[RequestStream]]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        for stream in submitted.result():
            stream.cancel()


def _refusal(service: Service, error: BaseException) -> BaseException:
    """The client's error for a rejected submission."""
    if isinstance(error, QueueFull | Busy):
        return ApiError(429, str(error), reason="queue_full", retry_after=service.retry_after())
    if isinstance(error, EngineStopped):
        return ApiError(503, str(error), code="not_ready", retry_after=5)
    if isinstance(error, ValueError):
        return ApiError(400, str(error), code="invalid_value")
    return error
