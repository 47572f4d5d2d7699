"""Before any test imports Triton: kernels are interpreted on the CPU, unless `make test-gpu` says no."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
