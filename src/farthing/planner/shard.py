"""What a rank's buffers depend on: its part of the model, and the load."""

from __future__ import annotations

from dataclasses import dataclass

from farthing.config import CPU_STEP_TOKENS
from farthing.model.config import ModelConfig
from farthing.model.heads import Heads
from farthing.ops.cutting import bounds
from farthing.parallel.plan import Place, ShardPlan
from farthing.planner.footprint import Stored


@dataclass(frozen=True, slots=True)
class Serving:
    """The load a replica is sized for."""

    cache_tokens: int
    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = CPU_STEP_TOKENS
    cache_dtype: str = "bfloat16"
    block_size: int = 16
    redundant_experts: int = 0
    threads: int | None = None  # threads per rank; None: its share of this machine's cores
    experts_on_host: bool = False
    hot_experts: int = 0  # experts per layer cached on the device


@dataclass(frozen=True, slots=True)
class Shard:
    """The sizes of a model on one rank."""

    config: ModelConfig
    attention: Heads  # of this rank
    dense: int  # I of the dense layers on this rank; 0 if there are none
    expert: int
    shared: int
    vocabulary: int  # rows of the head
    stored: Stored  # storage of the projections
    expert_ranks: int  # ranks that share the rows of routed experts

    @classmethod
    def of(cls, plan: ShardPlan, place: Place, stored: Stored) -> Shard:
        """stored: storage of the layers' projections."""
        c, layout, layers, head = plan.config, plan.layout, plan.stages[place.stage], plan.vocabulary(place)
        start, stop = bounds(c.intermediate_size, layout.tp, place.tp)
        cut = layout.tp if layout.ep == 1 else 1
        return cls(
            c,
            c.attention.per_rank(layout.tp),
            stop - start if c.shortcut_experts or any(not c.is_moe(i) for i in layers) else 0,
            c.moe_intermediate_size // cut if any(c.is_moe(i) for i in layers) else 0,
            c.shared_size // layout.tp,
            head.stop - head.start,
            stored,
            layout.ep,
        )

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.attention.num_attention_heads
