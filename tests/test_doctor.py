"""`farthing doctor`: findings, advice and exit status."""

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from farthing import extras
from farthing.cli.check import doctor_app
from farthing.cpus import Cpus
from farthing.doctor import Check, Diagnosis, machine
from farthing.doctor import machine as software

run = CliRunner()


def by_name(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_the_command_prints_one_json_document() -> None:
    result = run.invoke(doctor_app, ["--no-measure", "--json"])
    document = json.loads(result.stdout)
    assert result.exit_code == 0 and document["healthy"]
    names = {check["name"] for check in document["checks"]}
    assert {
        "cpu",
        "instruction sets",
        "prefetching",
        "size",
        "python",
        "torch",
        "cpu kernels",
        "energy",
        "backend",
    } <= names
    assert "read bandwidth" not in names
    assert all(check["status"] in ("ok", "info", "warn", "fail") for check in document["checks"])


def test_the_table_shows_every_finding_and_its_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        Check(group="a", name="good", status="ok", detail="is [there]"),
        Check(group="b", name="bad", status="fail", detail="is missing", advice="install it"),
    ]
    monkeypatch.setattr("farthing.doctor.examine", lambda measure: Diagnosis(found))
    result = run.invoke(doctor_app, [])
    assert result.exit_code == 1, "something failed: serving will not work"
    for text in ("is [there]", "is missing", "install it"):
        assert text in result.stdout


def test_arm_lists_its_instruction_sets_as_features(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nFeatures : fp asimd asimddp i8mm bf16 sve\n")
    found = by_name(machine.check_processor(cpuinfo))["instruction sets"]
    assert found.data["instruction_sets"] == ["asimddp", "i8mm", "bf16"]
    assert found.status == "ok"


def test_instruction_sets_are_read_from_the_system(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name : A Fine CPU\nflags : fpu avx2 fma avx512f avx512_vnni\n")
    found = by_name(machine.check_processor(cpuinfo))
    assert "A Fine CPU" in found["cpu"].detail
    assert found["instruction sets"].data["instruction_sets"] == ["avx2", "fma", "avx512f", "avx512_vnni"]
    assert found["instruction sets"].status == "ok"


def test_cores_nodes_and_the_choice_of_threads_are_told() -> None:
    def told(cpus: Cpus) -> str:
        return by_name(machine.check_processor(cpus=cpus))["cores"].detail

    two = Cpus({0: ((0, 4), (1, 5)), 1: ((2, 6), (3, 7))}, machine_nodes=2)
    assert told(two).startswith(
        "4 of 8 hardware threads, 2 memory nodes; 4 threads by default, each bound to a core; the placement"
    )
    assert told(Cpus({0: ((0,), (1,))})) == "2, 1 memory node; 2 threads by default"
    assert told(Cpus({0: ((0,), (1,))}, 1.5)) == "2, 1 memory node, quota 1.5 CPUs; 1 thread by default"
    few = Cpus({0: ((0,),), 1: ((1,),)}, 1.0, machine_nodes=2)
    assert "1 thread by default; the placement" in told(few), "fewer threads than nodes are not bound"
    assert told(Cpus({1: ((2,), (3,))}, machine_nodes=2)).startswith("2, 1 of 2 memory nodes; 2 threads by")
    found = by_name(machine.check_processor(cpus=two))["cores"].data
    assert found == {"cores": 4, "hardware_threads": 8, "memory_nodes": 2, "quota": None, "threads": 4}


def test_a_system_that_does_not_tell_where_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(addresses: list[int]) -> list[int]:
        raise RuntimeError("move_pages: Operation not permitted")

    monkeypatch.setattr("farthing._native.nodes_of_pages", refuse)
    (found,) = (c for c in machine.check_processor(cpus=Cpus({0: ((0,),)}, None, 2)) if c.name == "cores")
    assert found.detail.endswith("cannot be verified (move_pages: Operation not permitted)")


def test_without_native_kernels_numpy_measures_and_advice_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "farthing._native", None)
    rate, how = machine.read_bandwidth(1)
    assert rate > 0 and "numpy" in how
    found = by_name(software.check_native())["cpu kernels"]
    assert found.status == "warn" and "--force-reinstall" in found.advice


def test_missing_torch_is_reported_but_is_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise software.PackageNotFoundError(name)

    monkeypatch.setattr(software, "version", version)
    found = by_name(software.check_python())
    assert found["torch"].status == "info" and "pip install 'torch>=2.9'" in found["torch"].advice
    assert Diagnosis(list(found.values())).healthy, "packed files are served without it"


def test_extras_are_read_from_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = [
        "numpy>=1",
        'pytest>=8 ; extra == "train"',
        'no-such-thing>=1; extra == "fleet"',
        'farthing[train,fleet]; extra == "ray"',
        'numpy; extra == "ray"',
    ]
    monkeypatch.setattr(extras, "requires", lambda name: declared)
    monkeypatch.setattr(extras, "_ranges", extras._ranges.__wrapped__)
    extras.declared.cache_clear()
    monkeypatch.setattr(extras, "declared", extras.declared.__wrapped__)
    assert extras.declared() == {
        "train": ["pytest"],
        "fleet": ["no-such-thing"],
        "ray": ["pytest", "no-such-thing", "numpy"],
    }
    found = by_name(software.check_extras())
    assert found["train"].status == "ok"
    assert found["fleet"].data["missing"] == ["no-such-thing"]
    assert found["fleet"].advice == "pip install 'no-such-thing>=1'"


def test_extras_of_other_distributions_are_found_by_the_bare_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray[serve]` is no distribution: `ray` is, and what its extra needs."""
    lines = {
        "farthing": ['ray[serve]>=2.51; extra == "ray"', 'httpx[http2]; extra == "fleet"'],
        "ray": [
            'starlette>=1; extra == "serve"',
            'uvicorn[standard]; extra == "serve"',
            'py-spy; python_version < "3" and extra == "serve"',
            'no-such-thing; extra == "tune"',
        ],
        "httpx": ['no-such-thing>=3 ; extra == "http2"'],
    }
    monkeypatch.setattr(extras, "requires", lambda name: lines.get(name))

    def version(name: str) -> str:
        if name not in (*lines, "starlette", "uvicorn"):
            raise extras.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(extras, "version", version)
    monkeypatch.setattr(extras, "declared", extras.declared.__wrapped__)
    assert extras.missing("ray") == [] and extras.extra_for("ray") == "ray"
    assert extras.missing("fleet") == ["httpx[http2]"], "httpx alone is not enough"


def test_missing_compiler_is_reported_but_is_not_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = by_name(software.check_compilers())["compilers"]
    assert found.status == "info" and found.detail == "none" and "g++" in found.advice


def test_machine_without_torch_is_still_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def no_torch(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    assert list(machine.check_gpus()) == []
    assert by_name(software.check_energy())["energy"].data["source"]
