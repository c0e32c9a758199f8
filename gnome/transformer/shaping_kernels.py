"""The kernels of `shaping`: a program walks through the sequence of one head, tile by tile, and carries the running sum."""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Tokens of a tile."""


@triton.jit
def tile_of(tensor, sequence, head, place, valid, strides, D: tl.constexpr):
    """Return pointers (BLOCK, D) into a tensor (B, T, H, D), whose last stride is 1, and the mask of those that exist."""
    begin = tensor + sequence.to(tl.int64) * strides[0] + head * strides[2]
    return begin + place[:, None] * strides[1] + tl.arange(0, D)[None, :], valid[:, None]


@triton.jit
def gains_of(gains, head, n_heads):
    """Return alpha, beta and gamma of a head."""
    return tl.load(gains + head), tl.load(gains + n_heads + head), tl.load(gains + 2 * n_heads + head)


@triton.jit
def shape_kernel(
    values, attended, shaped, gains, n_tokens, n_heads, value_strides, attended_strides, shaped_strides,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write shaped = alpha values + beta attended - gamma mean of the values so far."""
    sequence, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    alpha, beta, gamma = gains_of(gains, head, n_heads)
    row = tl.arange(0, BLOCK)
    not_after = (row[:, None] >= row[None, :]).to(tl.float32)
    carried = tl.zeros((D,), tl.float32)
    for start in range(0, n_tokens, BLOCK):
        place = start + row
        at_values, mask = tile_of(values, sequence, head, place, place < n_tokens, value_strides, D)
        at_attended, _ = tile_of(attended, sequence, head, place, place < n_tokens, attended_strides, D)
        at_shaped, _ = tile_of(shaped, sequence, head, place, place < n_tokens, shaped_strides, D)
        v = tl.load(at_values, mask, other=0.0).to(tl.float32)
        a = tl.load(at_attended, mask, other=0.0).to(tl.float32)
        total = carried[None, :] + tl.dot(not_after, v, input_precision="tf32")  # exact: BF16 and FP16 have no more bits
        mean = total / (place + 1)[:, None].to(tl.float32)
        carried += tl.sum(v, 0)
        tl.store(at_shaped, (alpha * v + beta * a - gamma * mean).to(shaped.dtype.element_ty), mask)


@triton.jit
def shape_backward_kernel(
    gradient, values, attended, value_gradient, attended_gradient, sums, gains, n_tokens, n_heads,
    gradient_strides, value_strides, attended_strides, own_strides,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of values and attention, and this sequence's part of the gains', sums (3, B, H)."""
    sequence, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    alpha, beta, gamma = gains_of(gains, head, n_heads)
    row = tl.arange(0, BLOCK)
    not_before = (row[:, None] <= row[None, :]).to(tl.float32)
    carried = tl.zeros((D,), tl.float32)
    of_alpha = tl.zeros((D,), tl.float32)
    of_beta = tl.zeros((D,), tl.float32)
    of_gamma = tl.zeros((D,), tl.float32)
    for start in range(tl.cdiv(n_tokens, BLOCK) * BLOCK - BLOCK, -1, -BLOCK):
        place = start + row
        at_gradient, mask = tile_of(gradient, sequence, head, place, place < n_tokens, gradient_strides, D)
        at_values, _ = tile_of(values, sequence, head, place, place < n_tokens, value_strides, D)
        at_attended, _ = tile_of(attended, sequence, head, place, place < n_tokens, attended_strides, D)
        g = tl.load(at_gradient, mask, other=0.0).to(tl.float32)
        v = tl.load(at_values, mask, other=0.0).to(tl.float32)
        a = tl.load(at_attended, mask, other=0.0).to(tl.float32)
        share = g / (place + 1)[:, None].to(tl.float32)
        later = carried[None, :] + tl.dot(not_before, share, input_precision="tf32")
        carried += tl.sum(share, 0)
        of_alpha += tl.sum(g * v, 0)
        of_beta += tl.sum(g * a, 0)
        of_gamma -= tl.sum(v * later, 0)
        at_own, _ = tile_of(value_gradient, sequence, head, place, place < n_tokens, own_strides, D)
        tl.store(at_own, (alpha * g - gamma * later).to(value_gradient.dtype.element_ty), mask)
        at_own, _ = tile_of(attended_gradient, sequence, head, place, place < n_tokens, own_strides, D)
        tl.store(at_own, (beta * g).to(attended_gradient.dtype.element_ty), mask)
    n_programs = tl.num_programs(0)
    tl.store(sums + tl.program_id(0), tl.sum(of_alpha, 0))
    tl.store(sums + n_programs + tl.program_id(0), tl.sum(of_beta, 0))
    tl.store(sums + 2 * n_programs + tl.program_id(0), tl.sum(of_gamma, 0))


def shape(values: Tensor, attended: Tensor, gains: Tensor) -> Tensor:
    """Return alpha V + beta A - gamma C of (B, T, H, d), contiguous."""
    values, attended = with_rows(values), with_rows(attended)
    batch, n_tokens, heads, width = values.shape
    shaped = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    if shaped.numel():
        shape_kernel[batch * heads,](
            values, attended, shaped, gains.contiguous(), n_tokens, heads, values.stride()[:3], attended.stride()[:3],
            shaped.stride()[:3], D=width, BLOCK=BLOCK,
        )  # fmt: skip
    return shaped


def shape_backward(gradient: Tensor, values: Tensor, attended: Tensor, gains: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of values and attention (B, T, H, d), contiguous, and of the gains (3, H)."""
    gradient, values, attended = with_rows(gradient), with_rows(values), with_rows(attended)
    batch, n_tokens, heads, width = values.shape
    own = [torch.empty(values.shape, dtype=values.dtype, device=values.device) for _ in range(2)]
    sums = torch.zeros((3, batch, heads), dtype=torch.float32, device=values.device)
    if values.numel():
        shape_backward_kernel[batch * heads,](
            gradient, values, attended, *own, sums, gains.contiguous(), n_tokens, heads, gradient.stride()[:3],
            values.stride()[:3], attended.stride()[:3], own[0].stride()[:3], D=width, BLOCK=BLOCK,
        )  # fmt: skip
    return own[0], own[1], sums.sum(1)


def with_rows(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension lies in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()
