"""Sums over the angles between edges: torch code and the kernels, against Legendre polynomials of cosines in FP64."""

import pytest
import torch
from numpy.polynomial.legendre import Legendre
from torch import Tensor

from gnome.graphs.angular_sums import angular_sums
from gnome.graphs.harmonics import spherical_harmonics

COUNTS = [0, 1, 70, 32, 0, 5]


def given(degree: int, channels: int, counts: list[int]) -> tuple[Tensor, ...]:
    """Directions (E, 3), weights (E, C), a gradient (E, degree, C), receivers and their offsets."""
    generator = torch.Generator().manual_seed(degree)
    n_edges = sum(counts)
    directions = torch.nn.functional.normalize(torch.randn(n_edges, 3, generator=generator, dtype=torch.float64), dim=1)
    weights = torch.randn(n_edges, channels, generator=generator, dtype=torch.float64)
    gradient = torch.randn(n_edges, degree, channels, generator=generator, dtype=torch.float64)
    receivers = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.long))
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    return directions, weights, gradient, receivers, offsets


def pair_matrices(directions: Tensor, receivers: Tensor, degree: int) -> Tensor:
    """P_l of the cosines between edges that reach the same atom, else 0; (degree, E, E)."""
    cosines = (directions @ directions.T).numpy()
    same = receivers[:, None] == receivers[None, :]
    return torch.stack([torch.from_numpy(Legendre.basis(order)(cosines)) * same for order in range(1, degree + 1)])


def relative_error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize("degree", [1, 4])
def test_sums_are_those_over_pairs_of_edges(degree: int) -> None:
    directions, weights, gradient, receivers, offsets = given(degree, 3, COUNTS)
    weights.requires_grad_()
    sums = angular_sums(weights, spherical_harmonics(directions, degree), receivers, offsets, degree)
    pairs = pair_matrices(directions, receivers, degree)
    torch.testing.assert_close(sums, torch.einsum("lek,kc->elc", pairs, weights), rtol=0, atol=1e-6)  # moments in FP32 at least
    (found,) = torch.autograd.grad(sums, weights, gradient)
    torch.testing.assert_close(found, torch.einsum("lek,elc->kc", pairs, gradient), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("degree", "channels", "counts"), [(4, 16, COUNTS), (1, 32, COUNTS), (2, 64, COUNTS), (3, 16, [3]), (4, 16, [])]
)
def test_the_kernels_compute_the_sums_and_their_gradient(
    degree: int, channels: int, counts: list[int], dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    from gnome.graphs.angular_kernels import gradient_of_weights, sums_of_weights

    directions, weights, gradient, receivers, offsets = given(degree, channels, counts)
    harmonics = spherical_harmonics(directions, degree).to(dtype)
    weights, gradient = weights.to(dtype), gradient.to(dtype)
    sums, found = sums_of_weights(weights, harmonics, offsets, degree), gradient_of_weights(gradient, harmonics, offsets)
    assert sums.shape == gradient.shape
    assert found.shape == weights.shape
    if not counts:
        return
    pairs = pair_matrices(directions, receivers, degree)
    limit = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    assert relative_error(sums, torch.einsum("lek,kc->elc", pairs, weights.double())) < limit
    assert relative_error(found, torch.einsum("lek,elc->kc", pairs, gradient.double())) < limit
