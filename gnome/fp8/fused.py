"""Parts of a transformer layer with the casts folded into what makes the numbers: RMS norm + linear, and a whole gated MLP.

The same mathematics as separate norm, `Linear` and SwiGLU, and nearly the same numbers (normalised and gated values are cast from FP32
instead of from 16 bits).  What is kept for backward is the input, in its own dtype, and, in the MLP, gate and up before
the activation: no FP8 copy of what can be made from them again.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gnome.errors import InvalidInput
from gnome.fp8.formats import GEMM_MULTIPLE
from gnome.fp8.linear import (
    Linear,
    LinearSettings,
    check_features,
    fp8_available,
    gradient_dtype,
    keep,
    kept_by,
    layer_of,
)
from gnome.fp8.producers import gated, gated_backward, norm_backward, normalized, normalized_columns


class NormLinear(nn.Module):
    """y = W (x / rms(x) * gain), x (..., width) to (..., out_features), without bias; `gain` starts at one."""

    def __init__(
        self, width: int, out_features: int, *, eps: float = 1e-6, settings: LinearSettings | None = None, **factory: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(width, **factory))
        self.linear = Linear(width, out_features, bias=False, settings=settings, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension."""
        check_features(x, self.linear.in_features)
        x = as_autocast(x)
        if not (isinstance(self.linear, Linear) and fp8_available(x.device)):
            return self.linear(_normalized_16_bit(x, self.gain, self.eps))
        flat, linear = x.reshape(-1, x.shape[-1]), self.linear
        state, sink = linear.input_scaling.state, linear.delivers_to_sink()
        y = _NormLinear.apply(flat, self.gain, linear.weight, state, linear.handle, self.eps, sink)
        return y.view(*x.shape[:-1], linear.out_features)


class GatedMLP(nn.Module):
    """y = W_down (silu(gate) * up) with [gate, up] = W_up (x / rms(x) * gain), x (..., width); no biases.

    `up` holds gate above up, (2 hidden, width); `hidden` is a multiple of 16.
    """

    def __init__(
        self, width: int, hidden: int, *, eps: float = 1e-6, settings: LinearSettings | None = None, **factory: Any
    ) -> None:
        super().__init__()
        if hidden % GEMM_MULTIPLE:
            raise InvalidInput(f"hidden is {hidden}, which is not a multiple of {GEMM_MULTIPLE}")
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(width, **factory))
        self.up = Linear(width, 2 * hidden, bias=False, settings=settings, **factory)
        self.down = Linear(hidden, width, bias=False, settings=settings, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension."""
        check_features(x, self.up.in_features)
        x = as_autocast(x)
        up, down = self.up, self.down
        if not (isinstance(up, Linear) and isinstance(down, Linear) and fp8_available(x.device)):
            gate, value = up(_normalized_16_bit(x, self.gain, self.eps)).chunk(2, dim=-1)
            return down(functional.silu(gate) * value)
        states = up.input_scaling.state, down.input_scaling.state
        has_sink = up.delivers_to_sink()
        if has_sink != down.delivers_to_sink():
            raise InvalidInput("both weights of a GatedMLP belong to the same optimizer, or to none")
        y = _GatedMLP.apply(
            x.reshape(-1, x.shape[-1]), self.gain, up.weight, down.weight, *states, up.handle, down.handle, self.eps, has_sink
        )
        return y.view(x.shape)


def as_autocast(x: Tensor) -> Tensor:
    """Cast to autocast's dtype, where it is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _normalized_16_bit(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Normalise where the layer that follows is not FP8: a GPU without it, or a plain layer put in its place."""
    return (functional.rms_norm(x.float(), (x.shape[-1],), eps=eps) * gain).to(x.dtype)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        weight: Tensor,
        x_state: Tensor,
        handle: Tensor,
        eps: float,
        sink: bool,
    ) -> Tensor:
        call = norm_linear_op if torch.compiler.is_compiling() else norm_linear
        y, inverse_rms, inverse_scale = call(x, gain, weight, x_state, handle, eps)
        keep(ctx, x, gain, weight, inverse_rms, inverse_scale, handle)
        ctx.sink = sink
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        call: Any = norm_linear_backward_op if torch.compiler.is_compiling() else norm_linear_backward
        needed = ctx.needs_input_grad[2]
        dx, d_gain, dw = call(gradients[0], *kept_by(ctx), needed, ctx.sink)
        return dx, d_gain, dw if needed and not ctx.sink else None, *[None] * 4


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, up: Tensor, down: Tensor,
        x_state: Tensor, h_state: Tensor,
        up_handle: Tensor, down_handle: Tensor, eps: float, sink: bool,
    ) -> Tensor:  # fmt: skip
        call = gated_mlp_op if torch.compiler.is_compiling() else gated_mlp
        y, u, *rest = call(x, gain, up, down, x_state, h_state, up_handle, down_handle, eps)
        keep(ctx, x, gain, up, down, u, *rest, down_handle, up_handle)
        ctx.sink = sink
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        call: Any = gated_mlp_backward_op if torch.compiler.is_compiling() else gated_mlp_backward
        needed = ctx.needs_input_grad[2:4]
        dx, d_gain, *found = call(gradients[0], *kept_by(ctx), *needed, ctx.sink)
        of_weights = [d if wanted and not ctx.sink else None for d, wanted in zip(found, needed, strict=True)]
        return dx, d_gain, *of_weights, *[None] * 6


def norm_linear(
    x: Tensor, gain: Tensor, weight: Tensor, x_state: Tensor, handle: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (M, out), 1 / rms (M,) and the inverse scale of the cast."""
    layer = layer_of(handle)
    state, current = layer.state_for_input(x_state)
    operand, inverse_rms = normalized(x.contiguous(), gain, eps, state, current=current, watch=layer.watch("input"))
    return layer.product(operand, weight, x.dtype), inverse_rms, operand.inverse_scale


def norm_linear_backward(
    g: Tensor, x: Tensor, gain: Tensor, weight: Tensor, inverse_rms: Tensor, inverse_scale: Tensor,
    handle: Tensor, needed: bool, sink: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, gain and weight, the last empty where it is not needed or goes to a sink."""
    layer = layer_of(handle)
    grad = layer.cast_gradient(g, columns=needed)
    dn = layer.input_gradient(grad, weight, x.dtype)
    dw = g.new_zeros(0, dtype=gradient_dtype(weight))
    if needed:
        x_columns = normalized_columns(x.contiguous(), gain, inverse_rms, inverse_scale)
        dw = layer.weight_gradient(grad, x_columns, dw.dtype)
        dw = layer.deliver(dw) if sink else dw
    dx, d_gain = norm_backward(dn, x.contiguous(), gain, inverse_rms)
    return dx, d_gain, dw


def gated_mlp(
    x: Tensor,
    gain: Tensor,
    up: Tensor,
    down: Tensor,
    x_state: Tensor,
    h_state: Tensor,
    up_handle: Tensor,
    down_handle: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y (M, width), u = [gate, up] (M, 2 hidden), 1 / rms (M,), and the inverse scales of the two casts."""
    up_layer, down_layer = layer_of(up_handle), layer_of(down_handle)
    state, current = up_layer.state_for_input(x_state)
    operand, inverse_rms = normalized(x.contiguous(), gain, eps, state, current=current, watch=up_layer.watch("input"))
    u = up_layer.product(operand, up, x.dtype)
    state, current = down_layer.state_for_input(h_state)
    h = gated(u, state, current=current, watch=down_layer.watch("input"))
    return down_layer.product(h, down, x.dtype), u, inverse_rms, operand.inverse_scale, h.inverse_scale


def gated_mlp_backward(
    g: Tensor, x: Tensor, gain: Tensor, up: Tensor, down: Tensor, u: Tensor, inverse_rms: Tensor, x_scale: Tensor, h_scale: Tensor,
    down_handle: Tensor, up_handle: Tensor, needs_up: bool, needs_down: bool, sink: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, gain, and of both weights, these empty where they are not needed or go to a sink."""
    up_layer, down_layer = layer_of(up_handle), layer_of(down_handle)
    grad = down_layer.cast_gradient(g)
    dh = down_layer.input_gradient(grad, down, x.dtype)
    current = up_layer.gradient_scaling.starts_current()
    state, watch = up_layer.gradient_scaling.state, up_layer.watch("output gradient")
    h_columns, du = gated_backward(dh, u, h_scale, state, current=current, watch=watch)
    d_up, d_down = (g.new_zeros(0, dtype=gradient_dtype(weight)) for weight in (up, down))
    if needs_down:
        d_down = down_layer.weight_gradient(grad, h_columns, d_down.dtype)
        d_down = down_layer.deliver(d_down) if sink else d_down
    dn = up_layer.input_gradient(du, up, x.dtype)
    if needs_up:
        x_columns = normalized_columns(x.contiguous(), gain, inverse_rms, x_scale)
        d_up = up_layer.weight_gradient(du, x_columns, d_up.dtype)
        d_up = up_layer.deliver(d_up) if sink else d_up
    dx, d_gain = norm_backward(dn, x.contiguous(), gain, inverse_rms)
    return dx, d_gain, d_up, d_down


def _op(name: str, function: Any, mutates: tuple[str, ...]) -> Any:
    return torch.library.custom_op(f"gnome_fp8::{name}", function, mutates_args=mutates)


norm_linear_op = _op("norm_linear", norm_linear, ("x_state",))
norm_linear_backward_op = _op("norm_linear_backward", norm_linear_backward, ())
gated_mlp_op = _op("gated_mlp", gated_mlp, ("x_state", "h_state"))
gated_mlp_backward_op = _op("gated_mlp_backward", gated_mlp_backward, ())


def _scalar(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _fake_norm_linear(x: Tensor, gain: Tensor, weight: Tensor, x_state: Tensor, handle: Tensor, eps: float) -> tuple[Tensor, ...]:
    del gain, x_state, handle, eps
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], dtype=torch.float32), _scalar(x)


def _fake_norm_linear_backward(
    g: Tensor, x: Tensor, gain: Tensor, weight: Tensor, inverse_rms: Tensor, inverse_scale: Tensor,
    handle: Tensor, needed: bool, sink: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    del g, inverse_rms, inverse_scale, handle
    return torch.empty_like(x), torch.empty_like(gain), _fake_gradient(weight, sink or not needed)


def _fake_gated_mlp(
    x: Tensor,
    gain: Tensor,
    up: Tensor,
    down: Tensor,
    x_state: Tensor,
    h_state: Tensor,
    up_handle: Tensor,
    down_handle: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    del gain, x_state, h_state, up_handle, down_handle, eps
    m = x.shape[0]
    return (
        x.new_empty(m, down.shape[0]),
        x.new_empty(m, up.shape[0]),
        x.new_empty(m, dtype=torch.float32),
        _scalar(x),
        _scalar(x),
    )


def _fake_gated_mlp_backward(
    g: Tensor, x: Tensor, gain: Tensor, up: Tensor, down: Tensor, u: Tensor, inverse_rms: Tensor, x_scale: Tensor, h_scale: Tensor,
    down_handle: Tensor, up_handle: Tensor, needs_up: bool, needs_down: bool, sink: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    del g, u, inverse_rms, x_scale, h_scale, up_handle, down_handle
    of_weights = _fake_gradient(up, sink or not needs_up), _fake_gradient(down, sink or not needs_down)
    return torch.empty_like(x), torch.empty_like(gain), *of_weights


for _op_, _fake in (
    (norm_linear_op, _fake_norm_linear),
    (norm_linear_backward_op, _fake_norm_linear_backward),
    (gated_mlp_op, _fake_gated_mlp),
    (gated_mlp_backward_op, _fake_gated_mlp_backward),
):
    _op_.register_fake(_fake)


def _fake_gradient(weight: Tensor, sink: bool) -> Tensor:
    return weight.new_empty((0,) if sink else weight.shape, dtype=gradient_dtype(weight))
