"""Relax stored discoveries once more with CHGNet through ASE alone, from the candidate as it was proposed, and compare energies.

    python benchmarks/evaluations_against_ase.py sqlite:///gnome.db --crystals 5

Nothing of `dft_stub` takes part: CHGNet's own calculator, ASE's FIRE and FrechetCellFilter at the stored criterion, elemental references
from the lowest elemental crystal in the database.  One thread, as the evaluator uses: a candidate that starts on a saddle point leaves it
by rounding errors, and another number of threads, which sums in another order, may take it elsewhere.  Ends with 1 if an energy differs
by more than the tolerance.
"""

import argparse
import sys
import warnings
from collections.abc import Iterable, Iterator

import torch
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from chgnet.model.dynamics import CHGNetCalculator

from gnome.crystals.convert import to_atoms
from gnome.crystals.crystal import Crystal
from gnome.database.records import TrainingRow
from gnome.database.store import Store

FMAX = 0.03
MAX_STEPS = 400
COLUMNS = "id                formula      atoms  stored e_form  fresh e_form  difference / meV/atom"


def lowest_elements(rows: list[TrainingRow]) -> dict[int, float]:
    """Lowest stored energy_per_atom of each element, eV/atom."""
    lowest: dict[int, float] = {}
    for row in rows:
        if len(row.crystal.composition) == 1 and row.energy_per_atom is not None:
            (z,) = row.crystal.composition
            lowest[z] = min(row.energy_per_atom, lowest.get(z, float("inf")))
    return lowest


def fresh_energies(candidates: Iterable[Crystal]) -> Iterator[float]:
    """Energies eV/atom of candidates relaxed by ASE."""
    torch.set_num_threads(1)
    calculator = CHGNetCalculator(use_device="cpu")
    for candidate in candidates:
        atoms = to_atoms(candidate)
        atoms.calc = calculator
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, on how CHGNet takes the volume
            FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=FMAX, steps=MAX_STEPS)
            yield float(atoms.get_potential_energy()) / len(atoms)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("database")
    parser.add_argument("--crystals", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=2.0, help="meV/atom")
    given = parser.parse_args()
    with Store.open(given.database, read_only=True) as store:
        (method,) = [label for label in store.methods() if label.startswith("chgnet")]
        known = list(store.training_rows(method))
    elements = lowest_elements(known)
    found = [(row, row.unrelaxed) for row in known if row.unrelaxed is not None]
    step = max(1, len(found) // given.crystals)
    found = found[::step][: given.crystals]
    print(COLUMNS)
    worst = 0.0
    for (row, _), energy in zip(found, fresh_energies(candidate for _, candidate in found), strict=True):
        crystal = row.crystal
        e_form = energy - sum(n * elements[z] for z, n in crystal.composition.items()) / crystal.n_atoms
        difference = 1000 * (e_form - row.e_form_per_atom)
        worst = max(worst, abs(difference))
        what = f"{row.id:16}  {crystal.reduced_formula:11}  {crystal.n_atoms:5}"
        print(f"{what}  {row.e_form_per_atom:13.4f}  {e_form:12.4f}  {difference:10.3f}")
    print(f"{len(found)} crystals, largest difference {worst:.3f} meV/atom")
    return int(not found or worst > given.tolerance)


if __name__ == "__main__":
    sys.exit(main())
