"""What `farthing serve` finds out before it opens a port, and before it downloads weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from farthing.checkpoint.reader import Checkpoint
from farthing.config import AUTO, EngineConfig, check_drafts, check_length
from farthing.hub import Found, find_model
from farthing.memory import available_memory, gigabytes
from farthing.model.config import ModelConfig
from farthing.model.load import config_of
from farthing.model.types import type_named
from farthing.ops.select import check
from farthing.parallel.plan import Layout, ShardPlan
from farthing.planner.fit import certainly_fits, fit, weight_bytes, worth_packing

log = logging.getLogger(__name__)


def preflight(config: EngineConfig) -> Found:
    """The model, whose weights may have to be fetched.

    Raises OSError or ValueError for a model that cannot be served, or not in the memory of this machine.
    """
    model = find_model(config.model)
    if config.num_ranks == 1:
        check(config.ops)
    if config.chat_template is not None:
        _check_template(config.chat_template)
    _check_architecture(config, model)
    if config.check_memory and config.on_this_cpu:
        _check_memory(config, model.path)
    return model


def _check_architecture(config: EngineConfig, model: Found) -> None:
    """Raises ValueError for files, ranks, drafts or a length that do not suit the model."""
    if not model.absent and any(model.path.glob("*.safetensors*")):
        found = config_of(Checkpoint.open(model.path))
        check_drafts(config.speculate, found.num_nextn_predict_layers)
    else:
        found = ModelConfig.from_directory(model.path)
        if type_named(found.model_type).names.drafts is None:  # others may have layers they do not declare
            check_drafts(config.speculate, found.num_nextn_predict_layers)
    check_length(config.max_model_len, found.max_position_embeddings)
    ShardPlan.build(found, Layout(*config.sizes, config.dp_attention))


def _check_template(option: str) -> None:
    """Raises ValueError for a chat template that cannot be read or compiled."""
    from farthing.conversation.jinja import check_template
    from farthing.conversation.select import template_source

    check_template(template_source(option) or "")


def with_fit(config: EngineConfig, path: Path) -> EngineConfig:
    """The configuration with what `--fit` chooses for the fields that have their defaults; logs it.

    Raises ValueError if nothing fits.
    """
    if not config.on_this_cpu or config.num_ranks > 1:
        log.info("fit: chooses for one rank on a CPU; the options stay as they are")
        return config
    found = fit(path, available_memory(), config.quantization, config.halves, config.max_num_seqs)
    log.info("fit: %s", found)
    chosen: dict[str, Any] = {}
    if config.packed in (None, AUTO):
        chosen["quantization"] = found.quantization
    if config.packed is None and worth_packing(path, found.weights):
        chosen["packed"] = AUTO
    if config.kv_cache_memory is None and config.num_blocks is None:
        chosen |= {"kv_cache_memory": found.kv_cache_memory}
        chosen |= {"max_model_len": found.max_model_len} if config.max_model_len is None else {}
    if config.max_num_seqs == EngineConfig().max_num_seqs:
        chosen["max_num_seqs"] = found.max_num_seqs
    return replace(config, **chosen)


def _check_memory(config: EngineConfig, path: Path) -> None:
    free, cache = available_memory(), config.kv_cache_memory or 0
    if cache > free:
        raise ValueError(
            f"kv_cache_memory: got {gigabytes(cache)}; expected at most the {gigabytes(free)} that are "
            "available, or --no-check-memory"
        )
    if config.packed is not None:  # mapped: what does not fit is read again
        return

    if certainly_fits(path, free - cache):
        return

    def needed(quantization: str | None) -> int:
        return weight_bytes(path, quantization, config.sizes) + cache

    if (wanted := needed(config.quantization)) <= free:
        return
    smaller = ("int8", "int4") if config.quantization is None else ()
    fitting = next((f"--quantization {kind}, " for kind in smaller if needed(kind) <= free), "")
    raise ValueError(
        f"model: {config.model} needs {gigabytes(wanted)} for weights{' and cache' if cache else ''}, and "
        f"{gigabytes(free)} are available; expected {fitting}a smaller model, or --no-check-memory"
    )
