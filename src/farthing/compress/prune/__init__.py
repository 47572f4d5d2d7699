"""Which weights, blocks, neurons or experts to remove."""
