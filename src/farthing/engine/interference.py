"""Bounds how long one client's prompts delay the decoding of others.

A step that mixes one client's prompt with another's decoding lasts longer than decoding alone would have. The
prompt's client owes that extra time, and its prompts pause until steps without them have lasted as long. An
answer is thus delayed by at most as long as it takes itself, plus one step, however many prompts another
client sends.
Between requests of one client nothing is owed: `pace.py` alone decides there.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from farthing.engine.sequence import Scheduled

_MOST = 0.95  # of a step: the extra time, where the speed of decoding alone is overestimated


class Interference:
    """Seconds by which each client has delayed others and not yet made good."""

    def __init__(self) -> None:
        self._owed: dict[str, float] = {}

    def paused(self, decoding: set[str]) -> set[str]:
        """Clients whose prompts pause; decoding: the clients with decoding requests."""
        return {client for client in self._owed if decoding - {client}}

    def observe(self, plan: Seq[Scheduled[Any]], seconds: float, alone: float) -> None:
        """A step took `seconds`; its decoding alone would have taken about `alone`.

        The last chunk of a prompt counts as decoding, because its first token waits for the step too.
        """
        if not self._owed and all(item.decode for item in plan):
            return
        decoding = {item.seq.client for item in plan if item.sample}
        prompts: dict[str, int] = {}
        for item in plan:
            if not item.decode:
                prompts[item.seq.client] = prompts.get(item.seq.client, 0) + item.count
        extra = min(max(0.0, seconds - alone), _MOST * seconds) if prompts else 0.0
        # Time spent on anyone's prompts repays nothing: clients could else take turns at delaying another.
        self._owed = {
            client: left
            for client, owed in self._owed.items()
            if decoding - {client} and (left := owed - (0.0 if client in prompts else seconds - extra)) > 0
        }
        total = sum(prompts.values())
        for client, tokens in prompts.items():
            if decoding - {client}:
                self._owed[client] = self._owed.get(client, 0.0) + extra * tokens / total
