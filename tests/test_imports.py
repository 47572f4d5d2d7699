"""The structure of the package: no import cycles, and packages import only downwards."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import farthing

ROOT = Path(farthing.__file__).parent
# Lowest first; a package imports packages of lower levels, and itself.
LEVELS = (
    {"cost", "conversation"},
    {"config"},
    {"ops"},
    {"checkpoint"},
    {"model"},
    {"parallel", "hub"},
    {"planner", "engine"},
    {"llm", "server", "fleet", "compress", "train"},
    {"bench", "doctor"},
    {"demo"},
    {"cli"},
)
LEVEL = {
    path.stem: 0 for path in ROOT.glob("*.py")
}  # top-level modules are on the lowest level, unless listed
LEVEL |= {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
ACROSS = {
    ("fleet", "server"),
    ("train", "compress"),
}  # the gateway's dashboard; sparsity schedule
# Starts the command line in a standby process: calls `main`, imported when it runs.
ENTRY_POINTS = {"farthing.fleet.standby", "farthing.__main__"}


@cache
def graph() -> dict[str, frozenset[str]]:
    """Module -> our modules that it imports, including lazily and for type checking."""
    names = {name_of(path): path for path in ROOT.rglob("*.py")}
    return {name: frozenset(imported(path, names.keys()) - {name}) for name, path in names.items()}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, names: object) -> set[str]:
    assert hasattr(names, "__contains__")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for target in targets(node):
            parent = target.rpartition(".")[0]
            if target in names:
                found.add(target)
            elif parent in names:  # a name of a module, or of a package's __init__
                found.add(parent)
    return found


def targets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_there_are_no_import_cycles() -> None:
    try:
        list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_every_package_has_a_level() -> None:
    assert {room(name) for name in graph()} - {""} <= set(LEVEL)


def test_packages_import_downwards() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, imports in graph().items()
        if module not in ENTRY_POINTS and room(module) in LEVEL
        for target in imports
        if room(target) in LEVEL and room(target) != room(module)
        if LEVEL[room(target)] >= LEVEL[room(module)] and (room(module), room(target)) not in ACROSS
    ]
    assert not wrong, "\n".join(wrong)
