"""Runs all checks in display order."""

from __future__ import annotations

from itertools import chain

from farthing.doctor import machine, software
from farthing.doctor.check import Check, Diagnosis
from farthing.extras import has_torch


def examine(measure: bool = True) -> Diagnosis:
    """Check the machine. measure: also measure memory bandwidth, which briefly uses every core."""
    checks = chain(
        machine.check_processor(),
        machine.check_memory(measure),
        machine.check_gpus(),
        software.check_python(),
        software.check_native(),
        software.check_compilers(),
        software.check_extras(),
        software.check_energy(),
        [_backend()],
    )
    return Diagnosis(list(checks))


def _backend() -> Check:
    """The backend that `--backend auto` resolves to, found by building it."""
    try:
        from farthing.ops import select

        ops = select(arrays=not has_torch())
    except (ImportError, RuntimeError, OSError) as error:
        return Check(group="serving", name="backend", status="fail", detail=str(error), advice="see above")
    slow = ops.name.startswith("torch/cpu")
    advice = "build the CPU kernels, or use a GPU: the torch ops are slower" if slow else ""
    if has_torch() and ops.device.type == "cpu" and (other := _accelerator()):
        advice = f"torch has a device of type {other}: --backend torch --device {other} (not tested on one)"
    return Check(
        group="serving",
        name="backend",
        status="warn" if slow else "ok",
        detail=f"auto resolves to {ops.name}",
        advice=advice,
        data={"backend": ops.name},
    )


def _accelerator() -> str | None:
    """The type of torch's accelerator, if there is one."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else str(found.type)
