"""Reading extended XYZ, one structure after the other; one that is not what it announces costs itself alone."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

import ase.io
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from gnome.crystals.convert import from_atoms
from gnome.crystals.crystal import Crystal
from gnome.crystals.entries import check_count
from gnome.errors import InvalidCrystal
from gnome.quantities import Quantity

_COUNT: Final = re.compile(r"\s*\d{1,9}\s*")


@dataclass
class _Lines:
    """Lines of a file, some of which may be put back."""

    file: TextIO
    most: int
    waiting: list[str] = field(default_factory=list)

    def next(self) -> str:
        return self.waiting.pop() if self.waiting else self.file.readline(self.most)

    def put_back(self, *lines: str) -> None:
        self.waiting += reversed(lines)

    def skip_to_next(self) -> None:
        """Go on at the next number that stands before a line with a lattice."""
        before = self.next()
        while line := self.next():
            if "Lattice=" in line and _COUNT.fullmatch(before):
                self.put_back(before, line)
                return
            before = line


Block = tuple[int, list[str]] | InvalidCrystal
"""Number of atoms and the lines that follow, or why a block is refused."""


def read_blocks(path: Path, *, max_atoms: int, max_line: int) -> Iterator[Block]:
    """Yield the blocks of a file; lines are cut at `max_line` characters."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:  # a byte that is no text costs its own block
        lines = _Lines(file, max_line)
        while header := lines.next():
            if not header.strip():
                continue
            if not _COUNT.fullmatch(header):
                yield InvalidCrystal("malformed", "a number of atoms was expected here; read on at the next structure")
                lines.skip_to_next()
                continue
            n_atoms = int(header)
            try:
                check_count(n_atoms, max_atoms)
            except InvalidCrystal as error:
                yield error
                lines.skip_to_next()
                continue
            block = [lines.next() for _ in range(n_atoms + 1)]
            behind = lines.next()
            lines.put_back(behind)
            if behind.strip() and not _COUNT.fullmatch(behind):
                yield InvalidCrystal(
                    "malformed", f"{n_atoms} atoms are announced, more or fewer are there; read on at the next structure"
                )
                lines.put_back(*block[1:])
                lines.skip_to_next()
                continue
            yield n_atoms, block


def crystal_of(n_atoms: int, lines: list[str]) -> tuple[Crystal, dict[str, Any]]:
    """Read one block; returns the crystal and what stands beside it."""
    if not lines[-1].strip():
        raise InvalidCrystal("truncated", f"{n_atoms} atoms are announced, fewer are there; the file is cut short")
    if any("\udc80" <= character <= "\udcff" for line in lines for character in line):
        raise InvalidCrystal("malformed", "holds text that is not UTF-8; save the file as UTF-8")
    if len(re.findall(r"(?:^|\s)Lattice=", lines[0])) > 1:
        raise InvalidCrystal("malformed", "Lattice= stands there more than once; keep one")
    try:
        atoms = ase.io.read(io.StringIO(f"{n_atoms}\n{''.join(lines)}"), format="extxyz")
    except KeyError as error:  # of a symbol
        symbol = str(error).strip("'")
        reason = "isotope" if symbol in {"D", "T"} else "unsupported_element"
        raise InvalidCrystal(reason, f"{symbol[:20]!r}: not an element symbol") from None
    _check_columns(atoms, lines)
    fields: dict[str, Any] = {str(name): value for name, value in atoms.info.items() if isinstance(value, str | int | float)}
    if atoms.calc is not None and "energy" in atoms.calc.results:
        fields[Quantity.ENERGY_PER_ATOM] = float(atoms.calc.results["energy"]) / n_atoms
    return from_atoms(atoms), fields


def _check_columns(atoms: Atoms, lines: list[str]) -> None:
    """Refuse sites that are not occupied once, and elements of which two columns say different things."""
    for name, values in atoms.arrays.items():
        if name.lower() in {"occupancy", "occupancies", "occ"} and not np.allclose(values, 1.0):
            raise InvalidCrystal("disordered", f"the column {name} holds other occupancies than 1; give an ordered crystal")
    columns = _PROPERTIES.search(lines[0])
    places, start = {}, 0
    for name, width in re.findall(r"([^:]+):[A-Z]:(\d+):?", columns[1] if columns else ""):
        places[name], start = start, start + int(width)
    if columns and not {"pos", "positions"} & places.keys():
        raise InvalidCrystal("malformed", f"no column pos among {', '.join(places)}; positions are needed")
    if {"species", "Z"} <= places.keys():
        for line in lines[1:]:
            words = line.split()
            symbol, number = words[places["species"]], words[places["Z"]]
            if not number.isdecimal() or int(number) >= len(chemical_symbols) or chemical_symbols[int(number)] != symbol:
                raise InvalidCrystal("malformed", f"the columns species and Z disagree: {symbol} and {number}; keep one")


_PROPERTIES: Final = re.compile(r'Properties="?([^\s"]+)')
