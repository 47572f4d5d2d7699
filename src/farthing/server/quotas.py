"""What each API key may spend per minute: requests, tokens and CPU time before a request runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from farthing.server.errors import ApiError
from farthing.shares import Shares

_QUOTAS = {
    "requests": "requests per minute",
    "tokens": "tokens per minute",
    "work": "CPU seconds per minute for tokenizing, chat templates and grammars",
}


class Quotas:
    """The remaining quota of each client: at most one minute's amount, which fills evenly. Used only in the
    event loop.

    A request is admitted if its client has a request left and enough tokens for the prompt. Generated tokens
    are charged as they arrive and may leave a debt, which later requests have to wait out; so may the CPU
    time of tokenizing, chat templates and grammars ("work").
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        work_seconds_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = {
            "requests": requests_per_minute,
            "tokens": tokens_per_minute,
            "work": work_seconds_per_minute,
        }
        self._shares = {
            resource: Shares(limit, limit / 60, clock=clock)
            for resource, limit in limits.items()
            if limit is not None
        }
        self._worked: dict[str, float] = {}  # seconds charged so far, by client

    def admit(self, client: str, prompt_tokens: int) -> None:
        """Charge a request and its prompt. If either quota is spent, raises ApiError (429, with Retry-After)
        and charges nothing."""
        shares = self._shares.get("tokens")
        if shares is not None and prompt_tokens > shares.limit:
            raise ApiError(
                429,
                f"the prompt has {prompt_tokens} tokens; expected at most the quota of {shares.limit} per "
                "minute",
                kind="tokens",
                reason="tokens_quota_exceeded",
            )
        costs = {"requests": 1, "tokens": prompt_tokens}
        for resource, cost in costs.items():
            self._require(resource, client, cost)
        for resource, cost in costs.items():
            self._charge(resource, client, cost)

    def admit_work(self, client: str, seconds: float) -> None:
        """Charge a client's CPU time since the last call. seconds: its total so far. Raises ApiError (429,
        with Retry-After) if the quota is spent."""
        if "work" in self._shares:
            self._charge("work", client, seconds - self._worked.get(client, 0.0))
            self._worked[client] = seconds
            self._require("work", client, 0.0)

    def charge(self, client: str, tokens: int) -> None:
        """Charge generated tokens."""
        self._charge("tokens", client, tokens)

    def _charge(self, resource: str, client: str, cost: float) -> None:
        if shares := self._shares.get(resource):
            shares.charge(client, cost)

    def _require(self, resource: str, client: str, cost: float) -> None:
        shares = self._shares.get(resource)
        if shares is not None and (wait := shares.wait(client, cost)) > 0:
            raise ApiError(
                429,
                f"{client!r} has used its quota of {shares.limit} {_QUOTAS[resource]}",
                kind=None if resource == "work" else resource,
                reason=f"{resource}_quota_exceeded",
                retry_after=math.ceil(wait),
            )
