"""Train the bundled forecaster on the traces that docs/lab/fleet-rule.md allows.

    python bench/pretrain_load.py --traces DIR [--without r1] [--out FILE]

`--without` excludes a service, so that a forecaster can be scored on it; the bundled file uses all of them.
Takes minutes on one core; the result is reproducible.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from farthing_fleet.forecast.history import FEATURES, QUANTILES, History
from farthing_fleet.forecast.lstm import (
    NETWORK,
    PRETRAINED,
    Network,
    Pretrained,
    examples,
    quantile_fit,
    train,
)
from farthing_lab.replay.trace import rate_load, read_trace
from farthing_lab.series import Series

GRID_S = 60.0
LEAD_S = 615.0


def choice(traces: Path) -> dict[str, Series]:
    """The training series, by service."""
    large = read_trace(traces / "servegen_language_m-large_rate.csv")
    taxi = read_trace(traces / "nab_nyc_taxi.csv.gz")
    r1 = read_trace(traces / "servegen_reason_deepseek-r1_rate.csv")
    assert isinstance(large, Series) and isinstance(taxi, Series) and isinstance(r1, Series)
    return {"r1": r1, "m-large": large.head(7 * 144), "taxi": taxi.head(15 * 7 * 48)}


def minutes(series: Series, seed: int) -> History:
    """The load history of a controller: minute means of the interpolated trace with noise."""
    load = rate_load(series, 10.0, seed + 1, 0.1)[:, seed]
    whole = len(load) // 6 * 6
    return History(load[:whole].reshape(-1, 6).mean(axis=1), GRID_S, LEAD_S)


def histories(series: Series) -> list[History]:
    """One service at several speeds on the minute grid, and its own points one and several steps ahead."""
    made = [minutes(series, 0), minutes(series, 1)]
    made += [minutes(Series(0.0, series.step_s * speed, series.values), 2) for speed in (0.5, 2.0)]
    for every in (1, 2, 3):
        points = series.coarse(every)
        made += [
            History(points.values, points.step_s, points.step_s * lead) for lead in (1, 2) if len(points) > 60
        ]
    return made


def weighted(made: list[History]) -> list[History]:
    """Repeat short histories, so that the few coarse points count next to the many minutes."""
    most = max(len(history) for history in made)
    return [history for history in made for _ in range(max(1, min(20, most // (8 * len(history)))))]


def pretrain(services: dict[str, Series], networks: int, epochs: int) -> Pretrained:
    data = examples(weighted([h for series in services.values() for h in histories(series)]), thin=5)
    features, truth, weight = (part.double().numpy() for part in data[1:])
    centre, spread = features.mean(axis=0), features.std(axis=0) + 1e-3
    rows = np.c_[(features - centre) / spread, np.ones(len(truth))]
    start = np.stack(
        [quantile_fit(rows, truth, weight, q, np.zeros(FEATURES + 1), 0.01 * len(truth)) for q in QUANTILES]
    )
    made = []
    for seed in range(networks):
        torch.manual_seed(seed)
        network = Network()
        torch.nn.init.zeros_(network.head[2].weight)
        torch.nn.init.zeros_(network.head[2].bias)
        train(network, data, epochs, 3e-3, 256)
        made.append(network)
        print(f"network {seed}: {len(truth)} examples", flush=True)
    return Pretrained(made, start, centre, spread)


def save(made: Pretrained, path: Path) -> None:
    """Write everything to one safetensors file."""
    tensors = {
        f"{NETWORK}.{index}.{name}": tensor.contiguous()
        for index, network in enumerate(made.networks)
        for name, tensor in network.state_dict().items()
    }
    for name in ("start", "centre", "spread"):
        tensors[name] = torch.from_numpy(np.ascontiguousarray(getattr(made, name))).float()
    save_file(tensors, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--without", action="append", default=[], help="service to exclude; repeatable")
    parser.add_argument("--networks", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=PRETRAINED)
    args = parser.parse_args()
    torch.set_num_threads(1)
    services = {name: s for name, s in choice(args.traces).items() if name not in args.without}
    save(pretrain(services, args.networks, args.epochs), args.out)


if __name__ == "__main__":
    main()
