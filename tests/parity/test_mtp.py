"""The MTP layer of Qwen3.5, put together from transformers' parts, which has none of its own."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNorm

from farthing.model.load import load
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch

from .families import build

LENGTH = 21


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("declared", [True, False])
def test_drafts_have_the_logits_of_published_weights(declared: bool, backend: str, tmp_path: Path) -> None:
    """A config need not declare the layer if the file has it."""
    theirs = build("qwen3_5_moe_text", 0, tmp_path)
    config = theirs.config
    block = copy.deepcopy(theirs.model.layers[config.layer_types.index("full_attention")])
    d = config.hidden_size
    norms = {name: Qwen3_5MoeRMSNorm(d) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    fc = torch.nn.Linear(2 * d, d, bias=False)
    for value in (p for norm in norms.values() for p in norm.parameters()):
        value.data = 0.1 * torch.randn_like(value)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"mtp.{name}.weight": norm.weight.data for name, norm in norms.items()}
    tensors |= {f"mtp.layers.0.{name}": value.clone() for name, value in block.state_dict().items()}
    save_file(tensors | {"mtp.fc.weight": fc.weight.data}, tmp_path / "model.safetensors", {"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text()) | {"mtp_num_hidden_layers": int(declared)}
    (tmp_path / "config.json").write_text(json.dumps(raw))

    ids = torch.randint(2, config.vocab_size, (LENGTH + 1,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        hidden = theirs.model(input_ids=ids[None, :-1]).last_hidden_state
        embedded = theirs.model.embed_tokens(ids[None, 1:])
        both = norms["pre_fc_norm_embedding"](embedded), norms["pre_fc_norm_hidden"](hidden)
        x = fc(torch.cat(both, -1))
        turns = theirs.model.rotary_emb(x, torch.arange(LENGTH)[None])
        x = block(x, position_embeddings=turns, attention_mask=None)
        expected = theirs.lm_head(norms["norm"](x[0] if isinstance(x, tuple) else x))[0]
        ours = load(tmp_path, select(backend, dtype=torch.float32, threads=1))
        cache = ours.new_cache(8, 4, "float32")
        batch = make_batch([LENGTH], [0], [list(range(8))], 4)
        drafted = ours.draft(ids[1:], ours.forward(ids[:-1], batch, cache), batch, cache)
        error = (ours.draft_logits(drafted) - expected).abs().max() / expected.abs().max()
    assert error < (1e-4 if backend == "reference" else 0.1)  # the CPU rounds drafts to 8 bits
