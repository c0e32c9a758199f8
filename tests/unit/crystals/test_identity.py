"""What is the same crystal and what is not."""

import logging

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from gnome.crystals.convert import from_structure, to_structure
from gnome.crystals.crystal import Crystal
from gnome.crystals.identity import (
    fingerprint,
    keys_to_search,
    primitive_crystal,
    prototype_label,
    same_crystal,
    space_group_number,
)

QUARTZ = Structure.from_spacegroup(
    "P3_221", Lattice.hexagonal(4.913, 5.405), ["Si", "O"], [[0.4697, 0, 0], [0.4135, 0.2669, 0.1191]]
)
SPINEL = Structure.from_spacegroup(
    "Fd-3m", Lattice.cubic(8.083), ["Mg", "Al", "O"], [[0, 0, 0], [0.625, 0.625, 0.625], [0.3875, 0.3875, 0.3875]]
).get_primitive_structure()
PEROVSKITE = Structure.from_spacegroup(
    "Pm-3m", Lattice.cubic(3.905), ["Sr", "Ti", "O"], [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]
)
CRYSTALS = [from_structure(structure) for structure in (QUARTZ, SPINEL, PEROVSKITE)]


def moved(crystal: Crystal, distance: float, seed: int = 0) -> Crystal:
    """Move every atom by that many angstrom, in random directions."""
    directions = np.random.default_rng(seed).normal(size=(crystal.n_atoms, 3))
    steps = distance * directions / np.linalg.norm(directions, axis=1)[:, None]
    return Crystal(crystal.lattice, crystal.atomic_numbers, crystal.frac_coords + steps @ np.linalg.inv(crystal.lattice))


def supercell(crystal: Crystal, matrix: list[list[int]]) -> Crystal:
    structure = to_structure(crystal)
    structure.make_supercell(matrix)
    return from_structure(structure)


def permuted(crystal: Crystal, seed: int = 0) -> Crystal:
    rng = np.random.default_rng(seed)
    order = rng.permutation(crystal.n_atoms)
    return Crystal(crystal.lattice, crystal.atomic_numbers[order], crystal.frac_coords[order] + rng.random(3))


def mirrored(crystal: Crystal) -> Crystal:
    return Crystal(crystal.lattice * np.array([1, 1, -1]), crystal.atomic_numbers, crystal.frac_coords)


def turned(crystal: Crystal) -> Crystal:
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    return Crystal(crystal.lattice @ rotation, crystal.atomic_numbers, crystal.frac_coords)


SAME = {
    "supercell": lambda crystal: supercell(crystal, [[2, 0, 0], [0, 1, 0], [0, 0, 1]]),
    "skewed basis": lambda crystal: supercell(crystal, [[1, 2, 0], [0, 1, 0], [0, -1, 1]]),
    "permuted and shifted": permuted,
    "mirrored": mirrored,
    "turned": turned,
    "rattled": lambda crystal: moved(crystal, 0.01),
    "slightly larger": lambda crystal: crystal.scaled(1.02),
    "all at once": lambda crystal: moved(mirrored(turned(permuted(supercell(crystal, [[1, 1, 0], [0, 2, 0], [0, 0, 1]])))), 0.01),
}


@pytest.mark.parametrize("change", SAME, ids=list(SAME))
@pytest.mark.parametrize("crystal", CRYSTALS, ids=lambda crystal: crystal.reduced_formula)
def test_other_descriptions_of_a_crystal_are_the_same(crystal: Crystal, change: str) -> None:
    other = SAME[change](crystal)
    assert same_crystal(crystal, other)
    assert same_crystal(other, crystal)
    assert fingerprint(other) in keys_to_search(crystal)


@pytest.mark.parametrize("crystal", CRYSTALS, ids=lambda crystal: crystal.reduced_formula)
def test_half_an_angstrom_is_another_crystal_though_the_matcher_says_not(crystal: Crystal) -> None:
    other = moved(crystal, 0.5, seed=4)
    assert not same_crystal(crystal, other)
    assert not same_crystal(supercell(crystal, [[2, 0, 0], [0, 1, 0], [0, 0, 1]]), other)


def test_the_matcher_alone_is_too_lenient() -> None:
    crystal = CRYSTALS[1]
    assert StructureMatcher().fit(to_structure(crystal), to_structure(moved(crystal, 0.5, seed=4)))


def test_polymorphs_and_exchanged_elements_differ() -> None:
    zincblende = from_structure(Structure.from_spacegroup("F-43m", Lattice.cubic(5.41), ["Zn", "S"], [[0, 0, 0], [0.25] * 3]))
    wurtzite = from_structure(
        Structure.from_spacegroup(
            "P6_3mc", Lattice.hexagonal(3.82, 6.26), ["Zn", "S"], [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.375]]
        )
    )
    assert not same_crystal(zincblende, wurtzite)
    inverse = Structure.from_spacegroup("Fm-3m", Lattice.cubic(6), ["Ni", "Mn", "Sn"], [[0.25] * 3, [0, 0, 0], [0.5] * 3])
    x_alloy = Structure.from_spacegroup(
        "F-43m", Lattice.cubic(6), ["Ni", "Ni", "Mn", "Sn"], [[0, 0, 0], [0.25] * 3, [0.5] * 3, [0.75] * 3]
    )
    assert inverse.composition.reduced_formula == x_alloy.composition.reduced_formula
    assert not same_crystal(from_structure(inverse), from_structure(x_alloy))


def test_another_volume_is_another_crystal() -> None:
    assert not same_crystal(CRYSTALS[2], CRYSTALS[2].scaled(1.1))


def test_space_groups_and_labels_do_not_depend_on_the_cell(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for crystal in (CRYSTALS[1], supercell(CRYSTALS[1], [[2, 0, 0], [0, 1, 0], [0, 0, 1]])):
            assert space_group_number(crystal) == 227
            assert prototype_label(crystal) == "A2BC4_cF56_227_c_b_e:Al-Mg-O" or prototype_label(crystal).startswith(
                "A2BC4_cF56_227_"
            )
            assert primitive_crystal(crystal).n_atoms == 14
    assert not caplog.records, "moyopy's remark on supercells is not passed on"


def test_what_has_no_symmetry_has_the_label_of_its_sites() -> None:
    crystal = moved(CRYSTALS[2], 0.3, seed=2)
    assert space_group_number(crystal) == 1
    assert prototype_label(crystal).startswith("A3BC_aP5_1_")
