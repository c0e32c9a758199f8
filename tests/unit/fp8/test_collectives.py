"""Gradients are reduced by real processes over gloo, started once for each number of ranks; every check runs on all of them."""

import datetime as dt
import json
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gnome.errors import InvalidInput
from gnome.fp8 import AdamW, collectives
from gnome.fp8.automatic_scale import GROWTH, AutomaticScale
from gnome.fp8.collectives import bytes_sent, reduce_gradients, ring_sum
from gnome.fp8.formats import BLOCK, E4M3, saturating_cast
from gnome.fp8.gradients import GradientStore
from gnome.fp8.layout import Layout, Sharding, lay_out

SHAPES = ((96, 200), (1000,), (64, 128), (7,))
NUMELS = [torch.Size(shape).numel() for shape in SHAPES]
MODES: tuple[collectives.Mode, ...] = ("all_to_all", "fp8lm")


def gradient(rank: int, index: int, step: int = 0) -> torch.Tensor:
    """Normal numbers; rows and columns differ in size, alike on all ranks."""
    shape = SHAPES[index]
    spread = torch.Generator().manual_seed(index)
    own = torch.Generator().manual_seed(1000 * (step + 1) + 10 * rank + index)
    values = torch.randn(shape, generator=own) * 1e-3
    for axis in range(len(shape)):
        sides = [size if i == axis else 1 for i, size in enumerate(shape)]
        values = values * torch.exp(torch.randn(sides, generator=spread))
    return values.reshape(-1)


def new_store(size: int, mode: collectives.Mode, sharding: Sharding = "even", numels: Sequence[int] = NUMELS) -> GradientStore:
    return GradientStore(lay_out(numels, world=size, sharding=sharding), "cpu", "block" if mode == "all_to_all" else "tensor")


def filled_store(rank: int, size: int, mode: collectives.Mode, sharding: Sharding = "even") -> GradientStore:
    store = new_store(size, mode, sharding)
    for index in range(len(SHAPES)):
        store.add(index, gradient(rank, index))
    return store


def exact_mean(size: int, index: int, steps: Sequence[int] = (0,)) -> torch.Tensor:
    return torch.stack([gradient(rank, index, step) for rank in range(size) for step in steps]).double().mean(0)


def exact_means(size: int) -> list[torch.Tensor]:
    return [exact_mean(size, index) for index in range(len(SHAPES))]


def decibels(value: torch.Tensor, exact: torch.Tensor) -> float:
    return 10 * float((exact.square().sum() / (value.double() - exact).square().sum()).log10())


def snr(store: GradientStore, exact: Sequence[torch.Tensor]) -> float:
    return decibels(torch.cat([store.value(index) for index in range(len(exact))]), torch.cat(list(exact)))


def from_all(tensor: torch.Tensor, size: int) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor)
    return parts


def assert_alike(store: GradientStore, size: int) -> None:
    for tensor in (store.payload.view(torch.uint8), store.scale, store.squares.view(torch.int32)):
        for other in from_all(tensor, size):
            assert torch.equal(other, tensor)
    flags = torch.tensor(store.filled, dtype=torch.uint8)
    for other in from_all(flags, size):
        assert torch.equal(other, flags)


def check_more_accurate_than_a_ring(rank: int, size: int) -> None:
    ring, ours, shards = (filled_store(rank, size, mode) for mode in ("fp8lm", "all_to_all", "all_to_all"))
    reduce_gradients(ring, mode="fp8lm")
    reduce_gradients(ours)
    reduce_gradients(shards, gather=False)
    first, last = shards.layout.shard(rank)
    own = slice(first * BLOCK, last * BLOCK)
    assert torch.equal(shards.payload[own].view(torch.uint8), ours.payload[own].view(torch.uint8))
    assert torch.equal(shards.scale[first:last], ours.scale[first:last])
    assert torch.equal(shards.squares, ours.squares)
    at_ring, at_ours = snr(ring, exact_means(size)), snr(ours, exact_means(size))
    if rank == 0:
        print(f"\n{size} ranks: ring {at_ring:.2f} dB, all to all {at_ours:.2f} dB")
    assert at_ring > 23
    assert at_ours > at_ring + (2 if size >= 4 else 0)


def check_ranks_alike_to_the_bit(rank: int, size: int) -> None:
    for mode in MODES:
        for sharding in ("even", "whole"):
            store = filled_store(rank, size, mode, sharding)
            before = [torch.stack(from_all(store.value(index), size)).mean(0) for index in range(len(SHAPES))]
            reduce_gradients(store, mode=mode)
            assert_alike(store, size)
            if mode == "all_to_all":
                expected = torch.stack([mean.square().sum() for mean in before])
                torch.testing.assert_close(store.squares, expected, rtol=1e-5, atol=0)
            else:
                expected = torch.stack([store.value(index).square().sum() for index in range(len(SHAPES))])
                torch.testing.assert_close(store.squares, expected, rtol=1e-5, atol=0)
            padding = store.layout.owners("cpu").repeat_interleave(BLOCK) < 0
            assert not store.payload.view(torch.uint8)[padding].any()


def check_order_of_the_ring(rank: int, size: int) -> None:
    numel = 5 * BLOCK + 3
    payload = saturating_cast(torch.randn(numel, generator=torch.Generator().manual_seed(rank)) * 200, E4M3)
    everyone = [part.view(E4M3.dtype) for part in from_all(payload.view(torch.uint8), size)]
    collectives._emulate_ring(payload, collectives._Ranks.of(None, payload.device))
    share = -(-numel // size)
    for part in range(size):
        place = slice(part * share, (part + 1) * share)
        order = [(part + 1 + hop) % size for hop in range(size)]
        assert torch.equal(payload[place].float(), ring_sum([everyone[r][place] for r in order]).float())


def check_spans_change_nothing(rank: int, size: int) -> None:
    whole, spans = filled_store(rank, size, "all_to_all"), filled_store(rank, size, "all_to_all")
    reduce_gradients(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "SPAN_BLOCKS", 7 * size)
        assert spans.layout.shard(0)[1] > 2 * 7
        reduce_gradients(spans)
    assert torch.equal(whole.payload.view(torch.uint8), spans.payload.view(torch.uint8))
    assert torch.equal(whole.scale, spans.scale)
    assert torch.equal(whole.squares, spans.squares)


def check_one_rank_not_finite(rank: int, size: int) -> None:
    for mode in MODES:
        store = new_store(size, mode)
        for index in range(len(SHAPES)):
            values = gradient(rank, index)
            if index == 1 and rank == size - 1:
                values[3] = torch.inf
            if index == 2 and rank == 0:
                values[5] = torch.nan
            store.add(index, values)
        reduce_gradients(store, mode=mode)
        assert torch.isfinite(store.squares).tolist() == [True, False, False, True], f"{mode}: {store.squares}"
        assert not torch.isfinite(store.squared_norm())


def check_tensors_without_a_gradient(rank: int, size: int) -> None:
    for mode in MODES:
        store = filled_store(rank, size, mode)
        store.add(3, torch.full((7,), torch.nan))  # bytes of an earlier step, on all ranks
        store.clear()
        present = {0: [0, 1], 1: [1, 2]}.get(rank, [1])
        for index in present:
            store.add(index, gradient(rank, index))
        reduce_gradients(store, mode=mode)
        assert store.filled == [True, True, True, False]
        assert_alike(store, size)
        for index, owner in ((0, 0), (2, 1)):
            assert decibels(store.value(index), gradient(owner, index).double() / size) > 24, f"{mode}, tensor {index}"
        assert store.squares[3] == 0


def check_zeros_do_not_drown_small_gradients(rank: int, size: int) -> None:
    store = new_store(size, "fp8lm", numels=[256])
    store.add(0, torch.full((256,), 1e-6 if rank == 0 else 0.0))
    reduce_gradients(store, mode="fp8lm")
    torch.testing.assert_close(store.value(0), torch.full((256,), 1e-6 / size), rtol=0.13, atol=0)


def check_accumulate_then_reduce(rank: int, size: int) -> None:
    for mode in MODES:
        store = new_store(size, mode)
        for step in (0, 2, 4):
            store.clear()
            for index in range(len(SHAPES)):
                for micro in (0, 1):
                    store.add(index, gradient(rank, index, step + micro))
            reduce_gradients(store, mode=mode)
            found = snr(store, [2 * exact_mean(size, index, (step, step + 1)) for index in range(len(SHAPES))])
            assert found > (26 if mode == "all_to_all" else 20), f"{mode}, step {step}: {found} dB"


def check_bytes_on_the_wire(rank: int, size: int) -> None:
    sent = 0

    def counting(function: Callable[..., object], share: Callable[..., int]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            nonlocal sent
            sent += share(*args)
            return function(*args, **kwargs)

        return counted

    for mode, gather in (("all_to_all", True), ("all_to_all", False), ("fp8lm", True)):
        store = filled_store(rank, size, mode)
        reduce_gradients(store, mode=mode, gather=gather)  # the first asks whether the layouts are equal
        sent = 0
        with pytest.MonkeyPatch.context() as patch:
            exchanged = counting(dist.all_to_all_single, lambda _, rows: rows.nbytes * (size - 1) // size)
            patch.setattr(dist, "all_to_all_single", exchanged)
            patch.setattr(dist, "all_reduce", counting(dist.all_reduce, lambda x, _: 2 * x.nbytes * (size - 1) // size))
            patch.setattr(collectives, "_all_gather", counting(collectives._all_gather, lambda _, own: own.nbytes * (size - 1)))
            reduce_gradients(store, mode=mode, gather=gather)
        assert sent == bytes_sent(store.layout, size, mode, gather=gather), f"{mode}, gather {gather}"


def message_of(call: Callable[[], None], size: int) -> str:
    with pytest.raises(InvalidInput) as raised:
        call()
    message = str(raised.value)
    everyone: list[str] = [""] * size
    dist.all_gather_object(everyone, message)
    assert everyone == [message] * size
    assert "\n" not in message
    return message


def check_disagreement_is_told_to_all(rank: int, size: int) -> None:
    odd = new_store(size, "all_to_all", numels=[1000, 300 if rank == 1 else 200])
    message = message_of(lambda: reduce_gradients(odd), size)
    assert "rank 0 has 2 tensors of 1200 numbers" in message
    assert "rank 1 2 tensors of 1300 numbers" in message
    alike = new_store(size, "all_to_all" if rank else "fp8lm")
    assert "kind of scales" in message_of(lambda: reduce_gradients(alike, mode="all_to_all" if rank else "fp8lm"), size)
    other_world = new_store(size + 1, "all_to_all")
    assert f"lay them out with world={size}" in message_of(lambda: reduce_gradients(other_world), size)
    uneven = GradientStore(Layout((100,), (0,), size + 1, size), "cpu")
    assert "cannot be split" in message_of(lambda: reduce_gradients(uneven), size)
    by_tensor = new_store(size, "fp8lm")
    assert "scales by block" in message_of(lambda: reduce_gradients(by_tensor), size)
    by_block = new_store(size, "all_to_all")
    mu = AutomaticScale(len(SHAPES), size, "cpu")
    assert "mode fp8lm" in message_of(lambda: reduce_gradients(by_block, automatic_scale=mu), size)
    short = AutomaticScale(1, size, "cpu")
    assert "for 1 tensors" in message_of(lambda: reduce_gradients(by_tensor, mode="fp8lm", automatic_scale=short), size)


def check_other_vectors_are_told_too(rank: int, size: int) -> None:
    """Vectors are reduced as they are, and gloo aborts the process where their sizes differ."""
    parameters = [torch.nn.Parameter(torch.zeros(64, 64)), torch.nn.Parameter(torch.zeros(6 if rank == 1 else 5))]
    optimizer = AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(InvalidInput, match=r"ranks train different models: parameter 1 is .*5,.* on rank 0 and .*6,.* on rank 1"):
        optimizer.reduce_gradients()


def check_nothing_to_reduce(rank: int, size: int) -> None:
    for mode in MODES:
        reduce_gradients(new_store(size, mode, numels=[]), mode=mode)
        for numels in ([0], [0, 5], [5]):
            store = new_store(size, mode, numels=numels)
            for index, numel in enumerate(numels):
                store.add(index, torch.full((numel,), float(rank)))
            reduce_gradients(store, mode=mode)
            assert all(store.filled)
            if numels[-1]:
                torch.testing.assert_close(store.value(len(numels) - 1), torch.full((5,), (size - 1) / 2), rtol=0.07, atol=0)


def check_groups(rank: int, size: int) -> None:
    pair = dist.new_group([0, 1])
    alone = [dist.new_group([r]) for r in range(size)][rank]
    store = filled_store(rank, 2, "all_to_all")
    before = store.payload.view(torch.uint8).clone()
    reduce_gradients(store, alone)
    assert torch.equal(store.payload.view(torch.uint8), before)
    if rank < 2:
        reduce_gradients(store, pair)
        assert snr(store, exact_means(2)) > 26
    else:
        with pytest.raises(InvalidInput, match="not in the group"):
            reduce_gradients(store, pair)


def check_automatic_scale_stops_saturation(rank: int, size: int) -> None:
    automatic = AutomaticScale(2, size, "cpu")
    automatic.mu.fill_(1.0)
    store = GradientStore(lay_out([40_000, 40_000], world=size), "cpu", "tensor")
    history = []
    for step in range(6):
        store.clear()
        generator = torch.Generator().manual_seed(step)
        store.add(
            0, torch.ones(40_000) + torch.rand(40_000, generator=generator) * 0.5
        )  # alike on all ranks: sums are N times as large
        if rank == 0:
            store.add(1, torch.zeros(40_000))
        reduce_gradients(store, mode="fp8lm", automatic_scale=automatic)
        history.append(float(automatic.mu[0]))
        for other in from_all(automatic.mu, size):
            assert torch.equal(other, automatic.mu)
    halvings = {2: 1, 4: 2}[size]
    assert history[:halvings] == [0.5**n for n in range(1, halvings + 1)]
    assert history[halvings] == pytest.approx(history[halvings - 1] * GROWTH)
    assert automatic.mu[1] == 1  # only zeros: nothing is known
    assert float((store.value(0) - 1.25).abs().max()) < 0.4


CHECKS = {name: function for name, function in list(globals().items()) if name.startswith("check_")}


def run_checks(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size, timeout=dt.timedelta(seconds=30))
    outcome = {}
    for name, check in CHECKS.items():
        try:
            check(rank, size)
        except BaseException:
            outcome[name] = traceback.format_exc()
            break  # the ranks may no longer be at the same place
        outcome[name] = ""
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def forks() -> None:
    """Let one process import torch for all ranks."""
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed"])


@pytest.fixture(scope="module", params=(2, 4), ids="{} ranks".format)
def outcomes(forks: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(run_checks, args=(request.param, folder), nprocs=request.param, start_method="forkserver")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("check", CHECKS)
def test_on_ranks(outcomes: list[dict[str, str]], check: str) -> None:
    failures = [f"rank {rank}: {outcome[check]}" for rank, outcome in enumerate(outcomes) if outcome.get(check)]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    if any(check not in outcome for outcome in outcomes):
        pytest.fail("did not run: a check before it failed", pytrace=False)


def test_one_rank_needs_no_process_group() -> None:
    store = filled_store(0, 1, "all_to_all")
    before, squares = store.payload.view(torch.uint8).clone(), store.squares.clone()
    store.filled[2] = False
    reduce_gradients(store)
    assert torch.equal(store.payload.view(torch.uint8), before)
    assert torch.equal(store.squares, squares)
    assert store.filled == [True, True, False, True]


def test_a_ring_rounds_at_every_hop() -> None:
    parts = [saturating_cast(torch.tensor([16.0, 448.0, 1.0, torch.nan, -448.0]), E4M3) for _ in range(3)]
    parts[1] = saturating_cast(torch.tensor([1.0, 448.0, 0.0625, 1.0, 448.0]), E4M3)
    total = ring_sum([parts[0], parts[1], parts[1]])
    # 17 and 1.0625 lie halfway to the next number, and ties go to even.
    assert total.float()[[0, 1, 2, 4]].tolist() == [16.0, 448.0, 1.0, 448.0]
    assert torch.isnan(total.float()[3])


def meet(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2, timeout=dt.timedelta(seconds=30))


def second_rank(_: int, folder: Path) -> None:
    meet(1, folder)
    for _ in range(2):
        for mode in MODES:
            reduce_gradients(filled_store(1, 2, mode), mode=mode)
    dist.destroy_process_group()


def test_a_rank_with_kernels_gets_what_torch_gets(
    forks: None, interpreted_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = mp.start_processes(second_rank, args=(tmp_path,), nprocs=1, join=False, start_method="forkserver")
    meet(0, tmp_path)
    try:
        results = []
        for kernels in (False, True):
            monkeypatch.setattr(collectives, "use_kernels", lambda _, kernels=kernels: kernels)
            for mode in MODES:
                store = filled_store(0, 2, mode)
                reduce_gradients(store, mode=mode)
                results.append((store.payload.view(torch.uint8), store.scale, store.squares))
    finally:
        dist.destroy_process_group()
    other.join()
    for torch_result, kernel_result in zip(results[:2], results[2:], strict=True):
        assert torch.equal(kernel_result[0], torch_result[0])
        assert torch.equal(kernel_result[1], torch_result[1])
        torch.testing.assert_close(kernel_result[2], torch_result[2], rtol=1e-6, atol=0)
