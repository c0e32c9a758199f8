"""What fine-tuning the shipped ensemble on a few crystals gains, and that nothing is lost where there is nothing to learn.

    python benchmarks/fine_tuning.py [--sizes 40 100 300] [--members 5] [--structures structures.parquet]

Three methods: CHGNet's energies of the shipped seeds (real, and another method than the ensemble's); and with `--structures`, as
data/prepare_training.py writes it, WBM's labels with invented energies of the elements (normal, 0.15 eV/atom) and all 3 % larger, and WBM's
labels as they are.  What is learnt of WBM is of the buckets 60 to 99, which the ensemble has not seen, what it is tested on of 55 to 59.
Prints what `gnome train --fine-tune` measured, and the errors on crystals that nobody learnt, before and after.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from flows.fine_tuning import FineTuneRequest, fine_tune
from flows.progress import Silent
from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import MAX_ATOMIC_NUMBER
from gnome.crystals.formula import split_bucket
from gnome.crystals.shards import read_shard, write_shard
from gnome.errors import GnomeError
from gnome.models.datasets import VALIDATION_BUCKETS
from gnome.models.ensemble import StructuralEnsemble
from gnome.shipped import shipped_data

N_TESTED = 300
Labelled = list[tuple[Crystal, float]]


def of_seeds(rng: np.random.Generator, most: int) -> tuple[Labelled, Labelled]:
    """Shipped seeds of more than one element with CHGNet's energies: so many to learn from, the rest to test on."""
    crystals, columns, _ = read_shard(shipped_data() / "seeds.parquet")
    pairs = [pair for pair in zip(crystals, columns["e_form_per_atom"], strict=True) if len(pair[0].composition) > 1]
    order = rng.permutation(len(pairs))
    return [pairs[i] for i in order[:most]], [pairs[i] for i in order[most:]]


def of_wbm(path: Path, rng: np.random.Generator, most: int) -> tuple[Labelled, Labelled]:
    """WBM's crystals of at most ten atoms: so many to learn from, others to test on."""
    crystals, columns, _ = read_shard(path)
    rows = zip(crystals, columns["e_form_per_atom"], columns["source"], strict=True)
    pairs = [(crystal, label) for crystal, label, source in rows if source == "wbm" and crystal.n_atoms <= 10]
    buckets = np.array([split_bucket(crystal.reduced_formula) for crystal, _ in pairs])
    learnt = rng.permutation(np.flatnonzero(buckets >= 60))[:most]
    tested = rng.permutation(np.flatnonzero(np.isin(buckets, VALIDATION_BUCKETS)))[:N_TESTED]
    return [pairs[i] for i in learnt], [pairs[i] for i in tested]


def invented(rows: Labelled, shifts: np.ndarray) -> Labelled:
    """Labels of a method that there is not."""
    return [
        (crystal, 1.03 * (label + sum(shifts[z] * n for z, n in crystal.composition.items()) / crystal.n_atoms))
        for crystal, label in rows
    ]


def error(ensemble: StructuralEnsemble, rows: Labelled) -> float:
    """Mean absolute error of the medians, eV/atom."""
    energies = ensemble.member_energies([crystal for crystal, _ in rows])[:, 0]
    return float(np.abs(np.median(energies, axis=0) - [label for _, label in rows]).mean())


def measure(name: str, n: int, learnt: Labelled, tested: Labelled, members: int) -> str:
    """Fine-tune on the first n crystals; one row of the table."""
    start = StructuralEnsemble.load(shipped_data() / "ensembles" / "structural.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        shard, out = Path(folder, "learnt.parquet"), Path(folder, "tuned.safetensors")
        write_shard(shard, [crystal for crystal, _ in learnt[:n]], {"e_form_per_atom": [float(label) for _, label in learnt[:n]]})
        try:
            card = fine_tune(FineTuneRequest(files=(shard,), out=out, method=name, members=members), Silent())
        except GnomeError as nothing:
            return (
                f"| {name} | {n} | {len(tested)} | {error(start, tested):.4f} | not written | {str(nothing).split(' on ')[0]} |"
            )
        tuned = StructuralEnsemble.load(out)
        known = [row for row in tested if set(row[0].composition) <= tuned.elements]
        change = card["difference"]
        said = f"{change['value']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]: {card['trained_on'].rsplit(': ', 1)[1]}"
        return f"| {name} | {n} | {len(known)} | {error(start, known):.4f} | {error(tuned, known):.4f} | {said} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[40, 100, 300])
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--structures", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    most = max(options.sizes)
    arms = {"CHGNet": of_seeds(rng, most)}
    if options.structures is not None:
        wbm = of_wbm(options.structures, rng, most)
        shifts = rng.normal(0, 0.15, MAX_ATOMIC_NUMBER + 1)
        arms["WBM, invented"] = invented(wbm[0], shifts), invented(wbm[1], shifts)
        arms["WBM as it is"] = wbm
    print("| method | learnt | tested | before, eV/atom | after | measured by the command |")
    print("|---|---|---|---|---|---|")
    for n in options.sizes:
        for name, (learnt, tested) in arms.items():
            print(measure(name, n, learnt, tested, options.members), flush=True)


if __name__ == "__main__":
    main()
