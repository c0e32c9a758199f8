"""The gate: closest contacts equal a brute-force search, and every reason is reached."""

import time

import numpy as np
import pytest
from ase.neighborlist import neighbor_list

from gnome.crystals.convert import to_atoms
from gnome.crystals.crystal import Crystal
from gnome.crystals.validity import GateSettings, check_crystal, closest_contact, heights, is_valid
from gnome.errors import InvalidCrystal

CUBE = np.eye(3) * 4.0


def crystal(lattice: np.ndarray, coords: list[list[float]], z: int = 11) -> Crystal:
    return Crystal(lattice, np.full(len(coords), z), np.array(coords, dtype=float))


@pytest.mark.parametrize("seed", range(6))
def test_the_closest_contact_is_that_of_ase(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lattice = np.eye(3) * rng.uniform(2.0, 5.0) + rng.normal(scale=0.8, size=(3, 3))
    sample = crystal(lattice, (rng.random((rng.integers(1, 6), 3)) * 3 - 1).tolist())
    distances = neighbor_list("d", to_atoms(sample), 3.0)
    _, distance, _, _ = closest_contact(sample)
    assert distance == pytest.approx(distances.min() if len(distances) else np.inf)


def test_heights_are_volume_over_area() -> None:
    lattice = np.array([[4.0, 0, 0], [3.9, 1.0, 0], [0, 0, 5.0]])
    assert heights(lattice) == pytest.approx([20 / (5 * np.hypot(3.9, 1.0)), 1.0, 5.0])


REFUSED = {
    "not_finite": crystal(CUBE, [[np.nan, 0, 0]]),
    "too_many_atoms": crystal(CUBE * 100, [[k / 401, 0, 0] for k in range(401)]),
    "volume": crystal(CUBE * 0.1, [[0, 0, 0]]),
    "cell_shape": crystal(np.diag([0.5, 8.0, 8.0]), [[0, 0, 0]]),
    "overlap": crystal(CUBE, [[0, 0, 0], [0.0001, 0, 0]]),
    "unsupported_element": crystal(CUBE, [[0, 0, 0]], z=84),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_each_reason_is_reached(reason: str) -> None:
    with pytest.raises(InvalidCrystal) as caught:
        check_crystal(REFUSED[reason], elements=frozenset({11}))
    assert caught.value.reason == reason
    assert not is_valid(REFUSED[reason], elements=frozenset({11}))


def test_an_atom_too_near_to_its_own_image_overlaps() -> None:
    needle = crystal(np.diag([1.2, 9.0, 9.0]), [[0, 0, 0]])
    with pytest.raises(InvalidCrystal, match="overlap"):
        check_crystal(needle)


@pytest.mark.parametrize("scale", [1e-300, 1e-6, 1e6, 1e300])
def test_absurd_cells_are_refused_at_once(scale: float) -> None:
    started = time.monotonic()
    assert not is_valid(crystal(CUBE * scale, [[0, 0, 0], [0.5, 0.5, 0.5]]))
    assert not is_valid(crystal(np.diag([scale, 4.0, 4.0]), [[0, 0, 0]]), GateSettings())
    assert time.monotonic() - started < 2
