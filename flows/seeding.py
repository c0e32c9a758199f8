"""Giving a method the shipped seeds."""

import hashlib
from pathlib import Path

from flows.assess import crystal_record, update_hull
from flows.workspace import Workspace
from gnome.crystals.crystal import Crystal
from gnome.crystals.identity import same_crystal
from gnome.crystals.shards import read_shard
from gnome.database.records import CrystalRecord
from gnome.errors import InvalidInput
from gnome.quantities import Quantity
from gnome.shipped import shipped_data
from gnome.stability.method import Method


def add_seeds(workspace: Workspace) -> int:
    """Store the shipped seeds unless the evaluator's method has been given them; returns how many were new.

    Whatever else is there, imported crystals for example, stays, and a seed that is one of them is left out.  The seeds carry energies of
    the default evaluator; for another one nothing is stored (its seeds are imported with `gnome import`).
    """
    store, wanted = workspace.store, workspace.evaluator.method.label
    path = shipped_data() / "seeds.parquet"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    n = 0
    if not store.is_seeded(wanted, digest):
        records = _seeds(workspace, path, wanted)
        n = store.add_crystals(records)
        if records:
            store.note_seeding(wanted, digest)
    if n and (others := _earlier_methods(workspace)):
        workspace.listener.say(
            f"This version's method is {wanted}: its settings or elemental references are not those of {', '.join(others)}. Crystals of "
            "that stay in the database and are not on the new hull; import them as structures to have them there."
        )
    if n or store.has_unplaced(wanted):  # what stored them may have been killed before it told them where they stand
        update_hull(store, wanted)
    return n


def _earlier_methods(workspace: Workspace) -> list[str]:
    """Labels of other methods of the evaluator's code and functional that the database has crystals of."""
    own = workspace.evaluator.method
    return [
        label
        for label, method in workspace.store.methods().items()
        if label != own.label
        and (method.code, method.functional) == (own.code, own.functional)
        and workspace.store.hull_entries(label)
    ]


def _seeds(workspace: Workspace, path: Path, wanted: str) -> list[CrystalRecord]:
    crystals, columns, metadata = read_shard(path)
    try:
        method = Method.from_dict(metadata["method"])
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"{path}: its metadata name no method ({error}); get the file again") from None
    if method.label != wanted:
        return []
    imported: dict[str, list[Crystal]] = {}
    for stored in workspace.store.crystals_of(wanted):
        if stored.row[Quantity.ORIGIN] != "seed":
            imported.setdefault(stored.crystal.reduced_formula, []).append(stored.crystal)
    records = []
    with workspace.listener.stage("reading the seeds", len(crystals), "crystals") as count:
        for i, crystal in enumerate(crystals):
            if any(same_crystal(crystal, other) for other in imported.get(crystal.reduced_formula, ())):
                count()  # imported before the first round
                continue
            records.append(
                crystal_record(
                    crystal,
                    method,
                    e_form_per_atom=columns[Quantity.E_FORM_PER_ATOM][i],
                    energy_per_atom=columns[Quantity.ENERGY_PER_ATOM][i],
                    origin="seed",
                    source=columns["source"][i],
                )
            )
            count()
    return records
