"""Filling an empty database with the shipped seeds."""

from flows.assess import crystal_record, update_hull
from flows.workspace import Workspace
from gnome.crystals.shards import read_shard
from gnome.errors import InvalidInput
from gnome.quantities import Quantity
from gnome.shipped import shipped_data
from gnome.stability.method import Method


def seed_if_empty(workspace: Workspace) -> int:
    """Store the shipped seeds where the evaluator's method has no crystal yet; returns how many were new.

    The seeds carry energies of the default evaluator; for another one nothing is stored (its seeds are imported with `gnome import`).
    """
    wanted = workspace.evaluator.method.label
    if workspace.store.hull_entries(wanted):
        if workspace.store.has_unplaced(wanted):  # what stored them was killed before it told them where they stand
            update_hull(workspace.store, wanted)
        return 0
    path = shipped_data() / "seeds.parquet"
    crystals, columns, metadata = read_shard(path)
    try:
        method = Method.from_dict(metadata["method"])
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"{path}: its metadata name no method ({error}); get the file again") from None
    if method.label != wanted:
        return 0
    with workspace.listener.stage("reading the seeds", len(crystals), "crystals") as count:
        records = []
        for i, crystal in enumerate(crystals):
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
    n = workspace.store.add_crystals(records)
    update_hull(workspace.store, wanted)
    return n
