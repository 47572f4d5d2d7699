"""FP8 training: exact rounding, products, overflow, outliers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farthing.model.config import ModelConfig
from farthing_lab.train.fp8 import (
    FORMATS,
    Fp8Config,
    Fp8Hook,
    Fp8Projection,
    Operand,
    decode,
    power_of_two,
    product,
    use_fp8,
)
from farthing_lab.train.loop import BaseHook, Trainer
from farthing_lab.train.model import DeepSeekLM
from tests.lab.train.test_loop import build


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_decoding_equals_torch_for_every_bit_pattern(name: str) -> None:
    data = torch.arange(256, dtype=torch.uint8).view(FORMATS[name])
    expected = data.to(torch.bfloat16)
    finite = expected.isfinite()
    assert torch.equal(decode(data)[finite], expected[finite])


@given(st.floats(1e-30, 1e30))
def test_power_of_two_is_the_smallest_sufficient(x: float) -> None:
    value = torch.tensor(x)
    p = power_of_two(value)
    assert p >= value > p / 2
    assert float(torch.frexp(p)[0]) == 0.5


def test_power_of_two_of_zero_is_one_and_of_infinity_is_not_finite() -> None:
    p = power_of_two(torch.tensor([0.0, float("inf"), float("nan"), 4.0]))
    assert p[0] == 1 and not p[1].isfinite() and p[2].isnan() and p[3] == 4


@pytest.mark.parametrize("shape", [(1, 8), (5, 128), (130, 300), (256, 96)])
@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_rounding_equals_torch_on_the_scaled_group(shape: tuple[int, int], scaling: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[1])
    operand = Operand(Fp8Config(scaling), torch.float8_e4m3fn)  # type: ignore[arg-type]
    for rounded in (operand.rows(x), operand.columns(x), operand.blocks(x)):
        r, c = (min(t, n) for t, n in zip(rounded.tile, shape, strict=True))
        scale = rounded.scale.repeat_interleave(r, 0)[: shape[0]].repeat_interleave(c, 1)[:, : shape[1]]
        expected = (x / scale).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(rounded.data.float() * scale, expected)
        assert torch.equal(rounded.value.float(), expected)
        # Three bits of mantissa: 1/16 of a value, or half a step of the smallest values of its group.
        assert bool(((expected - x).abs() <= x.abs() / 16 + scale * 2.0**-10).all())


def test_product_equals_that_of_the_rounded_values() -> None:
    torch.manual_seed(0)
    layer = Fp8Projection(Fp8Config())
    x, w = torch.randn(70, 256).bfloat16(), torch.randn(1, 200, 256)
    xq, wq = layer.x.rows(x), layer.w.blocks(w).matrix(0)
    exact = xq.value.double() @ wq.value.double().T
    torch.testing.assert_close(product(xq, wq).double(), exact, rtol=2**-8, atol=1e-3)
    assert xq.data.dtype == wq.data.dtype == torch.float8_e4m3fn


def test_gradients_are_close_to_bfloat16() -> None:
    torch.manual_seed(0)
    layer = Fp8Projection(Fp8Config())
    x = torch.randn(256, 256).bfloat16().requires_grad_()
    w = (torch.randn(1, 128, 256) / 16).requires_grad_()
    probe = torch.randn(256, 128).bfloat16()
    grads = []
    for y in (layer(x, w, [256]), x @ w[0].to(x.dtype).T):
        grads.append(torch.autograd.grad((y * probe).sum(), (x, w)))
    for a, b in zip(*grads, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 0.06


def test_weight_bytes_are_half_of_bfloat16() -> None:
    layer = Fp8Projection(Fp8Config())
    w = torch.randn(4, 256, 256)
    layer(torch.randn(128, 256).bfloat16(), w, [128, 0, 0, 0])
    assert layer.weight_bytes == w.numel() + 4 * 4 * 4  # one byte per element, one scale per block
    assert layer.weight_bytes < 0.501 * 2 * w.numel()


def test_delayed_scaling_detects_an_overflow_and_lowers_the_scale() -> None:
    operand = Operand(Fp8Config("delayed", history=3, backoff=2.0), torch.float8_e4m3fn)
    x = torch.ones(4, 8)
    operand.rows(x)
    assert not operand.end_step()
    calm = operand.rows(x).scale
    assert not operand.end_step()
    hit = operand.rows(x * 1e4)
    assert bool(hit.value.isfinite().all())  # saturated, not infinite
    assert operand.end_step()
    after = operand.rows(x * 1e4)
    assert bool((after.scale >= 1e4 * calm).all())  # larger steps mean a lowered scale
    assert not operand.end_step()
    for _ in range(4):
        operand.rows(x)
        assert not operand.end_step()
    assert torch.equal(operand.rows(x).scale, calm)  # expired after `history` steps


@pytest.mark.parametrize(("margin", "growth", "overflows"), [(0, 8, True), (3, 8, False), (3, 20, True)])
def test_delayed_scaling_has_headroom(margin: int, growth: int, overflows: bool) -> None:
    operand = Operand(Fp8Config("delayed", margin=margin), torch.float8_e4m3fn)
    x = torch.randn(4, 8).clamp(-1, 1) / 8
    x[0, 0] = 1
    operand.rows(x)
    operand.end_step()
    error = operand.rows(x).value / x - 1
    assert float(error.abs().max()) < 2**-4  # as fine as without headroom
    operand.end_step()
    operand.rows(x * growth)
    assert operand.end_step() == overflows


class Outliers(BaseHook):
    """Multiplies some weights by 10,000 for one step."""

    def before_step(self, trainer: Trainer) -> None:
        if trainer.step in (3, 4):
            model = trainer.model
            assert isinstance(model, DeepSeekLM)
            factor = 1e4 if trainer.step == 3 else 1e-4
            with torch.no_grad():
                for _, p in model.layers[1].named_parameters():
                    if p.ndim > 1:
                        p.view(-1)[::97] *= factor


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_outliers_of_ten_thousand_times_leave_no_nan(
    tiny: ModelConfig, tmp_path: Path, scaling: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build(tiny, tmp_path / "run", hooks=(Outliers(),))
    assert isinstance(trainer.model, DeepSeekLM)
    trainer.model.set_compute_dtype(torch.bfloat16)
    hook = Fp8Hook(use_fp8(trainer.model, Fp8Config(scaling)))  # type: ignore[arg-type]
    trainer.hooks.append(hook)
    with caplog.at_level(logging.WARNING):
        assert trainer.run()
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert trainer.metrics["loss"] == trainer.metrics["loss"]
    if scaling == "delayed":
        assert hook.skipped >= 1
        assert "FP8 overflow" in caplog.text


def test_infinite_gradients_skip_the_step(tiny: ModelConfig) -> None:
    operand = Operand(Fp8Config(), torch.float8_e4m3fn)
    operand.rows(torch.tensor([[1.0, float("inf")]]))
    assert operand.end_step()


def test_hook_state_round_trips(tiny: ModelConfig) -> None:
    model = DeepSeekLM(tiny, torch.bfloat16)
    hook = Fp8Hook(use_fp8(model, Fp8Config("delayed")))
    model.loss(torch.randint(0, tiny.vocab_size, (1, 17)))["loss"].backward()
    for projection in hook.projections.values():
        for operand in projection.operands.values():
            operand.end_step()
    other = Fp8Hook(use_fp8(model, Fp8Config("delayed")))
    other.load_state_dict(hook.state_dict())
    for name, projection in hook.projections.items():
        for role, operand in projection.operands.items():
            mine = other.projections[name].operands[role].history
            assert all(torch.equal(a, b) for a, b in zip(mine, operand.history, strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [("scaling", "soon"), ("gradients", "e3m4"), ("history", 0), ("margin", 9), ("backoff", 0.5)],
)
def test_errors_name_the_setting(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Fp8Config(**{field: value})  # type: ignore[arg-type]
