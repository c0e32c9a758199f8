"""How fast the structural generators propose, beside pymatgen's Substitutor on the same parents.

    python benchmarks/pipelines_generators.py [--parents 200] [--candidates 5000]

Parents are the prototype library that pymatgen carries.  pymatgen gets oxidation states from the same guesses, and a few parents only,
because it takes long; the figure compared is candidates per second of one process.
"""

import argparse
import os
import platform
import time
import warnings

import numpy as np
from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY
from pymatgen.core import Element, Species
from pymatgen.core.structure_prediction.substitutor import Substitutor

from gnome.crystals.convert import to_structure
from gnome.crystals.crystal import Crystal
from gnome.crystals.validity import is_valid
from pipelines.oxidation import guess_oxidation_states
from pipelines.structural import IonicSubstitution, PartialSubstitution

N_PYMATGEN = 6


def load_parents(n: int) -> list[Crystal]:
    parents = []
    for entry in AFLOW_PROTOTYPE_LIBRARY:
        structure = entry["snl"].structure
        if len(structure) <= 20 and structure.is_ordered:
            crystal = Crystal(structure.lattice.matrix, np.array([site.specie.Z for site in structure]), structure.frac_coords)
            if is_valid(crystal):
                parents.append(crystal)
    return parents[:n]


def time_pymatgen(parents: list[Crystal]) -> tuple[int, float]:
    """Whole substitutions of the first parents whose rounded guesses are all in pymatgen's table."""
    substitutor = Substitutor(threshold=1e-3)
    listed = {str(species) for species in substitutor.get_allowed_species()}
    decorated = []
    for parent in parents:
        states = guess_oxidation_states(parent.composition)
        charges = {Element.from_Z(z).symbol: round(state) for z, state in states.items()}
        if charges and {str(Species(symbol, charge)) for symbol, charge in charges.items()} <= listed:
            structure = to_structure(parent)
            structure.add_oxidation_state_by_element(charges)
            decorated.append(structure)
    started, n_found = time.perf_counter(), 0
    for structure in decorated[:N_PYMATGEN]:
        targets = substitutor.pred_from_comp(structure.composition)
        n_found += len(targets)
    return n_found, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parents", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=5000)
    arguments = parser.parse_args()
    parents = load_parents(arguments.parents)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {len(parents)} parents")
    print(f"{'generator':24s} {'candidates':>10s} {'seconds':>8s} {'per second':>10s}")
    rows = []
    for generator in (IonicSubstitution(), PartialSubstitution()):
        started = time.perf_counter()
        n_found = len(list(generator.propose(parents, limit=arguments.candidates, seed=0)))
        rows.append((generator.name, n_found, time.perf_counter() - started))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows.append(("pymatgen compositions", *time_pymatgen(parents)))
    for name, n_found, seconds in rows:
        print(f"{name:24s} {n_found:10d} {seconds:8.2f} {n_found / seconds:10.0f}")


if __name__ == "__main__":
    main()
