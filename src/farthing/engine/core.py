"""One step of the engine: schedule, compute, sample, verify, report. Single-threaded.

The scheduler plans, the runner computes hidden states, and the sampler draws tokens. Matching drafts are
accepted, completions receive their tokens and may end, and the speculator drafts for the next step.

An exception in one request's part of a step (its tokens, its grammar, its text, its delivery) ends that
request. Any other one ends the requests of the step, and all others are computed again in an empty cache.
Where that happens in several steps in a row, the engine ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from farthing.engine.constraints import Refused
from farthing.engine.generation import Generation, RequestState
from farthing.engine.pace import Pace
from farthing.engine.request import (
    INTERNAL,
    EngineError,
    EngineFailed,
    FinishReason,
    Position,
    RequestAtFault,
    RequestOutput,
    deliver,
    positions,
)
from farthing.engine.runner import Runner, Step
from farthing.engine.sampler import Pick, Row, report, sample
from farthing.engine.scheduler import Scheduler
from farthing.engine.sequence import IntegrityError, Scheduled, Status
from farthing.engine.speculation import Speculator
from farthing.engine.stats import Stats
from farthing.engine.tokenizer import Tokenizer
from farthing.ops import NotFinite, as_float32, host, log_softmax, require_finite

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Divided:
    """Planned prompt tokens and the layer that they have reached.

    Between these steps others decode (layered prefill, Lee et al. 2025). Compared with short chunks through
    every layer, each expert computes many rows at once, and its weights are read once per prompt instead of
    once per chunk.
    """

    plan: list[Scheduled[Generation]]
    step: Step
    hidden: Tensor  # [T, D], the next layer's input
    layer: int = 0  # the next one
    seconds: float = 0.0  # spent so far

    @property
    def tokens(self) -> int:
        """Number of prompt tokens."""
        return self.step.starts[-1]

    @property
    def wanted(self) -> bool:
        """Whether one of the requests has not been cancelled."""
        return any(item.seq.status is not Status.FINISHED for item in self.plan)

    def waits(self, beside: Seq[Scheduled[Generation]], paused: set[str]) -> bool:
        """Whether its next layers are for a later step than that of `beside`: one of its clients pauses, or
        other prompts have used this step's time."""
        return any(item.seq.client in paused for item in self.plan) or any(item.count > 1 for item in beside)


log = logging.getLogger(__name__)

_PROMPT_ROWS = 128  # prompt positions per chunk of logits
# Steps in a row that fail before the engine ends. Those in which every request has failed before count only
# for the second: a client that sends a bad request again must not end the engine for all.
MOST_FAILURES, MOST_REPEATED = 3, 24

Delivery = tuple[RequestState, RequestOutput | EngineError]
Faults = dict[Generation, Exception]  # of a step, by the completion at whose turn they were raised


class EngineCore:
    """Turns requests into tokens, one step at a time. Called from one thread."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler[Generation],
        stats: Stats,
        tokenizer: Tokenizer | None = None,
        speculator: Speculator | None = None,
        on_finish: Callable[[RequestState], None] = lambda state: None,
        pick: Pick | None = None,
        pace: Pace | None = None,
    ) -> None:
        """pick: the backend's `sample` op. pace: learns how long steps take."""
        self.runner = runner
        self.scheduler = scheduler
        self.stats = stats
        self._text = None if tokenizer is None else tokenizer.token_text
        self._speculator = speculator
        self._on_finish = on_finish
        self._pick = pick
        self._pace = pace
        self._divided: Divided | None = None
        stats.scheduler = lambda: self.scheduler.gauges()
        self._live: dict[RequestState, None] = {}  # unfinished requests, in order of arrival
        self._probes = 0  # of them, those with a probe
        self._planned: Seq[Scheduled[Generation]] = ()  # what the step in progress computes
        self._failures = self._repeated = 0  # steps in a row that failed
        self._failed: set[int] = set()  # hashes of their prompts
        self._failed_drafts = 0  # times in a row that drafting failed

    def add(self, state: RequestState) -> None:
        """Queue a request's first completion; the others follow once the prompt is in the prefix cache."""
        state.unfinished = len(state.generations)
        self._live[state] = None
        self._probes += state.request.params.probe is not None
        if state.request.params.prompt_logprobs is not None:
            state.prompt_logprobs = [None]
        try:
            self.scheduler.add(state.generations[0])
        except Exception as error:
            self._fault(state, error)

    def cancel(self, state: RequestState, reason: FinishReason = "abort") -> None:
        """End a request now and deliver its output so far. No effect on a finished request."""
        if state.unfinished == 0:
            return
        try:
            for gen in state.generations:
                if gen.finish_reason is None:
                    gen.abort(reason)
                    self._retire(gen)
            output = state.output(state.generations)
        except Exception as error:
            self._fault(state, error)
        else:
            self._deliver([(state, output)])

    def fail(self, state: RequestState, error: EngineError) -> None:
        """End a request with an error. Also if its completions have ended: their last output may be what
        failed, and a stream that has it reads nothing more."""
        for gen in state.generations:
            if gen.status is not Status.FINISHED:
                gen.finish_reason = "error"
                self._retire(gen)
        error.metrics = replace(state.metrics)
        self._deliver([(state, error)])

    def _fault(self, state: RequestState, error: Exception) -> None:
        """End a request after an exception in its own part of the work. The others go on."""
        if isinstance(error, Refused):
            reason: EngineError = RequestAtFault(str(error))
        else:
            log.error("%s failed", state.request.request_id, exc_info=error)
            reason = EngineError(INTERNAL)
            for gen in state.generations:
                gen.tainted = True
        try:
            self.fail(state, reason)
        except Exception as worse:  # the scheduler does not know its sequences
            self._recover(worse, [state])

    def _recover(self, error: Exception, ended: Collection[RequestState]) -> None:
        """Go on after an exception that may have left plans, blocks and caches in any state, without the
        requests `ended`. Raises EngineFailed where that would not help."""
        prompts = {hash(tuple(gen.tokens[: gen.num_prompt])) for state in ended for gen in state.generations}
        again = bool(prompts) and prompts <= self._failed
        self._failed |= prompts
        self._failures, self._repeated = self._failures + (not again), self._repeated + again
        if (failure := self.runner.model.failure()) is not None:
            raise EngineFailed(f"engine failed: {failure}") from error
        if self._failures >= MOST_FAILURES or self._repeated >= MOST_REPEATED:
            steps = self._failures + self._repeated
            raise EngineFailed(f"engine failed: {steps} steps in a row could not be computed") from error
        log.error("a step failed; its requests end, and others are computed again", exc_info=error)
        self.stats.failed_steps += 1
        # Whatever breaks the scheduler a second time waits or runs: nothing shows which one it is.
        self._renew(ended or (self.live() if self._failures > 1 else ()))

    def _renew(self, ended: Collection[RequestState]) -> None:
        """Begin again with an empty cache: the requests `ended` end, and others are computed from their first
        token, which gives the same tokens."""
        self._planned, self._divided = (), None
        again: list[Generation] = []
        for gen in [gen for state in self._live for gen in state.generations]:
            if gen.status is Status.NEW or gen.status is Status.FINISHED:
                continue
            if gen.parent in ended or gen.finish_reason is not None:
                gen.status = Status.NEW  # to the new scheduler
            else:
                again.append(gen)
        self.scheduler = self.scheduler.renewed(again)
        for state in ended:
            self.fail(state, EngineError(INTERNAL))

    def live(self) -> list[RequestState]:
        """Unfinished requests."""
        return list(self._live)

    def step(self) -> bool:
        """Compute one step and deliver its outputs. False if there is nothing to do. The caller turns
        gradients off. Raises EngineFailed if no further step can be computed."""
        nothing: Seq[Scheduled[Generation]] = ()
        self._planned = nothing
        try:
            computed = self._step()
        except EngineFailed:
            raise
        except Exception as error:
            self._recover(error, {item.seq.parent for item in self._planned})
            return True
        if computed:
            self._failures = self._repeated = 0
            self._failed.clear()
        return computed

    def _step(self) -> bool:
        began = time.perf_counter()
        plan = self._planned = self.scheduler.schedule()
        if not plan and self._divided is None:
            return False
        if self.scheduler.kinds.copies:
            self.scheduler.copy_states(self.runner.copy_states)
        several = len(self.scheduler.shares.present) > 1  # before requests of this step end
        now = time.time()
        for seq in (item.seq for item in plan if item.first):
            metrics = seq.parent.metrics
            self.stats.prefix_cache_queries += len(seq.tokens)
            self.stats.prefix_cache_hits += seq.num_cached
            if metrics.first_scheduled_time == 0.0:
                metrics.first_scheduled_time = now
                metrics.cached_tokens, metrics.missed = seq.num_cached, seq.missed
                self.stats.queue.observe(max(0.0, now - metrics.arrival_time))
        # The scheduler marks a prompt as busy in the step that plans it first: several steps compute its
        # layers, beginning below, so only the other entries have results in this step.
        whole = [item for item in plan if not item.seq.busy]
        if len(whole) < len(plan):
            self._divide([item for item in plan if item.seq.busy])
        if whole:
            step = self.runner.prepare(whole)
            self._complete(whole, step, self.runner.forward(step), began)
        self._planned = () if self._divided is None else self._divided.plan
        interference = self.scheduler.interference
        if self._divided is not None:
            # A divided prompt advances after this step's own work, unless that used the time that decoding
            # can wait, or its client has delayed others. One that no request wants any more is never put
            # off: its blocks stay reserved until it is settled.
            paused = interference.paused({item.seq.client for item in whole})
            if not (self._divided.wanted and self._divided.waits(whole, paused)):
                whole = [*whole, *self._divided.plan]
                self._advance(self._divided, decodes=sum(item.decode for item in whole))
        # Layers that delayed this step's decoding are charged to the divided prompts' clients as well.
        if several or interference.owed:  # one client delays nobody else
            self._owe(whole, time.perf_counter() - began)
        return True

    def _complete(
        self, plan: list[Scheduled[Generation]], step: Step, hidden: Tensor, began: float, whole: bool = True
    ) -> None:
        """Sample and deliver what follows the hidden states of a plan, which was begun at `began`.

        whole: the plan was computed in one step, so its duration says how long such steps take.
        """
        faults: Faults = {}
        tokens, logprobs = self._sample(plan, step, hidden, faults)
        if any(item.seq.scored for item in plan):
            self._prompt_logprobs(plan, step, hidden, faults)
        if faults:
            self._judge(plan, step, faults)
        moved = self._commit(plan, tokens, logprobs, faults)
        for gen in faults:
            gen.finish_reason = "error"  # so that nothing drafts for it
        if self.scheduler.kinds.copies:
            self.scheduler.copy_states(self.runner.copy_states)
        if self._speculator is not None:
            self._speculate(self._speculator, plan, step, hidden, began, whole)
        seconds = time.perf_counter() - began
        decoding, prompts = sum(i.decode for i in plan), sum(i.count for i in plan if not i.decode)
        if whole and self._pace is not None:
            self._pace.observe(decoding, prompts, seconds)
        # The step's wall time is attributed to its tokens.
        self.stats.steps += 1
        self.stats.busy_seconds += seconds
        self.stats.prompt_tokens += prompts
        share = seconds / sum(item.num_tokens for item in plan)
        for item in plan:
            metrics = item.seq.parent.metrics
            if item.decode:
                metrics.decode_seconds += share * item.num_tokens
            else:
                metrics.prefill_seconds += share * item.num_tokens
                metrics.prefill_tokens += item.count
        self._report(moved)
        for gen, error in faults.items():  # after they were charged for the step
            self._fault(gen.parent, error)

    def _judge(self, plan: list[Scheduled[Generation]], step: Step, faults: Faults) -> None:
        """Raises NotFinite if no row of the step is finite: the model or its cache is broken, not one
        request."""
        finite = [gen for gen, error in faults.items() if not isinstance(error, NotFinite)]
        if not finite and all(item.seq in faults for item in plan if item.sample or item.seq.scored):
            broken = next(iter(faults.values()))
            raise NotFinite(f"{broken}{self.runner.first_not_finite(step)}") from broken

    def _speculate(
        self,
        speculator: Speculator,
        plan: list[Scheduled[Generation]],
        step: Step,
        hidden: Tensor,
        began: float,
        whole: bool,
    ) -> None:
        """Learn from a step and draft for the next one. Without drafts the tokens are the same, so that a
        failure ends no request."""
        learn = speculator.after if whole else speculator.observe
        try:
            learn(plan, step, hidden, time.perf_counter() - began)
        except Exception:
            self._failed_drafts += 1
            log.exception("drafting failed; the next step has no drafts")
            for item in plan:
                item.seq.drafts = []
            if self._failed_drafts == MOST_FAILURES:
                log.error("speculation is off: drafting failed %d times in a row", MOST_FAILURES)
                self._speculator = None
        else:
            self._failed_drafts = 0

    def _divide(self, plan: list[Scheduled[Generation]]) -> None:
        """Begin with prompts whose layers several steps compute."""
        step = self.runner.prepare(plan)
        self._divided = Divided(plan, step, self.runner.begin(step))

    def _advance(self, divided: Divided, decodes: int) -> None:
        """Compute the next layers: as many as fit beside decoding, or all that are left."""
        began = time.perf_counter()
        depth, done = self.runner.model.config.num_hidden_layers, divided.layer
        if divided.wanted:
            last = depth
            if decodes and self._pace is not None:
                shared = len(self.scheduler.shares.present) > 1
                last = min(depth, done + self._pace.layers(decodes, shared, divided.tokens))
            divided.hidden = self.runner.advance(divided.step, divided.hidden, done, last)
            seconds = time.perf_counter() - began
            if self._pace is not None:
                self._pace.observe_layers(divided.tokens, last - done, seconds)
            divided.layer, divided.seconds = last, divided.seconds + seconds
            if last < depth:
                return
            began = time.perf_counter() - divided.seconds
            self._complete(divided.plan, divided.step, divided.hidden, began, whole=False)
        else:
            self.stats.busy_seconds += divided.seconds
        self.scheduler.settle(divided.plan)
        self._divided = None

    def _sample(
        self, plan: list[Scheduled[Generation]], step: Step, hidden: Tensor, faults: Faults
    ) -> tuple[list[int], list[Position | None]]:
        """The tokens of a step, and their log-probabilities where requests want some.

        If that fails, it is tried for one sequence at a time, so that only those fail that cannot be sampled.
        """
        items = [item for item in plan if item.sample]
        if not items:
            return [], []
        picked = hidden if step.sampled is None else hidden[step.sampled]
        try:
            return self._draw(items, picked)
        except Exception:
            if self.runner.model.failure() is not None:  # rather than the requests
                raise
        tokens: list[int] = []
        found: list[Position | None] = []
        for item in items:
            count = 1 + len(item.drafts)
            own = picked[len(tokens) : len(tokens) + count]
            try:
                drawn, entries = self._draw([item], own)
            except Exception as error:
                faults[item.seq] = error
                drawn, entries = [0] * count, [None] * count
            tokens += drawn
            found += entries
        return tokens, found

    def _draw(
        self, items: list[Scheduled[Generation]], picked: Tensor
    ) -> tuple[list[int], list[Position | None]]:
        """The same for the sequences that picked [n, D] belongs to."""
        rows = [
            Row(item.seq.sampling, item.drafts, ahead)
            for item in items
            for ahead in range(1 + len(item.drafts))
        ]
        nothing: list[Position | None] = [None] * len(rows)
        if self._probes:
            self._probe(items, picked)
            if all(row.state.params.probe is not None for row in rows):
                return [0] * len(rows), nothing  # spares the head
        tokens, table = sample(self.runner.model, picked, rows, self._pick)
        if table is None:
            return tokens, nothing
        return tokens, [*positions(table, [row.state.params.logprobs or 0 for row in rows], self._text)]

    def _probe(self, plan: list[Scheduled[Generation]], picked: Tensor) -> None:
        """Read what requests want of their prompts' last tokens; picked: the rows to sample."""
        model, row = self.runner.model, 0
        for item in plan:
            state, last = item.seq.parent, picked[row : row + 1]
            row += 1 + len(item.drafts)
            wanted = state.request.params.probe
            if wanted == "hidden":
                state.probe = host(as_float32(model.normed(last)))[0]
            elif wanted is not None:
                logits = model.logits(last)
                require_finite(logits)
                state.probe = host(as_float32(logits))[0, list(wanted)]

    def check(self) -> None:
        """When idle: check invariants. A violation is logged and counted, and the cache starts empty."""
        if self.scheduler.prefetch.reading:
            return
        try:
            self.scheduler.check()
            if not self.scheduler.unused or self._live:
                raise IntegrityError("blocks or requests are still held while idle")
        except Exception:
            log.exception("engine invariants violated; dropping the prefix cache")
            self.stats.integrity_failures += 1
            self._renew(self.live())

    def _commit(
        self,
        plan: list[Scheduled[Generation]],
        tokens: list[int],
        logprobs: list[Position | None],
        faults: Faults,
    ) -> list[Generation]:
        """Append to each completion its sampled tokens, up to the first rejected draft. Returns those that
        got some."""
        moved: list[Generation] = []
        row = 0
        for item in plan:
            gen, first = item.seq, row
            row += (1 + len(item.drafts)) * item.sample
            if gen in faults or not gen.active:  # it was cancelled while its layers were computed
                continue
            if not item.sample:
                self.scheduler.commit(item, [])
                continue
            taken: list[int] = []
            try:
                for token, entry in zip(tokens[first:row], logprobs[first:row], strict=True):
                    draft = item.drafts[len(taken)] if len(taken) < len(item.drafts) else None
                    taken.append(token)
                    if gen.push(token, entry) or token != draft:
                        break
            except Exception as error:
                faults[gen] = error
                continue
            self.scheduler.commit(item, taken)
            self.stats.generation_tokens += len(taken)
            gen.parent.metrics.decode_tokens += len(taken)
            if item.drafts:
                self._count_drafts(item, len(taken) - 1)
            moved.append(gen)
        return moved

    def _count_drafts(self, item: Scheduled[Generation], accepted: int) -> None:
        metrics = item.seq.parent.metrics
        metrics.draft_tokens += len(item.drafts)
        metrics.accepted_tokens += accepted
        self.stats.drafts += 1
        self.stats.draft_tokens += len(item.drafts)
        self.stats.accepted_tokens += accepted
        if self._speculator is not None:
            self._speculator.verified(item, accepted)

    def _prompt_logprobs(
        self, plan: list[Scheduled[Generation]], step: Step, hidden: Tensor, faults: Faults
    ) -> None:
        began, count = time.perf_counter(), 0
        for item, row in zip(plan, step.starts, strict=False):
            if not item.seq.scored or item.seq in faults:
                continue
            try:
                count += self._score(item, hidden[row : row + item.count])
            except Exception as error:
                faults[item.seq] = error
        if count and self._pace is not None:
            self._pace.observe_scores(count, time.perf_counter() - began)

    def _score(self, item: Scheduled[Generation], hidden: Tensor) -> int:
        """Log-probabilities of a prompt's tokens, from hidden [T, D]; returns how many."""
        state = item.seq.parent
        entries, top = state.prompt_logprobs, state.request.params.prompt_logprobs
        if entries is None or top is None or len(entries) >= item.seq.num_prompt:
            return 0
        # The row of position p predicts token p + 1. After a preemption some entries exist already.
        first = len(entries) - 1
        stop = min(item.start + item.count, item.seq.num_prompt - 1)
        for p in range(first, stop, _PROMPT_ROWS):
            end = min(p + _PROMPT_ROWS, stop)
            raw = self.runner.model.logits(hidden[p - item.start : end - item.start])
            require_finite(raw)
            table = report(log_softmax(raw), item.seq.tokens[p + 1 : end + 1], top)
            entries.extend(positions(table, [top] * (end - p), self._text))
        return max(0, stop - first)

    def _owe(self, plan: list[Scheduled[Generation]], seconds: float) -> None:
        """Note how long a step's prompts delayed its decoding."""
        if self._pace is not None:
            alone = self._pace.decode_seconds(sum(item.decode for item in plan))
            self.scheduler.interference.observe(plan, seconds, alone)

    def _report(self, moved: list[Generation]) -> None:
        now = time.time()
        news: dict[RequestState, list[Generation]] = {}
        for gen in moved:
            news.setdefault(gen.parent, []).append(gen)
        items: list[Delivery] = []
        for state, gens in news.items():
            try:
                output = self._news(state, gens, now)
            except Exception as error:
                self._fault(state, error)
                continue
            if output is not None:
                items.append((state, output))
        self._deliver(items)

    def _news(self, state: RequestState, gens: list[Generation], now: float) -> RequestOutput | None:
        """What to deliver after completions of a request got tokens; None: nothing yet."""
        metrics = state.metrics
        for gen in gens:
            if metrics.first_token_time == 0.0:
                metrics.first_token_time = now
                self.stats.ttft.observe(now - metrics.arrival_time)
                for sibling in state.generations[1:]:
                    self.scheduler.add(sibling)
            elif gen.last_token_time:
                self.stats.itl.observe(now - gen.last_token_time)
            gen.last_token_time = now
            metrics.preemptions = sum(g.preemptions for g in state.generations)
            if gen.finish_reason is not None:
                self._retire(gen)
        if state.request.kind == "delta":
            return state.output(gens)
        return state.output(state.generations) if state.unfinished == 0 else None

    def _deliver(self, items: list[Delivery]) -> None:
        """Hand outputs to their streams. A request whose stream cannot take its own ends with an error."""
        refused = deliver([(state.stream, item) for state, item in items])
        states = {state.stream: state for state, _ in items} if refused else {}
        for stream, error in refused:
            if states[stream].unfinished:
                self._fault(states[stream], error)
            else:
                log.error("%s: its last output could not be delivered", stream.request_id, exc_info=error)
                deliver([(stream, EngineError(INTERNAL))])

    def _retire(self, gen: Generation) -> None:
        """Account for a completion that has ended, and for its request if it was the last one."""
        assert gen.finish_reason is not None
        state = gen.parent
        self.scheduler.finish(gen)
        state.unfinished -= 1
        self.stats.finished[gen.finish_reason] += 1
        if state.unfinished:
            return
        del self._live[state]
        self._probes -= state.request.params.probe is not None
        metrics = state.metrics
        metrics.finished_time = time.time()
        self.stats.e2e.observe(metrics.finished_time - metrics.arrival_time)
        longest = max(g.num_output for g in state.generations)
        if longest > 1 and metrics.first_token_time:
            self.stats.tpot.observe((metrics.finished_time - metrics.first_token_time) / (longest - 1))
        self._on_finish(state)
