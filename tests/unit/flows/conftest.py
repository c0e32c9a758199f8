"""The program in this process, and a database that one round was run on."""

from collections.abc import Callable
from pathlib import Path

import pytest
from emt_world import copy_world
from typed_commands import Outcome

from flows.cli import main


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
