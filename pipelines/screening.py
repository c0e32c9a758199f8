"""The ensemble filter: what the models say about candidates that nobody has relaxed.

Source: Merchant et al., Nature 624, 80 (2023), Methods, "Prediction and filtration".  A candidate's volume is a guess, so it is
predicted at 20 volumes between 80 and 120 % of that guess; over the members of the ensemble the median is the prediction and the
inter-quartile range its spread.  GNoME takes the lowest energy of the volumes.  Networks that learnt the relaxed energy at varied volumes
answer nearly the same at all of them, and the lowest is but the most mistaken, so that here the mean counts unless the other is asked
for; docs/benchmarks.md compares them.  For the lowest, the median at each volume chooses it, so that one stray member cannot.

Energies of two methods never meet.  When the ensemble was trained on another method than the hull's, an `Offset` fitted on known
crystals carries its predictions over; such predictions are labelled with both methods, a label that no hull bears.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.errors import InvalidInput
from gnome.models.calibration import ErrorCalibration
from gnome.models.energy_model import EnergyModel
from gnome.models.ensemble import median_and_spread
from gnome.quantities import PLAUSIBLE_E_FORM
from pipelines.candidate import Candidate
from pipelines.offset import Hull, Offset, bridge, fit_residuals
from pipelines.standing import FormulaJudge, formula_checks

OverVolumes = Literal["mean", "lowest"]
Labelled = tuple[Sequence[Crystal], Sequence[float]]
"""Crystals and e_form_per_atom, eV/atom."""


@dataclass(frozen=True, kw_only=True)
class ScreeningSettings:
    """Volumes of the test-time augmentation, as factors on a candidate's volume, and crystals handed to the model at once.

    `over_volumes`: what counts of a member's energies at these, their mean or the lowest.
    """

    n_scales: int = 20
    smallest_scale: float = 0.8
    largest_scale: float = 1.2
    over_volumes: OverVolumes = "mean"
    batch_size: int = 4096

    def __post_init__(self) -> None:
        """Refuse what is no set of volumes."""
        if self.n_scales < 1 or self.batch_size < 1 or not 0 < self.smallest_scale <= self.largest_scale:
            raise InvalidInput(
                f"{self.n_scales} volumes between factors {self.smallest_scale:g} and {self.largest_scale:g}, "
                "expected 1 or more between positive factors"
            )
        if self.over_volumes not in get_args(OverVolumes):
            raise InvalidInput(f"over_volumes is {self.over_volumes!r}, expected {' or '.join(get_args(OverVolumes))}")

    @property
    def scales(self) -> tuple[float, ...]:
        """Volume factors, ascending; of one, the middle."""
        if self.n_scales == 1:
            return ((self.smallest_scale + self.largest_scale) / 2,)
        return tuple(np.linspace(self.smallest_scale, self.largest_scale, self.n_scales).tolist())


DEFAULT_SCREENING = ScreeningSettings()


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the ensemble says of a candidate.

    Energies eV/atom.  `p_stable` is the probability of a decomposition energy of at most 0; None where the errors of such predictions are
    not known.  `n_competing` and `formula_check` are those of `pipelines.standing.Standing`.  `spread` is the inter-quartile range over
    the members; `volume_scale` the factor on the candidate's volume where their median is lowest.  `method` labels `e_form_per_atom` and
    `decomposition_energy`; one with an offset reads `model's~hull's`.
    """

    candidate_id: str
    e_form_per_atom: float
    spread: float
    volume_scale: float
    model_id: str
    method: str
    decomposition_energy: float
    p_stable: float | None = None
    n_competing: int = 0
    formula_check: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A candidate that got no prediction, and why: `unsupported_element` or `implausible_energy`, with the details in words."""

    candidate_id: str
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Screening:
    """Predictions and refusals, each in the order of the candidates.

    `offset_note` says how two methods were bridged; empty when model and hull agree.
    """

    predictions: tuple[Prediction, ...]
    refusals: tuple[Refusal, ...]
    offset_note: str = ""


@dataclass(frozen=True, kw_only=True)
class EnsembleEnergies:
    """Per crystal, each of shape (crystals,): median over the members and their spread, eV/atom; volume of the lowest median."""

    e_form_per_atom: NDArray[np.float64]
    spread: NDArray[np.float64]
    volume_scale: NDArray[np.float64]

    def of(self, rows: Sequence[int]) -> Self:
        """Select crystals."""
        return type(self)(**{name: values[list(rows)] for name, values in vars(self).items()})


def predict_energies(
    model: EnergyModel, crystals: Sequence[Crystal], settings: ScreeningSettings = DEFAULT_SCREENING
) -> EnsembleEnergies:
    """Predict crystals whose volume is not known well; their elements must be the model's."""
    parts = []
    for start in range(0, len(crystals), settings.batch_size):
        energies = model.member_energies(
            crystals[start : start + settings.batch_size], settings.scales
        )  # (members, scales, crystals)
        best = np.median(energies, axis=0).argmin(axis=0)
        with np.errstate(invalid="ignore"):  # an infinite energy makes a spread of NaN here and is refused later
            at_best = energies[:, best, np.arange(energies.shape[2])]
            total = np.zeros_like(at_best)  # (members, crystals)
            for i in range(settings.n_scales):  # in this order, however many crystals there are
                total += energies[:, i]
            counted = total / settings.n_scales if settings.over_volumes == "mean" else at_best
            parts.append(np.stack([*median_and_spread(counted), np.array(settings.scales)[best]]))
    joined = np.concatenate([np.empty((3, 0)), *parts], axis=1)
    return EnsembleEnergies(e_form_per_atom=joined[0], spread=joined[1], volume_scale=joined[2])


def plausible_energies(e_forms: NDArray[np.float64], spreads: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which predictions (n,), eV/atom, may be believed at all: within what compounds have, by members that all say a number."""
    low, high = PLAUSIBLE_E_FORM
    return np.asarray((e_forms >= low) & (e_forms <= high) & np.isfinite(spreads))


def implausible(e_form: float, spread: float) -> str:
    """Say what is wrong with such a prediction, eV/atom."""
    if not np.isfinite(spread):
        return "not all members of the ensemble answer with a number"
    return f"predicted {e_form:.3g} eV/atom, expected {PLAUSIBLE_E_FORM[0]:g} to {PLAUSIBLE_E_FORM[1]:g}"


def fit_offset(
    model: EnergyModel,
    crystals: Sequence[Crystal],
    e_forms: Sequence[float],
    *,
    method: str,
    ridge: float = 1.0,
    settings: ScreeningSettings = DEFAULT_SCREENING,
    unrelaxed: Labelled | None = None,
) -> Offset:
    """Fit what to add to a model's predictions so that they meet `e_forms` (eV/atom) of another method.

    The predictions are those of `predict_energies`, so that a bias of taking the lowest of many volumes is absorbed as well.
    Crystals with elements the model does not know are left out; raises InvalidInput when none is left.  What is screened is not relaxed
    yet, and predictions for that are further off: the offset's calibration is learnt from `unrelaxed` crystals and the energies of their
    relaxed states, and there is none without.
    """
    known = [i for i, crystal in enumerate(crystals) if set(crystal.composition) <= model.elements]
    if not known:
        raise InvalidInput(
            f"no offset from {model.method} to {method}: none of {len(crystals)} crystals has only elements of the model"
        )
    predicted = predict_energies(model, [crystals[i] for i in known], settings)
    offset = fit_residuals(
        [crystals[i].composition for i in known],
        np.array([e_forms[i] for i in known]) - predicted.e_form_per_atom,
        model_id=model.model_id,
        from_method=model.method,
        to_method=method,
        ridge=ridge,
    )
    return offset if unrelaxed is None else replace(offset, calibration=_learn_errors(model, offset, unrelaxed, settings))


def _learn_errors(
    model: EnergyModel, offset: Offset, unrelaxed: Labelled, settings: ScreeningSettings
) -> ErrorCalibration | None:
    known = [pair for pair in zip(*unrelaxed, strict=True) if set(pair[0].composition) <= model.elements]
    predicted = predict_energies(model, [crystal for crystal, _ in known], settings)
    corrections = np.array([offset.correction(crystal.composition) for crystal, _ in known])
    errors = np.array([energy for _, energy in known]) - predicted.e_form_per_atom - corrections
    return ErrorCalibration.fit(errors, predicted.spread)


def probabilities_stable(
    model: EnergyModel,
    hull: Hull,
    energies: EnsembleEnergies,
    compositions: Sequence[Mapping[int, int]],
    offset: Offset | None = None,
) -> NDArray[np.float64] | None:
    """Probabilities (n,) that new crystals lie on or below a hull, given what an ensemble predicts for them in its own method.

    All phases of the hull compete, those of the same composition too.  None where nothing was learnt of the errors: by the model's own
    card, or with an offset by its fit.  Raises InvalidInput as `screen` does.
    """
    bridging = bridge(model, hull, offset)
    calibration = bridging.calibration if bridging else model.calibration
    if calibration is None:
        return None
    corrections = np.array([bridging.correction(composition) if bridging else 0.0 for composition in compositions])
    margins = hull.energies(compositions) - energies.e_form_per_atom - corrections
    return calibration.probability_below(margins, energies.spread)


def screen(
    candidates: Iterable[Candidate],
    model: EnergyModel,
    hull: Hull,
    settings: ScreeningSettings = DEFAULT_SCREENING,
    offset: Offset | None = None,
    formulas: FormulaJudge | None = None,
) -> Screening:
    """Predict formation and decomposition energies of candidates, and what stands beside them.

    Candidates with elements that the model or the hull lacks, or with an absurd prediction, are refused with a reason.
    Raises InvalidInput when the methods of model and hull differ and no offset between the two is given.
    """
    bridging = bridge(model, hull, offset)
    results: list[Prediction | Refusal | None] = []
    admitted: list[tuple[int, Candidate]] = []
    for position, candidate in enumerate(candidates):
        refusal = _unsupported(candidate, model, hull)
        results.append(refusal)
        if refusal is None:
            admitted.append((position, candidate))
    energies = predict_energies(model, [candidate.crystal for _, candidate in admitted], settings)
    compositions = [candidate.crystal.composition for _, candidate in admitted]
    corrections = [bridging.correction(composition) if bridging else 0.0 for composition in compositions]
    e_forms = energies.e_form_per_atom + np.array(corrections)
    plausible = np.flatnonzero(plausible_energies(e_forms, energies.spread))
    decomposition = np.full(len(admitted), np.nan)
    decomposition[plausible] = hull.decomposition_energies([compositions[i] for i in plausible], e_forms[plausible])
    calibration = known_errors(model, bridging, settings)
    p_stable = None if calibration is None else calibration.probability_below(-decomposition, energies.spread)
    checks = formula_checks(compositions, formulas)
    for i, (position, candidate) in enumerate(admitted):
        if np.isnan(decomposition[i]):
            message = f"{candidate.crystal.reduced_formula}: {implausible(e_forms[i], energies.spread[i])}"
            results[position] = Refusal(candidate_id=candidate.id, reason="implausible_energy", message=message)
            continue
        results[position] = Prediction(
            candidate_id=candidate.id,
            e_form_per_atom=float(e_forms[i]),
            spread=float(energies.spread[i]),
            volume_scale=float(energies.volume_scale[i]),
            model_id=model.model_id,
            method=f"{model.method}~{hull.method}" if bridging else model.method,
            decomposition_energy=float(decomposition[i]),
            p_stable=None if p_stable is None else float(p_stable[i]),
            n_competing=hull.n_competing(compositions[i]),
            formula_check=checks[i],
        )
    return Screening(
        predictions=tuple(result for result in results if isinstance(result, Prediction)),
        refusals=tuple(result for result in results if isinstance(result, Refusal)),
        offset_note=bridging.note if bridging else "",
    )


def known_errors(model: EnergyModel, bridging: Offset | None, settings: ScreeningSettings) -> ErrorCalibration | None:
    """Find how far such predictions are off: an offset knows it for the volumes it was fitted at, a model for cells as they are."""
    if bridging is not None:
        return bridging.calibration
    return model.calibration if settings.n_scales == 1 else None


def _unsupported(candidate: Candidate, model: EnergyModel, hull: Hull) -> Refusal | None:
    present = set(candidate.crystal.composition)
    lacking = [
        f"the {what} has no {', '.join(SYMBOLS[z] for z in sorted(present - elements))}"
        for what, elements in (("model", model.elements), ("hull", hull.elements))
        if present - elements
    ]
    if not lacking:
        return None
    message = f"{candidate.crystal.reduced_formula}: {' and '.join(lacking)}"
    return Refusal(candidate_id=candidate.id, reason="unsupported_element", message=message)
