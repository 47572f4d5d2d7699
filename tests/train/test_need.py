"""The need of neurons is the rise of the loss without them; controls: noise and the unpruned model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from farthing.train.activity import measure
from farthing.train.export import load_checkpoint
from farthing.train.model import MLP, DeepSeekLM
from farthing.train.need import needed_share, needs, random_twin, threshold


@pytest.fixture
def model(checkpoint: Path) -> DeepSeekLM:
    return load_checkpoint(checkpoint).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 300, (4, 33), generator=torch.Generator().manual_seed(0))


def loss(model: DeepSeekLM, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model.logits(model(tokens[:, :-1])).float()
    return float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_need_is_the_rise_of_the_loss_and_the_model_is_unchanged(
    model: DeepSeekLM, tokens: torch.Tensor
) -> None:
    before = copy.deepcopy(model.state_dict())
    slices = needs(model, tokens)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    first = slices[0]
    energy = measure(model, tokens, 0.3)[first.name].energy
    part = energy.argsort(dim=1)[0, : first.parameters // (3 * model.cfg.hidden_size)]
    silent = copy.deepcopy(model)
    module = silent.get_submodule(first.name)
    assert isinstance(module, MLP)
    with torch.no_grad():
        module.down_proj.weight[:, part] = 0
    assert first.rise == pytest.approx(loss(silent, tokens) - loss(model, tokens), abs=1e-5)
    sizes = sum(s.parameters for s in slices)
    assert first.need == pytest.approx(first.rise * sizes / first.parameters)
    assert not any(s.name.startswith("mtp") for s in slices)


def test_threshold_leaves_at_most_the_given_share(model: DeepSeekLM, tokens: torch.Tensor) -> None:
    slices = needs(model, tokens)
    for share in (0.3, 0.7, 0.9):
        assert needed_share(slices, threshold(slices, share)) <= share
    untouched = needs(copy.deepcopy(model), tokens)
    least = threshold(slices)
    assert needed_share(untouched, least) == pytest.approx(needed_share(slices, least))


def test_zero_weights_are_not_needed(model: DeepSeekLM, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.0)
    assert needed_share(needs(model, tokens), 1e-9) == 0


def test_random_twin_has_equal_sizes_and_other_weights(model: DeepSeekLM) -> None:
    twin = random_twin(model, 1)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert a.shape == b.shape and (a.ndim < 2 or not torch.equal(a, b)), name
    assert all(float(p.std()) > 0 for p in twin.parameters() if p.ndim > 1)
