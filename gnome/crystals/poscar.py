"""Reading POSCAR, VASP's format, which pymatgen reads with a good will that hides mistakes."""

import re
import warnings

import numpy as np
from pymatgen.io.vasp import Poscar

from gnome.crystals.convert import from_structure
from gnome.crystals.crystal import Crystal
from gnome.crystals.entries import check_count
from gnome.errors import InvalidCrystal


def read_poscar(text: str, *, max_atoms: int) -> Crystal:
    """Read a POSCAR or CONTCAR; raises InvalidCrystal for what names no elements, too many atoms, or more than it announces."""
    lines = text.splitlines()
    if len(lines) < 8:
        raise InvalidCrystal("truncated", f"a POSCAR has at least 8 lines, this one {len(lines)}; it is cut short")
    if len(lines[1].split()) != 1:
        raise InvalidCrystal(
            "malformed", f"the second line is one scaling factor, it is {lines[1].strip()[:60]!r}; scale the vectors instead"
        )
    _check_lines(lines, max_atoms)
    text = "\n".join([lines[0], _factor(lines), *lines[2:]]) + "\n"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # pymatgen makes up elements that the file does not name, with a warning
            structure = Poscar.from_str(text, read_velocities=False).structure
    except UserWarning as warning:
        if "coordinates" in str(warning):
            raise InvalidCrystal("malformed", f"not a readable POSCAR ({warning})") from None
        raise InvalidCrystal("malformed", f"POSCAR without usable element names ({warning}); add the line of symbols") from None
    except (ValueError, IndexError) as error:
        raise InvalidCrystal("malformed", f"not a readable POSCAR ({error})") from None
    return from_structure(structure)


def _factor(lines: list[str]) -> str:
    """The scaling factor; of one below 0, which is minus the cell's volume, what lengths are multiplied by.

    pymatgen multiplies Cartesian coordinates by the negative number itself.
    """
    try:
        factor = float(lines[1])
        if factor >= 0:
            return lines[1]
        volume = abs(float(np.linalg.det([[float(word) for word in line.split()[:3]] for line in lines[2:5]])))
        return repr((-factor / volume) ** (1 / 3))
    except (ValueError, ArithmeticError, np.linalg.LinAlgError):
        return lines[1]  # pymatgen says what is wrong


def _check_lines(lines: list[str], max_atoms: int) -> None:
    """Refuse what announces too many atoms, and what pymatgen would read in part: it takes the atoms it expects and drops the rest."""
    for at, line in enumerate(lines[5:7], start=5):
        counts = line.split("!")[0].split()
        if not counts or not all(re.fullmatch(r"\d{1,18}", count) for count in counts):
            continue
        n_atoms = sum(map(int, counts))
        check_count(n_atoms, max_atoms)
        symbols = lines[5].split("!")[0].split()
        if at == 6 and len(symbols) != len(counts):
            raise InvalidCrystal("malformed", f"{len(symbols)} symbols and {len(counts)} numbers of atoms")
        is_selective = lines[at + 1 : at + 2] and lines[at + 1].lstrip()[:1] in {"S", "s"}
        after = at + 2 + (1 if is_selective else 0) + n_atoms
        if sum(bool(line.strip()) for line in lines[after - n_atoms : after]) < n_atoms:
            raise InvalidCrystal("truncated", f"{n_atoms} atoms are announced, fewer are there; the file is cut short")
        if len(lines) > after and lines[after].strip() and lines[after].lstrip()[:1].lower() not in {"l", "c", "d", "k"}:
            raise InvalidCrystal("malformed", f"something stands after the last of {n_atoms} atoms: {lines[after][:60]!r}")
        return
