"""`gnome train --scaling-law`: growing training sets, a fit and a picture, and what an interruption leaves."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typed_commands import SMALL_TRAINING, Run

from flows.cli import main
from flows.progress import Silent
from flows.scaling_law import measure_scaling_law
from flows.training import TrainRequest
from gnome.crystals.crystal import Crystal
from gnome.crystals.shards import read_shard, write_shard
from gnome.errors import InvalidInput
from gnome.models import scaling
from gnome.models.scaling import ScalingSettings, reported_errors

pytestmark = pytest.mark.usefixtures("own_folder")


def test_the_scaling_law_is_measured_and_drawn(run: Run, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "ScalingSettings", partial(scaling.ScalingSettings, least_steps=60))
    crystals, columns, _ = read_shard(shard)
    five = Crystal.from_symbols(np.eye(3) * 8, ["Li", "Na", "K", "Rb", "O"], np.arange(15).reshape(5, 3) / 15)
    many = [Crystal(five.lattice * (1 + 0.01 * i), np.array([3, 11, 19, 37, 8 + i]), five.frac_coords) for i in range(20)]
    write_shard(Path("all.parquet"), [*crystals, *many], {"e_form_per_atom": [*columns["e_form_per_atom"], *[0.0] * len(many)]})
    wanted = "--scaling-law", "--smallest", 20
    law = run(
        "train",
        "structural",
        "all.parquet",
        "--out",
        "m.safetensors",
        *SMALL_TRAINING,
        "--learning-rate",
        5e-3,
        *wanted,
        "--json",
    )
    sizes = sorted({point["n_train"] for point in law["points"]})
    assert len(sizes) == 6
    assert sizes[0] == 20
    assert len(law["points"]) == 18
    assert set(law["laws"]) == {"at most 4 elements", "more"}
    own = law["laws"]["at most 4 elements"]
    assert own["low"] < own["exponent"] < own["high"]
    assert own["exponent"] > 0, "what depends on the elements alone is learnt better from more crystals"
    assert json.loads(Path("m.scaling.json").read_text()) == law
    assert Path("m.scaling.svg").read_text().startswith("<?xml")


def test_a_scaling_law_goes_on_where_it_was_interrupted(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = TrainRequest(
        kind="structural", network="angular", files=(shard,), out=Path("m.safetensors"), method="m", members=1, width=16, epochs=1,
        batch_size=64, learning_rate=1e-3, precision="fp32", seed=0,
    )  # fmt: skip
    settings = ScalingSettings(smallest=20, sizes=3, seeds=1, least_steps=1)
    measured = reported_errors
    calls = 0

    def twice(*arguments: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr("flows.scaling_law.reported_errors", twice)
    with pytest.raises(KeyboardInterrupt):
        measure_scaling_law(request, settings, Silent())
    kept = Path("m.scaling.json").read_text()
    (good,) = json.loads(kept)["points"]
    errors = [{}, *({"at most 4 elements": wrong} for wrong in (float("nan"), "0.1", 0.0, 10**400, True))]
    others = [
        good | {"n_train": 20.5},
        good | {"n_train": 0},
        good | {"seed": 9},
        *(good | {"errors": error} for error in errors),
    ]
    for points, place in [([good, good], 2), (None, 1), *(([other], 1) for other in others)]:
        Path("m.scaling.json").write_text(json.dumps(json.loads(kept) | {"points": points}))
        with pytest.raises(InvalidInput, match=rf"m\.scaling\.json: point {place} is not one .* delete the file"):
            measure_scaling_law(request, settings, Silent())
    Path("m.scaling.json").write_text(kept)
    first = json.loads(Path("m.scaling.json").read_text())["points"]
    law = measure_scaling_law(request, settings, Silent())
    assert calls == 4
    assert law["points"][0] == first[0]
    assert [point["n_train"] for point in law["points"]] == settings.training_sizes(law["points"][-1]["n_train"])
    measure_scaling_law(request, settings, Silent())
    assert calls == 4, "all of it is known"
    crystals, columns, metadata = read_shard(shard)
    write_shard(Path("larger.parquet"), [crystal.scaled(1.3) for crystal in crystals], columns, metadata)
    larger = replace(request, files=(Path("larger.parquet"),))
    with pytest.raises(InvalidInput, match=r"is a measurement of other files or settings; delete it"):
        measure_scaling_law(larger, settings, Silent())
    measure_scaling_law(replace(larger, out=Path("l.safetensors")), settings, Silent())
    assert calls == 7, "of other structures nothing is known"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidInput, match="one process"):
        measure_scaling_law(request, settings, Silent())


def test_too_few_crystals_for_a_scaling_law(capfd: pytest.CaptureFixture[str], shard: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "structural", str(shard), "--method", "m", "--scaling-law"])
    assert ended.value.code == 2
    assert "too few for 6 sizes from 1000 up: choose a smallest below" in capfd.readouterr().err
