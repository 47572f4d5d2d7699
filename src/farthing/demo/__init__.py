"""`make demo`: every lever on the embedded model, measured through the product's public faces."""
