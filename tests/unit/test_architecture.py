"""The rules of the house that import contracts cannot state."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gnome import fp8, transformer

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("gnome", "pipelines", "dft_stub", "flows")


def modules() -> list[str]:
    names = []
    for package in PACKAGES:
        names.append(package)
        names += [found.name for found in pkgutil.walk_packages([str(ROOT / package)], f"{package}.")]
    return names


def python(program: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-B", "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


LISTENING = """
import importlib, os, sys
ours, heard = sys.argv[2], []
def done_by_us():
    # what a library does while it is being imported is its own; what it does because a module of ours calls it is ours
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        path = frame.f_code.co_filename
        if path.startswith(ours) and "site-packages" not in path:
            return True
        frame = frame.f_back
    return False
def hear(event, arguments):
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & writes
    changes = ("os.mkdir", "os.remove", "os.rename", "sqlite3.connect", "socket.connect", "subprocess.Popen")
    if (opens or event in changes) and done_by_us():
        heard.append(f"{event} {arguments[0]}")
sys.addaudithook(hear)
for name in sys.argv[1].split():
    importlib.import_module(name)
print(*heard, sep="\\n")
"""


def changed_by_importing(names: list[str], root: Path, home: Path) -> list[str]:
    """What the modules below a root do to files, networks and processes when they are imported."""
    home.mkdir()
    path = os.pathsep.join([str(root), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-B", "-c", LISTENING, " ".join(names), str(root)],
        cwd=home,
        env=os.environ
        | {"PYTHONPATH": path, "HOME": str(home), "PREFECT_HOME": str(home / "prefect"), "XDG_DATA_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


def test_importing_everything_changes_nothing_and_says_nothing(tmp_path: Path) -> None:
    names = [name for name in modules() if not name.startswith("gnome.database.migrations")]  # alembic runs those
    assert changed_by_importing(names, ROOT, tmp_path / "home") == [""]
    assert not [path for path in (tmp_path / "home").rglob("*") if "gnome" in path.name]


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ("open('here.txt', 'w')", "open here.txt"),
        ("import pathlib; pathlib.Path('here').mkdir()", "os.mkdir here"),
        ("import sqlite3; sqlite3.connect('here.db')", "sqlite3.connect here.db"),
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen true"),
    ],
)
def test_what_a_module_changes_when_it_is_imported_is_heard(tmp_path: Path, line: str, event: str) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "careless.py").write_text(line + "\n")
    assert changed_by_importing(["careless"], tmp_path / "ours", tmp_path / "home") == [event]


def test_a_training_node_needs_neither_pymatgen_nor_ase_nor_prefect(tmp_path: Path) -> None:
    names = [name for name in modules() if name.startswith(("gnome.models", "gnome.graphs"))]
    absent = ["pymatgen", "ase", "prefect", "sqlalchemy", "chgnet", "pyxtal", "optimade"]
    program = (
        f"import sys, importlib; sys.modules.update(dict.fromkeys({absent!r})); [importlib.import_module(n) for n in {names!r}]"
    )
    assert python(program, tmp_path).stdout == ""


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("flows.stages", {"prefect"}),
        ("flows.loop", {"prefect"}),
        ("flows.cli", {"prefect", "torch", "pymatgen", "ase"}),
        ("gnome.database.query", {"prefect", "torch", "pymatgen", "ase"}),
        ("gnome.fp8", {"prefect", "pymatgen", "ase", "torch_geometric", "triton", "matplotlib"}),
        ("gnome.transformer", {"prefect", "pymatgen", "ase", "torch_geometric", "triton", "matplotlib"}),
        ("gnome.crystals.crystal", {"prefect", "torch", "pymatgen", "ase"}),
    ],
)
def test_what_a_module_must_not_load(module: str, absent: set[str], tmp_path: Path) -> None:
    program = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = set(python(program, tmp_path).stdout.split())
    assert module.split(".", maxsplit=1)[0] in loaded
    assert not loaded & absent


def test_files_stay_readable_in_one_sitting() -> None:
    sizes = {path: len(path.read_text().splitlines()) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert len(sizes) > 50
    assert not {str(path): size for path, size in sizes.items() if size > 500}


@pytest.mark.parametrize("library", [fp8, transformer], ids=lambda library: library.__name__)
def test_a_library_within_gathers_its_public_names(library: ModuleType) -> None:
    """No module of the library's own goes through its root."""
    for path in (ROOT / library.__name__.replace(".", "/")).rglob("*.py"):
        assert f"from {library.__name__} import" not in path.read_text(), f"{path} imports its own package's root"
    public = {name for name, value in vars(library).items() if not name.startswith("_") and not isinstance(value, ModuleType)}
    assert public == set(library.__all__)


def test_package_roots_are_empty_but_for_the_libraries_within() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            lines = path.read_text().splitlines()
            imports = [line for line in lines if line.startswith(("import ", "from "))]
            assert not imports or path.parent.name in {"fp8", "transformer"}, f"{path} is more than a docstring"
