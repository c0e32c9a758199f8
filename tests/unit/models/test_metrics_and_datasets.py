"""Metrics against SciPy, the split rule, and labels that are refused."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gnome.crystals.crystal import Crystal
from gnome.crystals.formula import split_bucket
from gnome.crystals.shards import write_shard
from gnome.errors import InvalidInput
from gnome.models.datasets import read_labelled_crystals, split_by_formula
from gnome.models.metrics import atomic_fractions, bootstrap, fit_linear_model, mean_absolute_error, score, spearman
from gnome.quantities import Quantity


def test_rank_correlation_equals_scipy_with_ties() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 10, 100).astype(float), rng.normal(size=100)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman(np.ones(5), np.arange(5.0)) == 0.0


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        sample = rng.normal(1.0, 1.0, 60)
        interval = bootstrap(lambda x: float(x.mean()), sample, n_resamples=300, seed=trial)
        covered += interval.low <= 1.0 <= interval.high
    assert 175 <= covered <= 200


def test_bootstrap_refuses_what_is_not_a_number() -> None:
    with pytest.raises(ValueError, match="not finite"):
        bootstrap(mean_absolute_error, np.array([1.0, np.nan]), np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="one positive length"):
        bootstrap(mean_absolute_error, np.array([1.0]), np.array([1.0, 2.0]))


def test_score_has_both_intervals() -> None:
    target = np.linspace(-1, 1, 50)
    scored = score(target + 0.1, target)
    assert scored["n"] == 50
    assert scored["mae"]["value"] == pytest.approx(0.1)
    assert scored["spearman"]["value"] == pytest.approx(1.0)


def test_linear_model_recovers_element_energies() -> None:
    compositions = [{3: 1, 8: 1}, {3: 2, 8: 1}, {26: 2, 8: 3}, {26: 1, 8: 1}, {3: 1, 26: 1}]
    fractions = atomic_fractions(compositions)
    assert fractions.sum(axis=1).tolist() == pytest.approx([1.0] * 5)
    energies = np.zeros(fractions.shape[1])
    energies[[3, 8, 26]] = [-1.0, -2.0, 0.5]
    fitted = fit_linear_model(fractions, fractions @ energies)
    np.testing.assert_allclose(fitted[[3, 8, 26]], [-1.0, -2.0, 0.5], atol=1e-10)


def test_no_formula_is_in_two_parts() -> None:
    formulas = [f"Li{i}O" for i in range(2, 400)] * 2
    split = split_by_formula(formulas)
    parts = [{formulas[i] for i in part} for part in (split.train, split.validation, split.test)]
    assert all(parts)
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert len(split.train) + len(split.validation) + len(split.test) < len(formulas)


def test_known_buckets() -> None:
    """Buckets written down once; a change of the rule would silently mix training and test data."""
    assert [split_bucket(formula) for formula in ("Fe2O3", "NaCl", "Li2CO3")] == [53, 73, 91]


@pytest.mark.parametrize("label", [1e6, float("nan"), float("inf"), None])
def test_an_absurd_label_is_refused_with_its_row(tmp_path: Path, crystals: list[Crystal], label: float | None) -> None:
    path = tmp_path / "shard.parquet"
    write_shard(path, crystals[:3], {Quantity.E_FORM_PER_ATOM: [-1.0, label, 0.0]})
    with pytest.raises(InvalidInput, match="row 1"):
        read_labelled_crystals([path])


def test_a_shard_without_labels_is_refused(tmp_path: Path, crystals: list[Crystal]) -> None:
    path = tmp_path / "shard.parquet"
    write_shard(path, crystals[:3])
    with pytest.raises(InvalidInput, match="no column e_form_per_atom"):
        read_labelled_crystals([path])
