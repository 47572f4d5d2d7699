"""How many prompt tokens a step may compute, and which clients' prompts pause for the decoding of others."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from farthing.engine.sequence import Scheduled


class Limits:
    """No limits; `Pace` measures some."""

    def prompt_tokens(self, decodes: int, shared: bool) -> int | None:
        """Prompt tokens, at least one, beside `decodes` decoding sequences; None: no bound.

        shared: whether several clients have requests.
        """
        return None

    def divided_tokens(self, decodes: int, shared: bool) -> int | None:
        """Maximum number of prompt tokens that go through the layers over several steps; None: none do."""
        return None

    def scored_tokens(self, shared: bool) -> int | None:
        """Maximum number of prompt tokens with requested logits per step; None: no bound."""
        return None


@dataclass(slots=True)
class Room:
    """What is left of a step for prompts."""

    tokens: int  # in all
    short: int  # of prompts that the step computes at once
    long: int  # of longer ones, whose layers take several steps; 0: they share `short`
    scored: int  # with requested logits
    limit: int = 0  # the longest of the short prompts; 0: every prompt is short

    def __post_init__(self) -> None:
        self.limit = self.short if self.short < self.long else 0

    @property
    def left(self) -> bool:
        """Whether another prompt may fit."""
        return self.tokens > 0 and (self.short > 0 or (self.limit > 0 and self.long > 0))

    def divides(self, pending: int) -> bool:
        """Whether a prompt with `pending` tokens left takes several steps."""
        return 0 < self.limit < pending

    def offers(self, pending: int, scored: bool) -> int:
        """Number of a prompt's `pending` tokens that fit."""
        count = min(pending, self.tokens, self.long if self.divides(pending) else self.short)
        return min(count, self.scored) if scored else count

    def take(self, pending: int, scored: bool, most: int | None = None) -> int:
        """As many tokens as it offers, but `most` of them, are planned."""
        count = self.offers(pending, scored)
        count = count if most is None else min(count, most)
        self.tokens -= count
        self.scored -= count * scored
        if self.divides(pending):
            self.long -= count
        else:
            self.short -= count
        return count


_MOST = 0.95  # of a step: the extra time, where the speed of decoding alone is overestimated


class Interference:
    """Seconds by which each client has delayed others and not yet made good.

    A step that mixes one client's prompt with another's decoding lasts longer than decoding alone would have.
    The prompt's client owes that extra time, and its prompts pause until steps without them have lasted as
    long. An answer is thus delayed by at most as long as it takes itself, plus one step, however many prompts
    another client sends. Between requests of one client nothing is owed.
    """

    def __init__(self) -> None:
        self.owed: dict[str, float] = {}

    def paused(self, decoding: set[str]) -> set[str]:
        """Clients whose prompts pause; decoding: the clients with decoding requests."""
        return {client for client in self.owed if decoding - {client}}

    def observe(self, plan: Seq[Scheduled[Any]], seconds: float, alone: float) -> None:
        """A step took `seconds`; its decoding alone would have taken about `alone`.

        The last chunk of a prompt counts as decoding, because its first token waits for the step too.
        """
        if not self.owed and all(item.decode for item in plan):
            return
        decoding = {item.seq.client for item in plan if item.sample}
        prompts: dict[str, int] = {}
        for item in plan:
            if not item.decode:
                prompts[item.seq.client] = prompts.get(item.seq.client, 0) + item.count
        extra = min(max(0.0, seconds - alone), _MOST * seconds) if prompts else 0.0
        # Time spent on anyone's prompts repays nothing: clients could else take turns at delaying another.
        self.owed = {
            client: left
            for client, owed in self.owed.items()
            if decoding - {client} and (left := owed - (0.0 if client in prompts else seconds - extra)) > 0
        }
        total = sum(prompts.values())
        for client, tokens in prompts.items():
            if decoding - {client}:
                self.owed[client] = self.owed.get(client, 0.0) + extra * tokens / total


SCORING = 0.05  # seconds of a step for the logits of prompt tokens
SMALLEST_SCORED = 32  # prompt tokens with logits that every step may compute
_FIRST_SCORED = 128  # the same before any speed is known
SMALLEST_CHUNK = 16  # prompt tokens that every step may compute, so that prompts always progress
_START = 64  # prompt tokens in the first mixed step, before any speed is known
_GROWTH = 2  # maximum factor from one mixed step's chunk to the next
_SURPRISE = 2.0  # maximum factor by which one step may raise an estimate: it may have met a page fault
_RECENT = 0.5  # weight of the last step in the cost per token
_SMOOTH = 0.2  # weight of the last step in the duration of a decode step
_SHARED = 0.5  # of the limit, where one client's prompts delay another's decoding
_EFFICIENT = 256  # prompt tokens of a mixed step from which layers are not divided


class Pace(Limits):
    """Measures steps and bounds the prompt tokens of the next one.

    A step that mixes prompts with decoding delays every decoding request by its whole duration. Its duration
    is close to that of a decode-only step plus a cost per prompt token, and both are measured as the engine
    runs. The cost drifts (attention gets slower as a prompt's context grows), so recent steps count most.

    A machine on which only few tokens fit into a step computes them inefficiently: each expert gets few rows,
    and every step reads all weights. There, a larger part of a prompt is taken through the layers a few at a
    time, as many per step as fit beside decoding.
    """

    def __init__(self, limit: float, layers: int = 0) -> None:
        """limit: target duration of a mixed step in seconds; 0: no limit. layers: of a model that can
        compute a few of them; 0: it cannot."""
        self.limit = limit
        self._layers = layers
        self._layer = 0.0  # seconds per prompt token and layer of steps with prompts alone
        self._decode: dict[int, float] = {}  # seconds of a decode-only step by bit length of the batch
        self._cost = 0.0  # seconds per prompt token, of mixed steps once there was one
        self._chunk = 0  # prompt tokens of the last mixed step
        self._score = 0.0  # seconds per prompt token for its logits

    def observe(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """A step that decoded `decodes` sequences and computed `prompt_tokens` took `seconds`."""
        if prompt_tokens and not decodes and self._layers:
            self.observe_layers(prompt_tokens, self._layers, seconds)
        if not prompt_tokens:
            size = decodes.bit_length()
            self._decode[size] = _blend(self._decode.get(size, seconds), seconds, _SMOOTH)
        elif decodes:
            cost = max(seconds - self.decode_seconds(decodes), 0.05 * seconds) / prompt_tokens
            known = self._chunk > 0
            self._cost = _blend(self._cost, cost, _RECENT) if known else cost
            self._chunk = prompt_tokens
        elif not self._chunk:
            self._cost = seconds / prompt_tokens

    def prompt_tokens(self, decodes: int, shared: bool = False) -> int | None:
        """As many as fit into the limit."""
        if not self.limit or not decodes:
            return None
        if not self._cost:
            return _START
        chunk = int(self._spare(decodes, shared) / self._cost)
        # Before the first mixed step the cost is that of a large prompt step, which a small one exceeds.
        chunk = min(chunk, _GROWTH * self._chunk) if self._chunk else chunk // 2
        return max(SMALLEST_CHUNK, chunk)

    def divided_tokens(self, decodes: int, shared: bool = False) -> int | None:
        """As many as go through one layer within the limit, where few go through all of them.

        Where decoding alone takes almost all of the limit, that is fewer than a mixed step's, and nothing is
        divided.
        """
        if not self.limit or not self._layer:
            return None
        most = int(self._spare(decodes, shared) / self._layer)
        return most if most // self._layers < _EFFICIENT else None

    def layers(self, decodes: int, shared: bool, tokens: int) -> int:
        """Number of layers to compute for `tokens` prompt tokens beside `decodes` decoding sequences."""
        return max(1, int(self._spare(decodes, shared) / (self._layer * tokens)))

    def observe_layers(self, tokens: int, layers: int, seconds: float) -> None:
        """Record that `layers` layers of `tokens` prompt tokens alone took `seconds`."""
        cost = seconds / (tokens * layers)
        weight = 1.0 if cost > self._layer else _SMOOTH  # the first layers may be cheap, being dense
        self._layer = _blend(self._layer, cost, weight) if self._layer else cost

    def observe_scores(self, tokens: int, seconds: float) -> None:
        """Record that log-probabilities of `tokens` prompt tokens took `seconds` in addition to the step."""
        cost = seconds / tokens
        self._score = _blend(self._score, cost, _RECENT) if self._score else cost

    def scored_tokens(self, shared: bool = False) -> int:
        """As many as take about `SCORING` seconds, or half of that where other clients wait for the step."""
        if not self._score:
            return _FIRST_SCORED
        return max(SMALLEST_SCORED, int((SCORING * _SHARED if shared else SCORING) / self._score))

    def _spare(self, decodes: int, shared: bool) -> float:
        """Seconds of a step that decoding leaves to prompts."""
        return (self.limit * _SHARED if shared else self.limit) - self.decode_seconds(decodes)

    def decode_seconds(self, decodes: int) -> float:
        """Seconds of a decode-only step, of the nearest batch size measured that is not larger; 0: none."""
        sizes = [size for size in self._decode if size <= decodes.bit_length()]
        return self._decode[max(sizes)] if sizes else 0.0


def _blend(old: float, new: float, weight: float) -> float:
    return old + weight * (min(new, _SURPRISE * old) - old)
