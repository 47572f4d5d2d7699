"""Forecasters by name."""

from __future__ import annotations

from farthing.fleet.forecast.base import Forecaster, LastValue, Seasonal
from farthing.fleet.series import DAY_S

PATHS = ("naive", "seasonal", "seasonal-week", "ridge", "ar", "profile", "mix", "prophet", "day")


def make(model: str, country: str | None = None) -> Forecaster:
    """A forecaster by name. Raises ValueError with the known names."""
    if model in ("naive", "last-value"):
        return LastValue()
    if model == "seasonal":
        return Seasonal(DAY_S)
    if model == "seasonal-week":
        return Seasonal(7 * DAY_S)
    if model == "ridge":
        from farthing.fleet.forecast.ridge import RidgeAR

        return RidgeAR()
    if model == "ar":
        from farthing.fleet.forecast.ridge import AbsoluteAR

        return AbsoluteAR()
    if model == "mix":
        from farthing.fleet.forecast.mix import Mix, profiles

        return Mix(slow=profiles(country))
    if model == "profile":
        from farthing.fleet.forecast.profile import ProfileAR, ProfileConfig

        return ProfileAR(ProfileConfig(country=country))
    if model in ("prophet", "day"):
        from farthing.fleet.forecast.day import DayForecaster
        from farthing.fleet.forecast.prophet import ProphetConfig

        return DayForecaster(ProphetConfig(country=country), blend=model == "day")
    raise ValueError(f"model {model!r}: expected one of {', '.join(PATHS)}")
