"""Random structures with the energies that CHGNet relaxes them to, for `structural_scaling.py --others`.

    python data/prepare_training.py ../shared/data SHARDS
    python benchmarks/random_search_labels.py SHARDS/structures.parquet OUT.parquet [--formulas 50] [--structures-per-formula 8]

Formulas are of the test buckets, so that nothing of them is trained on; structures come from the compositional pipeline's random search,
unrelaxed.  Energies are CHGNet's own: networks trained on DFT are off by what the two methods differ in, too.
"""

import argparse
from pathlib import Path

import numpy as np

from dft_stub.chgnet import CHGNetEvaluator
from flows.evaluating import answers
from flows.proposing import SCARCE_RADIOACTIVE, random_structures
from gnome.crystals.formula import parse_formula
from gnome.crystals.shards import read_shard, write_shard
from gnome.models.datasets import split_by_formula
from gnome.quantities import Quantity
from pipelines.compositional import CompositionalPipeline, CompositionalSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("structures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--formulas", type=int, default=50)
    parser.add_argument("--structures-per-formula", type=int, default=8)
    parser.add_argument("--most-atoms", type=int, default=8, help="of a formula unit")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    _, columns, _ = read_shard(options.structures)
    names = list(columns[Quantity.REDUCED_FORMULA])
    evaluator = CHGNetEvaluator(workers=options.workers)
    usable = evaluator.elements - SCARCE_RADIOACTIVE
    compositions = {
        name: found
        for name in sorted({names[i] for i in split_by_formula(names).test})
        if sum((found := parse_formula(name)).values()) <= options.most_atoms and len(found) > 1 and set(found) <= usable
    }
    drawn = np.random.default_rng(options.seed).permutation(sorted(compositions))[: options.formulas].tolist()
    searching = random_structures(options.workers)
    try:
        settings = CompositionalSettings(n_formulas=options.formulas, n_structures=options.structures_per_formula)
        pipeline = CompositionalPipeline(searching, settings)
        limit = options.formulas * options.structures_per_formula
        proposed = list(pipeline.propose([dict(compositions[name]) for name in drawn], limit=limit, seed=options.seed))
    finally:
        searching.close()
    crystals = {candidate.id: candidate.crystal for candidate in proposed}
    print(f"{len(crystals)} random structures of {len({c.reduced_formula for c in crystals.values()})} formulas", flush=True)
    energies: dict[str, float] = {}
    for n, answer in enumerate(answers(evaluator, crystals), start=1):
        if answer.converged and answer.e_form_per_atom is not None:
            energies[answer.id] = answer.e_form_per_atom
        if n % 20 == 0:
            print(f"{n} relaxed, {len(energies)} converged", flush=True)
    kept = [crystals[name] for name in energies]
    labels = {Quantity.REDUCED_FORMULA: [one.reduced_formula for one in kept], Quantity.E_FORM_PER_ATOM: list(energies.values())}
    write_shard(options.out, kept, {str(name): values for name, values in labels.items()})
    print(f"{len(kept)} of {len(crystals)} converged")


if __name__ == "__main__":
    main()
