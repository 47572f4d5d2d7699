"""Prefill in a process of its own: prompts are computed there, tokens are drawn here.

Long prompts then no longer stand in the way of running answers. A request first goes to the prefill process,
whose engine computes its prompt. Both engines' caches are one memory that both processes map, and each has
blocks of its own in it: a finished prompt's blocks become this engine's, entered in its prefix cache, and the
prefill process gets as many free ones for them. Nothing is copied, but for a block that another prompt over
there still reads. Then the request is admitted here as any other: it finds its prompt but for the last block,
and the tokens are those of one engine.

If the prefill process ends, prompts are computed here.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch.multiprocessing as multiprocessing

from farthing.config import EngineConfig
from farthing.engine.core import EngineCore
from farthing.engine.engine import Engine, Order
from farthing.engine.generation import RequestState
from farthing.engine.request import EngineError, SamplingParams
from farthing.model import DeepseekModel
from farthing.ops import LatentCache
from farthing.ops.api import CacheDtype
from farthing.parallel.cluster import ParallelModel

log = logging.getLogger(__name__)

_START_TIMEOUT = 600.0  # seconds
_READY = "ready"


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt on its way to the prefill process."""

    number: int
    tokens: list[int]
    salt: str
    order: int  # as the request's priority


@dataclass(frozen=True, slots=True)
class _Computed:
    """A prompt's blocks in the prefill process, and which of them nobody else reads there."""

    number: int
    blocks: list[int]
    free: list[bool]


Exchanged = list[tuple[int, int]]  # (the prefill process's block, ours for it)


@dataclass(slots=True)
class _Pending:
    state: RequestState
    cancelled: bool = False


class DisaggregatedEngine(Engine):
    """An engine whose prompts are computed by another process."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._pending: dict[int, _Pending] = {}
        self._pending_lock = threading.Lock()
        self._number = 0
        super().__init__(*arguments, **options)
        if not self.config.enable_prefix_caching:
            self.shutdown()
            raise ValueError(
                "enable_prefix_caching is False; expected True with disaggregate: blocks arrive by prefix"
            )
        self._prefill = _PrefillProcess(self.config, self._core.runner.cache, self._arrived, self._lost)

    def _new_cache(
        self, model: DeepseekModel | ParallelModel, dtype: CacheDtype
    ) -> tuple[LatentCache, Sequence[int]]:
        """Twice the blocks, in memory that the prefill process can map; the first half is this engine's."""
        count = self.config.num_blocks
        assert count
        cache = model.new_cache(2 * count, self.config.block_size, dtype)
        for tensor in cache.tensors():
            tensor.share_memory_()
        return cache, range(count)

    def shutdown(self) -> None:
        """See `Engine.shutdown`; ends the prefill process too."""
        prefill = getattr(self, "_prefill", None)
        if prefill is not None:
            prefill.close()
        super().shutdown()

    def _enqueue(self, state: RequestState) -> None:
        sequence = state.sequences[0]
        if len(sequence.tokens) <= self.config.block_size or not sequence.read_cache:
            super()._enqueue(state)  # nothing that a block could carry
            return
        with self._pending_lock:
            self._number += 1
            number = self._number
            self._pending[number] = _Pending(state)
        prompt = _Prompt(number, list(sequence.tokens), sequence.salt, state.request.priority)
        if not self._prefill.send(prompt):
            self._admit(number)

    def _post(self, what: Order, state: RequestState | None) -> None:
        """A cancelled request that is not here yet ends when it arrives."""
        with self._pending_lock:
            waiting = [p for p in self._pending.values() if what == "cancel all" or p.state is state]
            for pending in waiting:
                pending.cancelled = True
        super()._post(what, state)

    def _admit(self, number: int) -> None:
        with self._pending_lock:
            pending = self._pending.pop(number, None)
        if pending is None:
            return
        super()._enqueue(pending.state)
        if pending.cancelled:
            super()._post("cancel", pending.state)

    def _arrived(self, prompt: _Prompt, computed: _Computed) -> Exchanged:
        """Take a prompt's blocks over between two steps, then admit its request."""
        try:
            exchanged = self.between_steps(lambda core: adopt(core, prompt, computed)).result()
        except EngineError:
            return []  # this engine has ended, and its requests with it
        self._admit(prompt.number)
        return exchanged

    def _lost(self) -> None:
        """Without the prefill process, prompts are computed here."""
        with self._pending_lock:
            numbers = list(self._pending)
        for number in numbers:
            self._admit(number)


class _PrefillProcess:
    """The other process, and the thread that hears from it."""

    def __init__(
        self,
        config: EngineConfig,
        cache: LatentCache,
        arrived: Callable[[_Prompt, _Computed], Exchanged],
        lost: Callable[[], None],
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve_prompts, args=(replace(config, disaggregate=False), cache, theirs), daemon=False
        )
        self._process.start()
        theirs.close()
        self._closed = False
        self._prompts: dict[int, _Prompt] = {}
        self._lock = threading.Lock()
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise
        self._arrived, self._lost = arrived, lost
        threading.Thread(target=self._listen, name="farthing-prefill", daemon=True).start()

    def send(self, prompt: _Prompt) -> bool:
        """Have a prompt computed; False if the process has ended."""
        with self._lock:
            self._prompts[prompt.number] = prompt
            try:
                self._connection.send(prompt)
            except OSError:
                return False
        return True

    def close(self) -> None:
        """End the process."""
        self._closed = True
        with self._lock:
            self._connection.close()
        self._process.join(2)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(5)

    def _await_ready(self) -> None:
        if not self._connection.poll(_START_TIMEOUT):
            raise EngineError(f"the prefill process was not ready after {_START_TIMEOUT:g} s")
        try:
            said = self._connection.recv()
        except EOFError:
            self._process.join(1)
            said = f"it ended with exit code {self._process.exitcode}"
        if said != _READY:
            raise EngineError(f"the prefill process could not start: {said}")

    def _listen(self) -> None:
        try:
            while True:
                computed = self._connection.recv()
                exchanged = self._arrived(self._prompts.pop(computed.number), computed)
                with self._lock:
                    self._connection.send(exchanged)
        except Exception as error:
            if not self._closed:
                log.error("the prefill process has ended; prompts are computed with the answers now")
                if not isinstance(error, EOFError | OSError):  # whose blocks are whose is not known any more
                    log.exception("taking over a prompt failed")
                    self._process.kill()
                self._lost()


def adopt(core: EngineCore, prompt: _Prompt, computed: _Computed) -> Exchanged:
    """Make computed blocks this engine's, known by their tokens from now on, for free ones of its own."""
    prefix, pool, cache = core.scheduler.prefix, core.scheduler.pool, core.runner.cache
    hashes: list[bytes] = []
    prefix.extend(hashes, prompt.tokens, prompt.salt, len(computed.blocks))
    known = prefix.match(hashes)
    pool.share(known)  # taking free blocks must not take these
    count = min(len(hashes) - len(known), pool.num_free)
    wanted = slice(len(known), len(known) + count)
    exchanged, taken = [], []
    theirs = zip(hashes[wanted], computed.blocks[wanted], computed.free[wanted], strict=True)
    for own, (digest, block, free) in zip(pool.allocate(count), theirs, strict=True):
        if free:
            pool.exchange(own, block)
            exchanged.append((block, own))
        else:
            for tensor in cache.tensors():
                tensor[:, own] = tensor[:, block]
            block = own
        prefix.register(digest, block)
        taken.append(block)
    pool.release(reversed(known + taken))
    return exchanged


def hand_over(core: EngineCore, prompt: _Prompt, size: int) -> _Computed:
    """What is known of a prompt's blocks; whoever adopts them answers before the next step."""
    hashes: list[bytes] = []
    prefix, pool = core.scheduler.prefix, core.scheduler.pool
    prefix.extend(hashes, prompt.tokens, prompt.salt, (len(prompt.tokens) - 1) // size)
    blocks = prefix.match(hashes)
    return _Computed(prompt.number, blocks, [pool.refs(block) == 0 for block in blocks])


def _serve_prompts(config: EngineConfig, cache: LatentCache, connection: Connection) -> None:
    """The prefill process: one token of every prompt, whose blocks then are in the prefix cache."""

    class Beside(Engine):
        def _new_cache(
            self, model: DeepseekModel | ParallelModel, dtype: CacheDtype
        ) -> tuple[LatentCache, Sequence[int]]:
            return cache, range(cache.num_blocks // 2, cache.num_blocks)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine = Beside.from_config(replace(config, skip_tokenizer_init=True, speculate=config.speculate))
        connection.send(_READY)
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    answers: SimpleQueue[Exchanged] = SimpleQueue()
    ended = threading.Event()

    def give(core: EngineCore, prompt: _Prompt) -> None:
        """Between two steps, which wait for the answer: until then no block may be written again."""
        if ended.is_set():
            return
        connection.send(hand_over(core, prompt, config.block_size))
        for block, ours in answers.get():
            core.scheduler.pool.exchange(block, ours)

    def compute(prompt: _Prompt) -> None:
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        stream = engine.submit(
            prompt.tokens, params, priority=prompt.order, cache_salt=prompt.salt, kind="final"
        )
        stream.result()
        engine.between_steps(lambda core: give(core, prompt)).result()

    with engine, ThreadPoolExecutor(config.max_num_seqs) as pool:
        try:
            while True:
                message = connection.recv()
                if isinstance(message, _Prompt):
                    pool.submit(compute, message)
                else:
                    answers.put(message)
        except (EOFError, OSError):
            ended.set()
            answers.put([])  # to whoever waits for one
            engine.shutdown()  # what is still computed has nobody to go to
