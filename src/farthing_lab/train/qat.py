"""Quantization-aware training of a trained checkpoint: smoothing, falling bits, the run, the export.

Inputs are smoothed first (`qat.py`), which changes no output. Every projection gets learned weight scales
and rounded inputs (`lsq.py`). Weights reach 4 bits by GPTQ (`qat_model.py`), and each change of bits
starts block by block: each layer learns to reproduce the float layer's outputs from the quantized layers'
inputs (as BRECQ, Li et al. 2021). Then all layers train end to end on the float model's next-token
distributions.

Shapes: B windows, T positions, D hidden.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from farthing.checkpoint import CheckpointWriter
from farthing.checkpoint import compressed_tensors as ct
from farthing.files import replace, replace_json
from farthing.ops.weights import Weight, pack_int4
from farthing_lab.train import qat_model
from farthing_lab.train.evaluate import Points, distillation, plot
from farthing_lab.train.export import config_json, load_checkpoint, pack, to_tensors
from farthing_lab.train.finetune import (
    Settings,
    Sources,
    Text,
    adam,
    curve,
    determining,
    freeze_top,
    interval,
    perplexity,
    provenance,
    resampled,
    weights_sha256,
    window_nats,
)
from farthing_lab.train.loop import BaseHook, LoopConfig, Schedule, Trainer, check_start, require_same
from farthing_lab.train.lsq import Kind, Precision, QuantizedProduct
from farthing_lab.train.model import MLP, Block, DeepSeekLM, MoE, RMSNorm
from farthing_lab.train.need import Activity, measure, mlps, random_twin
from farthing_lab.train.qat_model import BlockHook, QatConfig, QatModel, round_by_gptq, squared_gradients

# Smoothing before 4-bit activations: moves the scale differences between input channels into the weights.
#
# A group of inputs shares one range, so its largest channel determines how coarsely the others are
# rounded. Dividing channel j by s_j = rms_j ** strength and multiplying column j of the weights by s_j
# changes no output (as SmoothQuant, Xiao et al. 2023). The division is free: it is folded into the
# preceding norm or, for the inputs of a down projection, into the rows of the up projection.
#
# Shapes: D channels, E experts, I neurons.

LEAST = 0.05  # of the median: floor, so that a nearly silent channel is not amplified further


@torch.no_grad()
def smooth(net: DeepSeekLM, tokens: Tensor, strength: float = 0.5) -> None:
    """Fold the smoothing of every 4-bit input into `net`, from statistics on tokens [B, T + 1].

    The net computes the same function afterwards. The latent's up-projection is left alone: its input keeps 8
    bits. Raises ValueError for a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"smoothing: got {strength}; expected 0 (off) to 1 (all channels alike)")
    if strength == 0:
        return
    seen: dict[RMSNorm, Tensor] = {}
    watching = [norm.register_forward_hook(_sum_squares(seen)) for norm, _ in _norms(net)]
    try:
        activities = measure(net, tokens, tau=0.0)
    finally:
        for handle in watching:
            handle.remove()
    for norm, columns in _norms(net):
        s = _scales(seen[norm].sqrt(), strength)
        norm.weight.div_(s)
        for column in columns:
            column.mul_(s)
    for name, mlp in mlps(net):
        _fold_neurons(mlp, activities[name], strength)


def _sum_squares(seen: dict[RMSNorm, Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(norm: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(norm, RMSNorm)
        square = out.detach().flatten(0, -2).float().square().sum(0)
        seen[norm] = seen.get(norm, torch.zeros_like(square)) + square

    return hook


def _scales(rms: Tensor, strength: float) -> Tensor:
    """s [..., D] with geometric mean 1, from values proportional to the rms [..., D]."""
    floor = rms.median(-1, keepdim=True).values * LEAST
    s = torch.where(floor > 0, rms.maximum(floor), torch.ones_like(rms)) ** strength
    scales: Tensor = s / s.log().mean(-1, keepdim=True).exp()
    return scales


def _norms(net: DeepSeekLM) -> Iterator[tuple[RMSNorm, Sequence[Tensor]]]:
    """(norm, the weights [..., D] that read only its output)."""
    blocks: list[Block] = [*net.layers, *([net.mtp.block] if net.mtp is not None else [])]  # type: ignore[list-item]
    for block in blocks:
        attention, mlp = block.self_attn, block.mlp
        yield block.input_layernorm, [attention.q_a_proj.weight, attention.kv_a_proj_with_mqa.weight]
        yield attention.q_a_layernorm, [attention.q_b_proj.weight]
        if isinstance(mlp, MoE):
            shared = mlp.shared_experts
            readers = [mlp.gate.weight, mlp.gate_up, shared.gate_proj.weight, shared.up_proj.weight]
        else:
            readers = [mlp.gate_proj.weight, mlp.up_proj.weight]
        yield block.post_attention_layernorm, readers
    if net.mtp is not None:
        own, next_ = net.mtp.eh_proj.weight.chunk(2, 1)
        yield net.mtp.enorm, [own]
        yield net.mtp.hnorm, [next_]


def _fold_neurons(mlp: MLP | MoE, activity: Activity, strength: float) -> None:
    """Fold by the rms of neuron j: energies are of |h_j| ||W_down[:, j]||, so divide by the column norm."""
    if isinstance(mlp, MoE):
        size = activity.energy.sqrt() / mlp.down.norm(dim=1).clamp_min(1e-12)
        s = _scales(size, strength)
        mlp.gate_up[:, 1].div_(s[..., None])
        mlp.down.mul_(s[:, None])
    else:
        down = mlp.down_proj.weight
        s = _scales(activity.energy[0].sqrt() / down.norm(dim=0).clamp_min(1e-12), strength)
        mlp.up_proj.weight.div_(s[:, None])
        down.mul_(s)


# Export a quantization-aware training run to a compressed-tensors checkpoint that the engine serves.
#
# Weights are written as the integers that training rounded to. Below 8 bits the rounding of inputs is
# written too (`input_activations` of 4 bits in the weights' groups, and each module's `input_clip`), and
# the CPU kernels apply it: 4-bit integers in int8 registers. Other servers apply their own rounding.

# Projections that read the same tensor are served as one matrix, so their input is rounded once.
SIBLINGS = (("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"))


def is_exportable(precision: Precision, inputs: Kind) -> bool:
    """Whether a checkpoint can hold the format: the kernels have 4-bit weights and input ranges by group."""
    return precision.weights == 4 and precision.activations != 16 and inputs == "group"


@torch.no_grad()
def tie_inputs(student: QatModel) -> None:
    """Set one clip for projections that read the same tensor: the geometric mean of the learned ones."""
    for name in student.weights():
        parent, _, last = name.rpartition(".")
        for first, second in SIBLINGS:
            if last != first:
                continue
            pair = [student.product_of(f"{parent}.{part}").input_quantizer for part in (first, second)]
            mean = torch.stack([q.log_scale for q in pair]).mean()
            for quantizer in pair:
                quantizer.log_scale.copy_(mean)


def save_quantized(student: QatModel, source: Path, out: Path) -> int:
    """Write the student with 4-bit weights; returns the size of the weight files in bytes.

    Raises ValueError if a product has another format (see `is_exportable`).
    """
    tie_inputs(student)
    tensors = pack(to_tensors(student.net), fp8=False)
    keys: dict[str, ct.GroupKey | None] = {"lm_head": None}
    writer = CheckpointWriter(out)
    done: set[str] = set()
    for name, weight in student.weights().items():
        product = student.product_of(name)
        for module, matrix, clip in _matrices(student, name, weight, product):
            activations = "group4" if clip is not None else "token"
            keys[module] = ct.GroupKey("int4", matrix.group_size, True, activations)
            for key, tensor in ct.encode(module, matrix).items():
                writer.add(key, tensor)
            if clip is not None:
                writer.add(f"{module}.input_clip", torch.tensor(clip))
            done.add(f"{module}.weight")
    for key, tensor in tensors.items():
        if key not in done:
            writer.add(key, tensor)
    config = config_json(student.net.cfg, fp8=False)
    writer.close(config | {"quantization_config": ct.quantization_config(keys)}, copy_from=source)
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def _matrices(
    student: QatModel, name: str, weight: Tensor, product: QuantizedProduct
) -> list[tuple[str, Weight, float | None]]:
    """(checkpoint module, its matrix, clip of its input or None) for one product."""
    inputs = product.input_quantizer
    precision = Precision(product.weight_quantizer.bits, inputs.bits)
    if not is_exportable(precision, inputs.kind):
        raise ValueError(f"{name}: got {precision} by {inputs.kind}; expected W4A4 or W4A8 by group")
    clip = float(inputs.log_scale.detach().exp()) if inputs.bits == 4 else None
    q, scale = product.weight_quantizer.integers(weight)
    matrices = [Weight("int4", pack_int4(q[b]), scale[b].float().contiguous()) for b in range(len(q))]
    module = module_name(name, student.net.cfg.num_hidden_layers)
    if name.endswith(".gate_up"):
        mlp, half = module.removesuffix(".gate_up"), q.shape[1] // 2
        found = []
        for b, matrix in enumerate(matrices):
            assert matrix.scale is not None
            for part, rows in (("gate_proj", slice(0, half)), ("up_proj", slice(half, None))):
                own = dataclasses.replace(matrix, data=matrix.data[rows], scale=matrix.scale[rows])
                found.append((f"{mlp}.experts.{b}.{part}", own, clip))
        return found
    if name.endswith("mlp.down"):
        mlp = module.removesuffix(".down")
        return [(f"{mlp}.experts.{b}.down_proj", m, clip) for b, m in enumerate(matrices)]
    return [(module, matrices[0], clip)]


def module_name(name: str, hidden_layers: int) -> str:
    """Map the training model's name of a projection to the checkpoint's module."""
    if name.startswith("mtp."):
        return f"model.layers.{hidden_layers}." + name.removeprefix("mtp.").removeprefix("block.")
    return f"model.{name}"


SMOOTHING_WINDOWS = 16  # of text to measure inputs on


def learn_blocks(student: QatModel, teacher: DeepSeekLM, tokens: Tensor, precision: Precision) -> list[float]:
    """Layer by layer, on tokens [B, T]: lower the bits, then learn the float layer's output.

    Returns each layer's relative squared error after learning.
    """
    config, net = student.config, student.net
    turn = net.turn[: tokens.shape[1]]
    per_step = max(1, config.block_tokens // tokens.shape[1])
    errors: list[float] = []
    with torch.no_grad():
        theirs = nn.functional.embedding(tokens, teacher.embed_tokens)
    ours = theirs
    net.train(False)
    for i, (layer, float_layer) in enumerate(zip(net.layers, teacher.layers, strict=True)):
        with torch.no_grad():
            theirs = float_layer(theirs, turn)
        prefix = f"layers.{i}."
        student.start(precision, prefix)
        scales = [p for n, p in student.products.named_parameters() if n.startswith(prefix.replace(".", "/"))]
        weights = [p for p in layer.parameters() if p.requires_grad]
        optimizer = adam(
            [{"params": weights, "lr": config.weight_lr}, {"params": scales, "lr": config.scale_lr}]
        )
        power = theirs.square().mean()
        for step in range(config.block_steps):
            rows = torch.arange(step * per_step, (step + 1) * per_step) % len(tokens)
            for group, lr in zip(optimizer.param_groups, (config.weight_lr, config.scale_lr), strict=True):
                group["lr"] = lr * (1 - step / config.block_steps)
            optimizer.zero_grad()
            loss = (layer(ours[rows], turn) - theirs[rows]).square().mean() / power
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            ours = torch.cat([layer(part, turn) for part in ours.split(4)])
            errors.append(float((ours - theirs).square().mean() / power))
    student.start(precision)
    return errors


class StageHook(BaseHook):
    """Lowers the bits when a stage begins and learns block by block before training continues."""

    def __init__(self, teacher: DeepSeekLM, text: Text, settings: Settings, console: Console) -> None:
        self.teacher, self.text, self.settings, self.console = teacher, text, settings, console
        self.stage, self.loaded = -1, False

    def before_step(self, trainer: Trainer) -> None:
        """Start the stage for the current progress, if not yet started."""
        student = trainer.model
        assert isinstance(student, QatModel)
        wanted = student.config.stage(trainer.progress)
        if self.loaded:
            student.resume(student.config.stages[self.stage][1])
            self.loaded = False
        if wanted == self.stage:
            return
        before = student.config.stages[self.stage][1].weights if self.stage >= 0 else 16
        self.stage = wanted
        precision = student.config.stages[wanted][1]
        batch = self.text.batches.next(student.config.block_windows, self.settings.window)[:, :-1]
        batch = batch.to(self.settings.device)
        if student.config.gptq and before > precision.weights == 4:
            round_by_gptq(student, batch, precision)
        if student.config.block_steps and precision != Precision(16, 16):
            errors = learn_blocks(student, self.teacher, batch, precision)
            self.console.print(f"{precision}: error by layer " + " ".join(f"{e:.4f}" for e in errors))
        else:
            student.start(precision)

    def after_step(self, trainer: Trainer) -> None:
        """Record the bits."""
        assert isinstance(trainer.model, QatModel)
        precision = trainer.model.config.stages[self.stage][1]
        trainer.metrics["weight_bits"] = precision.weights
        trainer.metrics["activation_bits"] = precision.activations

    def state_dict(self) -> dict[str, Any]:
        """The stage. It determines the bits; ranges are in the model's state."""
        return {"stage": self.stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume the stage without learning its blocks again."""
        self.stage, self.loaded = state["stage"], True


def build(
    settings: Settings, config: QatConfig, console: Console, sources: Sources | None = None
) -> tuple[Trainer, Text, DeepSeekLM]:
    """A trainer ready to run or load, its text, and the float teacher."""
    torch.manual_seed(settings.seed)
    text = Text.load(settings, console, sources)
    teacher = load_checkpoint(settings.model).eval()
    teacher.set_compute_dtype(torch.bfloat16)
    net = copy.deepcopy(teacher)
    smooth(net, text.batches.next(SMOOTHING_WINDOWS, settings.window), config.smoothing)
    net.to(settings.device)
    hooks: list[BaseHook] = []
    if config.block is not None:
        windows = text.batches.next(config.fisher_windows, settings.window).to(settings.device)
        hooks.append(BlockHook(squared_gradients(net, windows)))
    student = QatModel(net, config)
    student.to(settings.device)
    teacher.to(settings.device)
    freeze_top(student.net)
    weights = [p for p in student.net.parameters() if p.requires_grad]
    optimizer = adam(
        [
            {"params": [p for p in weights if p.ndim > 1], "lr": config.weight_lr},
            {"params": [p for p in weights if p.ndim < 2], "lr": config.norm_lr},
            {"params": list(student.products.parameters()), "lr": config.scale_lr},
        ]
    )
    loop = LoopConfig(
        settings.out, None, settings.tokens, Schedule(warmup=0.02, decay=0.7), threads=settings.threads,
        eval_minutes=1.5, save_minutes=1.5,
    )  # fmt: skip

    def loss(module: nn.Module, tokens: Tensor, trainer: Trainer) -> dict[str, Tensor]:
        assert isinstance(module, QatModel)
        return distillation(module.net, teacher, tokens, config.hard, config.mtp_weight, config.mtp_share)

    def score(trainer: Trainer) -> dict[str, float]:
        assert isinstance(trainer.model, QatModel)
        value = perplexity(trainer.model.net, text.heldout, settings.window, settings.eval_tokens)
        return {"perplexity": value}

    hooks.append(StageHook(teacher, text, settings, console))
    trainer = Trainer(
        student, [optimizer], text.batches, lambda t: text.micro_batches(settings), loss,
        loop, hooks, evaluate=score, console=console,
    )  # fmt: skip
    return trainer, text, teacher


# A quantization-aware training run: train, export, report.

NEED_WINDOWS = 16  # of held-out text on which the need of blocks is measured
_CACHE = "untrained.pt"  # losses before training, for a resumed run


def untrained(
    teacher: DeepSeekLM, smoothed: DeepSeekLM, tokens: Tensor, config: QatConfig, precision: Precision
) -> Iterator[tuple[str, DeepSeekLM]]:
    """(name, net) of every way to reach the format without training; `smoothed` computes as the teacher does.

    Weights are rounded to nearest with the ranges of least error and, for 4 bits, by GPTQ on tokens [N, T].
    """
    for prefix, net in (("", teacher), ("smoothed ", smoothed)):
        rounded = QatModel(copy.deepcopy(net), config)
        rounded.start(precision)
        yield f"{prefix}nearest", rounded.net
        if precision.weights == 4:
            rounded = QatModel(copy.deepcopy(net), config)
            round_by_gptq(rounded, tokens, precision)
            yield f"{prefix}GPTQ", rounded.net


def train_qat(
    settings: Settings, config: QatConfig, resume: bool = False, console: Console | None = None
) -> dict[str, Any] | None:
    """Train a quantized checkpoint: write OUT/checkpoint, OUT/qat.json and OUT/qat.png.

    Returns the summary, or None if interrupted (state is saved). With `tensor` inputs there is no checkpoint.
    Raises ValueError if the last stage cannot be exported.
    """
    console = console or Console(stderr=True)
    require_exportable(config)
    sources = Sources.read(settings)
    given = determining(settings, config, sources)
    check_start(settings.out / "state.pt", given, resume)
    trainer, text, teacher = build(settings, config, console, sources)
    trainer.settings = given
    student = trainer.model
    assert isinstance(student, QatModel)

    def score(net: DeepSeekLM) -> Tensor:
        return window_nats(net, text.heldout, settings.window, settings.eval_tokens)

    precision = config.stages[-1][1]
    found = _stored(settings.out, given) if resume else None
    if found is None:
        found = {"float": score(teacher)}
        if config.block is None:
            batch = text.batches.next(config.block_windows, settings.window)[:, :-1].to(settings.device)
            for name, net in untrained(teacher, student.net, batch, config, precision):
                found[f"untrained, {name}"] = score(net)
            stored = {"settings": given, "found": found}
            replace(settings.out / _CACHE, lambda file: torch.save(stored, file))
    console.print(f"{precision}: " + "; ".join(f"{k} {_perplexity(v):.3f}" for k, v in found.items()))
    if resume:
        trainer.load()
    if not trainer.run():
        return None
    exported: dict[str, Any] = {}
    if config.inputs == "group":
        exported["weights_bytes"] = save_quantized(student, settings.model, settings.out / "checkpoint")
        exported["checkpoint_sha256"] = weights_sha256(settings.out / "checkpoint")
    found["trained"] = score(student.net)
    summary: dict[str, Any] = {
        "precision": str(precision),
        "perplexity": {name: _perplexity(rows) for name, rows in found.items()},
        **gained(found),
        **provenance(settings, config, text, sources),
        "config": config.recorded(),
        **({} if config.block is None else _zero_blocks(student, teacher, text, settings)),
        **exported,
        "minutes": trainer.active_seconds / 60,
        "tokens": trainer.tokens,
        "budgets": trainer.budgets,
        "curve": trainer.record,
    }
    _write(settings.out, summary, curve(trainer, "perplexity"))
    return summary


def _stored(out: Path, given: dict[str, Any]) -> dict[str, Tensor] | None:
    """Losses before training that the interrupted run stored, if it did; ValueError if it was another run."""
    cache = out / _CACHE
    stored: dict[str, Any] = torch.load(cache, weights_only=True) if cache.is_file() else {}
    if "settings" not in stored:
        return None
    require_same(cache, stored["settings"], given)
    found: dict[str, Tensor] = stored["found"]
    return found


def _write(out: Path, summary: dict[str, Any], trained: Points) -> None:
    replace_json(out / "qat.json", summary)
    levels = {k: v for k, v in summary["perplexity"].items() if k in ("float", summary.get("best_untrained"))}
    plot(out / "qat.png", {"trained": trained}, "held-out perplexity", levels=levels)


def require_exportable(config: QatConfig) -> None:
    """Raise ValueError if the run would end in a format that no checkpoint holds."""
    last = config.stages[-1][1]
    if config.inputs == "group" and not is_exportable(last, config.inputs):
        raise ValueError(f"stages: got {last} at the end; expected W4A4 or W4A8, which a checkpoint can hold")


def _zero_blocks(
    student: QatModel, teacher: DeepSeekLM, text: Text, settings: Settings
) -> dict[str, dict[str, Any]]:
    """Where the zero blocks are, and how much the others are needed on held-out text: after, before, and in
    random weights.
    """
    rows = [d[: settings.window + 1].astype("int64") for d in text.heldout if len(d) > settings.window]
    tokens = torch.stack([torch.from_numpy(ids) for ids in rows[:NEED_WINDOWS]]).to(settings.device)
    models = {
        "before": QatModel(copy.deepcopy(teacher), student.config),
        "after": student,
        "random": QatModel(random_twin(teacher, settings.seed), student.config),
    }
    for model in models.values():
        model.to(settings.device).net.set_compute_dtype(torch.bfloat16)
    return {
        "zero_blocks": qat_model.describe(student),
        "needed_blocks": qat_model.needed_blocks(models, tokens),
    }


def _perplexity(rows: Tensor) -> float:
    nats, count = rows.sum(0).tolist()
    return math.exp(nats / count)


def gained(found: dict[str, Tensor]) -> dict[str, Any]:
    """Loss of the trained net over the float one, and the share of the best untrained net's loss (same
    format, if there is one) that training recovered, with 95 % intervals over resampled windows.

    There is no float control: distilled from itself, the float net starts with a gradient of zero.
    """
    base, trained = (_perplexity(found[name]) for name in ("float", "trained"))
    means = resampled(found)
    ours = (means["trained"] - means["float"]).expm1()
    summary: dict[str, Any] = {
        "relative_increase": trained / base - 1,
        "relative_increase_interval": interval(ours),
    }
    rounded = {name: _perplexity(rows) for name, rows in found.items() if name.startswith("untrained")}
    if not rounded:
        return summary
    best = min(rounded, key=rounded.__getitem__)
    summary |= {"best_untrained": best, "recovered": None}
    if rounded[best] > base:
        summary["recovered"] = (rounded[best] - trained) / (rounded[best] - base)
        summary["recovered_interval"] = interval(1 - ours / (means[best] - means["float"]).expm1())
    return summary
