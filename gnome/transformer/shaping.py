"""Shaped attention's sum over a sequence, alpha V + beta A - gamma C, as one kernel forward and one back.

C V is the running mean of the values, which as torch code is a scan of its own, read again by what adds the three terms, and a scan back
to front in backward.  Here each sequence of a head is walked through once: forward reads values and attention and writes their sum;
backward reads these and the sum's gradient, and needs no mean again, for with R_j = sum over i >= j of dY_i / i

    dV = alpha dY - gamma R,   dA = beta dY,   dalpha = sum dY V,   dbeta = sum dY A,   dgamma = -sum V R.

All is summed in FP32.  Without a GPU, and for other numbers than BF16 and FP16, `gnome.transformer.attention` computes the same.
"""

from typing import Any

import torch
from torch import Tensor

from gnome.fp8.kernels.availability import use_kernels

KERNEL_WIDTHS = (16, 32, 64, 128)


def has_kernel(values: Tensor) -> bool:
    """Whether values (B, H, T, d) can be shaped by the kernel."""
    return use_kernels(values.device) and values.shape[3] in KERNEL_WIDTHS and values.dtype in {torch.bfloat16, torch.float16}


def shaped_sequences(values: Tensor, attended: Tensor, gains: Tensor) -> Tensor:
    """Return alpha V + beta A - gamma C of values and attention (B, H, T, d), their dtype; `gains` (3, H) FP32."""
    shaped: Tensor = _shape(values.transpose(1, 2), attended.to(values.dtype).transpose(1, 2), gains)
    return shaped.transpose(1, 2)


@torch.library.custom_op("gnome::shape_sequences", mutates_args=())
def _shape(values: Tensor, attended: Tensor, gains: Tensor) -> Tensor:
    """Shape (B, T, H, d)."""
    from gnome.transformer.shaping_kernels import shape  # noqa: PLC0415 - Triton need not be installed

    return shape(values, attended, gains)


@_shape.register_fake
def _(values: Tensor, attended: Tensor, gains: Tensor) -> Tensor:
    del attended, gains
    return values.new_empty(values.shape)


@torch.library.custom_op("gnome::shape_sequences_backward", mutates_args=())
def _shape_backward(gradient: Tensor, values: Tensor, attended: Tensor, gains: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of values, attention and gains."""
    from gnome.transformer.shaping_kernels import shape_backward  # noqa: PLC0415 - Triton need not be installed

    return shape_backward(gradient, values, attended, gains)


@_shape_backward.register_fake
def _(gradient: Tensor, values: Tensor, attended: Tensor, gains: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    del gradient
    return values.new_empty(values.shape), attended.new_empty(attended.shape), torch.empty_like(gains)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _shape_backward(gradient, *ctx.saved_tensors)
    return gradients


_shape.register_autograd(_differentiate, setup_context=_save)
