"""Real spherical harmonics of directions, as polynomials."""

import math

import torch
from torch import Tensor

MAX_DEGREE = 4


def spherical_harmonics(directions: Tensor, degree: int) -> Tensor:
    """Harmonics of degrees 1 to `degree` (at most 4) of unit vectors (E, 3), shape (E, degree (degree + 2)).

    Those of degree l are 2 l + 1 columns, scaled so that their products over two directions add up to the Legendre polynomial P_l of the
    cosine between them (Racah's normalisation; Helgaker, Jorgensen, Olsen, Molecular Electronic-Structure Theory, section 6.4).
    """
    if not 1 <= degree <= MAX_DEGREE:
        raise ValueError(f"degree is {degree}, expected 1 to {MAX_DEGREE}")
    x, y, z = directions.unbind(-1)
    x2, y2, z2 = x * x, y * y, z * z
    columns = [x, y, z]
    if degree >= 2:
        root = math.sqrt(3)
        columns += [root * x * y, root * y * z, root * z * x, root / 2 * (x2 - y2), 1.5 * z2 - 0.5]
    if degree >= 3:
        a, b, c = math.sqrt(5 / 8), math.sqrt(3 / 8), math.sqrt(15)
        columns += [a * y * (3 * x2 - y2), a * x * (x2 - 3 * y2), b * y * (5 * z2 - 1), b * x * (5 * z2 - 1)]
        columns += [c * x * y * z, c / 2 * z * (x2 - y2), z * (2.5 * z2 - 1.5)]
    if degree >= 4:
        a, b, c = math.sqrt(35), math.sqrt(35 / 8), math.sqrt(5 / 8)
        columns += [a / 2 * x * y * (x2 - y2), a / 8 * (x2 * x2 - 6 * x2 * y2 + y2 * y2)]
        columns += [b * y * z * (3 * x2 - y2), b * x * z * (x2 - 3 * y2)]
        columns += [math.sqrt(5) / 2 * x * y * (7 * z2 - 1), math.sqrt(5) / 4 * (x2 - y2) * (7 * z2 - 1)]
        columns += [c * y * z * (7 * z2 - 3), c * x * z * (7 * z2 - 3), (35 * z2 * z2 - 30 * z2 + 3) / 8]
    return torch.stack(columns, -1)


def sum_degrees(products: Tensor, degree: int) -> Tensor:
    """Add up columns (E, degree (degree + 2), C) of each degree, shape (E, degree, C)."""
    sizes = [2 * order + 1 for order in range(1, degree + 1)]
    return torch.stack([part.sum(1) for part in products.split(sizes, dim=1)], 1)
