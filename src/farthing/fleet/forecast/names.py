"""Forecasters by name."""

from __future__ import annotations

from farthing.fleet.forecast.base import Forecaster, LastValue, Seasonal
from farthing.fleet.series import DAY_S

PATHS = ("naive", "seasonal", "seasonal-week", "ar", "profile", "prophet", "day")


def make(model: str, country: str | None = None) -> Forecaster:
    """A forecaster by name. Raises ValueError with the known names."""
    if model in ("naive", "last-value"):
        return LastValue()
    if model == "seasonal":
        return Seasonal(DAY_S)
    if model == "seasonal-week":
        return Seasonal(7 * DAY_S)
    if model == "ar":
        from farthing.fleet.forecast.autoregression import AbsoluteAR

        return AbsoluteAR()
    if model == "profile":
        from farthing.fleet.forecast.profile import ProfileAR, ProfileConfig

        return ProfileAR(ProfileConfig(country=country))
    if model in ("prophet", "day"):
        from farthing.fleet.forecast.day import DayForecaster
        from farthing.fleet.forecast.prophet import ProphetConfig

        return DayForecaster(ProphetConfig(country=country), blend=model == "day")
    raise ValueError(f"model {model!r}: expected one of {', '.join(PATHS)}")
