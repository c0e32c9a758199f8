"""Crystals that come with energies into the hull of the method that the user names.

What is imported under a method stands on one scale: total energies, whose formation energies are taken from the lowest entry of each
element under the method, or formation energies as they are given.  Run types of two families (R2SCAN beside GGA) never meet; which one a
method holds is remembered with its crystals.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flows.assess import crystal_record, update_hull
from flows.energy_rows import (
    correction,
    family_counted,
    given_e_form,
    is_bare_u,
    is_plain_gga,
    refuse_several_methods,
    total_energy,
    unread_beside,
)
from flows.plurals import counted
from flows.workspace import Workspace
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.energy_fields import AGREE, GGA, family_of, has_u, is_formation, run_family, unread_energies
from gnome.crystals.formats import ReadCrystal, Refusal
from gnome.database.records import CrystalRecord
from gnome.errors import EvaluatorUnavailable, InvalidCrystal, InvalidInput
from gnome.quantities import STABLE_TOLERANCE, Quantity
from gnome.stability.method import Method
from gnome.stability.references import ElementalReferences

RUN_TYPE = "run_type"
GIVEN = "formation_energies"
WITH_U = "run_type_with_u"
"""What is remembered with a crystal, among the versions behind its energy: its family of run types; formation energies as given; GGA+U."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What came of an import; `method` labels the hull that the crystals joined, `notes` are lines for people."""

    n_imported: int
    n_known: int
    refused: tuple[Refusal, ...]
    method: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Before:
    """What a method holds already: crystals, families of run types, lowest energies (eV/atom) of elements, and the scale.

    `plain`: GGA without U; `bare_u`: GGA+U without corrections.
    """

    n_crystals: int
    families: frozenset[str]
    lowest: dict[int, float]
    given: bool
    plain: bool
    bare_u: bool

    @property
    def family(self) -> str:
        """The family that others must not meet; of what does not say it, the one that nearly all entries are of."""
        return min(self.families) if self.families else GGA if self.n_crystals else ""


def import_energies(
    workspace: Workspace, items: Sequence[ReadCrystal], refused: list[Refusal], name: str, run_type: str = ""
) -> Imported:
    """Store crystals under the method of this name; what does not belong there is refused, row by row.

    Of several run types those of the method's own family stay, of a new method's the family named, or the one that most rows have.
    Raises InvalidInput where nothing could be said of which energies are meant.
    """
    method = Method(code="imported", functional=name)
    before = _before(workspace, method)
    refuse_several_methods(item.fields for item in items)
    notes: list[str] = []
    asked = family_of(run_type)
    items = _of_one_family(items, before, refused, name, asked, notes)
    given = _are_given(items, before, notes)
    items = _of_one_scale(items, given, refused, name, before)
    if not given and not asked:
        items = _without_bare_u(items, before, refused)
    notes += _unread(items)
    lowest: dict[str, ReadCrystal] = {}
    for item in sorted(items, key=lambda item: _energy(item, given), reverse=True):
        lowest[item.crystal.id] = item
    n_same = len(items) - len(lowest)
    notes += _several_energies(items, lowest, given)
    items = [item for item in items if lowest[item.crystal.id] is item]
    records = _given_records(items, method, refused) if given else _total_records(items, method, before, refused, notes)
    notes += _other_energies(workspace, records, method)
    n = workspace.store.add_crystals(records)
    update_hull(workspace.store, method.label)
    return Imported(
        n_imported=n, n_known=len(records) - n + n_same, refused=tuple(refused), method=method.label, notes=tuple(notes)
    )


def _several_energies(items: Sequence[ReadCrystal], lowest: Mapping[str, ReadCrystal], given: bool) -> list[str]:
    """Say where one crystal comes with several energies, of which the lowest counts."""
    higher = {
        f"{item.label} ({_energy(item, given):.3f}, not {_energy(lowest[item.crystal.id], given):.3f})"
        for item in items
        if _energy(item, given) - _energy(lowest[item.crystal.id], given) > AGREE
    }
    return (
        [f"of a crystal that comes with several energies the lowest counts, eV/atom: left out {_some(higher)}"] if higher else []
    )


def _other_energies(workspace: Workspace, records: Sequence[CrystalRecord], method: Method) -> list[str]:
    """Say where a crystal is known already, with another energy; it keeps the one that it has."""
    known = workspace.store.crystals_by_id({record.crystal.id for record in records}, method.label)
    other = {
        f"{record.crystal.reduced_formula} {record.crystal.id} ({record.e_form_per_atom:.3f}, known with {stored:.3f})"
        for record in records
        for one in known.get(record.crystal.id, ())
        if abs((stored := float(one.row[Quantity.E_FORM_PER_ATOM])) - record.e_form_per_atom) > AGREE
    }
    return [f"known already with another formation energy, eV/atom, and left as they are: {_some(other)}"] if other else []


def _some(lines: Collection[str], shown: int = 5) -> str:
    return ", ".join(sorted(lines)[:shown]) + (f" and {len(lines) - shown} more" if len(lines) > shown else "")


def _before(workspace: Workspace, method: Method) -> _Before:
    n_crystals, given, plain, bare_u, families, lowest = 0, False, False, False, set(), dict[int, float]()
    for stored in workspace.store.crystals_of(method.label):
        n_crystals += 1
        versions = stored.row["versions"] or {}
        given = given or GIVEN in versions
        families.add(family := str(versions.get(RUN_TYPE, "")))
        plain = plain or (family_counted(family) == GGA and WITH_U not in versions)
        bare_u = bare_u or (WITH_U in versions and not stored.row["correction_per_atom"])
        if stored.row["energy_per_atom"] is not None:
            _lower(lowest, stored.crystal.composition, stored.row["energy_per_atom"] + stored.row["correction_per_atom"])
    return _Before(n_crystals, frozenset(families - {""}), lowest, given, plain, bare_u)


def _lower(lowest: dict[int, float], composition: Iterable[int], energy: float) -> None:
    """Take in the energy, eV/atom, of a phase where it is one of an element alone."""
    if len(elements := list(composition)) == 1:
        lowest[elements[0]] = min(energy, lowest.get(elements[0], float("inf")))


def _energy(item: ReadCrystal, given: bool) -> float:
    """Energy, eV/atom, by which two entries of one crystal are compared."""
    return (given_e_form(item) if given else (total_energy(item) or 0.0) + correction(item)) or 0.0


def _of_one_family(
    items: Sequence[ReadCrystal], before: _Before, refused: list[Refusal], name: str, asked: str, notes: list[str]
) -> list[ReadCrystal]:
    """Keep the rows of one family of run types; what does not say its own counts as GGA/GGA+U, or as the family asked for."""
    families: list[str | None] = []
    for item in items:
        try:
            families.append(run_family(item.fields))
        except InvalidCrystal as error:
            families.append(None)
            refused.append(Refusal(label=item.label, reason=error.reason, message=str(error)))
    if asked and before.n_crystals and asked != before.family:
        says = "holds" if before.families else "does not say its run types, which may be"
        raise InvalidInput(f"--run-type {asked}: the method {name!r} {says} {before.family}; name another --method")
    if asked and not {asked, ""} & set(families):
        there = ", ".join(sorted(filter(None, set(families)))) or "none"
        raise InvalidInput(f"--run-type {asked}: no crystal with an energy says so; there are {there}")
    n_of = Counter(asked or GGA if family == "" else family for family in families if family is not None)
    wanted = asked or before.family or max(sorted(n_of), key=lambda family: (n_of[family], family == GGA), default="")
    kept, n_silent = [], 0
    for item, family in zip(items, families, strict=True):
        if family == wanted or (family == "" and wanted == GGA):
            kept.append(item)
        elif family == "" and asked:
            n_silent += 1
            kept.append(replace(item, fields={**item.fields, RUN_TYPE: asked}))
        elif family is not None:
            refused.append(_of_another_family(item, family, wanted, before, name, asked, n_of[wanted]))
    if n_silent:
        notes.append(f"{counted(n_silent, 'crystal')} without a run type: taken as {asked}, as --run-type says")
    return kept


def _of_another_family(
    item: ReadCrystal, family: str, wanted: str, before: _Before, name: str, asked: str, n_wanted: int
) -> Refusal:
    beside = (
        f"and {name!r} holds {wanted}" if before.families
        else f"and {name!r} holds energies that do not say theirs" if before.n_crystals
        else f"and --run-type takes {wanted}" if asked
        else f"where {n_wanted} of this import are {wanted}"
    )  # fmt: skip
    if family:
        says, advice = f"its run type is {family}", f"import it under another --method, with --run-type {family}"
    else:
        says = f"it does not say its run type, which counts as {GGA}"
        advice = f"if it is of {wanted}, import it by itself with --run-type {wanted}, otherwise under another --method"
    return Refusal(label=item.label, reason="run_type", message=f"{says}, {beside}; their energies never meet: {advice}")


def _without_bare_u(items: Sequence[ReadCrystal], before: _Before, refused: list[Refusal]) -> list[ReadCrystal]:
    """Refuse GGA+U without corrections beside GGA, whose energies are eV/atom apart; or GGA where the method holds such."""
    plain = [is_plain_gga(item, run_family(item.fields)) for item in items]
    bare = [is_bare_u(item) for item in items]
    if before.bare_u and not before.plain:
        wrong, says = plain, "it is of GGA, and the method holds energies of GGA+U without corrections"
    elif before.plain or any(plain):
        wrong, says = bare, "its run type is GGA+U and it has no correction, beside energies of GGA"
    else:
        return list(items)
    advice = "import both with their corrections, or say with --run-type GGA+U that they are on one scale"
    refused += [
        Refusal(label=item.label, reason="run_type", message=f"{says}: {advice}")
        for item, is_wrong in zip(items, wrong, strict=True)
        if is_wrong
    ]
    return [item for item, is_wrong in zip(items, wrong, strict=True) if not is_wrong]


def _unread(items: Sequence[ReadCrystal]) -> list[str]:
    """Say which fields look like other energies than those that are taken."""
    names = Counter(name for item in items for name in unread_beside(item))
    return [
        f"{name} ({counted(n, 'crystal')}) is another energy than the one taken, and is not read"
        + ("" if is_formation(name) else f"; --energy-key {name} takes it")
        for name, n in names.most_common(5)
    ]


def _are_given(items: Sequence[ReadCrystal], before: _Before, notes: list[str]) -> bool:
    """Decide for formation energies as given where every row has one; else they are taken from the elements."""
    n_given = sum(given_e_form(item) is not None for item in items)
    n_total = sum(total_energy(item) is not None for item in items)
    if before.n_crystals:
        return before.given
    if n_given == len(items):
        return bool(items)
    if n_total < len(items):
        raise InvalidInput(
            f"{counted(len(items) - n_total, 'crystal')} with formation energies alone and {len(items) - n_given} with total energies "
            "alone; the two never meet on one hull: import them apart, each under a --method of its own"
        )
    if n_given:
        notes.append(
            f"{n_given} of {len(items)} crystals come with formation energies beside their total ones: all are taken from the elements "
            "of this import"
        )
    return False


def _of_one_scale(
    items: Sequence[ReadCrystal], given: bool, refused: list[Refusal], name: str, before: _Before
) -> list[ReadCrystal]:
    """Keep the rows that have the energy that the method holds."""
    kept = []
    for item in items:
        if (given_e_form(item) if given else total_energy(item)) is not None:
            kept.append(item)
            continue
        has, holds = ("total", "formation energies as given") if given else ("formation", "total energies")
        where = f"and {name!r} holds {holds}" if before.n_crystals else f"where others of this import have {holds}"
        message = f"it comes with a {has} energy alone, {where}; import it under another --method"
        refused.append(Refusal(label=item.label, reason="no_energy", message=message))
    return kept


def _given_records(items: Sequence[ReadCrystal], method: Method, refused: list[Refusal]) -> list[CrystalRecord]:
    records: list[CrystalRecord] = []
    for item in items:
        e_form = given_e_form(item)
        assert e_form is not None  # noqa: S101 - others were refused before
        if len(item.crystal.composition) == 1 and e_form < -STABLE_TOLERANCE:
            message = f"an element's formation energy is 0 for its lowest form and above for others, this is {e_form:g} eV/atom"
            refused.append(Refusal(label=item.label, reason="implausible", message=message))
            continue
        _append(records, item, _said(item, method, given=True), e_form, refused)
    return records


def _total_records(
    items: Sequence[ReadCrystal], method: Method, before: _Before, refused: list[Refusal], notes: list[str]
) -> list[CrystalRecord]:
    lowest = dict(before.lowest)
    for item in items:
        _lower(lowest, item.crystal.composition, (total_energy(item) or 0.0) + correction(item))
    if moved := sorted(z for z, energy in before.lowest.items() if lowest[z] < energy - 1e-9):
        raise InvalidInput(
            f"{', '.join(SYMBOLS[z] for z in moved)}: this import holds a lower form of the element than those under "
            f"{method.functional!r} before, whose formation energies would all change; import everything again under another --method"
        )
    references = ElementalReferences(method=method.label, energies=lowest)
    records: list[CrystalRecord] = []
    lacking: set[int] = set()
    n_lacking = 0
    for item in items:
        try:
            e_form = references.formation_energy_per_atom(item.crystal.composition, total_energy(item) or 0.0, correction(item))
        except EvaluatorUnavailable:
            own = set(item.crystal.composition) - references.elements
            lacking |= own
            n_lacking += 1
            message = f"no entry of {_names(own)} under {method.functional!r}; import the elements' entries as well"
            refused.append(Refusal(label=item.label, reason="no_reference", message=message))
            continue
        _append(records, item, _said(item, method), e_form, refused)
    if lacking:
        notes.append(
            f"{counted(n_lacking, 'crystal')} without a formation energy, which is taken from the elements: import the entries of "
            f"{_names(lacking)} of the same method too, in one command with these or before, under --method {method.functional}"
        )
    return records


def _names(elements: set[int]) -> str:
    return ", ".join(SYMBOLS[z] for z in sorted(elements))


def _said(item: ReadCrystal, method: Method, *, given: bool = False) -> Method:
    """Remember beside the method what the row says of its energy."""
    family = run_family(item.fields)
    said = {RUN_TYPE: family} if family else {}
    said |= {GIVEN: "as given"} if given else {}
    said |= {WITH_U: "GGA+U"} if has_u(item.fields) else {}
    return Method(code=method.code, functional=method.functional, versions=said)


def _append(records: list[CrystalRecord], item: ReadCrystal, method: Method, e_form: float, refused: list[Refusal]) -> None:
    try:
        records.append(
            crystal_record(
                item.crystal,
                method,
                e_form_per_atom=e_form,
                energy_per_atom=total_energy(item),
                correction_per_atom=correction(item),
                origin="imported",
                source=item.label,
            )
        )
    except InvalidInput as error:
        refused.append(Refusal(label=item.label, reason="implausible", message=str(error)))


def without_energy(item: ReadCrystal) -> Refusal:
    """Refuse a crystal without an energy where others have one, and name what it has in its place."""
    unread = unread_energies(item.fields)
    beside = f"; it has {', '.join(unread)}, which is not read unless --energy-key names it" if unread else ""
    return Refusal(label=item.label, reason="no_energy", message=f"no energy, where others of this import have one{beside}")
