"""A row's token does not depend on the rows sampled with it."""

from __future__ import annotations

import torch

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
