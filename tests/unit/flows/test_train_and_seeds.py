"""`gnome train` on small shards, and the shipped seeds in a database of their own."""

import fcntl
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from emt_world import Listening
from typed_commands import SMALL_TRAINING, Run

from flows.assess import crystal_record
from flows.cli import main
from flows.lock import held
from flows.progress import Silent
from flows.settings import Settings
from flows.training import TrainRequest, defaults_for, only_training, recipe_for, train_files
from flows.training_log import Parity, TrainingLog
from gnome.crystals.crystal import Crystal
from gnome.crystals.shards import read_shard, write_shard
from gnome.errors import InvalidCheckpoint, InvalidInput
from gnome.models.checkpoint import load_ensemble
from gnome.models.formula_ensemble import CompositionalEnsemble
from gnome.models.formula_labels import read_labelled_formulas
from gnome.models.recipes import STRUCTURE_NETWORK, STRUCTURE_TRAIN
from gnome.models.structural import StructuralSettings
from gnome.models.training import EpochRecord
from gnome.shipped import shipped_data

pytestmark = pytest.mark.usefixtures("own_folder")


def test_the_recipe_is_followed_unless_something_else_is_asked_for(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TrainRequest] = []

    def train(request: TrainRequest, _listener: Any) -> None:
        asked.append(request)

    monkeypatch.setattr("flows.training.train_files", train)
    for options in ([], ["--network", "gnome"], ["--width", 64, "--epochs", 7]):
        with pytest.raises(SystemExit, match="0"):
            main([str(word) for word in ("train", "structural", shard, "--method", "m", *options)])
    usual, gnome, small = (recipe_for(request, np.array([[0.0], [2.0]])) for request in asked)
    assert replace(usual.network, scale=1.0, shift=0.0) == STRUCTURE_NETWORK
    assert replace(usual.train, precision="bf16") == replace(STRUCTURE_TRAIN, precision="bf16")
    assert gnome.network == StructuralSettings(scale=1.0, shift=1.0)
    assert (usual.network.scale, usual.network.shift) == (1.0, 1.0)
    assert replace(small.network, scale=1.0, shift=0.0) == replace(STRUCTURE_NETWORK, width=64, hidden=64)
    assert replace(small.train, epochs=STRUCTURE_TRAIN.epochs) == usual.train
    with pytest.raises(InvalidInput, match="network 'megnet', expected angular or gnome"):
        defaults_for("structural", "megnet")


def test_a_network_named_for_formulas_is_refused(shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "compositional", str(shard), "--method", "m", "--network", "gnome"])
    assert "--network gnome: goes with structural ensembles" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["structural", "compositional"])
def test_train_writes_weights_that_predict_and_a_card_that_says_what_they_are(run: Run, shard: Path, kind: str) -> None:
    card = run("train", kind, shard, "--out", "mine.safetensors", *SMALL_TRAINING, "--json")
    members, stored = load_ensemble(Path("mine.safetensors"))
    assert stored == card
    assert len(members) == 2
    assert (card["kind"].split("-")[0], card["method"], card["settings"]["width"]) == (kind, "made-up", 16)
    assert "labelled.parquet" in card["trained_on"]
    metrics = card["metrics"][f"{kind} ensemble"]
    assert metrics["n"] > 20
    assert metrics["mae"]["low"] <= metrics["mae"]["value"] <= metrics["mae"]["high"]
    assert metrics["mae"]["value"] < 0.5
    assert "linear model over elements" in card["metrics"]
    if kind == "compositional":
        rows = run("predict", "--formula", "LiF", "--model", "mine.safetensors", "--json")
        assert (rows[0]["method"], rows[0]["refused"]) == ("made-up", None)
        assert rows[0]["decomposition_energy"] is rows[0]["p_stable"] is None, "crystals alone teach neither"
    if kind == "structural":
        assert set(card["calibration"] or {}) <= {"floor", "factor", "power", "degrees"}
        known = [crystal for crystal in read_shard(shard)[0] if set(crystal.composition) <= set(card["elements"])]
        write_shard(Path("three.parquet"), known[:3])
        rows = run("predict", "three.parquet", "--model", "mine.safetensors", "--json")
        assert [row["method"] for row in rows] == ["made-up"] * 3


@pytest.mark.parametrize("kind", ["structural", "compositional"])
def test_training_that_was_interrupted_ends_with_the_weights_of_an_unbroken_one(shard: Path, kind: str, tmp_path: Path) -> None:
    from collections.abc import Iterator
    from contextlib import contextmanager

    from flows.progress import Counter

    class Interrupting(Silent):
        @contextmanager
        def stage(self, name: str, total: int, unit: str, **_: Any) -> Iterator[Counter]:
            left = 9

            def count(n: int = 1) -> None:
                nonlocal left
                left -= n
                if left == 0:
                    raise KeyboardInterrupt

            yield count

    def request(out: Path) -> TrainRequest:
        return TrainRequest(
            kind=kind, network="angular", files=(shard,), out=out, method="made-up", members=2, width=16, epochs=6, batch_size=64,
            learning_rate=1e-3, precision="fp32", seed=0,
        )  # fmt: skip

    unbroken = train_files(request(tmp_path / "unbroken.safetensors"), Silent())
    with pytest.raises(KeyboardInterrupt):
        train_files(request(tmp_path / "broken.safetensors"), Interrupting())
    assert not (tmp_path / "broken.safetensors").exists()
    assert list((tmp_path / "broken.state").glob("member*.pt")), "the state of the interrupted run is kept"
    log = tmp_path / "broken.log.jsonl"
    log.write_text(
        "".join(log.read_text().splitlines(keepends=True)[:-1]) + '{"member": 0, "epo'
    )  # killed in the middle of a line
    (tmp_path / "broken.safetensors").write_bytes(b"weights whose card was not written any more")
    resumed = train_files(request(tmp_path / "broken.safetensors"), Silent())
    logs = [(tmp_path / f"{name}.log.jsonl").read_text() for name in ("broken", "unbroken")]
    assert not (tmp_path / "broken.state").exists()
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 2 * 6
    picture = (tmp_path / "broken.curves.svg").read_text()
    assert picture.startswith("<?xml")
    assert "<!-- label, eV/atom -->" in picture, "labels and predictions of the validation set stand beside the errors"
    assert resumed["sha256"] == unbroken["sha256"]
    ours, _ = load_ensemble(tmp_path / "broken.safetensors")
    theirs, _ = load_ensemble(tmp_path / "unbroken.safetensors")
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_two_trainings_do_not_write_to_one_place(shard: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "structural", str(shard), *SMALL_TRAINING, "--out", "mine.safetensors"]
    with only_training(Path("mine.safetensors")):
        for more in ([], ["--scaling-law", "--smallest", "20"]):
            with pytest.raises(SystemExit) as ended:
                main([*arguments, *more])
            assert ended.value.code == 2
            assert "--out mine.safetensors: another training writes there" in capfd.readouterr().err
    assert list(Path().iterdir()) == []


def test_a_place_is_held_by_one_also_where_the_file_was_removed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock, calls = tmp_path / "lock", fcntl.flock, 0

    def removed_before(file: Any, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            path.unlink()
        flock(file, operation)

    monkeypatch.setattr("flows.lock.fcntl.flock", removed_before)
    with held(path, "busy"):
        assert calls == 2
        with pytest.raises(InvalidInput, match="busy"), held(path, "busy"):
            pass
        assert path.exists(), "who is refused takes nothing away"
    assert not path.exists()


def test_a_training_that_memory_is_too_small_for_is_one_line(
    shard: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("flows.training.train_members", run_out)
    with pytest.raises(SystemExit) as ended:
        main(["train", "structural", str(shard), *SMALL_TRAINING])
    assert ended.value.code == 1
    err = capfd.readouterr().err
    assert err.splitlines()[-1] == "gnome: memory does not suffice: batches of 64 at width 16 are too large: give less of either"
    assert "Traceback" not in err


def test_lines_of_a_log_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "m.safetensors")
    for epoch in (1, 2):
        log.add(0, EpochRecord(epoch=epoch, learning_rate=1e-3, train_mae=0.2, validation_mae=0.3))
    written = log.path.read_text()
    odd = '[]\n7\n{"member": 0}\n{"member": 0, "epoch": 1, "train_mae": Infinity, "validation_mae": true}\n'
    log.path.write_bytes((written + odd).encode() + b"\xff\xfe\n")
    log.finish(1, 2)
    assert log.path.read_text() == written


def test_a_picture_leaves_the_drawings_of_the_caller_alone(tmp_path: Path) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    from flows.scaling_law import draw
    from gnome.models.scaling import PowerLaw

    with plt.rc_context():
        mpl.use("agg")
        plt.figure()
        before = mpl.get_backend(), plt.get_fignums()
        log = TrainingLog(tmp_path / "m.safetensors")
        log.add(0, EpochRecord(epoch=1, learning_rate=1e-3, train_mae=0.2, validation_mae=0.3))
        labels = np.array([-1.0, -0.5, np.nan, 0.25])
        log.finish(1, 1, Parity(labels=labels, predicted=labels + 0.01))
        points = [{"n_train": n, "errors": {"mae": n**-0.5}} for n in (10, 100, 1000)]
        law = {
            "points": points,
            "laws": {"mae": vars(PowerLaw.fit([10, 100, 1000], [point["errors"]["mae"] for point in points]))},
        }
        draw(law, tmp_path / "law.svg")
        assert (mpl.get_backend(), plt.get_fignums()) == before
        plt.close("all")
    assert "<!-- validation: 3, MAE 10 meV/atom -->" in log.picture.read_text(), "a label that is not known is left out"


def test_the_case_of_a_switched_backend() -> None:
    root = Path(__file__).resolve().parent.parent.parent.parent
    case = root.parent / "shared" / "cases" / "loop-faults" / "mpl.py"
    if not case.exists():
        pytest.skip(f"{case} is not here")
    done = subprocess.run([sys.executable, case], cwd=root, capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.split() == ["before", "agg", "after", "agg"]


def test_the_log_of_weights_is_kept_until_those_are_replaced(tmp_path: Path) -> None:
    log, record = (
        TrainingLog(tmp_path / "m.safetensors"),
        EpochRecord(epoch=1, learning_rate=1e-3, train_mae=0.2, validation_mae=0.3),
    )
    log.add(0, record)
    written = log.path.read_text()
    log.begin()
    log.add(0, replace(record, train_mae=0.3))
    log.begin()  # of a run that was killed before it saved anything
    log.add(0, replace(record, train_mae=0.1))
    assert log.before.read_text() == written
    log.finish(1, 1)
    assert not log.before.exists()
    assert json.loads(log.path.read_text())["train_mae"] == 0.1


def test_processes_share_the_members_and_end_with_the_same_ensemble(run: Run, shard: Path) -> None:
    arguments = ["train", "structural", shard, *SMALL_TRAINING, "--members", 2, "--json"]
    alone = run(*arguments, "--out", "alone.safetensors")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "flows.cli"]
    ended = subprocess.run(
        [*launcher, *map(str, arguments), "--out", "shared.safetensors"], capture_output=True, text=True, check=False, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["n_members"] == alone["n_members"] == 2
    for ours, theirs in zip(*(load_ensemble(Path(f"{name}.safetensors"))[0] for name in ("alone", "shared")), strict=True):
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=0, atol=2e-3)  # sums by other numbers of threads
    assert len(Path("shared.log.jsonl").read_text().splitlines()) == 2 * 3
    assert not Path("shared.state").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "-1"], "seed is -1"),
        (["--learning-rate", "nan"], "learning_rate is nan"),
        (["--precision", "fp7"], "precision 'fp7'"),
        (["--epochs", "0"], "epochs is 0"),
        (["--batch-size", "1" + "0" * 21], "expected 1 to 1000000"),
        (["--smallest", "5"], "goes with --scaling-law"),
        (["--out", "theirs.safetensors"], "is there without a card"),
        (["--out", "diary.safetensors"], "is no log of a training"),
        (["--out", "weights.pkl"], "ends in .safetensors"),
        (["--out", "mine-{sha256}.safetensors"], "without {sha256}"),
        (["--out", "folder.safetensors"], "is a folder"),
        (["--out", "notes.safetensors"], "notes.json, where the card goes, cannot be read as one and would be lost ("),
        (["--out", "notes.json/mine.safetensors"], "no folder that can be written"),
        (["--out", "plain.safetensors"], "plain.state, where an interrupted training is kept, is a file"),
    ],
)
def test_training_that_cannot_be_is_refused(
    shard: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    Path("folder.safetensors").mkdir()
    Path("notes.json").write_text("[]")
    Path("plain.state").touch()
    Path("theirs.safetensors").write_text("precious")
    Path("diary.log.jsonl").write_text("precious\n")
    with pytest.raises(SystemExit) as ended:
        main(["train", "structural", str(shard), "--method", "m", *arguments])
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_too_few_examples_are_said(capfd: pytest.CaptureFixture[str]) -> None:
    copper = Crystal(np.eye(3) * 2.5, np.array([29]), np.zeros((1, 3)))
    write_shard(Path("few.parquet"), [copper], {"e_form_per_atom": [0.0]})
    with pytest.raises(SystemExit) as ended:
        main(["train", "structural", "few.parquet", "--method", "m"])
    assert ended.value.code == 2
    assert "at least 20 of each are needed" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:No Pauling electronegativity:UserWarning")  # pymatgen, on the noble gases among the seeds
def test_oxides_near_the_hull_of_the_shipped_seeds(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The query that the project shows its users, on the seeds, against the file they come from."""
    from flows.seeding import add_seeds
    from flows.workspace import open_workspace

    url = f"sqlite:///{tmp_path / 'gnome.db'}"
    monkeypatch.setenv("GNOME_DATABASE_URL", url)
    with open_workspace(Settings(database_url=url)) as workspace:
        n = add_seeds(workspace)
        assert add_seeds(workspace) == 0
        hull = workspace.hull(workspace.evaluator.method.label)
    crystals, columns, _ = read_shard(shipped_data() / "seeds.parquet")
    assert n == len(crystals) >= 400
    assert len(set().union(*(crystal.composition for crystal in crystals))) >= 60
    rows = run("query", 'elements HAS "O" AND _gnome_e_above_hull < 0.05', "--format", "json", "--limit", 5000)
    found = {row["id"]: row["e_above_hull"] for row in rows}
    above = hull.e_above_hulls([crystal.composition for crystal in crystals], columns["e_form_per_atom"])
    expected = {
        crystal.id: float(distance)
        for crystal, distance in zip(crystals, above, strict=True)
        if 8 in crystal.composition and distance < 0.05
    }
    assert len(expected) > 50
    assert found == pytest.approx(expected, abs=1e-9)
    assert all(row["origin"] == "seed" and row["method"] == hull.method for row in rows)


def table_of_formulas(path: Path, **changes: list[object]) -> Path:
    """Formulas of two elements with both energies, some decomposition energies unknown."""
    symbols = ("Li", "Na", "K", "Mg", "Ca", "F", "Cl", "O", "S", "Fe", "Ni", "Cu", "Zn", "Ga", "Sr", "Al")
    formulas = [f"{a}{n}{b}" for i, a in enumerate(symbols) for b in symbols[i + 1 :] for n in ("", 2, 3, 4, 5)]
    columns: dict[str, list[object]] = {
        "reduced_formula": list(formulas),
        "e_form_per_atom": [-0.01 * len(formula) - 0.5 * ("F" in formula) for formula in formulas],
        "decomposition_energy": [None if i % 5 == 0 else 0.1 * ("O" in formula) for i, formula in enumerate(formulas)],
    }
    pq.write_table(
        pa.table(columns | {name: (values + columns[name])[: len(formulas)] for name, values in changes.items()}), path
    )
    return path


def test_formulas_are_trained_on_both_energies(run: Run) -> None:
    table = table_of_formulas(Path("formulas.parquet"))
    card = run("train", "compositional", table, "--out", "mine.safetensors", *SMALL_TRAINING, "--json")
    (scheme,) = card["schemes"]
    assert (scheme["method"], scheme["decomposition_energy"]) == ("made-up", True)
    assert set(scheme["calibration"]) <= {"e_form_per_atom", "decomposition_energy", "stable"}
    assert {"compositional ensemble", "compositional ensemble, decomposition_energy"} <= set(card["metrics"])
    rows = run("predict", "--formula", "NaCl", "Na2Cl2", "--model", "mine.safetensors", "--json")
    assert rows[0]["decomposition_energy"] == pytest.approx(rows[1]["decomposition_energy"], abs=1e-6)
    assert 0 < rows[0]["p_stable"] < 1


def test_what_was_not_learnt_is_not_answered(run: Run) -> None:
    """And what lies beside the weights stays."""
    table = table_of_formulas(Path("formulas.parquet"), e_form_per_atom=[None] * 1000, decomposition_energy=[0.1, -0.1] * 500)
    Path("mine.state").mkdir()
    Path("mine.state/notes").touch()
    run("train", "compositional", table, "--out", "mine.safetensors", *SMALL_TRAINING, "--json")
    assert [path.name for path in Path("mine.state").iterdir()] == ["notes"]
    (row,) = run("predict", "--formula", "NaCl", "--model", "mine.safetensors", "--json")
    assert row["e_form_per_atom"] is row["spread"] is row["e_form_uncertainty"] is None
    assert row["decomposition_energy"] is not None
    ensemble = CompositionalEnsemble.load(Path("mine.safetensors"))
    with pytest.raises(InvalidCheckpoint, match="decomposition energies alone"):
        ensemble.member_energies([{11: 1, 17: 1}])


def test_tables_with_a_column_twice_or_of_another_format_are_refused() -> None:
    twice = pa.table([["NaCl"], [-1.0], [-2.0]], names=["reduced_formula", "e_form_per_atom", "e_form_per_atom"])
    pq.write_table(twice, "twice.parquet")
    Path("table.csv").write_text("reduced_formula,e_form_per_atom\nNaCl,-1\n")
    for name, words in (
        ("twice.parquet", "several columns named e_form_per_atom"),
        ("table.csv", "Parquet, which training tables are"),
    ):
        with pytest.raises(InvalidInput, match=words):
            read_labelled_formulas([Path(name)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reduced_formula": ["Qq2"]}, "row 0: formula 'Qq2'"),
        ({"e_form_per_atom": [99.0]}, "e_form_per_atom = 99.0"),
        ({"e_form_per_atom": [None], "decomposition_energy": [None]}, "no label"),
        ({"decomposition_energy": [float("nan")]}, "decomposition_energy = nan"),
        ({"e_form_per_atom": ["-0.4"] * 1000}, "which is no number"),
        ({"e_form_per_atom": [True] * 1000}, "which is no number"),
    ],
)
def test_tables_that_cannot_be_trained_on(
    capfd: pytest.CaptureFixture[str], changes: dict[str, list[object]], words: str
) -> None:
    table = table_of_formulas(Path("formulas.parquet"), **changes)
    with pytest.raises(SystemExit) as ended:
        main(["train", "compositional", str(table), "--method", "m"])
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert words in err
    assert "formulas.parquet" in err


def test_a_shard_of_crystals_teaches_decomposition_energies_too(shard: Path) -> None:
    crystals, columns, _ = read_shard(shard)
    write_shard(Path("both.parquet"), crystals, {**columns, "decomposition_energy": [0.1] * len(crystals)})
    labelled = read_labelled_formulas([Path("both.parquet")])
    assert (labelled.targets[:, 1] == 0.1).all()
    assert np.isnan(read_labelled_formulas([shard]).targets[:, 1]).all()


def test_a_file_that_is_given_twice_is_refused(capfd: pytest.CaptureFixture[str], shard: Path) -> None:
    Path("link.parquet").symlink_to(shard)
    with pytest.raises(SystemExit) as ended:
        main(["train", "structural", str(shard), "link.parquet", "--method", "m"])
    assert ended.value.code == 2
    assert "given more than once" in capfd.readouterr().err


@pytest.mark.parametrize("label", [True, "-1.0", [0.5], None])
def test_labels_that_are_no_numbers_are_refused(capfd: pytest.CaptureFixture[str], label: object) -> None:
    copper = Crystal(np.eye(3) * 2.5, np.array([29]), np.zeros((1, 3)))
    write_shard(Path("odd.parquet"), [copper], {"e_form_per_atom": [label]})
    with pytest.raises(SystemExit) as ended:
        main(["train", "structural", "odd.parquet", "--method", "m"])
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert "row 0 has e_form_per_atom" in err
    assert err.count("\n") == 1


@pytest.mark.filterwarnings("ignore:No Pauling electronegativity:UserWarning")  # pymatgen, on the noble gases among the seeds
def test_crystals_of_another_version_of_the_method_are_told_of(tmp_path: Path) -> None:
    from dataclasses import replace

    from flows.seeding import add_seeds
    from flows.workspace import open_workspace

    heard = Listening()
    with open_workspace(Settings(database_url=f"sqlite:///{tmp_path / 'gnome.db'}"), listener=heard) as workspace:
        method = workspace.evaluator.method
        earlier = replace(method, settings={**method.settings, "references": 1})
        assert earlier.label != method.label
        copper = Crystal(np.eye(3) * 2.5, np.array([29]), np.zeros((1, 3)))
        record = crystal_record(copper, earlier, e_form_per_atom=0.0, energy_per_atom=-4.0, origin="imported")
        workspace.store.add_crystals([record])
        assert add_seeds(workspace) > 400
        assert add_seeds(workspace) == 0
    (line,) = heard.said
    assert earlier.label in line
    assert method.label in line
