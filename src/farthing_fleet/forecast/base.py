"""What all forecasters share."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DAY_S = 86400.0
