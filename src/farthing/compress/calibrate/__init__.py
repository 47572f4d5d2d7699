"""What the inputs of a matrix look like, and which range to quantize them in."""
