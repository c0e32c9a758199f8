"""The reduction's kernels write the same bits as the torch code; sums of squares agree but for the order of adding."""

import pytest
import torch

from gnome.fp8.collectives import TorchReduction
from gnome.fp8.formats import BLOCK, E4M3, saturating_cast
from gnome.fp8.layout import Layout, Sharding, lay_out

pytestmark = pytest.mark.usefixtures("interpreted_kernels")


def random_shards(layout: Layout, ranks: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    n_blocks = last - first
    payload = torch.randn(ranks, n_blocks, BLOCK, generator=generator) * 100
    payload[:, layout.owners("cpu")[first:last] < 0] = 0
    scales = torch.exp2(torch.randint(-30, 30, (ranks, n_blocks), generator=generator).float())
    payload[:, 1] = 0.0
    return saturating_cast(payload, E4M3).view(ranks, -1), scales


@pytest.mark.parametrize(("ranks", "step"), [(2, 1000), (3, 40), (4, 33)])
@pytest.mark.parametrize("sharding", ["even", "whole"])
def test_kernels_match_torch(ranks: int, step: int, sharding: Sharding) -> None:
    from gnome.fp8.kernels.reduction import KernelReduction

    layout = lay_out([9000, 1000, 0, 12_345, 7], world=2, sharding=sharding)
    first, last = layout.shard(1)
    received, scales = random_shards(layout, ranks, first, last)
    device = torch.device("cpu")
    results = []
    for reduction in (TorchReduction(layout, first, last, device), KernelReduction(layout, first, last, step, device)):
        payload = torch.zeros((last - first) * BLOCK, dtype=E4M3.dtype)
        scale = torch.ones(last - first)
        for begin in range(0, last - first, step):
            span = received[:, begin * BLOCK : (begin + step) * BLOCK].contiguous()
            reduction.mean(span, scales, begin, payload, scale)
        results.append((payload.view(torch.uint8), scale, reduction.squares()))
    (payload, scale, squares), (payload_kernel, scale_kernel, squares_kernel) = results
    assert torch.equal(payload_kernel, payload)
    assert torch.equal(scale_kernel, scale)
    torch.testing.assert_close(squares_kernel, squares, rtol=1e-6, atol=0)
    assert payload.any()


def test_kernels_of_fp8lm_match_torch() -> None:
    from gnome.fp8.kernels.reduction import KernelReduction

    layout = lay_out([9000, 1000, 0, 12_345, 7], world=3)
    payload = random_shards(layout, 1, 0, layout.n_blocks)[0][0]
    factor = torch.tensor([1.5, 4.0, 1.0, 0.3, 2**-0.5])
    results = []
    for reduction in (
        TorchReduction(layout, 0, layout.n_blocks, torch.device("cpu")),
        KernelReduction(layout, 0, layout.n_blocks, layout.n_blocks, torch.device("cpu")),
    ):
        scaled = payload.clone()
        reduction.rescale(scaled, factor)
        results.append((scaled.view(torch.uint8), *reduction.census(scaled)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=0)
    assert torch.equal(results[0][2], results[1][2])
    assert results[0][2][1] > 10
