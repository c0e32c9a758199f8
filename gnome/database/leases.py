"""The lease on the round: one process at a time runs a round on a database.

    with hold_round(store) as lease: ...

Each holder gets a token larger than all before (a fencing token).  While a store holds the lease, each of its writes checks the token in
its own transaction and prolongs the lease, so a process that was stopped, declared lost and woken up again cannot write into the round
of its successor.  The holder's time is the database's; a holder on this host that has died is replaced at once.
"""

import contextlib
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, select, update

from gnome.database.clock import database_time
from gnome.database.connection import Database, Fence, insert_new
from gnome.database.owners import is_dead, readable_owner, this_process
from gnome.database.schema import leases
from gnome.errors import DatabaseUnavailable, GnomeError, RoundBusy

ROUND = "round"
LEASE_SECONDS = 300.0


@contextlib.contextmanager
def hold_round(store: Database, *, owner: str | None = None, lease_seconds: float = LEASE_SECONDS) -> Iterator[Fence]:
    """Hold the lease on the round while the block runs; a thread prolongs it during long computations.

    Worker processes of the round call `join_round` with the token.  Raises RoundBusy while another process holds it.
    """
    fence = acquire_round(store, owner=owner, lease_seconds=lease_seconds)
    stop = threading.Event()
    keeper = threading.Thread(target=_keep, args=(store, fence, stop), name="round-lease", daemon=True)
    keeper.start()
    try:
        yield fence
    finally:
        stop.set()
        keeper.join()
        with contextlib.suppress(DatabaseUnavailable):  # then the lease runs out by itself
            release_round(store, fence)


def acquire_round(store: Database, *, owner: str | None = None, lease_seconds: float = LEASE_SECONDS) -> Fence:
    """Take the lease on the round; from here on the store's writes are fenced.

    Raises RoundBusy, naming the holder and when its lease ends.
    """
    owner = owner or this_process()
    before, store.fence = store.fence, None  # a lease that was lost must not stop this store from asking for a new one
    try:
        with store.write() as connection:
            store.fence = _take(connection, store.location, owner, lease_seconds)
    except BaseException:
        store.fence = before
        raise
    return store.fence


def round_holder(store: Database) -> str | None:
    """Name the living process that runs a round, for people; None when nobody does, or this store itself."""
    with store.read() as connection:
        held = connection.execute(_holder()).one_or_none()
    if held is None or not _is_held(held) or (store.fence is not None and store.fence.token == held.token):
        return None
    return readable_owner(held.owner)


def unfinished_line(store: Database, number: int) -> str:
    """Say of the unfinished round who runs it, or what to do where nobody does."""
    holder = round_holder(store)
    if holder:
        return f"round {number} is being run by process {holder}"
    return f"round {number} is unfinished; `gnome discover` goes on with it"


def _holder() -> Select[Any]:
    return select(leases, (leases.c.lease_until > database_time()).label("valid")).where(leases.c.name == ROUND)


def _is_held(held: Row[Any]) -> bool:
    return held.owner is not None and bool(held.valid) and not is_dead(held.owner)


def _take(connection: Connection, location: str, owner: str, lease_seconds: float) -> Fence:
    insert_new(connection, leases, [{"name": ROUND, "token": 0, "owner": None, "lease_until": None}], "name")
    now = database_time()
    held = connection.execute(_holder().with_for_update()).one()
    if _is_held(held):
        until = datetime.fromtimestamp(held.lease_until, UTC).strftime("%H:%M:%S")
        raise RoundBusy(
            f"a round is being run on {location} by process {readable_owner(held.owner)}, which holds it until {until} UTC or longer; "
            "wait for it or use another database"
        )
    values = {"token": held.token + 1, "owner": owner, "lease_until": now + lease_seconds}
    connection.execute(update(leases).where(leases.c.name == ROUND).values(**values))
    return Fence(name=ROUND, token=held.token + 1, lease_seconds=lease_seconds)


def join_round(store: Database, token: int, *, lease_seconds: float = LEASE_SECONDS) -> None:
    """Fence the writes of this store by a token that another process of the same round holds; raises RoundBusy when it is outdated."""
    store.fence = Fence(name=ROUND, token=token, lease_seconds=lease_seconds)
    with store.write():
        pass  # opening the transaction checks the token


def release_round(store: Database, fence: Fence) -> None:
    """Give the lease back; nothing happens when it was lost."""
    store.fence = None
    with store.write() as connection:
        connection.execute(
            update(leases).where(leases.c.name == fence.name, leases.c.token == fence.token).values(owner=None, lease_until=None)
        )


def _keep(store: Database, fence: Fence, stop: threading.Event) -> None:
    while not stop.wait(fence.lease_seconds / 3):
        # A failure here is left to the next write of the round, which meets it with someone there to tell.
        with contextlib.suppress(GnomeError), store.write():
            pass
