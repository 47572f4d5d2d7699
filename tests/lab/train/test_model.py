"""The training model against Hugging Face transformers, MTP against an independent forward, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from farthing.model.config import ModelConfig
from farthing_lab.train.export import config_json, from_tensors, to_tensors
from farthing_lab.train.functional import causal_attention, fused_cross_entropy, rms_norm, routed_experts
from farthing_lab.train.model import DeepSeekLM, Router
from tests.lab.train.conftest import changed


def randomized(cfg: ModelConfig, seed: int = 0) -> DeepSeekLM:
    """A model whose zero-initialized parts are random too, so that every tensor matters."""
    torch.manual_seed(seed)
    model = DeepSeekLM(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5) + (p.ndim == 1))
        for module in model.modules():
            if isinstance(module, Router):
                module.e_score_correction_bias.normal_(std=0.3)
    return model.eval()


VARIANTS = [
    {},
    {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    {"norm_topk_prob": False, "v_head_dim": 32, "n_shared_experts": 2},
    {"tie_word_embeddings": False, "num_attention_heads": 4, "qk_rope_head_dim": 8},
]


@pytest.mark.parametrize("change", VARIANTS)
def test_logits_equal_transformers(tiny: ModelConfig, change: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    cfg = changed(tiny, **change)
    model = randomized(cfg)
    fields = {
        k: v for k, v in config_json(cfg, fp8=False).items() if k not in ("architectures", "model_type")
    }
    theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**fields)).float().eval()
    mtp = f"model.layers.{cfg.num_hidden_layers}."
    tensors = {k: v for k, v in to_tensors(model).items() if not k.startswith(mtp)}
    state = theirs.state_dict()
    if "model.layers.1.mlp.experts.gate_up_proj" in state:  # transformers 5 fuses the experts
        tensors = fuse_experts(tensors, cfg)
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert [k for k in missing if k != "lm_head.weight"] == []
    theirs.tie_weights()
    tokens = torch.randint(0, cfg.vocab_size, (2, 77))
    with torch.no_grad():
        ours, reference = model.logits(model(tokens)), theirs(tokens).logits
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()


def fuse_experts(tensors: dict[str, torch.Tensor], cfg: ModelConfig) -> dict[str, torch.Tensor]:
    """Per-expert tensors to transformers 5's stacked parameters."""
    fused = {k: v for k, v in tensors.items() if ".mlp.experts." not in k}
    for i in filter(cfg.is_moe, range(cfg.num_hidden_layers)):
        p = f"model.layers.{i}.mlp.experts."
        each = range(cfg.n_routed_experts)
        both = [
            torch.cat((tensors[f"{p}{e}.gate_proj.weight"], tensors[f"{p}{e}.up_proj.weight"])) for e in each
        ]
        fused[f"{p}gate_up_proj"] = torch.stack(both)
        fused[f"{p}down_proj"] = torch.stack([tensors[f"{p}{e}.down_proj.weight"] for e in each])
    return fused


def test_mtp_equals_an_independent_forward(tiny: ModelConfig) -> None:
    """The MTP layer, computed token by token from the checkpoint's tensors."""
    model = randomized(tiny, 1)
    w = {k.removeprefix("model.layers.3."): v for k, v in to_tensors(model).items() if "layers.3." in k}
    embedding = model.embed_tokens.detach()
    tokens = torch.randint(0, tiny.vocab_size, (1, 12))
    with torch.no_grad():
        hidden = model(tokens[:, :-1])
        ours = model.logits(model.draft(hidden, tokens[:, 1:]))[0]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def turn(x: torch.Tensor, t: int) -> torch.Tensor:
        out = x.clone()
        for i in range(x.shape[-1] // 2):
            angle = torch.tensor(t * 10000.0 ** (-2 * i / x.shape[-1]))
            a, b = x[..., 2 * i], x[..., 2 * i + 1]
            out[..., 2 * i] = a * angle.cos() - b * angle.sin()
            out[..., 2 * i + 1] = a * angle.sin() + b * angle.cos()
        return out

    def swiglu(x: torch.Tensor, p: str) -> torch.Tensor:
        gate, up = w[f"{p}.gate_proj.weight"] @ x, w[f"{p}.up_proj.weight"] @ x
        return w[f"{p}.down_proj.weight"] @ (F.silu(gate) * up)

    stream, keys, values = [], [], []
    for t in range(11):
        e, h = embedding[tokens[0, t + 1]], hidden[0, t]
        x = w["eh_proj.weight"] @ torch.cat((norm(e, "enorm"), norm(h, "hnorm")))
        y = norm(x, "input_layernorm")
        kv = w["self_attn.kv_a_proj_with_mqa.weight"] @ y
        expanded = (w["self_attn.kv_b_proj.weight"] @ norm(kv[:32], "self_attn.kv_a_layernorm")).view(2, 32)
        keys.append(torch.cat((expanded[:, :16], turn(kv[32:], t).expand(2, 16)), -1))
        values.append(expanded[:, 16:])
        q_latent = norm(w["self_attn.q_a_proj.weight"] @ y, "self_attn.q_a_layernorm")
        q = (w["self_attn.q_b_proj.weight"] @ q_latent).view(2, 32)
        q = torch.cat((q[:, :16], turn(q[:, 16:], t)), -1)
        score = torch.stack([(q * k).sum(-1) for k in keys], -1) * 32**-0.5
        mixed = (score.softmax(-1)[:, :, None] * torch.stack(values, 1)).sum(1)
        x = x + w["self_attn.o_proj.weight"] @ mixed.flatten()
        z = norm(x, "post_attention_layernorm")
        s = torch.sigmoid(w["mlp.gate.weight"] @ z)
        choice = s + w["mlp.gate.e_score_correction_bias"]
        best = sorted(range(4), key=lambda g: -float(choice[2 * g] + choice[2 * g + 1]))[:2]
        allowed = [e for g in best for e in (2 * g, 2 * g + 1)]
        chosen = sorted(allowed, key=lambda e: -float(choice[e]))[:3]
        total = sum(s[e] for e in chosen)
        routed = sum(2.5 * s[e] / total * swiglu(z, f"mlp.experts.{e}") for e in chosen)
        stream.append(x + routed + swiglu(z, "mlp.shared_experts"))
    reference = torch.stack([embedding @ norm(x, "shared_head.norm") for x in stream])
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_routed_experts_gradients_equal_autograd() -> None:
    torch.manual_seed(0)
    E, N, D, I, K = 5, 37, 16, 8, 2  # noqa: E741
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(N, K, requires_grad=True)
    ids = torch.rand(N, E - 1).topk(K).indices  # the last expert is never selected
    gate_up = torch.randn(E, 2 * I, D, dtype=torch.float64, requires_grad=True)
    down = torch.randn(E, D, I, dtype=torch.float64, requires_grad=True)
    gate, up = torch.einsum("nd,eid->nei", x, gate_up).chunk(2, -1)
    every = torch.einsum("nei,edi->ned", F.silu(gate) * up, down)
    plain = (every.gather(1, ids[..., None].expand(-1, -1, D)) * weights[..., None]).sum(1)
    ours = routed_experts(x, weights, ids, gate_up, down)
    inputs, seed = (x, weights, gate_up, down), torch.randn(N, D, dtype=torch.float64)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-8)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, seed), torch.autograd.grad(plain, inputs, seed), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_fused_cross_entropy_equals_autograd() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(70, 16, requires_grad=True)
    head = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (70,))
    ours, plain = (
        fused_cross_entropy(hidden, head, targets, chunk=32),
        F.cross_entropy(hidden @ head.T, targets),
    )
    torch.testing.assert_close(ours, plain)
    for a, b in zip(
        torch.autograd.grad(ours * 3, (hidden, head)),
        torch.autograd.grad(plain * 3, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [1, 8, 21])
def test_causal_attention_equals_autograd(length: int) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 3, length, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)
    plain = (q @ k.mT * 0.3 + mask).softmax(-1) @ v
    ours = causal_attention(q, k, v, 0.3, block=8)
    torch.testing.assert_close(ours, plain)
    seed = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), seed), torch.autograd.grad(plain, (q, k, v), seed), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_rms_norm_equals_torch() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 5, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    ours, plain = rms_norm(x, w, 1e-6, torch.float32), F.rms_norm(x, (16,), w, 1e-6)
    torch.testing.assert_close(ours, plain)
    seed = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad(ours, (x, w), seed), torch.autograd.grad(plain, (x, w), seed), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rebalance_pushes_towards_the_idle_expert(tiny: ModelConfig) -> None:
    router = Router(tiny.hidden_size, tiny.experts.router)
    router.load.copy_(torch.tensor([0.0, 9, 3, 3, 3, 3, 3, 0]))
    router.rebalance(0.1)
    assert router.e_score_correction_bias.tolist() == pytest.approx([0.1, -0.1, 0, 0, 0, 0, 0, 0.1])
    assert not router.load.any()


def test_names_round_trip(tiny: ModelConfig) -> None:
    a, b = randomized(tiny, 2), DeepSeekLM(tiny)
    tensors = to_tensors(a)
    from_tensors(b, tensors)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\]"):
        from_tensors(b, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_group": 3}, "n_routed_experts = 8"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers: got 2"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: got 7"),
    ],
)
def test_errors_name_the_config_field(tiny: ModelConfig, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepSeekLM(changed(tiny, **change))
