"""A tensor stored in few bits beside its scales."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from gnome.errors import InvalidCheckpoint
from gnome.fp8.formats import BLOCK, E4M3, Format, power_of_two_scale, saturating_cast

Granularity = Literal["tensor", "row", "block"]


@dataclass(frozen=True)
class ScaledTensor:
    """A payload in a narrow format and its FP32 scales; the value is payload / scale.

    Shapes, for a payload (..., K): scale () by tensor, (..., 1) by row, (..., ceil(K / 128)) by block of 128 numbers along the last
    dimension.
    """

    payload: Tensor
    scale: Tensor
    format: Format
    granularity: Granularity = "tensor"

    @classmethod
    def quantize(
        cls,
        x: Tensor,
        fmt: Format = E4M3,
        granularity: Granularity = "tensor",
        *,
        scale: Tensor | None = None,
    ) -> Self:
        """Store x, scaled by its own largest magnitudes, or by `scale` (saturating) where one is given.

        All-zero parts get scale 1.  Infinities saturate and NaN stays: look at `amax` first where they may occur.
        """
        if scale is None:
            scale = power_of_two_scale(amax(x, granularity), fmt)
        payload = saturating_cast(x.float() * expand_scale(scale, x.shape, granularity), fmt)
        return cls(payload, scale, fmt, granularity)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values."""
        return (self.payload.float() / expand_scale(self.scale, self.payload.shape, self.granularity)).to(dtype)

    @property
    def shape(self) -> torch.Size:
        """Shape of the values."""
        return self.payload.shape

    @property
    def nbytes(self) -> int:
        """Bytes of payload and scales."""
        return self.payload.nbytes + self.scale.nbytes

    def times(self, factor: Tensor | float) -> Self:
        """Multiply the values by a positive factor, by the scales alone: no rounding but the scale's own."""
        return replace(self, scale=self.scale / factor)

    def to(self, device: torch.device | str) -> Self:
        """Move to a device."""
        return replace(self, payload=self.payload.to(device), scale=self.scale.to(device))

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save; with format and granularity they restore the value to the bit."""
        return {"payload": self.payload, "scale": self.scale}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], fmt: Format, granularity: Granularity = "tensor", *, name: str = "tensor"
    ) -> Self:
        """Restore what `state` returned; raises InvalidCheckpoint that names what is missing or wrong."""
        missing = [key for key in ("payload", "scale") if key not in state]
        if missing:
            raise InvalidCheckpoint(f"{name}: a {fmt.name} tensor is saved without its {' and '.join(missing)}")
        payload, scale = state["payload"], state["scale"]
        if payload.dtype != fmt.dtype:
            raise InvalidCheckpoint(f"{name}: the payload is {payload.dtype}, expected {fmt.dtype} ({fmt.name})")
        check_scale(scale, scale_shape(payload.shape, granularity), name, power_of_two=False)  # `times` leaves others
        return cls(payload, scale, fmt, granularity)


def check_scale(scale: Tensor, shape: torch.Size, name: str, *, power_of_two: bool = True) -> None:
    """Raise InvalidCheckpoint unless the scale is FP32, of that shape, finite and positive, and a power of two."""
    if scale.dtype != torch.float32 or scale.shape != shape:
        raise InvalidCheckpoint(
            f"{name}: its scale is {scale.dtype} of shape {tuple(scale.shape)}, expected torch.float32 of shape {tuple(shape)}"
        )
    wrong = ~(torch.isfinite(scale) & (scale > 0))
    if bool(wrong.any()):
        raise InvalidCheckpoint(f"{name}: its scale is {float(scale[wrong].flatten()[0])}, expected a positive number")
    between = torch.frexp(scale).mantissa != 0.5
    if power_of_two and bool(between.any()):
        raise InvalidCheckpoint(f"{name}: its scale is {float(scale[between].flatten()[0])}, expected a power of two")


def scale_shape(shape: torch.Size, granularity: Granularity) -> torch.Size:
    """Shape of the scales of values of a shape."""
    if granularity == "tensor":
        return torch.Size(())
    last = 1 if granularity == "row" else -(-shape[-1] // BLOCK)
    return torch.Size((*shape[:-1], last))


def amax(x: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """Largest magnitudes, shaped as the scales; 0 where there is nothing, not finite where x is not."""
    x = x.detach().abs().float()
    if x.numel() == 0:
        return x.new_zeros(scale_shape(x.shape, granularity))
    if granularity == "tensor":
        return x.amax()
    if granularity == "row":
        return x.amax(-1, keepdim=True)
    return _blocks(x).amax(-1)


def expand_scale(scale: Tensor, shape: torch.Size, granularity: Granularity) -> Tensor:
    """Repeat scales so that they multiply values of a shape."""
    if granularity != "block":
        return scale
    return scale.repeat_interleave(BLOCK, dim=-1)[..., : shape[-1]]


def _blocks(x: Tensor) -> Tensor:
    """View the last dimension as (blocks, 128), zeros filling the last one."""
    return functional.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
