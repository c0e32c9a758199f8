"""What a round found, said so that a chemist can judge it: what each crystal competes with, what speaks against it, what is known."""

from collections.abc import Mapping
from typing import Any

from gnome.database.query import query
from gnome.database.records import CandidateRecord, RoundRecord
from gnome.database.store import Store
from gnome.quantities import NEAR_HULL_TOLERANCE, Quantity
from pipelines.standing import Doubt, Standing

GROUPS = ("hit", "near the hull", "doubtful", "other")
"""Of finds, in the order in which they are shown: on the hull and supported; within 50 meV/atom; in doubt; further above."""


def finds(store: Store, record: RoundRecord) -> list[dict[str, Any]]:
    """New crystals of a round as rows by `Quantity` names, the surest first.

    Beside the columns of the database each has `n_competing_before` (the round: its finds do not support each other), `is_hit`,
    `supported`, `doubts` (in words), `group`, `known_in` (methods under which the database had its composition before the round) and
    `parent_formula`.
    """
    rows = query(store, f"_gnome_round = {record.number}")
    parents = store.crystals_by_id({row[Quantity.PARENT] for row in rows if row[Quantity.PARENT]})
    candidates = store.candidates(row["candidate_id"] for row in rows if row["candidate_id"])
    known = store.methods_of_formulas({row[Quantity.REDUCED_FORMULA] for row in rows}, before_round=record.number)
    hits = set((record.summary or {}).get("hits", ()))
    before = {one.candidate_id: one.n_competing for one in store.predictions_of_round(record.number)}
    for row in rows:
        found = parents.get(row[Quantity.PARENT] or "")
        n_before = before.get(row["candidate_id"] or "")
        row["n_competing_before"] = row[Quantity.N_COMPETING] if n_before is None else n_before
        doubts = doubts_of(row, candidates.get(row["candidate_id"] or ""))
        row["parent_formula"] = found[0].row[Quantity.REDUCED_FORMULA] if found else ""
        row["is_hit"] = row[Quantity.ID] in hits
        row[Quantity.SUPPORTED.value] = Doubt.ELEMENTS_ONLY not in doubts
        row["doubts"] = [str(doubt) for doubt in doubts]
        row["known_in"] = known.get(row[Quantity.REDUCED_FORMULA], [])
        row["group"] = _group(row)
    return sorted(rows, key=_order)


def doubts_of(row: Mapping[str, Any], candidate: CandidateRecord | None) -> tuple[Doubt, ...]:
    """What speaks against a crystal that was found, what its round expected of it included."""
    parameters = {} if candidate is None else candidate.parameters
    standing = Standing(
        n_competing=row["n_competing_before"] or 0,
        formula_check=row[Quantity.FORMULA_CHECK],
        p_stable=row[Quantity.P_STABLE],
        charge_balanced=bool(parameters.get("charge_balanced", True)),
    )
    return standing.doubts()


def _group(row: Mapping[str, Any]) -> str:
    above = row[Quantity.E_ABOVE_HULL]
    if above is None or above > NEAR_HULL_TOLERANCE:
        return "other"
    if row["doubts"]:
        return "doubtful"
    return "hit" if row["is_hit"] else "near the hull"


def _order(row: Mapping[str, Any]) -> tuple[int, float, float, str]:
    above, p_stable = row[Quantity.E_ABOVE_HULL], row[Quantity.P_STABLE]
    unknown = 9.0
    return (
        GROUPS.index(row["group"]),
        -(0.0 if p_stable is None else p_stable),
        unknown if above is None else above,
        row[Quantity.ID],
    )
