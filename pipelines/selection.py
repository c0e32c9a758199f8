"""What the evaluation budget is spent on.

Source: Merchant et al., Nature 624, 80 (2023): candidates within 50 meV/atom of the hull are taken, and of each composition only the
structure of lowest predicted energy.  GNoME's acquisition is that threshold and the rank; on a hull with holes it goes where the holes
are, so the most probably stable go first here unless the other is asked for.  Whatever the order, candidates in doubt
(`pipelines.standing`) go last.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from gnome.crystals.crystal import Crystal
from gnome.crystals.identity import same_crystal
from gnome.quantities import NEAR_HULL_TOLERANCE
from pipelines.candidate import Candidate
from pipelines.screening import Prediction
from pipelines.standing import Doubt, Standing


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
    """The most probably stable first, those without a probability last; less deep but surer than greedy."""

    name: str = "stability"
    uses_threshold: bool = False

    def score(self, prediction: Prediction) -> float:
        """Probability of lying above what other compositions make; 2 where it is not known."""
        return 2.0 if prediction.p_stable is None else 1.0 - prediction.p_stable


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
    """The order, and the `threshold` (eV/atom) on the predicted decomposition energy that some orders put before it."""

    threshold: float = NEAR_HULL_TOLERANCE
    acquisition: Acquisition = field(default_factory=StabilityAcquisition)


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A candidate chosen for evaluation.

    `rank` counts from 0; `below_threshold` says whether its predicted decomposition energy is; `doubts` what speaks against it, so that it
    only fills the budget.
    """

    candidate: Candidate
    prediction: Prediction
    rank: int
    below_threshold: bool
    doubts: tuple[Doubt, ...] = ()


DEFAULT_SELECTION = SelectionSettings()


def select(
    predictions: Sequence[Prediction],
    candidates: Sequence[Candidate],
    budget: int,
    settings: SelectionSettings = DEFAULT_SELECTION,
    *,
    failed: Iterable[Crystal] = (),
) -> list[Selected]:
    """Choose at most `budget` candidates in the order of the acquisition, what is in doubt last: the first of each composition.

    Where compositions are fewer than the budget, their next best structures fill it, but no crystal is chosen twice, nor one of those that
    have `failed` before.  Ties go by
    decomposition energy and candidate id, so the choice does not depend on the order of the arguments.  Raises KeyError for a prediction
    whose candidate is not given.
    """
    by_id = {candidate.id: candidate for candidate in candidates}
    acquisition = settings.acquisition
    doubts = {p.candidate_id: standing_of(p, by_id[p.candidate_id]).doubts() for p in predictions}

    def order(prediction: Prediction) -> tuple[bool, bool, float, float, str]:
        deferred = acquisition.uses_threshold and prediction.decomposition_energy > settings.threshold
        score = acquisition.score(prediction)
        return bool(doubts[prediction.candidate_id]), deferred, score, prediction.decomposition_energy, prediction.candidate_id

    chosen: list[Selected] = []
    of_formula: dict[str, list[Crystal]] = {}
    for crystal in failed:
        of_formula.setdefault(crystal.reduced_formula, []).append(crystal)
    waiting = sorted(predictions, key=order)
    while waiting and len(chosen) < budget:
        taken: set[str] = set()
        left: list[Prediction] = []
        for prediction in waiting:
            candidate = by_id[prediction.candidate_id]
            formula = candidate.crystal.reduced_formula
            if len(chosen) >= budget or formula in taken:
                left.append(prediction)
                continue
            if any(same_crystal(candidate.crystal, other) for other in of_formula.get(formula, ())):
                continue
            taken.add(formula)
            of_formula.setdefault(formula, []).append(candidate.crystal)
            chosen.append(
                Selected(
                    candidate=candidate,
                    prediction=prediction,
                    rank=len(chosen),
                    below_threshold=prediction.decomposition_energy <= settings.threshold,
                    doubts=doubts[candidate.id],
                )
            )
        waiting = left
    return chosen


def standing_of(prediction: Prediction, candidate: Candidate) -> Standing:
    """Gather what is known of a candidate beside its energy."""
    return Standing(
        n_competing=prediction.n_competing,
        formula_check=prediction.formula_check,
        p_stable=prediction.p_stable,
        charge_balanced=bool(candidate.lineage.parameters.get("charge_balanced", True)),
    )
