"""Bits per byte of held-out text, and how often the MTP draft equals the trunk's greedy token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from farthing.train.data import Ids
from farthing.train.model import DeepSeekLM


def windows(ids: Ids, length: int, stride: int) -> Iterator[tuple[Ids, int]]:
    """(window of at most length + 1 ids, number of its targets already scored), covering every target once.

    The first window starts the document. Each later one advances by `stride`, so its new targets have at
    least length - stride tokens of context.
    """
    start, scored = 0, 0
    while scored < len(ids) - 1:
        window = ids[start : start + length + 1]
        yield window, scored - start
        scored = start + len(window) - 1
        start += stride


@torch.no_grad()
def evaluate(
    model: DeepSeekLM,
    documents: Sequence[Ids],
    texts: Sequence[str],
    length: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, float]:
    """{"bits_per_byte", "loss" (nats per token), "mtp_acceptance", "eval_tokens", "eval_bytes"}.

    `documents` are token ids from document-start to document-end token. The end token is not scored, so the
    bits are exactly those of `texts`. Scoring stops after the document that reaches `max_tokens`.
    """
    length = model.cfg.max_position_embeddings if length is None else length
    stride = length // 2 if stride is None else stride
    nats, count, size, agreed, drafted = 0.0, 0, 0, 0, 0
    for ids, text in zip(documents, texts, strict=True):
        body = ids[:-1]
        for window, skip in windows(body, length, stride):
            tokens = torch.from_numpy(window.astype(np.int64))[None].to(model.embed_tokens.device)
            loss, hits, drafts = _score(model, tokens, skip)
            nats, agreed, drafted = nats + loss, agreed + hits, drafted + drafts
        count, size = count + len(body) - 1, size + len(text.encode())
        if max_tokens is not None and count >= max_tokens:
            break
    return {
        "bits_per_byte": nats / np.log(2) / max(size, 1),
        "eval_loss": nats / max(count, 1),
        "mtp_acceptance": agreed / max(drafted, 1),
        "eval_tokens": count,
        "eval_bytes": size,
    }


def _score(model: DeepSeekLM, tokens: torch.Tensor, skip: int) -> tuple[float, int, int]:
    """(nats of the targets after the first `skip`, accepted MTP drafts there, all MTP drafts there)."""
    hidden = model(tokens[:, :-1])
    logits = model.logits(hidden)[0].float()  # [T, V]
    nats = F.cross_entropy(logits[skip:], tokens[0, 1 + skip :], reduction="sum").item()
    if model.mtp is None or tokens.shape[1] < 3:
        return nats, 0, 0
    draft = model.logits(model.draft(hidden[:, :-1], tokens[:, 1:-1]))[0]
    same = draft.argmax(-1)[skip:] == logits.argmax(-1)[1 + skip :]
    return nats, int(same.sum()), same.numel()
