"""Progress on a terminal, and where stderr is none."""

from __future__ import annotations

import pytest
from rich.progress import TaskProgressColumn

from farthing.cli.tables import _bar, step_progress
from farthing.process import LINE_SECONDS


def test_lines_begin_at_once_and_say_how_long_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr("farthing.process.time.monotonic", lambda: now)
    with step_progress("compressing") as progress:
        progress("layer 1 of 2", 0, 200)
        assert capsys.readouterr().err == "layer 1 of 2: 0%\n"
        now += LINE_SECONDS / 2
        progress("layer 1 of 2", 4, 200)
        assert not capsys.readouterr().err
        now += LINE_SECONDS / 2
        progress("layer 1 of 2", 10, 200)
        assert capsys.readouterr().err == "layer 1 of 2: 5%, about 3 min left\n"
        now += 18000 - LINE_SECONDS
        progress("layer 2 of 2", 100, 200)
        assert capsys.readouterr().err == "layer 2 of 2: 50%, about 5.0 h left\n"
        now += LINE_SECONDS
        progress("measuring", 5, 50)  # other work at another speed
        assert capsys.readouterr().err == "measuring: 10%\n"


def test_a_bar_says_how_long_is_left_where_steps_take_minutes() -> None:
    bar, now = _bar(TaskProgressColumn()), 0.0
    assert bar.console.stderr, "results go to stdout"
    bar.get_time = lambda: now
    task = bar.add_task("layer 1 of 61", total=100)
    bar.start_task(task)
    for done in range(4):
        bar.update(task, completed=done)
        now += 90.0
    assert bar.tasks[0].time_remaining == 97 * 90
