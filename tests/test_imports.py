"""The structure of the houses: who may import whom, no cycles, few arrows, imports at the top."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FunctionType

import pytest

import farthing
from farthing.model import ModelConfig
from farthing.ops import Ops

SRC = Path(farthing.__file__).parents[1]
HOUSES = ("farthing", "farthing_fleet", "farthing_gpu", "farthing_ray", "farthing_lab")
# The rooms of the product, lowest first; a room imports lower rooms, and itself.
LEVELS = (
    {"cost", "conversation"},
    {"config", "process"},
    {"catalogue", "options", "packages", "running"},
    {"ops"},
    {"checkpoint"},
    {"model"},
    {"parallel", "hub"},
    {"planner", "engine"},
    {"llm", "server", "compress"},
    {"bench", "doctor"},
    {"cli"},
)
LEVEL = {
    path.stem: 0 for path in (SRC / "farthing").glob("*.py")
}  # top-level modules are on the lowest level, unless listed
LEVEL |= {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# The fleet knows servers by HTTP and metrics; this is all that it shares with the product.
SHARED = {
    "farthing.cli.app",
    "farthing.cli.errors",
    "farthing.config",
    "farthing.cpus",
    "farthing.exchange",
    "farthing.extras",
    "farthing.files",
    "farthing.process",
    "farthing.prompts",
    "farthing.server.config",
    "farthing.server.dashboard.site",
    "farthing.server.errors",
    "farthing.shares",
    "farthing.upstream",
}
# Imports inside functions, outside `cli`, of modules that load torch, an accelerator or an optional extra.
DEFERRED = 27
FAN_OUT = 12  # modules of ours that one module imports
WIDE: dict[str, int] = {
    "farthing.cli.check": 15,
    "farthing.compress.api": 15,
    "farthing.engine.build": 17,
    "farthing.engine.engine": 17,
    "farthing.model.types": 18,
    "farthing_gpu.backend": 14,
}  # that put the others together
ENTRY_POINTS = {"farthing.__main__"}


@cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for house in HOUSES for path in (SRC / house).rglob("*.py")}


@cache
def graph() -> dict[str, frozenset[str]]:
    """Module -> our modules that it imports, including lazily and for type checking."""
    names = modules()
    return {name: frozenset(target for target, _ in imported(path)) - {name} for name, path in names.items()}


def name_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imported(path: Path) -> frozenset[tuple[str, int]]:
    """(our module, line of the import, or 0 at top level) for every import of a file."""

    def inside(node: ast.AST, line: int) -> Iterator[tuple[str, int]]:
        for target in targets(node):
            parent = target.rpartition(".")[0]
            name = target if target in modules() else parent  # a name of a module or a package's __init__
            if name in modules():
                yield name, line
        for child in ast.iter_child_nodes(node):
            deeper = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from inside(child, getattr(child, "lineno", line) if deeper or line else 0)

    return frozenset(inside(ast.parse(path.read_text()), 0))


def targets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def house(module: str) -> str:
    return module.partition(".")[0]


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_there_are_no_import_cycles() -> None:
    try:
        list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_nothing_imports_the_laboratory_and_the_product_no_fleet() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, found in graph().items()
        for target in found
        if HOUSES.index(house(target)) > HOUSES.index(house(module))
    ]
    assert not wrong, "\n".join(wrong)


def test_fleet_shares_few_modules_with_the_product() -> None:
    used = {
        target
        for module, found in graph().items()
        if house(module) == "farthing_fleet"
        for target in found
        if house(target) == "farthing"
    }
    assert used == SHARED


def test_every_room_has_a_level() -> None:
    assert {room(name) for name in graph() if house(name) == "farthing"} - {""} <= set(LEVEL)


def test_rooms_import_downwards() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, found in graph().items()
        if house(module) == "farthing" and module not in ENTRY_POINTS and room(module) in LEVEL
        for target in found
        if room(target) in LEVEL and room(target) != room(module)
        if LEVEL[room(target)] >= LEVEL[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_import_few_others() -> None:
    counts = {module: len(found) for module, found in graph().items() if len(found) > FAN_OUT}
    assert counts == WIDE, "a module outside WIDE grew beyond FAN_OUT, or one inside it shrank: lower it"


def test_imports_are_at_the_top() -> None:
    deferred = [
        (f"{path.relative_to(SRC)}:{line}", target)
        for module, path in modules().items()
        if "cli" not in module.split(".")
        for target, line in imported(path)
        if line
    ]
    assert len(deferred) <= DEFERRED, sorted(deferred)


ROOT = Path(__file__).parents[1]
# Sizes that were reached: words of the documentation (of a folder with all below it), and lines of Python.
WORDS = {"docs": 55_000, "docs/guide": 22_000, "docs/design": 20_000, "docs/lab": 12_000}
LINES = {"bench": 4_500, "src/farthing": 64_700, "src/farthing_lab": 10_180}


def test_a_backend_has_few_methods() -> None:
    methods = [n for n, v in vars(Ops).items() if n[0] != "_" and isinstance(v, FunctionType | property)]
    assert len(methods) <= 38, "merge two forms of one idea, or compose what is there"


def test_a_model_has_few_fields_of_its_own() -> None:
    assert len(fields(ModelConfig)) <= 16, "a layer's first or second half has what belongs to it"


@pytest.mark.parametrize("folder", WORDS)
def test_documentation_stays_short(folder: str) -> None:
    words = sum(len(page.read_text(encoding="utf-8").split()) for page in (ROOT / folder).rglob("*.md"))
    assert words <= WORDS[folder], (
        f"{folder} has {words:,} words; at most {WORDS[folder]:,}. Say a thing once, on the page that owns "
        "it; in the lab, what we believe now, since older rounds are in the history"
    )


@pytest.mark.parametrize("folder", LINES)
def test_code_stays_small(folder: str) -> None:
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py"))
    assert lines <= LINES[folder], (
        f"{folder} has {lines:,} lines; at most {LINES[folder]:,}. Merge two forms of one idea, delete a "
        "study whose conclusion is in docs/lab (its page names its commit), or share more (bench/harness.py)"
    )
