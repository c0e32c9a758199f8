"""The program in this process, and a database that one round was run on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emt_world import copy_world
from typed_commands import Outcome, Run

from flows.cli import main
from gnome.crystals.crystal import Crystal
from gnome.crystals.shards import write_shard


@pytest.fixture
def gnome(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the program in this process."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        code = ended.value.code
        return Outcome(code if isinstance(code, int) else int(code is not None), captured.out, captured.err)

    return run


@pytest.fixture
def database(after_round: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a database of its own that one round was run on, named by the environment."""
    folder = tmp_path / "database"
    settings = copy_world(after_round, folder)
    monkeypatch.setenv("GNOME_DATABASE_URL", settings.database_url)
    monkeypatch.setenv("GNOME_EVALUATOR", "emt")
    monkeypatch.setenv("GNOME_WORKERS", "1")
    return folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the program and parse its JSON."""

    def answer(*arguments: object) -> Any:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert not ended.value.code, err
        return json.loads(out)

    return answer


@pytest.fixture(scope="session")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six hundred cubic compounds of two elements, with an energy that depends on the elements alone."""
    generator = np.random.default_rng(0)
    crystals, energies = [], []
    for first in range(3, 40):
        for second in range(first + 1, min(first + 18, 57)):
            a = 2.6 + 0.02 * ((first + second) % 40)
            crystals.append(Crystal(np.eye(3) * a, np.array([first, second]), np.array([[0, 0, 0], [0.5, 0.5, 0.5]])))
            energies.append(-0.02 * (second - first) + 0.01 * float(generator.normal()))
    path = tmp_path_factory.mktemp("shards") / "labelled.parquet"
    write_shard(path, crystals, {"e_form_per_atom": energies})
    return path
