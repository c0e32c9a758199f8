"""`gnome train --fine-tune`: what it gains is measured, and where it gains nothing nothing is written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typed_commands import Gnome, Run, failed

from flows.fine_tuning import GENTLE, FineTuneRequest, _chosen_elsewhere, element_shifts, fine_tune
from flows.progress import Counter, Silent
from gnome.crystals.crystal import Crystal
from gnome.crystals.formula import split_bucket
from gnome.crystals.shards import write_shard
from gnome.errors import GnomeError
from gnome.models.angular_network import AngularNetwork, AngularSettings
from gnome.models.checkpoint import load_ensemble, save_ensemble
from gnome.models.ensemble import StructuralEnsemble

pytestmark = pytest.mark.usefixtures("own_folder")
NUMBERS = (3, 9, 11, 12, 17, 19, 20, 35)
OFFSETS = {3: 0.20, 9: -0.15, 11: 0.1, 12: 0.0, 17: -0.1, 19: 0.3, 20: -0.2, 35: 0.12}


@pytest.fixture
def start() -> StructuralEnsemble:
    """Five small networks that are as good as any at what they answer; also on disk."""
    torch.manual_seed(0)
    members = [AngularNetwork(AngularSettings(width=16, hidden=16, steps=1, channels=4, degree=2)) for _ in range(5)]
    for member in members[1:]:
        member.load_state_dict(members[0].state_dict())
    card = {"method": "theirs", "elements": [*NUMBERS, 8], "licences": ["CC BY 4.0"]}
    save_ensemble(Path("start.safetensors"), members, card)
    return StructuralEnsemble.load(Path("start.safetensors"))


def crystals() -> list[Crystal]:
    sites = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS if a != b]
    return [Crystal(np.eye(3) * (4.0 + 0.02 * (a + b)), np.array([a, b, b, b]), sites) for a, b in pairs]


def write(start: StructuralEnsemble, *, offset: float = 1.0, noise: float = 0.0, name: str = "mine.parquet") -> Path:
    """Label crystals by what the ensemble answers, other energies of the elements, and noise."""
    found = crystals()
    labels = np.median(start.member_energies(found)[:, 0], axis=0)
    labels += [offset * sum(OFFSETS[z] * n for z, n in one.composition.items()) / one.n_atoms for one in found]
    labels += noise * np.random.default_rng(0).normal(size=len(found))
    write_shard(Path(name), found, {"e_form_per_atom": labels.clip(-5, 4).tolist()})
    return Path(name)


OPTIONS = ["--method", "mine", "--from", "start.safetensors", "--fine-tune", "--epochs", 2, "--out", "tuned.safetensors"]


def test_other_energies_of_the_elements_are_learnt_from_a_few_crystals(
    run: Run, gnome: Gnome, start: StructuralEnsemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(start)
    card = run("train", "structural", path, *OPTIONS, "--json")
    before, after = (
        card["metrics"][name]["mae"]["value"] for name in (f"before, {start.model_id}", "structural ensemble, fine-tuned")
    )
    assert after < 0.5 * before
    assert card["improved"] is True
    assert card["difference"]["value"] == pytest.approx(after - before, abs=0.02)
    assert card["difference"]["high"] < 0
    assert (card["method"], card["parent"], card["licences"], card["n_members"]) == ("mine", start.model_id, ["CC BY 4.0"], 5)
    assert card["elements"] == list(NUMBERS), "of oxygen's energy under this method nothing is known"
    n_learnt = sum(split_bucket(crystal.reduced_formula) not in range(55, 60) for crystal in crystals())
    assert f"on {n_learnt} crystals of mine.parquet" in card["trained_on"]
    assert "55 to 59" in card["split"]
    assert set(card["calibration"]) == {"floor", "factor", "power", "degrees"}
    members, _ = load_ensemble(Path("tuned.safetensors"))
    assert all(member.settings.shifts_elements for member in members)
    assert not Path("tuned.state").exists()
    rows = run("predict", path, "--model", "tuned.safetensors", "--json")
    assert {row["method"] for row in rows} == {"mine"}
    told = gnome("train", "structural", path, *OPTIONS)
    assert told.code == 0, told.err
    assert "better than before" in told.out
    assert "it answers for 8 elements under mine" in told.out
    monkeypatch.setenv("GNOME_DATABASE_URL", f"sqlite:///{tmp_path / 'one.db'}")
    assert run("models", "use", "tuned.safetensors", "--method", "mine", "--json")["id"] == card["sha256"][:16]
    again = run("train", "structural", path, *OPTIONS[:3], "tuned.safetensors", *OPTIONS[4:-1], "twice.safetensors", "--json")
    assert again["parent"] == card["sha256"][:16], "what was tuned can be tuned once more"


def test_each_crystal_is_answered_by_networks_that_had_not_learnt_it(
    start: StructuralEnsemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a member learns by heart does not count: with labels that only memory could give, nothing is gained."""
    learnt: list[frozenset[str]] = []
    original = element_shifts

    def seen(compositions: Any, errors: Any) -> Any:
        learnt.append(frozenset(str(sorted(composition.items())) for composition in compositions))
        return original(compositions, errors)

    monkeypatch.setattr("flows.fine_tuning.element_shifts", seen)
    path = write(start)
    fine_tune(_request(path), Silent())
    everything = {str(sorted(crystal.composition.items())) for crystal in crystals()}
    left_out = [everything - own for own in learnt]
    held_out = {
        str(sorted(crystal.composition.items()))
        for crystal in crystals()
        if split_bucket(crystal.reduced_formula) in range(55, 60)
    }
    assert len(left_out) == 5
    assert all(held_out <= own for own in left_out)
    assert set().union(*left_out) == everything
    for i, one in enumerate(left_out):
        assert all(one & other == held_out for other in left_out[:i])


def _request(path: Path, **changes: Any) -> FineTuneRequest:
    usual: dict[str, Any] = {
        "files": (path,),
        "out": Path("tuned.safetensors"),
        "method": "mine",
        "start": Path("start.safetensors"),
    }
    return FineTuneRequest(**usual | changes)


def test_where_nothing_is_gained_nothing_is_written(gnome: Gnome, start: StructuralEnsemble) -> None:
    write(start, offset=0.0)
    failed_ = gnome("train", "structural", "mine.parquet", *OPTIONS)
    assert failed_.code == 1
    assert failed_.err.splitlines()[-1].startswith("gnome: fine-tuning gained nothing: 0.0000 eV/atom before, 0.")
    assert not [path for path in Path().iterdir() if path.name.startswith("tuned")]


def test_a_gain_that_may_be_chance_is_not_claimed(gnome: Gnome, start: StructuralEnsemble) -> None:
    write(start, offset=0.12, noise=0.25)
    outcome = gnome("train", "structural", "mine.parquet", *OPTIONS, "--seed", 1)
    assert "better than before" not in outcome.out
    assert "not measured to be better: the interval holds 0" in outcome.out or "gained nothing" in outcome.err


def test_an_interrupted_fine_tuning_ends_with_the_weights_of_an_unbroken_one(start: StructuralEnsemble) -> None:
    path = write(start)

    class Interrupting(Silent):
        def stage(self, name: str, total: int, unit: str) -> Any:
            from contextlib import contextmanager

            @contextmanager
            def staged() -> Any:
                left = 12

                def count(n: int = 1) -> None:
                    nonlocal left
                    left -= n
                    if left == 0:
                        raise KeyboardInterrupt

                counter: Counter = count
                yield counter

            return staged()

    from dataclasses import replace

    train = replace(GENTLE, epochs=5, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(_request(path, train=train), Interrupting())
    assert list(Path("tuned.state").glob("member*.pt"))
    resumed = fine_tune(_request(path, train=train), Silent())
    unbroken = fine_tune(_request(path, train=train, out=Path("unbroken.safetensors")), Silent())
    assert resumed["sha256"] == unbroken["sha256"]


def test_shifts_of_elements() -> None:
    compositions = [crystal.composition for crystal in crystals()]
    errors = np.array([sum(OFFSETS[z] * n for z, n in one.items()) / sum(one.values()) for one in compositions])
    shifts = element_shifts(compositions, errors)
    assert {z: shifts[z] for z in NUMBERS} == pytest.approx(OFFSETS, abs=0.01)
    assert shifts[8] == 0
    noise = np.random.default_rng(1).normal(size=len(errors))
    assert np.abs(element_shifts(compositions, noise)).max() < 0.5
    assert not element_shifts(compositions, np.zeros(len(errors))).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width", 8], "--width: leave out with --fine-tune"),
        (["--network", "gnome", "--scaling-law"], "--network, --scaling-law: leave out with --fine-tune"),
        (["--members", 9], "--members 9: start.safetensors has 5"),
        (["--precision", "fp7"], "precision 'fp7'"),
        (["--epochs", 0], "expected 1 or more of each"),
        (["--learning-rate", 0], "expected more than 0"),
        (["--out", "weights.pkl"], "ends in .safetensors"),
        (["--from", "nothing.safetensors"], "cannot be read"),
    ],
)
def test_fine_tuning_that_cannot_be_is_refused(
    gnome: Gnome, start: StructuralEnsemble, arguments: list[object], words: str
) -> None:
    path = write(start)
    outcome = gnome("train", "structural", path, *OPTIONS, *arguments)
    failed(outcome, 1 if "nothing.safetensors" in arguments else 2, words)


def test_what_there_is_too_little_of_or_nothing_known_is_said(gnome: Gnome, start: StructuralEnsemble) -> None:
    few = crystals()[:8]
    write_shard(Path("few.parquet"), few, {"e_form_per_atom": [-1.0] * len(few)})
    failed(
        gnome("train", "structural", "few.parquet", *OPTIONS), 2, "8 crystals of 8 formulas to learn from", "at least 20 of 10"
    )
    gold = [Crystal(np.eye(3) * 3, np.array([79]), np.zeros((1, 3)))]
    write_shard(Path("gold.parquet"), gold, {"e_form_per_atom": [0.0]})
    failed(gnome("train", "structural", "gold.parquet", *OPTIONS), 2, "Au: the ensemble to begin with was not trained on it")
    failed(gnome("train", "compositional", "few.parquet", *OPTIONS), 2, "--fine-tune: for structural ensembles")
    failed(
        gnome("train", "structural", "few.parquet", "--method", "m", "--from", "start.safetensors"),
        2,
        "--from start.safetensors: goes with",
    )


def test_processes_of_a_launcher_are_refused(start: StructuralEnsemble, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(start)

    class Two:
        world, rank, device = 2, 0, torch.device("cpu")

    monkeypatch.setattr("flows.fine_tuning.Ranks.from_environment", staticmethod(lambda: Two))
    with pytest.raises(GnomeError, match="--fine-tune runs in one process"):
        fine_tune(_request(path), Silent())


def test_what_is_chosen_by_its_luck_is_not_reported_by_it() -> None:
    """Of ensembles that all err alike, the one that was lucky looks good where it was chosen; the report is of crystals it was not."""
    rng = np.random.default_rng(0)
    parts = np.arange(60) % 5
    lucky, reported = [], []
    for _ in range(50):
        predicted = {str(i): rng.normal(size=60) for i in range(40)}
        errors = {name: np.abs(one) for name, one in predicted.items()}
        chosen = _chosen_elsewhere(predicted, errors, parts)
        lucky.append(min(float(one.mean()) for one in errors.values()))
        reported.append(float(np.abs(chosen).mean()))
        for part in range(5):
            here = parts == part
            best = min(errors, key=lambda name: float(errors[name][~here].mean()))
            np.testing.assert_array_equal(chosen[here], predicted[best][here])
    error = np.sqrt(2 / np.pi)  # the mean size of a normal deviate
    assert np.mean(lucky) < 0.85 * error
    assert np.mean(reported) == pytest.approx(error, rel=0.04)
