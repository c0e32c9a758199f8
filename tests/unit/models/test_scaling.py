"""Power laws, and the training sets they are measured on."""

import numpy as np
import pytest
import torch

from gnome.crystals.formula import parse_formula, split_bucket
from gnome.models.compositional import CompositionalSettings
from gnome.models.formulas import PackedFormulas
from gnome.models.recipes import EnsembleSettings
from gnome.models.scaling import PowerLaw, ScalingExamples, ScalingSettings, scaling_run, scaling_split
from gnome.models.training import TrainSettings


def test_a_power_law_is_found_with_an_interval_that_holds_it() -> None:
    rng = np.random.default_rng(0)
    sizes = np.repeat(np.geomspace(1000, 100_000, 6), 3)
    held = 0
    for _ in range(200):
        errors = 2.0 * sizes**-0.3 * np.exp(0.05 * rng.normal(size=len(sizes)))
        law = PowerLaw.fit(sizes.tolist(), errors.tolist())
        assert law.exponent == pytest.approx(0.3, abs=0.05)
        held += law.low < 0.3 < law.high
    assert 180 <= held <= 199
    np.testing.assert_allclose(law.errors(sizes[:3]), 2.0 * sizes[:3] ** -0.3, rtol=0.2)


def test_smaller_sets_lie_in_larger_ones_and_take_more_epochs() -> None:
    pack = PackedFormulas.from_compositions([{3: 1, 8: 1 + i} for i in range(90)])
    targets = np.arange(90) / 90
    examples = ScalingExamples(pack, targets, np.arange(60), np.arange(60, 80), {"rest": np.arange(80, 90)})
    recipe = EnsembleSettings(
        network=CompositionalSettings(width=16, heads=2, depth=1), train=TrainSettings(epochs=3, batch_size=10)
    )
    scaling = ScalingSettings(smallest=10, sizes=3, least_steps=12)
    assert scaling.training_sizes(60) == [10, 24, 60]
    few, more, other = (scaling_run(recipe, scaling, examples, n, seed, "cpu") for n, seed in ((10, 0), (24, 0), (10, 1)))
    assert (few.settings.epochs, more.settings.epochs) == (12, 4)
    assert torch.equal(few.train.targets, more.train.targets[:10])
    assert not torch.equal(few.train.targets, other.train.targets)
    assert few.settings.seed != other.settings.seed
    assert few.settings.seed == more.settings.seed
    assert set(more.train.targets.tolist()) <= set(np.float32(targets[:60]).tolist())
    assert sorted(more.validation.targets.tolist()) == np.float32(targets[60:80]).tolist()


def test_nothing_with_many_elements_is_trained_on_and_nothing_reported_is_chosen_by() -> None:
    symbols = ["Li", "Na", "K", "Rb", "Mg", "Ca", "Al", "Fe", "O", "F", "Cl", "S"]
    rng = np.random.default_rng(0)
    formulas = ["".join(sorted(rng.choice(symbols, n, replace=False))) for n in rng.integers(2, 7, 3000)]
    train, validation, reported = scaling_split(formulas)
    bucket = np.array([split_bucket(formula) for formula in formulas])
    many = np.array([len(parse_formula(formula)) > 4 for formula in formulas])
    assert not many[train].any()
    assert not many[validation].any()
    assert set(bucket[train]) == set(range(55))
    assert set(bucket[validation]) == set(range(55, 60))
    seen, unseen = reported["at most 4 elements"], reported["more"]
    assert not many[seen].any()
    assert many[unseen].all()
    assert set(bucket[seen]) == set(bucket[unseen]) == set(range(60, 70))
