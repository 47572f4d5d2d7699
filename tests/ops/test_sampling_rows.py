"""A row's token does not depend on the rows sampled with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from farthing.ops import sampling
from farthing.ops.cpu import backend
from farthing.ops.sampling import CANDIDATES, Filters, sample


def test_row_is_sampled_the_same_next_to_one_that_needs_the_whole_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = 16 * CANDIDATES
    logits = torch.randn(40, vocabulary, generator=generator)
    logits[1::2] *= 8  # a few tokens have all of the mass; of the other rows, thousands are kept
    uniform = torch.rand(40, generator=generator, dtype=torch.float64)
    filters = Filters(torch.full((40,), vocabulary), torch.full((40,), 0.95), torch.zeros(40))
    together = sample(logits, uniform, filters)
    alone = [sample(logits[[i]], uniform[[i]], filters.at(torch.tensor([i]))) for i in range(40)]
    assert together.tolist() == torch.cat(alone).tolist()


def mixed(rows: int, vocabulary: int) -> Filters:
    large = [vocabulary, CANDIDATES, CANDIDATES + 44, 40, 9 * CANDIDATES]
    min_p = torch.tensor([0.0, 0.001]).repeat(rows // 2)
    return Filters(torch.tensor(large).repeat(rows // len(large)), torch.full((rows,), 0.9), min_p)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_row_is_sampled_the_same_next_to_one_with_a_large_top_k(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary = 400, 16 * CANDIDATES
    logits = torch.randn(rows, vocabulary, generator=generator).bfloat16().float()  # many are equal
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    filters = mixed(rows, vocabulary)

    def drawn(at: torch.Tensor) -> list[int]:
        part = filters.at(at)
        if kind == "torch":
            return sample(logits[at], uniform[at], part).tolist()
        arrays: Any = Filters(part.top_k.numpy(), part.top_p.numpy(), part.min_p.numpy())  # type: ignore[arg-type]
        return backend.sample(logits[at].numpy(), uniform[at].numpy(), arrays).tolist()

    alone = [token for i in range(rows) for token in drawn(torch.tensor([i]))]
    assert drawn(torch.arange(rows)) == alone


def test_large_top_k_keeps_the_mass_of_all_its_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary = 100, 16 * CANDIDATES
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    filters = mixed(rows, vocabulary)
    values, ids = logits.double().softmax(-1).sort(descending=True)
    kept = values * (values >= filters.min_p.double()[:, None] * values[:, :1])
    kept *= torch.arange(vocabulary) < filters.top_k[:, None]
    kept *= kept.cumsum(-1) - kept < 0.9 * kept.sum(-1, keepdim=True)
    drawn = (kept.cumsum(-1) <= (uniform * kept.sum(-1))[:, None]).sum(-1)
    expected = ids.gather(1, drawn[:, None])[:, 0]
    assert (sample(logits, uniform, filters) == expected).sum() >= rows - 2  # a border falls to either


@pytest.mark.parametrize("module", [sampling, backend])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "sorts_all"),
    [(9 * CANDIDATES, 1.0, 0.5, False), (9 * CANDIDATES, 1.0, 0.0, True), (40, 1.0, 0.0, False),
     (16 * CANDIDATES, 0.9, 0.0, False), (16 * CANDIDATES, 0.9, 1e-9, True)],
)  # fmt: skip
def test_vocabulary_is_sorted_only_for_rows_that_may_keep_more(
    module: Any, top_k: int, top_p: float, min_p: float, sorts_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    among = module._sample_among

    def watched(*args: Any) -> Any:
        widths.append(args[-1])
        return among(*args)

    monkeypatch.setattr(module, "_sample_among", watched)
    logits = torch.linspace(0, 40, 16 * CANDIDATES)[None]
    filters = Filters(torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
    given = (
        (logits, torch.tensor([0.5])) if module is sampling else (logits.numpy(), torch.tensor([0.5]).numpy())
    )
    module.sample(*given, filters)
    assert widths == [CANDIDATES, 16 * CANDIDATES][: 1 + sorts_all]


@pytest.mark.parametrize("module", [sampling, backend])
@pytest.mark.parametrize("width", [100, 300])
def test_a_target_past_the_end_is_the_last_token_with_a_weight(module: Any, width: int) -> None:
    weights = torch.ones(1, width)
    weights[0, -3:] = 0
    end = torch.ones(1, dtype=torch.float64)
    found = module.invert(*((weights, end) if module is sampling else (weights.numpy(), end.numpy())))
    assert found.tolist() == [width - 4]
