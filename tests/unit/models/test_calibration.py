"""What ensembles say of their own errors, against errors whose distribution is known."""

import math
from pathlib import Path

import numpy as np
import pytest

from gnome.errors import InvalidCheckpoint
from gnome.models.calibration import ErrorCalibration, LogitCalibration, coverage, coverage_by_width, expected_calibration_error
from gnome.models.checkpoint import save_ensemble
from gnome.models.compositional import CompositionalNetwork, CompositionalSettings
from gnome.models.ensemble import calibrate_crystals
from gnome.models.formula_ensemble import CompositionalEnsemble, calibrate_formulas, error_widths


def test_intervals_hold_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    widths = rng.uniform(0.01, 0.2, 20_000)
    errors = np.hypot(0.02, 0.5 * widths) * rng.standard_t(3, 20_000)
    fitted = ErrorCalibration.fit(errors[:10_000], widths[:10_000])
    assert fitted is not None
    assert fitted.power == pytest.approx(1, rel=0.15)
    assert fitted.degrees == pytest.approx(3, rel=0.2)
    for level in (0.5, 0.68, 0.9, 0.95):
        half_widths = fitted.half_widths(widths[10_000:], level)
        assert coverage(errors[10_000:], half_widths) == pytest.approx(level, abs=0.015)
        assert coverage_by_width(errors[10_000:], half_widths) == pytest.approx([level] * 5, abs=0.04)


def test_doubt_that_is_out_of_proportion_is_put_right() -> None:
    rng = np.random.default_rng(5)
    widths = rng.lognormal(-3, 0.8, 20_000)
    errors = 3 * widths**1.5 * rng.standard_t(2.5, 20_000)
    fitted = ErrorCalibration.fit(errors[:10_000], widths[:10_000])
    assert fitted is not None
    assert fitted.power == pytest.approx(1.5, rel=0.05)
    assert coverage_by_width(errors[10_000:], fitted.half_widths(widths[10_000:])) == pytest.approx([0.68] * 5, abs=0.04)


def test_widths_of_any_unit_can_be_fitted() -> None:
    rng = np.random.default_rng(6)
    widths = rng.uniform(0.5, 1, 2000)
    fitted = ErrorCalibration.fit(5e-5 * widths * rng.standard_t(3, 2000), widths)
    assert fitted is not None
    assert 1.2 < fitted.degrees < 8
    unsaid = ErrorCalibration.fit(0.1 * rng.standard_t(3, 2000), np.zeros(2000))
    assert unsaid is not None
    assert unsaid.half_widths(np.zeros(1))[0] == pytest.approx(0.115, rel=0.15)


def test_errors_that_follow_nothing_have_one_width() -> None:
    rng = np.random.default_rng(1)
    fitted = ErrorCalibration.fit(0.05 * rng.normal(size=5000), rng.uniform(0, 1e-4, 5000))
    assert fitted is not None
    assert np.ptp(fitted.half_widths(np.array([0.0, 1e-4]))) < 0.01
    assert fitted.half_widths(np.array([0.0]))[0] == pytest.approx(0.05, rel=0.1)


def test_probabilities_are_frequencies() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 4, 20_000)
    happened = rng.random(20_000) < 1 / (1 + np.exp(-(0.4 * logits - 0.3)))
    line = LogitCalibration.fit(logits, happened)
    assert line is not None
    assert (line.slope, line.intercept) == pytest.approx((0.4, -0.3), abs=0.03)
    assert expected_calibration_error(line.probabilities(logits), happened) < 0.015
    assert expected_calibration_error(1 / (1 + np.exp(-logits)), happened) > 0.1
    sure = np.array([True, True, False, False])
    assert expected_calibration_error(np.array([1.0, 1.0, 0.0, 0.0]), sure) == 0
    assert expected_calibration_error(np.array([0.0, 0.0, 1.0, 1.0]), sure) == 1


def test_chances_of_lying_below_a_hull_are_frequencies() -> None:
    rng = np.random.default_rng(4)
    spreads = rng.uniform(0, 0.05, 20_000)
    members = rng.normal(0, 0.5, 20_000) + spreads * np.array([-0.5, -0.5, 0, 0.5, 0.5])[:, None]
    truth = members[2] + np.hypot(0.01, spreads) * rng.standard_t(3, 20_000)
    kept = calibrate_crystals(members[:, :10_000], truth[:10_000])
    assert kept is not None
    fitted = ErrorCalibration(**kept)
    margins = rng.normal(0, 0.05, 20_000)
    chances = fitted.probability_below(margins[10_000:], spreads[10_000:])
    assert expected_calibration_error(chances, (truth - members[2] <= margins)[10_000:]) < 0.02
    assert fitted.probability_below(np.array([0.0]), np.array([0.1]))[0] == pytest.approx(0.5)


def test_too_little_teaches_nothing() -> None:
    assert ErrorCalibration.fit(np.ones(10), np.ones(10)) is None
    assert LogitCalibration.fit(np.ones(10), np.ones(10, bool)) is None
    assert LogitCalibration.fit(np.ones(500), np.ones(500, bool)) is None


def test_members_doubt_by_what_they_say_and_how_they_differ() -> None:
    answers = np.zeros((2, 1, 5))
    answers[:, 0, 0] = -1.0, -0.4
    answers[:, 0, 2] = math.log(0.1), math.log(0.3)
    assert error_widths(answers, 0)[0] == pytest.approx(math.sqrt(0.3**2 + (0.01 + 0.09) / 2))
    assert error_widths(answers[:, :, :1], 0)[0] == pytest.approx(0.3)


def test_an_ensemble_answers_with_the_uncertainties_of_its_card(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    answers = rng.normal(0, 0.1, (3, 400, 5))
    answers[:, :, -1] = rng.normal(0, 2, 400)
    truth = answers.mean(0)[:, :2] + 0.1 * rng.normal(size=(400, 2))
    truth[:, 1] = np.where(rng.random(400) < 1 / (1 + np.exp(-answers[0, :, -1])), -0.1, 0.1)
    truth[::7, 0] = np.nan
    calibration = calibrate_formulas(answers, truth)
    assert set(calibration) == {"e_form_per_atom", "decomposition_energy", "stable"}
    assert calibration["stable"]["slope"] == pytest.approx(1, abs=0.3)
    assert set(calibrate_formulas(answers, np.full((400, 2), np.nan))) == set()

    network = CompositionalNetwork(CompositionalSettings(depth=1, width=16, heads=2))
    path = tmp_path / "formulas.safetensors"
    scheme = {"method": "test", "decomposition_energy": True, "calibration": calibration}
    save_ensemble(path, [network, network], {"method": "test", "elements": [8, 26], "schemes": [scheme]})
    ensemble = CompositionalEnsemble.load(path)
    said = ensemble.answers([{26: 2, 8: 3}, {26: 1}])
    assert (said.e_form_uncertainty > 0).all()
    assert (said.decomposition_uncertainty > 0).all()
    assert ((said.p_stable > 0) & (said.p_stable < 1)).all()
    good = calibration["e_form_per_atom"]
    wrongs: list[object] = [{"stable": {"slope": 1.0}}, {"stable": {"slope": "1", "intercept": 0.0}}, [1], {"other": {}}, None]
    wrongs += [{"e_form_per_atom": good | {"floor": value}} for value in (-1.0, math.nan, True, 10**40)]
    for wrong in wrongs:
        save_ensemble(path, [network], {"method": "test", "elements": [8], "schemes": [scheme | {"calibration": wrong}]})
        with pytest.raises(InvalidCheckpoint, match="calibration cannot be read"):
            CompositionalEnsemble.load(path)
