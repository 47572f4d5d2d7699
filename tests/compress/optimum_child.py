"""Optimum on an exported file, in an interpreter that has Optimum: python optimum_child.py DIRECTORY.

DIRECTORY holds model.onnx and input.npy; writes output.npy.
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
