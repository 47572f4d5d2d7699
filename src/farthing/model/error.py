"""The error every part of a model's configuration raises."""


class ConfigError(ValueError):
    """A config.json this engine cannot serve; names the field, its value and what is accepted."""
