"""What goes into the database and comes out of it: plain frozen records.

A record that cannot be true (a NaN, an energy of 1e6) is refused when it is made, with the value in the message; the CHECK constraints
of the tables refuse it once more.  Energies are eV/atom.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gnome.crystals.crystal import Crystal
from gnome.database.schema import MAX_RAW_ENERGY, ORIGINS
from gnome.errors import InvalidInput
from gnome.quantities import PLAUSIBLE_E_FORM
from gnome.stability.entries import Product
from gnome.stability.method import Method

_WIDE = (-MAX_RAW_ENERGY, MAX_RAW_ENERGY)
_DISTANCE = PLAUSIBLE_E_FORM[1] - PLAUSIBLE_E_FORM[0]


@dataclass(frozen=True, kw_only=True)
class CrystalRecord:
    """A relaxed crystal with its energies under one method.

    `fingerprint` is the identity bucket that duplicates are looked for in.  `origin` is seed, discovered or imported; a discovered
    one names its round and candidate, and what was expected of it.  `energy_per_atom` is None where a source gives the formation energy
    alone.
    """

    crystal: Crystal
    method: Method
    e_form_per_atom: float
    fingerprint: str
    origin: str
    energy_per_atom: float | None = None
    correction_per_atom: float = 0.0
    e_above_hull: float | None = None
    decomposition_energy: float | None = None
    decomposes_to: Sequence[Product] | None = None
    n_competing: int | None = None
    p_stable: float | None = None
    formula_check: float | None = None
    space_group_number: int | None = None
    protostructure: str | None = None
    round: int | None = None
    candidate_id: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be true."""
        what = f"crystal {self.crystal.id} ({self.crystal.reduced_formula})"
        check_range(what, "e_form_per_atom", self.e_form_per_atom, PLAUSIBLE_E_FORM)
        check_range(what, "energy_per_atom", self.energy_per_atom, _WIDE)
        check_range(what, "correction_per_atom", self.correction_per_atom, _WIDE)
        check_range(what, "e_above_hull", self.e_above_hull, (0.0, _DISTANCE))
        check_range(what, "decomposition_energy", self.decomposition_energy, (-_DISTANCE, _DISTANCE))
        check_range(what, "p_stable", self.p_stable, (0.0, 1.0))
        check_range(what, "formula_check", self.formula_check, (0.0, 1.0))
        if self.origin not in ORIGINS:
            raise InvalidInput(f"{what}: origin {self.origin!r}, expected one of {', '.join(ORIGINS)}")


@dataclass(frozen=True, kw_only=True)
class CandidateRecord:
    """A proposed crystal and its lineage; `parent_id` is the id of the crystal it was made from."""

    id: str
    round: int
    generator: str
    crystal: Crystal
    parent_id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PredictionRecord:
    """What an ensemble said of a candidate.

    `decomposition_energy`, `p_stable` and `n_competing` are against the hull as the screening saw it; what is not known is None.
    """

    candidate_id: str
    model_id: str
    e_form_per_atom: float
    spread: float
    volume_scale: float
    decomposition_energy: float | None = None
    p_stable: float | None = None
    n_competing: int | None = None
    formula_check: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is not a number."""
        what = f"prediction for {self.candidate_id}"
        check_range(what, "e_form_per_atom", self.e_form_per_atom, _WIDE)
        check_range(what, "spread", self.spread, (0.0, MAX_RAW_ENERGY))
        check_range(what, "volume_scale", self.volume_scale, (0.01, 100.0))
        check_range(what, "decomposition_energy", self.decomposition_energy, _WIDE)
        check_range(what, "p_stable", self.p_stable, (0.0, 1.0))
        check_range(what, "formula_check", self.formula_check, (0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """An evaluator's answer for a candidate: energies, or a failure with its reason.

    `crystal` is the relaxed structure.  What it means is told later (see `Assessment`): `crystal_id` is the crystal it led to, new or
    known; `novel` whether that was new; `e_above_hull_before` the signed distance to the hull as it stood before the round.  `cost_seconds`
    is that of all `attempts`.  A failure keeps only those of its numbers that are plausible.
    """

    candidate_id: str
    method: Method
    round: int
    converged: bool
    failure: str | None = None
    message: str = ""
    crystal: Crystal | None = None
    crystal_id: str | None = None
    energy_per_atom: float | None = None
    correction_per_atom: float | None = None
    e_form_per_atom: float | None = None
    e_above_hull_before: float | None = None
    novel: bool | None = None
    max_force: float | None = None
    n_steps: int = 0
    cost_seconds: float = 0.0
    forces: Sequence[Sequence[float]] | None = None
    stress: Sequence[Sequence[float]] | None = None
    magnetic_moments: Sequence[float] | None = None
    attempts: int = 1

    def __post_init__(self) -> None:
        """Refuse a converged answer that cannot be true; of a failed one keep what can be stored."""
        what = f"evaluation of {self.candidate_id}"
        if self.converged != (self.failure is None):
            raise InvalidInput(f"{what}: converged is {self.converged} and the failure {self.failure!r}; a failure has a reason")
        if self.converged and (self.energy_per_atom is None or self.e_form_per_atom is None):
            raise InvalidInput(f"{what}: converged without energy_per_atom or e_form_per_atom")
        ranges = {
            "energy_per_atom": _WIDE,
            "correction_per_atom": _WIDE,
            "e_form_per_atom": PLAUSIBLE_E_FORM,
            "e_above_hull_before": (-_DISTANCE, _DISTANCE),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if self.converged:
                check_range(what, name, value, (low, high))
            elif value is not None and not low <= value <= high:
                object.__setattr__(self, name, None)
        if self.crystal is not None and not (
            np.isfinite(self.crystal.lattice).all() and np.isfinite(self.crystal.frac_coords).all()
        ):
            if self.converged:
                raise InvalidInput(f"{what}: converged, with a relaxed structure that is not made of finite numbers")
            object.__setattr__(self, "crystal", None)
        if self.max_force is not None and not math.isfinite(self.max_force):
            object.__setattr__(self, "max_force", None)
        for name in ("forces", "stress", "magnetic_moments"):
            numbers = getattr(self, name)
            if numbers is not None and not np.isfinite(np.asarray(numbers, dtype=np.float64)).all():
                if self.converged:
                    raise InvalidInput(f"{what}: converged, with {name} that are not finite numbers")
                object.__setattr__(self, name, None)
        check_range(what, "cost_seconds", self.cost_seconds, (0.0, 1e10))
        check_range(what, "n_steps", self.n_steps, (0, 1e9))
        text = self.message.encode("utf-8", "replace").decode()  # no database holds half a character
        object.__setattr__(self, "message", text.replace("\x00", ""))  # PostgreSQL's texts cannot hold it


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """What a converged evaluation means, by the label of its method: which crystal it led to, and where that lay before the round."""

    candidate_id: str
    method: str
    crystal_id: str
    novel: bool
    e_above_hull_before: float

    def __post_init__(self) -> None:
        """Refuse what cannot be true."""
        check_range(
            f"evaluation of {self.candidate_id}", "e_above_hull_before", self.e_above_hull_before, (-_DISTANCE, _DISTANCE)
        )


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """An ensemble: where its weights are, what it was trained on (card) and how good it is (metrics).

    `kind` is structural or compositional, `status` candidate, promoted or retired.  `promoted_at`: since when it is in use, or was last,
    seconds since 1970; None where it never was, or was taken back.
    """

    id: str
    kind: str
    path: str
    sha256: str
    card: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    parent_id: str | None = None
    round: int | None = None
    status: str = "candidate"
    promoted_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One turn of the loop; `state` is running, finished or failed, times are seconds since 1970."""

    number: int
    state: str
    seed: int
    settings: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    started_at: float
    finished_at: float | None


@dataclass(frozen=True, kw_only=True)
class StoredCrystal:
    """A crystal as it was found in the database: its columns by `Quantity` name, and the structure."""

    crystal: Crystal
    row: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Id of the crystal."""
        return str(self.row["id"])


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """A labelled example: the relaxed crystal, the one it was relaxed from (None for a seed), and its formation energy."""

    id: str
    crystal: Crystal
    unrelaxed: Crystal | None
    e_form_per_atom: float
    energy_per_atom: float | None
    round: int | None


@dataclass(frozen=True, kw_only=True)
class HullColumns:
    """What a hull says of one crystal."""

    id: str
    e_above_hull: float
    decomposition_energy: float
    decomposes_to: Sequence[Product]
    n_competing: int

    def __post_init__(self) -> None:
        """Refuse what cannot be true."""
        check_range(f"crystal {self.id}", "e_above_hull", self.e_above_hull, (0.0, _DISTANCE))
        check_range(f"crystal {self.id}", "decomposition_energy", self.decomposition_energy, (-_DISTANCE, _DISTANCE))


@dataclass(frozen=True, kw_only=True)
class Ancestor:
    """One step of a lineage: a crystal, and the candidate, prediction and evaluations it came from (none for a seed)."""

    crystal: StoredCrystal
    candidate: CandidateRecord | None
    predictions: tuple[PredictionRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]


def check_range(what: str, name: str, value: float | None, allowed: tuple[float, float]) -> None:
    """Raise InvalidInput unless the value is None or lies within; NaN lies nowhere."""
    low, high = allowed
    if value is not None and not low <= value <= high:
        raise InvalidInput(f"{what}: {name} is {value}, expected {low:g} to {high:g}")
