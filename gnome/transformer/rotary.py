"""Rotary position embeddings (Su et al., arXiv 2104.09864): features turn in pairs, by angles that grow with the token's place."""

import torch
from torch import Tensor

BASE = 10_000.0


def angles(places: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (T, width / 2), FP32, for places (T,); made anew every time, so that no model keeps a longest sequence."""
    rates = BASE ** (-torch.arange(0, width, 2, device=places.device, dtype=torch.float32) / width)
    turned = places.float()[:, None] * rates
    return turned.cos(), turned.sin()


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn x (B, T, ..., width): feature i is paired with feature i + width / 2.

    As products with x and with its flipped halves, whose gradient is made of products and flips too: that of slices put together is
    filled with zeros first.
    """
    cosines, sines = torch.cat([cosines, cosines], -1).to(x.dtype), torch.cat([-sines, sines], -1).to(x.dtype)
    shape = (len(cosines), *(1,) * (x.dim() - 3), x.shape[-1])
    flipped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return x * cosines.view(shape) + flipped * sines.view(shape)
