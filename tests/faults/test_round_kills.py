"""kill -9 in every stage: the same command again ends with the tables of an unbroken round."""

import contextlib
import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from emt_world import copy_world, tables
from round_kills import KILLS, play

pytestmark = pytest.mark.usefixtures("own_folder")
_TESTS = Path(__file__).resolve().parent.parent
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["round_kills"])


def exit_code(folder: Path, data: Path, kill: str | None = None) -> int | None:
    process = _PROCESSES.Process(target=play, args=(folder, data, kill))
    process.start()
    process.join(120)
    code = process.exitcode
    process.kill()
    process.join()
    process.close()
    return code


@pytest.fixture(scope="module", autouse=True)
def paths() -> Iterator[None]:
    """Let the server that processes are forked from import what they need once for all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (_TESTS, _TESTS / "faults", _TESTS.parent))))
        yield


@pytest.fixture(scope="module")
def unbroken(emt_world: Path, emt_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "world"
    copy_world(emt_world, folder)
    assert exit_code(folder, emt_data) == 0
    return folder


def created(folder: Path) -> dict[str, float]:
    """When each evaluation was stored."""
    with contextlib.closing(sqlite3.connect(folder / "gnome.db")) as connection:
        return dict(connection.execute("SELECT candidate_id, created_at FROM evaluations"))


@pytest.mark.parametrize("kill", list(KILLS))
def test_a_killed_round_is_finished_by_the_next_run(
    kill: str, emt_world: Path, emt_data: Path, unbroken: Path, tmp_path: Path
) -> None:
    copy_world(emt_world, tmp_path)
    assert exit_code(tmp_path, emt_data, kill) == -signal.SIGKILL
    killed = tables(tmp_path)
    evaluated = created(tmp_path)
    assert killed != tables(unbroken)
    assert exit_code(tmp_path, emt_data) == 0
    assert tables(tmp_path) == tables(unbroken)
    again = created(tmp_path)
    assert {identifier: again[identifier] for identifier in evaluated} == evaluated, "what was answered is not asked again"
    if kill == "evaluate":
        assert len(evaluated) == 2


def test_the_unbroken_round_reached_every_stage(unbroken: Path) -> None:
    from flows.stages import STAGES

    rows = tables(unbroken)["ledger"]
    assert {row["stage"] for row in rows} == {*STAGES, "retrain"}
    assert {row["state"] for row in rows} == {"done"}
    assert {kill.split(",")[0] for kill in KILLS} == {*STAGES, "retrain", "finish"}
