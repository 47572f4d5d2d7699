"""How many prompt tokens a step may compute, as the scheduler asks."""

from __future__ import annotations


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

    def scored_tokens(self) -> int | None:
        """Maximum number of prompt tokens with requested logits per step; None: no bound."""
        return None
