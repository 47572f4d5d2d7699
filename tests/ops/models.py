"""Tiny checkpoints with experts, and the logits a backend computes from one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from farthing.model.load import load
from farthing.ops.api import Ops
from farthing.ops.torch_util import make_batch
from tests.tiny import tiny


def tiny_checkpoint(path: Path, tokenizer: bool = False) -> Path:
    """A random DeepSeek-V3 (a dense layer, a layer of 8 experts), written by transformers in bfloat16."""
    transformers = pytest.importorskip("transformers")
    sizes = tiny(
        vocab_size=96, hidden_size=128, intermediate_size=192, moe_intermediate_size=64,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=3, n_group=2,
        topk_group=1, kv_lora_rank=64, q_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32,
        v_head_dim=32, max_position_embeddings=256,
    )  # fmt: skip
    del sizes["model_type"]  # set by the class
    config = transformers.DeepseekV3Config(**sizes)
    torch.manual_seed(3)
    model = transformers.DeepseekV3ForCausalLM(config)
    for name, value in model.named_parameters():
        if value.ndim > 1:
            value.data = torch.randn_like(value) * value.shape[-1] ** -0.5
        elif "norm" in name:
            value.data = 1 + 0.1 * torch.randn_like(value)
    model.to(torch.bfloat16).save_pretrained(path)
    if tokenizer:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        words = {f"w{i}": i for i in range(config.vocab_size)}
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0"))
        ).save_pretrained(path)
    return path


def logits_of(path: Path, ops: Ops, tokens: int = 40) -> Tensor:
    """Logits [tokens, V] float32 of a random prompt, computed in one step."""
    model = load(path, ops)
    ids = torch.randint(0, 96, (tokens,), generator=torch.Generator().manual_seed(5))
    blocks = -(-tokens // 16)
    cache = model.new_cache(blocks, 16, "float32")
    hidden = model.forward(ids, make_batch([tokens], [0], [list(range(blocks))], 16), cache)
    return model.logits(hidden)
