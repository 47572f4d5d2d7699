"""Whether a model's weights fit the memory of this machine, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from farthing.checkpoint.reader import has_weights, read_config
from farthing.model.config import ModelConfig
from farthing.parallel.plan import Layout, ShardPlan
from farthing.planner.footprint import Holder, StoredOf, stored_by_checkpoint, stored_by_config
from farthing.planner.memory import PlannedModel, Serving, memory

SMALL = 8  # times the files: memory of which no format needs more


def certainly_fits(path: Path, free: int) -> bool:
    """Whether the files are so small that nothing has to be computed."""
    files = [file.stat().st_size for file in path.glob("*.safetensors")] if has_weights(path) else []
    return bool(files) and SMALL * sum(files) <= free


def weight_bytes(path: Path, quantization: str | None = None, sizes: tuple[int, int, int] = (1, 1, 1)) -> int:
    """Bytes of all ranks' weights as CPU kernels hold them, by the files' headers or else by config.json.

    sizes: tp, pp, ep.
    """
    raw = read_config(path)
    stored: StoredOf = stored_by_checkpoint(path) if has_weights(path) else stored_by_config(raw)
    config = ModelConfig.from_json(raw)
    plan = ShardPlan.build(config, Layout(*sizes))
    serving = Serving(cache_tokens=0, max_model_len=1, max_num_batched_tokens=1, max_num_seqs=1)
    ranks = memory(PlannedModel.of(plan, stored), plan, Holder("cpu", 4, quantization), serving)
    return sum(rank.weights for rank in ranks)
