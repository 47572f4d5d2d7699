"""Types of the forecasters, and the plan that the dashboard draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farthing.files import replace_text

Floats = NDArray[np.float64]
DAY_S = 86400.0

# The plan of the last decision, for the dashboard.

FORECASTS = "forecasts.json"  # in the state directory


def write_forecast(path: Path, unit: str, start: float, lead_s: float, load: float, planned: float) -> None:
    """Write the present load and the one planned for over a lead, atomically."""
    band = {"start": start, "step_s": lead_s, "p50": [load], "p90": [max(load, planned)], "source": "plan"}
    replace_text(path, json.dumps({"unit": unit, "forecasts": {"short": band}}), durable=False)


def read_forecasts(path: Path) -> tuple[str, dict[str, Any]]:
    """(unit, {level: curve}) as written by `write_forecast`; ("requests", {}) if there are none."""
    try:
        data = json.loads(path.read_text())
        return str(data["unit"]), dict(data["forecasts"])
    except (OSError, ValueError, KeyError):
        return "requests", {}
