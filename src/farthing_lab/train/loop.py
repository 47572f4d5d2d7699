"""The training loop with its optimizers: any `nn.Module`, batches and loss; resumable, interruptible.

On a CPU, time is the process's CPU time divided by its threads, so a run that is paused (SIGSTOP) or shares
its cores keeps its schedule. On a GPU it is wall time.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from farthing.files import replace, replace_json


class Hook(Protocol):
    """Callbacks of the loop. Every method may be empty; state is saved with the run."""

    def before_step(self, trainer: Trainer) -> None:
        """Called before the batch is drawn; may change the model or its settings."""

    def before_update(self, trainer: Trainer) -> None:
        """Called after the gradients and before the optimizers; may set `trainer.skip_update`."""

    def after_step(self, trainer: Trainer) -> None:
        """Called after the update; `trainer.metrics` has this step's numbers."""

    def state_dict(self) -> dict[str, Any]:
        """State to save with the run."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""


class BaseHook:
    """A hook that does nothing; subclass it and override what you need."""

    def before_step(self, trainer: Trainer) -> None: ...
    def before_update(self, trainer: Trainer) -> None: ...
    def after_step(self, trainer: Trainer) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule over progress in [0, 1]: linear warm-up, constant, linear decay to zero."""

    warmup: float = 0.01
    decay: float = 0.4

    def __call__(self, progress: float) -> float:
        """Factor for every optimizer's base learning rate."""
        if progress < self.warmup:
            return max(progress / self.warmup, 0.02)
        return min(1.0, max(0.0, (1 - progress) / self.decay)) if self.decay else 1.0


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Length, intervals and output directory. Set one of `minutes` (CPU time per thread) and `tokens`."""

    out: Path
    minutes: float | None = None
    tokens: int | None = None
    schedule: Schedule = Schedule()
    clip: float = 1.0
    save_minutes: float = 3.0
    eval_minutes: float = 6.0
    eval_steps: int | None = None  # evaluate after every so many steps instead, at points that runs share
    threads: int = 1
    wall_clock: bool = False

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.tokens is None):
            raise ValueError("minutes, tokens: set exactly one as the length of the run")
        if (self.minutes or self.tokens or 0) <= 0:
            raise ValueError(f"minutes={self.minutes}, tokens={self.tokens}: expected a positive length")


class Batches(Protocol):
    """A source of batches whose position can be saved."""

    def state_dict(self) -> dict[str, Any]:
        """Position of the next batch."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position."""


class Trainer:
    """Runs `micro_batches -> loss -> backward -> update` until the budget is spent.

    `micro_batches(trainer)` returns (batch, number of tokens) pairs for one step. `loss(model, batch,
    trainer)` returns a dict whose "loss" is differentiated. `evaluate(trainer)` returns numbers for the
    record. `state.pt` is replaced atomically, so a run killed at any moment resumes from the last save.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        batches: Batches,
        micro_batches: Callable[[Trainer], list[tuple[Any, int]]],
        loss: Callable[[nn.Module, Any, Trainer], dict[str, Tensor]],
        config: LoopConfig,
        hooks: Sequence[Hook] = (),
        evaluate: Callable[[Trainer], dict[str, float]] | None = None,
        on_save: Callable[[Trainer], None] | None = None,
        console: Console | None = None,
    ) -> None:
        self.model, self.optimizers, self.batches = model, list(optimizers), batches
        self.micro_batches, self.loss, self.config = micro_batches, loss, config
        self.hooks, self.evaluate, self.on_save = list(hooks), evaluate, on_save
        self.console = console or Console(stderr=True)
        self.settings: dict[str, Any] = {}  # saved with the state, compared by `check_start`
        self.base_lrs = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.step, self.tokens, self.active_seconds = 0, 0, 0.0
        self.budgets = [self._budget()]
        self.record: list[dict[str, float]] = []
        self.metrics: dict[str, float] = {}
        self.skip_update = False
        self._smooth: dict[str, float] = {}
        self._clock, self._saved_at, self._evaluated_at = self._now(), 0.0, 0.0
        self._stop: str | None = None

    @property
    def state_path(self) -> Path:
        """File of the run's resumable state."""
        return self.config.out / "state.pt"

    @property
    def progress(self) -> float:
        """Share of the budget spent, 0 to 1."""
        if self.config.tokens is not None:
            return min(1.0, self.tokens / self.config.tokens)
        assert self.config.minutes is not None
        return min(1.0, self.active_seconds / 60 / self.config.minutes)

    def run(self) -> bool:
        """Train to the end of the budget. Returns False if a signal stopped it early (state is saved)."""
        self.config.out.mkdir(parents=True, exist_ok=True)
        self._clock = self._now()
        with self._signals(), self._bar() as update:
            while self.progress < 1 and self._stop is None:
                self.train_step()
                update()
                if self._evaluation_due() and self.progress < 1:
                    self.record_point()
                if self.active_seconds - self._saved_at > 60 * self.config.save_minutes:
                    self.save()
        if self._stop is None:
            self.record_point()
        self.save()
        if self._stop is not None:
            self.console.print(f"stopped by {self._stop}; use --resume to continue")
        return self._stop is None

    def train_step(self) -> None:
        """One optimizer step over this step's micro-batches."""
        self.skip_update = False
        self._each(lambda h: h.before_step(self))
        factor = self.config.schedule(self.progress)
        for optimizer, base in zip(self.optimizers, self.base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * factor
            optimizer.zero_grad(set_to_none=True)
        self.model.train()
        micro = self.micro_batches(self)
        self.metrics = {"lr": factor}
        for batch, n in micro:
            losses = self.loss(self.model, batch, self)
            (losses["loss"] / len(micro)).backward()  # type: ignore[no-untyped-call,unused-ignore]
            for name, value in losses.items():
                self.metrics[name] = self.metrics.get(name, 0.0) + float(value.detach()) / len(micro)
            self.tokens += n
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip))
        self.metrics["grad_norm"] = norm
        self._each(lambda h: h.before_update(self))
        if norm == norm and norm != float("inf") and not self.skip_update:
            for optimizer in self.optimizers:
                optimizer.step()
        self.step += 1
        self._tick()
        self._each(lambda h: h.after_step(self))
        for name, number in self.metrics.items():
            self._smooth[name] = 0.95 * self._smooth.get(name, number) + 0.05 * number

    def _evaluation_due(self) -> bool:
        if self.config.eval_steps is not None:
            return self.step % self.config.eval_steps == 0
        return self.active_seconds - self._evaluated_at > 60 * self.config.eval_minutes

    def record_point(self) -> None:
        """Evaluate (not counted as training time) and append to the record."""
        self.model.eval()
        with torch.no_grad():
            extra = self.evaluate(self) if self.evaluate else {}
        rate = self.tokens / max(self.active_seconds, 1e-9)
        point = {
            "step": self.step,
            "tokens": self.tokens,
            "minutes": self.active_seconds / 60,
            "tokens_per_second": rate,
            **self._smooth,
            **extra,
        }
        self.record.append({k: round(float(v), 5) for k, v in point.items()})
        self.console.print(" ".join(f"{k}={v:.6g}" for k, v in self.record[-1].items()))
        self._clock, self._evaluated_at = self._now(), self.active_seconds

    def save(self) -> None:
        """Write the whole state, then rename it into place."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "batches": self.batches.state_dict(),
            "hooks": [h.state_dict() for h in self.hooks],
            "rng": torch.get_rng_state(),
            "counters": (self.step, self.tokens, self.active_seconds),
            "record": self.record,
            "settings": self.settings,
            "budgets": self.budgets,
            "smooth": self._smooth,
        }
        replace(self.state_path, lambda file: _save(state, file))
        replace_json(self.config.out / "record.json", self.record)
        if self.on_save:
            self.on_save(self)
        self._clock, self._saved_at = self._now(), self.active_seconds

    def load(self) -> None:
        """Load the state of an earlier run but keep this run's learning rates."""
        if not self.state_path.is_file():
            raise FileNotFoundError(f"{self.state_path} does not exist: no run to resume in this directory")
        state = torch.load(self.state_path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, values in zip(optimizer.param_groups, own, strict=True):
                group.update(values)
        self.batches.load_state_dict(state["batches"])
        for hook, saved in zip(self.hooks, state["hooks"], strict=True):
            hook.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        self.step, self.tokens, self.active_seconds = state["counters"]
        self.record, self._smooth = state["record"], state["smooth"]
        self._saved_at = self._evaluated_at = self.active_seconds
        self.budgets = state.get("budgets", [])
        if not self.budgets or self.budgets[-1] | {"from_step": 0} != self._budget() | {"from_step": 0}:
            self.budgets.append(self._budget())

    def _budget(self) -> dict[str, float]:
        """The length of the run as set from this step on."""
        length = {"tokens": self.config.tokens, "minutes": self.config.minutes}
        return {"from_step": self.step, **{name: x for name, x in length.items() if x is not None}}

    def _now(self) -> float:
        return time.monotonic() if self.config.wall_clock else time.process_time() / self.config.threads

    def _tick(self) -> None:
        now = self._now()
        self.active_seconds += now - self._clock
        self._clock = now

    def _each(self, call: Callable[[Hook], None]) -> None:
        for hook in self.hooks:
            call(hook)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM ends the loop after the current step; a second one is not caught."""

        def stop(number: int, frame: Any) -> None:
            self._stop = signal.Signals(number).name
            signal.signal(number, previous[number])

        previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python delivers signals only there
            previous = {int(n): signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def _bar(self) -> Iterator[Callable[[], None]]:
        columns = (BarColumn(), TextColumn("{task.percentage:.1f}% {task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task("", total=1.0)

            def update() -> None:
                rate = self.tokens / max(self.active_seconds, 1e-9)
                loss = self._smooth.get("main", self._smooth.get("loss", float("nan")))
                text = f"step {self.step}  loss {loss:.3f}  {rate:,.0f} tokens/s"
                progress.update(task, completed=self.progress, description=text)

            yield update


def _save(state: dict[str, Any], file: Path) -> None:
    with file.open("wb") as stream:  # its errors name the cause, unlike those of torch's own writer
        torch.save(state, stream)


# Starting or continuing a run in a directory: a resumed run must have the settings of the stored one.
#
# Length, threads, device and directory may change; the record lists the lengths.


def check_start(state: Path, given: Mapping[str, Any], resume: bool) -> None:
    """Raise unless a run with these settings may start, or resume from `state`."""
    if not resume:
        if state.is_file():
            raise ValueError(
                f"{state.parent} already has a run; use --resume to continue it or choose another --out"
            )
        return
    if not state.is_file():
        raise FileNotFoundError(f"{state} does not exist: no run to resume in this directory")
    try:
        stored = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{state}: unreadable ({reason}); expected a run's state, or another --out"
        ) from None
    require_same(state, stored.get("settings", {}), given)


def require_same(file: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first setting that differs; settings that `file` does not have are free."""
    for name, value in given.items():
        if name in stored and stored[name] != value:
            raise ValueError(
                f"{name}: got {json.dumps(value)}; expected {json.dumps(stored[name])}, as in {file} "
                "(or another --out)"
            )


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON has them, so that stored and given ones compare equal."""
    found: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return found


# Muon for matrices, AdamW for everything else.

# Newton-Schulz coefficients that push every singular value in (0, 1] to about 1 (Jordan et al., 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def orthogonalize(m: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximately the nearest semi-orthogonal matrix of each [rows, cols] in m [..., rows, cols].

    Newton-Schulz iteration leaves singular values between about 0.7 and 1.2, which is enough for Muon.
    """
    a, b, c = QUINTIC
    x = m.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = x.mT if tall else x
    return out


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al., 2024), for parameters whose last two dimensions are matrices.

    The update of a [rows, cols] matrix has spectral norm about lr * sqrt(max(1, rows / cols)). Weight decay
    is decoupled. Parameters of equal matrix shape are orthogonalized in one batch.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        params = list(params)
        for p in params:
            if p.ndim < 2:
                raise ValueError(
                    f"params: got shape {tuple(p.shape)}; expected matrices (use AdamW for others)"
                )
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.shape[-2], p.shape[-1]), []).append(p)
            for (rows, cols), params in by_shape.items():
                update = orthogonalize(
                    torch.cat([self._momentum(p, group["momentum"]).reshape(-1, rows, cols) for p in params]),
                    group["steps"],
                )
                scale = group["lr"] * max(1.0, rows / cols) ** 0.5
                parts = update.split([p.numel() // (rows * cols) for p in params])
                for p, part in zip(params, parts, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(part.reshape(p.shape).to(p.dtype), alpha=-scale)

    def _momentum(self, p: Tensor, beta: float) -> Tensor:
        """Nesterov momentum of the gradient, float32."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(buffer, beta)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(parameters for Muon, parameters for AdamW): AdamW gets embeddings, heads, routers, hyper-connections
    and vectors."""
    other = ("embed_tokens", "lm_head", ".gate.weight", "hc.", "hc_head.", "position_bias")
    muon: list[nn.Parameter] = []
    adam: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        plain = p.ndim < 2 or any(part in name for part in other)
        (adam if plain else muon).append(p)
    return muon, adam
