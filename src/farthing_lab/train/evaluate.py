"""How good a model in training is: bits per byte, accepted drafts, distance to a teacher, plots of runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from farthing_lab.train.data import Ids
from farthing_lab.train.functional import fused_cross_entropy
from farthing_lab.train.model import DeepSeekLM

# Plots of training runs.

Points = Sequence[tuple[float, float]]


def plot(
    path: Path,
    left: Mapping[str, Points],
    ylabel: str,
    right: Mapping[str, Points] | None = None,
    right_label: str = "",
    levels: Mapping[str, float] | None = None,
) -> None:
    """Plot lines over millions of tokens; `right` uses a second axis, `levels` are horizontal lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.6), dpi=90)
    colors = iter(["tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown"])
    for label, points in left.items():
        axis.plot([x / 1e6 for x, _ in points], [y for _, y in points], color=next(colors), label=label)
    for label, value in (levels or {}).items():
        axis.axhline(value, linestyle="--", linewidth=1, color=next(colors), label=f"{label} ({value:.4g})")
    axis.set_xlabel("million tokens")
    axis.set_ylabel(ylabel)
    if right:
        other = axis.twinx()
        for label, points in right.items():
            xs, ys = [x / 1e6 for x, _ in points], [y for _, y in points]
            other.plot(xs, ys, color="tab:red", drawstyle="steps-post", label=label)
        other.set_ylabel(right_label)
    figure.legend(loc="center right", bbox_to_anchor=(0.88, 0.5), frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


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


# Knowledge distillation: the student learns the teacher's next-token distribution.
#
# Shapes: N tokens, D hidden, V vocabulary.


class _FusedDistillation(torch.autograd.Function):
    """Computes the gradient in the forward pass, chunk by chunk, to never materialize [N, V]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, teacher: Tensor, targets: Tensor, hard: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        x = hidden.to(head.dtype)
        d_hidden = torch.empty_like(x)
        total, rise = torch.zeros((), device=hidden.device), torch.zeros((), device=hidden.device)
        for start in range(0, len(x), chunk):
            s = slice(start, start + chunk)
            wanted = F.linear(teacher[s].to(head.dtype), head).float().log_softmax(-1)
            found = F.linear(x[s], head).float().log_softmax(-1)
            share = wanted.exp().mul_(1 - hard)
            total += (share * (wanted - found)).sum()
            picked = found.gather(1, targets[s, None])
            total -= hard * picked.sum()
            rise += (wanted.gather(1, targets[s, None]) - picked).sum()
            d_logits = found.exp_().sub_(share)
            d_logits.scatter_add_(
                1, targets[s, None], torch.full_like(targets[s, None], -hard, dtype=torch.float32)
            )
            d_hidden[s] = d_logits.to(head.dtype) @ head
        ctx.save_for_backward(d_hidden)
        ctx.scale, ctx.dtype = 1.0 / len(x), hidden.dtype
        rise /= len(x)
        ctx.mark_non_differentiable(rise)
        return total / len(x), rise

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden,) = ctx.saved_tensors
        return d_hidden.to(ctx.dtype) * (float(grad) * ctx.scale), None, None, None, None, None


def fused_distillation(
    hidden: Tensor, head: Tensor, teacher: Tensor, targets: Tensor, hard: float = 0.0, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """((1 - hard) KL(teacher || student) + hard cross entropy of the text, rise), nats per token.

    rise: the student's cross entropy on the text minus the teacher's, without gradient. Being a paired
    difference, it is free of the batch's noise. hidden (student) and teacher [N, D] share the head [V, D],
    which gets no gradient; targets [N] int64.
    """
    loss, rise = _FusedDistillation.apply(  # type: ignore[no-untyped-call]
        hidden, head.detach(), teacher, targets, hard, chunk
    )
    return loss, rise


def distillation(
    net: DeepSeekLM,
    teacher: DeepSeekLM,
    tokens: Tensor,
    hard: float = 0.0,
    mtp_weight: float = 0.3,
    mtp_share: float = 0.25,
) -> dict[str, Tensor]:
    """Losses on tokens [B, T + 1]: the trunk learns the teacher's trunk, the MTP layer its greedy tokens."""
    head = net.head_weight.detach().to(net.compute_dtype)
    with torch.no_grad():
        wanted = teacher(tokens[:, :-1])
    hidden = net(tokens[:, :-1])
    targets = tokens[:, 1:].flatten()
    main, rise = fused_distillation(hidden.flatten(0, 1), head, wanted.flatten(0, 1), targets, hard)
    if net.mtp is None or mtp_weight <= 0:
        return {"loss": main, "main": main.detach(), "rise": rise}
    rows = max(1, round(len(tokens) * mtp_share))
    greedy = F.linear(wanted[:rows, 1:], head).argmax(-1)
    guess = net.draft(hidden[:rows, :-1].detach(), tokens[:rows, 1:-1])
    mtp = fused_cross_entropy(guess.flatten(0, 1), head, greedy.flatten())
    return {"loss": main + mtp_weight * mtp, "main": main.detach(), "mtp": mtp.detach(), "rise": rise}
