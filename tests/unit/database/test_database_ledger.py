import multiprocessing
import os
import re
import socket
import time

import psutil
import pytest
from database_rows import CHGNET, candidate, seed
from sqlalchemy import text

from gnome.database.leases import acquire_round, hold_round, join_round, release_round
from gnome.database.ledger import Ledger
from gnome.database.owners import is_dead, this_process
from gnome.database.store import Store
from gnome.errors import InvalidInput, RoundBusy

ELSEWHERE = "17@another-host"


@pytest.fixture
def ledger(store: Store) -> Ledger:
    store.start_round({}, 1)
    return Ledger(store)


def test_a_shard_is_claimed_completed_and_remembered(ledger: Ledger) -> None:
    assert ledger.state(1, "evaluate", 3) == "pending"
    assert ledger.claim(1, "evaluate", 3) == 1
    assert ledger.state(1, "evaluate", 3) == "running"
    assert ledger.result(1, "evaluate", 3) is None
    ledger.complete(1, "evaluate", 3, 1, {"evaluated": 8, "path": "shard-3.parquet"})
    assert ledger.result(1, "evaluate", 3) == {"evaluated": 8, "path": "shard-3.parquet"}
    assert ledger.claim(1, "evaluate", 3) is None
    assert ledger.claim(1, "evaluate", 3, owner=ELSEWHERE) is None


def test_a_shard_of_a_living_owner_is_not_given_away(ledger: Ledger) -> None:
    assert ledger.claim(1, "screen", owner=ELSEWHERE) == 1
    assert ledger.claim(1, "screen") is None
    assert ledger.claim(1, "screen", owner=ELSEWHERE) == 2


def test_a_lease_that_ran_out_is_given_away_and_its_owner_refused(ledger: Ledger) -> None:
    assert ledger.claim(1, "screen", owner=ELSEWHERE, lease_seconds=0.05) == 1
    time.sleep(0.2)
    assert ledger.claim(1, "screen") == 2
    for late in (
        lambda: ledger.complete(1, "screen", 0, 1, "stale"),
        lambda: ledger.fail(1, "screen", 0, 1, "stale"),
    ):
        with pytest.raises(RoundBusy, match="attempt 1 at shard 0 of screen"):
            late()
    ledger.complete(1, "screen", 0, 2, "good")
    assert ledger.result(1, "screen") == "good"


def test_a_failed_shard_keeps_its_reason_and_can_be_claimed_again(ledger: Ledger) -> None:
    assert ledger.claim(1, "screen") == 1
    ledger.fail(1, "screen", 0, 1, "out of memory")
    found = ledger.find(1, "screen")
    assert found is not None
    assert (found.state, found.message) == ("failed", "out of memory")
    assert ledger.claim(1, "screen", owner=ELSEWHERE) == 2
    reclaimed = ledger.find(1, "screen")
    assert reclaimed is not None
    assert (reclaimed.state, reclaimed.message) == ("running", None)


def test_the_shards_of_a_stage_are_listed_in_order(ledger: Ledger) -> None:
    assert ledger.claim(1, "evaluate", 2) == 1
    ledger.complete(1, "evaluate", 0, ledger.claim(1, "evaluate", 0) or 0)
    assert ledger.claim(1, "evaluate", 1, owner=ELSEWHERE) == 1
    assert [(shard.shard, shard.state) for shard in ledger.shards(1, "evaluate")] == [(0, "done"), (1, "running"), (2, "running")]
    assert ledger.shards(1, "screen") == []
    with pytest.raises(InvalidInput, match="number from 0"):
        ledger.claim(1, "evaluate", -1)


def _claim_all(url: str, barrier, taken) -> None:
    with Store.open(url) as store:
        ledger = Ledger(store)
        barrier.wait(60)
        for shard in range(30):
            attempt = ledger.claim(1, "evaluate", shard)
            if attempt is not None:
                taken.put((os.getpid(), shard, attempt))


def test_two_processes_never_hold_one_shard(store: Store, ledger: Ledger, url: str) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, taken = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_claim_all, args=(url, barrier, taken)) for _ in range(2)]
    for worker in workers:
        worker.start()
    barrier.wait(60)
    claims = [taken.get(timeout=60) for _ in range(30)]  # while both live, each shard goes to one of them
    for worker in workers:
        worker.join(60)
    # A worker that ended early is dead, and the other may then rightly have claimed its shards for a second time.
    first = [shard for _, shard, attempt in claims if attempt == 1]
    assert sorted(set(first)) == sorted(first)
    assert {shard.attempt for shard in ledger.shards(1, "evaluate")} <= {1, 2}
    assert len(ledger.shards(1, "evaluate")) == 30


def test_a_second_round_at_once_is_told_who_runs_the_first(store: Store, url: str) -> None:
    with hold_round(store), Store.open(url) as second:
        with pytest.raises(RoundBusy) as caught, hold_round(second):
            pytest.fail("two rounds at once")
        me = f"{os.getpid()}@{re.escape(socket.gethostname())}"
        pattern = rf"a round is being run on .* by process {me}, which holds it until \d\d:\d\d:\d\d UTC"
        assert re.match(pattern, str(caught.value))
        second.add_crystals([seed(4.0)])  # an import beside a round is no round
        store.add_crystals([seed(4.1)])
    with Store.open(url) as second, hold_round(second):
        assert second.counts()["crystals"] == 2


def test_a_lost_lease_stops_every_write_of_the_former_holder(store: Store, url: str) -> None:
    acquire_round(store, lease_seconds=0.05)
    store.start_round({}, 1)
    time.sleep(0.2)
    with Store.open(url) as second:
        fence = acquire_round(second)
        for write in (
            lambda: store.add_crystals([seed()]),
            lambda: store.add_candidates([candidate("c1")]),
            lambda: store.finish_round(1, {}),
            lambda: Ledger(store).claim(1, "screen"),
        ):
            with pytest.raises(RoundBusy, match="has lost the round"):
                write()
        second.add_crystals([seed(4.5)])
        release_round(second, fence)
    assert store.counts()["crystals"] == 1
    assert store.open_round() is not None


def test_a_store_that_lost_the_round_can_ask_for_it_again(store: Store, url: str) -> None:
    acquire_round(store, lease_seconds=0.05)
    time.sleep(0.2)
    with Store.open(url) as second, hold_round(second):
        with pytest.raises(RoundBusy, match="is being run"):
            acquire_round(store)
        with pytest.raises(RoundBusy, match="has lost the round"):
            store.add_crystals([seed()])
    assert acquire_round(store).token == 3
    with pytest.raises(RoundBusy, match="is being run"):
        acquire_round(store)  # not even by the same process twice
    assert store.add_crystals([seed()]) == 1


def _insert(url: str, barrier, backwards: bool) -> None:
    records = [seed(4.0 + i / 1000) for i in range(1500)]
    with Store.open(url) as store:
        barrier.wait(60)
        store.add_crystals(records[::-1] if backwards else records)


def test_processes_that_insert_the_same_rows_at_once_insert_them_once(store: Store, url: str) -> None:
    store.add_method(CHGNET)  # a first row that both insert would make one wait for the other from the start
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_insert, args=(url, barrier, backwards)) for backwards in (False, True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    counts = store.counts()
    assert (counts["crystals"], counts["crystal_elements"]) == (1500, 3000)


def test_every_write_prolongs_the_lease(store: Store, url: str) -> None:
    acquire_round(store, lease_seconds=1.0)
    for edge in (4.0, 4.1, 4.2):
        time.sleep(0.5)
        store.add_crystals([seed(edge)])
    with Store.open(url) as second, pytest.raises(RoundBusy, match="is being run"):
        acquire_round(second)


def test_a_quiet_holder_keeps_its_lease(store: Store, url: str) -> None:
    with hold_round(store, lease_seconds=0.6), Store.open(url) as second:
        time.sleep(1.5)
        with pytest.raises(RoundBusy, match="is being run"):
            acquire_round(second)


def test_workers_of_a_round_share_its_token(store: Store, url: str) -> None:
    with hold_round(store) as fence, Store.open(url) as worker:
        join_round(worker, fence.token)
        assert worker.add_crystals([seed()]) == 1
    with Store.open(url) as late, pytest.raises(RoundBusy, match="has lost the round"):
        join_round(late, fence.token)


def test_the_next_round_does_not_wait_for_a_dead_process(store: Store, url: str) -> None:
    acquire_round(store, owner=f"{2**22 + 1}@{socket.gethostname()}", lease_seconds=3600)
    with Store.open(url) as second, hold_round(second) as fence:
        assert fence.token == 2


def test_owners_are_told_apart() -> None:
    me = this_process()
    assert not is_dead(me)
    host = socket.gethostname()
    assert is_dead(f"{os.getpid()}@{host}#an earlier start")  # the number was given to another process since
    assert is_dead(f"{2**22 + 1}@{host}")
    assert not is_dead(f"{2**22 + 1}@another-host")
    assert not is_dead("a name")


def test_a_change_of_the_clock_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil reckons a start from the clock's idea of when the machine was started."""
    me = this_process()
    create_time = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: create_time(self) + 5.0)
    assert not is_dead(me)


def test_leases_run_by_the_clock_of_the_database(store: Store) -> None:
    fence = acquire_round(store, lease_seconds=100)
    with store.read() as connection:
        until = connection.execute(text("SELECT lease_until FROM leases")).scalar_one()
        now = {
            "sqlite": "SELECT (julianday('now') - 2440587.5) * 86400",
            "postgresql": "SELECT extract(epoch FROM clock_timestamp())::float8",
        }[store.engine.dialect.name]
        assert until - connection.execute(text(now)).scalar_one() == pytest.approx(100, abs=5)
    assert fence.token == 1
