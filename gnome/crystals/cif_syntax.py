"""The syntax of CIF: data blocks, quotes, text fields and loops, before anybody asks what a value means.

gemmi parses a block.  Where one block ends and the next begins is found here, so that a broken block costs itself alone.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from gemmi import cif

from gnome.errors import InvalidCrystal

_TOKEN: Final = re.compile(
    r"""(?:^;.*?(?:^;|\Z))          # a text field, to the next line that begins with a semicolon
    | \#[^\n]*                      # a comment
    | '(?:[^'\n]|'(?=[^\s]))*'      # quotes end at one with white space behind it
    | "(?:[^"\n]|"(?=[^\s]))*"
    | [^\s]+""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
_USED: Final = ("_cell_", "_atom_site_", "_symmetry_", "_space_group_", "_chemical_formula_sum")
"""What the names begin with that must not be given twice; of others the first is as good as the last."""


@dataclass(frozen=True)
class CifTable:
    """Values of a block by data name (small letters, dots as underscores), and which loop they stand in.

    A value that is missing is one of `UNSAID`: empty, `?` (unknown) or `.` (does not apply).
    """

    columns: Mapping[str, tuple[str, ...]]
    loops: Mapping[str, int]

    def one(self, name: str) -> str:
        """The single value of a name, empty where there is none or it says nothing."""
        values = self.columns.get(name, ())
        return values[0] if len(values) == 1 and values[0] not in UNSAID else ""

    def column(self, *names: str) -> tuple[str, ...]:
        """Values of the first of the names that is there."""
        return next((self.columns[name] for name in names if name in self.columns), ())


UNSAID: Final = frozenset({"", "?", "."})


def split_blocks(text: str) -> list[str]:
    """Split a CIF into those of its data blocks that list atoms; all of it when there is none."""
    text = plain_lines(text)
    if len(re.findall("data_", text, re.IGNORECASE)) <= 1:
        return [text]
    starts, lists_atoms = [0], [False]
    for place, token in _tokens(text):
        if token[:5].lower() == "data_":
            starts.append(place)
            lists_atoms.append(False)
        elif re.match(r"_atom_site[_.]", token, re.IGNORECASE):
            lists_atoms[-1] = True
    ends = [*starts[1:], len(text)]
    blocks = [text[start:end] for start, end, lists in zip(starts, ends, lists_atoms, strict=True) if lists]
    return blocks or [text]


def plain_lines(text: str) -> str:
    """The text with line ends of one kind, and without a byte order mark."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _tokens(text: str) -> Iterator[tuple[int, str]]:
    return ((match.start(), match[0]) for match in _TOKEN.finditer(text))


def read_table(text: str) -> CifTable:
    """Read the values of one data block.

    Raises InvalidCrystal with reason `malformed` for what is no CIF, and for a name of the cell, the sites or the group given twice.
    """
    text = re.sub(r"[^\x00-\x7f]", "~", plain_lines(text))  # gemmi holds to the standard's ASCII outside of quotes
    start = next((place for place, token in _tokens(text) if token[:5].lower() == "data_"), None)
    if start is None:
        raise InvalidCrystal("malformed", "not a readable CIF (no data block); it begins with a line data_NAME")
    try:
        document = cif.read_string(text[start:], 0)
    except (ValueError, RuntimeError) as error:
        line_of_start = text[:start].count("\n")
        message = re.sub(r"^string:(\d+):\S*", lambda found: f"line {int(found[1]) + line_of_start} of the block:", str(error))
        raise InvalidCrystal("malformed", f"not a readable CIF ({' '.join(message.split())[:200]})") from None
    if len(document) != 1:
        raise InvalidCrystal("malformed", f"{len(document)} data blocks, none of which lists atoms (_atom_site_fract_x)")
    return _table(document[0])


def _table(block: cif.Block) -> CifTable:
    columns: dict[str, tuple[str, ...]] = {}
    loops: dict[str, int] = {}
    twice: list[str] = []
    for place_in_block, item in enumerate(block):
        pair: Any = item.pair  # its stub says object
        found: dict[str, list[str]] = {}
        if pair is not None:
            found = {pair[0]: [pair[1]]}
        elif item.loop is not None:
            width, values = item.loop.width(), item.loop.values
            for place, tag in enumerate(item.loop.tags):
                twice += [tag] if tag in found else []
                found[tag] = values[place::width]
        for tag, raw in found.items():
            name = tag.lower().replace(".", "_")
            twice += [tag] if name in columns else []
            columns[name] = tuple(_unquoted(value) for value in raw)
            loops[name] = place_in_block
    if twice := sorted({tag for tag in twice if tag.lower().replace(".", "_").startswith(_USED)}):
        raise InvalidCrystal("malformed", f"{', '.join(twice)[:200]} more than once in one block; keep one")
    return CifTable(columns, loops)


def _unquoted(value: str) -> str:
    """What a value says; a quoted question mark or dot is a character, no missing value, and of no use here either."""
    return str(cif.as_string(value)).strip() if value not in UNSAID else value


_NUMBER: Final = re.compile(r"([-+]?)(?:(\d+)/(\d+)|(\d+\.?(\d*)|\.(\d+))([eE][-+]?\d+)?(?:\((\d*)\))?)")


def number(text: str) -> float | None:
    """Read a number with or without its uncertainty in brackets, or a fraction as 1/3; None where it is none."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None or (found[3] is not None and int(found[3]) == 0):
        return None
    size = Fraction(int(found[2]), int(found[3])) if found[3] else float(found[4] + (found[7] or ""))
    return -float(size) if found[1] == "-" else float(size)


def precision(text: str) -> float:
    """One unit of the last digit of a number, or its stated uncertainty where that is larger; 0 for fractions."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None or found[3]:
        return 0.0
    unit = 10.0 ** -len(found[5] or found[6] or "") * float(f"1{found[7] or ''}")
    return unit * max(1, int(found[8] or 1))
