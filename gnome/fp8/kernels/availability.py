"""Whether the Triton kernels can run on a tensor's device."""

import importlib.util

import torch

_spec = importlib.util.find_spec("triton")
TRITON_INSTALLED = _spec is not None and _spec.origin is not None  # a folder that happens to be named so has no origin
"""Whether Triton can be imported; it is not imported here, and torch.compile cannot ask for it."""


def use_kernels(device: torch.device) -> bool:
    """Whether work on this device goes through the kernels; elsewhere torch code computes the same."""
    return device.type == "cuda" and TRITON_INSTALLED


def has_fp8_gemm(device_index: int) -> bool:
    """Whether a GPU multiplies FP8 matrices (compute capability 8.9 and later)."""
    return torch.cuda.get_device_capability(device_index) >= (8, 9)
