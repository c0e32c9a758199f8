"""Turn public data sets into the shards that the shipped ensembles are trained on.

    python data/prepare_training.py SOURCE OUT

SOURCE holds `wbm/`, `mp/` and `composition/` as described in data/README.md: WBM initial structures with the DFT energies of their relaxed
states, Materials Project structures of MP-20 and MPTS-52, matbench_mp_e_form, and CritExam's formulas; all CC BY 4.0.  OUT receives
`structures.parquet`, `formulas.parquet` and `critexam.parquet`.
"""

import argparse
import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gnome.crystals.crystal import Crystal
from gnome.crystals.formula import parse_formula, reduced_formula
from gnome.crystals.shards import write_shard
from gnome.crystals.validity import is_valid
from gnome.errors import GnomeError
from gnome.quantities import PLAUSIBLE_E_FORM, Quantity

MP_FILES = ("mp20_train_partial", "mp20_val", "mpts52_val")


Labelled = tuple[Crystal, float, str, str]
"""A crystal, its formation energy (eV/atom), where it comes from, and its name there."""


def wbm_rows(folder: Path) -> Iterator[Labelled]:
    """Yield initial structures of WBM with the formation energy of their relaxed states."""
    with gzip.open(folder / "wbm.csv.gz", "rt", encoding="utf-8") as file:
        labels = [(row["material_id"], float(row["e_form_per_atom"])) for row in csv.DictReader(file)]
    arrays = np.load(folder / "wbm_initial_structures.npz")
    numbers, coords, lattices = arrays["atomic_numbers"], arrays["frac_coords"], arrays["lattice"]
    end = np.cumsum(arrays["natoms"], dtype=np.int64)
    start = end - arrays["natoms"]
    for i, (name, label) in enumerate(labels):
        yield Crystal(lattices[i], numbers[start[i] : end[i]], coords[start[i] : end[i]]), label, "wbm", name


def mp_rows(folder: Path) -> Iterator[Labelled]:
    """Yield relaxed Materials Project structures with their formation energies."""
    for name in MP_FILES:
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                label = row.get("formation_energy_per_atom")
                if label is None:
                    continue
                lattice = row.get("lattice_matrix") or lattice_from_parameters(*row["lattice_abc_angles"])
                yield (
                    Crystal.from_symbols(lattice, row["species"], row["frac_coords"]),
                    float(label),
                    "mp",
                    str(row["material_id"]),
                )


def lattice_from_parameters(a: float, b: float, c: float, alpha: float, beta: float, gamma: float) -> np.ndarray:
    """Build row vectors from lengths (angstrom) and angles (degrees)."""
    cos_a, cos_b, cos_g = np.cos(np.radians([alpha, beta, gamma]))
    sin_g = np.sin(np.radians(gamma))
    x = (cos_a - cos_b * cos_g) / sin_g
    return np.array([[a, 0, 0], [b * cos_g, b * sin_g, 0], [c * cos_b, c * x, c * np.sqrt(max(1 - cos_b**2 - x**2, 0))]])


def critexam_table(folder: Path) -> pa.Table:
    """Both energies of every formula of CritExam (Bartel et al., npj Comput. Mater. 6, 97 (2020)), with its part: train or val."""
    columns: dict[str, list[str | float]] = {
        name: [] for name in (Quantity.REDUCED_FORMULA, "part", Quantity.E_FORM_PER_ATOM, Quantity.DECOMPOSITION_ENERGY)
    }
    for part in ("train", "val"):
        energies: list[dict[str, float]] = []
        for name in ("ef", "ed"):
            with gzip.open(folder / f"critexam_{name}_{part}.csv.gz", "rt", encoding="utf-8") as file:
                energies.append({row["formula"]: float(row["target"]) for row in csv.DictReader(file)})
        if energies[0].keys() != energies[1].keys():
            raise SystemExit(f"{folder}: the formulas of both targets differ in {part}")
        for formula, e_form in energies[0].items():
            row = (reduced_formula(parse_formula(formula)), part, e_form, energies[1][formula])
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return pa.table({str(name): column for name, column in columns.items()})


def main() -> None:
    """Write all shards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()

    kept: list[Labelled] = []
    lowest: dict[tuple[str, int], float] = {}
    refused, again = 0, 0
    names: set[str] = set()
    for rows in (wbm_rows(options.source / "wbm"), mp_rows(options.source / "mp")):
        for crystal, label, source, name in rows:
            if not (PLAUSIBLE_E_FORM[0] <= label <= PLAUSIBLE_E_FORM[1] and is_valid(crystal)):
                refused += 1
                continue
            if name in names:  # MPTS-52 has some crystals of MP-20
                again += 1
                continue
            names.add(name)
            kept.append((crystal, label, source, name))
            key = (crystal.reduced_formula, 0)
            lowest[key] = min(label, lowest.get(key, np.inf))
    write_shard(
        options.out / "structures.parquet",
        [crystal for crystal, *_ in kept],
        {
            Quantity.REDUCED_FORMULA: [crystal.reduced_formula for crystal, *_ in kept],
            Quantity.E_FORM_PER_ATOM: [label for _, label, _, _ in kept],
            "source": [source for _, _, source, _ in kept],
            "material_id": [name for *_, name in kept],
        },
    )
    with gzip.open(options.source / "composition/matbench_mp_e_form.csv.gz", "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                formula = reduced_formula(parse_formula(row["composition"]))
            except GnomeError:
                refused += 1
                continue
            key = (formula, 1)
            lowest[key] = min(float(row["e_form"]), lowest.get(key, np.inf))
    formulas, schemes = zip(*lowest, strict=True)
    table = pa.table(
        {
            str(Quantity.REDUCED_FORMULA): list(formulas),
            "scheme": list(schemes),
            str(Quantity.E_FORM_PER_ATOM): list(lowest.values()),
        }
    )
    pq.write_table(table, options.out / "formulas.parquet", compression="zstd")
    pq.write_table(critexam_table(options.source / "composition"), options.out / "critexam.parquet", compression="zstd")
    print(f"{len(kept)} structures, {len(lowest)} formulas, {refused} rows refused, {again} known already")


if __name__ == "__main__":
    main()
