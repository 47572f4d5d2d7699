"""How much one hostile client delays another."""
