"""What edges see of each other at the atom that they reach: sums over Legendre polynomials of the angles between them.

With weights w_k of the edges k that reach an atom, the edge e reads for every degree l

    sum over k of w_k P_l(cos angle(k, e)) = sum over m of Y_lm(e) A_lm,   A_lm = sum over k of w_k Y_lm(k),

by the addition theorem, at a cost that is linear in the number of edges.  The moments A are as wide as 24 weights; a kernel keeps those of
one atom on chip, so that memory is passed over for harmonics, weights and sums alone.  P_l being symmetric in its edges, backward is the
same walk: of the sums' gradients to moments, and of these to weights.
"""

from typing import Any

import torch
from torch import Tensor

from gnome.fp8.kernels.availability import use_kernels
from gnome.graphs.harmonics import sum_degrees

KERNEL_CHANNELS = (16, 32, 64)
KERNEL_HARMONICS = 32


def angular_sums(weights: Tensor, harmonics: Tensor, receivers: Tensor, offsets: Tensor, degree: int) -> Tensor:
    """Return the sums (E, degree, C), in the dtype of the weights (E, C).

    harmonics (E, degree (degree + 2)) as of `spherical_harmonics`; receivers (E,) in order, those of atom i from offsets[i] to
    offsets[i + 1].  Moments are summed in FP32 at least.
    """
    if has_kernel(weights, harmonics):
        sums: Tensor = _sums(weights, harmonics.to(weights.dtype), offsets, degree)
        return sums
    n_moments, n_channels = harmonics.shape[1], weights.shape[1]
    wide = torch.promote_types(weights.dtype, torch.float32)
    products = (harmonics[:, :, None] * weights[:, None, :]).flatten(1).to(wide)
    moments = products.new_zeros(len(offsets) - 1, products.shape[1]).index_add_(0, receivers, products).to(weights.dtype)
    return sum_degrees(moments.index_select(0, receivers).unflatten(1, (n_moments, n_channels)) * harmonics[:, :, None], degree)


def has_kernel(weights: Tensor, harmonics: Tensor) -> bool:
    """Whether the kernel can do it; it gives the harmonics no gradient."""
    narrow = weights.dtype in {torch.bfloat16, torch.float16}
    fits = weights.shape[1] in KERNEL_CHANNELS and harmonics.shape[1] <= KERNEL_HARMONICS
    return narrow and fits and use_kernels(weights.device) and not harmonics.requires_grad


@torch.library.custom_op("gnome::angular_sums", mutates_args=())
def _sums(weights: Tensor, harmonics: Tensor, offsets: Tensor, degree: int) -> Tensor:
    """Sum as `angular_sums` says."""
    from gnome.graphs.angular_kernels import sums_of_weights  # noqa: PLC0415 - Triton need not be installed

    return sums_of_weights(weights, harmonics, offsets, degree)


@_sums.register_fake
def _(weights: Tensor, harmonics: Tensor, offsets: Tensor, degree: int) -> Tensor:
    del harmonics, offsets
    return weights.new_empty(weights.shape[0], degree, weights.shape[1])


@torch.library.custom_op("gnome::angular_sums_backward", mutates_args=())
def _backward(gradient: Tensor, harmonics: Tensor, offsets: Tensor) -> Tensor:
    """Return the gradient of the weights (E, C)."""
    from gnome.graphs.angular_kernels import gradient_of_weights  # noqa: PLC0415 - Triton need not be installed

    return gradient_of_weights(gradient, harmonics, offsets)


@_backward.register_fake
def _(gradient: Tensor, harmonics: Tensor, offsets: Tensor) -> Tensor:
    del harmonics, offsets
    return gradient.new_empty(gradient.shape[0], gradient.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[1:3])


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weights_gradient: Tensor = _backward(gradient, *ctx.saved_tensors)
    return weights_gradient, None, None, None


_sums.register_autograd(_differentiate, setup_context=_save)
