"""Signals of a fleet, under the same names for every server.

dialects   the metric names of vLLM, SGLang and Farthing
scrape     replicas' /metrics, read directly
prometheus a Prometheus server, by its HTTP API
coldstart  launch-to-ready times and their P90

A source's `read(current)` returns a `Snapshot`. A missing signal is None, not zero.
"""

from farthing.fleet.signals.coldstart import ColdStarts
from farthing.fleet.signals.dialects import DIALECTS, Dialect, detect
from farthing.fleet.signals.prometheus import PrometheusError, PrometheusSource
from farthing.fleet.signals.scrape import ScrapeSource
from farthing.fleet.signals.source import Source

__all__ = [
    "DIALECTS",
    "ColdStarts",
    "Dialect",
    "PrometheusError",
    "PrometheusSource",
    "ScrapeSource",
    "Source",
    "detect",
]
