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
heard = []
def hear(event, arguments):
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & writes:
        heard.append(f"opens {arguments[0]}")
    elif event in ("os.mkdir", "os.remove", "os.rename", "sqlite3.connect", "socket.connect", "subprocess.Popen"):
        heard.append(f"{event} {arguments[0]}")
sys.addaudithook(hear)
for name in sys.argv[1].split():
    importlib.import_module(name)
print(*heard, sep="\\n")
"""


def test_importing_everything_changes_no_file_and_says_nothing(tmp_path: Path) -> None:
    """Prefect makes its own folder when it is imported; nothing else is opened for writing, connected to or started."""
    names = [name for name in modules() if not name.startswith("gnome.database.migrations")]  # alembic runs those
    prefect, home = tmp_path / "prefect", tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-B", "-c", LISTENING, " ".join(names)],
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(home), "PREFECT_HOME": str(prefect), "XDG_DATA_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not [line for line in done.stdout.splitlines() if line and not _of_others(line, prefect)]
    assert not [path for path in home.rglob("*") if "gnome" in path.name]


def _of_others(line: str, prefect: Path) -> bool:
    """Prefect's folder, and what libraries ask the system for when they are loaded."""
    return str(prefect) in line or any(name in line for name in ("/dev/", "matplotlib", "subprocess.Popen", "/tmp/"))


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
