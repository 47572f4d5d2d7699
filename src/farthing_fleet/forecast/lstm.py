"""A small LSTM with quantile outputs, pretrained on several services and fine-tuned on the current one.

It forecasts y = log(peak within a lead / current level) at 0.5 and 0.9 (see `history`) from a sequence of
means and, next to its last state, the features of every member. Loss: pinball, weighted by the level. Nothing
depends on the load's scale or the length of a lead, so one network works for any service. `fit` starts from
the packaged weights and takes seconds on one core.

Shapes: N = origins, W = length of a sequence, F = features, Q = quantiles (0.5, 0.9).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from farthing_fleet.forecast.base import Floats
from farthing_fleet.forecast.history import FEATURES, QUANTILES, History

PRETRAINED = Path(__file__).parent / "pretrained.safetensors"  # weights of the learned forecasters
HISTORY_S = 7 * 86_400.0  # fine-tuning ignores older values
NETWORK = "network"  # prefix of the tensors of network i: "network.i."


EPOCHS, BATCH, RATE = 4, 256, 1e-3  # of fine-tuning
LEAST_LEADS = 72  # with less history the packaged networks are not changed
THIN = 2  # train on every second origin
REGRESSION_THIN, PENALTY = 3, 1000.0


class Regression:
    """Linear quantile regression on the features, regularized towards the packaged weights.

    Fitted by iteratively reweighted least squares.
    """

    def __init__(self, start: Floats, centre: Floats, spread: Floats) -> None:
        self._start, self._centre, self._spread = start, centre, spread  # [2, F + 1], [F], [F]
        self.weights = start.copy()

    def fit(self, history: History) -> None:
        past = len(history) - history.lead
        if past < 10 * history.lead:
            return
        chosen = slice(0, past, REGRESSION_THIN)
        rows = self._rows(history.features[chosen])
        truth, level = history.target[::REGRESSION_THIN], history.level[chosen]
        importance = level / float(level.mean())
        self.weights = np.stack(
            [
                quantile_fit(rows, truth, importance, q, self._start[i], PENALTY)
                for i, q in enumerate(QUANTILES)
            ]
        )

    def quantiles(self, history: History, first: int) -> Floats:
        """[o, Q] of the origins from `first` on."""
        predicted = self._rows(history.features[first:]) @ self.weights.T
        return np.asarray(np.maximum.accumulate(predicted, axis=-1), dtype=np.float64)

    def _rows(self, features: Floats) -> Floats:
        scaled = (features - self._centre) / self._spread
        return np.concatenate([scaled, np.ones((*scaled.shape[:-1], 1))], axis=-1)


def quantile_fit(
    rows: Floats,
    truth: Floats,
    importance: Floats,
    quantile: float,
    start: Floats,
    penalty: float,
    iterations: int = 15,
) -> Floats:
    """Weights [F] with the least weighted pinball loss of `rows` [R, F] @ weights against `truth` [R].

    `penalty` regularizes them towards `start`.
    """
    weights, ridge = start.copy(), penalty * np.eye(len(start))
    for _ in range(iterations):
        miss = truth - rows @ weights
        weight = np.where(miss >= 0, quantile, 1 - quantile) / np.maximum(np.abs(miss), 3e-3) * importance
        scaled = rows * weight[:, None]
        solved = np.linalg.solve(scaled.T @ rows + ridge, scaled.T @ truth + ridge @ start)
        weights = np.asarray(solved, dtype=np.float64)
    return weights


class Network(torch.nn.Module):
    """[N, W, 2] and [N, F] -> [N, Q], the quantiles in order."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(2, hidden, batch_first=True)
        self.side = torch.nn.Linear(FEATURES, hidden)
        self.head = torch.nn.Sequential(
            torch.nn.Linear(2 * hidden, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, len(QUANTILES))
        )

    def forward(self, sequences: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(sequences)
        out = self.head(torch.cat([states[:, -1], torch.relu(self.side(features))], dim=1))
        width = torch.nn.functional.softplus(out[:, 1] - 2)
        return torch.stack([out[:, 0], out[:, 0] + width], dim=1)


class LSTM:
    """The member."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._shipped = list(networks)
        self.networks = list(networks)

    def fit(self, history: History) -> None:
        """Fine-tune the packaged networks on `history`."""
        recent = history.tail(round(HISTORY_S / history.step_s))
        if len(recent) < LEAST_LEADS * history.lead:
            return
        data = examples([recent], THIN)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tuned = [copy.deepcopy(network) for network in self._shipped]
            for network in tuned:
                train(network, data, EPOCHS, RATE, BATCH)
        self.networks = tuned

    def quantiles(self, history: History, first: int) -> Floats:
        """[o, Q] of the origins from `first` on, in chunks, so that a long replay needs little memory."""
        made = [np.empty((0, len(QUANTILES)))]
        for begin in range(first, len(history), 4096):
            rows = slice(begin, begin + 4096)
            inputs = [torch.from_numpy(part[rows]).float() for part in (history.sequences, history.features)]
            with torch.no_grad():
                out = torch.stack([network(*inputs) for network in self.networks]).mean(0)
            made.append(out.double().numpy())
        return np.concatenate(made)


def examples(histories: Sequence[History], thin: int) -> list[torch.Tensor]:
    """[N, W, 2], [N, F], [N], [N]: sequences, features, targets and weights of every `thin`-th origin."""
    parts: list[list[Floats]] = [[], [], [], []]
    for history in histories:
        chosen = slice(0, len(history.target), thin)
        level = history.level[chosen]
        rows = (
            history.sequences[chosen],
            history.features[chosen],
            history.target[chosen].clip(-1, 1),
            level / level.mean(),
        )
        for part, row in zip(parts, rows, strict=True):
            part.append(row)
    return [torch.tensor(np.concatenate(part), dtype=torch.float32) for part in parts]


def train(network: Network, data: list[torch.Tensor], epochs: int, rate: float, batch: int) -> None:
    """Train in place with a one-cycle schedule."""
    sequences, features, truth, weight = data
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-2)
    steps = epochs * -(-len(truth) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    quantiles = torch.tensor(QUANTILES)
    for _ in range(epochs):
        order = torch.randperm(len(truth))
        for begin in range(0, len(order), batch):
            rows = order[begin : begin + batch]
            miss = truth[rows, None] - network(sequences[rows], features[rows])
            pinball = torch.maximum(quantiles * miss, (quantiles - 1) * miss)
            loss = (weight[rows, None] * pinball).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    network.eval()


@dataclass(frozen=True)
class Pretrained:
    """The packaged networks and initial weights of the quantile regression."""

    networks: list[Network]
    start: Floats  # [Q, F + 1]
    centre: Floats  # [F]
    spread: Floats  # [F]

    def lstm(self) -> LSTM:
        return LSTM(self.networks)

    def regression(self) -> Regression:
        return Regression(self.start, self.centre, self.spread)

    @classmethod
    def read(cls, path: Path = PRETRAINED) -> Pretrained:
        """Read the file. Raises FileNotFoundError, or ValueError if it was made for other features."""
        tensors = load_file(path)
        if tensors["centre"].shape != (FEATURES,):
            raise ValueError(f"{path}: made for {len(tensors['centre'])} features; expected {FEATURES}")
        count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith(NETWORK))
        networks = []
        for index in range(count):
            prefix = f"{NETWORK}.{index}."
            part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            network = Network(hidden=part["side.bias"].shape[0])
            network.load_state_dict(part)
            networks.append(network.eval())
        numbers = (tensors[name].double().numpy() for name in ("start", "centre", "spread"))
        return cls(networks, *numbers)
