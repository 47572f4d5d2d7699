"""Routed experts in separate steps against the fused op."""

from __future__ import annotations

import torch

from farthing.model.config import ModelConfig
from farthing_lab.train.functional import Routing, combine, plain_product, routed_experts
from farthing_lab.train.model import DeepSeekLM, MoE


def test_separate_steps_match_the_fused_result_and_gradients() -> None:
    torch.manual_seed(0)
    n, d, e, k, i = 37, 16, 6, 2, 8
    ids = torch.stack([torch.randperm(5)[:k] for _ in range(n)])  # expert 5 gets no tokens
    leaves = [torch.randn(n, d), torch.rand(n, k), torch.randn(e, 2 * i, d) / 4, torch.randn(e, d, i) / 4]
    probe = torch.randn(n, d)

    def fused(x: torch.Tensor, w: torch.Tensor, gu: torch.Tensor, dn: torch.Tensor) -> torch.Tensor:
        return routed_experts(x, w, ids, gu, dn)

    def opened(x: torch.Tensor, w: torch.Tensor, gu: torch.Tensor, dn: torch.Tensor) -> torch.Tensor:
        routing = Routing.of(ids, e)
        gate, up = plain_product(x, gu, routing.sizes, routing).chunk(2, -1)
        return combine(plain_product(torch.nn.functional.silu(gate) * up, dn, routing.sizes), w, routing)

    results = []
    for form in (fused, opened):
        inputs = [t.clone().requires_grad_() for t in leaves]
        out = form(*inputs)
        (out * probe).sum().backward()
        results.append([out.detach(), *(t.grad for t in inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_routing_gives_expert_and_token_of_every_real_row() -> None:
    ids = torch.tensor([[0, 2], [2, 1], [2, 0]])
    routing = Routing.of(ids, 4)
    pairs = set(zip(routing.token[routing.real].tolist(), routing.expert[routing.real].tolist(), strict=True))
    assert pairs == {(0, 0), (0, 2), (1, 2), (1, 1), (2, 2), (2, 0)}
    assert int(routing.real.sum()) == 6


def test_layer_with_plain_products_is_unchanged(tiny: ModelConfig) -> None:
    torch.manual_seed(1)
    model = DeepSeekLM(tiny)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tokens = torch.randint(0, tiny.vocab_size, (2, 17))
    before = float(model.loss(tokens, 0.3)["loss"].detach())
    for _, module in model.projections():
        if isinstance(module, MoE):
            module.products = (plain_product, plain_product)
        else:
            module.product = plain_product
    assert abs(float(model.loss(tokens, 0.3)["loss"].detach()) - before) < 1e-5
