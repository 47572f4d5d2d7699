"""The error for model configurations."""


class ConfigError(ValueError):
    """This engine cannot serve a config.json; the message names the field, its value and what is accepted."""
