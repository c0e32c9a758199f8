"""The rule that moves mu, by numbers worked out by hand."""

import pytest
import torch

from gnome.errors import InvalidCheckpoint
from gnome.fp8.automatic_scale import AutomaticScale


def test_automatic_scale_golden_values() -> None:
    automatic = AutomaticScale(6, 4, "cpu")
    assert automatic.mu.tolist() == [0.5] * 6
    numels = torch.tensor([100_000, 100_000, 99_999, 1000, 1000, 1000])
    saturated = torch.tensor([1.0, 2.0, 1.0, 0.0, 0.0, 5.0])
    automatic.update(saturated, numels, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, torch.nan]))
    grown = 0.50034672  # 0.5 * 2**(1/1000)
    assert automatic.mu.tolist() == pytest.approx([grown, 0.25, 0.25, grown, 0.5, 0.5], rel=1e-7)
    for _ in range(999):
        automatic.update(torch.zeros(6), numels, torch.ones(6))
    assert float(automatic.mu[0]) == pytest.approx(1.0, rel=1e-4)  # doubled in 1000 steps
    assert float(AutomaticScale(1, 2, "cpu").mu[0]) == pytest.approx(0.70710678)


def test_automatic_scale_is_restored_to_the_bit() -> None:
    automatic, other = AutomaticScale(3, 7, "cpu"), AutomaticScale(3, 7, "cpu")
    automatic.update(torch.tensor([0.0, 9.0, 0.0]), torch.full((3,), 100), torch.ones(3))
    state = automatic.state_dict()
    other.load_state_dict(state)
    automatic.update(torch.zeros(3), torch.full((3,), 100), torch.ones(3))
    assert not torch.equal(other.mu, automatic.mu)
    other.update(torch.zeros(3), torch.full((3,), 100), torch.ones(3))
    assert torch.equal(other.mu, automatic.mu)
    for wrong in ({}, {"mu": torch.ones(2)}, {"mu": torch.tensor([1.0, torch.nan, 1.0])}):
        with pytest.raises(InvalidCheckpoint, match="automatic scale"):
            other.load_state_dict(wrong)
