"""The program behind `PyXtalStructures`: draws one random crystal for each line it reads.

It runs in a process of its own because PyXtal can take very long or very much memory on unlucky combinations.
"""

import json
import os
import sys
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pyxtal.operations
from moyopy import Cell, MoyoDataset
from pyxtal.msg import Comp_CompatibilityError
from pyxtal.symmetry import Group

from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from pipelines.random_structures import RandomStructure, RandomStructureSettings, draw_volume, stream
from pipelines.symmetry import site_symmetry

_GROUP_DRAWS = 60
"""Space groups drawn until one can hold the atoms; P1 is taken when none can."""
_FACTOR = 1.1
"""PyXtal's own volume factor: structures are drawn at its default and rescaled afterwards."""


def draw_structure(
    composition: Mapping[int, int], settings: RandomStructureSettings, *, seed: int, index: int
) -> RandomStructure | None:
    """Draw a random crystal: formula units, space group, Wyckoff sites, coordinates, cell, volume; None after all attempts.

    Space groups come evenly from those that can hold the atoms.
    """
    rng = stream(composition, seed, index)
    for _ in range(settings.attempts):
        units = int(rng.choice(settings.formula_units(composition)))
        numbers = {z: n * units for z, n in sorted(composition.items())}
        group = next((g for g in rng.integers(1, 231, _GROUP_DRAWS).tolist() if _is_compatible(g, tuple(numbers.values()))), 1)
        crystal = _draw_crystal(numbers, group, int(rng.integers(2**31)))
        if crystal is None:
            continue
        drawn = draw_volume(crystal, settings, rng)
        if drawn is not None:
            return RandomStructure(
                crystal=drawn[0],
                index=index,
                space_group_number=site_symmetry(drawn[0]).space_group_number,
                formula_units=units,
                volume_factor=round(drawn[1], 6),
            )
    return None


@lru_cache(maxsize=256)
def _group(number: int) -> Group:
    return Group(number)


@lru_cache(maxsize=4096)
def _is_compatible(number: int, counts: tuple[int, ...]) -> bool:
    """Say whether the Wyckoff positions of a space group can hold these numbers of atoms in the primitive cell."""
    group = _group(number)
    return bool(group.check_compatible([count * group.cellsize() for count in counts])[0])


def _draw_crystal(numbers: Mapping[int, int], group: int, seed: int) -> Crystal | None:
    """One PyXtal crystal as its primitive cell; `numbers` count the atoms of that cell."""
    drawn = pyxtal.pyxtal()
    species = [SYMBOLS[z] for z in numbers]
    try:
        drawn.from_random(
            3, _group(group), species, list(numbers.values()), factor=_FACTOR, conventional=False, max_count=1, random_state=seed
        )
    except (Comp_CompatibilityError, RuntimeError):
        return None
    if not drawn.valid:
        return None
    cell = drawn.to_ase()
    try:
        primitive = MoyoDataset(
            Cell(cell.cell.tolist(), cell.get_scaled_positions().tolist(), cell.numbers.tolist()), symprec=1e-3
        ).prim_std_cell
    except ValueError:
        return None
    crystal = Crystal(np.array(primitive.basis), np.array(primitive.numbers), np.array(primitive.positions))
    order = np.argsort(crystal.atomic_numbers, kind="stable")
    crystal = Crystal(crystal.lattice, crystal.atomic_numbers[order], crystal.frac_coords[order])
    total = sum(numbers.values())
    is_whole = all(crystal.composition.get(z, 0) * total == n * crystal.n_atoms for z, n in numbers.items())
    return crystal if is_whole else None


def answer(question: Mapping[str, Any], settings: RandomStructureSettings) -> dict[str, Any]:
    """Answer one question in JSON values: the fields of a structure, or none when all attempts failed."""
    composition = {int(z): int(n) for z, n in question["composition"]}
    structure = draw_structure(composition, settings, seed=question["seed"], index=question["index"])
    if structure is None:
        return {}
    fields = {key: getattr(structure, key) for key in ("index", "space_group_number", "formula_units", "volume_factor")}
    return {"crystal": structure.crystal.to_dict(), **fields}


def main() -> None:
    """Answer questions until the input ends; the first line holds the settings."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print must not mix with the answers
    warnings.simplefilter("ignore")
    # PyXtal makes the same table of tolerances for every check of images, which takes half of all its time.
    pyxtal.operations.Tol_matrix = lru_cache(pyxtal.operations.Tol_matrix)
    settings: RandomStructureSettings | None = None
    for line in sys.stdin:
        question = json.loads(line)
        if settings is None:
            settings = RandomStructureSettings.from_dict(question)
            reply: dict[str, Any] = {"ready": True}
        else:
            reply = answer(question, settings)
        out.write(json.dumps(reply) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
