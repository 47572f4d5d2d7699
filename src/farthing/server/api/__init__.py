"""The HTTP APIs. Each turns its requests into `turns.TurnRequest` and deltas into its own documents; none is
built on another's JSON."""
