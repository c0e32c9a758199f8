"""What all tests share: nothing of the user's own is read or written, and a small world for rounds is built once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for every process that tests start


@pytest.fixture(scope="session", autouse=True)
def own_places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Point data folders into a temporary one, and forget the settings of whoever runs the tests."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("GNOME_", "PREFECT_"))]:
            patch.delenv(name)
        patch.setenv("XDG_DATA_HOME", str(home / "share"))
        patch.setenv("PREFECT_HOME", str(home / "prefect"))
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        patch.setenv("DO_NOT_TRACK", "1")
        yield home


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, where no gnome.toml is."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def emt_world(own_places: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a database with known crystals under EMT and no round; to be copied, not written."""
    from emt_world import build_world

    folder = tmp_path_factory.mktemp("world") / "emt"
    build_world(folder)
    return folder


@pytest.fixture(scope="session")
def after_round(emt_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same world after one round; to be copied, not written."""
    from emt_world import copy_world, round_settings

    from flows.stages import run_round
    from flows.workspace import open_workspace

    folder = tmp_path_factory.mktemp("world") / "after_round"
    with open_workspace(copy_world(emt_world, folder)) as workspace:
        run_round(workspace, round_settings())
    return folder


@pytest.fixture(scope="session")
def emt_data(emt_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a validation set labelled by EMT, in place of the shipped one."""
    from emt_world import copy_world, write_validation

    folder = tmp_path_factory.mktemp("data")
    copy_world(emt_world, folder)
    return write_validation(folder, folder)
