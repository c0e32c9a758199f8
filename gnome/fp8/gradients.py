"""Weight gradients kept in E4M3: one byte a parameter from the backward pass to the optimizer.

Scales are kept by block of 128 (one pass, the default) or by tensor (FP8-LM: current scaling, window 1).  Micro-batches are added in FP32
and rounded again: to nearest, and by block from the ninth on stochastically, so that what is small beside the sum arrives on
average; by tensor always to nearest, as FP8-LM does, which loses it from about 16 micro-batches on.  The sum of squares is taken on the
way in, so that the norm and the search for NaN and infinity cost no further pass: both show as a norm that is not finite.
"""

from typing import Literal

import torch
from torch import Tensor

from gnome.errors import InvalidInput
from gnome.fp8.formats import (
    BLOCK,
    E4M3,
    STOCHASTIC_FROM,
    power_of_two_scale,
    random_words,
    saturating_cast,
    stochastic_cast,
)
from gnome.fp8.kernels.availability import use_kernels
from gnome.fp8.layout import Layout
from gnome.fp8.scaled_tensor import ScaledTensor, amax, expand_scale

GradientScaling = Literal["block", "tensor"]


class GradientStore:
    """The gradients of the tensors of a layout, flat, in E4M3.

    `payload` (numbers of the layout,) E4M3; `scale` FP32, (n_blocks,) or (tensors,); `squares` (tensors,) FP32 sums of squares;
    `filled[i]`: whether tensor i has a gradient since `clear`, with `micro_batches[i]` more added to the first.  `used`: a step has
    taken them, and the next to be added begins anew.
    """

    def __init__(self, layout: Layout, device: torch.device | str, scaling: GradientScaling = "block") -> None:
        self.layout, self.scaling = layout, scaling
        n_tensors = len(layout.numels)
        self.payload = torch.zeros(layout.numel, dtype=E4M3.dtype, device=device)
        self.scale = torch.ones(layout.n_blocks if scaling == "block" else n_tensors, device=device)
        self.squares = torch.zeros(n_tensors, device=device)
        self.used = False
        self.filled = [False] * n_tensors
        self.micro_batches = [0] * n_tensors
        self._owners: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of payload and scales."""
        return self.payload.nbytes + self.scale.nbytes

    def add(self, index: int, gradient: Tensor) -> None:
        """Add a gradient (any shape of the tensor's size, any float dtype) to what tensor `index` has."""
        if gradient.numel() != self.layout.numels[index]:
            raise InvalidInput(
                f"gradient {index} has {gradient.numel()} numbers (shape {tuple(gradient.shape)}), the parameter "
                f"{self.layout.numels[index]}"
            )
        if self.used:
            self.clear()
        flat = gradient.detach().reshape(-1)
        there = self.filled[index]
        self.micro_batches[index] = parts = self.micro_batches[index] + 1 if there else 0
        earlier = 0 * self.squares[index] if there else None  # NaN if an earlier micro-batch was not finite
        if self.scaling == "block" and use_kernels(flat.device):
            from gnome.fp8.kernels.gradients import store_gradient  # noqa: PLC0415 - needs Triton

            store_gradient(self, index, flat, earlier=parts)
        else:
            flat = flat.float()
            self._put(index, flat + self.value(index) if there else flat, parts)
        if earlier is not None:
            self.squares[index] += earlier
        self.filled[index] = True

    def _put(self, index: int, flat: Tensor, earlier: int) -> None:
        """Replace a gradient by flat FP32 values, into which `earlier` ones have gone."""
        self.squares[index] = flat.square().sum()
        scale = power_of_two_scale(amax(flat, self.scaling), E4M3)
        scaled = flat * expand_scale(scale, flat.shape, self.scaling)
        if earlier >= STOCHASTIC_FROM and self.scaling == "block":
            place = torch.arange(flat.numel(), device=flat.device) + self.layout.starts[index]
            stored = stochastic_cast(scaled, E4M3, random_words(place, earlier, earlier) & 0xFFFFF)
        else:
            stored = saturating_cast(scaled, E4M3)
        self.layout.part(self.payload, index).copy_(stored)
        if self.scaling == "block":
            self.scale[self.layout.blocks(index)] = scale
        else:
            self.scale[index] = scale

    def value(self, index: int) -> Tensor:
        """Return a gradient as flat FP32 values."""
        scale = self.scale[self.layout.blocks(index)] if self.scaling == "block" else self.scale[index]
        return ScaledTensor(self.layout.part(self.payload, index), scale, E4M3, self.scaling).dequantize()

    def block_scales(self) -> Tensor:
        """Scale of every block (n_blocks,), whichever way scales are kept; 1 for padding."""
        if self.scaling == "block":
            return self.scale
        if self._owners is None:
            self._owners = self.layout.owners(self.scale.device).long()
        return torch.where(self._owners >= 0, self.scale[self._owners.clamp(min=0)], 1.0)

    def squared_norm(self) -> Tensor:
        """Sum of squares of all filled gradients, a scalar on the device; not finite if any of them is not."""
        return self._filled_squares().sum()

    def _filled_squares(self) -> Tensor:
        if all(self.filled):
            return self.squares
        filled = torch.tensor(self.filled)
        filled = filled.pin_memory() if self.squares.is_cuda else filled
        return torch.where(filled.to(self.squares.device, non_blocking=True), self.squares, 0.0)

    def clear(self) -> None:
        """Forget the gradients; their bytes stay allocated."""
        self.filled = [False] * len(self.filled)
        self.used = False

    def share(self, first_block: int, last_block: int) -> tuple[Tensor, Tensor]:
        """Return payload and block scales of a run of blocks."""
        return self.payload[first_block * BLOCK : last_block * BLOCK], self.block_scales()[first_block:last_block]
