"""RMS norm and SwiGLU with their results cast to FP8 for the linear layer that follows, and the way back.

With delayed scaling on a GPU the cast happens where the numbers are made: what the layer reads is all that is written.  Otherwise the same
numbers are made in torch and cast after.  Only inputs are kept for backward; normalised and gated values are made again.
"""

import torch
from torch import Tensor
from torch.nn import functional

from gnome.fp8.formats import E4M3, E5M2
from gnome.fp8.kernels.availability import use_kernels
from gnome.fp8.scaling import Operand, padded, quantize_matrix, roll_scale
from gnome.fp8.watch import Watch


def normalized(
    x: Tensor, gain: Tensor, eps: float, state: Tensor, *, current: bool, watch: Watch | None = None
) -> tuple[Operand, Tensor]:
    """Return x / rms(x) * gain (M, K) in E4M3, by rows, and 1 / rms (M,) (Zhang & Sennrich, arXiv 1910.07467)."""
    if use_kernels(x.device) and not current and watch is None and x.shape[1] == padded(x.shape[1]):
        from gnome.fp8.kernels.producers import norm_rows  # noqa: PLC0415 - needs Triton

        inverse_scale = roll_scale(state, E4M3, None)
        rows, inverse_rms = norm_rows(x, gain, eps, state, E4M3)
        return Operand(rows, None, inverse_scale), inverse_rms
    inverse_rms = (x.float().square().mean(1) + eps).rsqrt()
    values = x.float() * inverse_rms[:, None] * gain.float()
    return quantize_matrix(values, state, E4M3, current=current, rows=True, columns=False, watch=watch), inverse_rms


def normalized_columns(x: Tensor, gain: Tensor, inverse_rms: Tensor, inverse_scale: Tensor) -> Operand:
    """Return the other layout of what `normalized` made."""
    if use_kernels(x.device) and x.shape[1] == padded(x.shape[1]):
        from gnome.fp8.kernels.producers import norm_columns  # noqa: PLC0415 - needs Triton

        columns = norm_columns(x, gain, inverse_rms, inverse_scale, padded(x.shape[0]), E4M3)
        return Operand(columns, None, inverse_scale)
    return cast_columns(x.float() * inverse_rms[:, None] * gain.float(), inverse_scale)


def norm_backward(g: Tensor, x: Tensor, gain: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (M, K) and gain (K,) from that of the normalised values."""
    if use_kernels(x.device):
        from gnome.fp8.kernels import producers  # noqa: PLC0415 - needs Triton

        return producers.norm_backward(g, x, gain, inverse_rms)
    unit = x.float() * inverse_rms[:, None]
    weighted = g.float() * gain.float()
    dx = inverse_rms[:, None] * (weighted - unit * (weighted * unit).mean(1, keepdim=True))
    return dx.to(x.dtype), (g.float() * unit).sum(0).to(gain.dtype)


def gated(u: Tensor, state: Tensor, *, current: bool, watch: Watch | None = None) -> Operand:
    """Return silu(gate) * up (M, F) of u = [gate, up] (M, 2F) in E4M3, by rows (Shazeer, arXiv 2002.05202)."""
    if use_kernels(u.device) and not current and watch is None:
        from gnome.fp8.kernels.producers import swiglu_rows  # noqa: PLC0415 - needs Triton

        inverse_scale = roll_scale(state, E4M3, None)
        return Operand(swiglu_rows(u, state, E4M3), None, inverse_scale)
    return quantize_matrix(_swiglu(u), state, E4M3, current=current, rows=True, columns=False, watch=watch)


def gated_backward(
    g: Tensor, u: Tensor, inverse_scale: Tensor, state: Tensor, *, current: bool, watch: Watch | None = None
) -> tuple[Operand, Operand]:
    """Return the gated values by columns as `rows` of an operand, and the gradient of u (M, 2F) in E5M2, both ways."""
    if use_kernels(u.device) and not current and watch is None:
        from gnome.fp8.kernels.producers import swiglu_backward  # noqa: PLC0415 - needs Triton

        g_inverse_scale = roll_scale(state, E5M2, None)
        h, rows, columns = swiglu_backward(g, u, inverse_scale, state, padded(u.shape[0]), E4M3, E5M2)
        return Operand(h, None, inverse_scale), Operand(rows, columns, g_inverse_scale)
    gate, up = u.float().chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    du = torch.cat([g.float() * up * (sigmoid + silu * (1 - sigmoid)), g.float() * silu], dim=1)
    return cast_columns(silu * up, inverse_scale), quantize_matrix(
        du, state, E5M2, current=current, rows=True, columns=True, watch=watch
    )


def _swiglu(u: Tensor) -> Tensor:
    gate, up = u.float().chunk(2, dim=1)
    return functional.silu(gate) * up


def cast_columns(values: Tensor, inverse_scale: Tensor) -> Operand:
    """Return values (M, K) in E4M3 under a scale that is given, transposed, as `rows` of an operand."""
    state = torch.zeros(18, device=values.device)
    state[1] = E4M3.max * inverse_scale  # the one magnitude of its history is the largest that the scale takes
    cast = quantize_matrix(values, state, E4M3, current=False, rows=False, columns=True)
    return Operand(cast.columns, None, cast.inverse_scale)
