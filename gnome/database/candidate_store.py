"""Candidates, predictions and evaluations in the database, and the lineage that they make up."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import Row, bindparam, func, select, update

from gnome.crystals.crystal import Crystal
from gnome.database.connection import in_chunks, insert_new
from gnome.database.crystal_store import CrystalStore, known_before
from gnome.database.records import Ancestor, Assessment, CandidateRecord, EvaluationRecord, PredictionRecord, StoredCrystal
from gnome.database.schema import candidates, crystals, evaluations, methods, predictions
from gnome.stability.method import Method

MAX_FAILED = 3
"""Failed evaluations after which a formula is not proposed again: one may be the machine's doing, or the structure's."""


class CandidateStore(CrystalStore):
    """The part of `Store` that holds what a round proposes, predicts and evaluates."""

    def add_candidates(self, records: Iterable[CandidateRecord]) -> int:
        """Insert candidates that are not there yet (by id); returns how many were new."""
        rows = [
            {
                "id": record.id,
                "round": record.round,
                "generator": record.generator,
                "parent_id": record.parent_id,
                "parameters": dict(record.parameters),
                "seed": record.seed,
                "structure": record.crystal.to_dict(),
                "reduced_formula": record.crystal.reduced_formula,
                "n_atoms": record.crystal.n_atoms,
            }
            for record in records
        ]
        with self.write() as connection:
            return len(insert_new(connection, candidates, rows, "id"))

    def add_predictions(self, records: Iterable[PredictionRecord]) -> int:
        """Insert predictions that are not there yet (by candidate and model); returns how many were new."""
        with self.write() as connection:
            return len(insert_new(connection, predictions, [asdict(record) for record in records], "candidate_id"))

    def add_evaluations(self, records: Iterable[EvaluationRecord]) -> int:
        """Insert evaluations that are not there yet (by candidate and method); returns how many were new."""
        rows = {(record.candidate_id, record.method.label): record for record in records}
        labels = {
            record.method.label: {"label": record.method.label, "definition": record.method.to_dict()} for record in rows.values()
        }
        with self.write() as connection:
            insert_new(connection, methods, list(labels.values()), "label")
            return len(insert_new(connection, evaluations, [_evaluation_row(record) for record in rows.values()], "candidate_id"))

    def repeat_evaluation(self, record: EvaluationRecord) -> bool:
        """Put the answer of a later attempt in the place of the one before; says whether that was there."""
        row = _evaluation_row(record)
        one = evaluations.c
        statement = (
            update(evaluations)
            .where(
                one.candidate_id == record.candidate_id, one.method == record.method.label, one.attempts == record.attempts - 1
            )
            .values(row)
        )
        with self.write() as connection:
            return bool(connection.execute(statement).rowcount)

    def assess_evaluations(self, assessments: Iterable[Assessment]) -> int:
        """Note what converged evaluations mean, once their crystals are stored; returns how many were found."""
        names = ("crystal_id", "novel", "e_above_hull_before")
        values = [
            {
                "of_candidate": assessment.candidate_id,
                "of_method": assessment.method,
                **{name: getattr(assessment, name) for name in names},
            }
            for assessment in assessments
        ]
        if not values:
            return 0
        statement = (
            update(evaluations)
            .where(evaluations.c.candidate_id == bindparam("of_candidate"), evaluations.c.method == bindparam("of_method"))
            .values({name: bindparam(name) for name in names})
        )
        with self.write() as connection:
            return connection.execute(statement, values).rowcount

    def candidates(self, ids: Iterable[str]) -> dict[str, CandidateRecord]:
        """Find candidates by id; ids that are not there are left out."""
        found = {}
        with self.read() as connection:
            for chunk in in_chunks(ids):
                for row in connection.execute(select(candidates).where(candidates.c.id.in_(chunk))):
                    found[row.id] = _candidate(row)
        return found

    def candidates_of_round(self, number: int) -> list[CandidateRecord]:
        """Every candidate of a round, by id."""
        with self.read() as connection:
            rows = connection.execute(select(candidates).where(candidates.c.round == number).order_by(candidates.c.id))
            return [_candidate(row) for row in rows]

    def candidate_ids_of_round(self, number: int) -> list[str]:
        """Ids of the candidates of a round, in order."""
        with self.read() as connection:
            return list(connection.scalars(select(candidates.c.id).where(candidates.c.round == number).order_by(candidates.c.id)))

    def known_formulas(self, method: str, *, before_round: int | None = None) -> frozenset[str]:
        """Reduced formulas that a crystal of the method has, that an assessed answer had, or that failed `MAX_FAILED` times.

        What converged in a round that was given up before it could be assessed is on no hull, so it may be proposed again.  With
        `before_round` only what was there when that round began.
        """
        stored = select(crystals.c.reduced_formula).where(crystals.c.method == method)
        tried = (
            select(candidates.c.reduced_formula)
            .join(evaluations, evaluations.c.candidate_id == candidates.c.id)
            .where(evaluations.c.method == method)
            .group_by(candidates.c.reduced_formula)
            .having((func.count(evaluations.c.crystal_id) > 0) | (func.count(evaluations.c.failure) >= MAX_FAILED))
        )
        if before_round is not None:
            stored = stored.where(known_before(before_round))
            tried = tried.where(evaluations.c.round < before_round)
        with self.read() as connection:
            return frozenset(connection.scalars(stored.union(tried)))

    def failed_candidates(self, method: str, *, before_round: int, reasons: Iterable[str]) -> list[CandidateRecord]:
        """Candidates of earlier rounds whose evaluation under a method failed for one of these reasons, by id."""
        statement = (
            select(candidates)
            .join(evaluations, evaluations.c.candidate_id == candidates.c.id)
            .where(evaluations.c.method == method, evaluations.c.round < before_round, evaluations.c.failure.in_(tuple(reasons)))
            .order_by(candidates.c.id)
        )
        with self.read() as connection:
            return [_candidate(row) for row in connection.execute(statement)]

    def predictions_of_round(self, number: int) -> list[PredictionRecord]:
        """Every prediction for the candidates of a round, by candidate and model."""
        statement = select(predictions).join(candidates).where(candidates.c.round == number)
        with self.read() as connection:
            rows = connection.execute(statement.order_by(predictions.c.candidate_id, predictions.c.model_id))
            return [PredictionRecord(**row._mapping) for row in rows]  # noqa: SLF001 - the documented way to a dict

    def evaluations_of_round(self, number: int) -> list[EvaluationRecord]:
        """Every evaluation of a round, failures included, by candidate and method."""
        statement = select(evaluations).where(evaluations.c.round == number)
        known = self.methods()
        with self.read() as connection:
            rows = connection.execute(statement.order_by(evaluations.c.candidate_id, evaluations.c.method))
            return [_evaluation(row, known) for row in rows]

    def failures_of_round(self, number: int) -> dict[str, int]:
        """Count the failed evaluations of a round by reason, the most frequent first."""
        statement = select(evaluations.c.failure, func.count()).where(
            evaluations.c.round == number, evaluations.c.failure.is_not(None)
        )
        with self.read() as connection:
            counted = Counter(
                {str(reason): int(count) for reason, count in connection.execute(statement.group_by(evaluations.c.failure))}
            )
        return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))

    def lineage(self, crystal_id: str, method: str | None = None) -> tuple[Ancestor, ...]:
        """Trace a crystal back: itself first, then the crystal it was made from, down to one that was not made by a round.

        Raises InvalidInput when there is no such crystal.
        """
        stored: StoredCrystal | None = self.crystal(crystal_id, method)
        chain: list[Ancestor] = []
        seen: set[str] = set()
        while stored is not None and stored.id not in seen:
            seen.add(stored.id)
            ancestor = self._ancestor(stored)
            chain.append(ancestor)
            parent_id = ancestor.candidate.parent_id if ancestor.candidate else None
            parents = self.crystals_by_id([parent_id]).get(parent_id, []) if parent_id else []
            same_method = [parent for parent in parents if parent.row["method"] == stored.row["method"]]
            stored = next(iter(same_method or parents), None)
        return tuple(chain)

    def _ancestor(self, stored: StoredCrystal) -> Ancestor:
        candidate_id = stored.row["candidate_id"]
        if candidate_id is None:
            return Ancestor(crystal=stored, candidate=None, predictions=(), evaluations=())
        known = self.methods()
        with self.read() as connection:
            candidate = connection.execute(select(candidates).where(candidates.c.id == candidate_id)).one()
            predicted = connection.execute(
                select(predictions).where(predictions.c.candidate_id == candidate_id).order_by(predictions.c.model_id)
            ).all()
            evaluated = connection.execute(
                select(evaluations).where(evaluations.c.candidate_id == candidate_id).order_by(evaluations.c.method)
            ).all()
        return Ancestor(
            crystal=stored,
            candidate=_candidate(candidate),
            predictions=tuple(PredictionRecord(**row._mapping) for row in predicted),  # noqa: SLF001 - the documented way to a dict
            evaluations=tuple(_evaluation(row, known) for row in evaluated),
        )


def _candidate(row: Row[Any]) -> CandidateRecord:
    return CandidateRecord(
        id=row.id,
        round=row.round,
        generator=row.generator,
        crystal=Crystal.from_dict(row.structure),
        parent_id=row.parent_id,
        parameters=row.parameters,
        seed=row.seed,
    )


def _evaluation_row(record: EvaluationRecord) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in record.__dataclass_fields__}
    structure = row.pop("crystal")
    return {
        **row,
        "method": record.method.label,
        "versions": dict(record.method.versions),
        "structure": structure.to_dict() if structure is not None else None,
    }


def _evaluation(row: Row[Any], known: Mapping[str, Method]) -> EvaluationRecord:
    columns = dict(row._mapping)  # noqa: SLF001 - the documented way to a dict
    del columns["created_at"]
    structure = columns.pop("structure")
    columns["crystal"] = Crystal.from_dict(structure) if structure is not None else None
    columns["method"] = replace(known[row.method], versions=columns.pop("versions") or {})
    return EvaluationRecord(**columns)
