"""Agent sessions against a real server: growing prompts, returned answers, consistent totals."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from farthing.bench.agent import SessionShape, recorded, run_sessions, summarize, synthetic
from farthing.bench.load import Target
from farthing.cli.bench import app
from farthing.config import EngineConfig
from farthing.engine.build import build_engine
from tests.server.api.loops import ASK, scripted
from tests.server.harness import ScriptedEngine, running


def test_ten_turn_tool_loop_computes_only_new_tokens() -> None:
    shape = SessionShape(turns=10, system_words=200, ask_words=20, result_words=10)
    with running(build_engine(EngineConfig(model="mite", threads=1, max_num_seqs=4))) as server:
        target = Target(server.url, "tiny")
        timings = asyncio.run(run_sessions(target, synthetic(shape, 2), 1, 16, seed=3))
    result = summarize(timings, usd_per_hour=1.0)
    assert (result.failed, result.sessions, result.turns) == (0, 2, 20)
    for session in timings:
        for before, now in itertools.pairwise(session):
            assert now.prompt_tokens > before.prompt_tokens
            computed = now.prompt_tokens - now.cached_tokens
            new = now.prompt_tokens - before.prompt_tokens - before.output_tokens
            assert computed <= new + 2 * 16  # the question, and tokens of incomplete cache blocks
    assert result.reused_share > 0.95
    assert 0.95 * result.repeated_share < result.cached_share_later <= result.repeated_share < 1
    assert result.usd_per_session and result.turn_ms["p50"] > 0


def test_calls_are_answered() -> None:
    with scripted("deepseek_v4") as (server, engine):
        sessions = synthetic(SessionShape(turns=3), 1)
        ((first, *_),) = asyncio.run(run_sessions(Target(server.url, "tiny"), sessions, 1, 500))
        assert first.calls[0]["function"]["name"] == "add" and first.reasoning
        assert f"<tool_result>{sessions[0].says[1]}</tool_result>" in engine.prompts[1]


def test_a_failed_turn_ends_its_session() -> None:
    with running(ScriptedEngine(finish_reason="error")) as server:
        timings = asyncio.run(
            run_sessions(Target(server.url, "tiny"), synthetic(SessionShape(turns=3), 2), 2, 5)
        )
    assert [len(session) for session in timings] == [1, 1]
    assert summarize(timings).failed == 2


def test_recordings(tmp_path: Path) -> None:
    file = tmp_path / "cases.json"
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(4) for role in ("user", "assistant")]
    file.write_text(json.dumps({"cases": [{"messages": turns}, {"messages": turns[:1]}, {"prompt": "x"}]}))
    sessions = recorded(file, 3, turns=3, characters=1000)
    assert [session.says for session in sessions] == [("user 0", "user 1", "user 2")] * 3
    assert recorded(file, 1, turns=9, characters=13)[0].says == ("user 0", "user 1")
    for text in ("{", "[]", '{"cases": []}', '{"cases": [{"messages": 5}]}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=str(file)):
            recorded(file, 1, 3, 1000)


def test_command() -> None:
    with running(ScriptedEngine([ASK])) as server:
        options = [
            "serve",
            "--url",
            server.url,
            "--workload",
            "agent",
            "--sessions",
            "2",
            "--turns",
            "3",
            "--json",
        ]
        found = CliRunner().invoke(app, options)
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout.strip().splitlines()[-1])["turns"] == 6
        wrong = CliRunner().invoke(app, [*options, "--turns", "0"])
        assert wrong.exit_code == 2 and "turns: got 0" in wrong.output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--sessions", "0"], "sessions: got 0; expected an integer >= 1"),
        (["--rate", "2"], "--rate: got"),
        (["--trace", "x"], "--trace: got"),
        (["--requests", "128"], "--requests: got"),
        (["--input-tokens", "9"], "--input-tokens: got"),
        (["--picture", "x.png"], "--picture: got"),
    ],
)
def test_options_that_do_not_fit_sessions_are_refused(options: list[str], named: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--workload", "agent", *options], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert named in result.output


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "which cannot be read: No such file or directory"),
        ("{", "which is not JSON: Expecting property name"),
        ("[]", "in which `cases` is missing; expected a list of conversations"),
        ('{"cases": [{"messages": 5}]}', "in which cases[0].messages is no list"),
        (
            '{"cases": [{"messages": [{"role": "user"}]}]}',
            "in which cases[0].messages[0] lacks role or content",
        ),
    ],
)
def test_errors_of_recordings_are_plain(tmp_path: Path, text: str | None, why: str) -> None:
    file = tmp_path / "sessions.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match="recording: got") as refused:
        recorded(file, 1, 3, 1000)
    assert why in str(refused.value) and "Error(" not in str(refused.value)
