"""Reading POSCAR by VASP's own rules; what VASP leaves unread, symbols behind the coordinates, may not say otherwise."""

import re
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.entries import check_count
from gnome.errors import InvalidCrystal

_FEWEST_LINES: Final = 8
_COUNT: Final = re.compile(r"\d{1,18}")
_FLAG: Final = re.compile(r"\.?(T|F|TRUE|FALSE)\.?", re.IGNORECASE)


def read_poscar(text: str, *, max_atoms: int) -> Crystal:
    """Read a POSCAR or CONTCAR, atoms in the order of the file.

    Raises InvalidCrystal for what names no elements or two for one atom, for too many atoms, and for more or fewer than it announces.
    """
    lines = text.splitlines()
    if len(lines) < _FEWEST_LINES:
        raise InvalidCrystal("truncated", f"a POSCAR has at least {_FEWEST_LINES} lines, this one {len(lines)}; it is cut short")
    words = [re.split("[!#]", line)[0].split() for line in lines]
    symbols, counts, at = _species(words)
    n_atoms = sum(counts)
    check_count(n_atoms, max_atoms)
    lattice = np.array([_vector(words[i], lines[i], exactly=True) for i in (2, 3, 4)])
    factors = _factors(words[1], lines[1], lattice)
    is_selective = at < len(words) and words[at][:1] != [] and words[at][0][0] in "Ss"
    at += is_selective
    is_cartesian = _is_cartesian(words[at] if at < len(words) else [], lines[at] if at < len(lines) else "")
    rows = range(at + 1, at + 1 + n_atoms)
    if sum(bool(words[i]) for i in rows if i < len(words)) < n_atoms:
        raise InvalidCrystal("truncated", f"{n_atoms} atoms are announced, fewer are there; the file is cut short")
    _check_rest(lines, rows.stop, n_atoms)
    coords = np.array([_vector(words[i], lines[i]) for i in rows]).reshape(-1, 3)
    by_line = [symbol for symbol, count in zip(symbols, counts, strict=True) for _ in range(count)]
    at_ends = [
        _at_end(words[i][3:], lines[i], symbol, is_selective=is_selective) for i, symbol in zip(rows, by_line, strict=True)
    ]
    if is_selective and _is_remark(words, rows, set(symbols)):
        at_ends = [""] * n_atoms
    named = _elements(by_line, at_ends)
    scaled = lattice * factors
    frac = coords
    if is_cartesian and np.linalg.det(scaled):  # a flat cell is the gate's to refuse
        frac = np.asarray(np.linalg.solve(scaled.T, (coords * factors).T).T)
    return Crystal(scaled, np.array([SYMBOLS.index(symbol) for symbol in named]), frac)


def _species(words: Sequence[Sequence[str]]) -> tuple[list[str], list[int], int]:
    """Symbols (empty texts where the file has no line of them), numbers of atoms, and the line behind.

    Each may go on over several lines, as VASP writes many of them.
    """
    at, symbols = 5, []
    while at < len(words) and words[at] and not _COUNT.fullmatch(words[at][0]):
        symbols += [_symbol(word) for word in words[at]]
        at += 1
    counts: list[int] = []
    while at < len(words) and words[at] and all(map(_COUNT.fullmatch, words[at])) and (len(counts) < len(symbols) or not counts):
        counts += map(int, words[at])
        at += 1
    if not counts:
        line = " ".join(words[min(at, len(words) - 1)])
        raise InvalidCrystal("malformed", f"numbers of atoms are expected behind the lattice and its symbols, not {line[:60]!r}")
    if symbols and len(symbols) != len(counts):
        raise InvalidCrystal("malformed", f"{len(symbols)} symbols and {len(counts)} numbers of atoms")
    if sum(counts) == 0:
        raise InvalidCrystal("empty", "no atoms are announced")
    return symbols or [""] * len(counts), counts, at


def _symbol(word: str) -> str:
    """Element of Na, Na_pv or Na_pv/f474ac0d, which VASP writes."""
    symbol = re.split("[_/]", word)[0]
    if symbol in {"D", "T"}:
        raise InvalidCrystal("isotope", f"{word[:20]!r} is an isotope; write it as H")
    if symbol not in SYMBOLS[1:]:
        kind = "unsupported_element" if re.fullmatch(r"[A-Z][a-z]?", symbol) else "malformed"
        raise InvalidCrystal(kind, f"{word[:20]!r} in the line of symbols is not an element")
    return symbol


def _number(word: str) -> float:
    """A number as Fortran writes it, 1.0D+00 too."""
    return float(re.sub("[dD]", "e", word, count=1))


def _vector(words: Sequence[str], line: str, *, exactly: bool = False) -> list[float]:
    try:
        found = [_number(word) for word in words[:3]]
    except ValueError:
        found = []
    if len(found) != 3 or (exactly and len(words) != 3):
        raise InvalidCrystal("malformed", f"three numbers are expected, not {line.strip()[:60]!r}")
    return found


def _factors(words: Sequence[str], line: str, lattice: NDArray[np.float64]) -> NDArray[np.float64]:
    """What Cartesian components (3) are multiplied by: one factor, one for each of x, y and z, or minus the cell's volume."""
    try:
        found = [_number(word) for word in words]
    except ValueError:
        found = []
    if len(found) not in {1, 3} or not all(np.isfinite(found)) or 0 in found or (len(found) == 3 and min(found) < 0):
        shown = line.strip()[:60]
        raise InvalidCrystal(
            "malformed", f"the second line is one scaling factor or three above 0, it is {shown!r}; scale the vectors instead"
        )
    if found[0] > 0:
        return np.broadcast_to(np.array(found), 3)
    volume = abs(float(np.linalg.det(lattice)))
    if not volume > 0:
        raise InvalidCrystal("volume", f"the second line asks for a volume of {-found[0]:g} of a cell that has none")
    return np.full(3, (-found[0] / volume) ** (1 / 3))


def _is_cartesian(words: Sequence[str], line: str) -> bool:
    first = words[0][0].lower() if words else ""
    if first not in set("ckdf"):
        raise InvalidCrystal("malformed", f"a line Direct or Cartesian is expected before the atoms, not {line.strip()[:60]!r}")
    return first in "ck"


def _check_rest(lines: Sequence[str], after: int, n_atoms: int) -> None:
    """Velocities may follow, behind an empty line or one that says so; other lines would be atoms too many."""
    if len(lines) > after and lines[after].strip() and lines[after].lstrip()[:1].lower() not in {"l", "c", "d", "k"}:
        raise InvalidCrystal("malformed", f"something stands after the last of {n_atoms} atoms: {lines[after][:60]!r}")


def _at_end(words: Sequence[str], line: str, by_line: str, *, is_selective: bool) -> str:
    """The element that stands behind coordinates, before or after the flags of selective dynamics; empty where none does.

    An F may be fluorine or a flag: what agrees with the symbol `by_line` is meant; of four words without one, the last three are flags
    where the first is an element.
    """
    starts = [i for i in (0, 1) if len(words) >= i + 3 and all(map(_FLAG.fullmatch, words[i : i + 3]))]
    if not starts and is_selective:
        raise InvalidCrystal("malformed", f"three flags T or F of selective dynamics are expected, not {line.strip()[:60]!r}")
    ways = [_symbols_among([*words[:start], *words[start + 3 :]]) for start in starts] or [_symbols_among(words)]
    agreeing = [found for found in ways if by_line and found <= {by_line}]
    ways = agreeing or [found for found in reversed(ways) if found] or ways
    if len(ways[0]) > 1:
        raise InvalidCrystal("malformed", f"an atom is {' and '.join(sorted(ways[0]))} at once: {line.strip()[:60]!r}")
    return next(iter(ways[0]), "")


def _symbols_among(words: Sequence[str]) -> set[str]:
    return {match[1] for word in words if (match := re.match(r"([A-Z][a-z]?)(?![A-Za-z])", word)) and match[1] in SYMBOLS[1:]}


def _is_remark(words: Sequence[Sequence[str]], rows: range, symbols: set[str]) -> bool:
    """Whether every atom has one and the same of several symbols before its flags, which tells no atoms apart."""
    before = {words[i][3] for i in rows if len(words[i]) == 7 and _FLAG.fullmatch(words[i][6])}
    return len(before) == 1 and len(symbols) > 1 and before < symbols and all(len(words[i]) == 7 for i in rows)


def _elements(by_line: Sequence[str], at_ends: Sequence[str]) -> list[str]:
    """One symbol an atom; what the line of symbols and the lines' ends say must be the same."""
    named = []
    for place, (symbol, at_end) in enumerate(zip(by_line, at_ends, strict=True), start=1):
        if symbol and at_end not in {"", symbol}:
            raise InvalidCrystal(
                "malformed", f"atom {place} is {symbol} by the line of symbols and {at_end} by its own line; correct one of them"
            )
        named.append(symbol or at_end)
    if not all(named):
        raise InvalidCrystal("malformed", "POSCAR without element names; add the line of symbols above the numbers of atoms")
    return named
