"""Fill in unset options of the configuration: cache size, lengths, budgets."""

from __future__ import annotations

import logging
from dataclasses import replace

from farthing.config import CPU_STEP_TOKENS, GPU_STEP_TOKENS, EngineConfig
from farthing.engine.model import Model
from farthing.lazy import torch
from farthing.memory import available_memory, gigabytes
from farthing.ops.api import CacheDtype

log = logging.getLogger(__name__)

_ITEM_BYTES: dict[CacheDtype, int] = {"float32": 4, "bfloat16": 2, "fp8": 1, "int8": 1}
_SCALE_BYTES = 8  # two float32 per token and layer with an 8-bit cache
_CPU_SHARE, _GPU_SHARE = 0.25, 0.85  # of the memory that is free after loading the model


def resolve(config: EngineConfig, model: Model) -> tuple[EngineConfig, CacheDtype]:
    """The configuration with every None filled in, and the cache's dtype.

    Raises ValueError where the cache cannot hold max_model_len.
    """
    device = model.ops.device
    dtype = cache_dtype(config, model)
    limit = model.config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ValueError(
            f"max_model_len: got {config.max_model_len}; expected at most {limit}, "
            f"the model's max_position_embeddings"
        )
    length = config.max_model_len or limit
    blocks = config.num_blocks or _num_blocks(config, model, dtype, length)
    if config.check_memory and device.type == "cpu":
        _check_fits(blocks * _bytes_of_all_ranks(config, model, dtype))
    held = blocks * config.block_size
    if held < length and config.max_model_len is not None:
        raise ValueError(
            f"max_model_len: got {length}, but the KV cache fits {held} tokens; expected a smaller "
            f"max_model_len, a larger num_blocks or kv_cache_memory, or a smaller kv_cache_dtype"
        )
    if held < length:
        log.warning("KV cache fits %d tokens; lowering max_model_len to %d (model: %d)", held, held, limit)
    most = CPU_STEP_TOKENS if device.type == "cpu" else GPU_STEP_TOKENS
    budget = config.max_num_batched_tokens or max(config.max_num_seqs, most)
    if budget < config.max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens: got {budget}; expected at least max_num_seqs = {config.max_num_seqs}"
        )
    resolved = replace(
        config, max_model_len=min(length, held), num_blocks=blocks, max_num_batched_tokens=budget
    )
    return resolved, dtype


def cache_dtype(config: EngineConfig, model: Model) -> CacheDtype:
    """The cache's dtype; 'auto' is the backend's choice."""
    return model.ops.cache_dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype


def block_bytes(config: EngineConfig, model: Model, dtype: CacheDtype) -> int:
    """Bytes of a block over all layers, on one rank of every stage."""
    c, item = model.config, _ITEM_BYTES[dtype]
    scale = _SCALE_BYTES if dtype in ("fp8", "int8") else 0
    heads = c.attention.per_rank(config.tensor_parallel_size)
    latents = model.cache_layers * heads.cache_rows * (heads.cache_width * item + scale)
    return config.block_size * (latents + c.index_rows * (c.index_head_dim * item + scale // 2))


def _bytes_of_all_ranks(config: EngineConfig, model: Model, dtype: CacheDtype) -> int:
    """Bytes of a block on all ranks: every rank of a stage has its own cache of the stage's layers."""
    return block_bytes(config, model, dtype) * max(config.tensor_parallel_size, config.expert_parallel_size)


def _check_fits(cache: int) -> None:
    if cache > (free := available_memory()):
        raise ValueError(
            f"kv_cache_memory, num_blocks: got a cache of {gigabytes(cache)}; expected at most the "
            f"{gigabytes(free)} that are available, or check_memory False"
        )


def _num_blocks(config: EngineConfig, model: Model, dtype: CacheDtype, length: int) -> int:
    size = _bytes_of_all_ranks(config, model, dtype)
    memory = config.kv_cache_memory
    if memory is not None:
        if memory < size:
            raise ValueError(
                f"kv_cache_memory: got {memory} bytes; expected at least one block, {size} bytes"
            )
        return memory // size
    if model.ops.device.type == "cpu":
        memory = int(available_memory() * _CPU_SHARE)
    else:
        memory = int(torch.cuda.mem_get_info(model.ops.device)[0] * _GPU_SHARE)
    most = config.max_num_seqs * -(-length // config.block_size)
    return max(1, min(most, memory // size))
