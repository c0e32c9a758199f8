"""Which rows that come with energies may meet: one set of rules for imports and for training.

Energies of two methods never meet.  Nor do run types of two families, as R2SCAN and GGA; a row that does not say its own counts as
GGA/GGA+U, as nearly all entries are.  GGA never meets GGA+U without corrections.  Formation energies as given never meet those taken from
the elements of a file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from gnome.crystals.energy_fields import AGREE, GGA, energy_per_atom_under, has_u, number, unread_energies
from gnome.crystals.formats import ReadCrystal
from gnome.errors import InvalidInput
from gnome.quantities import Quantity


def total_energy(item: ReadCrystal) -> float | None:
    """Total energy, eV/atom, corrections left out, of a crystal that was read."""
    return number(item.fields.get(Quantity.ENERGY_PER_ATOM))


def given_e_form(item: ReadCrystal) -> float | None:
    """Formation energy, eV/atom, as a file gives it."""
    return number(item.fields.get(Quantity.E_FORM_PER_ATOM))


def correction(item: ReadCrystal) -> float:
    """What is added to the total energy, eV/atom."""
    return number(item.fields.get(Quantity.CORRECTION_PER_ATOM)) or 0.0


def has_energy(item: ReadCrystal) -> bool:
    """Say whether a crystal comes with an energy that can be used."""
    return total_energy(item) is not None or given_e_form(item) is not None


def with_energy_under(item: ReadCrystal, key: str) -> ReadCrystal:
    """Take the total energy from the field named; the formation energy of the file, which is another's, no more.

    Raises InvalidCrystal where the field holds no number, or a correction stands beside it that may be in there already.
    """
    energy = energy_per_atom_under(item.fields, key, item.crystal.n_atoms)
    own = {Quantity.ENERGY_PER_ATOM, Quantity.E_FORM_PER_ATOM}
    kept = {name: value for name, value in item.fields.items() if name not in own and name != key}
    return replace(item, fields=kept | ({} if energy is None else {str(Quantity.ENERGY_PER_ATOM): energy}))


def refuse_several_methods(rows: Iterable[Mapping[str, Any]]) -> None:
    """Refuse rows that name several methods themselves, as an export of a database with two of them does; raises InvalidInput."""
    named = {str(row[Quantity.METHOD]) for row in rows if row.get(Quantity.METHOD)}
    if len(named) > 1:
        raise InvalidInput(
            f"the field `{Quantity.METHOD}` names {len(named)} methods, {', '.join(sorted(named))[:200]}; their energies never meet: "
            "take each by itself"
        )


def family_counted(family: str) -> str:
    """The family that a row counts as which may not say its own."""
    return family or GGA


def is_bare_u(item: ReadCrystal) -> bool:
    """Say whether a total energy is one of GGA+U without the correction that brings it onto the scale of GGA."""
    return total_energy(item) is not None and has_u(item.fields) and abs(correction(item)) <= AGREE


def is_plain_gga(item: ReadCrystal, family: str) -> bool:
    """Say whether a row of that family counts as GGA without U."""
    return family_counted(family) == GGA and not has_u(item.fields)


def unread_beside(item: ReadCrystal) -> tuple[str, ...]:
    """Names of fields that look like energies and say another than the one that is taken."""
    taken = [energy for energy in (total_energy(item), given_e_form(item)) if energy is not None]
    taken += [energy + correction(item) for energy in taken[:1]]
    n = item.crystal.n_atoms
    found = []
    for name in unread_energies(item.fields):
        value = number(item.fields[name])
        if value is not None and all(abs(own - each) > AGREE for own in taken for each in (value, value / n)):
            found.append(name)
    return tuple(found)
