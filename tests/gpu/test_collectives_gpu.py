"""The reductions over NCCL, on as many GPUs as there are, against the torch code on the CPU."""

import datetime as dt
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gnome.fp8 import collectives
from gnome.fp8.automatic_scale import AutomaticScale
from gnome.fp8.collectives import TorchReduction, reduce_gradients, ring_sum
from gnome.fp8.formats import BLOCK, E4M3
from gnome.fp8.gradients import GradientStore
from gnome.fp8.layout import lay_out

pytestmark = pytest.mark.gpu

NUMELS = (1_000_003, 4096 * 512, 7, 128 * 33)
CPU = torch.device("cpu")


def gradient(rank: int, index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + index)
    values = torch.randn(NUMELS[index], generator=generator)
    return values * torch.exp(torch.randn(NUMELS[index], generator=generator.manual_seed(index))) * 1e-3


def filled_store(rank: int, size: int, mode: collectives.Mode) -> GradientStore:
    store = GradientStore(lay_out(NUMELS, world=size), "cuda", "block" if mode == "all_to_all" else "tensor")
    for index in range(len(NUMELS)):
        store.add(index, gradient(rank, index).cuda())
    return store


def from_all(tensor: torch.Tensor, size: int) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor)
    return torch.stack(parts).cpu()


def assert_alike(store: GradientStore, size: int) -> None:
    for tensor in (store.payload.view(torch.uint8), store.scale, store.squares):
        assert torch.equal(from_all(tensor, size), tensor.cpu().expand(size, *tensor.shape))


def check_all_to_all(rank: int, size: int) -> None:
    """Repeated with spans of few blocks: what comes must not be overwritten before it is added."""
    store = filled_store(rank, size, "all_to_all")
    start, scale = store.payload.clone(), store.scale.clone()
    received = from_all(start.view(torch.uint8), size).view(E4M3.dtype)
    layout = store.layout
    payload_expected, scale_expected = torch.zeros(layout.numel, dtype=E4M3.dtype), torch.ones(layout.n_blocks)
    reduction = TorchReduction(layout, 0, layout.n_blocks, CPU)
    reduction.mean(received, from_all(scale, size), 0, payload_expected, scale_expected)
    for turn, span_blocks in enumerate([collectives.SPAN_BLOCKS] + [size * 500] * 10):
        collectives.SPAN_BLOCKS = span_blocks
        store.payload.copy_(start)
        store.scale.copy_(scale)
        torch.cuda.synchronize()
        if turn not in {0, 1}:  # the first waits: the layouts are compared, and what kernels need is copied to the device
            torch.cuda.set_sync_debug_mode("error")
        reduce_gradients(store)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(store.payload.view(torch.uint8).cpu(), payload_expected.view(torch.uint8)), turn
        assert torch.equal(store.scale.cpu(), scale_expected), turn
        torch.testing.assert_close(store.squares.cpu(), reduction.squares(), rtol=1e-5, atol=0)
        assert_alike(store, size)
    shards = filled_store(rank, size, "all_to_all")
    reduce_gradients(shards, gather=False)
    first, last = layout.shard(rank)
    own = slice(first * BLOCK, last * BLOCK)
    assert torch.equal(shards.payload[own].view(torch.uint8).cpu(), payload_expected[own].view(torch.uint8))
    assert torch.equal(shards.squares, store.squares)


def check_fp8lm(rank: int, size: int) -> None:
    store = filled_store(rank, size, "fp8lm")
    scale = from_all(store.scale, size)
    shared = (scale * size**-0.5).amin(0)
    payloads = list(from_all(store.payload.view(torch.uint8), size).view(E4M3.dtype))
    reduction = TorchReduction(store.layout, 0, store.layout.n_blocks, CPU)
    for payload, own in zip(payloads, scale, strict=True):
        reduction.rescale(payload, shared / own)
    automatic = AutomaticScale(len(NUMELS), size, "cuda")
    reduce_gradients(store, mode="fp8lm", automatic_scale=automatic)
    torch.testing.assert_close(store.scale.cpu(), shared * size)
    assert_alike(store, size)
    same = (store.payload.cpu().float() == ring_sum(payloads).float()).float().mean()
    print(f"rank {rank} of {size}: {float(same):.6f} of NCCL's sums are those of the model of its ring")
    assert same > (0.999 if size == 2 else 0.7)  # with more ranks the order of the hops differs from place to place
    squares = torch.stack([store.value(index).square().sum() for index in range(len(NUMELS))])
    torch.testing.assert_close(store.squares, squares, rtol=1e-5, atol=0)
    torch.cuda.set_sync_debug_mode("error")
    reduce_gradients(store, mode="fp8lm", automatic_scale=automatic)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(from_all(automatic.mu, size), automatic.mu.cpu().expand(size, -1))


def check_faults(rank: int, size: int) -> None:
    for mode in ("all_to_all", "fp8lm"):
        store = filled_store(rank, size, mode)
        store.clear()
        for index in (0, 1, 3) if rank == 0 else (0, 1):
            values = gradient(rank, index)
            if index == 1 and rank == size - 1:
                values[5] = torch.inf
            store.add(index, values.cuda())
        reduce_gradients(store, mode=mode)
        assert store.filled == [True, True, False, True]
        assert torch.isfinite(store.squares).tolist() == [True, False, True, True]
        expected = gradient(0, 3).double() / size
        noise = (store.value(3).cpu() - expected).square().sum()
        assert noise < expected.square().sum() * 10**-2.2


def run_checks(rank: int, size: int, folder: Path) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=dt.timedelta(seconds=60),
        device_id=torch.device("cuda", rank),
    )
    for check in (check_all_to_all, check_fp8lm, check_faults):
        check(rank, size)
    dist.destroy_process_group()


def test_over_nccl(tmp_path: Path) -> None:
    size = min(torch.cuda.device_count(), 4)
    if size < 2:
        pytest.skip(f"needs 2 CUDA devices, there are {size}")
    mp.spawn(run_checks, args=(size, tmp_path), nprocs=size)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_kernels_match_torch_on_the_cpu(ranks: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from gnome.fp8.kernels.reduction import KernelReduction

    layout = lay_out(NUMELS, world=2)
    first, last = layout.shard(1)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(ranks, (last - first) * BLOCK, generator=generator) * 100
    received = values.clamp(-E4M3.max, E4M3.max).to(E4M3.dtype)
    scales = torch.exp2(torch.randint(-30, 30, (ranks, last - first), generator=generator).float())
    results = []
    for device in (CPU, torch.device("cuda")):
        on_cpu = device == CPU
        reduction = (
            TorchReduction(layout, first, last, device) if on_cpu else KernelReduction(layout, first, last, last - first, device)
        )
        payload = torch.zeros((last - first) * BLOCK, dtype=E4M3.dtype, device=device)
        scale = torch.ones(last - first, device=device)
        reduction.mean(received.to(device), scales.to(device), 0, payload, scale)
        inside = (layout.owners(device)[first:last] >= 0).repeat_interleave(BLOCK)
        results.append(((payload.view(torch.uint8) * inside).cpu(), scale.cpu(), reduction.squares().cpu()))
    owned = layout.owners(CPU)[first:last] >= 0
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][owned], results[1][1][owned])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-5, atol=0)
