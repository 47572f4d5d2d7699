"""Pruning without training: which experts, neurons and weights to cut, and how the rest compensates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from farthing.compress.calibrate import InputStats
from farthing.compress.layer import Layer, TracedOps
from farthing.compress.quantize import Feedback, sweep
from farthing.compress.transform import Stats, grams_of, parts_of
from farthing.compress.work import LayerWork
from farthing.model import FeedForward, LayerSource, MemorySource
from farthing.model.forms import Experts
from farthing.model.spec import GATED
from farthing_lab.compress.masks import BLOCKS, block_scores, global_budgets, mask, scores
from farthing_lab.compress.ranges import StudyRecorder
from farthing_lab.compress.settings import Prune, Settings


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """Number of experts to keep per layer."""

    per_group: int
    groups: int

    @property
    def kept(self) -> int:
        """Experts kept per layer."""
        return self.per_group * self.groups


def plan_experts(experts: int, share: float, groups: int, topk_groups: int, top_k: int) -> ExpertPlan:
    """Drop about `share` of the experts while top_k stays reachable. Raises ValueError if it cannot.

    Every group keeps the same number, at least two (a group's score is its two best), and the selected groups
    together keep at least top_k.

    REAP's saliency (Lasby et al. 2025): the mean, over the tokens routed to an expert, of its gate times the
    norm of its output. Group-limited routing needs groups of equal size, so every group loses the same
    number.
    """
    if not 0 <= share < 1:
        raise ValueError(f"experts: got {share}; expected a share in [0, 1) of routed experts to drop")
    size = experts // groups
    per_group = round(size * (1 - share))
    least = max(-(-top_k // topk_groups), min(2, size) if groups > 1 else 1)
    if per_group < least:
        raise ValueError(
            f"experts: got {share}; {per_group} of {size} experts would remain in each of {groups} groups, "
            f"but top_k = {top_k} over {topk_groups} groups needs {least}; "
            f"expected at most {1 - least / size:.3g}"
        )
    return ExpertPlan(per_group, groups)


def choose_experts(saliency: Tensor, tokens: Tensor, plan: ExpertPlan) -> list[int]:
    """Ids to keep, ascending: the most salient of every group. saliency [E] is a sum over tokens [E].

    An expert that was never selected has saliency 0 and is pruned first.
    """
    mean = torch.where(tokens > 0, saliency / tokens.clamp_min(1), torch.zeros_like(saliency))
    groups = mean.view(plan.groups, -1)
    best = groups.topk(plan.per_group, dim=1).indices.sort(1).values
    offset = torch.arange(plan.groups).unsqueeze(1) * groups.shape[1]
    return [int(i) for i in (best + offset).flatten()]


def keep_experts(layer: Layer, ids: list[int]) -> None:
    """Drop all other routed experts and renumber."""
    mlp = f"{layer.prefix}mlp"
    old = {n: t for n, t in layer.tensors.items() if n.startswith(f"{mlp}.experts.")}
    formats = dict(layer.formats)
    for name in old:
        del layer.tensors[name]
        layer.formats.pop(name.rpartition(".")[0], None)
    for new, e in enumerate(ids):
        for part in GATED:
            source, target = f"{mlp}.experts.{e}.{part}", f"{mlp}.experts.{new}.{part}"
            layer.tensors[f"{target}.weight"] = old[f"{source}.weight"]
            if source in formats:
                layer.formats[target] = formats[source]
            else:
                layer.stored[f"{target}.weight"] = layer.stored[f"{source}.weight"]
    index = torch.tensor(ids)
    for leaf in ("weight", "e_score_correction_bias"):
        if f"{mlp}.gate.{leaf}" in layer.tensors:
            layer.tensors[f"{mlp}.gate.{leaf}"] = layer.tensors[f"{mlp}.gate.{leaf}"][index]
    _change(layer, lambda e: replace(e, router=replace(e.router, num_experts=len(ids) + e.router.identities)))


def _change(layer: Layer, change: Callable[[Experts], Experts]) -> None:
    """Give a layer other experts."""
    feed = layer.config.feed(layer.index)
    assert feed.experts is not None
    layer.config = layer.config.with_feed(layer.index, replace(feed, experts=change(feed.experts)))


# Retrain the remaining weights of a pruned layer with a few steps of gradient descent.
#
# Student: the pruned feed-forward on the pruned model's hidden states. Teacher: the layer's output in the
# unpruned model, so that training also compensates the error of earlier layers (block-wise
# reconstruction, as in BRECQ, Li et al. 2021, and EBFT, Guo et al. 2024). Zeros stay zeros.
#
# Legend: T calibration tokens; D hidden size.

BATCH = 2048  # tokens per step
RATE = 0.01  # learning rate relative to a matrix's root mean square
WARMUP = 5


@dataclass(frozen=True, slots=True)
class Healed:
    """Squared error relative to the square of the layer's contribution, at the first and last steps."""

    before: float
    after: float


def heal(layer: Layer, masks: Mapping[str, Tensor], x: Tensor, target: Tensor, steps: int) -> Healed:
    """Train the masked matrices of the feed-forward of `layer`: x [T, D] -> target [T, D], with residual.

    Adam with a rate that decays to zero. Needs memory for four copies of the trained matrices. Replaces the
    masked matrices of `layer`; attention, router and norms do not change.

    Student: the pruned feed-forward on the pruned model's hidden states. Teacher: the layer's output in the
    unpruned model, so that training also compensates the error of earlier layers (block-wise reconstruction,
    as in BRECQ, Li et al. 2021, and EBFT, Guo et al. 2024). Zeros stay zeros.

    Legend: T calibration tokens; D hidden size.
    """
    names = [m for m in masks if ".mlp." in m]
    if not names:
        raise ValueError("heal_steps needs a pruned feed-forward; none has a mask")
    parameters = {m: layer.weight(m).clone().requires_grad_() for m in names}
    groups = [
        {"params": [p], "lr": RATE * float(p.detach().square().mean().sqrt())} for p in parameters.values()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _rate(s, steps))
    generator = torch.Generator().manual_seed(layer.index)
    norm = float((target - x).square().mean()) or 1.0
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            pick = torch.randperm(len(x), generator=generator)[:BATCH]
            loss = (_forward(layer, parameters, masks, x[pick]) - target[pick]).square().mean() / norm
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    for m in names:
        layer.set(m, parameters[m].detach() * masks[m])
    few = max(1, min(4, steps // 4))
    return Healed(sum(losses[:few]) / few, sum(losses[-few:]) / few)


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _forward(layer: Layer, parameters: dict[str, Tensor], masks: Mapping[str, Tensor], x: Tensor) -> Tensor:
    changed = {f"{m}.weight": p * masks[m] for m, p in parameters.items()}
    source = MemorySource({**layer.tensors, **changed})
    experts = layer.config.feed(layer.index).experts
    router = experts.router if experts else None
    return FeedForward(LayerSource(layer.config, TracedOps(), source, layer.index, router))(x)


def neuron_scores(down: Tensor, energy: Tensor) -> Tensor:
    """E[a_i^2] ||down_i||^2, [I]: down [D, I], energy [I] of its input."""
    return energy * down.square().sum(0)


def choose_neurons(score: Tensor, keep: int) -> list[int]:
    """Ids of the `keep` best, ascending."""
    if not 1 <= keep <= len(score):
        raise ValueError(f"keep: got {keep}; expected 1 to {len(score)} neurons")
    return [int(i) for i in score.topk(keep).indices.sort().values]


def kept_neurons(width: int, share: float, multiple: int = 16) -> int:
    """Neurons left after dropping about `share`, rounded to a multiple of `multiple`."""
    if not 0 <= share < 1:
        raise ValueError(f"neurons: got {share}; expected a share in [0, 1)")
    kept = max(multiple, round(width * (1 - share) / multiple) * multiple)
    return min(kept, width)


def slice_mlp(gate: Tensor, up: Tensor, down: Tensor, keep: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The MLP with only the neurons `keep`."""
    index = torch.tensor(keep)
    return gate[index], up[index], down[:, index]


WORK_BYTES = 2**26  # of inverses processed at once
DAMP = 0.01  # relative to the mean diagonal


@dataclass(frozen=True, slots=True)
class Trace:
    """The order in which the blocks of every strip are cut, and the cost of each in output energy.

    Costs never fall along a strip: a block that can only be cut after an expensive one costs as much.
    """

    order: Tensor  # [B, S, steps] int64, blocks along K
    cost: Tensor  # [B, S, steps] float32, the sum over calibration tokens of |change of y|^2

    def keep(self, drop: Tensor, cells: tuple[int, int], columns: int) -> Tensor:
        """The mask [B, N, K] when strip s of matrix b loses its first drop[b, s] blocks."""
        b, s, steps = self.order.shape
        gone = torch.zeros(b, s, columns // cells[1], dtype=torch.bool)
        gone.scatter_(2, self.order, torch.arange(steps) < drop.unsqueeze(2))
        return ~gone.repeat_interleave(cells[0], 1).repeat_interleave(cells[1], 2)


def normalized(gram: Tensor, damp: float = DAMP) -> tuple[Tensor, Tensor]:
    """gram [B, K, K] over its mean diagonal, damped, in float64; and that mean, [B]."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-20)
    eye = torch.eye(gram.shape[-1], dtype=torch.float64)
    return gram.double() / mean.double().view(-1, 1, 1) + damp * eye, mean


def saliency(w: Tensor, gram: Tensor, damp: float = DAMP) -> Tensor:
    """w^2 / [H^-1]_kk of w [B, N, K]: the cost of cutting a weight alone, with the others adapting."""
    h, mean = normalized(gram, damp)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h)).diagonal(dim1=1, dim2=2)
    return w.square() / inverse.float().unsqueeze(1) * mean.view(-1, 1, 1)


def block_trace(w: Tensor, gram: Tensor, cells: tuple[int, int], most: float, damp: float = DAMP) -> Trace:
    """Cut blocks of w [B, N, K] one by one, the cheapest of each strip first, up to a share `most` of it.

    gram [B, K, K] = sum of x x^T. After every cut the remaining weights of the strip take the least-squares
    update, so later costs are those of the updated weights. K^2 c operations per cut and strip.
    Raises ValueError if blocks do not tile the matrix.
    """
    (r, c), (b, n, k) = cells, w.shape
    if n % r or k % c:
        raise ValueError(f"blocks of {r}x{c} do not tile a matrix of {n}x{k}; expected multiples of both")
    h, mean = normalized(gram, damp)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h)).float()
    strips, steps = n // r, max(1, int(most * (k // c)))
    values = w.reshape(b * strips, r, k)
    orders, costs = [], []
    for part in _parts(b * strips, 4 * k * k):
        matrix = torch.div(part, strips, rounding_mode="floor")
        order, cost = _cut(values[part].clone(), inverse[matrix].clone(), c, steps)
        orders.append(order)
        costs.append(cost * mean[matrix].unsqueeze(1))
    shape = (b, strips, steps)
    return Trace(torch.cat(orders).view(shape), torch.cat(costs).cummax(1).values.view(shape))


def _parts(count: int, size: int) -> Iterator[Tensor]:
    yield from torch.arange(count).split(max(1, WORK_BYTES // size))


def _cut(values: Tensor, inverse: Tensor, c: int, steps: int) -> tuple[Tensor, Tensor]:
    """values [P, r, K] and inverse [P, K, K], one strip each and overwritten -> (order, cost), [P, steps]."""
    p, r, k = values.shape
    strip, offset = torch.arange(p), torch.arange(c)
    alive = torch.ones(p, k // c, dtype=torch.bool)
    orders, costs = [], []
    for _ in range(steps):
        diagonal = inverse.view(p, k // c, c, k // c, c).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        factor, failed = torch.linalg.cholesky_ex(diagonal)  # [P, C, c, c]
        columns = values.view(p, r, k // c, c).permute(0, 2, 3, 1)  # [P, C, c, r]
        score = torch.linalg.solve_triangular(factor, columns, upper=False).square().sum((2, 3))
        score = score.masked_fill(~alive | (failed != 0) | score.isnan(), torch.inf)
        best = score.argmin(1)
        orders.append(best)
        costs.append(score[strip, best])
        index = best.unsqueeze(1) * c + offset  # [P, c]
        along, across = index.unsqueeze(2).expand(p, c, k), index.unsqueeze(1)
        rows = inverse.gather(1, along)
        solved = torch.cholesky_solve(rows, factor[strip, best])  # [P, c, K]
        values -= values.gather(2, across.expand(p, r, c)) @ solved
        values.scatter_(2, across.expand(p, r, c), 0.0)
        inverse -= rows.transpose(1, 2) @ solved
        inverse.scatter_(1, along, 0.0).scatter_(2, across.expand(p, k, c), 0.0)
        inverse[strip.unsqueeze(1), index, index] = 1.0  # keeps the factorization of a cut block defined
        alive[strip, best] = False
    return torch.stack(orders, 1), torch.stack(costs, 1)


def cheapest(traces: list[Trace], blocks: int) -> list[Tensor]:
    """Number of blocks that every strip loses, [B, S] each, when one threshold cuts `blocks` in total.

    A row of y = W x with second moments H = E[x x^T] that loses the columns b costs at least w_b^T
    ([H^-1]_bb)^-1 w_b after the remaining columns compensate (Hassibi and Stork 1993; Frantar and Alistarh
    2022 for blocks). Rows of one block lose the same columns, so they share one inverse; they form a "strip".

    Legend: B matrices; N rows; K columns; r, c rows and columns of a block; S = N / r strips; C = K / c.
    """
    if blocks < 1:
        return [torch.zeros(t.cost.shape[:2], dtype=torch.int64) for t in traces]
    flat = torch.cat([t.cost.flatten() for t in traces])
    if blocks > flat.numel():
        raise ValueError(f"{blocks} blocks to cut; expected at most {flat.numel()}")
    threshold = flat.kthvalue(blocks).values
    return [(t.cost <= threshold).sum(2) for t in traces]


def least_squares(w: Tensor, gram: Tensor, keep: Tensor, rows: int = 1, damp: float = DAMP) -> Tensor:
    """The weights w^ [B, N, K], masked by `keep`, with the least sum over tokens of |w^ x - w x|^2.

    Damping keeps w^ near w. `rows` consecutive rows share a mask, and one factorization of K^3 / 3.
    """
    b, n, k = w.shape
    h, _ = normalized(gram, damp)
    out = torch.empty(b * n // rows, rows, k)
    values, masks = w.reshape(-1, rows, k), keep.reshape(-1, rows, k)[:, 0].double()
    for part in _parts(len(values), 8 * k * k):
        mine, m = h[torch.div(part, n // rows, rounding_mode="floor")], masks[part]
        target = (values[part].double() @ mine) * m.unsqueeze(1)
        kept = mine * m.unsqueeze(1) * m.unsqueeze(2) + torch.diag_embed(1 - m)
        solution = torch.cholesky_solve(target.transpose(1, 2), torch.linalg.cholesky(kept))
        out[part] = (solution.transpose(1, 2) * m.unsqueeze(1)).float()
    return out.view(b, n, k)


MOST = 0.9  # maximum share that a strip of blocks loses


def prune_layer(layer: Layer, stats: Stats, recipe: Settings) -> dict[str, Tensor]:
    """Prune `layer` by the recipe and update its remaining weights; returns module -> mask [N, K]."""
    p = recipe.prune
    if p is None:
        return {}
    masks = (
        _traced(layer, stats, p) if p.score == "obs" and p.pattern in BLOCKS_OBS else _scored(layer, stats, p)
    )
    for family in layer.families():
        for part in parts_of(layer, [m for m in family if m in masks]):
            w = torch.stack([layer.weight(m) for m in part])
            keep = torch.stack([masks[m] for m in part])
            for module, value in zip(
                part, _remaining(w, keep, grams_of(layer, stats, part), recipe), strict=True
            ):
                layer.set(module, value)
    return masks


BLOCKS_OBS = tuple(b for b in BLOCKS if b != "unstructured")


def _remaining(w: Tensor, keep: Tensor, gram: Tensor | None, recipe: Settings) -> Tensor:
    p = recipe.prune
    assert p is not None
    if p.compensation == "none" or gram is None:
        return w * keep
    if p.compensation == "sweep":
        return sweep(w, Feedback.of(gram, recipe.act_order, recipe.damp), keep=keep)[0]
    return least_squares(w, gram, keep, BLOCKS.get(p.pattern, (1, 1))[0], recipe.damp)


def targets_of(layer: Layer, p: Prune) -> Iterator[list[str]]:
    """The modules to prune, family by family."""
    for family in layer.families():
        targets = [m for m in family if (p.targets == "all" or ".mlp." in m) and p.share(m) > 0]
        if targets:
            yield targets


# -- blocks, by the cost of cutting them one after the other


def _traced(layer: Layer, stats: Stats, p: Prune) -> dict[str, Tensor]:
    """Masks by the costs of `block_trace`. `scope`: strips of a matrix, family or layer share a threshold.

    Across families, costs are relative to the family's output energy.
    """
    cells = BLOCKS[p.pattern]
    masks: dict[str, Tensor] = {}
    groups: list[list[tuple[list[str], Trace, int]]] = []
    for family in targets_of(layer, p):
        entries = []
        for part in parts_of(layer, family):
            w, gram = torch.stack([layer.weight(m) for m in part]), grams_of(layer, stats, part)
            if gram is None:
                raise ValueError(f"{part[0]} has no input statistics; score 'obs' needs calibration text")
            if any(size % cell for size, cell in zip(w.shape[1:], cells, strict=True)):
                raise ValueError(
                    f"{part[0]} is {w.shape[1]}x{w.shape[2]}, which blocks of {p.pattern} do not tile; set "
                    "its sparsity to 0 in prune.shares, or choose another pattern"
                )
            trace = block_trace(w, gram, cells, MOST)
            if p.scope == "layer":
                trace = Trace(trace.order, trace.cost / ((w @ gram) * w).sum().clamp_min(1e-30) * len(part))
            entries.append((part, trace, w.shape[2]))
        groups += [[e] for e in _single(entries)] if p.scope == "matrix" else [entries]
    if p.scope == "layer":
        groups = [[e for group in groups for e in group]]
    for group in groups:
        wanted = sum(p.share(m) * t.order.shape[1] * (k // cells[1]) for part, t, k in group for m in part)
        dropped = cheapest([t for _, t, _ in group], round(wanted))
        for (part, trace, k), drop in zip(group, dropped, strict=True):
            masks |= dict(zip(part, trace.keep(drop, cells, k), strict=True))
    return masks


def _single(entries: list[tuple[list[str], Trace, int]]) -> Iterator[tuple[list[str], Trace, int]]:
    for part, trace, k in entries:
        for i, module in enumerate(part):
            yield [module], Trace(trace.order[i : i + 1], trace.cost[i : i + 1]), k


# -- anything, by a score of each weight


def _scored(layer: Layer, stats: Stats, p: Prune) -> dict[str, Tensor]:
    budgets = _budgets(layer, stats, p)
    per_row = p.score in ("wanda", "obs") and p.pattern == "unstructured"
    return {
        m: mask(_score(layer.weight(m), stats.get(layer.reads(m)), p, mean=True), share, p.pattern, per_row)
        for m, share in budgets.items()
    }


def _score(w: Tensor, st: InputStats | None, p: Prune, mean: bool) -> Tensor:
    """Scores of one matrix, using input energies as a mean over tokens or as a sum."""
    if p.score == "obs":
        if st is None or st.gram is None:
            raise ValueError("score 'obs' needs calibration text; expected second moments of every input")
        return saliency(w[None], st.gram[None])[0]
    energy = None if st is None else st.mean_energy() if mean else st.energy
    return scores(w, energy, p.score)


def _budgets(layer: Layer, stats: Stats, p: Prune) -> dict[str, float]:
    """Sparsity of each module: the recipe's, or from one threshold over a family or the layer.

    Experts of a layer compete: energy is summed over all tokens, so an expert with few tokens loses more.
    Families (all gates, all downs, one attention matrix) are normalized by their mean and compete within the
    layer if the scope is the layer.
    """
    budgets: dict[str, float] = {}
    pieces: dict[str, Tensor] = {}
    for targets in targets_of(layer, p):
        if p.scope == "matrix":
            budgets |= {m: p.share(m) for m in targets}
            continue
        cells = BLOCKS.get(p.pattern, (1, 1))
        blocks = {
            m: block_scores(_score(layer.weight(m), stats.get(layer.reads(m)), p, mean=False), cells)
            for m in targets
        }
        average = torch.cat([b.flatten() for b in blocks.values()]).mean().clamp_min(1e-30)
        if p.scope == "family":
            budgets |= global_budgets(blocks, p.share(targets[0]))
        pieces |= {m: b / average for m, b in blocks.items()}
    return global_budgets(pieces, p.sparsity) if p.scope == "layer" else budgets


BITS = 17


def spread(layers: Iterable[Layer], prune: Prune) -> Prune:
    """`prune` with its 'global' scope converted to shares per family; experts of a layer still compete.

    No family loses more than MOST; the excess is not taken from others.

    The checkpoint is read one layer at a time, keeping a histogram per family. Scores are positive floats,
    whose bits sort like their values; the first 17 bits after the sign resolve 1 in 512.
    """
    counts: dict[str, Tensor] = {}
    for layer in layers:
        for family in targets_of(layer, prune):
            tally = torch.zeros(2**BITS, dtype=torch.int64)
            for module in family:
                score = block_scores(scores(layer.weight(module), None, prune.score), BLOCKS[prune.pattern])
                index = score.float().contiguous().view(torch.int32).flatten() >> (31 - BITS)
                tally += torch.bincount(index, minlength=2**BITS)
            counts[pattern_of(family[0])] = tally
    every = torch.stack(list(counts.values())).sum(0)
    drop = round(prune.sparsity * int(every.sum()))
    edge = int(torch.searchsorted(every.cumsum(0), drop))  # bin of the threshold
    within = (drop - int(every[:edge].sum())) / max(int(every[edge]), 1)
    shares = tuple(
        (name, min((int(c[:edge].sum()) + within * int(c[edge])) / int(c.sum()), MOST))
        for name, c in counts.items()
    )
    return replace(prune, scope="family", shares=(*prune.shares, *shares))


def pattern_of(module: str) -> str:
    """The fnmatch pattern of a module's family."""
    pieces = module.split(".")
    return ".".join(
        "*" if before == "experts" else p for before, p in zip(["", *pieces], pieces, strict=False)
    )


# Cut experts and neurons, the same number in every layer, since config.json has one number for all.


def prune_structure(work: LayerWork, recipe: Settings) -> dict[str, int]:
    """Cut a layer's experts and neurons by its recorded inputs; returns what changes in config.json."""
    layer, recorder, changes = work.layer, work.recorder, {}
    assert isinstance(recorder, StudyRecorder)
    experts, inputs = layer.config.feed(layer.index).experts, dict(recorder.inputs)
    if recipe.experts:
        assert experts is not None, "as `Settings.check` asks"
        rule = experts.router
        plan = plan_experts(layer.experts, recipe.experts, rule.num_groups, rule.top_k_groups, rule.top_k)
        name = f"{layer.prefix}mlp"
        pad = layer.experts - len(recorder.experts[name])
        saliency = torch.nn.functional.pad(recorder.saliency[name], (0, pad))
        kept = choose_experts(saliency, torch.nn.functional.pad(recorder.experts[name], (0, pad)), plan)
        keep_experts(layer, kept)
        changes["n_routed_experts"] = len(kept)
        for new, old in enumerate(kept):
            for part in ("gate_proj", "down_proj"):
                before, after = (f"{name}.experts.{e}.{part}" for e in (old, new))
                if before in recorder.inputs:
                    inputs[after] = recorder.inputs[before]
    if recipe.neurons:
        assert experts is not None
        width = kept_neurons(experts.width, recipe.neurons)
        for mlp in layer.mlps():  # the shared expert's width follows the routed experts'
            times = experts.shared_count if mlp.endswith("shared_experts") else 1
            _prune_neurons(layer, mlp, inputs.get(f"{mlp}.down_proj"), width * times)
        _change(layer, lambda e: replace(e, width=width, shared=width * e.shared_count))
        changes["moe_intermediate_size"] = width
    return changes


def _prune_neurons(layer: Layer, mlp: str, stats: InputStats | None, width: int) -> None:
    gate, up, down = (layer.weight(f"{mlp}.{p}_proj") for p in ("gate", "up", "down"))
    energy = stats.mean_energy() if stats and stats.tokens else torch.ones(down.shape[1])
    keep = choose_neurons(neuron_scores(down, energy), width)
    for part, value in zip(("gate", "up", "down"), slice_mlp(gate, up, down, keep), strict=True):
        layer.set(f"{mlp}.{part}_proj", value)


def feed_forward_input(work: LayerWork) -> Tensor:
    """The residual stream after attention, [T, D]."""
    seen: list[Tensor] = []

    class Window(TracedOps):
        def moe(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
            seen.append(x)
            return x

        def mlp(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
            seen.append(x)
            return x

    work.forward(Window())
    return torch.cat(seen)
