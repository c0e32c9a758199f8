"""Between two methods: what a model says in one, carried over to the hull of another.

Energies of two methods never meet on a hull.  A prediction that was carried over carries the labels of both, which no hull bears.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gnome.crystals.elements import MAX_ATOMIC_NUMBER
from gnome.errors import InvalidInput
from gnome.models.calibration import ErrorCalibration
from gnome.models.energy_model import EnergyModel, FormulaModel


class Hull(Protocol):
    """What screening asks of a convex hull."""

    @property
    def method(self) -> str:
        """Label of the method of its energies."""
        ...

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers that have a reference."""
        ...

    def energies(self, compositions: Sequence[Mapping[int, int]]) -> NDArray[np.float64]:
        """Hull energies, eV/atom."""
        ...

    def decomposition_energies(
        self, compositions: Sequence[Mapping[int, int]], e_form_per_atom: ArrayLike
    ) -> NDArray[np.float64]:
        """Formation energies minus those of the competing phases, eV/atom."""
        ...

    def n_competing(self, composition: Mapping[int, int]) -> int:
        """Count the compounds near the hull that a composition competes with."""
        ...


@dataclass(frozen=True, kw_only=True)
class Offset:
    """Linear correction from a model's method to another: `intercept` plus the mean of `per_element` over the atoms, eV/atom.

    Elements that the fit did not see have 0 in `per_element`.  The errors are mean absolute ones over the `n_crystals` of the
    fit, before, and after with each crystal left out in turn; `calibration`: how far predictions are off afterwards, if that is known.
    """

    model_id: str
    from_method: str
    to_method: str
    intercept: float
    per_element: NDArray[np.float64]
    n_crystals: int
    error_before: float
    error_after: float
    calibration: ErrorCalibration | None = None

    def correction(self, composition: Mapping[int, int]) -> float:
        """Correction (eV/atom) to add to the formation energy of a composition."""
        total = sum(composition.values())
        return self.intercept + sum(float(self.per_element[z]) * n for z, n in composition.items()) / total

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        calibration = None if self.calibration is None else dict(vars(self.calibration))
        return {**vars(self), "per_element": self.per_element.tolist(), "calibration": calibration}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Rebuild what `to_dict` gave."""
        kept = stored.get("calibration")
        calibration = None if kept is None else ErrorCalibration(**kept)
        return cls(**{**stored, "per_element": np.array(stored["per_element"]), "calibration": calibration})

    @property
    def note(self) -> str:
        """One line for the output."""
        return (
            f"predictions of {self.from_method} carried over to {self.to_method} by an offset per element fitted on "
            f"{self.n_crystals} known crystals (mean absolute error {self.error_before:.3f} -> {self.error_after:.3f} eV/atom); "
            "they enter no hull"
        )


def fit_residuals(
    compositions: Sequence[Mapping[int, int]],
    residuals: NDArray[np.float64],
    *,
    model_id: str,
    from_method: str,
    to_method: str,
    ridge: float,
) -> Offset:
    """Fit an offset to residuals (n,), eV/atom, of known crystals.

    Ridge regression on atomic fractions x: minimises sum_i (r_i - b - x_i w)^2 + ridge |w|^2 over the intercept b and the elements' w.
    """
    design = np.zeros((len(compositions), MAX_ATOMIC_NUMBER + 1))
    design[:, 0] = 1.0  # no element has number 0: the column of the intercept
    for row, composition in zip(design, compositions, strict=True):
        for z, n in composition.items():
            row[z] = n / sum(composition.values())
    penalty = np.full(design.shape[1], ridge)
    penalty[0] = 1e-9
    solver = np.linalg.solve(design.T @ design + np.diag(penalty), design.T)  # (coefficients, crystals)
    weights = solver @ residuals
    leverage = np.einsum("ij,ji->i", design, solver)
    left_out = (residuals - design @ weights) / np.maximum(1.0 - leverage, 1e-6)
    return Offset(
        model_id=model_id,
        from_method=from_method,
        to_method=to_method,
        intercept=float(weights[0]),
        per_element=np.concatenate([[0.0], weights[1:]]),
        n_crystals=len(compositions),
        error_before=float(np.abs(residuals).mean()),
        error_after=float(np.abs(left_out).mean()),
    )


def bridge(model: EnergyModel | FormulaModel, hull: Hull, offset: Offset | None) -> Offset | None:
    """Return the offset to apply to a model's predictions: none when its method is the hull's.

    Raises InvalidInput when the methods differ and the offset does not lead from this model to this hull.
    """
    if model.method == hull.method:
        return None
    if offset is None or (offset.model_id, offset.to_method) != (model.model_id, hull.method):
        fitted = "none is given" if offset is None else f"the one given leads from {offset.model_id} to {offset.to_method}"
        raise InvalidInput(
            f"model {model.model_id} predicts {model.method}, the hull is of {hull.method}: an offset between them is needed, {fitted}"
        )
    return offset
