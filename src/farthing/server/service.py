"""The server's state: the engine once it is loaded, the running jobs, and whether new ones are accepted."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from farthing.engine.request import (
    EngineError,
    EngineStopped,
    QueueFull,
    Rendering,
    SamplingParams,
    StructuredOutputsParams,
)
from farthing.server.bodies import HEAVY
from farthing.server.cache_digest import CacheDigest
from farthing.server.config import ANONYMOUS, KeyRing, ServerConfig
from farthing.server.errors import ApiError
from farthing.server.formats import ModelFormats
from farthing.server.jobs import Job, unless_gone
from farthing.server.memory import AnswerMemory, ResponseStore
from farthing.server.quotas import Quotas
from farthing.server.sampling import TokenTexts
from farthing.server.schema import COMPLETIONS, FieldNames, UnknownFields, about_grammar, short
from farthing.server.stream import Turns
from farthing.shares import Busy, Shares

if TYPE_CHECKING:
    from pydantic import BaseModel
    from starlette.requests import Request

    from farthing.engine.engine import Engine
    from farthing.engine.request import OutputKind, RequestStream
    from farthing.engine.sandbox.sandbox import Sandbox
    from farthing.server.quotas import Accounts

T = TypeVar("T")

_AT_ONCE = 32  # sequences submitted per iteration of the event loop


class Service:
    """Used only in the event loop, except that the loading thread sets `engine` and `accounts`."""

    def __init__(self, config: ServerConfig, model: str) -> None:
        self.config = config
        self.names = config.served_model_name or (model,)
        self.created = int(time.time())
        self.unknown_fields = UnknownFields(config.strict_fields)
        self.cache_digest = CacheDigest()
        self.quotas = Quotas(
            config.requests_per_minute, config.tokens_per_minute, config.work_seconds_per_minute
        )
        self.engine: Engine | None = None
        self._formats: asyncio.Future[ModelFormats] | None = None
        keys = (config.keys or KeyRing(())) | (config.admin_keys or KeyRing(()))
        self.several_keys = len(keys) > 1
        self.turns = Turns()
        self._token_texts: TokenTexts | None = None
        self.responses = ResponseStore(keys=max(1, len(keys.names())))
        self.answers = AnswerMemory()
        self.accounts: Accounts | None = None  # set before the engine is
        self.launch_to_ready: float | None = None  # seconds
        self.draining = False
        self.jobs: set[Job] = set()
        self.held = Shares()  # its pieces of work: sequences in flight
        self.idle = asyncio.Event()
        self.idle.set()

    # readiness

    def unready(self) -> str | None:
        """The reason to reject requests now; None if there is none."""
        if self.engine is None:
            return "the model is being loaded"
        if self.draining:
            return "the server is shutting down"
        return self.broken()

    def broken(self) -> str | None:
        """The reason to restart the process; None if there is none."""
        try:
            if self.engine is not None:
                self.engine.health()
        except EngineError as error:
            return f"the engine has failed: {error}"
        return None

    def require_engine(self) -> Engine:
        """The engine. Raises ApiError (503) while it cannot accept requests."""
        reason = self.unready()
        if reason is not None or self.engine is None:
            raise ApiError(503, reason or "", code="not_ready", retry_after=5)
        return self.engine

    def check_model(self, name: str | None) -> str:
        """The served name for the answer. Raises ApiError (404)."""
        if name is None or name in self.names:
            return name or self.names[0]
        accepted = ", ".join(repr(known) for known in self.names)
        raise ApiError(
            404,
            f"model: got {short(name)}; expected one of {accepted}",
            param="model",
            code="model_not_found",
        )

    async def formats(self) -> ModelFormats:
        """The model's chat formats. Raises ApiError (503) while it is loading."""
        if self._formats is None:
            self._formats = asyncio.ensure_future(ModelFormats.of(self.require_engine(), self.config))
        return await asyncio.shield(self._formats)  # other requests wait for it too

    def token_texts(self) -> TokenTexts:
        """The texts of the model's tokens. Raises ApiError (503) while it is loading."""
        if self._token_texts is None:
            self._token_texts = TokenTexts(self.require_engine().tokenizer)
        return self._token_texts

    # work

    async def check_fields(self, body: BaseModel, request: Request) -> None:
        """Count a body's unknown fields. Raises ApiError (400) if they are rejected.

        A heavy body is checked in a separate iteration of the event loop, between parsing and conversion.
        """
        if request.scope.get(HEAVY):
            await asyncio.sleep(0)
        self.unknown_fields.check(body)
        if request.scope.get(HEAVY):
            await asyncio.sleep(0)

    @staticmethod
    def now() -> int:
        """Seconds since 1970, for `created`."""
        return int(time.time())

    async def encode(
        self, text: str, add_special_tokens: bool, client: str = ANONYMOUS, param: str = "prompt"
    ) -> list[int]:
        """Token ids of one text: see `encode_all`."""
        return (await self.encode_all([text], add_special_tokens, client, param))[0]

    async def encode_all(
        self, texts: Sequence[str], add_special_tokens: bool, client: str = ANONYMOUS, param: str = "prompt"
    ) -> list[list[int]]:
        """Token ids of each text. Raises ApiError: 400 if the model has no tokenizer or a text cannot fit its
        context, 429 if the client has too much work waiting. param: the field to name in errors."""
        sandbox, longest = self._sandbox(param), self._max_characters()
        for text in texts:
            self._check_length(len(text), longest, param)
        return await self._checked(lambda: sandbox.encode(texts, add_special_tokens, client), client, param)

    async def decode(self, ids: list[int], client: str) -> str:
        """The text of token ids. Raises ApiError: 400 for more ids than fit the model's context, 429 if the
        client has too much work waiting."""
        sandbox, longest = self._sandbox("tokens"), self.require_engine().config.max_model_len
        if longest is not None and len(ids) > longest:
            raise ApiError(
                400,
                f"tokens has {len(ids)} ids; expected at most {longest}, which is max_model_len",
                param="tokens",
                code="context_length_exceeded",
            )
        return await self._checked(lambda: sandbox.decode(ids, client), client, "tokens")

    async def prompt(self, rendering: Rendering, client: str, param: str) -> str:
        """The prompt of a conversation. Raises ApiError: 400, also if it cannot fit the model's context, and
        429. param: the field to name in errors."""
        sandbox, longest = self._sandbox(param), self._max_characters()
        self._check_length(rendering.conversation.characters, longest, param)
        return await self._checked(lambda: sandbox.prompt(rendering, longest, client), client, param)

    def _check_length(self, characters: int, longest: int, param: str) -> None:
        if characters > longest:
            raise ApiError(
                400,
                f"{param} has {characters} characters; expected at most {longest}, which is more than "
                f"{self.require_engine().config.max_model_len} tokens can hold",
                param=param,
                code="context_length_exceeded",
            )

    async def _checked(self, begin: Callable[[], Future[T]], client: str, param: str | None = None) -> T:
        """The result of a client's job in the sandbox."""
        self.quotas.admit_work(client, self._sandbox(param).seconds_of(client))
        try:
            return await unless_gone(asyncio.wrap_future(begin()))
        except Busy as error:
            raise ApiError(429, str(error), reason="queue_full", retry_after=1) from error
        except (ValueError, RecursionError) as error:
            raise ApiError(400, str(error), param=param, code="invalid_value") from error
        except RuntimeError as error:
            raise ApiError(503, str(error), code="not_ready", retry_after=5) from error

    def _sandbox(self, param: str | None) -> Sandbox:
        sandbox = self.require_engine().sandbox
        if sandbox is None:
            raise ApiError(400, "the model is served without a tokenizer; expected token ids", param=param)
        return sandbox

    def _max_characters(self) -> int:
        engine = self.require_engine()
        assert engine.tokenizer is not None and engine.config.max_model_len is not None
        return engine.tokenizer.max_characters(engine.config.max_model_len)

    async def open(
        self,
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
        engine = self.require_engine()
        self._check_lengths(engine, prompts, params, names)
        for param, constraint in (
            (names.structured, params.structured_outputs),
            ("tools", params.calls.constraint if params.calls else None),
        ):
            if constraint is not None:
                await self._check_grammar(constraint, client, param)
        self._check_room(engine, client, len(prompts), params.n)
        self.quotas.admit(client, sum(len(prompt) for prompt in prompts))
        charge = self.accounts.charge if self.accounts else None
        job = Job(self.config.request_timeout, on_close=self._closed, charge=charge)
        job.client, job.sequences = client, len(prompts) * params.n
        self.held.enter(client, job.sequences)
        self.jobs.add(job)
        self.idle.clear()
        submit = partial(
            engine.submit,
            params=params,
            priority=priority,
            cache_salt=self._salt(client, cache_salt),
            kind=kind,
            client=client if self.several_keys else "",
        )
        # Compiling a grammar, or reading 1,024 words or 262,144 ids, can take long.
        slow = (params.structured_outputs, params.calls, params.bad_words, params.allowed_token_ids)
        quick = not any(slow)
        try:
            if not quick:
                job.streams += await self._submit_in_turn(submit, prompts, client)
            for number, prompt in enumerate(prompts, start=1):
                if quick:
                    job.streams.append(submit(prompt))
                if number % max(1, _AT_ONCE // params.n) == 0:
                    await asyncio.sleep(0)
                self.cache_digest.remember(prompt, self._salt(client, cache_salt))
        except BaseException as error:
            job.close()
            raise self._refusal(error) from error
        if kind == "delta":
            job.bound_unread()
        return job

    async def _check_grammar(self, constraint: StructuredOutputsParams, client: str, param: str) -> None:
        sandbox = self._sandbox(param)
        try:
            await self._checked(lambda: sandbox.grammar(constraint, client), client, param)
        except ApiError as error:
            if error.status == 400:
                error.message = about_grammar(error.message, param)
            raise

    async def _submit_in_turn(
        self, submit: Callable[[list[int]], RequestStream], prompts: Sequence[list[int]], client: str
    ) -> list[RequestStream]:
        """Submit in a thread, in the sandbox's fair order; nothing if the client disconnects meanwhile."""
        sandbox, call = self.require_engine().sandbox, partial(_submit_all, submit, prompts)
        if sandbox is None:
            return await asyncio.to_thread(call)
        submitted = sandbox.here(call, client)
        try:
            return await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_abandon)
            raise

    def _check_room(self, engine: Engine, client: str, prompts: int, n: int) -> None:
        """Raises ApiError (429, or 400 if it could never fit) for more sequences than the queue has room for,
        or than one key's share. An idle engine accepts any single prompt."""
        room, sequences, own = engine.queue_room, prompts * n, self.held.work(client)
        busy = bool(self.held.present)
        if room is None or (not busy and prompts == 1):
            return
        if sequences > room:
            raise ApiError(
                429 if busy else 400,
                f"{prompts} prompts with n = {n} are {sequences} sequences; expected at most {room}, "
                "the free places in the queue",
                param="n",
                reason="queue_full",
                retry_after=self._retry_after() if busy else None,
            )
        if self.several_keys and own and own + sequences > room:
            raise ApiError(
                429,
                f"{client!r} has {own} sequences in flight and requests {sequences}; "
                f"expected at most {room} together, because as many places stay free for other keys",
                reason="queue_full",
                retry_after=self._retry_after(),
            )

    def _salt(self, client: str, salt: str) -> str:
        """The salt of the prefix cache. Timing reveals cached prompts, so keys do not share them."""
        return salt if self.config.share_prefix_cache else f"{len(client)}:{client}{salt}"

    def _check_lengths(
        self, engine: Engine, prompts: Sequence[list[int]], params: SamplingParams, names: FieldNames
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

    def _refusal(self, error: BaseException) -> BaseException:
        """The client's error for a rejected submission."""
        if isinstance(error, QueueFull | Busy):
            return ApiError(429, str(error), reason="queue_full", retry_after=self._retry_after())
        if isinstance(error, EngineStopped):
            return ApiError(503, str(error), code="not_ready", retry_after=5)
        if isinstance(error, ValueError):
            return ApiError(400, str(error), code="invalid_value")
        return error

    def _retry_after(self) -> int:
        """Seconds until a place in the queue is likely to be free: the mean wait so far, at most a minute."""
        waited = self.engine.stats.snapshot().request_queue_time if self.engine else None
        mean = waited.sum / waited.count if waited and waited.count else 0.0
        return min(60, max(1, math.ceil(mean)))

    def _closed(self, job: Job) -> None:
        self.quotas.charge(job.client, job.generated)
        self.held.leave(job.client, job.sequences)
        self.jobs.discard(job)
        if not self.jobs:
            self.idle.set()

    # the end

    async def drain(self) -> bool:
        """Reject new requests and let running ones finish for at most `drain_timeout` seconds; then end the
        rest with an error. Returns whether all of them finished."""
        self.draining = True
        try:
            await asyncio.wait_for(self.idle.wait(), self.config.drain_timeout)
            return True
        except TimeoutError:
            for job in list(self.jobs):
                job.interrupt(ApiError(503, "the server shut down before the answer ended", code="shutdown"))
            return False


def _submit_all(
    submit: Callable[[list[int]], RequestStream], prompts: Sequence[list[int]]
) -> list[RequestStream]:
    streams: list[RequestStream] = []
    try:
        for prompt in prompts:
            streams.append(submit(prompt))
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    return streams


def _abandon(submitted: Future[list[RequestStream]]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        for stream in submitted.result():
            stream.cancel()
