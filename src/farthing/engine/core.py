"""One step of the engine: plan, compute, sample, verify, report. No threads here.

The order of a step is the life of a token: the scheduler picks, the runner computes, the sampler draws,
drafts are verified by what was drawn, completions take their tokens and perhaps end, the speculator drafts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from farthing.engine.block_pool import IntegrityError
from farthing.engine.generation import Generation, RequestState, decoded
from farthing.engine.request import EngineError, FinishReason, RequestAtFault, RequestOutput
from farthing.engine.runner import Runner, Step
from farthing.engine.sampler import Logprobs, Pick, Row, report, sample
from farthing.engine.scheduler import Scheduler
from farthing.engine.sequence import Scheduled, Sequence
from farthing.engine.speculation import Speculator
from farthing.engine.stats import Stats
from farthing.engine.stream import RequestStream, deliver
from farthing.engine.tokenizer import Tokenizer
from farthing.ops import sampling

log = logging.getLogger(__name__)

_PROMPT_ROWS = 128  # prompt positions whose logits are held at once

Delivery = tuple[RequestStream, RequestOutput | EngineError]


class EngineCore:
    """Everything between requests and tokens; one thread calls it."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        stats: Stats,
        tokenizer: Tokenizer | None = None,
        speculator: Speculator | None = None,
        on_finish: Callable[[RequestState], None] = lambda state: None,
        pick: Pick = sampling.sample,
    ) -> None:
        """pick: the backend's `sample`."""
        self.runner = runner
        self.scheduler = scheduler
        self.stats = stats
        self._tokenizer = tokenizer
        self._speculator = speculator
        self._on_finish = on_finish
        self._pick = pick
        self._owner: dict[int, RequestState] = {}  # by sequence id

    def add(self, state: RequestState) -> None:
        """Queue the first completion; the others follow when its prompt is in the prefix cache."""
        state.unfinished = len(state.sequences)
        for seq in state.sequences:
            self._owner[seq.id] = state
        if state.request.params.prompt_logprobs is not None:
            state.prompt_logprobs = [None]
        self.scheduler.add(state.sequences[0])
        self._gauges()

    def cancel(self, state: RequestState, reason: FinishReason = "abort") -> None:
        """End a request now and deliver what it has. Nothing happens if it has ended."""
        if state.unfinished == 0:
            return
        for seq in state.sequences:
            gen: Generation = seq.payload
            if gen.finish_reason is None:
                gen.abort(reason)
                self._retire(state, seq)
        deliver([(state.stream, state.output([seq.payload for seq in state.sequences]))])
        self._gauges()

    def fail(self, state: RequestState, error: EngineError) -> None:
        """End a request with an error."""
        if state.unfinished == 0:
            return
        for seq in state.sequences:
            if seq.payload.finish_reason is None:
                seq.payload.abort("error")
                self._retire(state, seq)
        error.metrics = replace(state.metrics)
        deliver([(state.stream, error)])

    def live(self) -> list[RequestState]:
        """Requests that have not ended."""
        return list(dict.fromkeys(self._owner.values()))

    @torch.inference_mode()
    def step(self) -> bool:
        """Compute one step and deliver its outputs. False if there was nothing to do."""
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        if not plan:
            return False
        self._admitted(plan)
        step = self.runner.prepare(plan)
        hidden = self.runner.forward(step)
        rows = [
            Row(item.seq.payload.sampling, item.drafts, ahead)
            for item in plan
            if item.sample
            for ahead in range(1 + len(item.drafts))
        ]
        tokens: list[int] = []
        logprobs: list[Logprobs] | None = None
        if rows:
            picked = hidden if step.sampled is None else hidden[step.sampled]
            tokens, logprobs = sample(self.runner.model, picked, rows, self._pick)
        self._prompt_logprobs(plan, step, hidden)
        moved, failed = self._commit(plan, tokens, logprobs)
        if self._speculator is not None:
            self._speculator.after(plan, step, hidden, time.perf_counter() - began)
        self._account(plan, time.perf_counter() - began)
        self._report(plan, moved)
        for state, error in failed:
            self.fail(state, error)
        self._gauges()
        return True

    def check(self) -> None:
        """When idle: verify the books; a contradiction is logged, counted, and the cache started afresh."""
        try:
            self.scheduler.check()
            if self.scheduler.pool.num_free != self.scheduler.pool.num_blocks or self._owner:
                raise IntegrityError("idle, and blocks or requests are still held")
        except IntegrityError:
            log.exception("the engine's books contradict themselves; the prefix cache is dropped")
            self.stats.integrity_failures += 1
            old = self.scheduler
            self.scheduler = Scheduler(
                old.pool.num_blocks,
                old.block_size,
                old.max_num_seqs,
                old.max_tokens,
                old.prefix.enabled,
                old.num_lookahead,
                old.pool.blocks,
            )

    def _admitted(self, plan: list[Scheduled]) -> None:
        now = time.time()
        for item in plan:
            if not item.first:
                continue
            seq = item.seq
            metrics = self._owner[seq.id].metrics
            self.stats.prefix_cache_queries += len(seq.tokens)
            self.stats.prefix_cache_hits += seq.num_cached
            if metrics.first_scheduled_time == 0.0:
                metrics.first_scheduled_time = now
                metrics.cached_tokens = seq.num_cached
                self.stats.queue.observe(max(0.0, now - metrics.arrival_time))

    def _commit(
        self, plan: list[Scheduled], tokens: list[int], logprobs: list[Logprobs] | None
    ) -> tuple[list[Sequence], list[tuple[RequestState, EngineError]]]:
        """Give each completion its tokens, as far as its drafts were right."""
        moved: list[Sequence] = []
        failed: list[tuple[RequestState, EngineError]] = []
        row = 0
        for item in plan:
            if not item.sample:
                self.scheduler.commit(item, [])
                continue
            gen: Generation = item.seq.payload
            taken: list[int] = []
            try:
                for ahead in range(1 + len(item.drafts)):
                    token = tokens[row + ahead]
                    taken.append(token)
                    ended = gen.push(token, None if logprobs is None else logprobs[row + ahead])
                    if ended or ahead == len(item.drafts) or token != item.drafts[ahead]:
                        break
            except ValueError as error:
                failed.append((self._owner[item.seq.id], RequestAtFault(str(error))))
            row += 1 + len(item.drafts)
            self.scheduler.commit(item, taken)
            self.stats.generation_tokens += len(taken)
            if item.drafts:
                self._count_drafts(item, len(taken) - 1)
            moved.append(item.seq)
        return moved, failed

    def _count_drafts(self, item: Scheduled, accepted: int) -> None:
        metrics = self._owner[item.seq.id].metrics
        metrics.draft_tokens += len(item.drafts)
        metrics.accepted_tokens += accepted
        self.stats.drafts += 1
        self.stats.draft_tokens += len(item.drafts)
        self.stats.accepted_tokens += accepted
        if self._speculator is not None:
            self._speculator.verified(item, accepted)

    def _prompt_logprobs(self, plan: list[Scheduled], step: Step, hidden: Tensor) -> None:
        for item, row in zip(plan, step.starts, strict=False):
            state = self._owner[item.seq.id]
            entries, top = state.prompt_logprobs, state.request.params.prompt_logprobs
            if entries is None or top is None or len(entries) >= item.seq.num_prompt:
                continue
            # The row of position p tells of token p + 1. After a preemption some are there already.
            first = len(entries) - 1
            stop = min(item.start + item.count, item.seq.num_prompt - 1)
            for p in range(first, stop, _PROMPT_ROWS):
                end = min(p + _PROMPT_ROWS, stop)
                at = row + p - item.start
                raw = self.runner.model.logits(hidden[at : at + end - p]).log_softmax(-1)
                new = report(raw, item.seq.tokens[p + 1 : end + 1], [top] * (end - p))
                entries.extend(decoded(entry, self._tokenizer) for entry in new)

    def _account(self, plan: list[Scheduled], seconds: float) -> None:
        """Share the step's wall time over its tokens."""
        self.stats.steps += 1
        self.stats.busy_seconds += seconds
        share = seconds / sum(item.num_tokens for item in plan)
        for item in plan:
            metrics = self._owner[item.seq.id].metrics
            if item.decode:
                metrics.decode_seconds += share * item.num_tokens
            else:
                metrics.prefill_seconds += share * item.num_tokens
                metrics.prefill_tokens += item.count
                self.stats.prompt_tokens += item.count

    def _report(self, plan: list[Scheduled], moved: list[Sequence]) -> None:
        now = time.time()
        news: dict[RequestState, list[Generation]] = {}
        for seq in moved:
            state, gen = self._owner.get(seq.id), seq.payload
            if state is None:
                continue
            metrics = state.metrics
            if metrics.first_token_time == 0.0:
                metrics.first_token_time = now
                self.stats.ttft.observe(now - metrics.arrival_time)
                for sibling in state.sequences[1:]:
                    self.scheduler.add(sibling)
            elif gen.last_token_time:
                self.stats.itl.observe(now - gen.last_token_time)
            gen.last_token_time = now
            metrics.decode_tokens = sum(s.num_output for s in state.sequences)
            metrics.preemptions = sum(s.preemptions for s in state.sequences)
            news.setdefault(state, []).append(gen)
            if gen.finish_reason is not None:
                self._retire(state, seq)
        items: list[Delivery] = []
        for state, gens in news.items():
            if state.request.kind == "delta":
                items.append((state.stream, state.output(gens)))
            elif state.unfinished == 0:
                items.append((state.stream, state.output([s.payload for s in state.sequences])))
        deliver(items)

    def _retire(self, state: RequestState, seq: Sequence) -> None:
        """One completion has ended."""
        self.scheduler.finish(seq)
        del self._owner[seq.id]
        state.unfinished -= 1
        self.stats.finished[seq.payload.finish_reason] += 1
        if state.unfinished:
            return
        metrics = state.metrics
        metrics.finished_time = time.time()
        metrics.decode_tokens = sum(s.num_output for s in state.sequences)
        self.stats.e2e.observe(metrics.finished_time - metrics.arrival_time)
        longest = max(s.num_output for s in state.sequences)
        if longest > 1 and metrics.first_token_time:
            self.stats.tpot.observe((metrics.finished_time - metrics.first_token_time) / (longest - 1))
        self._on_finish(state)

    def _gauges(self) -> None:
        stats, scheduler = self.stats, self.scheduler
        stats.running = len(scheduler.running)
        stats.waiting = len(scheduler.waiting)
        stats.kv_cache_usage = scheduler.pool.usage
        stats.preemptions = scheduler.num_preemptions
