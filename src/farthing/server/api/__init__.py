"""The HTTP APIs. Each converts its requests to `turn.TurnRequest` and deltas to its own documents; none
depends on another's JSON."""
