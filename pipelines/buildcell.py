"""Random structures by AIRSS's `buildcell` (GPL-2, installed by the user), one process for each draw.

Source: Pickard and Needs, J. Phys. Condens. Matter 23, 053201 (2011); the input keywords are those of the buildcell manual
(airss-docs.github.io/technical-reference/buildcell-manual) as the program of 2018 takes them.  What comes back passes the same gate as
every other random structure, and what the program says of itself, its user and its machine is not kept.

Two things the manual does not say.  VARVOL is the volume of the atoms as they are listed, before NUM multiplies them: a cell of V with n
atoms in k lines is asked for as V k / n.  And `#SEED=` with eight whole numbers makes the program's random numbers, so that the same seed
gives the same cell.
"""

import math
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import COVALENT_RADIUS, SYMBOLS
from gnome.crystals.formula import reduced_formula
from gnome.crystals.validity import GateSettings, check_crystal
from gnome.errors import GnomeError, InvalidCrystal, InvalidInput
from gnome.processes import ProcessLost, run_bounded
from pipelines.random_structures import RandomSearch, RandomStructure, RandomStructureSettings, stream
from pipelines.symmetry import site_symmetry
from pipelines.volumes import estimated_volume

MAX_OUTPUT: Final = 200_000
"""Bytes of output that are taken: a cell of 20 atoms has two thousand."""
MAX_PACKING: Final = 0.3
"""Most of a cell that is asked for to be filled with spheres as close as the gate allows: spheres put down at random one after the other
jam at 0.38 (Torquato, Uche, Stillinger, Phys. Rev. E 74, 061308 (2006)), and the program might never end."""
VARIED: Final = 0.05
"""The program makes a volume up to so much larger or smaller than the one asked for."""
OTHER_VOLUME: Final = 0.25
"""What is farther from it is another volume."""
_MARGIN: Final = 1.002
"""On distances: coordinates come back rounded."""
_BLOCK = re.compile(r"^\s*%BLOCK\s+(\w+)\s*$(.*?)^\s*%ENDBLOCK\s+\1\s*$", re.MULTILINE | re.DOTALL | re.IGNORECASE)
_LATTICES: Final = frozenset({"LATTICE_CART", "LATTICE_ABC"})
_POSITIONS: Final = frozenset({"POSITIONS_FRAC", "POSITIONS_ABS"})
_SEED = re.compile(r"^#\s*seed((?:\s+-?\d+){8})\s*$", re.MULTILINE)


def find_buildcell() -> str | None:
    """Path of the program, or None when it is not on the PATH."""
    return shutil.which("buildcell")


class BuildcellStructures:
    """Random crystals drawn by `buildcell`; a `RandomStructures`.

    `program` is a path or a name on the PATH.  Raises InvalidInput on construction when there is no such program.
    """

    name = "buildcell"
    is_reproducible = True

    def __init__(self, program: str = "buildcell", settings: RandomStructureSettings | None = None) -> None:
        """Find the program."""
        self.settings = settings or RandomStructureSettings()
        path = shutil.which(program)
        if path is None:
            raise InvalidInput(f"{program} is not on the PATH; install AIRSS, or draw structures with PyXtal")
        self._path = path

    def search(self, composition: Mapping[int, int], *, n: int, seed: int) -> RandomSearch:
        """Make at most n structures of a reduced composition.

        A draw that the gate refuses is repeated; what the program fails at is a loss, of which a formula has few.
        """
        name = reduced_formula(composition)
        if not self.settings.formula_units(composition):
            total = sum(composition.values())
            return RandomSearch(structures=(), failures=(f"{name}: {total} atoms, the limit is {self.settings.max_atoms}",))
        found: list[RandomStructure] = []
        failures: list[str] = []
        losses = 0
        for index in range(n):
            try:
                found.append(self._structure(composition, seed, index))
            except InvalidCrystal as problem:
                failures.append(
                    f"{name}, structure {index}: nothing passed the gate in {self.settings.attempts} attempts, the last: {problem}"
                )
            except (GnomeError, OSError) as problem:
                failures.append(f"{name}, structure {index}: {problem}")
                losses += 1
                if losses >= self.settings.max_losses:
                    failures.append(f"{name}: given up after {losses} losses")
                    break
        return RandomSearch(structures=tuple(found), failures=tuple(failures))

    def close(self) -> None:
        """Nothing is kept running."""

    def _structure(self, composition: Mapping[int, int], seed: int, index: int) -> RandomStructure:
        """Draw until the gate lets one through; raises InvalidCrystal after all attempts."""
        rng = stream(composition, seed, index)
        for _ in range(self.settings.attempts - 1):
            with suppress(InvalidCrystal):
                return self._draw(composition, index, rng)
        return self._draw(composition, index, rng)

    def _draw(self, composition: Mapping[int, int], index: int, rng: np.random.Generator) -> RandomStructure:
        units = int(rng.choice(self.settings.formula_units(composition)))
        amounts = {z: n * units for z, n in sorted(composition.items())}
        estimate = estimated_volume(amounts, self.settings.volumes)
        volume = float(rng.uniform(*volume_range(amounts, self.settings)))
        numbers = [int(number) for number in rng.integers(1, 2**31 - 1, 8)]
        crystal = self._answer(amounts, volume, numbers)
        check_crystal(crystal, self.settings.gate)
        return RandomStructure(
            crystal=crystal,
            index=index,
            space_group_number=site_symmetry(crystal).space_group_number,
            formula_units=units,
            volume_factor=round(crystal.volume / estimate, 6),
        )

    def _answer(self, amounts: Mapping[int, int], volume: float, seed: list[int]) -> Crystal:
        """Ask for a cell; raises InvalidInput where another is answered."""
        output = self._run(seed_cell(amounts, volume, self.settings.gate, seed=seed))
        crystal = parse_cell(output)
        if crystal.composition != amounts:
            raise InvalidInput(f"asked for {amounts} by atomic number, buildcell gave {crystal.composition}")
        if not abs(crystal.volume / volume - 1) <= OTHER_VOLUME:
            raise InvalidInput(
                f"asked for a cell of {volume:.1f} angstrom^3, buildcell gave {crystal.volume:.1f}; this version counts VARVOL otherwise, "
                "draw structures with PyXtal"
            )
        if (said := _SEED.search(output)) and (taken := [int(number) for number in said[1].split()]) != seed:
            raise InvalidInput(f"asked for the seed {seed}, buildcell took {taken}; draw structures with PyXtal")
        return crystal

    def _run(self, cell: str) -> str:
        """Run the program on a seed cell; its whole process group is killed when it takes too long or says too much."""
        try:
            output = run_bounded(
                [self._path],
                cell.encode(),
                seconds=self.settings.time_limit,
                memory_bytes=self.settings.memory_limit * 2**20,
                max_output=MAX_OUTPUT,
            )
        except ProcessLost as loss:
            raise InvalidInput(f"buildcell {loss}") from None
        return output.decode(errors="replace")


def least_distances(elements: list[int], gate: GateSettings) -> dict[tuple[int, int], float]:
    """Distances in angstrom, by pair of atomic numbers, at which the gate lets two atoms stand, with a margin for rounding."""
    pairs = [(a, b) for i, a in enumerate(elements) for b in elements[i:]]
    limits = {(a, b): gate.min_distance_fraction * (COVALENT_RADIUS[a] + COVALENT_RADIUS[b]) for a, b in pairs}
    return {pair: math.ceil(1000 * _MARGIN * max(limit, gate.min_distance)) / 1000 for pair, limit in limits.items()}


def volume_range(amounts: Mapping[int, int], settings: RandomStructureSettings) -> tuple[float, float]:
    """Least and largest volume of a cell with such atoms, angstrom^3; where they need more room than the settings give, as much as that.

    Both stay within the settings after the program has varied them.
    """
    estimate, gate = estimated_volume(amounts, settings.volumes), settings.gate
    diameters = least_distances(list(amounts), gate)
    filled = sum(n * math.pi / 6 * diameters[z, z] ** 3 for z, n in amounts.items())
    n_atoms = sum(amounts.values())
    least = max(settings.smallest_factor * estimate, gate.min_volume_per_atom * n_atoms, filled / MAX_PACKING) / (1 - VARIED)
    return least, max(least, settings.largest_factor * estimate / (1 + VARIED))


def seed_cell(amounts: Mapping[int, int], volume: float, gate: GateSettings, *, seed: list[int]) -> str:
    """Write the input of buildcell: atoms of the cell by atomic number, its volume in angstrom^3, the gate's distances, and the seed."""
    listed = volume * len(amounts) / sum(amounts.values())
    edge = listed ** (1 / 3)
    distances = [f"{SYMBOLS[a]}-{SYMBOLS[b]}={limit:.3f}" for (a, b), limit in least_distances(list(amounts), gate).items()]
    lines = [
        "%BLOCK LATTICE_CART",
        *(" ".join(f"{edge:.6f}" if row == column else "0" for column in range(3)) for row in range(3)),
        "%ENDBLOCK LATTICE_CART",
        "",
        f"#VARVOL={listed:.4f}",
        "",
        "%BLOCK POSITIONS_FRAC",
        *(f"{SYMBOLS[z]} 0.0 0.0 0.0 # {SYMBOLS[z]}1 % NUM={n}" for z, n in amounts.items()),
        "%ENDBLOCK POSITIONS_FRAC",
        "",
        "#NFORM=1",
        f"#SEED={' '.join(map(str, seed))}",
        "#SYMMOPS=1-4",
        f"#MINSEP={math.ceil(1000 * _MARGIN * gate.min_distance) / 1000:.3f} {' '.join(distances)}",
        "",
    ]
    return "\n".join(lines)


def parse_cell(text: str) -> Crystal:
    """Read a CASTEP cell: LATTICE_CART or LATTICE_ABC, and POSITIONS_FRAC or POSITIONS_ABS, in angstrom.

    Comments are left out.  Raises InvalidInput when a block is missing or malformed or there twice, a unit is another, or there is no
    such element.
    """
    found = _BLOCK.findall(text)
    blocks = {name.upper(): _rows(body) for name, body in found}
    if len(blocks) < len(found) or blocks.keys() >= _LATTICES or blocks.keys() >= _POSITIONS:
        raise InvalidInput("buildcell's output is no cell: lattice or positions stand there twice")
    try:
        if "LATTICE_CART" in blocks:
            lattice = np.array(blocks["LATTICE_CART"], dtype=np.float64)
        else:
            lengths, angles = np.array(blocks["LATTICE_ABC"], dtype=np.float64)
            lattice = _lattice_from_parameters(lengths, angles)
        rows = blocks.get("POSITIONS_FRAC") or blocks["POSITIONS_ABS"]
        symbols = [row[0] for row in rows]
        coords = np.array([row[1:4] for row in rows], dtype=np.float64)
        if "POSITIONS_FRAC" not in blocks:
            coords = coords @ np.linalg.inv(lattice)
        return Crystal.from_symbols(lattice, symbols, coords)
    except (KeyError, ValueError, IndexError, np.linalg.LinAlgError, InvalidCrystal) as problem:
        raise InvalidInput(f"buildcell's output is no cell: {problem!r}") from None


def _rows(body: str) -> list[list[str]]:
    """Words of the lines of a block, without comments, empty lines and a line that names angstrom as the unit."""
    words = [line.split("#")[0].split("!")[0].split() for line in body.splitlines()]
    return [row for row in words if row and [word.lower() for word in row] != ["ang"]]


def _lattice_from_parameters(lengths: NDArray[np.float64], angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cell vectors as rows, the first along x and the second in the xy plane; angles in degrees."""
    cos_alpha, cos_beta, cos_gamma = np.cos(np.radians(angles))
    sin_gamma = np.sin(np.radians(angles[2]))
    if not sin_gamma > 1e-6:
        raise ValueError(f"angles {angles.tolist()} close no cell")
    x, y = cos_beta, (cos_alpha - cos_beta * cos_gamma) / sin_gamma
    z_squared = 1 - x**2 - y**2
    if not z_squared > 0:
        raise ValueError(f"angles {angles.tolist()} close no cell")
    directions = np.array([[1, 0, 0], [cos_gamma, sin_gamma, 0], [x, y, np.sqrt(z_squared)]])
    return np.asarray(lengths[:, None] * directions)
