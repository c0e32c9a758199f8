"""What the evaluation budget is spent on.

Source: Merchant et al., Nature 624, 80 (2023): candidates within 50 meV/atom of the hull are taken, and of each composition only the
structure of lowest predicted energy.  GNoME's acquisition is that threshold and the rank; other orders plug in as an `Acquisition`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from gnome.models.calibration import ErrorCalibration
from gnome.quantities import NEAR_HULL_TOLERANCE
from pipelines.candidate import Candidate
from pipelines.screening import Prediction


class Acquisition(Protocol):
    """An order in which candidates are worth evaluating.

    Scores do not depend on the order of the predictions, nor on which others are there.
    """

    @property
    def name(self) -> str:
        """Short name for tables."""
        ...

    @property
    def uses_threshold(self) -> bool:
        """Whether candidates below the threshold go before all others."""
        ...

    def score(self, prediction: Prediction) -> float:
        """Score a prediction; the lowest is evaluated first."""
        ...


@dataclass(frozen=True, kw_only=True)
class GreedyAcquisition:
    """Lowest predicted decomposition energy first, as GNoME."""

    name: str = "greedy"
    uses_threshold: bool = True

    def score(self, prediction: Prediction) -> float:
        """Predicted decomposition energy, eV/atom."""
        return prediction.decomposition_energy


@dataclass(frozen=True, kw_only=True)
class StabilityAcquisition:
    """The most probably stable first, by what is known of the errors of such predictions; less deep but surer than greedy."""

    calibration: ErrorCalibration
    name: str = "stability"
    uses_threshold: bool = True

    def score(self, prediction: Prediction) -> float:
        """Probability of lying above what other compositions make."""
        energy, spread = np.array([prediction.decomposition_energy]), np.array([prediction.spread])
        return float(self.calibration.probability_below(energy, spread)[0])  # errors are symmetric; 1 - p would lose small ones


@dataclass(frozen=True, kw_only=True)
class RandomAcquisition:
    """Any candidate of the generator with the same chance: the baseline that a filter must beat."""

    seed: int
    name: str = "random"
    uses_threshold: bool = False

    def score(self, prediction: Prediction) -> float:
        """Uniform number in [0, 1) that depends on the seed and the candidate's id alone."""
        digest = hashlib.sha256(f"{self.seed}:{prediction.candidate_id}".encode()).digest()
        return int(np.frombuffer(digest[:8], dtype=">u8")[0]) / 2**64


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """`threshold` (eV/atom) on the predicted decomposition energy, and the order of what passes it."""

    threshold: float = NEAR_HULL_TOLERANCE
    acquisition: Acquisition = field(default_factory=GreedyAcquisition)


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A candidate chosen for evaluation; `rank` counts from 0, `below_threshold` says whether it passed or only filled the budget."""

    candidate: Candidate
    prediction: Prediction
    rank: int
    below_threshold: bool


DEFAULT_SELECTION = SelectionSettings()


def select(
    predictions: Sequence[Prediction],
    candidates: Sequence[Candidate],
    budget: int,
    settings: SelectionSettings = DEFAULT_SELECTION,
) -> list[Selected]:
    """Choose at most `budget` candidates, the first of each composition in the order of the acquisition.

    When fewer pass the threshold than the budget allows, the next best fill it.  Ties go by candidate id, so the choice does not depend
    on the order of the arguments.  Raises KeyError for a prediction whose candidate is not given.
    """
    by_id = {candidate.id: candidate for candidate in candidates}
    acquisition = settings.acquisition

    def order(prediction: Prediction) -> tuple[bool, float, str]:
        deferred = acquisition.uses_threshold and prediction.decomposition_energy > settings.threshold
        return deferred, acquisition.score(prediction), prediction.candidate_id

    chosen: list[Selected] = []
    compositions: set[str] = set()
    for prediction in sorted(predictions, key=order):
        if len(chosen) >= budget:
            break
        candidate = by_id[prediction.candidate_id]
        if candidate.crystal.reduced_formula in compositions:
            continue
        compositions.add(candidate.crystal.reduced_formula)
        passed = prediction.decomposition_energy <= settings.threshold
        chosen.append(Selected(candidate=candidate, prediction=prediction, rank=len(chosen), below_threshold=passed))
    return chosen
