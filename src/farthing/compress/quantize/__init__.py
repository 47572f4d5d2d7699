"""From a float matrix to one in fewer bits."""
