"""Run Optimum on an exported file, in an interpreter with Optimum: python optimum_child.py DIRECTORY.

Reads model.onnx and input.npy from DIRECTORY and writes output.npy.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from optimum.onnxruntime import ORTModelForImageClassification
from transformers import PretrainedConfig

directory = Path(sys.argv[1])
config = PretrainedConfig()
config.save_pretrained(directory)
model = ORTModelForImageClassification.from_pretrained(directory, config=config)
np.save(directory / "output.npy", model(np.load(directory / "input.npy")).logits)
