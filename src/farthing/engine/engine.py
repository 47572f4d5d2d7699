"""The engine turns requests into tokens, in its own thread, within limits on the work in flight.

Interface for a server or `farthing.LLM`:

    engine = build_engine(EngineConfig(model="mite", max_num_seqs=64))   # loads the model
    stream = engine.submit(prompt, SamplingParams(max_tokens=32), priority=0, cache_salt="", kind="delta")
        # prompt: str or token ids. Thread-safe, never blocks on the model. Raises ValueError (names the
        # field), QueueFull (429), EngineStopped (503). kind "delta": each output has the new part;
        # "final": one output at the end. Encoding and grammars are computed in the caller's thread.
    for output in stream: ...            # RequestOutput; from any thread
    async for output in stream: ...      # the same from an event loop
        # both raise EngineError if the request failed
    stream.cancel()                      # thread-safe; takes effect within one step; finish_reason "abort"
    stream.result()                      # blocks; all deltas merged to one RequestOutput
    await stream.aresult()

    engine.chat_prompt(messages, tools=None, add_generation_prompt=True, **template_kwargs) -> str
        # submit it with add_special_tokens=False, since the template includes them
    engine.tokenizer                     # farthing.engine.tokenizer.Tokenizer | None (skip_tokenizer_init)
        .encode(text, add_special_tokens=True) -> list[int];  .decode(ids, skip_special_tokens=True) -> str
        .eos_token_ids, .vocab_size
    engine.sandbox                       # farthing.engine.sandbox.Sandbox: untrusted work, in child processes
    engine.model_config                  # farthing.model.config.ModelConfig
    engine.device, engine.backend        # torch.device, and the backend's name for logs
    engine.config                        # the resolved EngineConfig (max_model_len, num_blocks, … filled in)
    engine.default_sampling              # temperature, top_p, … from generation_config.json
    engine.stats.snapshot() -> StatsSnapshot  # farthing.engine.stats: counters, gauges, histograms, experts
    engine.health() -> None              # raises EngineError if the loop has failed
    engine.drain(timeout) -> bool        # reject new requests, finish running ones; False: some were aborted
    engine.shutdown()                    # stop now; running requests end with "abort"
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Literal, Protocol, TypeVar

from farthing.config import EngineConfig
from farthing.conversation.untrusted import TRUSTED, unmarked
from farthing.engine.admission import Admission
from farthing.engine.core import EngineCore
from farthing.engine.disk_cache.store import open_store
from farthing.engine.generation import Generation, RequestState
from farthing.engine.pace import Pace
from farthing.engine.prefetch import Load
from farthing.engine.request import (
    EngineError,
    EngineFailed,
    EngineStopped,
    OutputKind,
    QueueFull,
    RequestMetrics,
    RequestStream,
    SamplingParams,
    deliver,
)
from farthing.engine.runner import Model, Runner, Sizes, resolve
from farthing.engine.sandbox.sandbox import Sandbox
from farthing.engine.scheduler import Scheduler
from farthing.engine.speculation import build_speculator
from farthing.engine.stats import Stats
from farthing.engine.tokenizer import Tokenizer, flatten
from farthing.model.config import ModelConfig
from farthing.ops.api import LatentCache, no_gradients

# Limits on work in flight: sequences, and their prompt tokens in memory.

_CACHES = 16  # prompt tokens in flight, in units of what the cache holds


class Backlog:
    """Counts waiting and running work. The caller holds a lock."""

    def __init__(self, config: EngineConfig) -> None:
        """config: resolved, so that num_blocks is known."""
        assert config.num_blocks is not None
        self._limit = None if config.max_queue is None else config.max_num_seqs + config.max_queue
        self._max_tokens = config.max_queue_tokens or _CACHES * config.num_blocks * config.block_size
        self._sequences = self._tokens = 0

    @property
    def room(self) -> int | None:
        """Sequences that may still be added; None: any number."""
        return None if self._limit is None else max(0, self._limit - self._sequences)

    def add(self, sequences: int, prompt_tokens: int) -> None:
        """Add a request of `sequences` completions. Raises QueueFull without adding anything.

        A request is never refused by an idle engine.
        """
        tokens = sequences * prompt_tokens
        if self._limit is not None and self._sequences:
            if self._sequences + sequences > self._limit:
                raise QueueFull(
                    f"queue full: {self._sequences} sequences in flight and {sequences} requested "
                    f"(limit {self._limit}); retry later"
                )
            if self._tokens + tokens > self._max_tokens:
                raise QueueFull(
                    f"queue full: {self._tokens} prompt tokens in flight and {tokens} requested "
                    f"(limit {self._max_tokens}); retry later"
                )
        self._sequences += sequences
        self._tokens += tokens

    def remove(self, sequences: int, prompt_tokens: int) -> None:
        """A request has ended."""
        self._sequences -= sequences
        self._tokens -= sequences * prompt_tokens


log = logging.getLogger(__name__)

T = TypeVar("T")
Order = Literal["add", "cancel", "cancel all"]
_CHECK_AFTER = 0.1  # idle seconds before invariants are checked


def own_cache(model: Model, config: EngineConfig, sizes: Sizes) -> tuple[LatentCache, bool]:
    """A cache that one engine uses alone."""
    assert config.num_blocks
    cache = model.new_cache(config.num_blocks, config.block_size, sizes.dtype, sizes.windows, sizes.slots)
    return cache, False


NewCache = Callable[[Model, EngineConfig, Sizes], tuple[LatentCache, bool]]


def _half(count: int, second: bool) -> range:
    return range(count * second, count * (1 + second))


class Prefill(Protocol):
    """Computes prompts elsewhere before the engine admits their requests."""

    def take(self, state: RequestState) -> bool:
        """Accept a request, to be admitted once its prompt is computed. False: admit it now."""

    def cancel(self, state: RequestState | None) -> None:
        """A request (None: every request) is no longer wanted."""

    def close(self) -> None:
        """Stop; pending requests are not admitted."""


class Engine:
    """Serves one model. Every public method may be called from any thread."""

    def __init__(
        self,
        model: Model,
        config: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
        default_sampling: Mapping[str, Any] | None = None,
        new_cache: NewCache = own_cache,
    ) -> None:
        """new_cache: allocates the cache, and says whether this engine uses the second of its halves."""
        self.config, sizes = resolve(config or EngineConfig(), model)
        c = self.config
        assert c.max_model_len and c.num_blocks and c.max_num_batched_tokens  # filled in by `resolve`
        self.model_config: ModelConfig = model.config
        self.device, self.backend = model.ops.device, model.ops.name
        self.tokenizer = tokenizer
        self.default_sampling = dict(default_sampling or {})
        self.stats = Stats()
        self.prefill: Prefill | None = None
        self.sandbox = None if tokenizer is None else Sandbox(tokenizer, model.config.vocab_size)
        self._model = model
        self._admission = Admission(c, model.config, tokenizer, self.sandbox)
        cache, second = new_cache(model, c, sizes)
        self.cache_bytes = cache.nbytes
        runner = Runner(model, cache, c.max_num_seqs, c.max_model_len)
        self.stats.experts = lambda: _expert_tokens(model, runner)
        speculator = build_speculator(c.speculate, runner)
        pace = Pace(c.max_step_ms / 1000, model.config.num_hidden_layers if model.layered else 0)
        self._store = open_store(c, model, cache, self.stats.disk, self._loaded)
        self.disk_folder = self._store.folder if self._store else None  # of the prefix cache
        scheduler: Scheduler[Generation] = Scheduler(
            c.num_blocks,
            c.block_size,
            c.max_num_seqs,
            c.max_num_batched_tokens,
            c.enable_prefix_caching,
            speculator.num_lookahead if speculator else 0,
            _half(c.num_blocks, second),
            pace,
            self._store,
            {window: _half(count, second) for window, count in sizes.windows.items()},
            _half(sizes.slots, second),
        )
        self._core = EngineCore(
            runner, scheduler, self.stats, tokenizer, speculator, self._finished, model.ops.sample, pace
        )
        self._lock = threading.Lock()
        self._inbox: deque[tuple[Order, RequestState | None]] = deque()
        self._calls: deque[tuple[Callable[[EngineCore], Any], Future[Any]]] = deque()
        self._wake = threading.Event()
        self._changed = threading.Condition(self._lock)
        self._step_began: float | None = None  # of the step in progress, monotonic seconds
        self._live = 0
        self._backlog = Backlog(c)
        self._accepting = True
        self._stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="farthing-engine", daemon=True)
        self._thread.start()
        atexit.register(_shutdown, weakref.ref(self))
        said = "engine: %d blocks of %d tokens (%s), %d sequences, %d tokens per step, max_model_len %d"
        limits = c.max_num_seqs, c.max_num_batched_tokens, c.max_model_len
        log.info(said, c.num_blocks, c.block_size, sizes.dtype, *limits)

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        kind: OutputKind = "delta",
        add_special_tokens: bool = True,
        prompt_text: str | None = None,
        client: str = "",
    ) -> RequestStream:
        """Validate a request and queue it. See the top of this file.

        priority: smaller is more urgent; one level outweighs `priority_step` seconds of waiting. cache_salt:
        only requests with the same one share cached prefixes. prompt_text: reported as the prompt's text when
        `prompt` is token ids. client: clients share the engine fairly, whatever each submits.

        Also raises EngineFailed, as `health` does.
        """
        self.health()
        request, generations = self._admission.admit(
            prompt,
            params or SamplingParams(),
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            kind=kind,
            add_special_tokens=add_special_tokens,
            prompt_text=prompt_text,
            client=client,
        )
        metrics = RequestMetrics(arrival_time=request.arrival_time)
        stream = RequestStream(request, lambda: self.cancel(state), metrics)
        state = RequestState(request, stream, metrics, generations)
        for generation in generations:
            generation.parent = state
        with self._lock:
            if not self._accepting:
                raise EngineStopped("engine is shutting down; retry on another replica")
            self._backlog.add(request.params.n, len(request.prompt_token_ids))
            self._live += 1
        if self.prefill is None or not self.prefill.take(state):
            self._post("add", state)
        return stream

    def chat_prompt(
        self,
        /,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation; submit it with add_special_tokens=False.

        It contains marks where text is no control token, unless `trust_special_tokens` is set. The template
        runs in a child process with limits, as in the server: it is a program that came with the model.
        """
        tokenizer = self._admission.need_tokenizer("chat")
        assert self.sandbox is not None and self.config.max_model_len is not None
        marking = TRUSTED if self.config.trust_special_tokens else tokenizer.untrusted
        chat = {
            "messages": marking.messages(flatten(messages)),
            "tools": marking.value(tools),
            "add_generation_prompt": add_generation_prompt,
            "options": marking.options(kwargs),
        }
        try:
            return self.sandbox.chat(chat, self.config.max_model_len).result()
        except ValueError as error:
            raise ValueError(unmarked(str(error))) from error

    @property
    def queue_room(self) -> int | None:
        """Sequences that may be submitted now; None: any number."""
        return self._backlog.room

    @property
    def num_live(self) -> int:
        """Requests that are waiting or running."""
        return self._live

    def health(self) -> None:
        """Raise EngineFailed if the engine's thread or a rank has failed, or a step takes too long."""
        failure = self._model.failure()
        if failure is not None:
            raise EngineFailed(f"engine failed: {failure}")
        if self._error is not None:
            raise EngineFailed(str(self._ending())) from self._error
        began = self._step_began
        if began is not None and time.monotonic() - began > self.config.step_timeout:
            seconds = time.monotonic() - began
            raise EngineFailed(f"no step was completed for {seconds:.0f} s; restart the replica")

    @property
    def ended(self) -> bool:
        """Whether the engine's thread has failed: it never computes again, and `health` raises."""
        return self._error is not None

    def drain(self, timeout: float | None = None) -> bool:
        """Accept no more requests and wait for those in flight. False: `timeout` seconds passed and the rest
        was aborted."""
        with self._changed:
            self._accepting = False
            done = self._changed.wait_for(lambda: self._live == 0, timeout)
        if not done:
            self.cancel(None)
            with self._changed:
                self._changed.wait_for(lambda: self._live == 0, 10.0)
        return done

    def shutdown(self) -> None:
        """Abort running requests and end the thread. May be called more than once."""
        if self.prefill is not None:
            self.prefill.close()
        with self._lock:
            self._accepting = False
            self._stopping = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self._store is not None:
            self._store.close()
        if self.sandbox is not None:
            self.sandbox.close()
        self._model.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def between_steps(self, call: Callable[[EngineCore], T]) -> Future[T]:
        """Run `call` in the engine's thread between two steps."""
        future: Future[T] = Future()
        with self._lock:
            if self._error is not None or self._stopping:
                raise EngineError("engine has stopped")
            self._calls.append((call, future))
        self._wake.set()
        return future

    @property
    def cache(self) -> LatentCache:
        """The cache of the model's layers."""
        return self._core.runner.cache

    def admit(self, state: RequestState) -> None:
        """Hand a request to the engine's thread."""
        self._post("add", state)

    def cancel(self, state: RequestState | None) -> None:
        """Cancel a request, or all of them (None), within one step."""
        if self.prefill is not None:
            self.prefill.cancel(state)
        self._post("cancel all" if state is None else "cancel", state)

    # -- the loop, in its own thread

    def _post(self, what: Order, state: RequestState | None) -> None:
        self._inbox.append((what, state))
        self._wake.set()

    def _loaded(self, load: Load[Generation], good: int) -> None:
        with suppress(EngineError):  # the engine has stopped, and its requests have ended
            self.between_steps(lambda core: core.scheduler.loaded(load, good))

    def _finished(self, state: RequestState) -> None:
        with self._changed:
            self._live -= 1
            self._backlog.remove(state.request.params.n, len(state.request.prompt_token_ids))
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            with no_gradients(self._model.ops):
                while not self._stopping:
                    self._receive()
                    if self._core.scheduler.idle:
                        self._rest()
                        continue
                    self._step_began = time.monotonic()
                    computed = self._core.step()
                    self._step_began = None
                    if not computed:  # waiting sequences need blocks that are being read from disk
                        self._wake.wait(_CHECK_AFTER)
                        self._wake.clear()
        except BaseException as error:  # no stream may be left waiting
            log.exception("engine failed")
            self._error = error
        finally:
            self._close()

    def _rest(self) -> None:
        """Wait for work. Invariants are checked after a while without any, when nothing is delayed by it."""
        if not self._wake.wait(_CHECK_AFTER):
            self._core.check()
            self._wake.wait()
        self._wake.clear()

    def _receive(self) -> None:
        while self._calls:
            call, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call(self._core))
            except Exception as error:  # the caller's, not the engine's
                future.set_exception(error)
        while self._inbox:
            what, state = self._inbox.popleft()
            if what == "add" and state is not None:
                self._core.add(state)
            elif what == "cancel" and state is not None:
                self._core.cancel(state)
            else:
                for each in self._core.live():
                    self._core.cancel(each)

    def _close(self) -> None:
        """End every request: with "abort", or with the error that ended the loop."""
        with self._lock:
            self._accepting = False
            pending = [state for what, state in self._inbox if what == "add" and state is not None]
            self._inbox.clear()
            for _, future in self._calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(EngineError("engine has stopped"))
            self._calls.clear()
        if self._error is None:
            for state in pending:
                self._core.add(state)
            for state in self._core.live():
                self._core.cancel(state)
            return
        deliver([(state.stream, self._ending()) for state in [*self._core.live(), *pending]])
        with self._changed:
            self._live = 0
            self._changed.notify_all()

    def _ending(self) -> EngineFailed:
        """The error of requests in an engine whose thread has failed; the log has the exception."""
        if isinstance(self._error, EngineFailed):
            return EngineFailed(str(self._error))
        return EngineFailed("engine failed: its thread ended; the server's log has the details")


def _shutdown(reference: weakref.ref[Engine]) -> None:
    engine = reference()
    if engine is not None:
        engine.shutdown()


def _expert_tokens(model: Model, runner: Runner) -> dict[int, list[int]]:
    if runner.counts is None:
        return {}
    counts = runner.counts.tolist()
    return {i: counts[i] for i in range(model.cache_layers) if model.config.is_moe(i)}
