"""What may have been meant by a filter that cannot be used: one short piece of advice, or nothing."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import pairwise
from typing import Final

from gnome.quantities import Quantity

_OTHER_NAMES: Final[Mapping[str, str]] = {
    "formula": "chemical_formula_reduced", "composition": "chemical_formula_reduced", "pretty_formula": "chemical_formula_reduced",
    "formula_pretty": "chemical_formula_reduced", "chemical_formula": "chemical_formula_reduced", "anonymous_formula":
    "chemical_formula_anonymous", "element": "elements", "species": "elements", "ntypes": "nelements", "natoms": "nsites", "num_sites":
    "nsites", "chemsys": "_gnome_chemical_system", "system": "_gnome_chemical_system", "spacegroup": "_gnome_space_group_number",
    "space_group": "_gnome_space_group_number", "spg": "_gnome_space_group_number", "sg": "_gnome_space_group_number", "prototype":
    "_gnome_protostructure", "energy": "_gnome_energy_per_atom", "volume": "_gnome_volume_per_atom", "energy_above_hull":
    "_gnome_e_above_hull", "ehull": "_gnome_e_above_hull", "e_hull": "_gnome_e_above_hull", "hull_distance": "_gnome_e_above_hull",
    "above_hull": "_gnome_e_above_hull", "formation_energy": "_gnome_e_form_per_atom", "formation_energy_per_atom":
    "_gnome_e_form_per_atom", "e_form": "_gnome_e_form_per_atom", "eform": "_gnome_e_form_per_atom", "structure_id": "id",
}  # fmt: skip
"""Names of other programs and of habit."""

_BEFORE_TEXTS: Final = ("HAS", "ALL", "ANY", "ONLY", "CONTAINS", "WITH", "STARTS", "ENDS", "=", "<", ">", ",")
_CAPITALS: Final = frozenset({"and", "or", "not", "has", "all", "any", "only", "is", "known", "unknown", "contains", "length"})


def field_hint(name: str, known: Iterable[str], prefix: str) -> str:
    """Name the fields that may have been meant by an unknown one; all where none is near."""
    known = list(known)
    bare = name.lower().removeprefix(prefix)
    if bare in _OTHER_NAMES:
        meant = _OTHER_NAMES[bare]
        also = f" or {prefix}{Quantity.REDUCED_FORMULA}" if meant == "chemical_formula_reduced" else ""
        return f"did you mean {meant}{also}?"
    ours = {each.removeprefix(prefix): each for each in known}
    near = get_close_matches(bare, ours, n=2, cutoff=0.7)
    return f"did you mean {' or '.join(ours[each] for each in near)}?" if near else f"known are {', '.join(known)}"


def value_hint(text: str, values: Iterable[str]) -> str:
    """Say which values a field has, and which may have been meant."""
    values = list(values)
    near = get_close_matches(text.lower(), values, n=1, cutoff=0.6)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{meant}{'T' if meant else 't'}here are {', '.join(values)}"


def comma_hint(text: str) -> str:
    """Advise where two texts stand side by side, of which the reader takes the second for another comparison."""
    strings = [match.span() for match in re.finditer(r'"(?:[^"\\]|\\.)*"', text, re.DOTALL)]
    if any(not text[end:start].strip() for (_, end), (start, _) in pairwise(strings)):
        return 'several values are separated by commas, as in elements HAS ALL "Na", "Cl"'
    return ""


def reading_hint(text: str, position: int) -> str:
    """Advise where a filter cannot be read; `position` is where reading stopped."""
    before, rest = text[:position].rstrip(), text[position:]
    word = re.match(r"[^\s\"(),=<>!]+", rest)
    last = re.search(r"(\S+)\s*$", before)
    if rest.startswith("'"):
        return 'texts stand in double quotes, as in elements HAS "Li"'
    if rest.startswith(("=", ">")) and before.endswith(("=", "!", "<", ">")):
        return "write = for equal, != for unequal"
    for name in (word.group() if word else "", last.group(1) if last else ""):
        if re.match(r"[A-Z]\w*$", name) and name.lower() not in _CAPITALS and not before.endswith(_BEFORE_TEXTS):
            return f"names of fields are in small letters: {_OTHER_NAMES.get(name.lower(), name.lower())}"
    for found in (word.group() if word else "", last.group(1) if last else ""):
        if found in _CAPITALS:
            return f"write {found.upper()} in capitals"
    if word and before.endswith(_BEFORE_TEXTS) and re.match(r"[A-Za-z]", word.group()):
        return f'put the text in double quotes: "{word.group()[:40]}"'
    return ""
