"""The database of crystals, candidates, evaluations, models and rounds.

    with Store.open(url) as store: ...              # made or brought up to date
    with Store.open(url, read_only=True) as store:  # never changes or makes anything

Inserting is idempotent everywhere: what is there (by its unique key) is passed over, so a stage may be run again after a crash.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Row, case, func, select, update

from gnome.database.candidate_store import CandidateStore
from gnome.database.clock import database_time
from gnome.database.connection import insert_new
from gnome.database.records import ModelRecord, RoundRecord
from gnome.database.schema import metadata, models, rounds
from gnome.errors import InvalidInput, RoundBusy


class Store(CandidateStore):
    """Everything that a round writes and a query reads; see the parts for crystals and candidates."""

    def start_round(self, settings: Mapping[str, Any], seed: int) -> RoundRecord:
        """Begin the next round.  Raises RoundBusy when one is unfinished: resume or finish that first."""
        with self.write() as connection:
            number = (connection.scalar(select(func.max(rounds.c.number))) or 0) + 1
            running = connection.scalar(select(rounds.c.number).where(rounds.c.state == "running"))
            if running is not None:
                raise RoundBusy(f"round {running} is unfinished; resume it before starting round {number}")
            connection.execute(rounds.insert().values(number=number, state="running", seed=seed, settings=dict(settings)))
        return self.round(number)

    def finish_round(self, number: int, summary: Mapping[str, Any], *, failed: bool = False) -> RoundRecord:
        """Close a round with its summary; closing it again changes nothing.  Raises InvalidInput when there is no such round."""
        with self.write() as connection:
            connection.execute(
                update(rounds)
                .where(rounds.c.number == number, rounds.c.state == "running")
                .values(state="failed" if failed else "finished", summary=dict(summary), finished_at=database_time())
            )
        return self.round(number)

    def open_round(self) -> RoundRecord | None:
        """Find the round that was started and not finished."""
        with self.read() as connection:
            row = connection.execute(select(rounds).where(rounds.c.state == "running")).one_or_none()
        return _round(row) if row else None

    def round(self, number: int) -> RoundRecord:
        """Find a round.  Raises InvalidInput when there is none."""
        with self.read() as connection:
            row = connection.execute(select(rounds).where(rounds.c.number == number)).one_or_none()
        if row is None:
            raise InvalidInput(f"no round {number} in {self.location}")
        return _round(row)

    def rounds(self) -> list[RoundRecord]:
        """Every round, the first first."""
        with self.read() as connection:
            return [_round(row) for row in connection.execute(select(rounds).order_by(rounds.c.number))]

    def add_model(self, record: ModelRecord) -> bool:
        """Register a model unless its id is known; says whether it was new.  Promotion is `promote_model`'s to do."""
        if record.status != "candidate" or record.promoted_at is not None:
            raise InvalidInput(f"model {record.id}: a new model is a candidate, not {record.status}; use promote_model")
        row = {name: getattr(record, name) for name in record.__dataclass_fields__}
        with self.write() as connection:
            return bool(
                insert_new(connection, models, [{**row, "card": dict(record.card), "metrics": dict(record.metrics)}], "id")
            )

    def promote_model(self, model_id: str) -> ModelRecord:
        """Make a model the one in use for its kind and retire the one before.  Raises InvalidInput when it is unknown."""
        with self.write() as connection:
            kind = connection.scalar(select(models.c.kind).where(models.c.id == model_id))
            if kind is None:
                raise InvalidInput(f"no model {model_id!r} in {self.location}")
            before = update(models).where(models.c.kind == kind, models.c.status == "promoted", models.c.id != model_id)
            connection.execute(before.values(status="retired"))
            one = update(models).where(models.c.id == model_id, models.c.status != "promoted")
            connection.execute(one.values(status="promoted", promoted_at=_after_all(kind)))
            return _model(connection.execute(select(models).where(models.c.id == model_id)).one())

    def take_back_model(self, model_id: str, restored: str) -> ModelRecord:
        """Put a model that was in use before back in use, as if those in use since had never been; `model_id` is the one in use.

        Raises InvalidInput where that is in use no longer, or the other never was before it.
        """
        with self.write() as connection:
            one, other = (
                connection.execute(select(models).where(models.c.id == name)).one_or_none() for name in (model_id, restored)
            )
            if one is None or one.status != "promoted" or other is None or other.kind != one.kind or other.promoted_at is None:
                raise InvalidInput(
                    f"{restored} was not in use before {model_id}, or another has been put in use meanwhile; look again"
                )
            later = update(models).where(models.c.kind == one.kind, models.c.promoted_at > other.promoted_at)
            connection.execute(later.values(status="retired", promoted_at=None))
            connection.execute(update(models).where(models.c.id == restored).values(status="promoted"))
            return _model(connection.execute(select(models).where(models.c.id == restored)).one())

    def retire_model(self, model_id: str) -> None:
        """Set a model aside, for example one that was trained and not promoted."""
        with self.write() as connection:
            connection.execute(update(models).where(models.c.id == model_id).values(status="retired"))

    def model(self, model_id: str) -> ModelRecord:
        """Find a model.  Raises InvalidInput when there is none of this id."""
        with self.read() as connection:
            row = connection.execute(select(models).where(models.c.id == model_id)).one_or_none()
        if row is None:
            raise InvalidInput(f"no model {model_id!r} in {self.location}")
        return _model(row)

    def current_model(self, kind: str) -> ModelRecord | None:
        """Find the model in use for a kind."""
        with self.read() as connection:
            row = connection.execute(select(models).where(models.c.kind == kind, models.c.status == "promoted")).one_or_none()
        return _model(row) if row else None

    def model_history(self, kind: str | None = None) -> list[ModelRecord]:
        """Every model, the oldest first."""
        statement = select(models).order_by(models.c.created_at, models.c.id)
        if kind is not None:
            statement = statement.where(models.c.kind == kind)
        with self.read() as connection:
            return [_model(row) for row in connection.execute(statement)]

    def counts(self) -> dict[str, int]:
        """Count the rows of every table."""
        with self.read() as connection:
            return {
                name: connection.scalar(select(func.count()).select_from(table)) or 0
                for name, table in sorted(metadata.tables.items())
            }


def _after_all(kind: str) -> ColumnElement[float]:
    """Now, and in any case later than every model of the kind: clocks go in steps, and may be put back."""
    latest = select(func.max(models.c.promoted_at)).where(models.c.kind == kind).scalar_subquery()
    return case((latest >= database_time(), latest + 0.001), else_=database_time())


def _round(row: Row[Any]) -> RoundRecord:
    return RoundRecord(**row._mapping)  # noqa: SLF001 - the documented way to a dict


def _model(row: Row[Any]) -> ModelRecord:
    return ModelRecord(**{name: value for name, value in row._mapping.items() if name != "created_at"})  # noqa: SLF001 - the documented way
