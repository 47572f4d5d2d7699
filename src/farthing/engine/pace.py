"""Limits the prompt tokens per step, so that decoding requests are not delayed too long.

A step that mixes prompts with decoding delays every decoding request by its whole duration. Its duration is
close to that of a decode-only step plus a cost per prompt token, and both are measured as the engine runs.
The cost drifts (attention gets slower as a prompt's context grows), so recent steps count most.
"""

from __future__ import annotations

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


class Pace:
    """Measures steps and bounds the prompt tokens of the next one."""

    def __init__(self, limit: float) -> None:
        """limit: target duration of a mixed step in seconds; 0: no limit."""
        self.limit = limit
        self._decode: dict[int, float] = {}  # seconds of a decode-only step by bit length of the batch
        self._cost = 0.0  # seconds per prompt token, of mixed steps once there was one
        self._chunk = 0  # prompt tokens of the last mixed step
        self._score = 0.0  # seconds per prompt token for its logits

    def observe(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """A step that decoded `decodes` sequences and computed `prompt_tokens` took `seconds`."""
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
        """Maximum number of prompt tokens next to `decodes` decoding sequences; None: no bound.

        shared: whether several clients have requests.
        """
        if not self.limit or not decodes:
            return None
        if not self._cost:
            return _START
        limit = self.limit * _SHARED if shared else self.limit
        chunk = int((limit - self.decode_seconds(decodes)) / self._cost)
        # Before the first mixed step the cost is that of a large prompt step, which a small one exceeds.
        chunk = min(chunk, _GROWTH * self._chunk) if self._chunk else chunk // 2
        return max(SMALLEST_CHUNK, chunk)

    def observe_scores(self, tokens: int, seconds: float) -> None:
        """Record that log-probabilities of `tokens` prompt tokens took `seconds` in addition to the step."""
        cost = seconds / tokens
        self._score = _blend(self._score, cost, _RECENT) if self._score else cost

    def scored_tokens(self) -> int:
        """Maximum number of prompt tokens with logits per step."""
        if not self._score:
            return _FIRST_SCORED
        return max(SMALLEST_SCORED, int(SCORING / self._score))

    def decode_seconds(self, decodes: int) -> float:
        """Seconds of a decode-only step, of the nearest batch size measured that is not larger; 0: none."""
        sizes = [size for size in self._decode if size <= decodes.bit_length()]
        return self._decode[max(sizes)] if sizes else 0.0


def _blend(old: float, new: float, weight: float) -> float:
    return old + weight * (min(new, _SURPRISE * old) - old)
