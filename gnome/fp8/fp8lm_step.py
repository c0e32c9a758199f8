"""The optimizer step of FP8-LM: moments scaled by tensor, so that new scales need a pass before the one that writes.

First moment E4M3, second moment FP16, FP16 weights, each with one scale a tensor from the magnitudes it is about to store (window 1),
rounded to nearest (arXiv 2310.18313, section 2.2; MS-AMP `LBAdamW`).  Both passes compute the same numbers; MS-AMP's second one reads
its scales on the host, here they stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gnome.fp8.formats import BLOCK, E4M3, FP16, exact_root, power_of_two_scale, saturating_cast
from gnome.fp8.kernels.availability import use_kernels

if TYPE_CHECKING:
    from gnome.fp8.optimizer_state import StateArena
    from gnome.fp8.optimizer_step import StepInputs


def step_by_tensor(arena: StateArena, inputs: StepInputs, largest_of_ranks: Callable[[Tensor], None]) -> None:
    """Take one step in place, unless `inputs.control` says that it is skipped."""
    n_tensors = len(arena.groups)
    largest = torch.zeros(3, n_tensors, device=arena.weights.device)
    kernels = use_kernels(arena.weights.device)
    if kernels:
        from gnome.fp8.kernels.adamw_fp8lm import launch_pass  # noqa: PLC0415 - needs Triton

        launch_pass(arena, inputs, largest, None)
    elif bool(inputs.control[0]):
        arena.new_weight_scale.copy_(arena.weight_scale)
        return
    else:
        _measure(arena, inputs, largest)
    largest_of_ranks(largest)
    old = torch.stack([arena.first.scale, arena.second.scale, arena.weight_scale])
    scales = torch.stack([power_of_two_scale(amax, fmt) for amax, fmt in zip(largest, (E4M3, FP16, FP16), strict=True)])
    if not arena.scaled:
        scales[2] = 1.0
    kept = (inputs.control[0] > 0) | (arena.active == 0)
    scales = torch.where(kept, old, scales)
    if kernels:
        launch_pass(arena, inputs, largest, scales)
    else:
        _write(arena, inputs, scales)
    arena.first.scale.copy_(scales[0])
    arena.second.scale.copy_(scales[1])
    arena.new_weight_scale.copy_(scales[2])
    arena.weight_amax.copy_(torch.where(kept, arena.weight_amax, largest[2]))


def _measure(arena: StateArena, inputs: StepInputs, largest: Tensor) -> None:
    for blocks in arena.chunks():
        tensor, real, values = _updated(arena, inputs, blocks)
        for row, x in zip(largest, values, strict=True):
            row.scatter_reduce_(0, tensor, torch.where(real, x.abs(), 0.0).amax(1), "amax")


def _write(arena: StateArena, inputs: StepInputs, scales: Tensor) -> None:
    for blocks in arena.chunks():
        numbers = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
        tensor, real, values = _updated(arena, inputs, blocks)
        payloads = (arena.first.payload, arena.second.payload, arena.weights)
        formats = (E4M3, FP16, FP16 if arena.scaled else None)
        for target, fmt, scale, x in zip(payloads, formats, scales, values, strict=True):
            old = target[numbers].view(-1, BLOCK)
            y = x * scale[tensor, None]
            rounded = y.to(old.dtype) if fmt is None else saturating_cast(y, fmt)
            old.copy_(torch.where(real, rounded, old))


def _updated(arena: StateArena, inputs: StepInputs, blocks: slice) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Owning tensor of each block, whether it counts, and new first moment, second moment and weight (blocks, 128), FP32."""
    numbers = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
    owner = arena.owners[blocks].long()
    tensor = owner.clamp(min=0)
    real = ((owner >= 0) & (arena.active[tensor] > 0))[:, None]
    kept, rate, beta1, rest1, _, root_rest2, eps, beta2 = inputs.coefficients[arena.groups[tensor].long()][:, :, None].unbind(1)
    factor = inputs.control[1] / inputs.gradient_scale[blocks, None]
    g, m, v, w = (
        flat[numbers].view(-1, BLOCK).float()
        for flat in (inputs.gradient, arena.first.payload, arena.second.payload, arena.weights)
    )
    m = (beta1 / arena.first.scale[tensor, None]) * m + (rest1 * factor) * g
    new_part = (root_rest2 * factor) * g
    v = (beta2 / arena.second.scale[tensor, None]) * v + new_part * new_part
    return tensor, real, (m, v, (kept / arena.weight_scale[tensor, None]) * w - (rate * m) * (1 / (exact_root(v) + eps)))
