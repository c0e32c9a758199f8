"""Launches of the edge block's kernels: what is allocated, in which layout, and in which order."""

# mypy: disable-error-code="import-not-found"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from gnome.fp8.kernels.edge_backward import edge_backward_kernel
from gnome.fp8.kernels.edge_forward import edge_forward_kernel
from gnome.fp8.kernels.edge_weights import edge_weights
from gnome.fp8.kernels.segment_sum import segment_sum, weight_gradient

if TYPE_CHECKING:
    from gnome.fp8.edge_block import EdgeOrder, EdgeSettings, TileSettings

SLICE_BYTES = 128
"""Inner length of a staged product's slices: the widest row of a swizzled operand."""


def forward(
    edges: Tensor,
    ends: tuple[Tensor, Tensor],
    parameters: tuple[Tensor, Tensor, Tensor],
    order: EdgeOrder,
    eps: float,
    fp8: bool,
    tiles: TileSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what `edge_block._edge_forward` says."""
    n_edges, width = edges.shape
    reduce = tiles.reduce and order.receiver_order is None
    new_edges = torch.empty_like(edges)
    payload = edges.new_empty((n_edges if fp8 else 0, width), dtype=torch.uint8)
    inverse_scale = edges.new_empty((payload.shape[0],), dtype=torch.float32)
    received = ends[0].new_zeros(ends[0].shape, dtype=torch.float32) if reduce or not n_edges else None
    if n_edges:
        weights = edge_weights(parameters[0], parameters[1], fp8)
        n_tiles = triton.cdiv(n_edges, tiles.block)
        resident = fp8 and tiles.feed == "resident"
        edge_forward_kernel[(min(n_tiles, _multiprocessors(edges.device)) if resident else n_tiles,)](
            edges, *ends, order.senders, order.receivers, weights.edge, weights.out, weights.inverse_scales, parameters[2],
            new_edges, new_edges.view(weights.edge.dtype), received, payload.view(weights.edge.dtype) if fp8 else edges,
            inverse_scale, n_edges, eps, FP8=fp8, STAGED=tiles.feed == "staged", RESIDENT=resident, REDUCE=reduce,
            APPROXIMATE=edges.is_cuda, **_tile_options(tiles, width, fp8),
        )  # fmt: skip
    if received is None:
        received = segment_sum(new_edges, order.receiver_offsets, order.receiver_order, torch.float32)
    return new_edges, received, payload, inverse_scale


def backward(
    gradients: tuple[Tensor, Tensor],
    saved: tuple[Tensor, Tensor],
    ends: tuple[Tensor, Tensor],
    parameters: tuple[Tensor, Tensor, Tensor],
    order: EdgeOrder,
    eps: float,
    fp8: bool,
    settings: EdgeSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `edge_block._edge_backward` says."""
    tiles = settings.backward
    grad_edges, grad_received = gradients[0].contiguous(), gradients[1].to(torch.bfloat16).contiguous()
    n_edges, width = grad_edges.shape
    if not n_edges:
        return (torch.empty_like(grad_edges), *(torch.zeros_like(x) for x in (*ends, *parameters)))  # type: ignore[return-value]
    reduce = tiles.reduce and order.receiver_order is None
    weights = edge_weights(parameters[0], parameters[1], fp8)
    narrow = weights.edge.dtype
    operands = saved[0].view(narrow)
    d_edges = torch.empty_like(grad_edges)
    activation = torch.empty_like(operands)
    d_out, d_hidden, parked = _gradient_rows(operands)
    row_scales = grad_edges.new_empty((3, n_edges), dtype=torch.float32)
    n_tiles = triton.cdiv(n_edges, tiles.block)
    sums = grad_edges.new_empty((n_tiles, 3, width), dtype=torch.float32)
    d_receivers = torch.zeros_like(ends[1], dtype=torch.float32) if reduce else None
    edge_backward_kernel[(n_tiles,)](
        operands, saved[1], *ends, order.senders, order.receivers, weights.edge, weights.out, weights.out_t, weights.edge_t,
        weights.inverse_scales, parameters[2], grad_edges, grad_received, d_edges, activation, d_out, d_hidden, parked,
        row_scales, sums, d_receivers, n_edges, eps, FP8=fp8, REDUCE=reduce, APPROXIMATE=grad_edges.is_cuda,
        **_tile_options(tiles, width, fp8),
    )  # fmt: skip
    scales = tuple(row_scales) if fp8 else (None, None, None)
    if d_receivers is None:
        d_receivers = segment_sum(d_hidden, order.receiver_offsets, order.receiver_order, ends[1].dtype, scales[2])
    d_senders = segment_sum(d_hidden, order.sender_offsets, order.sender_order, ends[0].dtype, scales[2])
    if settings.cublas and not fp8:
        d_weights = [torch.mm(d_hidden.T, operands).float(), torch.mm(d_out.T, activation).float()]
    else:
        programs = 2 * _multiprocessors(grad_edges.device)
        d_weights = [
            weight_gradient(d_hidden, operands, scales[2], saved[1] if fp8 else None, programs),
            weight_gradient(d_out, activation, scales[1], scales[0], programs),
        ]
    return d_edges, d_senders, d_receivers.to(ends[1].dtype), d_weights[0], d_weights[1], sums.sum(0)


def _gradient_rows(operands: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate gradients of both layers (E, D) as operands are, and the same memory as BF16 rows (E, D).

    In FP8 the two lie side by side, so that a BF16 row fits in both before either is written.
    """
    if operands.dtype == torch.bfloat16:
        d_hidden = torch.empty_like(operands)
        return torch.empty_like(operands), d_hidden, d_hidden
    n_edges, width = operands.shape
    parked = operands.new_empty((n_edges, width), dtype=torch.bfloat16)
    pair = parked.view(operands.dtype)
    return pair[:, :width], pair[:, width:], parked


def _tile_options(tiles: TileSettings, width: int, fp8: bool) -> dict[str, int]:
    """Return the sizes and launch options that both kernels take."""
    return {
        "D": width,
        "BLOCK": tiles.block,
        "BLOCK_K": min(width, SLICE_BYTES if fp8 else SLICE_BYTES // 2),
        "STAGES": tiles.stages,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _multiprocessors(device: torch.device) -> int:
    """Count a GPU's multiprocessors; 4 elsewhere, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
