"""The kernel of `farthing.parallel.collectives`; imports Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def one_shot(pointers: Any, out: Any, n: Any, first: Any, RANKS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """out[i] = sum over ranks of (their buffer)[first + i]; pointers [RANKS] int64, numbers of out's type."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for rank in tl.static_range(RANKS):
        theirs = tl.load(pointers + rank).to(tl.pointer_type(out.dtype.element_ty))
        total += tl.load(theirs + first + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
