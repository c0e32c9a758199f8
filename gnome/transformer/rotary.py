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
    """Turn x (..., T, width): feature i is paired with feature i + width / 2."""
    a, b = x.chunk(2, dim=-1)
    cosines, sines = cosines.to(x.dtype), sines.to(x.dtype)
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1)
