"""What the shipped formula networks are trained on: no formula of another part, under any label scheme."""

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gnome.crystals.elements import SYMBOLS
from gnome.crystals.formula import parse_formula, reduced_formula, split_bucket

SCRIPT = Path(__file__).parents[3] / "data" / "train_ensembles.py"


def test_no_formula_is_in_two_parts_of_the_formula_networks_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)  # scripts there import one another
    spec = importlib.util.spec_from_file_location("train_ensembles", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "train_ensembles", script)  # dataclasses look their module up
    spec.loader.exec_module(script)
    names = sorted({reduced_formula(parse_formula(f"{a}{n}O")) for a in SYMBOLS[11:80] if a != "Ar" for n in (1, 2, 3, 4)})
    names = [name for name in names if split_bucket(name) < 70]
    n = len(names)
    formulas = {"reduced_formula": names * 2, "scheme": [0] * n + [1] * n, "e_form_per_atom": [-1.0] * 2 * n}
    pq.write_table(pa.table(formulas), tmp_path / "formulas.parquet")
    part = ["val" if i % 3 == 0 else "train" for i in range(n)]
    energies = {"e_form_per_atom": [-1.0] * n, "decomposition_energy": [0.1] * n}
    pq.write_table(pa.table({"reduced_formula": names, "part": part, **energies}), tmp_path / "critexam.parquet")

    found = script.read_formulas(tmp_path)
    rows = np.array(names * 3)
    parts = {name: set(rows[getattr(found.split, name)]) for name in ("train", "validation", "test")}
    parts["reported"] = set(rows[found.reported])
    assert all(parts.values())
    assert not parts["train"] & (parts["validation"] | parts["test"] | parts["reported"])
    assert not parts["validation"] & (parts["test"] | parts["reported"])
    assert parts["reported"] == set(names[::3])
    in_train = np.isin(np.arange(3 * n), found.split.train)
    assert np.bincount(found.pack.scheme.numpy()[in_train], minlength=3).all(), "all schemes are learnt"
