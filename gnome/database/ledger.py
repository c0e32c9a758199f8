"""What a round has done: one row for each shard of each stage.

A stage is cut into shards; a shard is claimed, worked on, and completed with its result (JSON: counts, ids and paths).  A shard whose
owner has died or whose lease has run out can be claimed again, and its results are idempotent inserts, so a round that was interrupted
anywhere goes on where it stopped.  The attempt number tells claims of one shard apart: a former owner's answer is refused.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, select, update

from gnome.database.clock import database_time
from gnome.database.connection import Database, insert_new
from gnome.database.owners import is_dead, this_process
from gnome.database.schema import ledger
from gnome.errors import InvalidInput, RoundBusy


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A row of the ledger; `state` is pending, running, done or failed, `lease_until` seconds since 1970."""

    round: int
    stage: str
    shard: int
    state: str
    attempt: int
    owner: str | None
    lease_until: float | None
    result: Any
    message: str | None


class Ledger:
    """The ledger in a database."""

    def __init__(self, store: Database) -> None:
        """Use the ledger of this database."""
        self._store = store

    def claim(
        self, number: int, stage: str, shard: int = 0, *, owner: str | None = None, lease_seconds: float = 900.0
    ) -> int | None:
        """Take a shard to work on it; returns the number of this attempt, from 1.

        None when it is done already (see `result`) or another living owner holds it.  The same owner may claim again.
        """
        owner = owner or this_process()
        with self._store.write() as connection:
            insert_new(connection, ledger, [_row(number, stage, shard)], "shard")
            now = database_time()
            here = _at(number, stage, shard)
            row = connection.execute(
                select(ledger, (ledger.c.lease_until > now).label("valid")).where(here).with_for_update()
            ).one()
            held = row.state == "running" and row.owner != owner and row.valid and not is_dead(row.owner)
            if row.state == "done" or held:
                return None
            connection.execute(
                update(ledger)
                .where(here)
                .values(state="running", attempt=row.attempt + 1, owner=owner, lease_until=now + lease_seconds, message=None)
            )
            return int(row.attempt) + 1

    def complete(self, number: int, stage: str, shard: int, attempt: int, result: Any = None) -> None:
        """Close a claimed shard with its result.  Raises RoundBusy when another has taken it over."""
        self._change(number, stage, shard, attempt, state="done", result=result, lease_until=None)

    def fail(self, number: int, stage: str, shard: int, attempt: int, message: str) -> None:
        """Close a claimed shard as failed, with the reason; it can be claimed again."""
        self._change(number, stage, shard, attempt, state="failed", message=message.replace("\x00", ""), lease_until=None)

    def result(self, number: int, stage: str, shard: int = 0) -> Any:
        """Find the result of a shard; None when it is not done or had none (`state` tells)."""
        found = self.find(number, stage, shard)
        return found.result if found and found.state == "done" else None

    def state(self, number: int, stage: str, shard: int = 0) -> str:
        """Tell the state of a shard; pending when nobody has claimed it."""
        found = self.find(number, stage, shard)
        return found.state if found else "pending"

    def find(self, number: int, stage: str, shard: int = 0) -> Shard | None:
        """Find the row of a shard."""
        with self._store.read() as connection:
            row = connection.execute(select(ledger).where(_at(number, stage, shard))).one_or_none()
        return Shard(**row._mapping) if row else None  # noqa: SLF001 - the documented way to a dict

    def shards(self, number: int, stage: str | None = None) -> list[Shard]:
        """Every row of a round, or of one of its stages, in order."""
        statement = select(ledger).where(ledger.c.round == number).order_by(ledger.c.stage, ledger.c.shard)
        if stage is not None:
            statement = statement.where(ledger.c.stage == stage)
        with self._store.read() as connection:
            return [Shard(**row._mapping) for row in connection.execute(statement)]  # noqa: SLF001 - the documented way to a dict

    def _change(self, number: int, stage: str, shard: int, attempt: int, **values: Any) -> None:
        mine = and_(_at(number, stage, shard), ledger.c.state == "running", ledger.c.attempt == attempt)
        with self._store.write() as connection:
            if connection.execute(update(ledger).where(mine).values(**values)).rowcount != 1:
                raise RoundBusy(
                    f"attempt {attempt} at shard {shard} of {stage} in round {number} is no longer held; another took over"
                )


def _row(number: int, stage: str, shard: int) -> dict[str, Any]:
    if shard < 0 or not stage:
        raise InvalidInput(f"stage {stage!r}, shard {shard}: expected a name and a number from 0")
    return {"round": number, "stage": stage, "shard": shard, "state": "pending", "attempt": 0}


def _at(number: int, stage: str, shard: int) -> ColumnElement[bool]:
    return and_(ledger.c.round == number, ledger.c.stage == stage, ledger.c.shard == shard)
