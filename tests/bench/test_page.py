"""bench/page.py: the pages show what bench/results.json holds, and each of its rows can be repeated."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from farthing.compress.recipe import known_recipes

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
MARKS = "<!-- measured: {} -->\nstale\n<!-- end -->\n"


def module(name: str) -> ModuleType:
    """Import a script of bench/, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def row(ours: float, batch: int, peers: dict[str, float], **other: Any) -> dict[str, Any]:
    return {
        "machine": "Zen 5", "model": "gpt-oss-20b", "phase": "decode", "batch": batch, "context": 64,
        "weights": "int4", "ours_tok_s": ours, "step_bytes": 3e8, "share_of_limit": ours / 1000,
        "peers": peers, "peers_step_bytes": {}, "command": "bench/decode.py",
    } | other  # fmt: skip


PROMPT = {"phase": "prefill", "context": 512}


def some_rows() -> list[dict[str, Any]]:
    """What both pages need: every point of the front page's models."""
    rows = [
        row(100, batch, {"a q": 50.0}, model=model, machine=machine, **point)
        for machine in ("Zen 5", "Zen 4")
        for model in module("page").FRONT
        for batch, point in ((1, {}), (8, {}), (16, {}), (1, PROMPT))
    ]
    rows[1] |= {"peers": {"a q": 110.0, "b q": 125.0}, "peers_step_bytes": {"b q": 4e8}}
    rows[6] |= {"peers": {}}
    rows[12] |= {"peers": {"a q": 90.0}}
    return rows


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Pages with empty parts and a file of results."""
    (tmp_path / "docs/figures").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# By hand\n" + MARKS.format("front") + "Also by hand\n")
    parts = MARKS.format("decode") + "Between\n" + MARKS.format("other machine")
    (tmp_path / "docs/performance.md").write_text(parts)
    write_rows(tmp_path, some_rows())
    return tmp_path


def write_rows(root: Path, rows: list[dict[str, Any]]) -> None:
    stored = {"peers": {"a": {"version": "1", "build": "make"}}, "rows": rows}
    (root / "results.json").write_text(module("page").text_of(stored))


def test_pages_and_picture_are_what_the_committed_results_give(tmp_path: Path) -> None:
    p, shown = module("page"), ("README.md", "docs/performance.md", str(module("page").PICTURE))
    for name in shown:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    p.write(p.RESULTS, tmp_path)
    for name in shown:
        same = (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
        assert same, f"{name} is not what bench/results.json says; run python bench/page.py"


def committed() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(module("page").RESULTS.read_text())
    return stored


def flags_of(script: Path) -> set[str]:
    return set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', script.read_text()))


@pytest.mark.parametrize("command", sorted({r["command"] for r in committed()["rows"]}))
def test_command_of_a_row_names_a_script_and_flags_that_exist(command: str) -> None:
    script, *words = shlex.split(command)
    assert script.startswith("bench/") and (ROOT / script).is_file()
    assert {w for w in words if w.startswith("--")} <= flags_of(ROOT / script)


def test_row_has_a_recipe_a_model_a_date_and_peers_with_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    models, stored = module("random_model").MODELS, committed()
    page = (ROOT / "docs/performance.md").read_text()
    for r in stored["rows"]:
        assert r["weights"] in {*known_recipes(), "bf16"}, r
        assert r["model"] in models and f"--model {r['model']}" in r["command"], r
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", r["date"]) and r["machine"], r
        for name in {*r["peers"], *r.get("aborted", ())}:
            assert name.split()[0] in stored["peers"] and f"--gguf {name.split()[-1]}" in r["command"], r
    for name, peer in stored["peers"].items():
        assert f"- {name} {peer['version']}: `{peer['build']}`" in page
    assert len({module("page").key(r) for r in stored["rows"]}) == len(stored["rows"])


def test_front_page_s_first_paragraph_says_what_its_rows_say() -> None:
    p = module("page")
    rows = {p.point(r): p.ratio(r) for r in committed()["rows"]
            if (r["machine"], r["model"]) == ("Zen 5", "gpt-oss-20b")}  # fmt: skip
    said = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"16 sequences of gpt-oss-20b's layers {rows['decode', 16, 64]:.1f} times as fast as ik_llama.cpp, "
        f"one sequence {rows['decode', 1, 64]:.1f} times, and computes prompts "
        f"{rows['prefill', 1, 512]:.1f} times as fast"
    ) in said


def test_only_the_marked_parts_change(root: Path) -> None:
    for _ in range(2):
        module("page").write(root / "results.json", root)
        page, front = (root / "docs/performance.md").read_text(), (root / "README.md").read_text()
        assert front.startswith("# By hand\n") and front.endswith("Also by hand\n")
        assert "Between" in page and "stale" not in page + front
        assert "| gpt-oss-20b: decode, batch 8 | 100 | 125 | **0.80x** | 0.300 / 0.400 | 10 % |" in page
        assert "| gpt-oss-20b: decode, batch 1 | 100 | 50.0 | 2.00x | 0.300 | 10 % |" in page
        assert "| gpt-oss-20b | 2.00x | – | **1.11x** | 2.00x | 2.00x |" in page
        assert "- a 1: `make`" in page
        assert "| decode, batch 8 | 100 against 125 | 0.80x |" in front
        assert "| decode, batch 16 | 100 against 50.0 | **2.00x** | 100, the peer aborts | – |" in front
        assert "the ratios of 3 models are 1.1x to 2.0x at batch 1,\n2.0x to 2.0x at 8" in front
    picture = (root / "docs/figures/performance.svg").read_text()
    assert picture.count("against") == 11 and picture.count("#c08a3e") == 1


def test_figure_of_another_machine_at_no_shared_point_is_in_the_main_table(root: Path) -> None:
    write_rows(root, [*some_rows(), row(80, 1, {"a q": 100.0}, machine="Zen 4", context=128)])
    module("page").write(root / "results.json", root)
    page = (root / "docs/performance.md").read_text()
    assert "| gpt-oss-20b (Zen 4): decode, batch 1 | 80.0 | 100 | **0.80x** |" in page


def test_page_without_markers_is_unchanged(root: Path) -> None:
    (root / "docs/performance.md").write_text("all by hand\n")
    with pytest.raises(SystemExit, match="measured: decode"):
        module("page").write(root / "results.json", root)
    assert (root / "docs/performance.md").read_text() == "all by hand\n"


def test_rows_are_kept_by_kind_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("farthing._native")
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setitem(sys.modules, "decode", decode := module("decode"))
    file = tmp_path / "deep/results.json"
    for ours, batch, machine in ((1.0, 1, "A"), (2.0, 8, "A"), (3.0, 1, "A"), (4.0, 1, "B")):
        about = {"machine": machine, "model": "L576", "ceilings": {}, "command": "bench/decode.py"}
        measured = row(ours, batch, {})
        for name in ("machine", "model", "command"):
            del measured[name]
        decode.keep(about | {"rows": [measured]}, file)
    kept = json.loads(file.read_text())
    assert [(r["machine"], r["batch"], r["ours_tok_s"]) for r in kept["rows"]] == [
        ("A", 8, 2.0),
        ("A", 1, 3.0),
        ("B", 1, 4.0),
    ]


def test_command_that_repeats_a_run_names_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("farthing._native")
    monkeypatch.syspath_prepend(str(BENCH))
    words = ["--model", "L576", "--into", "a/b.json", "--llama-bench", "ik=/x/llama-bench"]
    assert module("decode").repeated(words) == "bench/decode.py --model L576 --llama-bench ik=llama-bench"


def test_share_above_the_limit_is_rejected(root: Path) -> None:
    write_rows(root, [row(1040, 1, {})])
    with pytest.raises(SystemExit, match=r"batch 1: share_of_limit is 1\.04"):
        module("page").write(root / "results.json", root)
    assert "stale" in (root / "docs/performance.md").read_text()
