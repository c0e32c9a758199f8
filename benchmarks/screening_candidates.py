"""Candidates for `structural_screening.py`: substitutions in Materials Project crystals, each with the energy of a hull at its composition.

    python data/prepare_training.py ../shared/data SHARDS
    python benchmarks/screening_candidates.py SHARDS/structures.parquet ../shared/data/mp/mp_hull_entries.csv.gz OUT.parquet [--n 20000]
    python benchmarks/screening_candidates.py ... NEW.parquet --seed 7 --without OUT.parquet      # which no design was chosen by

Half are partial substitutions, half whole ones, as in a round; none of a formula that is on record.  A machine with GPUs needs neither
pymatgen nor the hull any more.
"""

import argparse
import csv
import gzip
from pathlib import Path

import numpy as np

from flows.proposing import SCARCE_RADIOACTIVE
from gnome.crystals.formula import parse_formula, reduced_formula
from gnome.crystals.shards import read_shard, write_shard
from gnome.stability.hull import ConvexHull, HullEntry
from pipelines.structural import IonicSubstitution, PartialSubstitution, StructuralSettings

METHOD = "pbe-mp2020"


def read_compounds(path: Path) -> ConvexHull:
    """Build a hull of compounds; elements are at 0."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [
            (row["material_id"], parse_formula(row["formula"]), float(row["e_form_per_atom"])) for row in csv.DictReader(file)
        ]
    elements = {z for _, composition, _ in rows for z in composition}
    entries = [HullEntry(id=f"element {z}", composition={z: 1}, e_form_per_atom=0.0) for z in sorted(elements)]
    entries += [HullEntry(id=name, composition=found, e_form_per_atom=energy) for name, found, energy in rows if len(found) > 1]
    return ConvexHull(METHOD, entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("structures", type=Path)
    parser.add_argument("hull", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", type=Path, default=None, help="candidates of a first set, whose compositions are left out")
    options = parser.parse_args()
    hull = read_compounds(options.hull)
    crystals, columns, _ = read_shard(options.structures)
    rng = np.random.default_rng(options.seed)
    parents = [crystals[i] for i in rng.permutation(np.flatnonzero(np.array(columns["source"]) == "mp"))]
    known = frozenset(reduced_formula(entry.composition) for entry in hull.entries)
    bounds = StructuralSettings(max_atoms=20, elements=hull.elements - SCARCE_RADIOACTIVE)
    candidates = []
    for i, kind in enumerate((PartialSubstitution, IonicSubstitution)):
        share = options.n // 2 if i == 0 else options.n - len(candidates)
        candidates += list(kind(known_formulas=known, settings=bounds).propose(parents, limit=share, seed=options.seed))
    if options.without is not None:
        before = set(read_shard(options.without)[1]["reduced_formula"])
        candidates = [candidate for candidate in candidates if candidate.crystal.reduced_formula not in before]
    energies = hull.energies([candidate.crystal.composition for candidate in candidates])
    names = [candidate.crystal.reduced_formula for candidate in candidates]
    write_shard(
        options.out,
        [candidate.crystal for candidate in candidates],
        {"hull_energy": energies.tolist(), "reduced_formula": names},
    )
    print(f"{len(candidates):,} candidates of {len(set(names)):,} compositions")


if __name__ == "__main__":
    main()
