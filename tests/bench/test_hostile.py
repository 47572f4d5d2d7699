"""The attacks, their verdicts, and the output of the measured server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.harness import answers, free_port, holds_within, resident
from bench.hostile.__main__ import BAR, KINDS, Latencies, Result, Server, parsed, run_all, summary
from bench.hostile.attacks import CLASSES, Attack, attacks, spoken
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
    made = Result(
        "x",
        {k: Latencies([0.01, during], windows=[during]) for k in KINDS},
        {k: Latencies([alone], windows=[alone]) for k in KINDS},
    )
    made.during["plain"].failures["500"] += failures
    return made


def test_attack_is_judged_by_the_latency_it_adds() -> None:
    assert result(1.0 + BAR, 1.0).ok
    over = result(1.1 + BAR, 1.0)
    assert not over.ok and over.to_json()["plain"]["added"] > BAR
    assert not result(0.02, 0.01, failures=1).ok
    assert result(0.5, 1.0).added("grammar") == 0.0


def test_an_attack_counts_with_the_median_of_its_rounds() -> None:
    made = result(1.0, 0.0)
    made.during["plain"].windows, made.alone["plain"].windows = [1.0, 0.2, 9.0], [0.5, 0.1, 1.0]
    assert made.typical("plain") == 0.5
    made.ended, made.memory = True, 3 << 20
    made.name = attacks("sockets")[0].name
    assert not made.ok
    assert list(summary([made])) == [["sockets", 1, 0.5, 1.0, 0, 1, 3.0]]


def test_grammars_are_spelt_as_each_server_expects() -> None:
    asked = {"prompt": "x", "guided_regex": "a+"}
    assert spoken(asked, "farthing") == asked
    assert spoken(asked, "vllm") == {"prompt": "x", "structured_outputs": {"regex": "a+"}}
    pattern = {"type": "string", "pattern": "^a+$"}
    assert spoken(asked, "llama.cpp") == {"prompt": "x", "json_schema": pattern}
    assert spoken({"guided_json": {"type": "object"}}, "llama.cpp") == {"json_schema": {"type": "object"}}
    assert spoken({"guided_choice": ["a", 'b"']}, "llama.cpp") == {"grammar": 'root ::= "a" | "b\\""'}
    rules = {"guided_grammar": 'start: r1\nr1: "x"'}
    assert spoken(rules, "llama.cpp") == {"grammar": 'root ::= r1\nr1 ::= "x"'}
    for dialect in ("farthing", "vllm", "llama.cpp"):
        assert spoken({"prompt": "x"}, dialect) == {"prompt": "x"} and spoken(b"[", dialect) == b"["


MORTAL = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
    def do_POST(self):
        os._exit(1) if self.headers["authorization"] == "Bearer sk-bad" else self.do_GET()
    def log_message(self, *words): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_that_an_attack_ended_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, servers = tmp_path / "mortal.py", []
    file.write_text(MORTAL)

    def fatal(server: Server, attack: Attack, options: Namespace) -> Result:
        servers.append(server.process.pid)
        with suppress(httpx.HTTPError):
            attack.once(server.entry)
        return Result(attack.name, {}, {}, ended=server.process.wait(60) == 1)

    monkeypatch.setattr("bench.hostile.__main__.run", fatal)
    words = ["--command", f"{sys.executable} {file} {{port}}", "--dialect", "vllm", "--only", "detokenize"]
    assert [each.ended for each in run_all(parsed(words))] == [True, True]
    assert len(set(servers)) == 2


def test_a_process_that_ends_no_longer_holds() -> None:
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        began = time.monotonic()
        assert not holds_within(answers(port), process, 60)
        assert time.monotonic() - began < 30


def test_server_writes_and_resets_its_longest_holds(tmp_path: Path) -> None:
    file = tmp_path / "holds.json"
    holds = Holds(file)
    for seconds in (0.2, 0.5, 0.1):
        holds.note("loop cpu", seconds)
    holds.write()
    assert json.loads(file.read_text()) == {"loop cpu": 0.5}
    holds.write()
    assert json.loads(file.read_text()) == {}
