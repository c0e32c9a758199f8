"""What predicted crystals are judged by: a hull of known phases, and what carries an ensemble's predictions over to it."""

from dataclasses import dataclass
from pathlib import Path

from flows.hull_table import read_hull
from flows.learning import MAX_CALIBRATION, spread_evenly, unrelaxed_examples
from flows.settings import Settings
from gnome.database.engine import database_exists
from gnome.database.store import Store
from gnome.models.ensemble import StructuralEnsemble
from gnome.stability.hull import ConvexHull
from pipelines.offset import Offset
from pipelines.screening import ScreeningSettings, fit_offset


@dataclass(frozen=True)
class KnownPhases:
    """A hull, and the offset from an ensemble's method to that of the hull where they differ."""

    hull: ConvexHull
    offset: Offset | None = None


def known_phases(
    settings: Settings, ensemble: StructuralEnsemble, table: Path | None, volumes: ScreeningSettings
) -> KnownPhases | None:
    """Read a table's phases under the ensemble's method, or the database's crystals.

    None where there is neither; of the database, those of the ensemble's method where it has any, else those of its last round's
    method, else those of the method it has most crystals of.  An offset is fitted at `volumes`.
    """
    if table is not None:
        return KnownPhases(read_hull(table, ensemble.method))
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
    offset = fit_offset(
        ensemble,
        [row.crystal for row in fitted],
        [row.e_form_per_atom for row in fitted],
        method=hull.method,
        settings=volumes,
        unrelaxed=unrelaxed_examples(hull.method, rows),
    )
    return KnownPhases(hull, offset)
