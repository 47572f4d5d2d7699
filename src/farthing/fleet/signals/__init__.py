"""What a fleet says about itself, under one set of names whatever the server.

dialects   the metric names of vLLM, SGLang and Farthing
scrape     replicas' /metrics, read directly
prometheus a Prometheus server, by its HTTP API
coldstart  launch-to-ready times and their P90

A source answers `read(current)` with a `Snapshot`. A signal it could not have is None, which is not zero.
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
