"""Properties of identity that hold for any crystal."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gnome.crystals.convert import from_structure, to_structure
from gnome.crystals.crystal import Crystal
from gnome.crystals.identity import fingerprint, keys_to_search, same_crystal
from gnome.crystals.validity import is_valid


@st.composite
def crystals(draw: st.DrawFn) -> Crystal:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_atoms = draw(st.integers(1, 5))
    numbers = rng.choice([3, 8, 12, 26, 55], size=n_atoms)
    lattice = np.diag(rng.uniform(2.5, 6.0, size=3)) + rng.normal(scale=0.7, size=(3, 3))
    crystal = Crystal(lattice, numbers, rng.random((n_atoms, 3)))
    assume(is_valid(crystal))
    return crystal


MATRICES = st.sampled_from([
    [[2, 0, 0], [0, 1, 0], [0, 0, 1]],
    [[1, 1, 0], [0, 1, 0], [0, 0, 1]],
    [[1, 0, 0], [3, 1, 0], [0, -1, 2]],
    [[0, 1, 0], [0, 0, 1], [1, 0, 0]],
])  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(crystals(), MATRICES, st.integers(0, 2**32 - 1))
def test_the_bucket_is_that_of_the_crystal_and_not_of_its_description(
    crystal: Crystal, matrix: list[list[int]], seed: int
) -> None:
    structure = to_structure(crystal)
    structure.make_supercell(matrix)
    other = from_structure(structure)
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))  # with a mirror in half of the cases
    order = rng.permutation(other.n_atoms)
    described = Crystal(other.lattice @ rotation, other.atomic_numbers[order], other.frac_coords[order] + rng.random(3))
    assume(is_valid(described))
    assert fingerprint(described) in keys_to_search(crystal)
    assert fingerprint(crystal) in keys_to_search(described)
    assert same_crystal(crystal, described)


@settings(max_examples=25, deadline=None)
@given(crystals(), st.integers(0, 2**32 - 1))
def test_small_displacements_stay_within_reach_of_the_keys(crystal: Crystal, seed: int) -> None:
    steps = np.random.default_rng(seed).normal(size=(crystal.n_atoms, 3))
    steps *= 0.01 / np.linalg.norm(steps, axis=1)[:, None]
    rattled = Crystal(crystal.lattice, crystal.atomic_numbers, crystal.frac_coords + steps @ np.linalg.inv(crystal.lattice))
    assume(is_valid(rattled))
    assert fingerprint(rattled) in keys_to_search(crystal)
    assert same_crystal(crystal, rattled)
