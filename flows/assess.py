"""What evaluations mean: which crystals are new, where they lie on the hull, and what that does to the others."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gnome.crystals.crystal import Crystal
from gnome.crystals.identity import fingerprint, keys_to_search, prototype_label, same_crystal, space_group_number
from gnome.database.records import Assessment, CrystalRecord, EvaluationRecord, HullColumns
from gnome.database.store import Store
from gnome.quantities import STABLE_TOLERANCE
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
        source=source,
    )


def assess(store: Store, evaluations: Iterable[EvaluationRecord], hull_before: ConvexHull, number: int) -> Assessed:
    """Compare converged evaluations, in the order given, with all crystals known before the round and with each other."""
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


def is_hit(record: EvaluationRecord) -> bool:
    """Say whether an evaluation found what the round looks for: converged, structurally novel, on or below the hull before it."""
    return bool(
        record.converged
        and record.novel
        and record.e_above_hull_before is not None
        and record.e_above_hull_before <= STABLE_TOLERANCE
    )


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
            )
            for i, entry in enumerate(entries)
        ],
    )
    return hull


def _relaxed(record: EvaluationRecord) -> Crystal:
    if record.crystal is None:
        raise ValueError(f"evaluation of {record.candidate_id} converged without a crystal")
    return record.crystal
