"""Input statistics of every matrix, and the range to quantize the inputs in."""
