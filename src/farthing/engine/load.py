"""Load a model and start an engine for it."""

from __future__ import annotations

import logging
from pathlib import Path

from farthing.config import EngineConfig
from farthing.conversation.select import template_source
from farthing.engine.engine import Engine, NewCache, own_cache
from farthing.engine.model import Model
from farthing.engine.tokenizer import Tokenizer, generation_defaults
from farthing.extras import has_torch, needs_torch
from farthing.hub import resolve_model
from farthing.model import ModelConfig, load
from farthing.ops import Ops, select

log = logging.getLogger(__name__)
ROUNDED_WHILE_LOADING = (
    "int4: feed-forwards are rounded to 4 bits while loading, the rest to 8, without calibration; on the "
    "embedded model perplexity rises by 0.7 %% (95 %%: 0.5 to 0.8), on a GPU by 1.0 %%. With calibration and "
    "a measured bound: farthing compress %s --recipe int4-gptq --max-drop 1%% -o OUT, then serve OUT"
)


def load_engine(config: EngineConfig, new_cache: NewCache = own_cache) -> Engine:
    """An engine with its model, tokenizer and recommended sampling; prompts are computed in it."""
    require_torch(config)
    path = resolve_model(config.model)
    tokenizer = None
    if not config.skip_tokenizer_init:
        tokenizer = Tokenizer.from_directory(path, ModelConfig.from_directory(path).eos_token_ids)
        tokenizer.chat_template = template_source(config.chat_template) or tokenizer.chat_template
    model = load_model(path, config)
    try:
        return Engine(model, config, tokenizer, generation_defaults(path), new_cache)
    except BaseException:
        model.close()
        raise


def load_model(path: Path, config: EngineConfig) -> Model:
    """The model of a checkpoint directory: in this process, or over ranks."""
    if config.quantization == "int4":
        log.info(ROUNDED_WHILE_LOADING, path)
    if config.num_ranks > 1:
        from farthing.parallel.cluster import ParallelModel, RankOptions  # imports torch.distributed

        return ParallelModel(RankOptions(path, config))
    return load(path, _ops(config, _without_torch(path, config)), config.experts)


def require_torch(config: EngineConfig) -> None:
    """Raises ModuleNotFoundError if torch is needed and not installed, before anything is downloaded."""
    if has_torch():
        return
    local = config.packed is not None and config.num_ranks == 1
    if not local or not _without_torch(resolve_model(config.model), config):
        raise ModuleNotFoundError(needs_torch(), name="torch")


def _without_torch(path: Path, config: EngineConfig) -> bool:
    """Whether numpy arrays suffice as tensors: for weights in a packed file and layers in one native call."""
    if config.packed is None or config.experts_on is not None or config.disaggregate or config.halves:
        return False
    model = ModelConfig.from_directory(path)
    apart = model.shortcut_experts or model.post_mlp_norm or model.query_scaling or model.index_topk
    return not apart and "mtp" not in (config.speculate or "")


def _ops(config: EngineConfig, arrays: bool) -> Ops:
    dtype, threads = config.dtype, config.threads
    if config.experts_on is None:
        rounding, file = config.quantization, config.packed
        return select(config.ops, dtype, threads, rounding, file, config.verify, config.halves, arrays)
    from farthing.ops.hybrid import HybridOps

    # Quantization and the packed file apply to the routed experts, which hold most of the weights.
    host = select(config.experts_on, None, threads, config.quantization, config.packed, config.verify)
    return HybridOps(select(config.ops, dtype, threads), host, config.hot_experts)
