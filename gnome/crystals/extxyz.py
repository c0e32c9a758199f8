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
from gnome.crystals.energy_fields import check_stated_energy, number
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
    columns = _columns(lines[0])
    try:
        atoms = ase.io.read(io.StringIO(f"{n_atoms}\n{''.join(lines)}"), format="extxyz")
    except KeyError as error:  # of a symbol
        symbol = str(error).strip("'")
        reason = "isotope" if symbol in {"D", "T"} else "unsupported_element"
        raise InvalidCrystal(reason, f"{symbol[:20]!r}: not an element symbol") from None
    _check_columns(atoms, lines, columns)
    return from_atoms(atoms), _fields(atoms)


def _fields(atoms: Atoms) -> dict[str, Any]:
    """Collect what stands beside a crystal; of energies that ASE takes for results, those that are not of an atom each."""
    results = {} if atoms.calc is None else atoms.calc.results
    beside = {str(name): value for name, value in (*atoms.info.items(), *results.items()) if name != "energy"}
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in beside.items()}
    fields: dict[str, Any] = {name: value for name, value in plain.items() if isinstance(value, str | int | float)}
    if "energy" in results:
        energy = number(results["energy"].item() if isinstance(results["energy"], np.generic) else results["energy"])
        if energy is None:
            raise InvalidCrystal("energy", f"energy is {str(results['energy'])[:60]!r}, expected a number of eV")
        energy = energy / len(atoms)
        stated, correction = (number(fields.get(name)) for name in (Quantity.ENERGY_PER_ATOM, Quantity.CORRECTION_PER_ATOM))
        check_stated_energy(energy, stated, correction)
        fields[Quantity.ENERGY_PER_ATOM] = energy
    return fields


def _columns(comment: str) -> dict[str, int]:
    """Find the columns of a block, name and place of the first; empty where it does not say.

    Raises InvalidCrystal for what is no list of name:kind:width, and where there are no positions.
    """
    stated = _PROPERTIES.search(comment)
    if stated is None:
        return {}
    words = stated[1].split(":")
    if "" in words:
        name = next((found for found in re.findall(r"[^:]*::[^:]*", stated[1])), stated[1])
        raise InvalidCrystal(
            "malformed",
            f"{name[:60]!r} in Properties: no name may hold ':', which separates; write {name.replace('::', '_')[:60]}",
        )
    places, start = {}, 0
    for name, kind, width in zip(words[::3], words[1::3], words[2::3], strict=False):
        if kind not in {"S", "R", "I", "L"} or not width.isdecimal() or not int(width):
            raise InvalidCrystal("malformed", f"Properties: {name[:60]}:{kind[:20]}:{width[:20]} is no name:kind:width")
        if name in places:
            raise InvalidCrystal("malformed", f"Properties: the column {name[:60]} stands there twice; keep one")
        places[name], start = start, start + int(width)
    if len(words) % 3:
        raise InvalidCrystal(
            "malformed", f"Properties ends in {':'.join(words[-(len(words) % 3) :])[:60]!r}, which is no name:kind:width"
        )
    if not {"pos", "positions"} & places.keys():
        raise InvalidCrystal("malformed", f"no column pos among {', '.join(places)}; positions are needed")
    return places


def _check_columns(atoms: Atoms, lines: list[str], places: dict[str, int]) -> None:
    """Refuse sites that are not occupied once, and elements of which two columns say different things."""
    for name, values in atoms.arrays.items():
        if name.lower() in {"occupancy", "occupancies", "occ"} and not np.allclose(values, 1.0):
            raise InvalidCrystal("disordered", f"the column {name} holds other occupancies than 1; give an ordered crystal")
    if {"species", "Z"} <= places.keys():
        for line in lines[1:]:
            words = line.split()
            symbol, number = words[places["species"]], words[places["Z"]]
            if not number.isdecimal() or int(number) >= len(chemical_symbols) or chemical_symbols[int(number)] != symbol:
                raise InvalidCrystal("malformed", f"the columns species and Z disagree: {symbol} and {number}; keep one")


_PROPERTIES: Final = re.compile(r'(?:^|\s)Properties="?([^\s"]+)')
