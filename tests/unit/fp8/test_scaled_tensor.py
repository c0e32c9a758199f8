"""Scaled tensors: how exact each granularity is, and what a damaged one says."""

import pytest
import torch

from gnome.errors import InvalidCheckpoint
from gnome.fp8 import E4M3, E5M2, FP16, Format, ScaledTensor
from gnome.fp8.scaled_tensor import Granularity, check_scale


def sqnr(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(10 * torch.log10(x.double().square().sum() / (y.double() - x.double()).square().sum()))


@pytest.mark.parametrize(("fmt", "least"), [(E4M3, 31.0), (E5M2, 25.0), (FP16, 70.0)])
@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
@pytest.mark.parametrize("shape", [(64, 300), (7,), (3, 5, 129)])
def test_normal_numbers_keep_their_signal(fmt: Format, least: float, granularity: Granularity, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored = ScaledTensor.quantize(x, fmt, granularity)
    assert stored.shape == x.shape
    assert sqnr(x, stored.dequantize()) > least - (3 if x.numel() < 100 else 0)


def test_rows_and_blocks_keep_small_parts_beside_large_ones() -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    x[:32] *= 1e-6
    small = slice(0, 32)
    by_row = ScaledTensor.quantize(x, E4M3, "row").dequantize()
    by_tensor = ScaledTensor.quantize(x, E4M3, "tensor").dequantize()
    assert sqnr(x[small], by_row[small]) > 30
    assert by_tensor[small].count_nonzero() == 0


@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_zeros_and_empty_tensors_have_a_scale_of_one(granularity: Granularity) -> None:
    for x in (torch.zeros(4, 130), torch.zeros(0, 130), torch.zeros(3, 0)):
        stored = ScaledTensor.quantize(x, E4M3, granularity)
        assert torch.equal(stored.dequantize(), x)
        assert (stored.scale == 1).all()


def test_a_factor_moves_only_the_scale() -> None:
    stored = ScaledTensor.quantize(torch.randn(8, 8), E4M3)
    doubled = stored.times(2.0)
    assert torch.equal(doubled.payload.view(torch.uint8), stored.payload.view(torch.uint8))
    assert torch.equal(doubled.dequantize(), 2 * stored.dequantize())


@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_saving_and_loading_keeps_every_bit(granularity: Granularity, tmp_path_factory: pytest.TempPathFactory) -> None:
    stored = ScaledTensor.quantize(torch.randn(5, 200), E4M3, granularity)
    path = tmp_path_factory.mktemp("saved") / "tensor.pt"
    torch.save(stored.state(), path)
    again = ScaledTensor.from_state(torch.load(path, weights_only=True), E4M3, granularity)
    assert torch.equal(again.payload.view(torch.uint8), stored.payload.view(torch.uint8))
    assert torch.equal(again.scale, stored.scale)
    assert again.nbytes == stored.nbytes


def test_scales_of_weights_and_moments_are_powers_of_two() -> None:
    """The kernels invert them by their bits."""
    check_scale(torch.tensor([2.0, 0.25]), torch.Size((2,)), "moment")
    with pytest.raises(InvalidCheckpoint, match=r"moment: its scale is 3\.0, expected a power of two"):
        check_scale(torch.tensor([2.0, 3.0]), torch.Size((2,)), "moment")


def test_a_damaged_state_says_what_is_wrong() -> None:
    state = ScaledTensor.quantize(torch.randn(4, 256), E4M3, "block").state()
    damaged = {
        "without its scale": {"payload": state["payload"]},
        r"shape \(4, 1\), expected torch.float32 of shape \(4, 2\)": {**state, "scale": state["scale"][:, :1]},
        "scale is 0.0, expected a positive": {**state, "scale": torch.zeros_like(state["scale"])},
        "scale is nan": {**state, "scale": torch.full_like(state["scale"], torch.nan)},
        "payload is torch.float16": {**state, "payload": state["payload"].half()},
    }
    for message, broken in damaged.items():
        with pytest.raises(InvalidCheckpoint, match=f"layer.3.weight: .*{message}"):
            ScaledTensor.from_state(broken, E4M3, "block", name="layer.3.weight")
