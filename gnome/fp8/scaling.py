"""The scale of one operand of a matrix product from call to call, and its cast to the layouts that the product needs.

Current scaling looks at the tensor first and casts it then: two passes, never out of range.  Delayed scaling casts with a scale from the
largest of the last 16 magnitudes and takes the new magnitude on the way: one pass, and a tensor that outgrows its history saturates.
The first 16 calls of delayed scaling are current (MS-AMP's warm-up).
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from gnome.fp8.formats import GEMM_MULTIPLE, Format, power_of_two_scale, saturating_cast
from gnome.fp8.kernels.availability import use_kernels
from gnome.fp8.watch import Watch

ScalingMode = Literal["delayed", "current"]

WINDOW = 16
"""Calls that delayed scaling looks back (MS-AMP `DEFAULT_WINDOW_SIZE`)."""


@dataclass(frozen=True)
class Operand:
    """A matrix (M, K) in FP8 for products: `rows` (M, K'), `columns` (K', M') its transpose, zeros up to multiples of 16.

    The value is payload * inverse_scale.  A layout that no product needs is None.
    """

    rows: Tensor | None
    columns: Tensor | None
    inverse_scale: Tensor


class Scaling(nn.Module):
    """Scale and history of one operand.

    `state` (18,) FP32: the scale, the largest magnitude of the latest call, and of the 16 before it.  A magnitude that is not finite counts
    as zero in the history.
    """

    state: Tensor
    calls_seen: Tensor

    def __init__(self, fmt: Format, mode: ScalingMode = "delayed") -> None:
        super().__init__()
        self.format, self.mode = fmt, mode
        self.calls = 0
        state = torch.zeros(2 + WINDOW)
        state[0] = 1.0
        self.register_buffer("state", state)
        self.register_buffer("calls_seen", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move, but stay FP32 whatever a model is cast to: the kernels take magnitudes as 32 bits."""
        super()._apply(fn, recurse)
        self.state = self.state.float()
        return self

    def starts_current(self) -> bool:
        """Count a call, and say whether it must look at its tensor first."""
        self.calls += 1
        return self.mode == "current" or self.calls <= WINDOW

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Begin anew where a checkpoint holds no scaling, as those of plain layers do."""
        if prefix + "state" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *others)
            self.calls = int(self.calls_seen)
        else:
            self.calls = 0
            self.state.zero_()[0] = 1.0

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.calls_seen.fill_(self.calls)  # counted on the host, which need not wait for a device then
        super()._save_to_state_dict(*arguments)

    def extra_repr(self) -> str:
        """Format and mode."""
        return f"{self.format.name}, {self.mode}"


def padded(n: int) -> int:
    """Round up to the multiple that FP8 products need."""
    return -(-n // GEMM_MULTIPLE) * GEMM_MULTIPLE


def roll_scale(state: Tensor, fmt: Format, x: Tensor | None) -> Tensor:
    """Move the latest magnitude into the history and choose the scale: from x, or without it from the history; returns 1 / scale."""
    if use_kernels(state.device):
        from gnome.fp8.kernels import quantize  # noqa: PLC0415 - needs Triton

        return quantize.roll_scale(state, fmt, x)
    latest = torch.where(torch.isfinite(state[1]), state[1], 0.0)
    history = torch.cat([latest[None], state[2:-1]])
    state[2:] = history
    state[1] = 0.0 if x is None or x.numel() == 0 else x.detach().abs().amax().float()
    state[0] = power_of_two_scale(history.amax() if x is None else state[1], fmt, previous=state[0])
    return 1.0 / state[0]


def quantize_matrix(
    x: Tensor, state: Tensor, fmt: Format, *, current: bool, rows: bool, columns: bool, watch: Watch | None = None
) -> Operand:
    """Cast x (M, K) with the scale of `state`, which is brought up to date; see `Scaling`.

    Infinities become NaN: saturated, they would pass for large numbers.
    """
    x = x.contiguous()
    (m, k), device = x.shape, x.device
    inverse_scale = roll_scale(state, fmt, x if current else None)
    if watch is not None:
        watch.record(x, state[0], fmt)
    if not use_kernels(device):
        if not current and x.numel():
            state[1] = x.detach().abs().amax().float()
        shown = torch.where(x.isinf(), torch.nan, x.float() * state[0])
        payload = functional.pad(saturating_cast(shown, fmt).view(torch.uint8), (0, padded(k) - k))
        transposed = functional.pad(payload.t(), (0, padded(m) - m)).contiguous()
        return Operand(payload.view(fmt.dtype) if rows else None, transposed.view(fmt.dtype) if columns else None, inverse_scale)
    from gnome.fp8.kernels.quantize import quantize_both  # noqa: PLC0415 - needs Triton

    by_row = torch.empty(m, padded(k), dtype=fmt.dtype, device=device) if rows else None
    by_column = torch.empty(padded(k), padded(m), dtype=fmt.dtype, device=device) if columns else None
    if x.numel():
        quantize_both(x, state, fmt, by_row, by_column, record=not current)
    return Operand(by_row, by_column, inverse_scale)


def product(a: Operand, b: Operand, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """Return a (M, K) times b (N, K) transposed, from their rows, in `dtype` (M, N), accumulated in FP32.

    `fast` lets Hopper keep about 14 bits of the running sum instead of adding it to FP32 every few products (DeepSeek-V3, arXiv 2412.19437,
    section 3.3.2).  Off GPUs the same products are summed in FP32.
    """
    if a.rows is None or b.rows is None:
        raise ValueError("an operand of this product was cast without its rows")
    if a.rows.device.type == "cuda":
        return torch._scaled_mm(  # noqa: SLF001 - the name it has in every release we support
            a.rows, b.rows.t(), scale_a=a.inverse_scale, scale_b=b.inverse_scale, out_dtype=dtype, use_fast_accum=fast
        )
    return ((a.rows.float() @ b.rows.float().t()) * (a.inverse_scale * b.inverse_scale)).to(dtype)
