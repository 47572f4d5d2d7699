"""Prefill in a process of its own: prompts are computed there, tokens are drawn here.

Long prompts then no longer stand in the way of running answers. A request first goes to the prefill process,
whose engine computes its prompt; the blocks of its cache, which lies in memory that both processes map, are
copied once into blocks of this engine's cache and entered in its prefix cache. Then the request is admitted
here as any other: it finds its prompt there but for the last block, and the tokens are those of one engine.

If the prefill process ends, prompts are computed here.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from farthing.config import EngineConfig
from farthing.engine.core import EngineCore
from farthing.engine.engine import Engine, Order
from farthing.engine.generation import RequestState
from farthing.engine.request import EngineError, SamplingParams
from farthing.ops import LatentCache

log = logging.getLogger(__name__)

_START_TIMEOUT = 600.0  # seconds
_COPY_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt on its way to the prefill process."""

    number: int
    tokens: list[int]
    salt: str
    order: int  # as the request's priority


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
        self._prefill = _PrefillProcess(self.config, self._arrived, self._lost)

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

    def _arrived(self, prompt: _Prompt, cache: LatentCache, blocks: list[int]) -> None:
        """Copy a prompt's blocks between two steps, then admit its request."""
        try:
            self.between_steps(lambda core: _adopt(core, prompt, cache, blocks)).result(_COPY_TIMEOUT)
        except EngineError:
            return  # this engine has ended, and its requests with it
        self._admit(prompt.number)

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
        arrived: Callable[[_Prompt, LatentCache, list[int]], None],
        lost: Callable[[], None],
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve_prompts, args=(replace(config, disaggregate=False), theirs), daemon=False
        )
        self._process.start()
        theirs.close()
        self._closed = False
        self._prompts: dict[int, _Prompt] = {}
        self._lock = threading.Lock()
        try:
            self._cache = self._await_cache()
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

    def _await_cache(self) -> LatentCache:
        if not self._connection.poll(_START_TIMEOUT):
            raise EngineError(f"the prefill process was not ready after {_START_TIMEOUT:g} s")
        try:
            said = self._connection.recv()
        except EOFError:
            self._process.join(1)
            said = f"it ended with exit code {self._process.exitcode}"
        if not isinstance(said, LatentCache):
            raise EngineError(f"the prefill process could not start: {said}")
        return said

    def _listen(self) -> None:
        try:
            while True:
                number, blocks = self._connection.recv()
                self._arrived(self._prompts.pop(number), self._cache, blocks)
                with self._lock:
                    self._connection.send(number)  # the blocks are copied
        except (EOFError, OSError):
            if not self._closed:
                log.error("the prefill process has ended; prompts are computed with the answers now")
                self._lost()


def _adopt(core: EngineCore, prompt: _Prompt, source: LatentCache, blocks: list[int]) -> None:
    """Copy computed blocks into free ones of this engine, known by their tokens from now on."""
    prefix, pool, cache = core.scheduler.prefix, core.scheduler.pool, core.runner.cache
    hashes: list[bytes] = []
    prefix.extend(hashes, prompt.tokens, prompt.salt, len(blocks))
    known = prefix.match(hashes)
    pool.share(known)  # taking free blocks must not take these
    count = min(len(blocks) - len(known), pool.num_free)
    own = pool.allocate(count)
    wanted = slice(len(known), len(known) + count)
    if count:
        here, there = torch.tensor(own), torch.tensor(blocks[wanted])
        cache.data[:, here] = source.data[:, there]
        if cache.scale is not None and source.scale is not None:
            cache.scale[:, here] = source.scale[:, there]
    for digest, block in zip(hashes[wanted], own, strict=True):
        prefix.register(digest, block)
    pool.release(reversed(known + own))


def _serve_prompts(config: EngineConfig, connection: Connection) -> None:
    """The prefill process: one token of every prompt, whose blocks then are in the prefix cache."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine = Engine.from_config(replace(config, skip_tokenizer_init=True, speculate=config.speculate))
        connection.send(engine.share_cache())
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    acknowledged = threading.Semaphore(0)
    lock = threading.Lock()

    def hand_over(core: EngineCore, prompt: _Prompt) -> None:
        """Between two steps, which wait for the copy: until then no block may be written again."""
        count = (len(prompt.tokens) - 1) // config.block_size
        hashes: list[bytes] = []
        core.scheduler.prefix.extend(hashes, prompt.tokens, prompt.salt, count)
        with lock:
            connection.send((prompt.number, core.scheduler.prefix.match(hashes)))
        acknowledged.acquire(timeout=_COPY_TIMEOUT)

    def compute(prompt: _Prompt) -> None:
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        stream = engine.submit(
            prompt.tokens, params, priority=prompt.order, cache_salt=prompt.salt, kind="final"
        )
        stream.result()
        engine.between_steps(lambda core: hand_over(core, prompt)).result()

    with engine, ThreadPoolExecutor(config.max_num_seqs) as pool:
        try:
            while True:
                message = connection.recv()
                if isinstance(message, _Prompt):
                    pool.submit(compute, message)
                else:
                    acknowledged.release()
        except (EOFError, OSError):
            engine.shutdown()  # what is still computed has nobody to go to
