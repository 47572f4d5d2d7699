"""Register spills in the hot loops of the native kernels, from the compiled object files.

    make spills                                    # or, with object files of a build:
    python bench/spills.py [--all] build/objects

A hot loop is an innermost loop with a multiply-accumulate instruction. Vector registers that it stores to or
loads from the stack are spilled: each costs a load or store port next to the weights' loads. Accumulators of
a local array count too, because they belong in registers. A report, not a check: a loop of 16 rows has more
accumulators than some instruction sets have registers. Needs objdump of binutils.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MULTIPLY = re.compile(
    r"^(vpdpbusds?|vpmaddubsw|vdpbf16ps|tdp(b\w\wd|bf16ps)|vfmadd\d+ps|vmulps|mulps|pmaddubsw|pmaddwd)\b"
)
JUMP = re.compile(r"^j\w+\s+([0-9a-f]+)\b")
STACK = re.compile(r"\(%r[sb]p[,)]")
VECTOR = re.compile(r"%[xyz]mm\d+")
LINE = re.compile(r"^\s*([0-9a-f]+):\s+(.*?)\s*(?:#.*)?$")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop."""

    file: str
    function: str
    address: int
    instructions: int
    multiplies: int
    stores: int  # of vector registers to the stack
    loads: int


def functions(lines: Iterable[str]) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """(name, [(address, instruction)]) of a disassembly by `objdump -d -C --no-show-raw-insn`."""
    name, code = "", list[tuple[int, str]]()
    for line in lines:
        if header := FUNCTION.match(line):
            if code:
                yield name, code
            name, code = header[1], []
        elif found := LINE.match(line):
            code.append((int(found[1], 16), found[2]))
    if code:
        yield name, code


def innermost(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """(first, last) index of each loop that has no other loop inside."""
    at = {address: i for i, (address, _) in enumerate(code)}
    back = []
    for i, (_, text) in enumerate(code):
        jump = JUMP.match(text)
        first = at.get(int(jump[1], 16)) if jump else None
        if first is not None and first <= i:
            back.append((first, i))
    return [(a, b) for a, b in back if not any((c, d) != (a, b) and a <= c and d <= b for c, d in back)]


def hot_loops(lines: Iterable[str], file: str = "") -> Iterator[Loop]:
    """Every innermost loop with a multiply-accumulate instruction."""
    for name, code in functions(lines):
        for first, last in innermost(code):
            body = [text for _, text in code[first : last + 1]]
            multiplies = sum(bool(MULTIPLY.match(text)) for text in body)
            if multiplies:
                stores, loads = _stack(body)
                yield Loop(file, name, code[first][0], len(body), multiplies, stores, loads)


def _stack(body: list[str]) -> tuple[int, int]:
    """Vector stores to and loads from the stack: AT&T syntax names the destination last."""
    used = [text for text in body if STACK.search(text) and VECTOR.search(text)]
    stores = sum(text.endswith(")") for text in used)
    return stores, len(used) - stores


def _short(function: str) -> str:
    """Without namespaces and parameters."""
    plain = function.replace("farthing::", "").replace("(anonymous namespace)::", "")
    return plain[:90]


def disassembly(file: Path) -> list[str]:
    """A file's code, demangled."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def main() -> None:
    """Print a table, the loops with the most spills first."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build", type=Path, help="directory of object files")
    p.add_argument("--all", action="store_true", help="also loops without spills")
    a = p.parse_args()
    files = sorted(file for file in a.build.rglob("*.o") if "emulated.dir" not in file.parts)
    loops = [loop for file in files for loop in hot_loops(disassembly(file), file.stem)]
    spilled = [loop for loop in loops if loop.stores or loop.loads]
    print(f"{len(loops)} hot loops, {len(spilled)} with vector registers on the stack")
    print(f"{'stores':>6} {'loads':>6} {'instr.':>6} {'products':>8}  loop")
    for loop in sorted(loops if a.all else spilled, key=lambda x: (-x.stores - x.loads, x.address)):
        print(
            f"{loop.stores:>6} {loop.loads:>6} {loop.instructions:>6} {loop.multiplies:>8}  "
            f"{loop.file}: {_short(loop.function)}+{loop.address:#x}"
        )


if __name__ == "__main__":
    main()
