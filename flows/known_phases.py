"""What predicted crystals are judged by: a hull of known phases, and what carries an ensemble's predictions over to it."""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from flows.hull_table import read_hull
from flows.learning import MAX_CALIBRATION, spread_evenly, unrelaxed_examples
from flows.progress import Listener
from flows.settings import Settings
from gnome.atomic_write import atomic_write
from gnome.database.engine import database_exists
from gnome.database.store import Store
from gnome.errors import InvalidInput
from gnome.models.ensemble import StructuralEnsemble
from gnome.stability.hull import ConvexHull
from pipelines.offset import Offset
from pipelines.screening import Labelled, ScreeningSettings, fit_offset

_VERSION = 1
"""Of how offsets are fitted; those of another are fitted anew."""


@dataclass(frozen=True)
class KnownPhases:
    """A hull, and the offset from an ensemble's method to that of the hull where they differ."""

    hull: ConvexHull
    offset: Offset | None = None


def known_phases(
    settings: Settings, ensemble: StructuralEnsemble, table: Path | None, volumes: ScreeningSettings, listener: Listener
) -> KnownPhases | None:
    """Read a table's phases under the ensemble's method, or the database's crystals.

    None where there is neither; of the database, those of the ensemble's method where it has any, else those of its last round's
    method, else those of the method it has most crystals of.  An offset is fitted at `volumes`, and kept beside the database.
    """
    if table is not None:
        return KnownPhases(read_hull(table, ensemble.method, listener))
    if not database_exists(settings.database):
        return None
    with Store.open(settings.database, read_only=True) as store:
        rounds = store.rounds()
        wanted = [ensemble.method, *(str(one.settings["method"]) for one in rounds[-1:])]
        found = next(((label, entries) for label in wanted if (entries := store.hull_entries(label))), None)
        if found is None:
            found = max(
                ((label, store.hull_entries(label)) for label in store.methods()), key=lambda pair: len(pair[1]), default=None
            )
        if found is None or not found[1]:
            return None
        hull = ConvexHull(*found)
        rows = [] if hull.method == ensemble.method else list(store.training_rows(hull.method))
    if hull.method == ensemble.method:
        return KnownPhases(hull)
    usable = [row for row in rows if set(row.crystal.composition) <= ensemble.elements]
    if not usable:
        return None
    fitted = spread_evenly(usable, MAX_CALIBRATION)
    known = [row.crystal for row in fitted], [row.e_form_per_atom for row in fitted]
    offset = _offset(settings, ensemble, hull.method, known, unrelaxed_examples(hull.method, rows), volumes, listener)
    listener.say(f"Mind: {offset.note}.")
    return KnownPhases(hull, offset)


def _offset(
    settings: Settings,
    ensemble: StructuralEnsemble,
    method: str,
    known: Labelled,
    unrelaxed: Labelled,
    volumes: ScreeningSettings,
    listener: Listener,
) -> Offset:
    """Fit an offset, or read the one that was fitted on the same crystals before: predicting some hundred takes a while."""
    examples = [[[crystal.id for crystal in crystals], list(energies)] for crystals, energies in (known, unrelaxed)]
    decisive = [_VERSION, ensemble.model_id, ensemble.precision, method, asdict(volumes), examples]
    digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
    path = settings.data_folder / "offsets" / f"{ensemble.model_id}-{digest}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):  # none yet, or a damaged one
        return Offset.from_dict(json.loads(path.read_text(encoding="utf-8")))
    with listener.stage(f"carrying predictions over to {method}, once for these crystals", 1, "fit") as count:
        offset = fit_offset(ensemble, *known, method=method, settings=volumes, unrelaxed=unrelaxed)
        count()
    with suppress(OSError, InvalidInput), atomic_write(path) as temporary:  # a folder that cannot be written costs time alone
        temporary.write_text(json.dumps(offset.to_dict()) + "\n", encoding="utf-8")
    return offset
