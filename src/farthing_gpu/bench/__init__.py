"""Measures every kernel on the current GPU, and chooses configurations: `python -m farthing_gpu.bench`."""
