"""The loop on a small model: resuming, stopping, skipping, recording."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from farthing.model.config import ModelConfig
from farthing_lab.train.data import PackedBatches
from farthing_lab.train.loop import BaseHook, LoopConfig, Muon, Schedule, Trainer, split_parameters
from farthing_lab.train.mite import BalanceHook
from farthing_lab.train.model import DeepSeekLM


def build(
    cfg: ModelConfig, out: Path, tokens: int = 32 * 12, hooks: tuple[Any, ...] = (), **options: Any
) -> Trainer:
    """A trainer of a tiny model on random tokens; 32 tokens per step."""
    torch.manual_seed(5)
    model = DeepSeekLM(cfg)
    matrices, rest = split_parameters(model)
    rng = np.random.default_rng(0)
    batches = PackedBatches([rng.integers(0, cfg.vocab_size, 100).astype(np.uint16) for _ in range(5)])
    return Trainer(
        model,
        [Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.01)],
        batches,
        lambda t: [(batches.next(1, 16), 16), (batches.next(1, 16), 16)],
        lambda m, batch, t: m.loss(batch, 0.3),
        LoopConfig(out, tokens=tokens, **options),
        hooks=[BalanceHook(0.01), *hooks],
        console=Console(quiet=True),
    )


def test_evaluations_at_steps_are_the_same_in_every_run(tiny: ModelConfig, tmp_path: Path) -> None:
    trainer = build(tiny, tmp_path, eval_steps=5)
    assert trainer.run()
    assert [point["step"] for point in trainer.record] == [5, 10, 12]


class StopAt(BaseHook):
    """Sends this process a signal, like Ctrl-C or kill."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resumed_run_equals_an_uninterrupted_one(tiny: ModelConfig, tmp_path: Path, number: int) -> None:
    whole = build(tiny, tmp_path / "whole")
    assert whole.run()
    first = build(tiny, tmp_path / "parts", hooks=(StopAt(5, number),))
    assert not first.run()
    assert first.step == 5
    second = build(tiny, tmp_path / "parts", hooks=(StopAt(-1, number),))
    second.load()
    assert second.step == 5
    assert second.run()
    assert (second.step, second.tokens) == (whole.step, whole.tokens) == (12, 384)
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    for one, two in zip(whole.optimizers, second.optimizers, strict=True):
        left, right = one.state_dict()["state"], two.state_dict()["state"]
        for key, slot in left.items():
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(right[key][k])) for k, v in slot.items()
            )


def test_kill_while_saving_keeps_the_last_state(
    tiny: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(tiny, tmp_path)
    trainer.train_step()
    trainer.save()

    def killed(state: Any, stream: Any) -> None:
        stream.write(b"half a file")
        raise KeyboardInterrupt

    trainer.train_step()
    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    monkeypatch.undo()
    again = build(tiny, tmp_path)
    again.load()
    assert again.step == 1


def test_loss_falls_and_is_recorded(tiny: ModelConfig, tmp_path: Path) -> None:
    trainer = build(tiny, tmp_path, tokens=32 * 60)
    trainer.train_step()
    start = trainer.metrics["main"]
    assert trainer.run()
    record = json.loads((tmp_path / "record.json").read_text())
    assert record[-1]["tokens"] == 32 * 60
    assert record[-1]["main"] < start - 0.5
    assert record[-1]["max_load"] >= 1


def test_hooks_and_infinite_gradients_skip_the_update(tiny: ModelConfig, tmp_path: Path) -> None:
    class Skip(BaseHook):
        def before_update(self, trainer: Trainer) -> None:
            trainer.skip_update = True

    trainer = build(tiny, tmp_path, hooks=(Skip(),))
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    trainer = build(tiny, tmp_path)
    loss = trainer.loss
    trainer.loss = lambda m, b, t: {k: v * float("inf") for k, v in loss(m, b, t).items()}
    trainer.train_step()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_schedule() -> None:
    schedule = Schedule(warmup=0.1, decay=0.5)
    assert schedule(0.05) == pytest.approx(0.5)
    assert schedule(0.3) == 1.0
    assert schedule(0.75) == pytest.approx(0.5)
    assert schedule(1.0) == 0.0
    assert schedule(0.0) > 0


def test_errors_name_bad_settings(tiny: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="minutes, tokens: set exactly one"):
        LoopConfig(tmp_path)
    with pytest.raises(ValueError, match="expected a positive length"):
        LoopConfig(tmp_path, minutes=-1.0)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        build(tiny, tmp_path / "nothing").load()
