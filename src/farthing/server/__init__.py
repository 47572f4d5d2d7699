"""HTTP: the OpenAI API, keys, limits, metrics."""
