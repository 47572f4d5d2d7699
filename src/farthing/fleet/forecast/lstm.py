"""The short-term forecaster: a small LSTM with quantile outputs, seconds to train on one core.

Shapes: N = training windows, W = window length, H = steps ahead, Q = quantiles (0.5, 0.9). Inputs are
the last W values relative to the recent level, and their differences; outputs are the departures from
the last value relative to that level, so that an untrained network forecasts the last value, and a
change of the load's scale changes nothing. Loss: pinball, weighted by the level (large loads matter
more, as in WAPE).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.torch import load_file, save_file

from farthing.fleet.forecast.base import Floats
from farthing.fleet.series import DAY_S, Series

QUANTILES = (0.5, 0.9)
VERSION = 1  # of the saved format


@dataclass(frozen=True)
class LSTMConfig:
    """Size and training of the network; the defaults train in seconds on one core."""

    window: int = 24  # values it looks back
    ahead: int = 1  # steps it forecasts
    hidden: int = 16
    epochs: int = 20
    batch: int = 64
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    networks: int = 2  # trained from different seeds and averaged
    history_s: float = 14 * DAY_S  # older values are not trained on

    def __post_init__(self) -> None:
        for name in ("window", "ahead", "hidden", "epochs", "batch", "networks"):
            if getattr(self, name) < 1:
                raise ValueError(f"LSTMConfig.{name} = {getattr(self, name)}: 1 or more is needed")


class _Network(torch.nn.Module):
    """[N, W, 2] -> [N, H, Q]."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.shape = (config.ahead, len(QUANTILES))
        self.lstm = torch.nn.LSTM(2, config.hidden, batch_first=True)
        self.head = torch.nn.Linear(config.hidden, config.ahead * len(QUANTILES))
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(inputs)
        out: torch.Tensor = self.head(states[:, -1])
        return out.view(-1, *self.shape)


class LSTMForecaster:
    """`fit` trains anew on the recent history, `predict` gives the median, `quantiles` both outputs."""

    name = "lstm"

    def __init__(self, config: LSTMConfig | None = None) -> None:
        self.config = config or LSTMConfig()
        self._networks: list[_Network] = []
        self.trained_until = float("nan")  # end of the series it was trained on, seconds

    def fit(self, series: Series) -> None:
        """With fewer windows than a batch it stays untrained and forecasts the last value."""
        config = self.config
        values = series.tail(round(config.history_s / series.step_s)).values
        self._networks = []
        self.trained_until = series.end
        if len(values) < config.window + config.ahead + config.batch:
            return
        inputs, level, last = _inputs(values[: -config.ahead], config.window)
        future = sliding_window_view(values, config.ahead)[config.window + 1 :]
        target = (future - last[:, None]) / level[:, None]
        data = [torch.tensor(part, dtype=torch.float32) for part in (inputs, target, level / level.mean())]
        with torch.random.fork_rng():
            for seed in range(config.networks):
                torch.manual_seed(seed)
                self._networks.append(_train(_Network(config), data, config))

    def predict(self, values: Floats, steps: int) -> Floats:
        return self.quantiles(values, steps)[0]

    def quantiles(self, values: Floats, steps: int) -> tuple[Floats, Floats]:
        """([steps], [steps]) medians and 0.9 quantiles; steps past `ahead` are forecast from the medians."""
        past = np.asarray(values, dtype=np.float64)
        low, high = np.empty(0), np.empty(0)
        while len(low) < steps:
            p50, p90 = self._once(past)
            low, high = np.append(low, p50), np.append(high, p90)
            past = np.append(past, p50)
        return low[:steps], np.maximum(low, high)[:steps]

    def _once(self, values: Floats) -> tuple[Floats, Floats]:
        if not self._networks or len(values) < self.config.window + 1:
            last = np.full(self.config.ahead, values[-1])
            return last, last
        inputs, level, last = _inputs(values[-self.config.window - 1 :], self.config.window)
        with torch.no_grad():
            batch = torch.tensor(inputs[-1:], dtype=torch.float32)
            out = torch.stack([network(batch)[0] for network in self._networks]).mean(0).double().numpy()
        path = np.maximum(0.0, last[-1] + level[-1] * out)
        return path[:, 0], path[:, 1]

    def save(self, directory: str | Path) -> Path:
        """Write weights and configuration as the next version; returns the version's directory."""
        root = Path(directory)
        taken = [int(p.name[1:]) for p in root.glob("v*") if p.name[1:].isdigit()]
        target = root / f"v{max(taken, default=0) + 1}"
        target.mkdir(parents=True)
        tensors = {
            f"{index}.{name}": tensor.contiguous()
            for index, network in enumerate(self._networks)
            for name, tensor in network.state_dict().items()
        }
        if tensors:
            save_file(tensors, target / "weights.safetensors")
        about = {"format": VERSION, "config": asdict(self.config), "trained_until": self.trained_until}
        # NaN is no JSON: an untrained forecaster says null
        about["trained_until"] = None if self.trained_until != self.trained_until else self.trained_until
        (target / "config.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        return target

    @classmethod
    def load(cls, directory: str | Path) -> LSTMForecaster:
        """The newest version under `directory`, or the version itself. Raises FileNotFoundError,
        ValueError.
        """
        root = Path(directory)
        versions = sorted((p for p in root.glob("v*") if p.name[1:].isdigit()), key=lambda p: int(p.name[1:]))
        path = versions[-1] if versions else root
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{root}: no saved forecaster (a directory v1, v2, … with config.json)")
        about: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if about.get("format") != VERSION:
            raise ValueError(
                f"{path}: format {about.get('format')}; this version reads {VERSION}: train anew"
            )
        made = cls(LSTMConfig(**about["config"]))
        until = about["trained_until"]
        made.trained_until = float("nan") if until is None else float(until)
        if (path / "weights.safetensors").is_file():
            tensors = load_file(path / "weights.safetensors")
            for index in range(made.config.networks):
                network = _Network(made.config)
                prefix = f"{index}."
                part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                network.load_state_dict(part)
                made._networks.append(network.eval())
        return made


def _inputs(values: Floats, window: int) -> tuple[Floats, Floats, Floats]:
    """([N, W, 2], [N], [N]) inputs, level and last value of every window that has one value before it."""
    pieces = sliding_window_view(values, window + 1)
    shown = pieces[:, 1:]
    last = shown[:, -1]
    level = np.maximum(shown[:, -6:].mean(axis=1), 1e-9)
    relative = (shown - last[:, None]) / level[:, None]
    steps = np.diff(pieces, axis=1) / level[:, None]
    return np.clip(np.stack([relative, steps], axis=-1), -5, 5), level, last


def _train(network: _Network, data: list[torch.Tensor], config: LSTMConfig) -> _Network:
    inputs, target, weight = data
    optimizer = torch.optim.AdamW(
        network.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    quantiles = torch.tensor(QUANTILES)
    for _ in range(config.epochs):
        order = torch.randperm(len(inputs))
        for begin in range(0, len(order), config.batch):
            rows = order[begin : begin + config.batch]
            miss = target[rows, :, None] - network(inputs[rows])
            pinball = torch.maximum(quantiles * miss, (quantiles - 1) * miss)
            loss = (weight[rows, None, None] * pinball).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return network.eval()
