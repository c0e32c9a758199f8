"""Launches of the edge block's kernels: what is allocated, in which layout, and in which order."""

# mypy: disable-error-code="import-not-found"
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from gnome.fp8.kernels.edge_backward import edge_gradient_kernel, edge_hidden_gradient_kernel, edge_norm_gradient_kernel
from gnome.fp8.kernels.edge_forward import edge_hidden_kernel, edge_output_kernel
from gnome.fp8.kernels.edge_weights import EdgeWeights
from gnome.fp8.kernels.segment_sum import segment_sum, weight_gradient

if TYPE_CHECKING:
    from gnome.fp8.edge_block import EdgeOrder, EdgeSettings, TileSettings

REGISTERS = 65536
"""Of a multiprocessor, for all its programs."""


def forward(
    edges: Tensor,
    ends: tuple[Tensor, Tensor],
    parameters: tuple[Tensor, Tensor, Tensor],
    order: EdgeOrder,
    eps: float,
    fp8: bool,
    settings: EdgeSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `edge_block._edge_forward` says."""
    n_edges, width = edges.shape
    new_edges = torch.empty_like(edges)
    payload = edges.new_empty((n_edges if fp8 else 0, width), dtype=torch.uint8)
    inverse_scale = edges.new_empty((payload.shape[0],), dtype=torch.float32)
    weights = EdgeWeights.of(parameters[0], parameters[1], fp8)
    if n_edges:
        saved = payload.view(torch.float8_e4m3fn)
        activation, activation_scale = _rows(edges, fp8)
        grid, options = _launch(settings.hidden, edges, fp8)
        edge_hidden_kernel[grid](
            edges, inverse_scale, *ends, order.senders, order.receivers, *weights.of_edge,
            saved, inverse_scale, None, activation, activation_scale, n_edges,
            FORWARD=True, APPROXIMATE=edges.is_cuda, **options,
        )  # fmt: skip
        grid, options = _launch(settings.output, edges, fp8)
        edge_output_kernel[grid](
            activation, activation_scale, edges, *weights.of_output, parameters[2], new_edges, n_edges, eps, **options
        )
    received = segment_sum(new_edges, order.receiver_offsets, order.receiver_order, torch.float32)
    return new_edges, received, payload, inverse_scale, weights.narrow, weights.inverse_scales


def backward(
    gradients: tuple[Tensor, Tensor],
    saved: tuple[Tensor, Tensor],
    ends: tuple[Tensor, Tensor],
    weights: EdgeWeights,
    vectors: Tensor,
    order: EdgeOrder,
    eps: float,
    fp8: bool,
    settings: EdgeSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `edge_block._edge_backward` says."""
    grad_edges, grad_received = gradients[0].contiguous(), gradients[1].to(torch.bfloat16).contiguous()
    n_edges, width = grad_edges.shape
    if not n_edges:
        of_weights = (vectors.new_zeros(width, width) for _ in range(2))
        return (torch.empty_like(grad_edges), *map(torch.zeros_like, ends), *of_weights, torch.zeros_like(vectors))  # type: ignore[return-value]
    edges, edge_scale = saved[0].view(torch.float8_e4m3fn if fp8 else torch.bfloat16), saved[1]
    programs = 2 * _multiprocessors(edges.device)

    hidden, row_scale = _rows(grad_edges, fp8)
    activation = torch.empty_like(hidden)
    grid, options = _launch(settings.hidden, grad_edges, fp8)
    edge_hidden_kernel[grid](
        edges, edge_scale, *ends, order.senders, order.receivers, *weights.of_edge,
        None, None, hidden, activation, row_scale, n_edges,
        FORWARD=False, APPROXIMATE=grad_edges.is_cuda, **options,
    )  # fmt: skip

    d_out, d_out_scale = _rows(grad_edges, fp8)
    grid, options = _launch(settings.norm_gradient, grad_edges, fp8)
    of_scale = vectors.new_empty((grid[0] * options["BLOCK"] // 2, width))
    edge_norm_gradient_kernel[grid](
        activation, row_scale, *weights.of_output, vectors, grad_edges, grad_received, order.receivers,
        d_out, d_out_scale, of_scale, n_edges, eps, **options,
    )  # fmt: skip

    d_hidden, d_hidden_scale = _rows(grad_edges, fp8)
    grid, options = _launch(settings.hidden_gradient, grad_edges, fp8, parts=True)
    of_bias = vectors.new_empty((grid[0] * options["PARTS"], width))
    edge_hidden_gradient_kernel[grid](
        d_out, d_out_scale, hidden, row_scale, *weights.of_output_transposed, d_hidden, d_hidden_scale, of_bias, n_edges,
        APPROXIMATE=grad_edges.is_cuda, **options,
    )  # fmt: skip
    del hidden
    d_weight_out = weight_gradient(d_out, activation, d_out_scale, row_scale, programs)
    del d_out, activation

    d_edges = torch.empty_like(grad_edges)
    grid, options = _launch(settings.edge_gradient, grad_edges, fp8, parts=True)
    of_shift = vectors.new_empty((grid[0] * options["PARTS"], width))
    edge_gradient_kernel[grid](
        d_hidden, d_hidden_scale, *weights.of_edge_transposed, grad_edges, grad_received, order.receivers,
        d_edges, of_shift, n_edges, **options,
    )  # fmt: skip
    d_weight_edge = weight_gradient(d_hidden, edges, d_hidden_scale, edge_scale, programs)
    d_senders = segment_sum(d_hidden, order.sender_offsets, order.sender_order, ends[0].dtype, d_hidden_scale)
    d_receivers = segment_sum(d_hidden, order.receiver_offsets, order.receiver_order, ends[1].dtype, d_hidden_scale)
    d_vectors = torch.stack([of_bias.sum(0), of_scale.sum(0), of_shift.sum(0)])
    return d_edges, d_senders, d_receivers, d_weight_edge, d_weight_out, d_vectors


def _rows(like: Tensor, fp8: bool) -> tuple[Tensor, Tensor]:
    """Allocate rows (E, D) as products take them, and FP8's inverse scales (E), none in BF16."""
    rows = torch.empty_like(like, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
    return rows, like.new_empty(like.shape[0] if fp8 else 0, dtype=torch.float32)


def _launch(tiles: TileSettings, edges: Tensor, fp8: bool, *, parts: bool = False) -> tuple[tuple[int], dict[str, Any]]:
    """Return the grid, and what `launch_options` says."""
    n_edges, width = edges.shape
    grid = (min(triton.cdiv(n_edges, tiles.block), tiles.programs * _multiprocessors(edges.device)),)
    return grid, launch_options(tiles, width, fp8, parts=parts)


def launch_options(tiles: TileSettings, width: int, fp8: bool, *, parts: bool) -> dict[str, Any]:
    """Return the sizes that all kernels of tiles take, in capitals, and how they are compiled; `parts` for those that add up rows."""
    options = {"D": width, "BLOCK": tiles.block, "FP8": fp8, "AHEAD": tiles.ahead, "num_warps": tiles.warps, "num_stages": 1}
    if parts:
        rows_a_warp = 512 // (width * (1 if fp8 else 2))  # of 16 bytes a thread
        options["PARTS"] = min(tiles.block, tiles.warps * rows_a_warp)
    if tiles.programs > 1:
        options["maxnreg"] = min(255, REGISTERS // (tiles.programs * tiles.warps * 32))
    return options


def _multiprocessors(device: torch.device) -> int:
    """Count a GPU's multiprocessors; 4 elsewhere, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
