"""What is handed down to the generators of a round, and what is said before it begins."""

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from emt_world import Listening, copy_world, round_settings, settings_in

from flows import proposing
from flows.reports import headline
from flows.stages import begin_round, run_round, run_shard
from flows.workspace import open_workspace
from pipelines.random_structures import RandomStructures, RandomStructureSettings

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize("most", [6, 9])
def test_random_structures_have_no_more_atoms_than_is_asked_for(emt_world: Path, tmp_path: Path, most: int) -> None:
    copy_world(emt_world, tmp_path)
    wanted = round_settings(
        generator="compositional", elements=("Cu", "Au"), max_atoms=most, n_formulas=3, structures_per_formula=6
    )
    with open_workspace(settings_in(tmp_path)) as workspace:
        begin_round(workspace, wanted)
        run_shard(workspace, 1, "propose", 0)
        sizes = {record.crystal.n_atoms for record in workspace.store.candidates_of_round(1)}
    assert sizes
    assert max(sizes) <= most


def test_larger_cells_than_usual_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, emt_world: Path, tmp_path: Path) -> None:
    asked: list[RandomStructureSettings] = []
    make = proposing.random_structures

    def remember(workers: int, settings: RandomStructureSettings) -> RandomStructures:
        asked.append(settings)
        return make(workers, settings)

    monkeypatch.setattr("flows.proposing.random_structures", remember)
    copy_world(emt_world, tmp_path)
    wanted = round_settings(
        generator="compositional", elements=("Cu", "Au"), max_atoms=30, n_formulas=1, structures_per_formula=1
    )
    with open_workspace(settings_in(tmp_path)) as workspace:
        begin_round(workspace, wanted)
        run_shard(workspace, 1, "propose", 0)
    assert [settings.max_atoms for settings in asked] == [30]


def test_what_a_system_lacks_is_said_before_anything_is_paid_for(
    emt_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once more where the round found nothing."""

    def expected(symbols: Sequence[str], known: frozenset[str], _judge: object) -> list[tuple[str, float]]:
        assert "Cu3Au" in known, "what another method has is known too"
        return [("-".join(symbols), 0.9)]

    monkeypatch.setattr("flows.stages.expected_compounds", expected)
    copy_world(emt_world, tmp_path)
    with sqlite3.connect(tmp_path / "gnome.db") as connection:
        connection.execute("INSERT INTO methods (label, definition) SELECT 'other', definition FROM methods")
        connection.execute("UPDATE crystals SET method = 'other' WHERE reduced_formula = 'Cu3Au'")
    connection.close()
    heard = Listening()
    with open_workspace(settings_in(tmp_path), listener=heard) as workspace:
        begin_round(workspace, round_settings(elements=("Cu", "Au"), formula_check=True))
        (line,) = heard.said
        assert line.startswith(
            "1 compound of Au-Cu that this database lacks is expected to be stable by formula alone: Cu-Au (0.90)."
        )
        record = run_round(workspace, round_settings())
    nothing = replace(record, summary={"emptied_by": "propose: nothing"})
    assert headline(nothing, [], n_known=18) == ["Round 1 evaluated nothing. propose: nothing.", line]
    found = [{"reduced_formula": "Cu-Au", "is_hit": False, "doubts": [], "known_in": [], "supported": True, "group": "other"}]
    assert line not in headline(record, found, n_known=18), "the round has found it"
