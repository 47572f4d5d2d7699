"""Declared prices: the packaged file, the user's overlay, the choice by device name, the errors."""

from pathlib import Path

import pytest

from farthing.cost.prices import Hardware, Machine, Prices


@pytest.fixture(autouse=True)
def no_user_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FARTHING_PRICES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_packaged_prices_are_dated_and_have_fallbacks() -> None:
    prices = Prices.load()
    assert prices.declared and prices.usd_per_kwh == 0
    assert prices.find("cpu", "anything at all").name == "vcpu"
    assert prices.find("gpu", "an unknown card").name == "gpu"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_the_longest_match_wins(device: str, name: str) -> None:
    assert Prices.load().find("gpu", device).name == name


def test_a_user_file_changes_a_field_and_adds_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        'declared = "2027-01-01"\nusd_per_kwh = 0.3\n[hardware.h100]\nusd_per_hour = 1.1\n'
        '[hardware.box]\nkind = "cpu"\nunits = "machine"\nusd_per_hour = 0.5\nwatts = 300\nidle_watts = 100\n'
        'match = ["EPYC"]\n'
    )
    monkeypatch.setenv("FARTHING_PRICES", str(file))
    prices = Prices.load()
    assert prices.hardware["h100"].usd_per_hour == 1.1 and prices.hardware["h100"].watts == 700
    box = prices.machine("cpu", "AMD EPYC 9654", count=96)
    assert (box.usd_per_hour, box.watts, box.idle_watts) == (0.5, 300, 100)
    assert box.usd_per_joule == pytest.approx(0.3 / 3.6e6)
    assert box.declared == "2027-01-01"


def test_a_machine_is_its_units_and_their_hosts() -> None:
    machine = Prices.load().machine("gpu", "NVIDIA H100", count=8)
    assert machine.usd_per_hour == pytest.approx(20.0)
    assert machine.usd_per_second == pytest.approx(20.0 / 3600)
    assert machine.watts == 8 * 1000 and machine.host_watts == 8 * 300 and machine.idle_watts == 8 * 375


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("not toml", "not TOML"),
        ("price = 3", r"unknown \['price'\]"),
        ("[hardware.x]\nkind = 'cpu'", "hardware.x lacks"),
        ("[hardware.h100]\ncolour = 'red'", "expected a table of"),
        ("[hardware.h100]\nusd_per_hour = -1", "hardware.h100.usd_per_hour: got -1"),
        ("[hardware.h100]\nusd_per_hour = 'cheap'", "hardware.h100.usd_per_hour: got 'cheap'"),
        ("[hardware.h100]\nidle_watts = 9000", "expected at most watts"),
        ("[hardware.h100]\nkind = 'tpu'", "expected 'cpu' or 'gpu'"),
        ("[hardware.h100]\nmatch = 'h100'", "expected a list of strings"),
        ("usd_per_kwh = true", "usd_per_kwh: got True"),
    ],
)
def test_errors_name_the_file_the_field_and_the_value(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=part) as error:
        Prices.load(file)
    assert str(file) in str(error.value)


def test_missing_file_unknown_name_and_no_units(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Prices.load(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="hardware: got 'abacus'; expected one of"):
        Prices.load().machine("cpu", name="abacus")
    with pytest.raises(ValueError, match="count: got 0"):
        Machine(Hardware(name="x", kind="cpu", usd_per_hour=1, watts=1, idle_watts=1), 0)
