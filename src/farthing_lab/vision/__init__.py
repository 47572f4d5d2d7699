"""Integer convolutions on the CPU kernels, for image models such as the ResNet-50 of docs/lab."""

from farthing_lab.vision.conv import IMAGE_ZERO, ConvProgram, Output, Plane

__all__ = ["IMAGE_ZERO", "ConvProgram", "Output", "Plane"]
