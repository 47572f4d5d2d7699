"""A scripted model behind the real scheduler and prefix cache, which count what agents' sessions reuse."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from farthing.config import EngineConfig
from farthing.engine.request import RequestMetrics, RequestStream, SamplingParams
from farthing.engine.scheduler import Scheduler
from farthing.engine.sequence import Sequence as Cached
from tests.server.harness import ScriptedEngine

BLOCK, BLOCKS = 16, 50_000


class Cache:
    """A prefix cache, which counts."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(BLOCKS, BLOCK, max_num_seqs=1, max_num_batched_tokens=1_000_000)
        self.computed = 0

    def compute(self, prompt: Sequence[int], answer: Sequence[int]) -> Cached:
        """Compute a prompt and its answer; `num_cached` of the result is how much was there."""
        seq = Cached(self.computed, list(prompt), len(prompt), len(prompt) + len(answer) + 1)
        self.computed += 1
        self.scheduler.add(seq)
        for token in answer:
            for item in self.scheduler.schedule():
                self.scheduler.commit(item, [token])
        self.scheduler.finish(seq)
        return seq


class CachingEngine(ScriptedEngine):
    """Streams a script, and keeps prompts and answers in a prefix cache as the engine does."""

    def __init__(self, script: Callable[[str], Sequence[str]], chat_template: str) -> None:
        super().__init__(script, chat_template=None)
        self.config = EngineConfig(max_model_len=1_000_000, num_blocks=64, chat_template=chat_template)
        self.cache = Cache()
        self.seen: list[list[int]] = []  # prompt and answer of each request
        self.counts: list[tuple[int, int, int]] = []  # tokens: prompt, repeated from an earlier one, cached
        self._lock = threading.Lock()

    def submit(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> RequestStream:
        """Compute the prompt and the answer, then stream."""
        text = self.tokenizer.decode(prompt, skip_special_tokens=False)
        answer = [i for piece in self.script(text) for i in self.tokenizer.encode(piece, add_special_tokens=False)]  # type: ignore[operator]  # fmt: skip  # noqa: E501
        with self._lock:
            seq = self.cache.compute(prompt, answer)
            repeated = max((common(prompt, earlier) for earlier in self.seen), default=0)
            self.counts.append((len(prompt), min(repeated, len(prompt) - 1), seq.num_cached))
            self.seen.append(seq.tokens)
            found = RequestMetrics(cached_tokens=seq.num_cached, missed=seq.missed)
            self.metrics[f"scripted-{len(self.prompts) + 1}"] = found
            return super().submit(prompt, params, **options)

    def shares(self) -> float:
        """The cached share of all tokens that repeat those of an earlier prompt and its answer."""
        repeated = sum(count for _, count, _ in self.counts)
        return sum(cached for _, _, cached in self.counts) / repeated


def common(one: Sequence[int], two: Sequence[int]) -> int:
    """How much two sequences have in common from their beginning."""
    pairs = enumerate(zip(one, two, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(two)))
