"""Blocks of a prompt are handed over between two engines in shared memory; free ones are not copied."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from farthing.config import EngineConfig
from farthing.engine import build
from farthing.engine.build import _Computed, _Prompt, adopt, hand_over, load_engine
from farthing.engine.core import MOST_FAILURES
from farthing.engine.engine import Engine
from farthing.engine.scheduler import Scheduler
from farthing.engine.sequence import Sequence
from farthing.ops.api import LatentCache, StateCache
from tests.served import served_model

from .conftest import CONFIG

SIZE, COUNT = 2, 8
PROMPT = _Prompt(1, [3, 1, 4, 1, 5, 9, 2], "", 0)  # three full blocks


def pair() -> tuple[Any, Any]:
    """(serving core, prefill core), sharing a cache with half of the blocks each."""
    cache = LatentCache(torch.zeros(1, 2 * COUNT, SIZE, 4), torch.zeros(1, 2 * COUNT, SIZE, 2))
    return tuple(
        SimpleNamespace(
            scheduler=Scheduler(COUNT, SIZE, 1, 4, blocks=range(first, first + COUNT)),
            runner=SimpleNamespace(cache=cache),
        )
        for first in (0, COUNT)
    )  # type: ignore[return-value]


def computed(core: Any) -> list[int]:
    """The prompt's blocks, filled with their ids, cached and free."""
    scheduler, hashes = core.scheduler, []  # type: ignore[var-annotated]
    blocks: list[int] = scheduler.pool.allocate(3)
    scheduler.prefix.extend(hashes, PROMPT.tokens, "", 3)
    for digest, block in zip(hashes, blocks, strict=True):
        core.runner.cache.data[:, block] = block
        core.runner.cache.scale[:, block] = block
        scheduler.prefix.register(digest, block)
    scheduler.pool.release(reversed(blocks))
    return blocks


def found(core: Any) -> list[int]:
    """Blocks in which a core has the prompt cached."""
    hashes: list[bytes] = []
    core.scheduler.prefix.extend(hashes, PROMPT.tokens, "", 3)
    blocks: list[int] = core.scheduler.prefix.match(hashes)
    return blocks


def settle(core: Any, exchanged: list[tuple[int, int, int]]) -> None:
    for kind, block, ours in exchanged:
        core.scheduler.pools[kind].exchange(block, ours)


def check(*cores: Any) -> None:
    """Check that every block belongs to one pool, and the pools' invariants."""
    assert sorted(b for core in cores for b in core.scheduler.pool.blocks) == list(range(2 * COUNT))
    for core in cores:
        core.scheduler.pool.check([])
        core.scheduler.prefix.check()


def test_blocks_are_handed_over_without_copying() -> None:
    here, there = pair()
    blocks = computed(there)
    before = here.runner.cache.data.clone()
    settle(there, adopt(here, PROMPT, hand_over(there, PROMPT)))
    assert found(here) == blocks and found(there) == []
    assert torch.equal(here.runner.cache.data, before)
    check(here, there)
    # The same prompt again: it is cached here, so no blocks move.
    again = computed(there)
    assert adopt(here, PROMPT, hand_over(there, PROMPT)) == []
    assert found(here) == blocks and found(there) == again
    check(here, there)


def test_block_in_use_by_the_other_core_is_copied() -> None:
    here, there = pair()
    blocks = computed(there)
    there.scheduler.pool.share(blocks[:1])
    exchanged = adopt(here, PROMPT, hand_over(there, PROMPT))
    settle(there, exchanged)
    assert [block for _, block, _ in exchanged] == blocks[1:]
    assert found(there) == blocks[:1]
    assert found(here)[1:] == blocks[1:] and found(here)[0] < COUNT
    for part in (here.runner.cache.data, here.runner.cache.scale):
        assert (part[:, found(here)[0]] == blocks[0]).all()
    there.scheduler.pool.release(blocks[:1])
    check(here, there)


def test_blocks_without_room_are_not_handed_over() -> None:
    here, there = pair()
    blocks = computed(there)
    busy = here.scheduler.pool.allocate(COUNT - 1)
    settle(there, adopt(here, PROMPT, hand_over(there, PROMPT)))
    assert found(here) == blocks[:1]
    here.scheduler.pool.release(busy)
    check(here, there)


def test_int4_warns_about_its_cost_and_names_an_alternative(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "farthing.engine.build"):
        engine = load_engine(EngineConfig(model="mite", quantization="int4", threads=1))
        engine.shutdown()
    (record,) = [r for r in caplog.records if r.name == "farthing.engine.build"]
    assert "perplexity rises by 0.7 % (95 %: 0.5 to 0.8), on a GPU by 1.0 %" in record.getMessage()
    assert "farthing compress" in record.getMessage() and "--recipe int4" in record.getMessage()
    assert "\n" not in record.getMessage()


def kinds_pair() -> tuple[Any, Any]:
    """The same with a window of three tokens and states."""
    blocks, slots = 24, 4
    cache = LatentCache(torch.zeros(1, 2 * COUNT, SIZE, 4), None)
    cache.windows[3] = LatentCache(torch.zeros(1, 2 * blocks, SIZE, 4), None)
    cache.state = StateCache(torch.zeros(1, 2 * slots, 1), torch.zeros(1, 2 * slots, 1))
    return tuple(
        SimpleNamespace(
            scheduler=Scheduler(
                COUNT, SIZE, 1, 4, blocks=range(half * COUNT, (half + 1) * COUNT),
                windows={3: range(half * blocks, (half + 1) * blocks)},
                slots=range(half * slots, (half + 1) * slots), every=4,
            ),
            runner=SimpleNamespace(cache=cache),
        )
        for half in (0, 1)
    )  # type: ignore[return-value]  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
def test_what_every_kind_keeps_is_handed_over(shared: bool) -> None:
    here, there = kinds_pair()
    seq = Sequence(0, list(PROMPT.tokens), len(PROMPT.tokens), len(PROMPT.tokens) + 1)
    there.scheduler.add(seq)
    while not seq.num_output:
        for item in there.scheduler.schedule():
            there.scheduler.commit(item, [9] if item.sample else [])
        there.scheduler.copy_states(lambda pairs: None)
    there.scheduler.finish(seq)
    taken = hand_over(there, PROMPT)
    assert {kind for kind, *_ in taken.blocks} == {0, 1, 2}
    if shared:
        for kind, _, block, _ in taken.blocks:
            there.scheduler.pools[kind].share([block])
        taken = hand_over(there, PROMPT)
    settle(there, adopt(here, PROMPT, taken))
    again = Sequence(1, list(PROMPT.tokens), len(PROMPT.tokens), len(PROMPT.tokens) + 1)
    here.scheduler.add(again)
    (item,) = here.scheduler.schedule()
    assert item.start == 6 and again.num_cached == 6
    here.scheduler.check()
    if not shared:
        there.scheduler.check()


class Prefill:
    """The prefill process's main function, in a thread, over an engine of the test."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.exited = threading.Event()
        monkeypatch.setattr(build, "load_engine", lambda *_: engine)
        monkeypatch.setattr("farthing.process.leave_to_parent", lambda: None)
        monkeypatch.setattr("farthing.engine.build.os._exit", lambda status: self.exited.set())
        self.connection, theirs = Pipe()
        arguments = engine.config, engine.cache, theirs
        self.thread = threading.Thread(target=build._serve_prompts, args=arguments, daemon=True)
        self.thread.start()
        assert self.connection.recv() == "ready"

    def compute(self, number: int) -> Any:
        self.connection.send(_Prompt(number, list(range(number, number + 20)), "", 0))
        assert self.connection.poll(20)
        computed = self.connection.recv()
        self.connection.send([])
        return computed

    def close(self) -> None:
        self.connection.close()
        self.thread.join(20)


def fail(step: object) -> Any:
    raise RuntimeError("out of memory")


def test_prompt_that_fails_in_the_prefill_process_is_handed_over_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(served_model(CONFIG), EngineConfig(num_blocks=64, block_size=4, max_num_seqs=4))
    forward = engine._core.runner.forward
    prefill = Prefill(engine, monkeypatch)
    engine._core.runner.forward = fail  # type: ignore[method-assign]
    assert prefill.compute(1) == _Computed(1, [])
    engine._core.runner.forward = forward  # type: ignore[method-assign]
    assert len(prefill.compute(2).blocks) == 4  # and the last one's tokens are computed again
    prefill.close()
    assert not prefill.exited.is_set()


def test_prefill_process_ends_when_its_engine_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(served_model(CONFIG), EngineConfig(num_blocks=64, block_size=4, max_num_seqs=4))
    engine._core.runner.forward = fail  # type: ignore[method-assign]
    prefill = Prefill(engine, monkeypatch)
    for number in range(MOST_FAILURES - 1):
        assert prefill.compute(number) == _Computed(number, [])
    prefill.connection.send(_Prompt(MOST_FAILURES, list(range(40, 60)), "", 0))
    assert prefill.exited.wait(20)
    prefill.close()


class InThread:
    """A process that `_PrefillProcess` starts, as a thread of the test with its own end of the connection."""

    exitcode = None

    def __init__(self, target: Any, args: tuple[Any, ...], daemon: bool) -> None:
        args = (*args[:-1], Connection(os.dup(args[-1].fileno())))
        self._thread = threading.Thread(target=target, args=args, daemon=True)
        self.start, self.join, self.is_alive = self._thread.start, self._thread.join, self._thread.is_alive

    def kill(self) -> None:
        raise AssertionError("it would have ended by itself")


def started(
    monkeypatch: pytest.MonkeyPatch, serve: Callable[[Any], object]
) -> tuple[build._PrefillProcess, threading.Event]:
    """A prefill process that runs `serve` over its connection, and whether it was lost."""
    context = SimpleNamespace(Pipe=Pipe, Process=InThread)
    monkeypatch.setattr("torch.multiprocessing.get_context", lambda method: context)
    monkeypatch.setattr(build, "_serve_prompts", lambda config, cache, connection: serve(connection))
    cache, lost = LatentCache(torch.zeros(1), None), threading.Event()
    return build._PrefillProcess(EngineConfig(), cache, lambda *_: [(0, 4, 5)], lost.set), lost


def test_the_prefill_process_learns_which_blocks_it_has_for_those_of_a_prompt(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: Queue[Any] = Queue()

    def serve(connection: Any) -> None:
        connection.send("ready")
        connection.send(_Computed(connection.recv().number, []))
        answers.put(connection.recv())
        with suppress(EOFError):
            connection.recv()

    process, lost = started(monkeypatch, serve)
    assert process.send(PROMPT)
    assert answers.get(timeout=20) == [(0, 4, 5)]
    process.close()
    assert not lost.wait(0.1) and not caplog.records, "it has not failed"


def remote(monkeypatch: pytest.MonkeyPatch, sent: bool) -> tuple[build.RemotePrefill, list[tuple[str, str]]]:
    """Prefill of an engine of four tokens a block, and what it did. sent: its process is there."""
    done: list[tuple[str, str]] = []
    process = SimpleNamespace(send=lambda prompt: sent)
    monkeypatch.setattr(build, "_PrefillProcess", lambda *_: process)
    engine: Any = SimpleNamespace(
        config=SimpleNamespace(block_size=4),
        cache=None,
        admit=lambda state: done.append(("admit", state.name)),
        cancel=lambda state: done.append(("cancel", state.name)),
    )
    return build.RemotePrefill(engine), done


def request(name: str, length: int, read_cache: bool = True) -> Any:
    generation = SimpleNamespace(tokens=[1] * length, read_cache=read_cache, salt="")
    return SimpleNamespace(name=name, generations=[generation], request=SimpleNamespace(priority=0))


@pytest.mark.parametrize(
    ("length", "read_cache", "taken"), [(5, True, True), (4, True, False), (5, False, False)]
)
def test_only_prompts_with_blocks_to_hand_over_are_computed_elsewhere(
    monkeypatch: pytest.MonkeyPatch, length: int, read_cache: bool, taken: bool
) -> None:
    prefill, done = remote(monkeypatch, sent=False)
    assert prefill.take(request("a", length, read_cache)) == taken
    assert done == [("admit", "a")] * taken, "the process is gone"


def test_requests_cancelled_while_their_prompts_are_computed_end_when_they_are_admitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefill, done = remote(monkeypatch, sent=True)
    states = [request(name, 9) for name in "ab"]
    assert all(map(prefill.take, states)) and not done
    prefill.cancel(states[1])
    prefill._lost()
    assert done == [("admit", "a"), ("admit", "b"), ("cancel", "b")]
