"""Crystals that come with energies into the hull of the method that the user names.

What is imported under a method stands on one scale: total energies, whose formation energies are taken from the lowest entry of each
element under the method, or formation energies as they are given.  Run types of two families (R2SCAN beside GGA) never meet; which one a
method holds is remembered with its crystals.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flows.assess import crystal_record, update_hull
from flows.workspace import Workspace
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.energy_fields import GGA, family_of, run_family, unread_energies
from gnome.crystals.formats import ReadCrystal, Refusal
from gnome.database.records import CrystalRecord
from gnome.errors import EvaluatorUnavailable, InvalidCrystal, InvalidInput
from gnome.quantities import STABLE_TOLERANCE, Quantity
from gnome.stability.method import Method
from gnome.stability.references import ElementalReferences

RUN_TYPE = "run_type"
GIVEN = "formation_energies"
"""What is remembered with a crystal, among the versions behind its energy: its family of run types; formation energies as given."""


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
    """What a method holds already: crystals, families of run types, lowest energies (eV/atom) of elements, and the scale."""

    n_crystals: int
    families: frozenset[str]
    lowest: dict[int, float]
    given: bool

    @property
    def family(self) -> str:
        """The family that others must not meet; of what does not say it, the one that nearly all entries are of."""
        return min(self.families) if self.families else GGA if self.n_crystals else ""


def total_energy(item: ReadCrystal) -> float | None:
    """Total energy, eV/atom, corrections left out, of a crystal that was read."""
    value = item.fields.get(Quantity.ENERGY_PER_ATOM)
    return None if value is None else float(value)


def given_e_form(item: ReadCrystal) -> float | None:
    """Formation energy, eV/atom, as a file gives it."""
    value = item.fields.get(Quantity.E_FORM_PER_ATOM)
    return None if value is None else float(value)


def has_energy(item: ReadCrystal) -> bool:
    """Say whether a crystal comes with an energy that an import can use."""
    return total_energy(item) is not None or given_e_form(item) is not None


def import_energies(
    workspace: Workspace, items: Sequence[ReadCrystal], refused: list[Refusal], name: str, run_type: str = ""
) -> Imported:
    """Store crystals under the method of this name; what does not belong there is refused, row by row.

    Of several run types those of the method's own family stay, of a new method's the family named, or the one that most rows have.
    Raises InvalidInput where nothing could be said of which energies are meant.
    """
    method = Method(code="imported", functional=name)
    before = _before(workspace, method)
    _refuse_several_methods(items)
    items = _of_one_family(items, before, refused, name, family_of(run_type))
    notes: list[str] = []
    given = _are_given(items, before, notes)
    items = _of_one_scale(items, given, refused, name, before)
    lowest: dict[str, ReadCrystal] = {}
    for item in sorted(items, key=lambda item: _energy(item, given), reverse=True):
        lowest[item.crystal.id] = item
    n_same = len(items) - len(lowest)
    items = [item for item in items if lowest[item.crystal.id] is item]
    records = _given_records(items, method, refused) if given else _total_records(items, method, before, refused, notes)
    n = workspace.store.add_crystals(records)
    update_hull(workspace.store, method.label)
    return Imported(
        n_imported=n, n_known=len(records) - n + n_same, refused=tuple(refused), method=method.label, notes=tuple(notes)
    )


def _before(workspace: Workspace, method: Method) -> _Before:
    n_crystals, given, families, lowest = 0, False, set(), dict[int, float]()
    for stored in workspace.store.crystals_of(method.label):
        n_crystals += 1
        versions = stored.row["versions"] or {}
        given = given or GIVEN in versions
        families.add(str(versions.get(RUN_TYPE, "")))
        if stored.row["energy_per_atom"] is not None:
            _lower(lowest, stored.crystal.composition, stored.row["energy_per_atom"] + stored.row["correction_per_atom"])
    return _Before(n_crystals, frozenset(families - {""}), lowest, given)


def _lower(lowest: dict[int, float], composition: Iterable[int], energy: float) -> None:
    """Take in the energy, eV/atom, of a phase where it is one of an element alone."""
    if len(elements := list(composition)) == 1:
        lowest[elements[0]] = min(energy, lowest.get(elements[0], float("inf")))


def _energy(item: ReadCrystal, given: bool) -> float:
    """Energy, eV/atom, by which two entries of one crystal are compared."""
    return (given_e_form(item) if given else (total_energy(item) or 0.0) + _correction(item)) or 0.0


def _correction(item: ReadCrystal) -> float:
    return float(item.fields.get(Quantity.CORRECTION_PER_ATOM) or 0.0)


def _refuse_several_methods(items: Sequence[ReadCrystal]) -> None:
    """Refuse rows that name several methods themselves, as an export of a database with two of them does."""
    named = {str(item.fields[Quantity.METHOD]) for item in items if item.fields.get(Quantity.METHOD)}
    if len(named) > 1:
        raise InvalidInput(
            f"the field `{Quantity.METHOD}` names {len(named)} methods, {', '.join(sorted(named))[:200]}; their energies never meet: "
            "import each by itself"
        )


def _of_one_family(
    items: Sequence[ReadCrystal], before: _Before, refused: list[Refusal], name: str, asked: str
) -> list[ReadCrystal]:
    """Keep the rows of one family of run types, and those that do not say theirs."""
    families: list[str | None] = []
    for item in items:
        try:
            families.append(run_family(item.fields))
        except InvalidCrystal as error:
            families.append(None)
            refused.append(Refusal(label=item.label, reason=error.reason, message=str(error)))
    said = Counter(family for family in families if family)
    if asked and before.n_crystals and asked != before.family:
        says = "holds" if before.families else "does not say its run types, which may be"
        raise InvalidInput(f"--run-type {asked}: the method {name!r} {says} {before.family}; name another --method")
    if asked and not said[asked]:
        raise InvalidInput(
            f"--run-type {asked}: no crystal with an energy says so; there are {', '.join(sorted(said)) or 'none'}"
        )
    wanted = asked or before.family or max(sorted(said), key=lambda family: (said[family], family == GGA), default="")
    kept = []
    for item, family in zip(items, families, strict=True):
        if family in {"", wanted}:
            kept.append(item)
        elif family is not None:
            beside = (
                f"and {name!r} holds {wanted}" if before.families
                else f"and {name!r} holds energies that do not say theirs" if before.n_crystals
                else f"and --run-type takes {wanted}" if asked
                else f"where {said[wanted]} of this import are {wanted}"
            )  # fmt: skip
            refused.append(
                Refusal(
                    label=item.label,
                    reason="run_type",
                    message=f"its run type is {family}, {beside}; their energies never meet: import it under another --method, "
                    f"with --run-type {family}",
                )
            )
    return kept


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
            f"{len(items) - n_total} crystals come with formation energies alone and {len(items) - n_given} with total energies alone; "
            "the two never meet on one hull: import them apart, each under a --method of its own"
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
        _lower(lowest, item.crystal.composition, (total_energy(item) or 0.0) + _correction(item))
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
            e_form = references.formation_energy_per_atom(item.crystal.composition, total_energy(item) or 0.0, _correction(item))
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
            f"{n_lacking} crystals have no formation energy, which is taken from the elements: import the entries of {_names(lacking)} "
            f"of the same method too, in one command with these or before, under --method {method.functional}"
        )
    return records


def _names(elements: set[int]) -> str:
    return ", ".join(SYMBOLS[z] for z in sorted(elements))


def _said(item: ReadCrystal, method: Method, *, given: bool = False) -> Method:
    """Remember beside the method what the row says of its energy."""
    family = run_family(item.fields)
    said = ({RUN_TYPE: family} if family else {}) | ({GIVEN: "as given"} if given else {})
    return Method(code=method.code, functional=method.functional, versions=said)


def _append(records: list[CrystalRecord], item: ReadCrystal, method: Method, e_form: float, refused: list[Refusal]) -> None:
    try:
        records.append(
            crystal_record(
                item.crystal,
                method,
                e_form_per_atom=e_form,
                energy_per_atom=total_energy(item),
                correction_per_atom=_correction(item),
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
