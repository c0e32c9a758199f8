"""The default path with nothing replaced: shipped seeds and ensembles, CHGNet, the program as a user types it."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gnome.database.store import Store

ROOT = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).with_name("gnome")
SMALL = ["--elements", "Ca,Sr,Ba,Y,Cl,Br,I", "--candidates", "200", "--screened", "40", "--budget", "7"]

pytestmark = pytest.mark.timeout(600)


def run(url: str, *command: str | Path) -> str:
    environment = {**os.environ, "GNOME_DATABASE_URL": url}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def round_on_seeds(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """URL of a database after a small round, and what the round answered."""
    url = f"sqlite:///{tmp_path_factory.mktemp('chgnet')}/gnome.db"
    return url, json.loads(run(url, PROGRAM, "discover", *SMALL, "--json"))


def test_a_round_on_the_seeds_finds_new_crystals(round_on_seeds: tuple[str, Any]) -> None:
    url, answer = round_on_seeds
    summary = answer["summary"]
    assert summary["n_evaluated"] == 7
    with Store.open(url, read_only=True) as store:
        screened = store.candidates(prediction.candidate_id for prediction in store.predictions_of_round(1)).values()
    assert len(screened) == summary["n_screened"] < summary["n_candidates"]
    assert len({record.crystal.reduced_formula for record in screened}) == 40, "of as many compositions as asked for"
    assert summary["n_hits"] >= 1, "in a system whose common compounds are seeds, most of what is proposed lies above them"
    assert {row["id"] for row in answer["discoveries"] if row["is_hit"]} == set(summary["hits"])
    assert 0 < summary["prediction_mae"] < 0.3
    found = answer["discoveries"]
    assert len(found) >= 5
    assert all(row["parent_formula"] and row["decomposes_to"] is not None for row in found)
    wanted = '_gnome_origin = "discovered" AND _gnome_e_above_hull < 0.05'
    near = json.loads(run(url, PROGRAM, "query", wanted, "--format", "json"))
    assert {row["id"] for row in near} <= {row["id"] for row in found}
    assert near
    lineage = json.loads(run(url, PROGRAM, "show", near[0]["id"], "--lineage", "--json"))["lineage"]
    assert lineage[0]["made_by"]["parent"] == lineage[1]["id"]
    assert lineage[-1]["origin"] == "seed"


def test_ase_alone_gives_the_stored_energies(round_on_seeds: tuple[str, Any]) -> None:
    url, _ = round_on_seeds
    table = run(
        url, sys.executable, ROOT / "benchmarks" / "evaluations_against_ase.py", url, "--crystals", "5", "--tolerance", "2"
    )
    assert table.splitlines()[-1].startswith("5 crystals, largest difference "), table


def test_both_pipelines_share_a_round(tmp_path: Path) -> None:
    """Substitutions in the seeds and random structures of formulas, ranked and relaxed together."""
    url = f"sqlite:///{tmp_path / 'gnome.db'}"
    wanted = ["--generator", "both", "--elements", "Ca,Sr,Cl,Br", "--formulas", "2", "--candidates", "40", "--screened", "20"]
    answer = json.loads(run(url, PROGRAM, "discover", *wanted, "--budget", "3", "--json"))
    assert answer["summary"]["n_evaluated"] == 3
    with Store.open(url, read_only=True) as store:
        proposed = store.candidates(store.candidate_ids_of_round(1)).values()
        screened = {prediction.candidate_id for prediction in store.predictions_of_round(1)}
    by_generator = Counter(record.generator for record in proposed)
    random = [record for record in proposed if record.parent_id is None]
    assert len(random) >= 4
    assert {record.crystal.reduced_formula for record in random} <= {record.crystal.reduced_formula for record in proposed}
    assert sum(by_generator.values()) - len(random) == 20, "half of the candidates are structural"
    assert {record.id for record in random} & screened
