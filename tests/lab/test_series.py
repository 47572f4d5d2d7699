"""Series: reading, gaps, coarse means, errors."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from farthing.bench.trace import seconds
from farthing_lab.series import Series, read_series


def test_reads_both_formats_plain_and_gzip(tmp_path: Path) -> None:
    plain = tmp_path / "a.csv"
    plain.write_text("t_s,total_rate_rps\n0,1.5\n600,2\n1200,4\n")
    series = read_series(plain)
    assert (series.step_s, series.values.tolist()) == (600.0, [1.5, 2.0, 4.0])
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress(b"timestamp,value\n2014-07-01 00:00:00,10\n2014-07-01 00:30:00,20\n"))
    series = read_series(packed)
    assert (series.step_s, series.start, series.name) == (1800.0, seconds("2014-07-01 00:00:00"), "b")
    assert series.values.tolist() == [10 / 1800, 20 / 1800]


def test_missing_step_is_interpolated(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("t_s,total_rate_rps\n0,1\n10,2\n20,3\n40,5\n50,6\n")
    assert read_series(path).values.tolist() == [1, 2, 3, 4, 5, 6]


def test_errors_name_wrong_columns_values_and_files(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("when,what\n0,1\n")
    with pytest.raises(ValueError, match="when, what"):
        read_series(path)
    path.write_text("t_s,total_rate_rps\n0,1\n10,-2\n")
    with pytest.raises(ValueError, match="line 3, total_rate_rps: got '-2'; expected a number from 0"):
        read_series(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_series(tmp_path / "none.csv")


def test_coarse_means_keep_the_end() -> None:
    series = Series(0.0, 60.0, np.arange(7.0)).coarse(3)
    assert series.values.tolist() == [2.0, 5.0]
    assert (series.start, series.step_s) == (60.0, 180.0)


def test_timestamps_with_seven_digits() -> None:
    assert seconds("1970-01-01 00:00:03.9799600") == pytest.approx(3.97996)
