"""One AdamW step on a state arena: FP32 arithmetic on every number, and how the results are rounded on their way back.

Both moments are rounded stochastically in `block`: a step changes the root of the second by less than half of E4M3's spacing, and the
first, from beta1 0.95 on and where it is subnormal, likewise, so that rounding to nearest would freeze them, and keep a weight moving whose
gradient has gone.  Stochastic rounding of 16-bit weights keeps updates smaller than their spacing alive on average.  `fp8lm` rounds
to nearest throughout, as FP8-LM does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gnome.fp8.formats import (
    BF16,
    BLOCK,
    E4M3,
    FP16,
    exact_root,
    mix,
    power_of_two_scale,
    random_words,
    stochastic_cast,
)
from gnome.fp8.fp8lm_step import step_by_tensor
from gnome.fp8.kernels.availability import use_kernels
from gnome.fp8.optimizer_state import WEIGHT_MARGIN, StateArena

COEFFICIENTS = ("kept", "rate", "beta1", "1 - beta1", "sqrt(beta2)", "sqrt(1 - beta2)", "eps", "beta2")
"""Columns of a step's coefficients, one row for each parameter group.

`kept` is 1 - lr * decay.  Bias corrections are folded in: `rate` is lr sqrt(1 - beta2^t) / (1 - beta1^t), `eps` is eps sqrt(1 - beta2^t).
"""


@dataclass(frozen=True)
class StepInputs:
    """What a step needs beside the state, all on the device.

    `gradient` E4M3 and `gradient_scale` (blocks,) of the share; `coefficients` (groups, 8), see `COEFFICIENTS`; `control` (2,): 1 if the
    step is skipped, and the factor that clips the gradient; `step` int64 scalar, from 1.
    """

    gradient: Tensor
    gradient_scale: Tensor
    coefficients: Tensor
    control: Tensor
    step: Tensor


def step_coefficients(settings: Tensor, step: Tensor) -> Tensor:
    """Return `COEFFICIENTS` (groups, 8) from lr, betas, eps and weight decay (groups, 5) and the number of the step."""
    lr, beta1, beta2, eps, decay = settings.double().unbind(1)
    correction = (1 - beta2 ** step.double()).sqrt()
    rate = lr * correction / (1 - beta1 ** step.double())
    columns = [1 - lr * decay, rate, beta1, 1 - beta1, beta2.sqrt(), (1 - beta2).sqrt(), eps * correction, beta2]
    return torch.stack(columns, dim=1).float()


def take_step(arena: StateArena, inputs: StepInputs, largest_of_ranks: Callable[[Tensor], None] = lambda _: None) -> None:
    """Update the share's weights and moments in place; where `inputs.control` says so, nothing changes.

    `largest_of_ranks` raises magnitudes by tensor (in place) to the largest that any rank has.
    """
    if arena.states == "fp8lm":
        step_by_tensor(arena, inputs, largest_of_ranks)
    else:
        if arena.scaled:
            _choose_weight_scale(arena, inputs.control)
        if use_kernels(arena.weights.device):
            from gnome.fp8.kernels.adamw import launch_step  # noqa: PLC0415 - needs Triton

            launch_step(arena, inputs)
        elif not bool(inputs.control[0]):
            for blocks in arena.chunks():
                _step_chunk(arena, blocks, inputs)
    if arena.scaled:
        arena.weight_scale.copy_(arena.new_weight_scale)


def _choose_weight_scale(arena: StateArena, control: Tensor) -> None:
    """Set the scale that this step writes weights with, from the magnitudes that the last one saw."""
    if use_kernels(control.device):
        from gnome.fp8.kernels.step_inputs import choose_weight_scale  # noqa: PLC0415 - needs Triton

        scales = arena.weight_amax, arena.weight_scale, arena.new_weight_scale
        choose_weight_scale(*scales, arena.active, control, WEIGHT_MARGIN)
        return
    chosen = power_of_two_scale(arena.weight_amax, FP16, previous=arena.weight_scale, margin=WEIGHT_MARGIN)
    arena.new_weight_scale.copy_(torch.where((control[0] > 0) | (arena.active == 0), arena.weight_scale, chosen))
    arena.weight_amax.copy_(torch.where((control[0] > 0) | (arena.active == 0), arena.weight_amax, 0.0))  # else seen anew


def _step_chunk(arena: StateArena, blocks: slice, inputs: StepInputs) -> None:
    """Do for a run of blocks what the kernel does: AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2), FP32.

    Stored numbers are multiplied once, by scale and coefficient together.
    """
    numbers = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
    owner = arena.owners[blocks].long()
    tensor = owner.clamp(min=0)
    real = ((owner >= 0) & (arena.active[tensor] > 0))[:, None]
    by_block = arena.states == "block"
    kept, rate, beta1, rest1, root_beta2, root_rest2, eps, _ = inputs.coefficients[arena.groups[tensor].long()][
        :, :, None
    ].unbind(1)
    g_factor = inputs.control[1] / inputs.gradient_scale[blocks, None]
    m_factor = 1 / arena.first.scale[blocks, None] if by_block else torch.ones_like(g_factor)
    root_factor = 1 / arena.second.scale[blocks, None] if by_block else torch.ones_like(g_factor)
    if arena.scaled:
        kept = kept / arena.weight_scale[tensor, None]
    g, m, root, w = (
        flat[numbers].view(-1, BLOCK).float()
        for flat in (inputs.gradient, arena.first.payload, arena.second.payload, arena.weights)
    )
    m = (beta1 * m_factor) * m + (rest1 * g_factor) * g
    old_part, new_part = (root_beta2 * root_factor) * root, (root_rest2 * g_factor) * g
    root = exact_root(old_part * old_part + new_part * new_part)
    w = kept * w - (rate * m) * (1 / (root + eps))

    index = torch.arange(numbers.start, numbers.stop, device=w.device) + arena.first_block * BLOCK
    random = random_words(index, arena.seed, inputs.step).view(-1, BLOCK)
    if by_block:
        m = _rescaled(m, arena.first.scale[blocks], real, mix(random) & 0xFFFFF)
        rounded = _rescaled(root, arena.second.scale[blocks], real, random & 0xFFFFF)
        # Never zero beside a first moment that is not, for that would make the update infinite.
        root = torch.where(root > 0, rounded.clamp(min=E4M3.smallest), 0.0)
    _write(arena.first.payload[numbers], m, real)
    _write(arena.second.payload[numbers], root, real)
    if arena.scaled:
        arena.weight_amax.scatter_reduce_(0, tensor, torch.where(real, w.abs(), 0.0).amax(1), "amax")
        w = w * arena.new_weight_scale[tensor, None]
    if arena.weights.dtype == torch.float16:
        w = stochastic_cast(w, FP16, random >> 19, subnormals=False)
    elif arena.weights.dtype == torch.bfloat16:
        w = stochastic_cast(w, BF16, random >> 16, subnormals=False)
    _write(arena.weights[numbers], w, real)


def _rescaled(x: Tensor, scale: Tensor, real: Tensor, random: Tensor) -> Tensor:
    """Scale by block, note the new scales in place, and round to E4M3 by the random bits; returns FP32."""
    new = power_of_two_scale(x.abs().amax(1), E4M3)
    scale.copy_(torch.where(real[:, 0], new, scale))
    return stochastic_cast(x * new[:, None], E4M3, random).float()


def _write(target: Tensor, values: Tensor, real: Tensor) -> None:
    """Overwrite the real blocks."""
    old = target.view(-1, BLOCK)
    old.copy_(torch.where(real, values.to(old.dtype), old))
