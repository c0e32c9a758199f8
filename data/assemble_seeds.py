"""Turn relaxations into the shipped files: seeds, references, validation set, and a list of what was left out and why."""

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dft_stub.references import write_references
from dft_stub.relaxer import Relaxation
from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.identity import prototype_label, same_crystal, space_group_number
from gnome.crystals.shards import write_shard
from gnome.quantities import PLAUSIBLE_E_FORM, Quantity
from gnome.stability.method import Method
from gnome.stability.references import ElementalReferences


class Job(Protocol):
    """What was relaxed."""

    crystal: Crystal
    source: str
    observed: bool


class Relaxed(NamedTuple):
    """A relaxed crystal on its way into a file."""

    crystal: Crystal
    energy_per_atom: float
    source: str
    observed: bool


MAX_SEED_E_FORM = 1.0
"""eV/atom: a known crystal that comes out higher is one whose listed structure, or CHGNet, is wrong."""

Outcomes = Sequence[tuple[Job, Relaxation]]
Refusals = list[tuple[str, str, str]]


def write_seeds(outcomes: Outcomes, method: Method, folder: Path) -> list[Crystal]:
    """Write seeds.parquet, references.json and seeds_left_out.csv; returns the seeds in the order of the file."""
    refusals: Refusals = []
    unique = _without_duplicates(_converged(outcomes, refusals), refusals)
    references = _references(unique, method)
    seeds = _plausible(_without_idle_forms(unique, references), references, refusals, highest=MAX_SEED_E_FORM)
    columns = {**_columns(seeds, references), "source": [seed.source for seed in seeds]}
    crystals = [seed.crystal for seed in seeds]
    columns[Quantity.SPACE_GROUP_NUMBER] = [space_group_number(crystal) for crystal in crystals]
    columns[Quantity.PROTOSTRUCTURE] = [prototype_label(crystal) for crystal in crystals]
    metadata = {"method": method.to_dict(), "references": references.to_dict(), "n_relaxed": len(outcomes)}
    write_shard(folder / "seeds.parquet", crystals, columns, metadata)
    write_references(folder / "references.json", references, method)
    _write_refusals(folder / "seeds_left_out.csv", refusals)
    return crystals


def write_validation(outcomes: Outcomes, method: Method, folder: Path) -> None:
    """Write validation.parquet: crystals as they were generated, energies of what they relax to."""
    references = ElementalReferences.from_dict(json.loads((folder / "references.json").read_text()))
    refusals: Refusals = []
    kept = _plausible(_converged(outcomes, refusals), references, refusals)
    started = {job.source: job.crystal for job, _ in outcomes}
    columns = {**_columns(kept, references), "lineage": [relaxed.source for relaxed in kept]}
    crystals = [started[relaxed.source] for relaxed in kept]
    columns[Quantity.ID] = [crystal.id for crystal in crystals]
    columns["relaxed_volume_per_atom"] = [relaxed.crystal.volume_per_atom for relaxed in kept]
    metadata = {"method": method.to_dict(), "references": references.to_dict(), "n_relaxed": len(outcomes)}
    write_shard(folder / "validation.parquet", crystals, columns, metadata)
    _write_refusals(folder / "validation_left_out.csv", refusals)


def _converged(outcomes: Outcomes, refusals: Refusals) -> list[Relaxed]:
    kept = []
    for job, outcome in outcomes:
        if outcome.converged and outcome.crystal is not None and outcome.energy_per_atom is not None:
            kept.append(Relaxed(outcome.crystal, outcome.energy_per_atom, job.source, job.observed))
        else:
            refusals.append((job.source, str(outcome.failure), outcome.message))
    return kept


def _without_duplicates(relaxed: list[Relaxed], refusals: Refusals) -> list[Relaxed]:
    """Keep the lowest of crystals that relaxed into the same one, the first of those within a meV/atom, in the order of the input."""
    by_formula: dict[str, list[Relaxed]] = defaultdict(list)
    for candidate in sorted(relaxed, key=lambda candidate: round(candidate.energy_per_atom, 3)):
        kept = by_formula[candidate.crystal.reduced_formula]
        twin = next((position for position, other in enumerate(kept) if same_crystal(other.crystal, candidate.crystal)), None)
        if twin is None:
            kept.append(candidate)
            continue
        refusals.append((candidate.source, "duplicate", f"relaxes into the same crystal as {kept[twin].source}"))
        kept[twin] = kept[twin]._replace(observed=kept[twin].observed or candidate.observed)
    survivors = {survivor.source: survivor for group in by_formula.values() for survivor in group}
    return [survivors[candidate.source] for candidate in relaxed if candidate.source in survivors]


def _references(relaxed: list[Relaxed], method: Method) -> ElementalReferences:
    energies: dict[int, float] = {}
    for candidate in relaxed:
        if len(candidate.crystal.composition) == 1:
            z = int(candidate.crystal.atomic_numbers[0])
            energies[z] = min(energies.get(z, candidate.energy_per_atom), candidate.energy_per_atom)
    return ElementalReferences(method=method.label, energies=energies)


def _without_idle_forms(relaxed: list[Relaxed], references: ElementalReferences) -> list[Relaxed]:
    """Leave out forms of elements that nobody has seen, unless one is the reference."""
    return [
        candidate
        for candidate in relaxed
        if candidate.observed or candidate.energy_per_atom == references.energies[int(candidate.crystal.atomic_numbers[0])]
    ]


def _plausible(
    relaxed: list[Relaxed], references: ElementalReferences, refusals: Refusals, highest: float = PLAUSIBLE_E_FORM[1]
) -> list[Relaxed]:
    kept = []
    for candidate in relaxed:
        if missing := set(candidate.crystal.composition) - references.elements:
            names = ", ".join(SYMBOLS[z] for z in sorted(missing))
            refusals.append((candidate.source, "no reference", f"no relaxed form of {names}"))
            continue
        e_form = references.formation_energy_per_atom(candidate.crystal.composition, candidate.energy_per_atom)
        if PLAUSIBLE_E_FORM[0] <= e_form <= highest:
            kept.append(candidate)
        else:
            refusals.append((candidate.source, "implausible", f"formation energy {e_form:.3f} eV/atom"))
    return kept


def _columns(relaxed: list[Relaxed], references: ElementalReferences) -> dict[str, list[Any]]:
    energies = [candidate.energy_per_atom for candidate in relaxed]
    compositions = [candidate.crystal.composition for candidate in relaxed]
    return {
        Quantity.ID: [candidate.crystal.id for candidate in relaxed],
        Quantity.REDUCED_FORMULA: [candidate.crystal.reduced_formula for candidate in relaxed],
        Quantity.ENERGY_PER_ATOM: energies,
        Quantity.E_FORM_PER_ATOM: [
            references.formation_energy_per_atom(composition, energy)
            for composition, energy in zip(compositions, energies, strict=True)
        ],
    }


def _write_refusals(path: Path, refusals: Refusals) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("source", "reason", "message"))
        writer.writerows(refusals)
