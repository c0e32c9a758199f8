"""Spherical harmonics against Legendre polynomials, by the addition theorem."""

import numpy as np
import pytest
import torch
from numpy.polynomial.legendre import Legendre

from gnome.graphs.harmonics import MAX_DEGREE, spherical_harmonics, sum_degrees


@pytest.mark.parametrize("degree", range(1, MAX_DEGREE + 1))
def test_products_add_up_to_legendre_polynomials(degree: int) -> None:
    torch.manual_seed(0)
    u, v = (torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64), dim=1) for _ in range(2))
    products = spherical_harmonics(u, degree) * spherical_harmonics(v, degree)
    sums = sum_degrees(products[:, :, None], degree)[:, :, 0].numpy()
    cosines = (u * v).sum(1).numpy()
    expected = np.stack([Legendre.basis(order)(cosines) for order in range(1, degree + 1)], 1)
    np.testing.assert_allclose(sums, expected, atol=1e-12)


@pytest.mark.parametrize("degree", [0, MAX_DEGREE + 1])
def test_other_degrees_are_refused(degree: int) -> None:
    with pytest.raises(ValueError, match=f"degree is {degree}"):
        spherical_harmonics(torch.zeros(1, 3), degree)
