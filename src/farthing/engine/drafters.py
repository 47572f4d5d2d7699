"""Sources of drafts: the multi-token prediction layer, and repetitions in the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from farthing.config import check_drafts
from farthing.engine.generation import Generation
from farthing.engine.runner import Runner, Step
from farthing.engine.sampler import Row, edit, sample_logits
from farthing.engine.sequence import Scheduled
from farthing.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


_REFRESH = 8  # states per token whose last position is updated; longer chains keep an older position


class SuffixAutomaton:
    """Grows with a text. State 0 is the empty substring.

    A suffix automaton over a growing list of tokens (Blumer et al. 1985).

    It finds earlier occurrences of the text's ending. Every state represents a set of substrings that end at
    the same positions. The state of the whole text links to that of its longest ending that also occurs
    earlier. Appending a token takes amortized constant time, and memory is linear in the text.
    """

    __slots__ = ("_end", "_last", "_length", "_link", "_next", "earlier", "matched", "size")

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]  # transitions by token
        self._link: list[int] = [-1]  # the state of the longest proper suffix that is in another state
        self._length: list[int] = [0]  # of the longest substring
        self._end: list[int] = [-1]  # a recent position at which the substrings end
        self._last = 0  # state of the whole text
        self.size = 0  # tokens so far
        self.matched = 0  # length of the longest ending of the text that occurs earlier
        self.earlier = -1  # position of its last token in that earlier occurrence

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self._append(token)

    def _append(self, token: int) -> None:
        following, link, length, end = self._next, self._link, self._length, self._end
        new = self._state({}, length[self._last] + 1, self.size)
        p = self._last
        while p >= 0 and token not in following[p]:
            following[p][token] = new
            p = link[p]
        if p < 0:
            link[new] = 0
        else:
            q = following[p][token]
            if length[q] > length[p] + 1:  # split off the substrings that now end here too
                clone = self._state(following[q].copy(), length[p] + 1, end[q])
                link[clone] = link[q]
                while p >= 0 and following[p].get(token) == q:
                    following[p][token] = clone
                    p = link[p]
                link[q] = q = clone
            link[new] = q
        self.matched, self.earlier = length[link[new]], end[link[new]]
        state = link[new]
        for _ in range(_REFRESH):
            if state <= 0:
                break
            end[state] = self.size
            state = link[state]
        self._last = new
        self.size += 1

    def _state(self, following: dict[int, int], length: int, end: int) -> int:
        self._next.append(following)
        self._link.append(0)
        self._length.append(length)
        self._end.append(end)
        return len(self._link) - 1


_MOST_BEHIND = 128  # maximum number of tokens whose hidden states are kept


@dataclass(slots=True)
class _Behind:
    """Tokens of one sequence that the model has computed and the MTP layer has not."""

    seq: Generation
    start: int  # position of the first
    count: int = 0
    hidden: list[Tensor] = field(default_factory=list)  # [count, D] in pieces
    last: Tensor | None = None  # [1, D] the layer's output for the token before them
    lost: bool = False  # fell too far behind to be drafted for

    def forget(self, block_size: int) -> None:
        """Leave out tokens before the blocks that windows still have: only those of the last token matter."""
        first = block_size * max((held.forgotten for held in self.seq.held), default=0)
        if (early := first - self.start) > 0:
            self.hidden = [torch.cat(self.hidden)[early:]]
            self.start, self.count = first, self.count - early


class MtpDrafter:
    """Takes the first draft from the layer's output and further ones by feeding its drafts back.

    Drafts from the model's multi-token prediction layer (DeepSeek-V3 section 2.2).

    For sampled requests the layer draws its drafts like the verifier: with the request's parameters and the
    random number of the token's index. The two draws agree if the two distributions agree there, which
    happens more often than the verifier drawing the layer's most likely token.

    The layer has its own part of the cache, which must be filled for every token before it can draft. This is
    deferred until a draft is needed: several tokens cost the layer little more than one, and steps without
    drafts cost nothing. Where drafts do not pay, a text may fall too far behind; it then gets no drafts of
    the layer any more, since the hidden states it would need are gone.
    """

    costly = True

    def __init__(self, runner: Runner, num_drafts: int) -> None:
        check_drafts("mtp", len(runner.model.mtp))
        self.num_drafts = num_drafts
        self.num_lookahead = num_drafts - 1
        self._runner = runner
        self._behind: dict[int, _Behind] = {}

    def ready(self, seq: Generation) -> bool:
        """Whether the layer has seen the text, or can still catch up with it."""
        behind = self._behind.get(seq.id)
        return behind is not None and not behind.lost

    def observe(self, plan: Seq[Scheduled[Generation]], step: Step, hidden: Tensor, wanted: bool) -> None:
        """Keep what the layer will need of a step: hidden [T, D] of the accepted tokens."""
        full: list[Generation] = []
        for item, row in zip(plan, step.starts, strict=False):
            seq, rows = item.seq, item.seq.num_computed - item.start
            if not seq.active:
                self._behind.pop(seq.id, None)
                continue
            b = self._behind.get(seq.id)
            if b is not None and b.lost:
                continue
            if b is None or b.start + b.count != item.start:
                b = self._behind[seq.id] = _Behind(seq, item.start)
            b.hidden.append(hidden[row : row + rows])
            b.count += rows
            if b.count < _MOST_BEHIND and item.sample:
                continue
            if not wanted:
                b.lost, b.hidden, b.last = True, [], None
            else:
                full.append(seq)
        if full:
            self._catch_up(full)
        if len(self._behind) > 4 * len(plan) + 64:  # of cancelled sequences
            self._behind = {key: b for key, b in self._behind.items() if b.seq.active}

    def draft(self, seqs: Seq[Generation], most: Seq[int], price: float) -> list[list[int]]:
        """Tokens one by one, fewer where they are unlikely or the cache has no room."""
        model, runner = self._runner.model, self._runner
        self._catch_up([seq for seq in seqs if self._behind[seq.id].count])
        drafts: list[list[int]] = [[] for _ in seqs]
        alive = list(range(len(seqs)))
        chance = [1.0] * len(seqs)
        rows = [self._behind[seq.id].last for seq in seqs]
        hidden = torch.cat([row for row in rows if row is not None]) if len(rows) > 1 else rows[0]
        assert hidden is not None
        for s in range(self.num_drafts):
            tokens, likely = self._tokens(hidden, [seqs[i] for i in alive], [drafts[i] for i in alive], s)
            keep: list[int] = []
            for j, (i, token, p) in enumerate(zip(alive, tokens, likely, strict=True)):
                chance[i] *= p
                if chance[i] < price:
                    continue
                drafts[i].append(token)
                if s + 1 < most[i] and runner.capacity(seqs[i]) > len(seqs[i].tokens) - 1 + s:
                    keep.append(j)
            if s + 1 == self.num_drafts or not keep:
                break
            if len(keep) < len(alive):
                hidden = hidden[runner.tensor(keep)]
                alive = [alive[j] for j in keep]
            batch = runner.span([seqs[i] for i in alive], [len(seqs[i].tokens) - 1 + s for i in alive])
            chosen = runner.tensor([drafts[i][-1] for i in alive])
            hidden = model.draft(chosen, hidden, batch, runner.cache, step=s + 1)
        return drafts

    def _tokens(
        self, hidden: Tensor, seqs: Seq[Generation], drafts: Seq[list[int]], step: int
    ) -> tuple[list[int], list[float]]:
        """The layer's token after each sequence and its drafts, and how likely it is to be accepted."""
        model = self._runner.model
        if all(seq.sampling.plain for seq in seqs):
            values, ids, total = model.draft_top_logits(hidden, 1, step=step)
            return ids[:, 0].tolist(), (values[:, 0] - total).exp().tolist()
        rows = [Row(seq.sampling, tuple(d), len(d)) for seq, d in zip(seqs, drafts, strict=True)]
        logits = edit(model.draft_logits(hidden, step=step), rows)
        tokens = sample_logits(logits, rows, model.ops.sample)
        # How many drafts a sampled sequence gets is decided by its acceptance so far (`most`) alone.
        return tokens, [1.0] * len(tokens)

    def _catch_up(self, seqs: Seq[Generation]) -> None:
        """Run the layer over the tokens it has not seen, each with the token that follows it."""
        if not seqs:
            return
        model, runner = self._runner.model, self._runner
        behind = [self._behind[seq.id] for seq in seqs]
        for b in behind:
            b.forget(runner.block_size)
        following: list[int] = []
        for seq, b in zip(seqs, behind, strict=True):
            following += seq.tokens[b.start + 1 : b.start + 1 + b.count]
        pieces = [piece for b in behind for piece in b.hidden]
        hidden = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        batch = runner.span(seqs, [b.start for b in behind], [b.count for b in behind])
        out = model.draft(runner.tensor(following), hidden, batch, runner.cache, step=0)
        end = 0
        for b in behind:
            end += b.count
            b.last = out[end - 1 : end]
            b.start, b.count, b.hidden = b.start + b.count, 0, []


# Drafts from the text itself: prompt lookup (Saxena 2023) over a suffix automaton of prompt and output.

_SHORTEST = 2  # tokens of a repeated ending that are worth a draft


class TextDrafter:
    """Drafts what followed the text's longest ending where it occurred before."""

    num_lookahead = 0
    costly = False

    def __init__(self, num_drafts: int) -> None:
        self.num_drafts = num_drafts
        self._automata: dict[int, SuffixAutomaton] = {}  # by sequence id

    def ready(self, seq: Generation) -> bool:
        """Always: automata catch up when they are used."""
        return True

    def observe(self, plan: Seq[Scheduled[Generation]], step: Step, hidden: Tensor, wanted: bool) -> None:
        """Drop the automata of sequences that have ended."""
        if not self._automata:
            return
        for item in plan:
            if not item.seq.active:
                self._automata.pop(item.seq.id, None)
        if len(self._automata) > 4 * len(plan) + 64:  # of cancelled sequences
            live = {item.seq.id for item in plan}
            self._automata = {k: v for k, v in self._automata.items() if k in live}

    def draft(self, seqs: Seq[Generation], most: Seq[int], price: float) -> list[list[int]]:
        """See `Drafter`."""
        return [self._continue(seq, count) for seq, count in zip(seqs, most, strict=True)]

    def _continue(self, seq: Generation, count: int) -> list[int]:
        automaton = self._automata.setdefault(seq.id, SuffixAutomaton())
        automaton.extend(seq.tokens[automaton.size :])
        if automaton.matched < _SHORTEST:
            return []
        return continuation(seq.tokens, automaton.earlier + 1, count)


def continuation(tokens: Seq[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on; past the end of the text its last period repeats."""
    repeated = list(tokens[start : start + count])
    while len(repeated) < count:
        repeated += repeated[-(len(tokens) - start) :][: count - len(repeated)]
    return repeated
