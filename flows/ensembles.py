"""Which ensembles a database has, and which of them is in use: `gnome models`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from flows.settings import Settings
from flows.workspace import KINDS, SHIPPED, Workspace, card_digest, model_file, shipped_record
from gnome.atomic_write import atomic_write
from gnome.database.engine import database_exists
from gnome.database.records import ModelRecord
from gnome.database.store import Store
from gnome.errors import InvalidCheckpoint, InvalidInput
from gnome.models.checkpoint import load_ensemble
from gnome.models.ensemble import StructuralEnsemble
from gnome.models.formula_ensemble import CompositionalEnsemble

Row = dict[str, Any]

_ENSEMBLES: Final[dict[str, type[StructuralEnsemble] | type[CompositionalEnsemble]]] = {
    "structural": StructuralEnsemble,
    "compositional": CompositionalEnsemble,
}
IN_USE: Final = "in use"
_SHORTEST_ID: Final = 4


def list_models(settings: Settings) -> list[Row]:
    """Describe every ensemble: those of the database, the oldest first, and the shipped ones that it has not met; changes nothing."""
    records: list[ModelRecord] = []
    if database_exists(settings.database):
        with Store.open(settings.database, read_only=True) as store:
            records = store.model_history()
    with_one = {record.kind for record in records if record.status == "promoted"}
    known = {record.id for record in records}
    shipped = [shipped_record(kind) for kind in KINDS]
    rows = [_row(record, settings, in_use=record.kind not in with_one) for record in shipped if record.id not in known]
    return [*rows, *(_row(record, settings, in_use=record.status == "promoted") for record in records)]


def _row(record: ModelRecord, settings: Settings, *, in_use: bool) -> Row:
    card = record.card
    path = model_file(record, settings)
    return {
        "id": record.id,
        "kind": record.kind,
        "status": IN_USE if in_use else _status(record),
        "origin": origin_of(record),
        "method": card.get("method"),
        "methods": _labels(card),
        "n_members": card.get("n_members"),
        "trained_on": card.get("trained_on"),
        "held_out": card.get("held_out") or card.get("split"),
        "parent": record.parent_id,
        "round": record.round,
        "metrics": dict(record.metrics),
        "errors": _errors(record),
        "path": str(path),
        "file": file_state(record, path),
    }


def _status(record: ModelRecord) -> str:
    """Say what a model is that is not in use."""
    if record.promoted_at is not None:
        return "was in use"
    return "set aside" if record.status == "retired" else "candidate"


def origin_of(record: ModelRecord) -> str:
    """Tell where a model came from: shipped, retrained (after a round), or own (`gnome models use`)."""
    if record.path.startswith(SHIPPED):
        return "shipped"
    return "own" if record.round is None else "retrained"


def file_state(record: ModelRecord, path: Path) -> str:
    """Tell whether a model's weights are where they should be: there, missing, or another (the card beside them names other weights)."""
    if not path.exists():
        return "missing"
    return "there" if card_digest(path) == record.sha256 else "another"


def _errors(record: ModelRecord) -> str:
    """One line on how far a model was off where that was measured, eV/atom."""
    metrics = record.metrics
    if isinstance(measured := metrics.get("validation_mae"), dict):
        before = metrics.get("validation_mae_before")
        than = "" if before is None else f", before {before:.4f}"
        return f"{measured['value']:.4f} on {metrics.get('n_validation')} held out{than}"
    own = [(name, one["mae"]["value"]) for name, one in metrics.items() if isinstance(one, dict) and "mae" in one]
    said = [f"{mae:.4f} ({name})" for name, mae in own if not name.startswith("linear model")]
    return said[0] if said else "not measured"


def use_ensemble(workspace: Workspace, path: Path, *, method: str = "") -> ModelRecord:
    """Copy an ensemble into the data folder, enter it into the database, and put it in use for its kind.

    `method` is what its energies are expected to be of, when that is none this database knows.
    Raises InvalidCheckpoint for weights that cannot be used, InvalidInput for a method that is not expected.
    """
    if path.suffix != ".safetensors":
        raise InvalidInput(f"{path}: weights end in .safetensors; their card lies beside them as .json")
    members, card = load_ensemble(path)
    kind = _kind_of(path, card)
    _ENSEMBLES[kind].load(path)  # what these ask for besides
    if not all(bool(torch.isfinite(tensor).all()) for member in members for tensor in member.state_dict().values()):
        raise InvalidCheckpoint(f"{path}: holds weights that are no numbers; its training ran away, train it anew")
    _check_method(workspace, path, card, kind, method)
    workspace.register_shipped_models()
    record = ModelRecord(
        id=card["sha256"][:16],
        kind=kind,
        path=str(workspace.settings.data_folder / "models" / f"{kind}-{card['sha256'][:16]}.safetensors"),
        sha256=card["sha256"],
        card=card,
        metrics=card.get("metrics", {}),
    )
    known = next((one for one in workspace.store.model_history() if one.id == record.id), None)
    if known is not None and dict(known.card) != card:
        differing = sorted(name for name in {*known.card, *card} if known.card.get(name) != card.get(name))
        raise InvalidInput(
            f"{path}: its weights are model {record.id} of {workspace.store.location}, with another card ({', '.join(differing)} differ); "
            f"`gnome models promote {record.id}` uses that one"
        )
    kept = known or record
    if file_state(kept, model_file(kept, workspace.settings)) != "there":
        _copy(path, Path(record.path), card)
    workspace.store.add_model(record)
    return workspace.store.promote_model(record.id)


def _kind_of(path: Path, card: Row) -> str:
    for kind, ensemble in _ENSEMBLES.items():
        if card["kind"] in ensemble.kinds:
            return kind
    raise InvalidCheckpoint(f"{path}: an ensemble of kind {card['kind']}, which no round uses; expected {' or '.join(KINDS)}")


def _check_method(workspace: Workspace, path: Path, card: Row, kind: str, expected: str) -> None:
    """Refuse energies of a method that is misspelt, or not the one that was named."""
    labels = _labels(card)
    if expected and expected not in labels:
        raise InvalidInput(f"{path}: holds energies of {', '.join(dict.fromkeys(labels))}, not of {expected}")
    cards = [shipped_record(name).card for name in KINDS] + [one.card for one in workspace.store.model_history(kind)]
    known = set(workspace.store.methods()).union(*map(_labels, cards))
    if not expected and not known & set(labels):
        raise InvalidInput(
            f"{path}: holds energies of {labels[0]!r}, which neither this database nor the shipped ensembles know "
            f"({', '.join(sorted(known))}); if that is right, say so: --method {labels[0]}"
        )


def _labels(card: Mapping[str, Any]) -> list[str]:
    """Methods that an ensemble answers under."""
    return [str(one["method"]) for one in (card, *card.get("schemes", ())) if "method" in one]


def _copy(path: Path, target: Path, card: Row) -> None:
    """Copy weights and card, in this order: a card without its weights is never there."""
    if path.resolve() == target.resolve():
        return
    blob, text = path.read_bytes(), path.with_suffix(".json").read_bytes()
    for place, content in ((target, blob), (target.with_suffix(".json"), text)):
        with atomic_write(place) as temporary:
            temporary.write_bytes(content)
    if load_ensemble(target)[1] != card:
        raise InvalidCheckpoint(f"{path}: changed while it was copied; try again")


def find_model(workspace: Workspace, identifier: str) -> ModelRecord:
    """Find a model by its id or the beginning of it; raises InvalidInput where there is none, or several."""
    models = workspace.store.model_history()
    found = [record for record in models if record.id.startswith(identifier.lower())]
    if len(found) == 1 and len(identifier) >= _SHORTEST_ID:
        return found[0]
    if found:
        why = "give more of it" if len(found) > 1 else f"give at least {_SHORTEST_ID} of its characters"
        raise InvalidInput(f"id {identifier!r}: begins that of {', '.join(one.id for one in found)}; {why}")
    ids = ", ".join(record.id for record in models) or "none"
    raise InvalidInput(f"no model {identifier!r} in {workspace.store.location}; there are {ids}")


def promote(workspace: Workspace, identifier: str) -> ModelRecord:
    """Put an ensemble of the database in use for its kind.

    Raises InvalidInput where there is none of this id, InvalidCheckpoint where its weights are not what they were.
    """
    workspace.register_shipped_models()
    record = find_model(workspace, identifier)
    load_ensemble(workspace.model_path(record))
    return workspace.store.promote_model(record.id)


def rollback(workspace: Workspace, kind: str) -> tuple[ModelRecord, list[str]]:
    """Put the ensemble that was in use before back in use; returns it, and the ids of those passed over because their weights are gone.

    Raises InvalidInput where there was none before.
    """
    if kind not in KINDS:
        raise InvalidInput(f"kind {kind!r}, expected {' or '.join(KINDS)}")
    workspace.register_shipped_models()
    current = workspace.store.current_model(kind)
    assert current is not None and current.promoted_at is not None  # noqa: S101, PT018 - the line above puts one in use
    passed: list[str] = []
    for record in before(workspace.store.model_history(kind), current):
        try:
            load_ensemble(workspace.model_path(record))
        except InvalidCheckpoint:
            passed.append(record.id)
            continue
        return workspace.store.take_back_model(current.id, record.id), passed
    gone = f"; the weights of {', '.join(passed)} are gone" if passed else ""
    raise InvalidInput(f"no other {kind} ensemble was in use before {current.id}{gone}; `gnome models list` shows what there is")


def before(records: Sequence[ModelRecord], current: ModelRecord) -> list[ModelRecord]:
    """Models that were in use before the one that is, the latest first."""
    earlier = [record for record in records if record.promoted_at is not None and record.id != current.id]
    return sorted(earlier, key=lambda record: record.promoted_at or 0.0, reverse=True)
