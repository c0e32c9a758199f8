"""Reading CIF, the format in which a few kilobytes can ask for hours.

A CIF lists sites and symmetry operations, and the reader multiplies them: 60 sites and 400 operations make 24,000 atoms out of 9 kB, and
take most of a minute.  So sites and operations are counted before anything is expanded; small products are read here, middling ones in a
process that is killed when its time is up, large ones not at all.
"""

import json
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Lattice
from pymatgen.core.operations import SymmOp
from pymatgen.io.cif import CifBlock, CifFile, CifParser

from gnome.crystals.cif_group import is_isometry, named_operations
from gnome.crystals.convert import from_structure
from gnome.crystals.crystal import Crystal
from gnome.errors import InvalidCrystal

_OPERATIONS: Final = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz")
_MOST_OPERATIONS: Final = 192  # of any space group, when only its name is given
_MEMORY_BYTES: Final = 6 * 2**30


@dataclass(frozen=True, kw_only=True)
class CifLimits:
    """How much a CIF block may ask for.

    Products of sites and operations up to `max_product_here` are read in this process, up to `max_product` in one of its own for at most
    `seconds`.
    """

    max_product_here: int = 1_500
    max_product: int = 60_000
    seconds: float = 20.0


def split_blocks(text: str) -> list[str]:
    """Split a CIF into those of its data blocks that list atoms; all of it when there is none."""
    text = re.sub(r"(?mi)^[ \t]*data_", "data_", text)  # the standard allows capitals, pymatgen does not
    blocks = re.split(r"(?m)^(?=data_)", text)
    return [block for block in blocks if "_atom_site_" in block] or [text]


def read_block(text: str, limits: CifLimits) -> Crystal:
    """Read one data block.

    Raises InvalidCrystal with reason `malformed`, `too_large`, `too_slow`, `formula_mismatch`, `disordered`, `isotope` or
    `unsupported_element`.
    """
    tables = _tables(text)
    product = max(map(_product, tables), default=0)
    if product > limits.max_product:
        message = f"sites times symmetry operations are {product}, the limit is {limits.max_product}"
        raise InvalidCrystal("too_large", message)
    for table in tables:
        _check_table(table)
    return parse_block(text) if product <= limits.max_product_here else _read_elsewhere(text, limits)


MAX_LINE = 2048
"""Characters in a line of a CIF by its standard; pymatgen's reader takes time that grows with the square of it."""


def parse_block(text: str) -> Crystal:
    """Read one data block with pymatgen, whatever it takes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is checked below
            parser = CifParser.from_str(text)
            (block,) = parser._cif.data.values()  # noqa: SLF001 - it keeps them nowhere else
            if not _listed_operations(block.data):
                block.data[_OPERATIONS[0]] = named_operations(parser, block, _metric(block.data))
            structure = parser.parse_structures(primitive=False, on_error="raise")[0]
            mismatch = parser.check(structure)
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        AssertionError,
        ZeroDivisionError,
        RecursionError,
    ) as error:
        text_of_error = _one_line(error)
        if "ccupanc" in text_of_error:
            raise InvalidCrystal("disordered", f"sites share a place ({text_of_error}); give an ordered crystal") from None
        raise InvalidCrystal("malformed", f"not a readable CIF ({text_of_error})") from None
    crystal = from_structure(structure)  # disorder and isotopes have their own reasons, before the formula is compared
    if mismatch and "Cannot determine chemical composition" in mismatch:
        raise InvalidCrystal("malformed", "elements cannot be told from the labels of the atoms; add _atom_site_type_symbol")
    if mismatch:
        raise InvalidCrystal(
            "formula_mismatch", f"the listed atoms disagree with the formula ({_one_line(mismatch)}); is it complete?"
        )
    return crystal


def _tables(text: str) -> list[Mapping[str, Any]]:
    """What the blocks say, by name, with nothing expanded."""
    if any(len(line) > MAX_LINE for line in text.split("\n")):
        raise InvalidCrystal("malformed", f"a line has more than the {MAX_LINE} characters that CIF allows; break it up")
    names = re.findall(r"(?m)^[ \t]*(_cell_(?:length|angle)_\w+)", text)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidCrystal("malformed", f"{', '.join(twice)} more than once in one block; keep one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [block.data for block in CifFile.from_str(text).data.values() if isinstance(block, CifBlock)]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidCrystal("malformed", f"not a readable CIF ({_one_line(error)})") from None


def _check_table(table: Mapping[str, Any]) -> None:
    """Refuse what pymatgen would read as something else.

    These are lengths and angles that are none, sites that it leaves out or puts at 0, isotopes, and operations that are no symmetry of the
    cell.
    """
    lengths, angles = _cell(table)
    if any(length is not None and length <= 0 for length in lengths):
        raise InvalidCrystal("malformed", f"cell lengths are {lengths}, expected positive ones")
    if any(angle is not None and not 0 < angle < _STRAIGHT for angle in angles):
        raise InvalidCrystal("malformed", f"cell angles are {angles}, expected between 0 and 180 degrees")
    _check_sites(table)
    symbols = table.get("_atom_site_type_symbol", [])
    for symbol in symbols if isinstance(symbols, list) else [symbols]:
        if re.match(r"\d+[A-Z]", symbol):
            raise InvalidCrystal("isotope", f"{symbol} is an isotope; write the element alone")
    metric = _metric(table)
    for operation in _listed_operations(table):
        if not _is_symmetry(operation, metric):
            raise InvalidCrystal("malformed", f"{operation[:60]!r} is no symmetry operation of the cell")


def _cell(table: Mapping[str, Any]) -> tuple[list[float | None], list[float | None]]:
    """Lengths and angles, None where one is not a number."""
    lengths, angles = ([_number(table.get(f"_cell_{what}", "")) for what in names] for names in _CELL)
    return lengths, angles


def _metric(table: Mapping[str, Any]) -> NDArray[np.float64]:
    """Metric tensor of the cell; raises InvalidCrystal where one of its numbers is missing."""
    lengths, angles = _cell(table)
    for names, values in zip(_CELL, (lengths, angles), strict=True):
        if missing := [f"_cell_{name}" for name, value in zip(names, values, strict=True) if value is None]:
            raise InvalidCrystal("malformed", f"no number for {', '.join(missing)}; is the file complete?")
    return np.asarray(Lattice.from_parameters(*lengths, *angles).metric_tensor)


_STRAIGHT: Final = 180.0


def _check_sites(table: Mapping[str, Any]) -> None:
    """Refuse sites of no occupancy, which pymatgen drops, and coordinates that are not given, which it takes for 0."""
    for occupancy in _listed(table.get("_atom_site_occupancy", [])):
        number = _number(occupancy)
        if occupancy.strip() == "." or (number is not None and number <= 0):
            raise InvalidCrystal("disordered", f"a site has the occupancy {occupancy!r}, expected 1; give an ordered crystal")
    if any(_number(value) for value in _listed(table.get("_atom_site_attached_hydrogens", []))):
        raise InvalidCrystal("malformed", "a site has attached hydrogens that are not listed; list them as sites")
    if any(value.strip() == "dum" for value in _listed(table.get("_atom_site_calc_flag", []))):
        raise InvalidCrystal("malformed", "a site is a dummy (_atom_site_calc_flag dum), which is no atom; leave it out")
    for kind in ("fract", "Cartn"):
        for axis in "xyz":
            if any(value.strip() == "." for value in _listed(table.get(f"_atom_site_{kind}_{axis}", []))):
                raise InvalidCrystal("malformed", f"a site has no _atom_site_{kind}_{axis} but '.'; write the coordinate")


def _listed(entry: Any) -> list[str]:
    return [str(value) for value in entry] if isinstance(entry, list) else [str(entry)]


_CELL: Final = (("length_a", "length_b", "length_c"), ("angle_alpha", "angle_beta", "angle_gamma"))


def _number(text: Any) -> float | None:
    """Read a number with or without its uncertainty in brackets."""
    found = re.match(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?:\(\d+\))?\s*$", text) if isinstance(text, str) else None
    return float(found[1]) if found else None


def _listed_operations(table: Mapping[str, Any]) -> list[str]:
    listed = [table[key] for key in table if key.rstrip("_") in _OPERATIONS]
    return [operation for entry in listed for operation in (entry if isinstance(entry, list) else [entry])]


def _is_symmetry(operation: str, metric: NDArray[np.float64]) -> bool:
    """Say whether `x, -y, z+1/2` and the like is an isometry of a cell with this metric tensor."""
    if not re.fullmatch(r"[-+/.,\d\sxyz]+", operation, re.IGNORECASE) or operation.count(",") != 2:
        return False
    try:
        rotation = SymmOp.from_xyz_str(operation).rotation_matrix
    except (ValueError, ArithmeticError, IndexError):
        return False
    return is_isometry(rotation, metric)


def _product(table: Mapping[str, Any]) -> int:
    """Sites times operations."""
    sites = table.get("_atom_site_fract_x", table.get("_atom_site_Cartn_x", []))
    n_sites = len(sites) if isinstance(sites, list) else 1
    by_name = _MOST_OPERATIONS if any("group" in key.lower() for key in table) else 1
    n_operations = len(_listed_operations(table)) or by_name
    return n_sites * n_operations


def _read_elsewhere(text: str, limits: CifLimits) -> Crystal:
    command = [sys.executable, "-P", "-m", "gnome.crystals.cif"]
    try:
        answer = subprocess.run(command, input=text.encode(), capture_output=True, timeout=limits.seconds, check=True).stdout
        record = json.loads(answer)
    except subprocess.TimeoutExpired:
        raise InvalidCrystal("too_slow", f"not expanded within {limits.seconds:g} seconds") from None
    except (subprocess.CalledProcessError, json.JSONDecodeError):
        raise InvalidCrystal("malformed", "the process that expands its symmetry failed; is it an ordinary CIF?") from None
    if "reason" in record:
        raise InvalidCrystal(record["reason"], record["message"])
    return Crystal.from_dict(record)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:200] or type(text).__name__


def _serve() -> None:
    """Read a block from standard input and answer in JSON; what `_read_elsewhere` starts."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    try:
        record = parse_block(sys.stdin.buffer.read().decode()).to_dict()
    except InvalidCrystal as error:
        record = {"reason": error.reason, "message": str(error)}
    sys.stdout.write(json.dumps(record))


if __name__ == "__main__":
    _serve()
