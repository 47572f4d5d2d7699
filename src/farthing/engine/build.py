"""`build_engine` starts an engine from a configuration."""

from __future__ import annotations

from farthing.config import EngineConfig
from farthing.engine.engine import Engine
from farthing.engine.load import load_engine


def build_engine(config: EngineConfig) -> Engine:
    """Load a model and start an engine over it.

    Raises ValueError naming a field that does not fit the model, OSError for a missing or unreadable file.
    """
    if not config.disaggregate:
        return load_engine(config)
    from farthing.engine.disaggregate import load_disaggregated  # starts a second process

    return load_disaggregated(config)
