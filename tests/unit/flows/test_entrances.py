"""The ways in beside the commands: version, short help, completion, settings in a file, Python."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typed_commands import Gnome

import gnome as library
from flows.settings import Settings
from flows.settings_example import MEANINGS, example_toml

ROOT = Path(__file__).resolve().parent.parent.parent.parent
pytestmark = pytest.mark.usefixtures("own_folder")


def test_the_version_is_said_everywhere_alike(gnome: Gnome) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert library.__version__ == declared
    assert gnome("--version").out == f"gnome {declared}\n"


@pytest.mark.parametrize("command", [(), ("query",), ("campaign",), ("campaign", "run")], ids=" ".join)
def test_a_short_help_is_the_long_one(gnome: Gnome, command: tuple[str, ...]) -> None:
    short, long = gnome(*command, "-h"), gnome(*command, "--help")
    assert short.code == 0
    assert short.out == long.out
    assert f"Usage: gnome {' '.join(command)}".strip() in short.out


def test_commands_are_completed_without_loading_what_they_need() -> None:
    program = (
        "import sys\nfrom flows.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.stderr.write(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    environment = os.environ | {"_GNOME_COMPLETE": "complete_bash", "COMP_WORDS": "gnome ca", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["campaign"]
    assert not set(done.stderr.split()) & {"torch", "pymatgen", "prefect", "ase", "chgnet", "scipy", "pandas"}


def uncommented(text: str) -> str:
    """An example whose settings count."""
    return re.sub(r"(?m)^# (?=\w+ = )", "", text)


@pytest.mark.parametrize("source", ["program", "docs/settings.md"])
def test_the_example_of_a_settings_file_loads_and_names_every_setting(gnome: Gnome, source: str) -> None:
    if source == "program":
        text = gnome("doctor", "--settings").out
        assert text == example_toml()
    else:
        (text,) = re.findall(r"(?s)```toml\n(.*?)```", (ROOT / source).read_text())
    assert not tomllib.loads(text), "all is commented out"
    values = tomllib.loads(uncommented(text))
    assert set(values) == set(Settings.model_fields) == set(MEANINGS)
    Path("gnome.toml").write_text(uncommented(text))
    loaded = Settings()
    for name, value in values.items():
        assert getattr(loaded, name) == (Path(value) if name == "folder" else value)
    assert MEANINGS["workers"] in text


def test_doctor_says_where_settings_come_from(gnome: Gnome, database: Path) -> None:
    from flows.doctor import _settings

    (finding,) = _settings(Settings())
    assert "no gnome.toml here; GNOME_DATABASE_URL, GNOME_EVALUATOR, GNOME_WORKERS" in finding.found
    Path("gnome.toml").write_text("workers = 1\n")
    (finding,) = _settings(Settings())
    assert str(Path("gnome.toml").absolute()) in finding.found


def test_the_examples_for_python_run(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text())
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), names)
    out = capsys.readouterr().out
    assert "reduced_formula" in out
    assert Path("first.cif").exists()
    assert "on their hull" in out


def test_the_round_of_the_readme_runs(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands there but for the elements: the small world has no lithium."""
    (example,) = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "README.md").read_text())
    shutil.copy(database / "gnome.db", "mine.db")
    changed = example.replace('("Li", "Fe", "O"), budget=20', '("Cu", "Au", "Ni"), budget=2')
    assert changed != example
    exec(compile(changed, "README.md", "exec"), {})
    assert re.fullmatch(r"\d hits in [12] evaluations\n", capsys.readouterr().out)


def test_what_was_found_is_a_data_frame_with_structures(gnome: Gnome, database: Path) -> None:
    from flows.found import found_crystals
    from gnome.errors import DatabaseUnavailable, InvalidInput

    rows = gnome("query", "nelements = 2", "--sort", "id", "--format", "json").json
    frame = found_crystals("nelements = 2", sort="id")
    assert list(frame.columns) == [*rows[0], "structure"]
    assert list(frame.id) == [row["id"] for row in rows]
    assert list(frame.e_form_per_atom) == [row["e_form_per_atom"] for row in rows]
    assert [structure.composition.reduced_formula for structure in frame.structure] == list(frame.reduced_formula)
    empty = found_crystals("nelements = 40", structures=False)
    assert list(empty.columns) == list(rows[0])
    assert empty.empty
    assert found_crystals("nelements = 40").empty
    assert len(found_crystals(limit=3, database=f"sqlite:///{database / 'gnome.db'}")) == 3
    with pytest.raises(InvalidInput, match="flavour"):
        found_crystals("flavour = 3")
    with pytest.raises(DatabaseUnavailable, match="there is none"):
        found_crystals(database="absent.db")
