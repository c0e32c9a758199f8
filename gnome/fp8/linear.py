"""A linear layer whose three matrix products run in FP8.

    forward           y  = x W^T      E4M3 x E4M3
    input gradient    dx = g W        E5M2 x E4M3
    weight gradient   dW = g^T x      E5M2 x E4M3

Sums are FP32 and outputs 16 or 32 bits; bias and everything around the layer stay as they are.  Backward keeps x in FP8, transposed: one
byte a number instead of two.  The weight is cast once after it changed, in both layouts (FP8-LM, arXiv 2310.18313; MS-AMP `FP8Linear`).

To torch's tracers the two passes are single operations that find the layer's FP8 state by a handle at run time: what a
compiled model sees does not depend on which call it is.
"""

import functools
import itertools
import math
import warnings
import weakref
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from gnome.errors import InvalidCheckpoint, InvalidInput
from gnome.fp8.formats import E4M3, E5M2, FP16, power_of_two_scale, saturating_cast
from gnome.fp8.gradients import GradientStore
from gnome.fp8.kernels.availability import has_fp8_gemm
from gnome.fp8.optimizer_state import WEIGHT_MARGIN
from gnome.fp8.registry import enroll as enroll_weight
from gnome.fp8.scaled_tensor import check_scale
from gnome.fp8.scaling import Operand, Scaling, ScalingMode, padded, product, quantize_matrix
from gnome.fp8.watch import Watch
from gnome.fp8.working_weight import WorkingWeight


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """How a layer scales and sums.

    `fast_forward`, `fast_backward`: Hopper's faster, shorter running sum (see `scaling.product`).
    """

    scaling: ScalingMode = "delayed"
    fast_forward: bool = True
    fast_backward: bool = False

    def __post_init__(self) -> None:
        if self.scaling not in ("delayed", "current"):
            raise InvalidInput(f"scaling is {self.scaling!r}, expected delayed or current")


_handles = itertools.count()
_layers: "weakref.WeakValueDictionary[int, Linear]" = weakref.WeakValueDictionary()


class Linear(nn.Module):
    """y = x W^T + b with x (..., in_features) and W (out_features, in_features) multiplied in FP8.

    `weight` is FP32, BF16, or FP16 stored times `weight_scale`; sides that are not multiples of 16 are padded inside.  The output
    has x's dtype, or autocast's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        settings: LinearSettings | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise InvalidInput(f"a linear layer needs at least one input and output, not {in_features} and {out_features}")
        self.in_features, self.out_features = in_features, out_features
        self.settings = settings or LinearSettings()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.weight_scale: Tensor | None
        self.register_buffer("weight_scale", None)
        self.input_scaling = Scaling(E4M3, self.settings.scaling).to(device)
        self.gradient_scaling = Scaling(E5M2, self.settings.scaling).to(device)
        self.sink: tuple[GradientStore, int] | None = None
        self.watches: dict[str, Watch] = {}
        self.watching = False
        self.enroll()
        self.reset_parameters()

    @classmethod
    def from_weight(cls, weight: nn.Parameter, bias: nn.Parameter | None, settings: LinearSettings | None = None) -> Self:
        """Make a layer on parameters that exist, which it shares."""
        n_out, n_in = weight.shape
        layer = cls(n_in, n_out, bias=False, settings=settings, device="meta")
        layer.input_scaling = Scaling(E4M3, layer.settings.scaling).to(weight.device)
        layer.gradient_scaling = Scaling(E5M2, layer.settings.scaling).to(weight.device)
        layer.weight, layer.bias = weight, bias
        layer.enroll()
        return layer

    def enroll(self) -> None:
        """Take a handle of one's own, forget what was cast, and let optimizers find the layer from its weight."""
        number = next(_handles)
        _layers[number] = self
        self.handle = torch.tensor(number, device="cpu")
        self.working = WorkingWeight()
        enroll_weight(self.weight, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.sink = None
        self.enroll()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in {"working", "sink", "handle"}}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if self.weight_scale is not None and fn(self.weight.detach()[:0]).dtype != self.weight.dtype:
            raise InvalidInput(
                f"this layer's weight is stored in {self.weight.dtype} times a scale and cannot be cast; put plain layers in its place "
                "with gnome.fp8.restore_linear first"
            )
        super()._apply(fn, recurse)
        if self.weight_scale is not None:
            self.weight_scale = self.weight_scale.float()
        self.enroll()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Load weights stored as here, or plain ones, which are scaled; raises InvalidCheckpoint where a scale is missing or wrong."""
        name, saved, scale = prefix.rstrip("."), state_dict.get(prefix + "weight"), state_dict.get(prefix + "weight_scale")
        if scale is not None:
            check_scale(scale, torch.Size(()), f"{name}.weight")
            if self.weight_scale is None or (saved is not None and saved.dtype != self.weight.dtype):
                found = "nothing" if saved is None else saved.dtype
                raise InvalidCheckpoint(
                    f"{name}.weight: saved as {found} with a scale, the layer stores {self.weight.dtype}; convert the model with the same "
                    "weights= before loading"
                )
        elif saved is not None and self.weight_scale is not None:
            if saved.dtype in {torch.float16, E4M3.dtype}:
                raise InvalidCheckpoint(f"{name}.weight: saved as {saved.dtype} without its weight_scale")
            payload, scale = scaled_weight(saved.float(), self.weight.dtype)
            state_dict = {**state_dict, prefix + "weight": payload, prefix + "weight_scale": scale}
        super()._load_from_state_dict(state_dict, prefix, *others)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw initial values as torch.nn.Linear does."""
        if self.weight.device.type == "meta":
            return
        values = torch.empty_like(self.weight, dtype=torch.float32)
        nn.init.kaiming_uniform_(values, a=math.sqrt(5))
        self.set_weight(values)
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def set_weight(self, values: Tensor) -> None:
        """Overwrite the weight by true (unscaled) values."""
        self.weight.copy_(values if self.weight_scale is None else values * self.weight_scale)

    def dense_weight(self) -> Tensor:
        """Return a copy of the true weight in FP32."""
        weight = self.weight.detach().to(torch.float32, copy=True)
        return weight if self.weight_scale is None else weight / self.weight_scale

    def extra_repr(self) -> str:
        """Sizes, bias, dtype of the weight."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, weight={self.weight.dtype}"

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension."""
        check_features(x, self.in_features)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        flat, state = x.reshape(-1, self.in_features), self.input_scaling.state
        y = _Products.apply(flat, self.weight, state, self.handle, dtype, self.delivers_to_sink())
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)

    def watch(self, operand: str) -> Watch | None:
        """Return where this call's cast of an operand is recorded, if it is."""
        return self.watches[operand] if self.watching else None

    def delivers_to_sink(self) -> bool:
        """Whether the weight's gradient goes to an optimizer's store; raises InvalidInput where it must and cannot."""
        learns = self.training and self.weight.requires_grad and torch.is_grad_enabled()
        if self.sink is None and self.weight_scale is not None and learns:
            raise InvalidInput(
                f"this layer's weight is stored in {self.weight.dtype} times a scale, which only gnome.fp8.AdamW updates: make the "
                "optimizer before the first training step, or convert with weights='as they are'"
            )
        return self.sink is not None

    def state_for_input(self, state: Tensor) -> tuple[Tensor, bool]:
        """Return the scaling state of this call's input and whether it must be looked at first; evaluation leaves no trace."""
        return (state, self.input_scaling.starts_current()) if self.training else (state.clone(), True)

    def cast_gradient(self, g: Tensor, *, rows: bool = True, columns: bool = True) -> Operand:
        """Cast an output gradient (M, out) to E5M2."""
        scaling = self.gradient_scaling
        current, watch = scaling.starts_current(), self.watch("output gradient")
        return quantize_matrix(g, scaling.state, E5M2, current=current, rows=rows, columns=columns, watch=watch)

    def product(self, x: Operand, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x W^T (M, out) of an input cast by rows."""
        w = self.working.of(weight, self.weight_scale)
        return product(x, w, dtype, fast=self.settings.fast_forward)[:, : self.out_features].contiguous()

    def input_gradient(self, g: Operand, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return g W (M, in) of an output gradient cast by rows."""
        w = self.working.of(weight, self.weight_scale)
        transposed = Operand(w.columns, None, w.inverse_scale)
        return product(g, transposed, dtype, fast=self.settings.fast_backward)[:, : self.in_features].contiguous()

    def weight_gradient(self, g: Operand, x_columns: Operand, dtype: torch.dtype) -> Tensor:
        """Return g^T x (out, in) of an output gradient cast by columns and the transposed input."""
        g_columns = Operand(g.columns, None, g.inverse_scale)
        dw = product(g_columns, x_columns, dtype, fast=self.settings.fast_backward)
        return dw[: self.out_features, : self.in_features].contiguous()

    def deliver(self, dw: Tensor) -> Tensor:
        """Hand a weight gradient to the optimizer's store; returns an empty tensor in its place."""
        if self.sink is not None:
            store, index = self.sink
            store.add(index, dw)
        return dw.new_zeros(0)


def scaled_weight(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return FP32 values as FP16 or E4M3 times a power of two, and that power (); FP16 keeps room for a step's growth."""
    fmt, margin = (FP16, WEIGHT_MARGIN) if dtype == FP16.dtype else (E4M3, 0)
    largest = values.abs().amax() if values.numel() else values.new_zeros(())
    scale = power_of_two_scale(largest, fmt, margin=margin)
    return saturating_cast(values * scale, fmt), scale


class _Products(torch.autograd.Function):
    """The three products; x (M, K), weight (N, K)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, x_state: Tensor, handle: Tensor, dtype: torch.dtype, has_sink: bool
    ) -> Tensor:
        """Return x W^T (M, N)."""
        forward = linear_forward if torch.compiler.is_compiling() else multiply
        y, columns, inverse_scale = forward(x, weight, x_state, handle, dtype, ctx.needs_input_grad[1])
        keep(ctx, weight, columns if fp8_available(x.device) else x, inverse_scale, handle)
        ctx.input_dtype, ctx.has_sink = x.dtype, has_sink
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and weight; the weight's goes to the layer's sink where there is one."""
        weight, kept, inverse_scale, handle = kept_by(ctx)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        backward = linear_backward if torch.compiler.is_compiling() else multiply_backward
        dx, dw = backward(gradients[0], weight, kept, inverse_scale, handle, ctx.input_dtype, needs_x, needs_weight, ctx.has_sink)
        return (dx if needs_x else None, dw if needs_weight and not ctx.has_sink else None, *[None] * 4)


def keep(ctx: Any, *tensors: Tensor) -> None:
    """Keep what backward needs, the last a layer's handle; in eager code that layer lives until then."""
    ctx.save_for_backward(*tensors)
    ctx.compiled = torch.compiler.is_compiling()
    if not ctx.compiled:
        ctx.layer = layer_of(tensors[-1])


def kept_by(ctx: Any) -> tuple[Tensor, ...]:
    """Return what was kept; raises InvalidInput where the gradient itself is to be differentiated."""
    if not ctx.compiled and torch.is_grad_enabled():
        raise InvalidInput(
            "gradients of FP8 layers cannot be differentiated again (create_graph); leave such layers out by a filter"
        )
    return tuple(ctx.saved_tensors)


def multiply(
    x: Tensor, weight: Tensor, state: Tensor, handle: Tensor, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x W^T (M, N), and x as backward needs it: FP8 (K', M') and its inverse scale, empty unless `keep`."""
    layer = layer_of(handle)
    nothing, no_scale = x.new_empty(0, dtype=E4M3.dtype), x.new_empty((), dtype=torch.float32)
    if not fp8_available(x.device):
        w = _dense(layer, weight).to(torch.bfloat16)
        return (x.to(torch.bfloat16) @ w.t()).to(dtype), nothing, no_scale
    if x.shape[0] == 0:
        return x.new_empty(0, layer.out_features, dtype=dtype), nothing, no_scale
    state, current = layer.state_for_input(state)
    operand = quantize_matrix(x, state, E4M3, current=current, rows=True, columns=keep, watch=layer.watch("input"))
    columns = nothing if operand.columns is None else operand.columns
    return layer.product(operand, weight, dtype), columns, operand.inverse_scale


def multiply_backward(
    g: Tensor,
    weight: Tensor,
    kept: Tensor,
    inverse_scale: Tensor,
    handle: Tensor,
    dtype: torch.dtype,
    needs_x: bool,
    needs_weight: bool,
    has_sink: bool,
) -> tuple[Tensor, Tensor]:
    """Return dx (M, K) and dW (N, K), empty where not needed; with a sink dW goes there.

    The scaling of the output's gradient is the layer's own, and no argument: torch would take its change for a fault where a layer is
    used twice before backward.
    """
    layer = layer_of(handle)
    m, (n, k) = g.shape[0], weight.shape
    weight_dtype = gradient_dtype(weight)
    dx, dw = g.new_zeros(0, dtype=dtype), g.new_zeros(0, dtype=weight_dtype)
    if m == 0:
        dx = g.new_zeros(0, k, dtype=dtype)
        dw = g.new_zeros(n, k, dtype=weight_dtype) if needs_weight and not has_sink else dw
        return dx, dw
    if not fp8_available(g.device):
        dx = (g.to(torch.bfloat16) @ _dense(layer, weight).to(torch.bfloat16)).to(dtype) if needs_x else dx
        dw = (g.to(torch.bfloat16).t() @ kept.to(torch.bfloat16)).to(weight_dtype) if needs_weight else dw
    else:
        grad = layer.cast_gradient(g, rows=needs_x, columns=needs_weight)
        if needs_x:
            dx = layer.input_gradient(grad, weight, dtype)
        if needs_weight:
            dw = layer.weight_gradient(grad, Operand(kept, None, inverse_scale), weight_dtype)
    if needs_weight and has_sink:
        dw = layer.deliver(dw)
    return dx, dw


def check_features(x: Tensor, width: int) -> None:
    """Raise InvalidInput unless x holds real floating-point numbers, `width` of them along its last dimension."""
    if x.dim() == 0 or x.shape[-1] != width:
        raise InvalidInput(f"this layer takes {width} features, the input has shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InvalidInput(f"this layer takes floating-point numbers, the input is {x.dtype}")


def layer_of(handle: Tensor) -> Linear:
    """Return the layer of a handle."""
    return _layers[int(handle)]


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """Dtype that a weight's gradient is computed in: FP32 for FP32 weights, else BF16, whose range FP16 lacks."""
    return torch.float32 if weight.dtype == torch.float32 else torch.bfloat16


def _dense(layer: Linear, weight: Tensor) -> Tensor:
    return weight.detach().float() if layer.weight_scale is None else weight.detach().float() / layer.weight_scale


linear_forward = torch.library.custom_op("gnome_fp8::linear_forward", multiply, mutates_args=("state",))
linear_backward = torch.library.custom_op("gnome_fp8::linear_backward", multiply_backward, mutates_args=())


@linear_forward.register_fake
def _(x: Tensor, weight: Tensor, state: Tensor, handle: Tensor, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    del state, handle
    m, (n, k) = x.shape[0], weight.shape
    columns = (padded(k), (m + 15) // 16 * 16) if keep and fp8_available(x.device) else (0,)
    return (
        x.new_empty(m, n, dtype=dtype),
        x.new_empty(columns, dtype=E4M3.dtype),
        x.new_empty((), dtype=torch.float32),
    )


@linear_backward.register_fake
def _(
    g: Tensor,
    weight: Tensor,
    kept: Tensor,
    inverse_scale: Tensor,
    handle: Tensor,
    dtype: torch.dtype,
    needs_x: bool,
    needs_weight: bool,
    has_sink: bool,
) -> tuple[Tensor, Tensor]:
    del kept, inverse_scale, handle
    dx = g.new_empty((g.shape[0], weight.shape[1]) if needs_x else (0,), dtype=dtype)
    dw = g.new_empty(weight.shape if needs_weight and not has_sink else (0,), dtype=gradient_dtype(weight))
    return dx, dw


@functools.cache
def _warn_without_fp8(name: str) -> None:
    warnings.warn(f"{name} does not multiply FP8 matrices (compute capability 8.9 is needed); using BF16", stacklevel=4)


def fp8_available(device: torch.device) -> bool:
    """Whether products on this device are FP8: yes on the CPU, where they are emulated; one warning where not."""
    if device.type != "cuda" or has_fp8_gemm(device.index or 0):
        return True
    _warn_without_fp8(torch.cuda.get_device_name(device))
    return False
