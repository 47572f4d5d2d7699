"""What the product says of every published configuration and of every family of the parity tests, as digests.

A change of how models are described must not change what is said of them: names and shapes, cuts over ranks,
inputs, what recipes and published files quantize, GGUF's names, what caches keep, and planned bytes.

    python -m tests.model.answers            writes the digests anew
    python -m tests.model.answers NAME       prints the answers of one configuration, to compare two commits
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import farthing
from farthing.checkpoint.gguf import ARCHITECTURES
from farthing.model import ModelConfig, Parameters, cache_kinds
from farthing.model.inspect import model_cost
from farthing.model.kinds import cache_place
from farthing.model.types import type_named
from farthing.parallel.plan import Layout, PlanError, ShardPlan, representatives
from farthing.planner.buffers import Serving
from farthing.planner.footprint import Holder, stored_by_config
from farthing.planner.memory import PlannedModel, memory

CONFIGS = Path(farthing.__file__).parent / "assets" / "configs"
FILE = Path(__file__).with_suffix(".json")
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
LAYOUTS = (Layout(), Layout(tp=2), Layout(tp=4), Layout(ep=2), Layout(pp=2), Layout(tp=2, ep=4, pp=2))


def answers(raw: dict[str, Any]) -> dict[str, list[str]]:
    """Lines of what is said of one configuration, by subject."""
    config = ModelConfig.from_json(raw)
    names = [name for name, _, _ in _parameters(config)]
    return {
        "shapes": [f"{name} {shape}" for name, shape, _ in _parameters(config)],
        "cuts": list(_cuts(config, names)),
        "inputs": list(_inputs(config, names)),
        "stored": list(_stored(raw, names)),
        "gguf": list(_gguf(config, names)),
        "cache": list(_cache(config)),
        "bytes": list(_bytes(config, raw)),
    }


def digests(raw: dict[str, Any]) -> dict[str, str]:
    """The same in a few characters a subject."""
    return {
        subject: hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
        for subject, lines in answers(raw).items()
    }


def configurations() -> dict[str, dict[str, Any]]:
    """config.json of every published configuration here, and of the families as FILE has them."""
    published = {file.stem: json.loads(file.read_text()) for file in sorted(CONFIGS.glob("*.json"))}
    return published | {name: entry["config"] for name, entry in _file()["families"].items()}


def expected() -> dict[str, dict[str, str]]:
    """The digests that FILE has."""
    file = _file()
    return file["published"] | {name: entry["digests"] for name, entry in file["families"].items()}


def _file() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.is_file() else {"published": {}, "families": {}}


def _parameters(config: ModelConfig) -> list[tuple[str, tuple[int, ...], int]]:
    return [(tensor.name, tensor.shape, count) for tensor, count in representatives(config)]


def _cuts(config: ModelConfig, names: list[str]) -> Iterator[str]:
    for layout in LAYOUTS:
        try:
            plan = ShardPlan.build(config, layout)
        except PlanError as error:
            yield f"{layout}: {error}"
            continue
        yield f"{layout}: {plan.stages}"
        for rank in {0, layout.world // 2, layout.world - 1}:
            for name in names:
                yield f"{rank} {name} {plan.cut(name, layout.place(rank))}"


def _inputs(config: ModelConfig, names: list[str]) -> Iterator[str]:
    first, parameters = dict[str, str](), Parameters(config)
    for name in names:
        module = name.removesuffix(".weight")
        if parameters.rounds(module):
            keys = parameters.reads(module), f"of {parameters.scaled_with(module)}"
            alike = [first.setdefault(key, module) for key in keys]
            yield f"{module} reads what {alike[0]} reads, and shares a scale with {alike[1]}"


def _stored(raw: dict[str, Any], names: list[str]) -> Iterator[str]:
    text = {k: v for k, v in raw.items() if k not in ("quantization_config", "expert_dtype")}
    of = stored_by_config({**text, "quantization_config": FP8})
    for name in names:
        yield f"{name} {of(name)}"


def _gguf(config: ModelConfig, names: list[str]) -> Iterator[str]:
    known = next((own for own in ARCHITECTURES.values() if config.model_type in own.types), None)
    stored = type_named(config.model_type).names.stored
    for name in names:
        own = stored(name)
        try:
            yield f"{name} {own} {known and known.stored(own.replace('language_model.', ''))}"
        except KeyError:
            yield f"{name} {own}"


def _cache(config: ModelConfig) -> Iterator[str]:
    for tp in (1, 2):
        try:
            yield f"{tp}: {cache_kinds(config, tp)}"
        except ValueError as error:
            yield f"{tp}: {error}"
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        yield f"{layer} {cache_place(config, layer)} {config.mixer(layer).rope}"


def _bytes(config: ModelConfig, raw: dict[str, Any]) -> Iterator[str]:
    yield str(model_cost(config))
    # No native ops: their buffers depend on the machine, and the estimate without a thread count too.
    serving = Serving(cache_tokens=4096, max_model_len=2048, max_num_seqs=4, threads=2)
    plan = ShardPlan.build(config, Layout())
    model = PlannedModel.of(plan, stored_by_config(raw))
    yield str(model.projections)
    for holder in (Holder("gpu", 2, "int4"), Holder("cpu", 4, "int4"), Holder("cpu", 4, None, 2)):
        (rank,) = memory(model, plan, holder, serving)
        yield f"{holder} {rank.weights} {rank.cache}"


def _families() -> dict[str, dict[str, Any]]:
    """A small configuration of each family, as transformers saves it."""
    from tests.parity.families import FAMILIES

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in FAMILIES.items():
            make(random.Random(f"{name}0")).config.save_pretrained(folder)
            raw = json.loads((Path(folder) / "config.json").read_text())
            found[f"tiny {name}"] = {k: v for k, v in raw.items() if k != "transformers_version"}
    return found


def main() -> None:
    """Write the file, or print one configuration's answers."""
    if len(sys.argv) > 1:
        for subject, lines in answers(configurations()[sys.argv[1]]).items():
            print(f"## {subject}", *lines, sep="\n")
        return
    families = {name: entry["config"] for name, entry in _file()["families"].items()} or _families()
    published = {name: raw for name, raw in configurations().items() if name not in families}
    FILE.write_text(
        json.dumps(
            {
                "published": {name: digests(raw) for name, raw in published.items()},
                "families": {
                    name: {"digests": digests(raw), "config": raw} for name, raw in families.items()
                },
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
