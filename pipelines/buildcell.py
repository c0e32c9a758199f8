"""Random structures by AIRSS's `buildcell` (GPL-2, installed by the user), one process for each structure.

Source: Pickard and Needs, J. Phys. Condens. Matter 23, 053201 (2011); the input keywords are those of the buildcell manual
(airss-docs.github.io/technical-reference/buildcell-manual).  All atoms of the cell are listed and NFORM is 1, so VARVOL is the volume of
the cell.  What comes back passes the same gate as every other random structure.

`buildcell` has no documented seed: formula units and volume follow ours, the coordinates do not, so its structures are kept by their
lineage but cannot be drawn again.
"""

import re
import shutil
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import COVALENT_RADIUS, SYMBOLS
from gnome.crystals.formula import reduced_formula
from gnome.crystals.validity import check_crystal
from gnome.errors import GnomeError, InvalidInput
from gnome.processes import ProcessLost, run_bounded
from pipelines.random_structures import RandomSearch, RandomStructure, RandomStructureSettings, stream
from pipelines.symmetry import site_symmetry
from pipelines.volumes import estimated_volume

MAX_OUTPUT = 200_000
"""Bytes of output that are taken: a cell of 20 atoms has two thousand."""
_BLOCK = re.compile(r"^\s*%BLOCK\s+(\w+)\s*$(.*?)^\s*%ENDBLOCK\s+\1\s*$", re.MULTILINE | re.DOTALL | re.IGNORECASE)


def find_buildcell() -> str | None:
    """Path of the program, or None when it is not on the PATH."""
    return shutil.which("buildcell")


class BuildcellStructures:
    """Random crystals drawn by `buildcell`; a `RandomStructures`.

    `program` is a path or a name on the PATH.  Raises InvalidInput on construction when there is no such program.
    """

    name = "buildcell"
    is_reproducible = False

    def __init__(self, program: str = "buildcell", settings: RandomStructureSettings | None = None) -> None:
        """Find the program."""
        self.settings = settings or RandomStructureSettings()
        path = shutil.which(program)
        if path is None:
            raise InvalidInput(f"{program} is not on the PATH; install AIRSS, or draw structures with PyXtal")
        self._path = path

    def search(self, composition: Mapping[int, int], *, n: int, seed: int) -> RandomSearch:
        """Make at most n structures of a reduced composition."""
        name = reduced_formula(composition)
        if not self.settings.formula_units(composition):
            total = sum(composition.values())
            return RandomSearch(structures=(), failures=(f"{name}: {total} atoms, the limit is {self.settings.max_atoms}",))
        found: list[RandomStructure] = []
        failures: list[str] = []
        for index in range(n):
            try:
                found.append(self._draw(composition, seed, index))
            except (GnomeError, OSError) as problem:
                failures.append(f"{name}, structure {index}: {problem}")
                if len(failures) >= self.settings.max_losses:
                    failures.append(f"{name}: given up after {len(failures)} losses")
                    break
        return RandomSearch(structures=tuple(found), failures=tuple(failures))

    def close(self) -> None:
        """Nothing is kept running."""

    def _draw(self, composition: Mapping[int, int], seed: int, index: int) -> RandomStructure:
        rng = stream(composition, seed, index)
        units = int(rng.choice(self.settings.formula_units(composition)))
        amounts = {z: n * units for z, n in sorted(composition.items())}
        estimate = estimated_volume(amounts, self.settings.volumes)
        factor = float(rng.uniform(self.settings.smallest_factor, self.settings.largest_factor))
        output = self._run(seed_cell(amounts, factor * estimate, self.settings, length_factor=factor ** (1 / 3)))
        crystal = parse_cell(output)
        if crystal.composition != amounts:
            raise InvalidInput(f"asked for {amounts} by atomic number, buildcell gave {crystal.composition}")
        check_crystal(crystal, self.settings.gate)
        return RandomStructure(
            crystal=crystal,
            index=index,
            space_group_number=site_symmetry(crystal).space_group_number,
            formula_units=units,
            volume_factor=round(crystal.volume / estimate, 6),
        )

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


def seed_cell(amounts: Mapping[int, int], volume: float, settings: RandomStructureSettings, *, length_factor: float) -> str:
    """Write the input of buildcell: atoms of the cell by atomic number, its volume in angstrom^3, and the least distances.

    Least distances shrink with `length_factor` below 1: at a small volume the full ones cannot be met, and buildcell would never end.
    """
    edge = volume ** (1 / 3)
    shrink = settings.gate.min_distance_fraction * min(1.0, length_factor)
    distances = [
        f"{SYMBOLS[a]}-{SYMBOLS[b]}={shrink * (COVALENT_RADIUS[a] + COVALENT_RADIUS[b]):.3f}"
        for i, a in enumerate(amounts)
        for b in list(amounts)[i:]
    ]
    lines = [
        "%BLOCK LATTICE_CART",
        *(" ".join(f"{edge:.6f}" if row == column else "0" for column in range(3)) for row in range(3)),
        "%ENDBLOCK LATTICE_CART",
        "",
        f"#VARVOL={volume:.4f}",
        "",
        "%BLOCK POSITIONS_FRAC",
        *(f"{SYMBOLS[z]} 0.0 0.0 0.0 # {SYMBOLS[z]}1 % NUM={n}" for z, n in amounts.items()),
        "%ENDBLOCK POSITIONS_FRAC",
        "",
        "#NFORM=1",
        "#SYMMOPS=1-4",
        f"#MINSEP={settings.gate.min_distance:.3f} {' '.join(distances)}",
        "",
    ]
    return "\n".join(lines)


def parse_cell(text: str) -> Crystal:
    """Read a CASTEP cell: LATTICE_CART or LATTICE_ABC, and POSITIONS_FRAC or POSITIONS_ABS, in angstrom.

    Raises InvalidInput when a block is missing or malformed, InvalidCrystal for an unknown element.
    """
    blocks = {name.upper(): _rows(body) for name, body in _BLOCK.findall(text)}
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
    except (KeyError, ValueError, IndexError, np.linalg.LinAlgError) as problem:
        raise InvalidInput(f"buildcell's output is no cell: {problem!r}") from None
    return Crystal.from_symbols(lattice, symbols, coords)


def _rows(body: str) -> list[list[str]]:
    """Words of the lines of a block, without comments, empty lines and a line that names a unit."""
    words = [line.split("#")[0].split("!")[0].split() for line in body.splitlines()]
    return [row for row in words if len(row) > 1]


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
