"""What a round began with, and what its stages have left for those after them."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Final

from flows.records import candidate_from
from flows.settings import RoundSettings
from flows.workspace import Workspace
from gnome.models.ensemble import StructuralEnsemble
from gnome.models.formula_ensemble import CompositionalEnsemble
from pipelines.candidate import Candidate
from pipelines.offset import Offset

Result = dict[str, Any]
"""What the ledger keeps of a shard."""

_BEFORE_IT_WAS_KEPT: Final[dict[str, Any]] = {
    "second_look": False,
    "over_volumes": "lowest",
    "acquisition": "greedy",
    "formula_check": False,
    "charge_balanced": False,
}
"""What rounds do that began before a setting was kept with them."""


def round_settings(workspace: Workspace, number: int) -> RoundSettings:
    """Settings that the round began with."""
    stored = _BEFORE_IT_WAS_KEPT | dict(workspace.store.round(number).settings)
    known = {field.name for field in fields(RoundSettings)}  # the rest is the round's own, or an older program's
    return RoundSettings.from_dict({name: value for name, value in stored.items() if name in known})


def round_method(workspace: Workspace, number: int) -> str:
    """Label of the method whose hull the round works on."""
    return str(workspace.store.round(number).settings["method"])


def round_model(workspace: Workspace, number: int) -> StructuralEnsemble:
    """Load the ensemble that the round began with, whatever has been promoted since."""
    return workspace.filter_model(str(workspace.store.round(number).settings["model"]))


def formula_judge(workspace: Workspace, number: int) -> CompositionalEnsemble | None:
    """The compositional ensemble that may doubt the round's candidates; None where the round has none."""
    if not round_settings(workspace, number).formula_check:
        return None
    model = workspace.store.round(number).settings.get("formula_model")
    return None if model is None else workspace.formula_filter(str(model))


def offset_of(workspace: Workspace, number: int) -> Offset | None:
    """The offset that the round's screening uses."""
    stored = workspace.ledger.result(number, "calibrate") or {}
    return Offset.from_dict(stored["offset"]) if stored.get("offset") else None


def chosen(workspace: Workspace, number: int) -> list[str]:
    """Ids that the budget is spent on, the best first."""
    return list((workspace.ledger.result(number, "select") or {}).get("chosen", ()))


def load_candidates(workspace: Workspace, ids: Sequence[str]) -> list[Candidate]:
    """Candidates by their ids, in that order."""
    found = workspace.store.candidates(ids)
    return [candidate_from(found[identifier]) for identifier in ids]


def n_pieces(n: int, size: int) -> int:
    """Number of pieces of at most that size; one of nothing."""
    return max(1, -(-n // size))
