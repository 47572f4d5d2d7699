"""Drafts: guess the next tokens cheaply, verify them in one step of the model, lose nothing.

Verification is the sampler itself. A draft is a fixed token, and the sampler draws each token from a number
that belongs to the token's index; the draft is accepted if it is what the sampler draws there. That is
rejection sampling (Leviathan et al. 2023) for a draft distribution with all its mass on one token: it
is accepted with the model's own probability p(draft), and a refused one is replaced by a draw from p without
the draft, renormalized. The output is not only distributed as without speculation, it is the same tokens.

Drafts come from the MTP layer (DeepSeek-V3 section 2.2) or from the text itself (prompt lookup).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from farthing.engine.generation import Generation
from farthing.engine.runner import Runner, Step
from farthing.engine.sequence import Scheduled, Sequence, Status

_WARMUP = 16  # steps of either kind before the gate judges
_PROBE_EVERY, _PROBE_LENGTH = 128, 8  # steps after which the other kind is tried again, and for how long
_PAUSE = 64  # tokens that a completion goes without drafts when they do not pay for it
_DECAY = 0.1


class Drafter(Protocol):
    """Proposes continuations at the end of a step."""

    num_drafts: int
    num_lookahead: int  # cache slots needed behind the drafts

    def warm(self, plan: Seq[Scheduled], step: Step, hidden: Tensor) -> object:
        """Called after every step unless drafting is off: what `draft` needs from it."""

    def draft(self, warm: object, plan: Seq[Scheduled], chosen: Seq[int]) -> list[list[int]]:
        """Drafts for plan[i], i in chosen, whose tokens include those of this step."""


@dataclass(slots=True)
class _Bucket:
    """Measurements at one size of batch: [plain, drafted]."""

    steps: list[int] = field(default_factory=lambda: [0, 0])
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of a step, moving average
    tokens: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of a sequence in a step
    tick: int = 0


class Gate:
    """Measures online, by size of batch (powers of two), whether drafts pay."""

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}

    def observe(self, batch: int, drafted: bool, seconds: float, tokens: int) -> None:
        """A step that only decoded `batch` sequences took `seconds` for `tokens` tokens."""
        b = self._bucket(batch)
        b.steps[drafted] += 1
        if b.steps[drafted] == 1:
            return  # the first step of a kind pays for warming up
        first = b.steps[drafted] == 2
        for values, value in ((b.seconds, seconds), (b.tokens, tokens / batch)):
            if first:
                values[drafted] = value
            else:
                # One slow step (another process, a page fault) is no reason to change course.
                values[drafted] += _DECAY * (min(value, 3 * values[drafted]) - values[drafted])

    def pays(self, batch: int) -> bool:
        """Whether drafted steps bring more tokens a second; True while unknown."""
        b = self._bucket(batch)
        if min(b.steps) < _WARMUP:
            return True
        return b.tokens[1] * b.seconds[0] > b.tokens[0] * b.seconds[1]

    def wants(self, batch: int) -> bool:
        """Whether the next step should be drafted: what pays, or now and then the other kind to compare."""
        b = self._bucket(batch)
        b.tick += 1
        if min(b.steps) < _WARMUP:
            return b.steps[1] <= b.steps[0]
        return self.pays(batch) != (b.tick % _PROBE_EVERY < _PROBE_LENGTH)

    def break_even(self, batch: int) -> float:
        """Tokens a step that a sequence needs for its drafts to pay; 1.0 while unknown."""
        b = self._bucket(batch)
        return b.seconds[1] / b.seconds[0] if min(b.steps) >= _WARMUP else 1.0

    def _bucket(self, batch: int) -> _Bucket:
        return self._buckets.setdefault(batch.bit_length(), _Bucket())


class Speculator:
    """Decides who is drafted for, keeps the counts, and switches off what does not pay."""

    def __init__(self, drafter: Drafter, gate: Gate | None = None) -> None:
        self.drafter = drafter
        self.gate = gate or Gate()

    @property
    def num_lookahead(self) -> int:
        """Cache slots that drafting needs behind the drafts."""
        return self.drafter.num_lookahead

    def propose(self, plan: Seq[Scheduled], step: Step, hidden: Tensor) -> None:
        """After a step is committed: set `drafts` of the sequences that go on."""
        batch = sum(item.seq.num_pending == 1 for item in plan)
        wanted = self.gate.wants(max(1, batch))
        # The drafter always sees the prompt: without it a later probe finds its drafts worse than they are.
        decoding = all(item.decode for item in plan)
        if decoding and not wanted and not self.gate.pays(max(1, batch)):
            return
        warm = self.drafter.warm(plan, step, hidden)
        if not wanted:
            return
        chosen = [i for i, item in enumerate(plan) if item.sample and self._eligible(item.seq)]
        if not chosen:
            return
        for i, drafts in zip(chosen, self.drafter.draft(warm, plan, chosen), strict=True):
            matcher = plan[i].seq.payload.sampling.matcher
            if matcher is not None:
                drafts = drafts[: matcher.valid_prefix(drafts)]
            plan[i].seq.drafts = drafts

    def verified(self, item: Scheduled, accepted: int, batch: int) -> None:
        """Learn from one sequence's drafts."""
        gen: Generation = item.seq.payload
        gen.accepted_mean += _DECAY * (accepted - gen.accepted_mean)
        if 1 + gen.accepted_mean < self.gate.break_even(batch):
            gen.draft_pause = _PAUSE
            gen.accepted_mean = 1.0

    def _eligible(self, seq: Sequence) -> bool:
        gen: Generation = seq.payload
        if seq.status is not Status.RUNNING or gen.finish_reason is not None:
            return False
        if gen.draft_pause > 0:
            gen.draft_pause -= 1
            return False
        return True


class MtpDrafter:
    """The model's own multi-token prediction layer, which has a layer of the cache to itself."""

    def __init__(self, runner: Runner, num_drafts: int) -> None:
        if not runner.model.mtp:
            raise ValueError("speculate is 'mtp' and the model has no MTP layer; expected 'ngram' or None")
        self.num_drafts = num_drafts
        self.num_lookahead = num_drafts - 1
        self._runner = runner

    def warm(self, plan: Seq[Scheduled], step: Step, hidden: Tensor) -> Tensor:
        """Run the layer over the step's tokens, each with the token that follows it."""
        following: list[int] = []
        for item in plan:
            known = item.seq.tokens[item.start + 1 : item.start + 1 + item.num_tokens]
            # Behind a refused draft nothing is known; those slots are overwritten with the real tokens.
            following += known + [0] * (item.num_tokens - len(known))
        model, runner = self._runner.model, self._runner
        return model.draft(runner.tensor(following), hidden, step.batch, runner.cache, step=0)

    def draft(self, warm: object, plan: Seq[Scheduled], chosen: Seq[int]) -> list[list[int]]:
        """One draft from the layer's output, the others by feeding it its own."""
        assert isinstance(warm, Tensor)
        model, runner = self._runner.model, self._runner
        rows, offset, last = set(chosen), 0, []
        for i, item in enumerate(plan):
            if i in rows:  # the row of the last token that is computed for good
                last.append(offset + item.seq.num_computed - item.start - 1)
            offset += item.num_tokens
        seqs = [plan[i].seq for i in chosen]
        drafts: list[list[int]] = [[] for _ in seqs]
        alive = list(range(len(seqs)))
        hidden = warm[runner.tensor(last)]
        for s in range(self.num_drafts):
            ids = model.draft_top_logits(hidden, 1, step=s)[1][:, 0]
            for i, token in zip(alive, ids.tolist(), strict=True):
                drafts[i].append(token)
            room = [j for j, i in enumerate(alive) if runner.capacity(seqs[i]) > len(seqs[i].tokens) - 1 + s]
            if s + 1 == self.num_drafts or not room:
                break
            if len(room) < len(alive):
                keep = runner.tensor(room)
                hidden, ids = hidden[keep], ids[keep]
                alive = [alive[j] for j in room]
            batch = runner.follow([seqs[i] for i in alive], [len(seqs[i].tokens) - 1 + s for i in alive])
            hidden = model.draft(ids, hidden, batch, runner.cache, step=s + 1)
        return drafts


class NgramDrafter:
    """Prompt lookup (Saxena 2023): what followed the last time these tokens stood here."""

    num_lookahead = 0

    def __init__(self, num_drafts: int, sizes: Seq[int] = (4, 3, 2)) -> None:
        self.num_drafts = num_drafts
        self._sizes = tuple(sizes)
        self._index: dict[int, _NgramIndex] = {}

    def warm(self, plan: Seq[Scheduled], step: Step, hidden: Tensor) -> None:
        """Nothing to keep warm; forget the sequences that have ended."""
        for item in plan:
            if item.seq.status is Status.FINISHED:
                self._index.pop(item.seq.id, None)

    def draft(self, warm: object, plan: Seq[Scheduled], chosen: Seq[int]) -> list[list[int]]:
        """The continuation of the latest earlier occurrence of the longest known ending."""
        result = []
        for i in chosen:
            seq = plan[i].seq
            index = self._index.setdefault(seq.id, _NgramIndex(self._sizes))
            result.append(index.lookup(seq.tokens, self.num_drafts))
        if len(self._index) > 4 * len(plan) + 64:  # cancelled ones
            live = {item.seq.id for item in plan}
            self._index = {k: v for k, v in self._index.items() if k in live}
        return result


class _NgramIndex:
    """Where each n-gram of one sequence was last followed by something; grown with the sequence."""

    __slots__ = ("_next", "_sizes", "_upto")

    def __init__(self, sizes: Seq[int]) -> None:
        self._sizes = sizes
        self._next: dict[tuple[int, ...], int] = {}
        self._upto = 0

    def lookup(self, tokens: list[int], count: int) -> list[int]:
        found = None
        # Index every ending but the last one, which is what is looked up.
        for end in range(max(1, self._upto), len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._next[tuple(tokens[end - size : end])] = end
        self._upto = len(tokens)
        for size in self._sizes:
            if size <= len(tokens):
                found = self._next.get(tuple(tokens[-size:]))
                if found is not None:
                    return tokens[found : found + count]
        return []
