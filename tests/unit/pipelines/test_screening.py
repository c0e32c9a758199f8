from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.stats import t as student

from gnome.errors import InvalidInput
from gnome.models.calibration import ErrorCalibration
from gnome.stability.hull import ConvexHull, HullEntry
from pipelines.candidate import Candidate, Lineage
from pipelines.offset import Offset, fit_residuals
from pipelines.screening import (
    Prediction,
    Refusal,
    ScreeningSettings,
    fit_offset,
    predict_energies,
    probabilities_stable,
    screen,
)


@dataclass
class ToyEnsemble:
    """Parabolas in the volume factor: member m has its minimum `depths[m]` at `best_scale`, shifted per element by `per_element`."""

    depths: tuple[float, ...] = (-0.5, -0.4, -0.1)
    best_scale: float = 1.1
    per_element: float = 0.0
    elements: frozenset[int] = frozenset({3, 8, 11, 17, 19, 35})
    method: str = "pbe"
    model_id: str = "toy"
    calibration: ErrorCalibration | None = None
    asked: int = 0

    def member_energies(self, crystals, volume_scales=(1.0,)):
        self.asked = max(self.asked, len(crystals))
        curve = (np.array(volume_scales) - self.best_scale) ** 2
        shift = self.per_element * np.array([crystal.atomic_numbers.mean() for crystal in crystals])
        return np.array(self.depths)[:, None, None] + curve[None, :, None] + shift[None, None, :]


def as_candidate(crystal):
    return Candidate(crystal=crystal, lineage=Lineage(generator="by_hand", parent_id=None))


@pytest.fixture
def candidates(rocksalt):
    return [as_candidate(rocksalt(cation, anion)) for cation, anion in (("Na", "Cl"), ("K", "Br"), ("Li", "Cl"))]


@pytest.fixture
def hull():
    entries = [HullEntry(id=str(z), composition={z: 1}, e_form_per_atom=0.0) for z in (3, 11, 17, 19, 35, 8)]
    return ConvexHull("pbe", [*entries, HullEntry(id="salt", composition={11: 1, 17: 1}, e_form_per_atom=-0.3)])


LOWEST = ScreeningSettings(over_volumes="lowest")


def test_the_mean_over_volumes_counts_for_each_member(rocksalt):
    energies = np.random.default_rng(0).normal(size=(5, 20, 2))

    class Fixed(ToyEnsemble):
        def member_energies(self, crystals, volume_scales=(1.0,)):
            return energies

    result = predict_energies(Fixed(), [rocksalt(), rocksalt("K")])
    means = np.sort(energies.mean(1), axis=0)
    np.testing.assert_allclose(result.e_form_per_atom, means[2])
    np.testing.assert_allclose(result.spread, means[3] - means[1])
    best = np.median(energies, axis=0).argmin(axis=0)
    np.testing.assert_allclose(result.volume_scale, 0.8 + 0.4 * best / 19)


@pytest.mark.parametrize(("n", "scales"), [(1, (1.0,)), (2, (0.8, 1.2)), (3, (0.8, 1.0, 1.2))])
def test_volumes_are_spread_evenly_and_one_is_the_middle(n, scales):
    assert ScreeningSettings(n_scales=n).scales == pytest.approx(scales)


def test_what_counts_of_the_volumes_is_one_of_two():
    with pytest.raises(InvalidInput, match="over_volumes is 'median', expected mean or lowest"):
        ScreeningSettings(over_volumes="median")


def test_lowest_median_over_volumes_and_spread_there(rocksalt):
    crystal = rocksalt()
    rng = np.random.default_rng(0)
    energies = rng.normal(size=(5, 20, 1))

    class Fixed(ToyEnsemble):
        def member_energies(self, crystals, volume_scales=(1.0,)):
            return energies

    result = predict_energies(Fixed(), [crystal], LOWEST)
    best = min(range(20), key=lambda i: np.median(energies[:, i, 0]))
    assert result.e_form_per_atom[0] == np.median(energies[:, best, 0])
    assert result.volume_scale[0] == pytest.approx(0.8 + 0.4 * best / 19)
    ordered = np.sort(energies[:, best, 0])
    assert result.spread[0] == pytest.approx(ordered[3] - ordered[1])


def test_volume_that_gives_the_minimum_is_found(rocksalt):
    result = predict_energies(ToyEnsemble(best_scale=0.93), [rocksalt()], LOWEST)
    assert result.volume_scale[0] == pytest.approx(0.93, abs=0.4 / 19 / 2)
    assert result.e_form_per_atom[0] == pytest.approx(-0.4, abs=2e-4)
    assert result.spread[0] == pytest.approx(0.2)


def test_predictions_against_the_hull(candidates, hull):
    result = screen(candidates, ToyEnsemble(best_scale=1.2), hull, LOWEST)
    assert [p.candidate_id for p in result.predictions] == [c.id for c in candidates]
    first = result.predictions[0]
    assert (first.method, first.model_id, result.offset_note) == ("pbe", "toy", "")
    assert first.e_form_per_atom == pytest.approx(-0.4)
    assert first.decomposition_energy == pytest.approx(-0.4)  # competes with the elements, not with the NaCl on the hull
    assert set(first.to_dict()) >= {"candidate_id", "e_form_per_atom", "spread", "volume_scale", "decomposition_energy"}


def test_batches_change_nothing(candidates, hull):
    model = ToyEnsemble(per_element=0.01)
    at_once = screen(candidates, model, hull)
    assert model.asked == 3
    model = ToyEnsemble(per_element=0.01)
    assert screen(iter(candidates), model, hull, ScreeningSettings(batch_size=2)) == at_once
    assert model.asked == 2
    assert screen(candidates[1:2], model, hull).predictions[0] == at_once.predictions[1]


def test_unknown_elements_are_refused_with_a_reason_and_lose_nothing(candidates, rocksalt, hull):
    gold, iodide = as_candidate(rocksalt("Au", "Cl")), as_candidate(rocksalt("K", "I"))
    result = screen([gold, *candidates, iodide], ToyEnsemble(elements=frozenset({3, 11, 17, 19, 35, 53})), hull)
    assert [p.candidate_id for p in result.predictions] == [c.id for c in candidates]
    assert [r.candidate_id for r in result.refusals] == [gold.id, iodide.id]
    assert result.refusals[0] == Refusal(
        candidate_id=gold.id, reason="unsupported_element", message="AuCl: the model has no Au and the hull has no Au"
    )
    assert result.refusals[1].message == "KI: the hull has no I"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e6, 5.1])
def test_absurd_predictions_are_refused(candidates, hull, value):
    class Broken(ToyEnsemble):
        def member_energies(self, crystals, volume_scales=(1.0,)):
            energies = super().member_energies(crystals, volume_scales)
            energies[:, :, 1] = value
            return energies

    result = screen(candidates, Broken(), hull)
    assert [r.candidate_id for r in result.refusals] == [candidates[1].id]
    assert result.refusals[0].reason == "implausible_energy"
    assert len(result.predictions) == 2


def test_no_candidate_gives_no_prediction(hull):
    result = screen([], ToyEnsemble(), hull)
    assert (result.predictions, result.refusals) == ((), ())


def test_two_methods_meet_through_an_offset_only(candidates, rocksalt):
    hull = ConvexHull("chgnet", [HullEntry(id=str(z), composition={z: 1}, e_form_per_atom=0.0) for z in (3, 11, 17, 19, 35)])
    model = ToyEnsemble(best_scale=1.2)
    with pytest.raises(InvalidInput, match="an offset between them is needed, none is given"):
        screen(candidates, model, hull)
    crystals = [rocksalt(a, b) for a in ("Li", "Na", "K") for b in ("Cl", "Br")]
    offset = fit_offset(model, crystals, [-0.9] * len(crystals), method="chgnet", settings=LOWEST)
    result = screen(candidates, model, hull, LOWEST, offset=offset)
    assert result.predictions[0].e_form_per_atom == pytest.approx(-0.9, abs=1e-6)
    assert result.predictions[0].method == "pbe~chgnet"
    assert "6 known crystals" in result.offset_note
    assert "0.500 -> 0.000" in result.offset_note
    with pytest.raises(InvalidInput, match="the one given leads"):
        screen(candidates, model, hull, offset=replace(offset, to_method="gpaw"))
    with pytest.raises(InvalidInput, match="the one given leads"):
        screen(candidates, model, hull, offset=replace(offset, model_id="another"))


def test_offset_finds_what_each_element_is_off_by(known_crystals):
    elements = frozenset(z for crystal in known_crystals for z in crystal.composition)
    true = np.random.default_rng(0).normal(scale=0.3, size=104)
    model = ToyEnsemble(elements=elements, best_scale=1.2)
    targets = [-0.4 + sum(true[z] * n for z, n in c.composition.items()) / c.n_atoms for c in known_crystals]
    offset = fit_offset(model, known_crystals, targets, method="other", ridge=1e-3, settings=LOWEST)
    assert offset.error_after < 0.25 * offset.error_before
    corrected = [-0.4 + offset.correction(crystal.composition) for crystal in known_crystals]
    assert np.abs(np.array(corrected) - targets).mean() < 0.05
    unseen = next(z for z in range(90, 104) if z not in elements)
    assert offset.correction({unseen: 2}) == pytest.approx(offset.intercept)


def test_offset_without_usable_crystals(rocksalt):
    with pytest.raises(InvalidInput, match="none of 1 crystals"):
        fit_offset(ToyEnsemble(), [rocksalt("Au", "I")], [0.0], method="chgnet")


def test_prediction_is_frozen():
    prediction = Prediction(
        candidate_id="a", e_form_per_atom=0.0, spread=0.0, volume_scale=1.0, model_id="m", method="x", decomposition_energy=0.0
    )
    with pytest.raises(AttributeError):
        prediction.spread = 1.0


def test_the_probability_of_stability_is_that_of_the_calibrated_error(candidates, hull, rocksalt):
    calibration = ErrorCalibration(floor=0.03, factor=0.1, power=1.0, degrees=4.0)
    model = ToyEnsemble(calibration=calibration)
    crystals = [candidate.crystal for candidate in candidates]
    energies = predict_energies(model, crystals)
    compositions = [crystal.composition for crystal in crystals]
    found = probabilities_stable(model, hull, energies, compositions)
    scale = np.hypot(0.03, 0.1 * energies.spread)
    margins = np.array([hull.energy(composition) for composition in compositions]) - energies.e_form_per_atom
    np.testing.assert_allclose(found, student.cdf(margins / scale, 4.0))
    assert probabilities_stable(ToyEnsemble(), hull, energies, compositions) is None


def test_an_offset_knows_how_far_it_is_off(rocksalt):
    hull = ConvexHull("chgnet", [HullEntry(id=str(z), composition={z: 1}, e_form_per_atom=0.0) for z in (3, 11, 17, 19, 35)])
    crystals = [rocksalt(a, b) for a in ("Li", "Na", "K") for b in ("Cl", "Br")] * 20
    rng = np.random.default_rng(0)
    model = ToyEnsemble(depths=(-0.51, -0.5, -0.49))
    unrelaxed = crystals, (-0.9 + 0.05 * rng.standard_t(4, len(crystals))).tolist()
    offset = fit_offset(model, crystals, [-0.9] * len(crystals), method="chgnet", unrelaxed=unrelaxed)
    assert Offset.from_dict(offset.to_dict()).calibration == offset.calibration
    found = probabilities_stable(model, hull, predict_energies(model, crystals), [c.composition for c in crystals], offset)
    assert (found > 0.99).all()
    (half,) = set(offset.calibration.half_widths(np.full(1, 0.01)).tolist())
    assert 0.04 < half < 0.08
    few = fit_offset(model, crystals, [-0.9] * len(crystals), method="chgnet", unrelaxed=(crystals[:6], [-0.9] * 6))
    assert few.calibration is None
    unknown = fit_offset(model, crystals, [-0.9] * len(crystals), method="chgnet")
    assert unknown.calibration is None, "errors for relaxed crystals say little of those for candidates"
    assert probabilities_stable(model, hull, predict_energies(model, crystals[:1]), [crystals[0].composition], few) is None


def test_an_offset_tells_the_error_for_crystals_that_were_left_out():
    rng = np.random.default_rng(0)
    compositions = [{int(a): 1, int(b): 2} for a, b in (rng.choice([3, 8, 11, 17, 19], 2, replace=False) for _ in range(12))]
    residuals = rng.normal(0, 0.1, 12)
    ways = {"model_id": "m", "from_method": "a", "to_method": "b", "ridge": 0.5}
    errors = []
    for i in range(12):
        rest = fit_residuals(compositions[:i] + compositions[i + 1 :], np.delete(residuals, i), **ways)
        errors.append(abs(residuals[i] - rest.correction(compositions[i])))
    assert fit_residuals(compositions, residuals, **ways).error_after == pytest.approx(np.mean(errors), rel=1e-6)
