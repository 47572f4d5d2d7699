"""Chat formats: how a model reads a conversation and how its output is taken apart. One small file each."""
