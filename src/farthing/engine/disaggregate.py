"""Disaggregated prefill: one process computes prompts, this one decodes, so prompts do not delay decoding.

A request first goes to the prefill process, whose engine computes its prompt. Both processes map the same
cache memory and each owns a set of its blocks. A finished prompt's blocks are exchanged for free blocks of
the decoding engine and registered in its prefix cache; only a block that another prompt still reads is
copied. The request is then admitted as usual with all but its last block in the cache, so its tokens equal
those of a single engine.

If the prefill process exits, the decoding engine computes the prompts.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch.multiprocessing as multiprocessing

from farthing import signals
from farthing.config import EngineConfig
from farthing.engine.core import EngineCore
from farthing.engine.engine import Engine
from farthing.engine.generation import RequestState
from farthing.engine.load import load_engine
from farthing.engine.model import Model
from farthing.engine.request import EngineError, SamplingParams
from farthing.ops import LatentCache
from farthing.ops.api import CacheDtype

log = logging.getLogger(__name__)

_START_TIMEOUT = 600.0  # seconds
_READY = "ready"


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt for the prefill process to compute."""

    number: int
    tokens: list[int]
    salt: str
    order: int  # the request's priority


@dataclass(frozen=True, slots=True)
class _Computed:
    """A computed prompt's blocks in the prefill process; free: no other sequence reads the block there."""

    number: int
    blocks: list[int]
    free: list[bool]


Exchanged = list[tuple[int, int]]  # (block given by the prefill process, block it gets in return)


@dataclass(slots=True)
class _Pending:
    state: RequestState
    cancelled: bool = False


def load_disaggregated(config: EngineConfig) -> Engine:
    """An engine whose prompts are computed by another process."""
    engine = load_engine(config, _shared_cache)
    try:
        engine.prefill = RemotePrefill(engine)
    except BaseException:
        engine.shutdown()
        raise
    return engine


def _shared_cache(model: Model, config: EngineConfig, dtype: CacheDtype) -> tuple[LatentCache, Sequence[int]]:
    """Twice the blocks, in memory that the prefill process can map; the first half is the engine's."""
    assert config.num_blocks
    cache = model.new_cache(2 * config.num_blocks, config.block_size, dtype)
    for tensor in cache.tensors():
        tensor.share_memory_()
    return cache, range(config.num_blocks)


class RemotePrefill:
    """An engine's `Prefill` in another process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pending: dict[int, _Pending] = {}
        self._lock = threading.Lock()
        self._number = 0
        self._process = _PrefillProcess(engine.config, engine.cache, self._arrived, self._lost)

    def take(self, state: RequestState) -> bool:
        """See `Prefill`. Prompts of one block are left to the engine: there is no full block to hand over."""
        generation = state.generations[0]
        if len(generation.tokens) <= self._engine.config.block_size or not generation.read_cache:
            return False
        with self._lock:
            self._number += 1
            number = self._number
            self._pending[number] = _Pending(state)
        prompt = _Prompt(number, list(generation.tokens), generation.salt, state.request.priority)
        if not self._process.send(prompt):
            self._admit(number)
        return True

    def cancel(self, state: RequestState | None) -> None:
        """Mark pending requests; they end as soon as they are admitted."""
        with self._lock:
            for pending in self._pending.values():
                pending.cancelled = pending.cancelled or state is None or pending.state is state

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def _admit(self, number: int) -> None:
        with self._lock:
            pending = self._pending.pop(number, None)
        if pending is None:
            return
        self._engine.admit(pending.state)
        if pending.cancelled:
            self._engine.cancel(pending.state)

    def _arrived(self, prompt: _Prompt, computed: _Computed) -> Exchanged:
        """Adopt a prompt's blocks between two steps, then admit its request."""
        try:
            exchanged = self._engine.between_steps(lambda core: adopt(core, prompt, computed)).result()
        except EngineError:
            return []  # the engine has ended, and its requests with it
        self._admit(prompt.number)
        return exchanged

    def _lost(self) -> None:
        """The prefill process has ended: the engine computes the pending prompts."""
        with self._lock:
            numbers = list(self._pending)
        for number in numbers:
            self._admit(number)


class _PrefillProcess:
    """The prefill process and the thread that listens to it."""

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
        """Send a prompt to compute; False if the process has ended."""
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
            self._process.kill()
            self._process.join(5)

    def _await_ready(self) -> None:
        if not self._connection.poll(_START_TIMEOUT):
            raise EngineError(f"prefill process was not ready after {_START_TIMEOUT:g} s")
        try:
            said = self._connection.recv()
        except EOFError:
            self._process.join(1)
            said = f"exit code {self._process.exitcode}"
        if said != _READY:
            raise EngineError(f"prefill process could not start: {said}")

    def _listen(self) -> None:
        try:
            while True:
                computed = self._connection.recv()
                exchanged = self._arrived(self._prompts.pop(computed.number), computed)
                with self._lock:
                    self._connection.send(exchanged)
        except Exception as error:
            if not self._closed:
                log.error("prefill process ended; prompts are now computed by the decoding engine")
                if not isinstance(error, EOFError | OSError):  # block ownership is no longer known
                    log.exception("adopting a prompt's blocks failed")
                    self._process.kill()
                self._lost()


def adopt(core: EngineCore, prompt: _Prompt, computed: _Computed) -> Exchanged:
    """Exchange a prompt's computed blocks for free ones and register them in the prefix cache."""
    prefix, pool, cache = core.scheduler.prefix, core.scheduler.pool, core.runner.cache
    hashes: list[bytes] = []
    prefix.extend(hashes, prompt.tokens, prompt.salt, len(computed.blocks))
    known = prefix.match(hashes)
    pool.share(known)  # so that `allocate` does not take them
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
    """A computed prompt's blocks. The adopting engine must answer before the next step."""
    hashes: list[bytes] = []
    prefix, pool = core.scheduler.prefix, core.scheduler.pool
    prefix.extend(hashes, prompt.tokens, prompt.salt, (len(prompt.tokens) - 1) // size)
    blocks = prefix.match(hashes)
    return _Computed(prompt.number, blocks, [pool.refs(block) == 0 for block in blocks])


def _serve_prompts(config: EngineConfig, cache: LatentCache, connection: Connection) -> None:
    """Main function of the prefill process: generate one token per prompt to fill the prefix cache."""
    signals.leave_to_parent()
    upper_half = range(cache.num_blocks // 2, cache.num_blocks)
    try:
        engine = load_engine(replace(config, skip_tokenizer_init=True), lambda *_: (cache, upper_half))
        connection.send(_READY)
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    answers: SimpleQueue[Exchanged] = SimpleQueue()
    ended = threading.Event()

    def give(core: EngineCore, prompt: _Prompt) -> None:
        """Hand blocks over between two steps; the next step waits, since no block may be overwritten yet."""
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
            answers.put([])  # releases a waiting `give`
            engine.shutdown()  # abort prompts that are still being computed
