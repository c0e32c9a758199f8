"""One place to work: a database, its models, and the evaluator that labels its energies."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from dft_stub.evaluator import Evaluator
from dft_stub.registry import make_evaluator
from dft_stub.workers import WorkerLimits
from flows.device import device_of
from flows.progress import Listener, Silent
from flows.settings import Settings
from gnome.database.engine import database_exists
from gnome.database.leases import round_holder
from gnome.database.ledger import Ledger
from gnome.database.records import ModelRecord
from gnome.database.store import Store
from gnome.errors import EvaluatorUnavailable, InvalidCheckpoint
from gnome.models.checkpoint import read_card
from gnome.models.ensemble import StructuralEnsemble
from gnome.models.formula_ensemble import CompositionalEnsemble
from gnome.shipped import shipped_data
from gnome.stability.hull import ConvexHull

SHIPPED = "shipped:"
"""Prefix of a model's path that is counted from the folder of shipped ensembles."""
KINDS = ("structural", "compositional")
"""Kinds of ensembles, of each of which one is in use."""


@dataclass(frozen=True)
class Workspace:
    """What every stage is given.

    `evaluator_name` decides the method, and so the hull.
    """

    store: Store
    settings: Settings
    evaluator_name: str
    listener: Listener = field(default_factory=Silent)

    @cached_property
    def evaluator(self) -> Evaluator:
        """The evaluator; its worker processes start with the first crystal it is given."""
        return evaluator_of(self.settings, self.evaluator_name)

    @property
    def ledger(self) -> Ledger:
        """The ledger of the database."""
        return Ledger(self.store)

    def hull(self, method: str, *, before_round: int | None = None) -> ConvexHull:
        """Build the hull of a method, as it stands or as it stood before a round.

        Raises EvaluatorUnavailable when there is no entry of the method at all.
        """
        entries = self.store.hull_entries(method, before_round=before_round)
        if not entries:
            raise EvaluatorUnavailable(
                f"{self.store.location} holds no crystal of method {method}; import crystals with `gnome import` under this evaluator first"
            )
        return ConvexHull(method, entries)

    def structural_model(self, model_id: str | None = None) -> StructuralEnsemble:
        """Load a structural ensemble by its id; without one that in use, the shipped one where no other was promoted."""
        record = self._current("structural") if model_id is None else self.store.model(model_id)
        ensemble = StructuralEnsemble.load(self.model_path(record), device_of(self.settings))
        self._check(ensemble.card, record)
        return ensemble

    def filter_model(self, model_id: str) -> StructuralEnsemble:
        """Load a structural ensemble once, however many shards ask for it; who has it must not train it."""
        record = self.store.model(model_id)
        return _shared_structural(self.model_path(record), record.sha256, device_of(self.settings))

    def formula_filter(self, model_id: str) -> CompositionalEnsemble:
        """Load a compositional ensemble once, however many shards ask for it."""
        record = self.store.model(model_id)
        return _shared_compositional(self.model_path(record), record.sha256, device_of(self.settings))

    def formula_model(self, model_id: str | None = None) -> CompositionalEnsemble:
        """Load a compositional ensemble by its id; without one that in use."""
        record = self._current("compositional") if model_id is None else self.store.model(model_id)
        ensemble = CompositionalEnsemble.load(self.model_path(record), device_of(self.settings))
        self._check(ensemble.card, record)
        return ensemble

    def model_path(self, record: ModelRecord) -> Path:
        """Find the weights of a model; raises InvalidCheckpoint where they are not those that the database speaks of, or gone."""
        path = model_file(record, self.settings)
        if not path.exists():
            raise InvalidCheckpoint(
                f"{path}: the weights of model {record.id}, which {self.store.location} names, are not there; restore the file, or put "
                f"another in use with `gnome models rollback {record.kind}` or `gnome models promote`"
            )
        self._check(read_card(path), record)
        return path

    def register_shipped_models(self) -> None:
        """Enter the shipped ensembles into the database and put them in use where none is."""
        for kind in KINDS:
            record = shipped_record(kind)
            self.store.add_model(record)
            current = self.store.current_model(kind)
            if current is None or is_outdated(current, self.settings):
                self.store.promote_model(record.id)

    def _check(self, card: Mapping[str, Any], record: ModelRecord) -> None:
        """Refuse weights that are not the ones the database speaks of."""
        if card["sha256"] != record.sha256:
            raise InvalidCheckpoint(
                f"{model_file(record, self.settings)}: not the weights of model {record.id} that {self.store.location} uses; restore the "
                "file, or use the version of this program that it came with"
            )

    def _current(self, kind: str) -> ModelRecord:
        record = self.store.current_model(kind)
        if record is None or is_outdated(record, self.settings):
            self.register_shipped_models()
            record = self.store.current_model(kind)
            assert record is not None  # noqa: S101 - the line above puts one in use
        return record


def shipped_record(kind: str) -> ModelRecord:
    """Describe the shipped ensemble of a kind as a database does."""
    name = f"{kind}.safetensors"
    card = read_card(shipped_data() / "ensembles" / name)
    return ModelRecord(
        id=card["sha256"][:16],
        kind=kind,
        path=SHIPPED + name,
        sha256=card["sha256"],
        card=card,
        metrics=card.get("metrics", {}),
    )


def model_file(record: ModelRecord, settings: Settings) -> Path:
    """Where the weights of a model are, or should be: at its path, or in the data folder, wherever that is now."""
    path = Path(record.path)
    if record.path.startswith(SHIPPED):
        path = shipped_data() / "ensembles" / record.path.removeprefix(SHIPPED)
    kept = settings.data_folder / "models" / f"{record.kind}-{record.id}.safetensors"
    return kept if kept.exists() and card_digest(path) != record.sha256 else path


def card_digest(path: Path) -> str | None:
    """Digest of the weights that the card beside a file names; None where there is no card, or the file is gone."""
    try:
        return str(read_card(path)["sha256"]) if path.exists() else None
    except InvalidCheckpoint:
        return None


def is_outdated(record: ModelRecord, settings: Settings) -> bool:
    """Whether a model shipped with an earlier version of this program, which has brought another in its place."""
    return record.path.startswith(SHIPPED) and read_card(model_file(record, settings))["sha256"] != record.sha256


def evaluator_of(settings: Settings, name: str) -> Evaluator:
    """Make an evaluator by name; the elemental references of ASE calculators are kept in the data folder."""
    if name.startswith("recorded:"):
        return make_evaluator(name, wait=True)
    limits = WorkerLimits(seconds=settings.evaluation_seconds, memory_bytes=int(settings.evaluation_memory_gb * 2**30))
    if name == "chgnet":
        return make_evaluator(name, workers=settings.workers, limits=limits, device=str(device_of(settings)))
    kept = settings.data_folder / "references" / f"{name}.json"
    return make_evaluator(name, workers=settings.workers, limits=limits, references_path=kept)


@contextmanager
def open_workspace(
    settings: Settings,
    *,
    evaluator: str | None = None,
    listener: Listener | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Iterator[Workspace]:
    """Open the database of these settings; at the end it is closed and worker processes are ended.

    With `resume`, an unfinished round's own evaluator is used, whatever is asked for; where none is given, that of the last round.
    With `quiet` nothing is said of going on with it.
    """
    listener = listener or Silent()
    with Store.open(settings.database) as store:
        rounds = store.rounds() if resume else []
        name = evaluator or (str(rounds[-1].settings["evaluator"]) if rounds else settings.evaluator)
        unfinished = rounds[-1] if rounds and rounds[-1].state == "running" else None
        if unfinished is not None:
            name = str(unfinished.settings["evaluator"])
            if not quiet and round_holder(store) is None:  # one that is being run is refused, with its holder
                kept = unfinished.settings
                system = "-".join(kept.get("elements") or ()) or "all elements"
                listener.say(
                    f"Going on with round {unfinished.number}, which was interrupted, as it began ({system}, budget "
                    f"{kept.get('budget')}, seed {kept.get('seed')}); what is asked for otherwise is left aside. "
                    "`gnome campaign abandon` gives the round up."
                )
        workspace = Workspace(store, settings, name, listener)
        try:
            yield workspace
        finally:
            if (made := vars(workspace).get("evaluator")) is not None:
                made.close()


def current_weights(settings: Settings, kind: str) -> Path:
    """Weights of the ensemble of a kind in use; the shipped ones where there is no database yet.

    Raises DatabaseUnavailable when there is one that cannot be read: its ensemble may be another.  Raises InvalidCheckpoint where the
    ensemble's weights are gone or others have taken their place.
    """
    shipped = shipped_data() / "ensembles" / f"{kind}.safetensors"
    if not database_exists(settings.database):
        return shipped
    with Store.open(settings.database, read_only=True) as store:
        record = store.current_model(kind)
        if record is None or is_outdated(record, settings):
            return shipped
        return Workspace(store, settings, settings.evaluator).model_path(record)


@lru_cache(maxsize=2)
def _shared_structural(path: Path, sha256: str, device: torch.device) -> StructuralEnsemble:
    """Load weights once a process, however many workspaces and shards ask for them; `sha256` tells files of one name apart."""
    del sha256
    return StructuralEnsemble.load(path, device)


@lru_cache(maxsize=2)
def _shared_compositional(path: Path, sha256: str, device: torch.device) -> CompositionalEnsemble:
    """The same for formulas."""
    del sha256
    return CompositionalEnsemble.load(path, device)
