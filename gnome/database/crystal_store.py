"""Crystals in the database: insertion, look-ups, hull columns."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, bindparam, func, select, update

from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.database.connection import CHUNK, Database, in_chunks, insert_new
from gnome.database.records import CrystalRecord, HullColumns, StoredCrystal, TrainingRow
from gnome.database.schema import candidates, crystal_elements, crystals, methods, seedings
from gnome.errors import InvalidInput
from gnome.quantities import Quantity
from gnome.stability.entries import HullEntry
from gnome.stability.method import Method

_UNSHOWN = {"key", "structure"}
SHOWN_COLUMNS = {
    **{column.name: column for column in crystals.c if column.name not in _UNSHOWN},
    str(Quantity.PARENT): candidates.c.parent_id,
    str(Quantity.GENERATOR): candidates.c.generator,
}
"""What a crystal's row shows, by name: its own columns, and from its candidate the parent and the generator."""


def select_crystals() -> Select[Any]:
    """Select the shown columns and the structure of crystals, each with its candidate where it has one."""
    shown = [column.label(name) for name, column in SHOWN_COLUMNS.items()]
    return select(*shown, crystals.c.structure, crystals.c.key).select_from(crystals.outerjoin(candidates))


def stored_crystal(row: Row[Any]) -> StoredCrystal:
    """Take a row of `select_crystals` apart."""
    columns = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's documented way to a dict
    del columns["key"]
    return StoredCrystal(crystal=Crystal.from_dict(columns.pop("structure")), row=columns)


def known_before(number: int) -> ColumnElement[bool]:
    """Crystals that were there when a round began: imported ones, and those of earlier rounds."""
    return crystals.c.round.is_(None) | (crystals.c.round < number)


def alphabetical_formula(composition: Mapping[int, int]) -> str:
    """Spell a reduced formula as OPTIMADE does: elements in alphabetical order, amounts without common divisor."""
    divisor = math.gcd(*composition.values())
    amounts = sorted((SYMBOLS[z], amount // divisor) for z, amount in composition.items())
    return "".join(f"{symbol}{amount if amount > 1 else ''}" for symbol, amount in amounts)


def anonymous_formula(composition: Mapping[int, int]) -> str:
    """Spell a formula as OPTIMADE's anonymous one: A, B, ... for the elements, the largest amount first."""
    divisor = math.gcd(*composition.values())
    amounts = sorted((amount // divisor for amount in composition.values()), reverse=True)
    letters = [(("", *_LETTERS)[i // 26]) + _LETTERS[i % 26].lower() if i >= 26 else _LETTERS[i] for i in range(len(amounts))]
    return "".join(f"{letter}{amount if amount > 1 else ''}" for letter, amount in zip(letters, amounts, strict=True))


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class CrystalStore(Database):
    """The part of `Store` that holds crystals."""

    def add_method(self, method: Method) -> str:
        """Record what a label stands for; returns the label."""
        with self.write() as connection:
            insert_new(connection, methods, [_method_row(method)], "label")
        return method.label

    def methods(self) -> dict[str, Method]:
        """Find every method by its label."""
        with self.read() as connection:
            return {
                row.label: Method.from_dict(row.definition)
                for row in connection.execute(select(methods).order_by(methods.c.label))
            }

    def add_crystals(self, records: Iterable[CrystalRecord]) -> int:
        """Insert crystals that are not there yet (by id and method); returns how many were new."""
        rows = {(record.crystal.id, record.method.label): record for record in records}
        known_methods = {record.method.label: record.method for record in rows.values()}
        with self.write() as connection:
            insert_new(connection, methods, [_method_row(method) for method in known_methods.values()], "label")
            new = insert_new(connection, crystals, [_crystal_row(record) for record in rows.values()], "key", "id", "method")
            elements = [
                {"element": SYMBOLS[z], "crystal_key": row.key, "amount": amount}
                for row in new
                for z, amount in rows[row.id, row.method].crystal.composition.items()
            ]
            if elements:
                connection.execute(crystal_elements.insert(), elements)
        return len(new)

    def crystal(self, crystal_id: str, method: str | None = None) -> StoredCrystal:
        """Find one crystal; where several methods know it and none is given, the first that stored it.

        Raises InvalidInput when there is none.
        """
        found = self._find(crystals.c.id, [crystal_id], method).get(crystal_id, [])
        if not found:
            raise InvalidInput(f"no crystal {crystal_id!r} in {self.location}" + (f" under {method}" if method else ""))
        return found[0]

    def crystals_by_id(self, ids: Iterable[str], method: str | None = None) -> dict[str, list[StoredCrystal]]:
        """Find crystals by id; ids that are not there are left out."""
        return self._find(crystals.c.id, ids, method)

    def crystals_by_fingerprint(self, keys: Iterable[str], method: str | None = None) -> dict[str, list[StoredCrystal]]:
        """Find the crystals of each identity bucket, where duplicates are looked for."""
        return self._find(crystals.c.fingerprint, keys, method)

    def _find(self, column: Any, values: Iterable[str], method: str | None) -> dict[str, list[StoredCrystal]]:
        found: dict[str, list[StoredCrystal]] = {}
        with self.read() as connection:
            for chunk in in_chunks(values):
                statement = select_crystals().where(column.in_(chunk)).order_by(crystals.c.key)
                if method is not None:
                    statement = statement.where(crystals.c.method == method)
                for row in connection.execute(statement):
                    stored = stored_crystal(row)
                    found.setdefault(stored.row[column.name], []).append(stored)
        return found

    def methods_of_formulas(self, formulas: Iterable[str], *, before_round: int) -> dict[str, list[str]]:
        """Find under which methods each reduced formula was known when a round began; formulas that were not are left out."""
        found: dict[str, list[str]] = {}
        with self.read() as connection:
            for chunk in in_chunks(formulas):
                statement = select(crystals.c.reduced_formula, crystals.c.method).distinct()
                statement = statement.where(crystals.c.reduced_formula.in_(chunk), known_before(before_round))
                for formula, method in connection.execute(statement.order_by(crystals.c.method)):
                    found.setdefault(formula, []).append(method)
        return found

    def formulas(self) -> frozenset[str]:
        """Every reduced formula that a crystal of any method has."""
        with self.read() as connection:
            return frozenset(connection.scalars(select(crystals.c.reduced_formula).distinct()))

    def crystals_of(self, method: str, *, before_round: int | None = None) -> Iterator[StoredCrystal]:
        """Yield crystals of a method in the order of arrival, for example as parents of candidates.

        `before_round` leaves out those of that round and later.
        """
        statement = select_crystals().where(crystals.c.method == method)
        if before_round is not None:
            statement = statement.where(known_before(before_round))
        return map(stored_crystal, self._pages(statement))

    def training_rows(self, method: str) -> Iterator[TrainingRow]:
        """Yield the labelled examples of a method in the order of arrival."""
        statement = select(
            crystals.c.key,
            crystals.c.id,
            crystals.c.structure,
            crystals.c.e_form_per_atom,
            crystals.c.energy_per_atom,
            crystals.c.round,
            candidates.c.structure.label("unrelaxed"),
        )
        statement = statement.select_from(crystals.outerjoin(candidates)).where(crystals.c.method == method)
        for row in self._pages(statement):
            yield TrainingRow(
                id=row.id,
                crystal=Crystal.from_dict(row.structure),
                unrelaxed=Crystal.from_dict(row.unrelaxed) if row.unrelaxed is not None else None,
                e_form_per_atom=row.e_form_per_atom,
                energy_per_atom=row.energy_per_atom,
                round=row.round,
            )

    def _pages(self, statement: Select[Any]) -> Iterator[Row[Any]]:
        """Run a statement page by page, so that no long reading holds up the log of the writers."""
        last = 0
        while True:
            with self.read() as connection:
                page = connection.execute(statement.where(crystals.c.key > last).order_by(crystals.c.key).limit(CHUNK)).all()
            yield from page
            if len(page) < CHUNK:
                return
            last = page[-1].key

    def count_crystals(self, method: str, *, before_round: int) -> int:
        """Count the crystals of a method that were there when a round began."""
        statement = select(func.count()).select_from(crystals).where(crystals.c.method == method, known_before(before_round))
        with self.read() as connection:
            return connection.scalar(statement) or 0

    def is_seeded(self, method: str, digest: str) -> bool:
        """Say whether a method was given the seeds of a file with this digest."""
        statement = select(seedings.c.method).where(seedings.c.method == method, seedings.c.digest == digest)
        with self.read() as connection:
            return connection.execute(statement).first() is not None

    def note_seeding(self, method: str, digest: str) -> None:
        """Remember that a method has the seeds of a file."""
        with self.write() as connection:
            insert_new(connection, seedings, [{"method": method, "digest": digest}], "method")

    def has_unplaced(self, method: str) -> bool:
        """Say whether a crystal of the method was never told its distance to the hull, or what it competes with."""
        unplaced = crystals.c.e_above_hull.is_(None) | crystals.c.n_competing.is_(None)
        statement = select(crystals.c.key).where(crystals.c.method == method, unplaced).limit(1)
        with self.read() as connection:
            return connection.execute(statement).first() is not None

    def hull_entries(self, method: str, *, before_round: int | None = None) -> list[HullEntry]:
        """Every crystal of a method as an entry of its hull, in the order of arrival.

        With `before_round` the hull as it stood when that round began.
        """
        numbers = {symbol: z for z, symbol in enumerate(SYMBOLS)}
        statement = (
            select(
                crystals.c.key, crystals.c.id, crystals.c.e_form_per_atom, crystal_elements.c.element, crystal_elements.c.amount
            )
            .join(crystal_elements, crystal_elements.c.crystal_key == crystals.c.key)
            .where(crystals.c.method == method)
            .order_by(crystals.c.key)
        )
        if before_round is not None:
            statement = statement.where(known_before(before_round))
        found: dict[int, tuple[str, float, dict[int, int]]] = {}
        with self.read() as connection:
            for key, crystal_id, e_form, element, amount in connection.execute(statement):
                found.setdefault(key, (crystal_id, e_form, {}))[2][numbers[element]] = amount
        return [
            HullEntry(id=crystal_id, composition=dict(sorted(composition.items())), e_form_per_atom=e_form, method=method)
            for crystal_id, e_form, composition in found.values()
        ]

    def update_hull_columns(self, method: str, rows: Iterable[HullColumns]) -> int:
        """Write what the hull says of crystals; returns how many were found."""
        values = [
            {
                "of_id": row.id,
                "e_above_hull": row.e_above_hull,
                "decomposition_energy": row.decomposition_energy,
                "decomposes_to": [asdict(product) for product in row.decomposes_to],
                "n_competing": row.n_competing,
            }
            for row in rows
        ]
        if not values:
            return 0
        statement = (
            update(crystals)
            .where(crystals.c.id == bindparam("of_id"), crystals.c.method == method)
            .values({name: bindparam(name) for name in ("e_above_hull", "decomposition_energy", "decomposes_to", "n_competing")})
        )
        with self.write() as connection:
            return connection.execute(statement, values).rowcount


def _method_row(method: Method) -> dict[str, Any]:
    return {"label": method.label, "definition": method.to_dict()}


def _crystal_row(record: CrystalRecord) -> dict[str, Any]:
    crystal = record.crystal
    composition = crystal.composition
    products = record.decomposes_to
    return {
        "id": crystal.id,
        "method": record.method.label,
        "reduced_formula": crystal.reduced_formula,
        "chemical_formula_reduced": alphabetical_formula(composition),
        "chemical_formula_anonymous": anonymous_formula(composition),
        "chemical_system": crystal.chemical_system,
        "n_elements": len(composition),
        "n_atoms": crystal.n_atoms,
        "volume_per_atom": crystal.volume_per_atom,
        "space_group_number": record.space_group_number,
        "protostructure": record.protostructure,
        "fingerprint": record.fingerprint,
        "structure": crystal.to_dict(),
        "energy_per_atom": record.energy_per_atom,
        "correction_per_atom": record.correction_per_atom,
        "correction_scheme": record.method.correction_scheme,
        "correction_version": record.method.correction_version,
        "e_form_per_atom": record.e_form_per_atom,
        "e_above_hull": record.e_above_hull,
        "decomposition_energy": record.decomposition_energy,
        "decomposes_to": [asdict(product) for product in products] if products is not None else None,
        "n_competing": record.n_competing,
        "p_stable": record.p_stable,
        "formula_check": record.formula_check,
        "origin": record.origin,
        "round": record.round,
        "candidate_id": record.candidate_id,
        "source": record.source,
        "versions": dict(record.method.versions),
    }
