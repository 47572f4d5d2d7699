"""The signals at one time, as seen by the policy.

Units: rates per second (requests or tokens), durations and times in seconds of one clock (the wall clock in
production, simulated seconds in a replay).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Snapshot:
    """The signals at one time. None means that a signal is missing, which differs from zero."""

    time: float  # when the signals were measured, same clock as `now` in Policy.decide
    current: int  # requested replicas: ready plus starting
    ready: int | None = None  # serving replicas
    request_rate: float | None = None  # requests/s arriving
    prompt_token_rate: float | None = None  # tokens/s arriving
    output_token_rate: float | None = None  # tokens/s generated
    backlog: float | None = None  # waiting requests
    queue_time_s: float | None = None  # mean queue time of a request
    ttft_s: float | None = None  # mean time to first token
    tpot_s: float | None = None  # mean time per output token
    cached_share: float | None = None  # share of prompt tokens served by a prefix cache, 0..1
    late_share: float | None = None  # share of recent first tokens after slo.ttft_s, 0..1
    running: float | None = None  # running requests
    kv_usage: float | None = None  # share of the cache in use, 0..1
    cold_start_s: float | None = None  # P90 of launch-to-ready; None: the configured one
    leaving: int = 0  # ready replicas with a preemption notice (spot)
    stale: bool = False  # reported by the source (scrape failed, target down)

    @property
    def starting(self) -> int:
        """Replicas launched but not ready; 0 if `ready` is unknown."""
        return max(0, self.current - self.ready) if self.ready is not None else 0

    def load(self, unit: str) -> float | None:
        """The load in `unit`, per second: arriving "requests", "prompt_tokens", "output_tokens", or "tokens"
        (prompt and output).
        """
        if unit == "requests":
            return self.request_rate
        if unit == "prompt_tokens":
            return self.prompt_token_rate
        if unit == "output_tokens":
            return self.output_token_rate
        if self.prompt_token_rate is None or self.output_token_rate is None:
            return None
        return self.prompt_token_rate + self.output_token_rate
