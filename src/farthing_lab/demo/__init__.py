"""`make demo`: every lever on the embedded model, measured through public interfaces."""
