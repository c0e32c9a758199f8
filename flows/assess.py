"""What evaluations mean: which crystals are new, where they lie on the hull, and what that does to the others."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gnome.crystals.crystal import Crystal
from gnome.crystals.identity import fingerprint, keys_to_search, prototype_label, same_crystal, space_group_number
from gnome.database.records import Assessment, CrystalRecord, EvaluationRecord, HullColumns, PredictionRecord
from gnome.database.store import Store
from gnome.quantities import STABLE_TOLERANCE, Quantity
from gnome.stability.hull import ConvexHull
from gnome.stability.method import Method


@dataclass(frozen=True, kw_only=True)
class Assessed:
    """New crystals of a round, and what is to be noted of every converged evaluation."""

    crystals: tuple[CrystalRecord, ...]
    assessments: tuple[Assessment, ...]


def crystal_record(  # noqa: PLR0913 - what a row is made of
    crystal: Crystal,
    method: Method,
    *,
    e_form_per_atom: float,
    energy_per_atom: float | None,
    origin: str,
    correction_per_atom: float = 0.0,
    number: int | None = None,
    candidate_id: str | None = None,
    expected: PredictionRecord | None = None,
    source: str = "",
) -> CrystalRecord:
    """Describe a crystal as the database keeps it: identity bucket, prototype and space group are worked out here."""
    return CrystalRecord(
        crystal=crystal,
        method=method,
        e_form_per_atom=e_form_per_atom,
        energy_per_atom=energy_per_atom,
        correction_per_atom=correction_per_atom,
        fingerprint=fingerprint(crystal),
        origin=origin,
        space_group_number=space_group_number(crystal),
        protostructure=prototype_label(crystal),
        round=number,
        candidate_id=candidate_id,
        p_stable=None if expected is None else expected.p_stable,
        formula_check=None if expected is None else expected.formula_check,
        source=source,
    )


def assess(store: Store, evaluations: Iterable[EvaluationRecord], hull_before: ConvexHull, number: int) -> Assessed:
    """Compare converged evaluations, in the order given, with all crystals known before the round and with each other."""
    expected = {record.candidate_id: record for record in store.predictions_of_round(number)}
    records: list[CrystalRecord] = []
    assessments = []
    converged = [record for record in evaluations if record.converged]
    keys = {key for record in converged for key in keys_to_search(_relaxed(record))}
    known: dict[str, list[Crystal]] = {
        key: [stored.crystal for stored in found if (stored.row["round"] or 0) < number]
        for key, found in store.crystals_by_fingerprint(keys, hull_before.method).items()
    }
    for record in converged:
        crystal = _relaxed(record)
        twin = next(
            (other for key in sorted(keys_to_search(crystal)) for other in known.get(key, ()) if same_crystal(crystal, other)),
            None,
        )
        assert record.e_form_per_atom is not None  # noqa: S101 - a converged record has it
        distance = record.e_form_per_atom - hull_before.energy(crystal.composition)
        if twin is None:
            new = crystal_record(
                crystal,
                record.method,
                e_form_per_atom=record.e_form_per_atom,
                energy_per_atom=record.energy_per_atom,
                correction_per_atom=record.correction_per_atom or 0.0,
                origin="discovered",
                number=number,
                candidate_id=record.candidate_id,
                expected=expected.get(record.candidate_id),
            )
            records.append(new)
            known.setdefault(new.fingerprint, []).append(crystal)
        assessments.append(
            Assessment(
                candidate_id=record.candidate_id,
                method=record.method.label,
                crystal_id=(twin or crystal).id,
                novel=twin is None,
                e_above_hull_before=distance,
            )
        )
    return Assessed(crystals=tuple(records), assessments=tuple(assessments))


def hits_among(
    evaluations: Iterable[EvaluationRecord], crystals: Mapping[str, Mapping[str, Any]], n_competing: Mapping[str, int]
) -> list[str]:
    """Ids of the crystals that a round looks for, one a composition: the hits.

    A hit converged to a structurally new crystal and lies within 1 meV/atom of the hull as it stands, which holds the round's finds.  It
    competed with at least one compound before the round: finds do not support each other.  `crystals` are rows of the crystals that the
    evaluations led to, by id; `n_competing` compounds known before the round, by candidate.
    """
    best: dict[str, tuple[float, str]] = {}
    for record in evaluations:
        row = crystals.get(record.crystal_id or "")
        if not (record.converged and record.novel) or row is None or not n_competing.get(record.candidate_id):
            continue
        above = row[Quantity.E_ABOVE_HULL]
        if above is not None and above <= STABLE_TOLERANCE:
            found = (float(row[Quantity.E_FORM_PER_ATOM]), str(row[Quantity.ID]))
            formula = str(row[Quantity.REDUCED_FORMULA])
            best[formula] = min(found, best.get(formula, found))
    return sorted(identifier for _, identifier in best.values())


def hits_of_round(store: Store, number: int, method: str) -> list[str]:
    """Ids of a round's hits against the hull of a method as it stands."""
    evaluations = store.evaluations_of_round(number)
    found = store.crystals_by_id({record.crystal_id for record in evaluations if record.crystal_id}, method)
    rows = {identifier: stored[0].row for identifier, stored in found.items()}
    competing = {record.candidate_id: record.n_competing for record in store.predictions_of_round(number)}
    for record in evaluations:  # a round that an older program began did not keep what competed before it
        if competing.get(record.candidate_id) is None and record.crystal_id in rows:
            competing[record.candidate_id] = rows[record.crystal_id][Quantity.N_COMPETING]
    return hits_among(evaluations, rows, {identifier: n or 0 for identifier, n in competing.items()})


def update_hull(store: Store, method: str, *, changed: Sequence[Crystal] | None = None) -> ConvexHull:
    """Write distances to the hull for the crystals that `changed` ones can affect (all when None); returns the hull.

    A new entry can only move the hull of systems that contain all its elements.
    """
    entries = store.hull_entries(method)
    hull = ConvexHull(method, entries)
    if changed is not None:
        lowered = {frozenset(crystal.composition) for crystal in changed}
        entries = [entry for entry in entries if any(elements <= set(entry.composition) for elements in lowered)]
    compositions = [entry.composition for entry in entries]
    e_forms = [entry.e_form_per_atom for entry in entries]
    above = hull.e_above_hulls(compositions, e_forms)
    decomposition = hull.decomposition_energies(compositions, e_forms)
    store.update_hull_columns(
        method,
        [
            HullColumns(
                id=entry.id,
                e_above_hull=float(above[i]),
                decomposition_energy=float(decomposition[i]),
                decomposes_to=hull.decomposition(entry.composition, competing_only=True),
                n_competing=hull.n_competing(entry.composition),
            )
            for i, entry in enumerate(entries)
        ],
    )
    return hull


def _relaxed(record: EvaluationRecord) -> Crystal:
    if record.crystal is None:
        raise ValueError(f"evaluation of {record.candidate_id} converged without a crystal")
    return record.crystal
