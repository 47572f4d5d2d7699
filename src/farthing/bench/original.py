"""Inputs of `farthing bench cost`: the checkpoint before compression, and a tiny one for warm-up."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from farthing.checkpoint import Checkpoint, CheckpointWriter


@contextmanager
def bf16_checkpoint(path: Path) -> Iterator[Path]:
    """Yield `path` itself if its weights are dense, otherwise a temporary bfloat16 copy.

    transformers needs the copy because its DeepSeek FP8 format runs on GPUs only.
    """
    checkpoint = Checkpoint.open(path)
    if not any(checkpoint.is_quantized(name.removesuffix(".weight")) for name in _matrices(checkpoint)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="farthing-bf16-") as directory:
        _write(checkpoint, Path(directory))
        yield Path(directory)


def tiny_checkpoint(path: Path) -> Path:
    """A random two-layer DeepSeek-V3, saved by transformers."""
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.DeepseekV3ForCausalLM(config).bfloat16().save_pretrained(path)
    return path


def _matrices(checkpoint: Checkpoint) -> list[str]:
    """Weight names, one per module, in any storage format."""
    ends = (".weight", ".weight_packed")
    return sorted({f"{n.rpartition('.')[0]}.weight" for n in checkpoint.names() if n.endswith(ends)})


def _write(checkpoint: Checkpoint, path: Path) -> None:
    writer = CheckpointWriter(path)
    quantized = {name for name in _matrices(checkpoint) if checkpoint.is_quantized(name[: -len(".weight")])}
    for name in quantized:
        writer.add(name, checkpoint.weight(name[: -len(".weight")]).dequantize(torch.bfloat16))
    for name in checkpoint.names():
        if f"{name.rpartition('.')[0]}.weight" not in quantized:
            writer.add(name, checkpoint.tensor(name))
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    writer.close(config, copy_from=checkpoint.path)
