"""How many prompt tokens a step may compute, as the scheduler asks."""

from __future__ import annotations

from dataclasses import dataclass


class Limits:
    """No limits; `pace.Pace` measures some."""

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

    def take(self, pending: int, scored: bool) -> int:
        """As many tokens as it offers are planned."""
        count = self.offers(pending, scored)
        self.tokens -= count
        self.scored -= count * scored
        if self.divides(pending):
            self.long -= count
        else:
            self.short -= count
        return count
