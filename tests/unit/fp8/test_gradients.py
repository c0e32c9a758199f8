"""Gradients kept in E4M3 between the backward pass and the optimizer."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gnome.errors import InvalidInput
from gnome.fp8 import gradients
from gnome.fp8.formats import BLOCK, E4M3
from gnome.fp8.gradients import GradientScaling, GradientStore
from gnome.fp8.layout import lay_out

SHAPES = ((96, 256), (130,), (64, 128), (7,))
NUMELS = [math.prod(shape) for shape in SHAPES]
SCALINGS: tuple[GradientScaling, ...] = ("block", "tensor")


def new_store(scaling: GradientScaling, numels: Sequence[int] = NUMELS) -> GradientStore:
    return GradientStore(lay_out(numels), "cpu", scaling)


def gradient(index: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Normal numbers around 1e-3 whose rows and columns differ in size by exp(spread * normal)."""
    generator = torch.Generator().manual_seed(100 * seed + index)
    values = torch.randn(SHAPES[index], generator=generator) * 1e-3
    for axis, side in enumerate(SHAPES[index]):
        sides = [side if i == axis else 1 for i in range(len(SHAPES[index]))]
        values = values * torch.exp(spread * torch.randn(sides, generator=generator))
    return values


def decibels(value: torch.Tensor, exact: torch.Tensor) -> float:
    exact = exact.double().reshape(-1)
    return 10 * float((exact.square().sum() / (value.double() - exact).square().sum()).log10())


def rounding_bound(values: torch.Tensor) -> torch.Tensor:
    """Largest error of E4M3 with a scale for these numbers: half a spacing, 1/16, and half the smallest number at the scale.

    The scale brings the largest magnitude to at least 224, so that the smallest number, 2**-9, is at most its 2**-9 / 224.
    """
    return values.abs() / 16 + values.abs().amax() * 2.0**-10 / 224


def error_bound(flat: torch.Tensor, scaling: GradientScaling) -> torch.Tensor:
    pieces = flat.split(BLOCK) if scaling == "block" else (flat,)
    return torch.cat([rounding_bound(piece.double()) for piece in pieces])


@pytest.mark.parametrize(("scaling", "least"), [("block", 30.0), ("tensor", 30.0)])
def test_noise_is_far_below_the_gradient(scaling: GradientScaling, least: float) -> None:
    store = new_store(scaling)
    for index in range(len(SHAPES)):
        store.add(index, gradient(index))
    for index in range(len(SHAPES)):
        assert decibels(store.value(index), gradient(index)) >= least, f"tensor {index}"


def test_blocks_keep_small_rows_that_one_scale_loses() -> None:
    values = gradient(0, spread=0.0)
    values[1::2] *= 2.0**-20
    stores = {scaling: new_store(scaling) for scaling in SCALINGS}
    for store in stores.values():
        store.add(0, values)
    small = {scaling: store.value(0).view(SHAPES[0])[1::2] for scaling, store in stores.items()}
    assert decibels(small["block"].reshape(-1), values[1::2]) >= 30
    assert not small["tensor"].any()


@pytest.mark.parametrize("scaling", SCALINGS)
@given(seed=st.integers(0, 10**6), spread=st.floats(0, 3), exponent=st.integers(-15, 15))
def test_every_number_is_within_the_rounding_of_its_scale(
    scaling: GradientScaling, seed: int, spread: float, exponent: int
) -> None:
    store = new_store(scaling)
    flat = (gradient(1, seed, spread) * 2.0**exponent).reshape(-1)
    store.add(1, flat)
    assert ((store.value(1).double() - flat.double()).abs() <= error_bound(flat, scaling)).all()
    assert float(store.squares[1]) == pytest.approx(float(flat.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_shape_and_float_dtype(scaling: GradientScaling, dtype: torch.dtype) -> None:
    values = (gradient(0) * 100).to(dtype)
    ours, other = new_store(scaling), new_store(scaling)
    ours.add(0, values.t().contiguous().t())  # another order in memory
    other.add(0, values.reshape(-1).float())
    assert torch.equal(ours.payload.view(torch.uint8), other.payload.view(torch.uint8))
    assert torch.equal(ours.scale, other.scale)
    assert ours.payload.dtype == E4M3.dtype


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("micro_batches", [2, 5])
def test_accumulation_is_close_to_the_fp64_sum(scaling: GradientScaling, micro_batches: int) -> None:
    store = new_store(scaling)
    for index in range(len(SHAPES)):
        exact = torch.zeros(NUMELS[index], dtype=torch.float64)
        allowed = torch.zeros_like(exact)
        for micro in range(micro_batches):
            fresh = gradient(index, micro).reshape(-1)
            sum_in_fp32 = fresh + store.value(index) if micro else fresh
            store.add(index, fresh)
            assert float(store.squares[index]) == pytest.approx(float(sum_in_fp32.double().square().sum()), rel=1e-5)
            exact += fresh.double()
            allowed += error_bound(sum_in_fp32, scaling) + sum_in_fp32.abs().double() * 2.0**-24  # each sum is rounded once
        assert ((store.value(index).double() - exact).abs() <= allowed).all()
        assert decibels(store.value(index), exact) > 30 - 10 * math.log10(micro_batches)


def test_many_micro_batches_arrive_on_average() -> None:
    """Each is less than half of E4M3's spacing at the sum: rounded to nearest, 0.09 of 256 equal ones would be left."""
    store, values = GradientStore(lay_out([128 * 64]), "cpu"), torch.randn(128 * 64, generator=torch.Generator().manual_seed(0))
    for _ in range(256):
        store.add(0, values)
    gain = float((store.value(0) * values).sum() / values.square().sum()) / 256
    assert abs(gain - 1) < 0.02


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_sum_of_equal_gradients_is_exact(scaling: GradientScaling) -> None:
    store = new_store(scaling)
    for count in range(1, 5):
        store.add(2, torch.full(SHAPES[2], 0.25))
        assert store.value(2).unique().tolist() == [0.25 * count]
        assert float(store.squares[2]) == NUMELS[2] * (0.25 * count) ** 2


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("others", ["none", "before", "after"])
def test_a_number_that_is_not_finite_shows(scaling: GradientScaling, bad: float, others: str) -> None:
    store = new_store(scaling)
    store.add(0, gradient(0))
    values = gradient(2)
    values[5, 17] = bad
    micro_batches = {"none": [values], "before": [gradient(2), values], "after": [values, gradient(2)]}[others]
    for micro in micro_batches:
        store.add(2, micro)
    assert torch.isfinite(store.squares[0])
    assert not torch.isfinite(store.squares[2])
    assert not torch.isfinite(store.squared_norm())
    store.clear()
    store.add(0, gradient(0))
    assert torch.isfinite(store.squared_norm())
    store.add(2, gradient(2))
    assert torch.isfinite(store.squared_norm())  # and leaves no trace


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("numel", [129, 131, 1, 0])
def test_a_wrong_size_is_refused(scaling: GradientScaling, numel: int) -> None:
    store = new_store(scaling)
    with pytest.raises(InvalidInput, match=rf"gradient 1 has {numel} numbers.*\({numel},\).*the parameter 130"):
        store.add(1, torch.ones(numel))
    assert store.filled == [False] * len(SHAPES)
    assert not store.payload.float().any()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_clear_forgets_and_unfilled_gradients_do_not_count(scaling: GradientScaling) -> None:
    store = new_store(scaling)
    assert store.squared_norm() == 0
    for index in range(len(SHAPES)):
        store.add(index, gradient(index))
    assert store.filled == [True] * len(SHAPES)
    everything = sum(float(gradient(index).double().square().sum()) for index in range(len(SHAPES)))
    assert float(store.squared_norm()) == pytest.approx(everything, rel=1e-5)
    n_bytes = store.nbytes
    store.clear()
    assert store.filled == [False] * len(SHAPES)
    assert store.squared_norm() == 0
    assert store.nbytes == n_bytes
    store.add(3, gradient(3, seed=1))
    assert store.filled == [False, False, False, True]
    assert float(store.squared_norm()) == pytest.approx(float(gradient(3, seed=1).double().square().sum()), rel=1e-5)
    assert decibels(store.value(3), gradient(3, seed=1)) > 25  # not added to what was there


@pytest.mark.parametrize("scaling", SCALINGS)
def test_block_scales_and_shares_read_back_the_values(scaling: GradientScaling) -> None:
    store = GradientStore(lay_out(NUMELS, world=3), "cpu", scaling)
    for index in range(len(SHAPES)):
        store.add(index, gradient(index))
    shares = [store.share(*store.layout.shard(rank)) for rank in range(3)]
    payload, scale = (torch.cat([share[i].view(torch.uint8 if i == 0 else torch.float32) for share in shares]) for i in (0, 1))
    flat = payload.view(E4M3.dtype).float() / scale.repeat_interleave(BLOCK)
    for index in range(len(SHAPES)):
        assert torch.equal(store.layout.part(flat, index), store.value(index))
    padding = store.layout.owners("cpu") < 0
    assert (store.block_scales()[padding] == 1).all()
    assert not flat[padding.repeat_interleave(BLOCK)].any()


def test_bytes_a_number() -> None:
    numels = [BLOCK * 1000]
    assert new_store("block", numels).nbytes / numels[0] == 1 + 4 / BLOCK
    assert new_store("tensor", numels).nbytes == numels[0] + 4


@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros_and_nothing(scaling: GradientScaling) -> None:
    store = new_store(scaling, [0, 300])
    store.add(0, torch.zeros(0, 5))
    store.add(1, torch.zeros(300))
    assert store.squared_norm() == 0
    assert not store.value(1).any()
    assert store.value(0).shape == (0,)
    assert (store.scale == 1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_kernel_forgets_no_infinity_either(bad: float, interpreted_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "use_kernels", lambda _: True)
    store = new_store("block")
    values = gradient(1)
    values[17] = bad
    for micro in (values, gradient(1)):
        store.add(1, micro)
    assert not torch.isfinite(store.squared_norm())
    store.clear()
    store.add(1, gradient(1))
    assert torch.isfinite(store.squared_norm())
