"""Trace files of other tools, damaged files, and values out of range."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from typer.testing import CliRunner

from farthing_lab.cli.replay import app
from farthing_lab.replay.trace import RequestTrace, read_trace
from farthing_lab.series import Series

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
RATES = "t_s,total_rate_rps\n0,1\n"


def json_line(timestamp: str, prompt: str = "10", more: str = "") -> str:
    return f'{{"timestamp": {timestamp}, "input_length": {prompt}, "output_length": 5{more}}}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RATES + "600\n1200,2\n", "line 3, total_rate_rps: got None; expected a number from 0"),
        (RATES + "600,\n1200,2\n", "line 3, total_rate_rps: got ''; expected a number"),
        (RATES + "600,nan\n", "line 3, total_rate_rps: got 'nan'"),
        (RATES + "nan,2\n1200,2\n", "line 3, t_s: got 'nan'; expected a number"),
        (RATES + "-inf,1\n600,1\n", "line 3, t_s: got '-inf'"),
        (RATES + "1,1\n2,1\n1e10,1\n", "line 5, t_s: got '1e10,1'; expected all times within 10,000,000 s"),
        (
            RATES + "600,1\n1200,1\n1e9,1\n",
            "line 5, t_s: got '1e9,1'; expected all times within 63,158,400 s",
        ),
        (AZURE + "2023-11-16 18:15:46.68,,5\n", "line 2, ContextTokens: got ''; expected a number from 0"),
        (AZURE + "2023-11-16 18:15:46,3.5,5\n", "line 2, ContextTokens: got '3.5'; expected a whole"),
        (AZURE + "2023-11-16 18:15:46,-3,5\n", "line 2, ContextTokens: got '-3'; expected a number from 0"),
        (AZURE + "yesterday,3,5\n", "line 2, TIMESTAMP: got 'yesterday'; expected a time such as 2024"),
        (AZURE + "1e20,3,5\n", "line 2, TIMESTAMP: got '1e20'; expected a time such as 2024"),
        (json_line("0") + json_line("1e13"), "line 2, timestamp: got .* expected all times within"),
        (json_line("0") + json_line("NaN"), "line 2, timestamp: got nan; expected a number"),
        (json_line("0", "1e30"), "line 1, input_length: got 1e[+]30; expected a number from 0 to 1e[+]09"),
        (json_line("0", more=', "hash_ids": 3'), "line 1, hash_ids: got 3; expected a list of integers"),
        (json_line("0") + "[1]\n", "line 2: got \\[1\\]; expected a JSON object"),
        (json_line("0") + "{\n", "line 2: not JSON"),
    ],
)
def test_wrong_values_are_named_with_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}, {message}"):
        read_trace(path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    whole = gzip.compress((RATES + "600,2\n" * 99).encode())
    damaged = (whole[:20], whole[:-9] + b"\0" * 9)
    for data, message in (*((one, "damaged or incomplete gzip") for one in damaged), (b"\xc0\xff", "UTF-8")):
        path.write_bytes(data)
        result = CliRunner().invoke(app, [str(path)])
        assert result.exit_code == 2 and message in result.output and str(path) in result.output


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("2024-05-10 00:00:00.5+00:00", "2024-05-10 00:00:01+00:00"),
        ("2024-05-10T00:00:00.5Z", "2024-05-10T00:00:01Z"),
        ("2024-05-10 00:00:00.5", "2024-05-10 02:00:01+02:00"),
        ("1715299200.5", "1715299201"),
        ("1715299200500", "1715299201000"),
    ],
)
def test_times_of_other_tools(tmp_path: Path, first: str, second: str) -> None:
    path = tmp_path / "trace"
    path.write_text("\ufeff" + AZURE + f"{first},10,5\n{second},20.0,5\n")
    trace = read_trace(path)
    assert isinstance(trace, RequestTrace)
    assert trace.arrival_s.tolist() == [0, 0.5] and trace.prompt_tokens.tolist() == [10, 20]
    path.write_text(f"\ufefftimestamp,value\n{first},10\n{second},20\n")
    series = read_trace(path)
    assert isinstance(series, Series)
    assert (series.start, series.step_s) == (1715299200.5, 0.5)


def test_null_as_hash_ids_means_none(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(json_line("0", more=', "hash_ids": null') + json_line("9"))
    assert isinstance(trace := read_trace(path), RequestTrace) and trace.blocks == ((), ())
