"""Scales and casts: exact powers of two, saturation, and rounding that is right on average."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gnome.fp8.formats import (
    BF16,
    E4M3,
    E5M2,
    FP16,
    Format,
    exponent_byte,
    power_of_two_scale,
    random_words,
    saturating_cast,
    scale_of_exponent,
    stochastic_cast,
)

FORMATS = [E4M3, E5M2, FP16]


@pytest.mark.parametrize(("amax", "scale"), [(10.0, 32.0), (1e4, 1 / 32), (448.0, 1.0), (449.0, 0.5), (224.0, 2.0)])
def test_scales_of_e4m3_are_those_of_the_paper_s_code(amax: float, scale: float) -> None:
    assert float(power_of_two_scale(torch.tensor(amax), E4M3)) == scale


@given(st.floats(2.0**-100, 2.0**120, width=32), st.sampled_from(FORMATS), st.integers(0, 6))
def test_a_scale_is_the_largest_power_of_two_that_fits(amax: float, fmt: Format, margin: int) -> None:
    scale = float(power_of_two_scale(torch.tensor(amax), fmt, margin=margin))
    assert math.frexp(scale)[0] == 0.5
    assert amax * scale * 2**margin <= fmt.max < 2 * amax * scale * 2**margin


@given(st.floats(2.0**-149, 2.0**127, width=32), st.sampled_from(FORMATS))
def test_a_scale_and_its_inverse_are_normal_numbers(amax: float, fmt: Format) -> None:
    scale = power_of_two_scale(torch.tensor(amax), fmt)
    for x in (scale, 1 / scale):
        assert torch.finfo(torch.float32).tiny <= float(x) < math.inf
    assert float(amax * scale) <= fmt.max


def test_a_byte_holds_every_scale() -> None:
    scales = power_of_two_scale(2.0 ** torch.arange(-149.0, 128.0, dtype=torch.float64).float(), E4M3)
    assert torch.equal(scale_of_exponent(exponent_byte(scales)), scales)


@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan])
def test_nothing_to_go_by_leaves_the_scale(amax: float) -> None:
    assert float(power_of_two_scale(torch.tensor(amax), E4M3, previous=8.0)) == 8.0


@pytest.mark.parametrize("fmt", FORMATS)
def test_casts_saturate_and_keep_nan(fmt: Format) -> None:
    x = torch.tensor([1e38, -1e38, math.inf, -math.inf, fmt.max * 1.2, fmt.smallest, 0.0])
    cast = saturating_cast(x, fmt).float()
    assert cast.tolist() == [fmt.max, -fmt.max, fmt.max, -fmt.max, fmt.max, fmt.smallest, 0.0]
    assert saturating_cast(torch.tensor([math.nan]), fmt).float().isnan().all()


@pytest.mark.parametrize("fmt", [E4M3, FP16, BF16])
def test_stochastic_rounding_is_right_on_average(fmt: Format) -> None:
    low = 0.75 * fmt.smallest if fmt != BF16 else 1e-3
    for value in (1.2345, -0.3333, 100.01, low, fmt.max):
        words = random_words(torch.arange(200_000), 3, 5) & ((1 << (23 - fmt.mantissa_bits)) - 1)
        x = torch.full((200_000,), value)
        rounded = stochastic_cast(x, fmt, words).double()
        assert len(rounded.unique()) <= 2
        spread = float(rounded.std()) / 200_000**0.5
        assert float(rounded.mean()) == pytest.approx(float(x[0]), abs=5 * spread + 1e-12)


def test_numbers_that_a_format_has_are_not_moved() -> None:
    for fmt in (E4M3, FP16):
        payload = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        exact = payload[payload.isfinite()]
        words = random_words(torch.arange(len(exact)), 1, 1) & ((1 << (23 - fmt.mantissa_bits)) - 1)
        assert torch.equal(stochastic_cast(exact, fmt, words).float(), exact)


def test_random_words_are_even_and_differ_between_steps_seeds_and_places() -> None:
    index = torch.arange(1 << 16)
    words = random_words(index, 1, 2)
    assert int(words.min()) >= 0
    assert int(words.max()) < 1 << 32
    bits = (words[:, None] >> torch.arange(32)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 0.02
    assert len(words.unique()) > 0.99 * len(index)
    for other in (random_words(index, 2, 2), random_words(index, 1, 3), random_words(index + (1 << 40), 1, 2)):
        agreeing = ((words ^ other)[:, None] >> torch.arange(32)) & 1
        assert (agreeing.double().mean() - 0.5).abs() < 0.01
