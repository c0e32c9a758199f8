"""The filter of formulas by a compositional ensemble: which of them are worth a search for structures.

Source: Merchant et al., Nature 624, 80 (2023), Methods: compositions predicted within 50 meV/atom of the hull are searched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gnome.crystals.formula import reduced_formula
from gnome.errors import InvalidInput
from gnome.models.energy_model import FormulaModel
from gnome.quantities import NEAR_HULL_TOLERANCE, PLAUSIBLE_E_FORM
from pipelines.offset import Hull, Offset, bridge, fit_residuals


@dataclass(frozen=True, kw_only=True)
class FormulaPrediction:
    """What the ensemble says of a composition: median, inter-quartile range and decomposition energy, eV/atom.

    `method` labels the energies; one with an offset reads `model's~hull's`.
    """

    composition: Mapping[int, int]
    e_form_per_atom: float
    spread: float
    decomposition_energy: float
    model_id: str
    method: str

    @property
    def reduced_formula(self) -> str:
        """Reduced formula in pymatgen's spelling."""
        return reduced_formula(self.composition)


def screen_formulas(
    compositions: Sequence[Mapping[int, int]], model: FormulaModel, hull: Hull, offset: Offset | None = None
) -> list[FormulaPrediction]:
    """Predict compositions, in their order; those with elements the model or the hull lacks, or an absurd prediction, are left out.

    Raises InvalidInput when the methods of model and hull differ and no offset between the two is given.
    """
    bridging = bridge(model, hull, offset)
    usable = [composition for composition in compositions if set(composition) <= model.elements & hull.elements]
    if not usable:
        return []
    energies = model.member_energies(usable)  # (members, compositions)
    corrections = np.array([bridging.correction(composition) if bridging else 0.0 for composition in usable])
    medians = np.median(energies, axis=0) + corrections
    with np.errstate(invalid="ignore"):  # an infinite energy makes a spread of NaN here and is left out below
        upper, lower = np.percentile(energies, [75, 25], axis=0)
        spreads = upper - lower
    low, high = PLAUSIBLE_E_FORM
    plausible = np.flatnonzero((medians >= low) & (medians <= high) & np.isfinite(spreads))
    decomposition = hull.decomposition_energies([usable[i] for i in plausible], medians[plausible])
    return [
        FormulaPrediction(
            composition=usable[i],
            e_form_per_atom=float(medians[i]),
            spread=float(spreads[i]),
            decomposition_energy=float(energy),
            model_id=model.model_id,
            method=f"{model.method}~{hull.method}" if bridging else model.method,
        )
        for i, energy in zip(plausible, decomposition, strict=True)
    ]


def fit_formula_offset(
    model: FormulaModel, compositions: Sequence[Mapping[int, int]], e_forms: Sequence[float], *, method: str, ridge: float = 1.0
) -> Offset:
    """Fit what to add to a compositional model's predictions so that they meet the lowest `e_forms` (eV/atom) of another method.

    Raises InvalidInput when no composition has only elements of the model.
    """
    known = [i for i, composition in enumerate(compositions) if set(composition) <= model.elements]
    if not known:
        raise InvalidInput(f"no offset from {model.method} to {method}: no known composition has only elements of the model")
    usable = [compositions[i] for i in known]
    residuals = np.array([e_forms[i] for i in known]) - np.median(model.member_energies(usable), axis=0)
    return fit_residuals(usable, residuals, model_id=model.model_id, from_method=model.method, to_method=method, ridge=ridge)


def select_formulas(
    predictions: Sequence[FormulaPrediction], n: int, *, threshold: float = NEAR_HULL_TOLERANCE, fill: bool = True
) -> list[FormulaPrediction]:
    """Choose the n compositions of lowest decomposition energy, ties by formula.

    Without `fill` only those within `threshold` (eV/atom) count.
    """
    ranked = sorted(predictions, key=lambda prediction: (prediction.decomposition_energy, prediction.reduced_formula))
    return [prediction for prediction in ranked if fill or prediction.decomposition_energy <= threshold][:n]
