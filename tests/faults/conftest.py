"""What the tests of faults on the command line share."""

from pathlib import Path

import pytest
from cli_runs import ELEMENTS, Here

from flows.cli import main
from gnome.crystals.formats import ReadCrystal
from gnome.crystals.writers import write_crystals


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Run the program in this process, on a folder's database."""

    def run(folder: Path, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("GNOME_DATABASE_URL", f"sqlite:///{folder / 'gnome.db'}")
        monkeypatch.setenv("GNOME_EVALUATOR", "emt")
        monkeypatch.setenv("GNOME_WORKERS", "1")
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def good_element(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    item = ReadCrystal(label="Cu", crystal=ELEMENTS["Cu"], fields={"energy_per_atom": 0.0})
    write_crystals(folder / "Cu.extxyz", [item])
    return folder
