"""Limits per client and minute: requests, tokens, and CPU time before a request runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from farthing.server.errors import ApiError


@dataclass(slots=True)
class Bucket:
    """A token bucket: holds at most one minute's amount, fills evenly, and may be negative."""

    per_minute: int
    level: float
    filled_at: float

    def refill(self, now: float) -> None:
        """Add the amount accrued since the last refill. now: seconds of a monotonic clock."""
        self.level = min(self.per_minute, self.level + (now - self.filled_at) * self.per_minute / 60)
        self.filled_at = now

    def wait_for(self, amount: float) -> float:
        """Seconds until `amount` is available."""
        return max(0.0, (amount - self.level) * 60 / self.per_minute)


class Quotas:
    """The remaining quota of each client. Used only in the event loop.

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
        self._limits = {
            "requests": requests_per_minute,
            "tokens": tokens_per_minute,
            "work": work_seconds_per_minute,
        }
        self._worked: dict[str, float] = {}  # seconds charged so far, by client
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._clock = clock

    def admit(self, client: str, prompt_tokens: int) -> None:
        """Charge a request and its prompt. If either quota is spent, raises ApiError (429, with Retry-After)
        and charges nothing."""
        wanted = {"requests": 1, "tokens": prompt_tokens}
        limit = self._limits["tokens"]
        if limit is not None and prompt_tokens > limit:
            raise ApiError(
                429,
                f"the prompt has {prompt_tokens} tokens; expected at most the quota of {limit} per minute",
                kind="tokens",
                reason="tokens_quota_exceeded",
            )
        for resource, amount in wanted.items():
            bucket = self._bucket(client, resource)
            if bucket and (wait := bucket.wait_for(amount)) > 0:
                raise ApiError(
                    429,
                    f"{client!r} has used its quota of {bucket.per_minute} {resource} per minute",
                    kind=resource,
                    reason=f"{resource}_quota_exceeded",
                    retry_after=math.ceil(wait),
                )
        for resource, amount in wanted.items():
            if bucket := self._bucket(client, resource):
                bucket.level -= amount

    def admit_work(self, client: str, seconds: float) -> None:
        """Charge a client's CPU time since the last call. seconds: its total so far. Raises ApiError (429,
        with Retry-After) if the quota is spent."""
        bucket = self._bucket(client, "work")
        if bucket is None:
            return
        bucket.level -= seconds - self._worked.get(client, 0.0)
        self._worked[client] = seconds
        if (wait := bucket.wait_for(0.0)) > 0:
            raise ApiError(
                429,
                f"{client!r} has used its quota of {bucket.per_minute} CPU seconds per minute for "
                "tokenizing, chat templates and grammars",
                reason="work_quota_exceeded",
                retry_after=math.ceil(wait),
            )

    def charge(self, client: str, tokens: int) -> None:
        """Charge generated tokens."""
        if bucket := self._bucket(client, "tokens"):
            bucket.level -= tokens

    def _bucket(self, client: str, resource: str) -> Bucket | None:
        per_minute = self._limits[resource]
        if per_minute is None:
            return None
        now = self._clock()
        bucket = self._buckets.setdefault((client, resource), Bucket(per_minute, per_minute, now))
        bucket.refill(now)
        return bucket
