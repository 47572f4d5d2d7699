"""The attacks, their verdicts, and the output of the measured server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.harness import resident
from bench.hostile.__main__ import BAR, KINDS, Latencies, Result
from bench.hostile.attacks import CLASSES, attacks
from bench.hostile.serve import Holds


def test_attack_names_are_unique() -> None:
    names = [attack.name for attack in attacks()]
    assert len(set(names)) == len(names) >= 40


def test_attacks_are_chosen_by_class_or_by_part_of_a_name() -> None:
    assert [attack.name for attack in attacks("sockets")] == [attack.name for attack in CLASSES["sockets"]()]
    assert [attack.name for attack in attacks("150 MB")] == ["head: 150 MB"]
    assert len(attacks()) == sum(len(made()) for made in CLASSES.values())


def test_memory_counts_children() -> None:
    code = "import subprocess, sys; subprocess.run(['sleep', '5']) if sys.argv[1] == '1' else input()"
    with subprocess.Popen([sys.executable, "-c", code, "1"]) as parent:
        deadline = time.monotonic() + 10
        alone = 0
        while time.monotonic() < deadline:
            children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
            if children and (alone := resident(int(children[0]))):
                break
            time.sleep(0.02)
        assert resident(parent.pid) > alone > 0
        parent.terminate()


def result(during: float, alone: float, failures: int = 0) -> Result:
    made = Result("x", {k: Latencies([0.01, during]) for k in KINDS}, {k: Latencies([alone]) for k in KINDS})
    made.during["plain"].failures["500"] += failures
    return made


def test_attack_is_judged_by_the_latency_it_adds() -> None:
    assert result(1.0 + BAR, 1.0).ok
    over = result(1.1 + BAR, 1.0)
    assert not over.ok and over.to_json()["plain"]["added"] > BAR
    assert not result(0.02, 0.01, failures=1).ok
    assert result(0.5, 1.0).added("grammar") == 0.0


def test_server_writes_and_resets_its_longest_holds(tmp_path: Path) -> None:
    file = tmp_path / "holds.json"
    holds = Holds(file)
    for seconds in (0.2, 0.5, 0.1):
        holds.note("loop cpu", seconds)
    holds.write()
    assert json.loads(file.read_text()) == {"loop cpu": 0.5}
    holds.write()
    assert json.loads(file.read_text()) == {}
