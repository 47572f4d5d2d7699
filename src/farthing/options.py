"""The options of an engine as keyword arguments, which editors and type checkers know by name."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from farthing.config import Compute, Dtype, ExpertsOn, KvCacheDtype, Quantization, Transport


class EngineOptions(TypedDict, total=False):
    """As `EngineConfig` declares them; `farthing serve --help-all` describes each."""

    dtype: Dtype
    compute: Compute
    backend: str
    device: str | None
    threads: int | None
    quantization: Quantization | None
    packed: str | Path | None
    verify: bool
    speculate: str | None
    experts: str
    seed: int
    deterministic: bool
    chat_template: str | None
    trust_special_tokens: bool
    check_memory: bool
    skip_tokenizer_init: bool
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int | None
    block_size: int
    num_blocks: int | None
    kv_cache_memory: int | None
    kv_cache_dtype: KvCacheDtype
    enable_prefix_caching: bool
    prefix_cache_dir: str | Path | None
    prefix_cache_disk_bytes: int
    max_queue: int | None
    max_queue_tokens: int | None
    max_step_ms: float
    step_timeout: float
    priority_step: float
    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_parallel_size: int
    dp_attention: bool
    transport: Transport
    redundant_experts: int
    rebalance_steps: int | None
    nodes: int
    ray_address: str | None
    experts_on: ExpertsOn | None
    hot_experts: int
    disaggregate: bool
