"""From a configuration to a running engine: in one process, or with prompts computed in another one."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

from farthing import process
from farthing.config import EngineConfig
from farthing.conversation.select import template_source
from farthing.engine.core import EngineCore
from farthing.engine.engine import Engine, NewCache, own_cache
from farthing.engine.generation import RequestState
from farthing.engine.request import EngineError, SamplingParams
from farthing.engine.runner import Model, Sizes
from farthing.engine.tokenizer import Tokenizer, generation_defaults
from farthing.extras import has_torch, needs_torch
from farthing.hub import find_model, resolve_model
from farthing.model.config import ModelConfig
from farthing.model.load import load, numpy_reads
from farthing.ops.api import LatentCache, Ops
from farthing.ops.select import select
from farthing.process import Progress, unseen

# Load a model and start an engine for it.

log = logging.getLogger(__name__)
ROUNDED_WHILE_LOADING = (
    "int4: feed-forwards are rounded to 4 bits while loading, the rest to 8, without calibration; on the "
    "embedded model perplexity rises by 0.7 %% (95 %%: 0.5 to 0.8), on a GPU by 1.0 %%. With calibration and "
    "a measured bound: farthing compress %s --recipe int4 --max-drop 1%% -o OUT, then serve OUT"
)


def load_engine(config: EngineConfig, new_cache: NewCache = own_cache, progress: Progress = unseen) -> Engine:
    """An engine with its model, tokenizer and recommended sampling; prompts are computed in it."""
    require_torch(config)
    path = resolve_model(config.model)
    tokenizer = None
    if not config.skip_tokenizer_init:
        tokenizer = Tokenizer.from_directory(path, ModelConfig.from_directory(path).eos_token_ids)
        tokenizer.chat_template = template_source(config.chat_template) or tokenizer.chat_template
    model = load_model(path, config, progress)
    try:
        return Engine(model, config, tokenizer, generation_defaults(path), new_cache)
    except BaseException:
        model.close()
        raise


def load_model(path: Path, config: EngineConfig, progress: Progress = unseen) -> Model:
    """The model of a checkpoint directory: in this process, or over ranks."""
    if config.quantization == "int4":
        log.info(ROUNDED_WHILE_LOADING, path)
    if config.num_ranks > 1:
        from farthing.parallel.cluster import ParallelModel, RankOptions  # imports torch.distributed

        return ParallelModel(RankOptions(path, config))
    return load(path, _ops(config, _without_torch(path, config)), config.experts, progress)


def require_torch(config: EngineConfig) -> None:
    """Raises ModuleNotFoundError if torch is needed and not installed, before anything is downloaded."""
    if has_torch():
        return
    found = find_model(config.model) if config.num_ranks == 1 else None
    if found is None or found.absent or not _without_torch(found.path, config):
        raise ModuleNotFoundError(needs_torch(), name="torch")


def _without_torch(path: Path, config: EngineConfig) -> bool:
    """Whether numpy arrays suffice as tensors: for layers in one native call, with weights in a packed file;
    without torch also for those of a checkpoint that numpy can read."""
    if config.experts_on is not None or config.disaggregate or config.halves:
        return False
    if config.packed is None and (has_torch() or not numpy_reads(path)):
        return False
    return runs_on_arrays(ModelConfig.from_directory(path)) and "mtp" not in (config.speculate or "")


def runs_on_arrays(model: ModelConfig) -> bool:
    """Whether every layer is part of one native call, so that tensors can be numpy arrays."""
    plain = not any(f.delayed or f.post_norm != model.post_norms for f in model.feeds)
    return plain and model.attention.independent


def _ops(config: EngineConfig, arrays: bool) -> Ops:
    dtype, threads = config.dtype, config.threads
    if config.experts_on is None:
        rounding, file = config.quantization, config.packed
        kernels = config.verify, config.halves, arrays, config.compute
        return select(config.ops, dtype, threads, rounding, file, *kernels)
    from farthing.ops.hybrid import HybridOps

    # Quantization and the packed file apply to the routed experts, which hold most of the weights.
    host = select(
        config.experts_on, None, threads, config.quantization, config.packed, config.verify,
        compute="exact" if config.exact else "int8",
    )  # fmt: skip
    return HybridOps(select(config.ops, dtype, threads), host, config.hot_experts)


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
    """A computed prompt's blocks in the prefill process: kind, hash, block, and whether it is free there, as
    no other sequence reads it. Those that keep every token come first, in order."""

    number: int
    blocks: list[tuple[int, bytes, int, bool]]


Exchanged = list[tuple[int, int, int]]  # (kind, block given by the prefill process, block it gets in return)


@dataclass(slots=True)
class _Pending:
    state: RequestState
    cancelled: bool = False


def load_disaggregated(config: EngineConfig) -> Engine:
    """An engine whose prompts are computed by another process.

    A request first goes to the prefill process, whose engine computes its prompt. Both processes map the same
    cache memory and each owns a set of its blocks. A finished prompt's blocks are exchanged for free blocks
    of the decoding engine and registered in its prefix cache; only a block that another prompt still reads is
    copied. The request is then admitted as usual with all but its last block in the cache, so its tokens
    equal those of a single engine.

    If the prefill process exits, the decoding engine computes the prompts.
    """
    engine = load_engine(config, _shared_cache)
    try:
        engine.prefill = RemotePrefill(engine)
    except BaseException:
        engine.shutdown()
        raise
    return engine


def _shared_cache(model: Model, config: EngineConfig, sizes: Sizes) -> tuple[LatentCache, bool]:
    """Twice the blocks, in memory that the prefill process can map; the first half is the engine's."""
    assert config.num_blocks
    windows = {window: 2 * count for window, count in sizes.windows.items()}
    blocks = 2 * config.num_blocks
    cache = model.new_cache(blocks, config.block_size, sizes.dtype, windows, 2 * sizes.slots)
    for tensor in chain(*cache.by_kind()):
        tensor.share_memory_()
    return cache, False


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
        import torch.multiprocessing as multiprocessing  # torch, which one process does not need

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
            # Closing alone does not reach the other end while the listener waits to receive.
            with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)
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
    scheduler, tensors = core.scheduler, core.runner.cache.by_kind()
    exchanged, held = Exchanged(), []
    for kind, digest, block, free in computed.blocks:
        pool, cached = scheduler.pools[kind], scheduler.known[kind]
        if digest in cached:
            block = cached[digest]
            pool.share([block])  # so that `allocate` does not take it
        elif not pool.num_free:
            break
        else:
            (own,) = pool.allocate(1)
            if free:
                pool.exchange(own, block)
                exchanged.append((kind, block, own))
            else:
                for tensor in tensors[kind]:
                    tensor[:, own] = tensor[:, block]
                block = own
            cached.register(digest, block)
        held.append((pool, block))
    for pool, block in reversed(held):
        pool.release([block])
    return exchanged


def hand_over(core: EngineCore, prompt: _Prompt) -> _Computed:
    """A computed prompt's blocks. The adopting engine must answer before the next step."""
    scheduler = core.scheduler
    found = scheduler.cached(prompt.tokens, prompt.salt)
    free = [scheduler.pools[kind].refs(block) == 0 for kind, _, block in found]
    return _Computed(prompt.number, [(*each, free) for each, free in zip(found, free, strict=True)])


def _serve_prompts(config: EngineConfig, cache: LatentCache, connection: Connection) -> None:
    """Main function of the prefill process: generate one token per prompt to fill the prefix cache."""
    process.leave_to_parent()
    try:
        engine = load_engine(replace(config, skip_tokenizer_init=True), lambda *_: (cache, True))
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
        connection.send(hand_over(core, prompt))
        for kind, block, ours in answers.get():
            core.scheduler.pools[kind].exchange(block, ours)

    def compute(prompt: _Prompt) -> None:
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        try:
            stream = engine.submit(
                prompt.tokens, params, priority=prompt.order, cache_salt=prompt.salt, kind="final"
            )
            stream.result()
        except (EngineError, ValueError):
            log.exception("a prompt failed; the decoding engine computes what is missing of it")
        try:
            engine.between_steps(lambda core: give(core, prompt)).result()
        except EngineError:
            if not ended.is_set():  # the engine has failed: the decoding engine computes all prompts
                os._exit(1)

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


def build_engine(config: EngineConfig, progress: Progress = unseen) -> Engine:
    """Load a model and start an engine over it.

    Raises ValueError naming a field that does not fit the model, OSError for a missing or unreadable file.
    """
    if not config.disaggregate:
        return load_engine(config, progress=progress)

    return load_disaggregated(config)
