"""The need of neurons is the information lost without them; controls: noise and the unpruned model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from farthing_lab.train.export import load_checkpoint
from farthing_lab.train.finetune import Settings, Text
from farthing_lab.train.model import MLP, DeepSeekLM
from farthing_lab.train.need import (
    TYPICAL,
    Slice,
    information,
    measure,
    need_deciles,
    needed_share,
    needs,
    random_twin,
    threshold,
)
from tests.lab.train.conftest import learn, settings_of


@pytest.fixture
def settings(checkpoint: Path, sources: Path, tmp_path: Path) -> Settings:
    return settings_of(checkpoint, tmp_path, sources)


@pytest.fixture
def tokens(settings: Settings) -> torch.Tensor:
    return Text.load(settings).batches.next(8, 32)


@pytest.fixture
def model(checkpoint: Path, settings: Settings) -> DeepSeekLM:
    learn(checkpoint, settings)
    return load_checkpoint(checkpoint).eval()


def loss(model: DeepSeekLM, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model.logits(model(tokens[:, :-1])).float()
    return float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_need_is_the_information_lost_and_the_model_is_unchanged(
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
    lost = torch.tensor([loss(silent, row[None]) - loss(model, row[None]) for row in tokens])
    assert first.lost == pytest.approx(float(lost.mean()), abs=1e-5)
    assert first.error == pytest.approx(float(lost.std()) * len(tokens) ** -0.5, abs=1e-5)
    assert first.share == first.parameters / sum(s.parameters for s in slices)
    assert first.need == (first.lost - 2 * first.error) / first.share
    assert not any(s.name.startswith("mtp") for s in slices)


def test_information_is_the_advantage_over_token_frequencies(model: DeepSeekLM, tokens: torch.Tensor) -> None:
    _, counts = tokens[:, 1:].unique(return_counts=True)
    chance = float(torch.distributions.Categorical(probs=counts.float()).entropy())
    expected = [max(0.0, chance - loss(model, row[None])) for row in tokens]
    assert min(expected) > 0
    torch.testing.assert_close(information(model, tokens).float(), torch.tensor(expected))
    assert information(random_twin(model), tokens).tolist() == [0.0] * len(tokens)


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


def test_random_weights_need_nothing_and_a_trained_model_does(
    model: DeepSeekLM, tokens: torch.Tensor
) -> None:
    slices = needs(model, tokens)
    least = threshold(slices)
    assert least > 0 and 0.2 < needed_share(slices, least) <= TYPICAL
    for seed in range(3):
        assert needed_share(needs(random_twin(model, seed), tokens), least) == 0


def test_noise_in_a_trained_model_is_not_needed(model: DeepSeekLM, tokens: torch.Tensor) -> None:
    """The first MLP becomes noise with the same statistics: losing it takes no information away."""
    least = threshold(needs(model, tokens))
    mlp = model.layers[0].mlp
    assert isinstance(mlp, MLP)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            w = part.weight
            w.copy_(w.flatten()[torch.randperm(w.numel(), generator=generator)].view_as(w))
    noise = [s for s in needs(model, tokens) if s.name == "layers.0.mlp"]
    assert needed_share(noise, least) < 0.2


def test_deciles_are_weighted_by_parameters() -> None:
    slices = [Slice("a", 15, 1.0, 0.0, 0.15), Slice("b", 60, 2.0, 0.5, 0.6), Slice("c", 25, 3.0, 0.0, 0.25)]
    a, b, c = (s.need for s in slices)
    assert (a, b, c) == pytest.approx((1 / 0.15, 1 / 0.6, 3 / 0.25))
    assert need_deciles(slices) == [b] * 6 + [a] + [c] * 2


def test_one_window_has_no_error(model: DeepSeekLM, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="tokens: got 1 window; expected at least 2"):
        needs(model, tokens[:1])


def test_random_twin_has_equal_sizes_and_other_weights(model: DeepSeekLM) -> None:
    twin = random_twin(model, 1)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert a.shape == b.shape and (a.ndim < 2 or not torch.equal(a, b)), name
    assert all(float(p.std()) > 0 for p in twin.parameters() if p.ndim > 1)
