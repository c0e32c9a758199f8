"""Sums over angles on a GPU: the kernels against the sums in FP64, called as they are and within compiled code."""

import pytest
import torch
from torch import Tensor

from gnome.graphs.angular_sums import angular_sums, has_kernel
from gnome.graphs.harmonics import spherical_harmonics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels", [16, 32])
def test_sums_and_gradients_are_those_of_fp64(channels: int, *, compiled: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(channels)
    counts = torch.randint(0, 80, (500,), generator=generator, device="cuda")
    receivers = torch.repeat_interleave(torch.arange(500, device="cuda"), counts)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    n_edges = len(receivers)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    directions, weights, gradient = drawn(n_edges, 3).double(), drawn(n_edges, channels), drawn(n_edges, 4, channels)
    harmonics = spherical_harmonics(directions / directions.norm(dim=1, keepdim=True), 4).bfloat16()
    assert has_kernel(weights, harmonics)
    call = torch.compile(angular_sums, fullgraph=True) if compiled else angular_sums
    found = []
    for function, dtype in ((call, torch.bfloat16), (angular_sums, torch.float64)):
        own = weights.to(dtype).requires_grad_()
        sums = function(own, harmonics.to(dtype), receivers, offsets, 4)
        found.append([sums, *torch.autograd.grad(sums, own, gradient.to(dtype))])
    for mine, right in zip(*found, strict=True):
        assert float((mine.double() - right).norm()) < 0.005 * float(right.norm())
