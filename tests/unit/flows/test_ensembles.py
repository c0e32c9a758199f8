"""`gnome models`: which ensembles there are, and which is in use."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from emt_world import copy_world, known_crystals, round_settings, settings_in
from safetensors.torch import load_file
from typed_commands import Gnome, failed

from flows.rounds import round_settings as settings_of_round
from flows.stages import begin_round, run_round
from flows.workspace import current_weights, open_workspace
from gnome.crystals.formats import ReadCrystal
from gnome.crystals.writers import write_crystals
from gnome.errors import InvalidCheckpoint
from gnome.models.angular_network import AngularNetwork, AngularSettings
from gnome.models.checkpoint import save_ensemble
from gnome.models.compositional import CompositionalNetwork, CompositionalSettings
from gnome.shipped import shipped_data

pytestmark = pytest.mark.usefixtures("own_folder")
METALS = [13, 28, 29, 46, 47, 78, 79]
TINY = round_settings(n_candidates=40, n_screened=10, budget=4, n_scales=1, smallest_scale=1.0, largest_scale=1.0)


def own_ensemble(path: Path, *, kind: str = "structural", seed: int = 0, **card: Any) -> dict[str, Any]:
    """Write small untrained networks with the card of a training."""
    torch.manual_seed(seed)
    members: list[Any]
    if kind == "structural":
        members = [AngularNetwork(AngularSettings(width=16, hidden=16, steps=1, channels=4, degree=2)) for _ in range(2)]
    else:
        members = [CompositionalNetwork(CompositionalSettings(width=16, heads=2, depth=1)) for _ in range(2)]
    usual = {"method": "pbe-mp2020", "elements": METALS, "trained_on": "20 examples of mine.parquet", "metrics": {}}
    return save_ensemble(path, members, usual | card)


def shipped_id(kind: str) -> str:
    card = json.loads((shipped_data() / "ensembles" / f"{kind}.json").read_text())
    return str(card["sha256"][:16])


def in_use(gnome: Gnome, kind: str = "structural") -> str:
    (row,) = [row for row in gnome("models", "list", "--json").json if row["kind"] == kind and row["status"] == "in use"]
    return str(row["id"])


def crystals(path: Path) -> Path:
    write_crystals(path, [ReadCrystal(label=name, crystal=crystal) for name, crystal in known_crystals().items()])
    return path


def test_without_a_database_the_shipped_ensembles_are_listed_and_none_is_made(
    gnome: Gnome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNOME_DATABASE_URL", f"sqlite:///{tmp_path / 'none.db'}")
    rows = gnome("models", "list", "--json").json
    assert [(row["id"], row["status"], row["origin"], row["file"]) for row in rows] == [
        (shipped_id(kind), "in use", "shipped", "there") for kind in ("structural", "compositional")
    ]
    assert all(row["n_members"] == 10 and row["metrics"] and Path(row["path"]).exists() for row in rows)
    assert not (tmp_path / "none.db").exists()
    told = gnome("models", "list")
    assert told.code == 0
    assert all(word in told.out for word in (shipped_id("structural"), "pbe-mp2020", "150785 structures", "in use", "there"))


def test_an_ensemble_of_ones_own_is_used_by_all_commands_and_taken_back(gnome: Gnome, database: Path) -> None:
    mine = own_ensemble(Path("mine.safetensors"))
    answer = gnome("models", "use", "mine.safetensors", "--json").json
    assert (answer["id"], answer["kind"], answer["method"]) == (mine["sha256"][:16], "structural", "pbe-mp2020")
    for name in ("mine.safetensors", "mine.json"):
        Path(name).unlink()  # it is kept
    assert in_use(gnome) == answer["id"]
    listed = {row["id"]: row for row in gnome("models", "list", "--json").json}
    assert listed[answer["id"]] | {"metrics": {}} == {
        "id": answer["id"], "kind": "structural", "status": "in use", "origin": "own", "method": "pbe-mp2020",
        "methods": ["pbe-mp2020"], "n_members": 2, "trained_on": "20 examples of mine.parquet", "held_out": None, "parent": None,
        "round": None, "metrics": {}, "errors": "not measured", "path": answer["path"], "file": "there",
    }  # fmt: skip
    assert listed[shipped_id("structural")]["status"] == "was in use"
    rows = gnome("predict", crystals(Path("known.extxyz")), "--json").json
    assert {row["model"] for row in rows} == {answer["id"]}
    report = gnome("discover", "--evaluator", "emt", "--budget", 2, "--candidates", 20, "--json")
    assert report.code == 0, report.err
    with open_workspace(settings_in(database)) as workspace:
        number = workspace.store.rounds()[-1].number
        assert {one.model_id for one in workspace.store.predictions_of_round(number)} == {answer["id"]}
    assert gnome("models", "rollback", "--json").json["id"] == shipped_id("structural") == in_use(gnome)
    assert {row["model"] for row in gnome("predict", "known.extxyz", "--json").json} == {shipped_id("structural")}
    failed(gnome("models", "rollback"), 2, "no other structural ensemble was in use before", "gnome models list")
    assert gnome("models", "promote", answer["id"][:6], "--json").json["id"] == answer["id"] == in_use(gnome)


def test_the_order_of_use_is_what_rollback_goes_by(gnome: Gnome, database: Path) -> None:
    one, two = (own_ensemble(Path(f"{seed}.safetensors"), seed=seed)["sha256"][:16] for seed in (1, 2))
    shipped = shipped_id("structural")
    assert "predictions come without p_stable" in gnome("models", "use", "1.safetensors").err
    gnome("models", "use", "2.safetensors")
    gnome("models", "promote", one)
    gnome("models", "promote", one)  # twice is once
    assert [gnome("models", "rollback", "--json").json["id"] for _ in range(2)] == [two, shipped]
    failed(gnome("models", "rollback"), 2, "no other structural ensemble was in use before")
    formulas = own_ensemble(Path("f.safetensors"), kind="compositional")["sha256"][:16]
    gnome("models", "use", "f.safetensors")
    assert (in_use(gnome, "compositional"), in_use(gnome)) == (formulas, shipped)
    rows = gnome("predict", "--formula", "Cu3Au", "--json").json
    assert rows[0]["model"] == formulas
    assert gnome("models", "rollback", "compositional", "--json").json["id"] == shipped_id("compositional")
    failed(gnome("models", "rollback", "both"), 2, "kind 'both', expected structural or compositional")


def test_a_round_that_has_begun_keeps_its_ensemble(gnome: Gnome, emt_world: Path, tmp_path: Path) -> None:
    settings = copy_world(emt_world, tmp_path / "database")
    own_ensemble(Path("mine.safetensors"))
    with open_workspace(settings) as workspace:
        begun = begin_round(workspace, TINY)
        from flows.ensembles import use_ensemble

        mine = use_ensemble(workspace, Path("mine.safetensors")).id
    with open_workspace(settings) as workspace:
        done = run_round(workspace, settings_of_round(workspace, begun.number))
        assert done.number == begun.number
        assert {one.model_id for one in workspace.store.predictions_of_round(1)} == {shipped_id("structural")}
        run_round(workspace, TINY)
        assert {one.model_id for one in workspace.store.predictions_of_round(2)} == {mine}


def test_what_is_in_use_outlives_an_update_of_the_program(
    gnome: Gnome, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a shipped ensemble gives way to the one that a later version ships in its place."""
    own_ensemble(Path("mine.safetensors"))
    mine = gnome("models", "use", "mine.safetensors", "--json").json["id"]
    old = {kind: shipped_id(kind) for kind in ("structural", "compositional")}
    later = tmp_path / "later" / "ensembles"
    new = {kind: own_ensemble(later / f"{kind}.safetensors", kind=kind, seed=9)["sha256"][:16] for kind in old}
    monkeypatch.setattr("flows.workspace.shipped_data", lambda: later.parent)
    settings = settings_in(database)
    assert current_weights(settings, "structural").name == f"structural-{mine}.safetensors"
    assert current_weights(settings, "compositional") == later / "compositional.safetensors"
    with open_workspace(settings) as workspace:
        workspace.register_shipped_models()
        assert workspace.structural_model().model_id == mine
        assert workspace.formula_model().model_id == new["compositional"]
    rows = {row["id"]: row for row in gnome("models", "list", "--json").json}
    assert rows[mine]["status"] == rows[new["compositional"]]["status"] == "in use"
    assert rows[old["structural"]]["file"] == "another"
    failed(gnome("models", "promote", old["structural"]), 1, "not the weights of model", "version of this program")
    failed(gnome("models", "rollback"), 2, "no other structural ensemble", f"the weights of {old['structural']} are gone")
    assert gnome("models", "promote", new["structural"], "--json").json["id"] == new["structural"]


def test_the_data_folder_may_move(gnome: Gnome, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_ensemble(Path("mine.safetensors"))
    mine = gnome("models", "use", "mine.safetensors", "--json").json["id"]
    moved = tmp_path / "moved"
    shutil.move(database, moved)
    monkeypatch.setenv("GNOME_DATABASE_URL", f"sqlite:///{moved / 'gnome.db'}")
    assert {row["model"] for row in gnome("predict", crystals(Path("known.extxyz")), "--json").json} == {mine}


def test_weights_that_are_gone_or_others_are_said_and_passed_over(gnome: Gnome, database: Path) -> None:
    own_ensemble(Path("mine.safetensors"))
    answer = gnome("models", "use", "mine.safetensors", "--json").json
    crystals(Path("known.extxyz"))
    other = own_ensemble(Path(answer["path"]), seed=5)
    assert other["sha256"][:16] != answer["id"]
    failed(gnome("predict", "known.extxyz"), 1, f"not the weights of model {answer['id']}")
    Path(answer["path"]).unlink()
    failed(
        gnome("predict", "known.extxyz"), 1, "are not there; restore the file, or put another in use with `gnome models rollback"
    )
    gone = {row["id"]: row["file"] for row in gnome("models", "list", "--json").json}
    assert gone[answer["id"]] == "missing"
    own_ensemble(Path("second.safetensors"), seed=2)
    gnome("models", "use", "second.safetensors")
    back = gnome("models", "rollback")
    assert shipped_id("structural") in back.out
    assert f"Passed over, as their weights are gone: {answer['id']}" in back.err
    failed(gnome("models", "promote", answer["id"]), 1, "are not there")
    assert gnome("models", "use", "mine.safetensors", "--json").json["id"] == answer["id"], "given again, they are there again"
    assert {row["model"] for row in gnome("predict", "known.extxyz", "--json").json} == {answer["id"]}


def _edit(path: Path, **changes: Any) -> None:
    card = path.with_suffix(".json")
    card.write_text(json.dumps(json.loads(card.read_text()) | changes))


@pytest.mark.parametrize(
    ("break_it", "code", "words"),
    [
        (lambda path: path.with_suffix(".json").unlink(), 1, "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), 1, "truncated or altered"),
        (lambda path: _edit(path, sha256="0" * 64), 1, "truncated or altered"),
        (lambda path: _edit(path, kind="assistant"), 1, "unknown kind of network 'assistant'"),
        (lambda path: _edit(path, method=""), 1, "expected its label"),
        (lambda path: _edit(path, method="pbe-mp2021"), 2, "if that is right, say so: --method pbe-mp2021"),
        (lambda path: _edit(path, calibration={"floor": "low"}), 1, "its calibration cannot be read"),
        (lambda path: _edit(path, n_members=3), 1, "holds 2 members, its card says 3"),
        (lambda path: path.rename("elsewhere.safetensors"), 1, "cannot be read"),
        (lambda path: path.write_text("<html>"), 1, "truncated or altered"),
    ],
)
def test_what_cannot_be_used_is_one_line(gnome: Gnome, database: Path, break_it: Any, code: int, words: str) -> None:
    own_ensemble(Path("mine.safetensors"))
    break_it(Path("mine.safetensors"))
    failed(gnome("models", "use", "mine.safetensors"), code, "mine.", words)
    assert in_use(gnome) == shipped_id("structural")
    assert not list((settings_in(database).data_folder / "models").glob("*"))


def test_other_refusals(gnome: Gnome, database: Path) -> None:
    mine = own_ensemble(Path("mine.safetensors"))["sha256"][:16]
    failed(gnome("models", "use", "mine.json"), 2, "mine.json: weights end in .safetensors")
    failed(gnome("models", "use", "mine.safetensors", "--method", "r2scan"), 2, "holds energies of pbe-mp2020, not of r2scan")
    failed(gnome("models", "promote", mine), 2, f"no model '{mine}'", shipped_id("structural"))
    failed(gnome("models", "promote", shipped_id("structural")[:2]), 2, "give at least 4 of its characters")
    gnome("models", "use", "mine.safetensors")
    gnome("models", "rollback")
    _edit(Path("mine.safetensors"), method="r2scan")
    failed(gnome("models", "use", "mine.safetensors", "--method", "r2scan"), 2, f"are model {mine} of", "(method differ")
    assert in_use(gnome) == shipped_id("structural")
    named = own_ensemble(Path("named.safetensors"), seed=3, method="my-own")["sha256"][:16]
    assert gnome("models", "use", "named.safetensors", "--method", "my-own", "--json").json["id"] == named


def test_weights_that_are_no_numbers_are_refused(gnome: Gnome, database: Path) -> None:
    torch.manual_seed(0)
    network = AngularNetwork(AngularSettings(width=16, hidden=16, steps=1, channels=4, degree=2))
    with torch.no_grad():
        network.out.weight.fill_(float("nan"))
    save_ensemble(Path("mine.safetensors"), [network], {"method": "pbe-mp2020", "elements": METALS})
    assert load_file("mine.safetensors")["0.out.weight"].isnan().any()
    failed(gnome("models", "use", "mine.safetensors"), 1, "weights that are no numbers")


def test_current_weights_are_checked(database: Path, gnome: Gnome) -> None:
    own_ensemble(Path("mine.safetensors"))
    answer = gnome("models", "use", "mine.safetensors", "--json").json
    own_ensemble(Path(answer["path"]), seed=5)
    with pytest.raises(InvalidCheckpoint, match="not the weights of model"):
        current_weights(settings_in(database), "structural")
