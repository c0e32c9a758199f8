"""Rotary position embeddings (Su et al., arXiv 2104.09864): features turn in pairs, by angles that grow with the token's place."""

import torch
from torch import Tensor

BASE = 10_000.0


def angles(places: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (T, width), FP32, for places (T,), sines of the first half negated, as `rotated` takes them.

    They are made anew every time, so that no model keeps a longest sequence.
    """
    rates = BASE ** (-torch.arange(0, width, 2, device=places.device, dtype=torch.float32) / width)
    turned = places.float()[:, None] * rates
    cosines, sines = turned.cos(), turned.sin()
    return torch.cat([cosines, cosines], -1), torch.cat([-sines, sines], -1)


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn x (B, T, ..., width): feature i is paired with feature i + width / 2.

    As products with x and with its flipped halves, whose gradient is made of products and flips too: that of slices put together is
    filled with zeros first.
    """
    shape = (len(cosines), *(1,) * (x.dim() - 3), x.shape[-1])
    flipped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return x * cosines.to(x.dtype).view(shape) + flipped * sines.to(x.dtype).view(shape)
