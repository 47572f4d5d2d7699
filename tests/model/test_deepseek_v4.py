"""Streams, a compressed past and experts chosen by the token, on every backend: a small DeepSeek-V4."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("farthing._native")

from safetensors.torch import save_file

from farthing.checkpoint.floats import dequantize_blocks, quantize_blocks
from farthing.model.config import ConfigError, ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.deepseek_v4 import DeepseekV4
from farthing.model.forms import CompressedHeads
from farthing.model.inspect import model_cost
from farthing.model.kinds import cache_kinds
from farthing.model.load import load, model_of, random_model
from farthing.model.pack import pack_checkpoint
from farthing.model.parameters import random_parameters
from farthing.model.source import MemorySource
from farthing.model.types import type_named
from farthing.ops.api import CacheDtype
from farthing.ops.cpu.backend import CpuOps
from farthing.ops.hybrid import HybridOps
from farthing.ops.select import select
from farthing.ops.specs import StreamParts, StreamSpec
from farthing.ops.torch_util import make_batch
from farthing.planner.footprint import stored_by_checkpoint, stored_by_config
from tests.isas import ISAS
from tests.tiny import DEEPSEEK_V4

from .steps import distance, logits_of

CONFIG = ModelConfig.from_json(DEEPSEEK_V4)
FLASH = dict(  # as released, without what is not read
    model_type="deepseek_v4",
    vocab_size=129280,
    hidden_size=4096,
    moe_intermediate_size=2048,
    num_hidden_layers=43,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    compress_ratios=[0, 0, *(4, 128) * 20, 4],
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=6,
    num_hash_layers=3,
    max_position_embeddings=1 << 20,
    rope_scaling={"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536},
)


def built(backend: str = "cpu", **options: Any) -> DecoderModel:
    threads = None if backend == "reference" else options.pop("threads", 1)
    return random_model(CONFIG, select(backend, torch.float32, threads, **options), seed=7)


def logits(model: DecoderModel, dtype: CacheDtype = "float32", length: int = 60) -> torch.Tensor:
    return logits_of(model, (torch.arange(length) * 7) % CONFIG.vocab_size, dtype)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return logits(built("reference"))


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_agree_with_the_reference(isa: str, expected: torch.Tensor) -> None:
    assert distance(logits(random_model(CONFIG, CpuOps(2, isa=isa), seed=7)), expected) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "int8"])
def test_rounded_cache_agrees_with_the_reference(dtype: CacheDtype) -> None:
    """Of the median token: rounding may change the choice of an entry or an expert."""
    exact, found = logits(built()), [logits(built(name), dtype) for name in ("cpu", "reference")]
    errors = [(a - b).norm(dim=1) / exact.norm(dim=1) for a, b in ((found[0], found[1]), (found[0], exact))]
    assert errors[0].median() < 0.02
    assert 0 < errors[1].median() < {"bfloat16": 0.02, "fp8": 0.1, "int8": 0.05}[dtype]


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_8_bit_caches_do_not_depend_on_steps(dtype: CacheDtype) -> None:
    model, found = built(), []
    ids = (torch.arange(40) * 5) % CONFIG.vocab_size
    for steps in ([40], [1] * 40):
        cache, at = model.new_cache(6, 8, dtype), 0
        for count in steps:
            batch = make_batch([count], [at], [[3, 1, 4, 0, 5]], 8)
            last = model.logits(model.forward(ids[at : at + count], batch, cache))[-1]
            at += count
        found.append(last)
    assert torch.equal(*found)


def test_entries_of_a_long_step_are_those_of_short_steps() -> None:
    """Memory for scores is bounded: a step of so many tokens selects entries in runs of some of them."""
    kinds = ["compressed_sparse_attention"]
    raw = DEEPSEEK_V4 | {"num_hidden_layers": 1, "layer_types": kinds, "max_position_embeddings": 4096}
    model = random_model(ModelConfig.from_json(raw), select("cpu", torch.float32, 1), seed=7)
    ids, found = (torch.arange(3008) * 7) % CONFIG.vocab_size, []
    for steps in (1, 4):
        cache, out = model.new_cache(47, 64, "float32"), []
        for at in range(0, 3008, count := 3008 // steps):
            batch = make_batch([count], [at], [list(range(47))], 64)
            out.append(model.forward(ids[at : at + count], batch, cache))
        found.append(torch.cat(out))
    assert torch.equal(*found)


def test_torch_agrees_with_the_reference(expected: torch.Tensor) -> None:
    assert distance(logits(built("torch")), expected) < 1e-5


@pytest.mark.parametrize("hot", [0, 2])
def test_experts_on_the_host_agree_with_the_reference(hot: int, expected: torch.Tensor) -> None:
    ops = HybridOps(select("torch", torch.float32), select("cpu", threads=1), hot)
    assert distance(logits(random_model(CONFIG, ops, seed=7)), expected) < 1e-5


def test_kernels_of_a_graphics_card_agree_with_the_reference() -> None:
    """A hashed layer with an indexer, and one with a window alone; few tokens, because of the interpreter."""
    pytest.importorskip("triton")
    kinds = ["compressed_sparse_attention", "sliding_attention"]
    raw = DEEPSEEK_V4 | {"num_hidden_layers": 2, "layer_types": kinds}
    ids, found = torch.arange(10) * 7 % CONFIG.vocab_size, []
    for backend in ("reference", "gpu"):
        model = random_model(ModelConfig.from_json(raw), select(backend, torch.float32), seed=7)
        cache, out = model.new_cache(2, 8, "float32"), []
        for first, count in ((0, 9), (9, 1)):
            step = make_batch([count], [first], [[1, 0]], 8)
            here = type(step)(*(getattr(step, name).to(model.ops.device) for name in _INDICES))
            part = ids[first : first + count].to(model.ops.device)
            out.append(model.logits(model.forward(part, here, cache)).cpu())
        found.append(torch.cat(out))
    assert distance(*found) < 1e-5


_INDICES = ("positions", "slots", "query_start", "context_lens", "block_table", "state_slots")


@pytest.mark.parametrize(("count", "hidden"), [(4, 48), (1, 24), (3, 40)])
@pytest.mark.parametrize("ends", [False, True])
def test_hyper_connections_of_any_size(count: int, hidden: int, ends: bool) -> None:
    pytest.importorskip("triton")
    from farthing_gpu import GpuOps
    from tests.gpu.parts import DEVICE

    spec = StreamSpec(count, 5, 1e-6, 1e-6)
    rows = count if ends else count * (count + 2)
    parts = StreamParts(
        torch.randn(rows, count * hidden) / 8, torch.randn(rows), torch.rand(1 if ends else 3)
    )
    x, y = torch.randn(5, count * hidden), torch.randn(5, hidden)
    found = []
    for ops in (select("reference"), GpuOps(torch.float32, DEVICE)):
        packed = ops.pack_streams("", spec, hidden, lambda: parts)
        u, mix = ops.collapse(x.to(ops.device), packed)
        found.append(
            [u, *([] if ends else [mix, ops.spread(x.to(ops.device), y.to(ops.device), mix, packed)])]
        )
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs.cpu(), mine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_packed_file_gives_the_same_logits(quantization: str | None, tmp_path: Path) -> None:
    path = str(tmp_path / "packed.bin")
    model = built(quantization=quantization)
    model.ops.save_packed(path)
    mapped = built(packed=path)
    assert mapped.ops.packed_from is not None
    assert torch.equal(logits(model), logits(mapped))
    exact = logits(built())  # the median token: rounding may change the choice of an entry or an expert
    error = (logits(model) - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.median() < {None: 1e-6, "int8": 0.1, "int4": 0.6}[quantization]


def test_a_checkpoint_is_packed_layer_by_layer(tmp_path: Path) -> None:
    stored, packed = type_named("deepseek_v4").names.stored, tmp_path / "packed.bin"
    tensors = {stored(n): t.contiguous() for n, t in random_parameters(CONFIG, 7).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V4))
    pack_checkpoint(tmp_path, packed, "int8", 1)
    mapped = load(tmp_path, select("cpu", torch.float32, 1, packed=str(packed)))
    assert torch.equal(logits(mapped), logits(load(tmp_path, select("cpu", torch.float32, 1, "int8"))))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31])
def test_logits_do_not_depend_on_steps(length: int) -> None:
    """To the bit: around the edges of windows and entries."""
    model = built(threads=2)
    ids = (torch.arange(40) * 5) % CONFIG.vocab_size
    found = []
    for steps in ([length, 40 - length], [1] * 40):
        cache, at, out = model.new_cache(6, 8, "float32"), 0, []
        for count in steps:
            batch = make_batch([count], [at], [[3, 1, 4, 0, 5]], 8)
            out.append(model.logits(model.forward(ids[at : at + count], batch, cache)))
            at += count
        found.append(torch.cat(out))
    assert torch.equal(*found)


def test_all_layers_in_one_call_compute_what_ops_one_by_one_do(expected: torch.Tensor) -> None:
    model = built()
    together = logits(model)
    model.unstack()
    assert model.layered is None
    assert torch.equal(logits(model), together)


def test_layers_can_be_computed_in_parts() -> None:
    model = built()
    ids, depth = (torch.arange(20) * 7) % CONFIG.vocab_size, CONFIG.num_hidden_layers
    batch = replace(make_batch([20], [0], [[2, 0, 1]], 8), ids=ids)
    whole = model.forward(ids, batch, model.new_cache(3, 8, "float32"))
    cache, h = model.new_cache(3, 8, "float32"), model.embed(ids)
    for first, last in ((0, 1), (1, depth - 1), (depth - 1, depth)):
        h = model.run_layers(h, batch, cache, None, slice(first, last))
    assert torch.equal(h, whole)


@pytest.mark.parametrize("expert", [-1, 6])
def test_a_table_with_experts_that_do_not_exist_is_refused(expert: int) -> None:
    """The kernels take its numbers as they are."""
    parameters = random_parameters(CONFIG, 7)
    parameters["model.layers.0.mlp.gate.tid2eid"][3, 0] = expert
    with pytest.raises(ValueError, match=f"layers.0.mlp.gate.tid2eid: found experts .*{expert}"):
        model_of(CONFIG, select("cpu", torch.float32, 1), MemorySource(parameters))


def test_a_table_of_floats_is_refused() -> None:
    parameters = random_parameters(CONFIG, 7)
    name = "model.layers.0.mlp.gate.tid2eid"
    parameters[name] = parameters[name].float()
    with pytest.raises(ValueError, match=f"{name}: found float32; expected integers"):
        model_of(CONFIG, select("cpu", torch.float32, 1), MemorySource(parameters))


def test_an_expert_that_the_table_has_twice_counts_twice() -> None:
    """As in transformers, where each of its places has its weight."""
    parameters = random_parameters(CONFIG, 7)
    table = parameters["model.layers.0.mlp.gate.tid2eid"]
    table[:] = table[:, :1]
    given = MemorySource(parameters)
    expected = logits(model_of(CONFIG, select("reference", torch.float32), given))
    for backend in ("torch", "cpu"):
        assert distance(logits(model_of(CONFIG, select(backend, torch.float32, 1), given)), expected) < 1e-5


def test_tokens_that_are_not_in_the_table_of_experts_are_refused() -> None:
    model = built()
    batch = make_batch([1], [0], [[0]], 8)
    h = model.embed(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="ids: got None"):
        model.run_layers(h, batch, model.new_cache(1, 8, "float32"))
    with pytest.raises(IndexError, match="token id 999999 is not in the vocabulary"):
        model.run_layers(h, replace(batch, ids=torch.tensor([999999])), model.new_cache(1, 8, "float32"))


def drafted(p: dict[str, torch.Tensor], x: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """The MTP layer as published, in float64, for a whole sequence: streams x [T, n, D] -> logits [T, V].
    p: its parameters, without their prefix, and `embed` and `head`."""
    a, s, eps = CONFIG.attention, CONFIG.streams, CONFIG.rms_norm_eps
    assert isinstance(a, CompressedHeads) and s is not None
    T, n, r = len(x), s.count, a.rotary_width

    def unit(x: torch.Tensor, weight: str | None = None) -> torch.Tensor:
        y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return y if weight is None else y * p[f"{weight}.weight"]

    def summed(x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        f, scale, base = unit(x.flatten(1)) @ p[f"{name}fn"].T, p[f"{name}scale"], p[f"{name}base"]
        pre = (f[:, :n] * scale[0] + base[:n]).sigmoid() + s.eps
        u = torch.einsum("tn,tnd->td", pre, x)
        if len(base) == n:
            return u, pre, pre
        post = 2 * (f[:, n : 2 * n] * scale[1] + base[n : 2 * n]).sigmoid()
        mix = (f[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(1, (n, n)).softmax(-1) + s.eps
        for step in range(s.steps):
            mix = mix / (mix.sum(2, keepdim=True) + s.eps) if step else mix
            mix = mix / (mix.sum(1, keepdim=True) + s.eps)
        return u, post, mix

    def turned(x: torch.Tensor, sign: float = 1.0) -> torch.Tensor:  # [T, H, d], the last r of d in pairs
        angle = (
            sign
            * torch.arange(T).double()[:, None]
            * CONFIG.mixers[-1].rope.theta ** (-torch.arange(0, r, 2).double() / r)
        )
        pairs = torch.view_as_complex(x[..., -r:].unflatten(-1, (-1, 2)).contiguous())
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((x[..., :-r], torch.view_as_real(pairs).flatten(-2)), -1)

    def attended(u: torch.Tensor) -> torch.Tensor:
        q = (
            unit(u @ p["self_attn.q_a_proj.weight"].T, "self_attn.q_a_norm")
            @ p["self_attn.q_b_proj.weight"].T
        )
        q = turned(unit(q.unflatten(1, (a.num_attention_heads, -1))))
        k = turned(unit(u @ p["self_attn.kv_proj.weight"].T, "self_attn.kv_norm")[:, None])[:, 0]
        gap = torch.arange(T)[:, None] - torch.arange(T)
        scores = torch.einsum("thd,sd->hts", q, k) * a.head_dim**-0.5
        scores = scores.masked_fill((gap < 0) | (gap >= a.window), float("-inf"))
        sinks = p["self_attn.sinks"].view(-1, 1, 1).expand(-1, T, 1)
        weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
        out = turned(torch.einsum("hts,sd->thd", weights, k), -1.0).flatten(1).chunk(a.o_groups, 1)
        rows = p["self_attn.o_a_proj.weight"].chunk(a.o_groups)
        return (
            torch.cat([o @ w.T for o, w in zip(out, rows, strict=True)], 1) @ p["self_attn.o_b_proj.weight"].T
        )

    def expert(u: torch.Tensor, name: str) -> torch.Tensor:
        gate, up = (u @ p[f"{name}.{part}_proj.weight"].T for part in ("gate", "up"))
        hidden = torch.nn.functional.silu(gate.clamp(max=2.0)) * up.clamp(-2.0, 2.0)
        return hidden @ p[f"{name}.down_proj.weight"].T

    def mixed(u: torch.Tensor) -> torch.Tensor:
        scores = torch.nn.functional.softplus(u @ p["mlp.gate.weight"].T).sqrt()
        chosen = (scores + p["mlp.gate.e_score_correction_bias"]).topk(CONFIG.num_experts_per_tok).indices
        gates = torch.zeros_like(scores).scatter_(1, chosen, scores.gather(1, chosen))
        gates = gates / gates.sum(1, keepdim=True) * CONFIG.experts.router.scale
        experts = [expert(u, f"mlp.experts.{e}") for e in range(gates.shape[1])]
        return expert(u, "mlp.shared_experts") + torch.einsum("te,etd->td", gates, torch.stack(experts))

    e = unit(p["embed"][following], "enorm") @ p["e_proj.weight"].T
    x = unit(x, "hnorm") @ p["h_proj.weight"].T + e[:, None]
    halves = (("attn_hc.", "input_layernorm", attended), ("ffn_hc.", "post_attention_layernorm", mixed))
    for name, norm, half in halves:
        u, post, mix = summed(x, name)
        x = post[:, :, None] * half(unit(u, norm))[:, None] + torch.einsum("tij,tid->tjd", mix, x)
    return unit(summed(x, "hc_head.hc_")[0], "shared_head.norm") @ p["head"].T


WITH_DRAFTS = DEEPSEEK_V4 | {"num_nextn_predict_layers": 1}


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_mtp_layer_agrees_with_its_description(backend: str) -> None:
    config = ModelConfig.from_json(WITH_DRAFTS)
    parameters, prefix = random_parameters(config, 7), f"model.layers.{config.num_hidden_layers}."
    model = model_of(config, select(backend, torch.float32), MemorySource(parameters))
    ids, cache = torch.arange(30) * 7 % config.vocab_size, model.new_cache(5, 8, "float32")
    batch = make_batch([30], [0], [[3, 0, 1, 4]], 8)
    with torch.inference_mode():
        h = model.forward(ids, batch, cache)
        found = model.draft_logits(model.draft(ids.roll(-1), h, batch, cache))
        assert distance(model.logits(h), logits_of_whole(backend, ids)) < 1e-6, "with the last sum apart"
    own = {name.removeprefix(prefix): v.double() for name, v in parameters.items() if name.startswith(prefix)}
    own |= {"embed": parameters["model.embed_tokens.weight"].double()}
    own |= {"head": parameters["lm_head.weight"].double()}
    expected = drafted(own, h.double().unflatten(1, (4, -1)), ids.roll(-1))
    assert distance(found, expected) < 1e-5


def test_an_mtp_layer_in_one_call_computes_what_ops_one_by_one_do() -> None:
    config = ModelConfig.from_json(WITH_DRAFTS)
    model, found = random_model(config, CpuOps(2), seed=7), []
    ids, batch = torch.arange(30) * 7 % config.vocab_size, make_batch([30], [0], [[3, 0, 1, 4]], 8)
    for layered in (True, False):
        cache = model.new_cache(5, 8, "float32")
        counts = torch.zeros(config.num_hidden_layers + 1, config.router_size, dtype=torch.int64)
        h = model.forward(ids, batch, cache, counts)
        first = model.draft(ids.roll(-1), h, batch, cache, counts=counts)
        found.append((model.draft_logits(first), counts))
        assert (model.mtp[0].stack is not None) is layered
        model.unstack()
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert int(found[0][1][-1].sum()) == 30 * config.num_experts_per_tok


def logits_of_whole(backend: str, ids: torch.Tensor) -> torch.Tensor:
    """Of the model without its MTP layer."""
    parameters = random_parameters(ModelConfig.from_json(WITH_DRAFTS), 7)
    model = model_of(CONFIG, select(backend, torch.float32), MemorySource(parameters))
    batch = make_batch([len(ids)], [0], [[3, 0, 1, 4]], 8)
    return model.logits(model.forward(ids, batch, model.new_cache(5, 8, "float32")))


def test_published_mtp_layers_are_read_and_packed(tmp_path: Path) -> None:
    config, packed = ModelConfig.from_json(WITH_DRAFTS), tmp_path / "packed.bin"
    stored = type_named("deepseek_v4").names.in_model(config.num_hidden_layers).stored
    tensors = {stored(n): t.contiguous() for n, t in random_parameters(config, 7).items()}
    named = {"e_proj.weight", "hc_head_fn", "norm.weight", "attn.wkv.weight", "ffn.gate.bias", "hc_ffn_scale"}
    assert {f"mtp.0.{name}" for name in named} <= set(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(WITH_DRAFTS))
    pack_checkpoint(tmp_path, packed, "int8", 1)
    models = [load(tmp_path, select("cpu", torch.float32, 1, "int8"))]
    models += [load(tmp_path, select("cpu", torch.float32, 1, packed=str(packed)))]
    ids, found = torch.arange(20) % config.vocab_size, []
    for model in models:
        cache, batch = model.new_cache(3, 8, "float32"), make_batch([20], [0], [[2, 0, 1]], 8)
        h = model.forward(ids, batch, cache)
        found.append(model.draft_logits(model.draft(ids, h, batch, cache)))
    assert torch.equal(*found)


@pytest.mark.parametrize("layout", ["published", "saved", "own"])
def test_files_of_every_layout_are_read(layout: str, tmp_path: Path) -> None:
    names = type_named("deepseek_v4").names
    stored = dict(zip(("published", "saved", "own"), (names.stored, *names.variants), strict=True))[layout]
    save_file(
        {stored(n): t.contiguous() for n, t in random_parameters(CONFIG, 7).items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V4))
    assert torch.equal(logits(load(tmp_path, select("cpu", torch.float32, 1))), logits(built()))


def fp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w [N, K] -> E2M1 pairs int8 [N, K / 2], exponents [N, K / 32], and the values that they stand for."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = torch.cat((levels, -levels))
    groups = w.unflatten(1, (-1, 32))
    scale = torch.exp2((groups.abs().amax(-1) / 6).log2().ceil())
    codes = (groups.unsqueeze(-1) / scale[..., None, None] - levels).abs().argmin(-1)
    values = (levels[codes] * scale.unsqueeze(-1)).flatten(1)
    codes = codes.flatten(1).to(torch.uint8)
    pairs = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8)
    return pairs, (scale.log2() + 127).to(torch.uint8).view(torch.float8_e8m0fnu), values


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
def test_released_files_are_read(expert_dtype: str, tmp_path: Path) -> None:
    """FP8 in blocks and FP4 experts, with scales that are powers of two; ragged sizes included."""
    raw = DEEPSEEK_V4 | dict(hidden_size=160, moe_intermediate_size=96, expert_dtype=expert_dtype)
    raw |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    config, names = ModelConfig.from_json(raw), type_named("deepseek_v4").names
    exact, stored = {}, {}
    for name, value in random_parameters(config, 7).items():
        module, own = name.removesuffix(".weight"), names.stored(name)
        exact[name], stored[own] = value, value.contiguous()
        if name.endswith("tid2eid") and expert_dtype == "fp4":
            stored[own] = value.int()  # as some writers of files have it
        kept = ("norm", "embed_tokens", "lm_head", "mlp.gate.", "compressor", "_hc.", "hc_head")
        if value.ndim != 2 or any(k in name for k in kept):
            continue
        if expert_dtype == "fp4" and ".experts." in name:
            stored[own], scale, exact[name] = fp4(value)
        else:
            stored[own], factors = quantize_blocks(value, ue8m0=True)
            exact[name], scale = dequantize_blocks(stored[own], factors), factors.to(torch.float8_e8m0fnu)
        stored[f"{names.stored(module)}.scale"] = scale
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ops = select("reference", torch.float32)
    expected = logits(model_of(config, ops, MemorySource(exact)))
    assert distance(logits(load(tmp_path, ops)), expected) < 1e-6
    for compute, bound in (("int8", 0.2), ("exact", 1e-3)):  # of inputs of MXFP4
        error = logits(load(tmp_path, select("cpu", torch.float32, 1, compute=compute))) - expected  # type: ignore[arg-type]
        assert (error.norm(dim=1) / expected.norm(dim=1)).median() < bound
    held, written = stored_by_checkpoint(tmp_path), stored_by_config(raw)
    expert = "model.layers.1.mlp.experts.0.up_proj.weight"
    assert held(expert).kind == written(expert).kind == ("mxfp4" if expert_dtype == "fp4" else "fp8")


def test_published_names() -> None:
    stored, indexer = type_named("deepseek_v4").names.stored, "model.layers.3.self_attn.compressor.indexer."
    pairs = {
        "model.embed_tokens.weight": "embed.weight",
        "lm_head": "head",
        "model.norm.weight": "norm.weight",
        "model.hc_head.hc_fn": "hc_head_fn",
        "model.layers.3.attn_hc.base": "layers.3.hc_attn_base",
        "model.layers.3.input_layernorm.weight": "layers.3.attn_norm.weight",
        "model.layers.3.self_attn.q_a_proj": "layers.3.attn.wq_a",
        "model.layers.3.self_attn.kv_norm.weight": "layers.3.attn.kv_norm.weight",
        "model.layers.3.self_attn.o_a_proj": "layers.3.attn.wo_a",
        "model.layers.3.self_attn.compressor.position_bias": "layers.3.attn.compressor.ape",
        "model.layers.3.self_attn.compressor.gate_proj": "layers.3.attn.compressor.wgate",
        indexer + "kv_proj": "layers.3.attn.indexer.compressor.wkv",
        indexer + "kv_norm.weight": "layers.3.attn.indexer.compressor.norm.weight",
        indexer + "q_b_proj": "layers.3.attn.indexer.wq_b",
        indexer + "scorer.weights_proj": "layers.3.attn.indexer.weights_proj",
        "model.layers.3.mlp.gate.e_score_correction_bias": "layers.3.ffn.gate.bias",
        "model.layers.3.mlp.gate.tid2eid": "layers.3.ffn.gate.tid2eid",
        "model.layers.3.mlp.experts.7.down_proj": "layers.3.ffn.experts.7.w2",
        "model.layers.3.mlp.shared_experts.up_proj.weight": "layers.3.ffn.shared_experts.w3.weight",
    }
    assert {name: stored(name) for name in pairs} == pairs


def test_flash_keeps_few_bytes_of_a_token() -> None:
    config = ModelConfig.from_json(FLASH)
    past, window, opened = cache_kinds(config)
    assert config.block_tokens == 128
    # 21 layers of a quarter of an entry and an index key, 20 of a 128th
    assert past.token_bytes("bfloat16") == 21 * (512 + 128) * 2 // 4 + 20 * 512 * 2 // 128
    assert window.token_bytes("bfloat16") == 43 * 512 * 2
    assert opened.state_bytes == 4 * (21 * 8 * 2 * (1024 + 256) + 20 * 128 * 1024)


@pytest.mark.parametrize("drafts", [0, 1])
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "int8"])
def test_bytes_of_a_long_sequence_are_those_that_are_told(dtype: CacheDtype, drafts: int) -> None:
    """32k tokens of V4-Flash: what inspect prints, and the blocks and the slot that hold them."""
    config = ModelConfig.from_json(FLASH | {"num_nextn_predict_layers": drafts})
    tokens, size = 1 << 15, 128
    (window,) = {kind.window for kind in cache_kinds(config)} - {None}
    blocks = {None: tokens // size, window: 2}  # the window's end is in a second block
    cache = DeepseekV4.cache_of(config, CpuOps(1), blocks[None], size, dtype, {window: 2}, 1)
    held = sum(each.nbytes for kind in cache.by_kind() for each in kind)
    past, near, opened = cache_kinds(config)
    told = tokens * past.token_bytes(dtype) + 128 * near.token_bytes(dtype) + opened.state_bytes
    if dtype == "bfloat16":
        cost = model_cost(config)
        printed = tokens * cost.kv_bytes_per_token + cost.kv_bytes_per_sequence
        assert printed == pytest.approx(told, rel=0.001 * drafts)  # without the MTP layer's window
        assert printed == pytest.approx(held, rel=0.05)
    assert told == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(o_groups=3), "o_groups: got 3; expected a divisor of num_attention_heads = 4"),
        (dict(qk_rope_head_dim=32), "qk_rope_head_dim: got 32; expected an even number .* head_dim = 24"),
        (dict(layer_types=["sliding_attention"]), "layer_types has 1 entries; expected one per"),
        (dict(layer_types=["mamba"] * 4), "layer_types: got"),
        (dict(layer_types=None, compress_ratios=[0, 4, 5, 4]), "compress_ratios: got"),
        (dict(mlp_layer_types=["dense"] * 4), "mlp_layer_types: got"),
        (dict(hc_mult=0), "hc_mult: got 0"),
        (dict(index_topk=0), "index_topk: got 0"),
        (dict(partial_rotary_factor=0.9), "qk_rope_head_dim: got"),
        (
            dict(compress_rates={"compressed_sparse_attention": 0}),
            "compress_rates.compressed_sparse_attention: got 0",
        ),
        (
            dict(compress_rates={"compressed_sparse_attention": 8, "heavily_compressed_attention": 8}),
            "compress_rates.heavily_compressed_attention: got 8",
        ),
    ],
)
def test_rejected_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(DEEPSEEK_V4 | changes)


def test_blocks_hold_whole_entries() -> None:
    with pytest.raises(ValueError, match="block_size: got 4; expected a multiple of 8"):
        built().new_cache(4, 4)
