"""What every program of an optimizer step reads, made in two launches instead of dozens: clipping, skipping, coefficients, scales."""

import triton
import triton.language as tl
from torch import Tensor

from gnome.fp8.kernels.numerics import FP16_MAX, scale_for


@triton.jit
def _control_kernel(
    squared_norm, settings, norm, control, coefficients, step_count, skipped_steps, clip, n_groups, GROUPS: tl.constexpr
) -> None:  # fmt: skip
    total = tl.sqrt_rn(tl.load(squared_norm))
    skip = tl.where(total < float("inf"), 0, 1)  # NaN compares false
    tl.store(norm, total)
    tl.store(control, skip.to(tl.float32))
    factor = clip / (total + 1e-6)
    tl.store(control + 1, tl.where((clip > 0) & (factor < 1.0), factor, 1.0))
    step = tl.load(step_count) + 1 - skip
    tl.store(step_count, step)
    tl.store(skipped_steps, tl.load(skipped_steps) + skip)

    group = tl.arange(0, GROUPS)
    mask = group < n_groups
    row = settings + group * 5
    lr = tl.load(row, mask=mask, other=0.0).to(tl.float64)
    beta1 = tl.load(row + 1, mask=mask, other=0.5).to(tl.float64)
    beta2 = tl.load(row + 2, mask=mask, other=0.5).to(tl.float64)
    eps = tl.load(row + 3, mask=mask, other=0.0).to(tl.float64)
    decay = tl.load(row + 4, mask=mask, other=0.0).to(tl.float64)
    # beta may be 0, whose logarithm is not: its power is 0 as well
    power1 = tl.where(beta1 > 0, tl.exp(step.to(tl.float64) * tl.log(tl.where(beta1 > 0, beta1, 0.5))), 0.0)
    power2 = tl.where(beta2 > 0, tl.exp(step.to(tl.float64) * tl.log(tl.where(beta2 > 0, beta2, 0.5))), 0.0)
    correction = tl.sqrt(1.0 - power2)
    out = coefficients + group * 8
    tl.store(out, (1.0 - lr * decay).to(tl.float32), mask=mask)
    tl.store(out + 1, (lr * correction / (1.0 - power1)).to(tl.float32), mask=mask)
    tl.store(out + 2, beta1.to(tl.float32), mask=mask)
    tl.store(out + 3, (1.0 - beta1).to(tl.float32), mask=mask)
    tl.store(out + 4, tl.sqrt(beta2).to(tl.float32), mask=mask)
    tl.store(out + 5, tl.sqrt(1.0 - beta2).to(tl.float32), mask=mask)
    tl.store(out + 6, (eps * correction).to(tl.float32), mask=mask)
    tl.store(out + 7, beta2.to(tl.float32), mask=mask)


@triton.jit
def _weight_scale_kernel(amax, scale, new_scale, active, control, n_tensors, MARGIN: tl.constexpr, SIZE: tl.constexpr) -> None:
    tensor = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = tensor < n_tensors
    run = tl.where(tl.load(control) > 0, 0, tl.load(active + tensor, mask=mask, other=0)) > 0
    old, seen = tl.load(scale + tensor, mask=mask, other=1.0), tl.load(amax + tensor, mask=mask, other=0.0)
    tl.store(new_scale + tensor, tl.where(run, scale_for(seen, FP16_MAX, old, MARGIN), old), mask=mask)
    tl.store(amax + tensor, tl.where(run, 0.0, seen), mask=mask)


def write_control(
    squared_norm: Tensor,
    settings: Tensor,
    norm: Tensor,
    control: Tensor,
    coefficients: Tensor,
    step_count: Tensor,
    skipped_steps: Tensor,
    clip: float | None,
) -> None:
    """Do what `optimizer.AdamW` does in torch for one step: see there."""
    n_groups = len(settings)
    _control_kernel[(1,)](
        squared_norm, settings, norm, control, coefficients, step_count, skipped_steps, clip or 0.0, n_groups,
        GROUPS=triton.next_power_of_2(n_groups), num_warps=1,
    )  # fmt: skip


def choose_weight_scale(amax: Tensor, scale: Tensor, new_scale: Tensor, active: Tensor, control: Tensor, margin: int) -> None:
    """Do what `optimizer_step` does in torch: see there."""
    size = 256
    _weight_scale_kernel[(triton.cdiv(len(amax), size),)](
        amax, scale, new_scale, active, control, len(amax), MARGIN=margin, SIZE=size, num_warps=4
    )
