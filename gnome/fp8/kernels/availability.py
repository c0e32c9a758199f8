"""Whether the Triton kernels can run on a tensor's device."""

import functools
import importlib.util

import torch


@functools.cache
def triton_installed() -> bool:
    """Whether Triton can be imported; it is not imported here."""
    spec = importlib.util.find_spec("triton")
    return spec is not None and spec.origin is not None  # a folder that happens to be named so has no origin


def use_kernels(device: torch.device) -> bool:
    """Whether work on this device goes through the kernels; elsewhere torch code computes the same."""
    return device.type == "cuda" and triton_installed()


@functools.cache
def has_fp8_gemm(device_index: int) -> bool:
    """Whether a GPU multiplies FP8 matrices (compute capability 8.9 and later)."""
    return torch.cuda.get_device_capability(device_index) >= (8, 9)
