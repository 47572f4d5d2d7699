"""The demo keeps what it has, goes on without what fails, and waits for what still works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from farthing.cost.prices import Prices
from farthing_lab.demo import __main__ as demo
from farthing_lab.demo import processes
from farthing_lab.demo.fleet import FleetRun, picture
from farthing_lab.demo.levers import Lever, Measured
from farthing_lab.demo.report import Answer, Compressed, Report

ROW = Measured(100.0, 400.0, 2000.0, 20.0, 10.0, 1e8, 0.01)


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    return Report(tmp_path / "report.html", Prices.load().machine("cpu", count=2))


def test_a_part_that_ended_is_not_run_again(report: Report) -> None:
    made = Compressed("int4", "x", 2.0, 1.0, 3.0, "+0.1 %")
    assert demo.part(report, "int4", "Compression", Compressed, lambda: made) == made

    def fails() -> Compressed:
        raise AssertionError("run again")

    assert demo.part(report, "int4", "Compression", Compressed, fails) == made


def test_a_part_that_fails_is_named_in_the_report_and_tried_again(report: Report, tmp_path: Path) -> None:
    def fails() -> Answer:
        raise RuntimeError("no <network>")

    assert demo.part(report, "answer", "A question", Answer, fails) is None
    assert not list(tmp_path.glob("answer*"))
    report.write()
    assert "left out: no &lt;network&gt;" in report.path.read_text("utf-8")


def test_the_report_begins_with_the_answer_and_escapes_what_a_model_wrote(report: Report) -> None:
    report.answer = Answer("m", "Why?", "<script>alert(1)</script>\n\nBecause.", 11, 0.1, 1.1)
    report.levers, report.rows = [Lever("a", "m"), Lever("b", "m")], [ROW, ROW]
    report.fleet = FleetRun(
        9, 0, 12.0, [0.0, 1.0, 2.0], [1, 2, 1], [2, 2, 1], [3.0, 5.0], ["1.0 s  1 -> 2: load"]
    )
    report.write()
    page = report.path.read_text("utf-8")
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.index("Because.") < page.index("Cost per token") < page.index("A fleet that scales")
    assert "then 10 a second" in report.said and "within 5 %" in page
    assert "<svg" in picture(report.fleet) and "nan" not in picture(report.fleet)


def test_a_row_says_where_it_differs_from_another() -> None:
    other = Measured(80.0, 404.0, 4000.0, 20.0, 10.0, 1e8, 0.01)
    assert other.against(ROW) == "one user 0.80x, prompts 2.00x"


def test_what_works_is_waited_for_and_what_does_not_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[str]()
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    busy = "import time\nend = time.process_time() + 60\nwhile time.process_time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", busy]) as process:
        watch = processes.Watch("it", process.pid, said.append)
        for _ in range(3):  # half an hour by the clock, in which it computes
            before = processes._work(process.pid)
            while processes._work(process.pid) < before + 1.5:
                pass
            now[0] += 600
            watch.look()
        process.kill()
        process.wait()
        assert said and said[0] == "it: 600 s, still working"
        watch.look()
        now[0] += processes.STUCK + 1
        with pytest.raises(RuntimeError, match="it has done nothing for 180 s"):
            watch.look()


def test_a_command_that_fails_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"`farthing show no-such-model` ended with exit code 2"):
        processes.cli(print, "show", "no-such-model")
    assert json.loads(processes.cli(print, "show", "mite", "--json"))["model"] == "mite"
