"""Build the shipped seeds, elemental references and validation set by relaxing known crystals with CHGNet; `make seeds` runs this.

    python data/make_seeds.py [--work build/seeds]

Every relaxation is appended to `relaxed.jsonl` in the work folder as soon as it ends, so an interrupted run goes on where it stopped,
and a finished one only rebuilds the output files.  Another processor gives the same crystals up to the convergence of the relaxations;
what the shipped file was made from is in data/README.md.
"""

import argparse
import csv
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ase.calculators.calculator import Calculator
from isotypes import isotypes
from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY
from scipy.sparse.csgraph import connected_components
from structure_types import build

from dft_stub.evaluator import Failure
from dft_stub.potentials import CHGNetPotential
from dft_stub.relaxer import Relaxation, RelaxSettings, relax, relaxation_method
from gnome.crystals.convert import from_structure
from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import COVALENT_RADIUS, SYMBOLS
from gnome.crystals.formats import ReadCrystal, read_crystals
from gnome.crystals.formula import parse_formula, reduced_formula
from gnome.crystals.identity import primitive_crystal
from gnome.crystals.validity import is_valid
from gnome.models.datasets import VALIDATION_BUCKETS, split_bucket
from gnome.models.ensemble import StructuralEnsemble
from pipelines.contacts import shortest_contacts

HERE = Path(__file__).parent
SETTINGS = RelaxSettings(max_steps=500)
MAX_LIBRARY_ATOMS = 20
MAX_ISOTYPE_ATOMS = 11
STRUCTURES_TRIED = 2
PACKINGS_TRIED = 24
_PACKED_ANEW = ("H", "N", "O", "F", "Cl", "Br", "I")
COD_FOLDER = Path(os.environ.get("AVOGADRO_CRYSTALS", "/usr/share/avogadro2/crystals"))
_calculator: Calculator
VALIDATION_ATTEMPTS = 9000
VALIDATION_MAX_ATOMS = 12

_MOLECULAR = frozenset(["H", "He", "N", "O", "F", "Ne", "P", "S", "Cl", "Ar", "Se", "Br", "Kr", "I", "Xe", "B", "C"])
_OPEN_SOLIDS = {"P": ("A7",), "As": ("A7",), "Sb": ("A7",), "Bi": ("A7",), "Se": ("A8",), "Te": ("A8",), "S": ("A8",)}
_CLOSE_PACKED = {"fcc": (4, 0.0), "bcc": (2, 0.0), "hcp": (2, 1.633), "dhcp": (4, 3.24)}
"""Atoms in the conventional cell, and c/a of the hexagonal ones."""

_ALIKE = tuple(
    group.split()
    for group in (
        "Li Na K Rb Cs Ag Cu Tl", "Mg Ca Sr Ba Eu Yb Cd Zn", "Sc Y La Ce Pr Nd Sm Gd Tb Dy Ho Er Tm Lu", "Ti Zr Hf Sn Ge",
        "V Nb Ta Mo W Cr", "Mn Fe Co Ni Cu Zn Mg", "Ru Rh Pd Os Ir Pt Au Re", "B Al Ga In Tl Sc", "C Si Ge Sn Pb",
        "N P As Sb Bi", "O S Se Te", "F Cl Br I H", "Th U Np Pu Ce",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A crystal to relax, and where it comes from."""

    crystal: Crystal
    source: str
    observed: bool = True


def main() -> None:
    """Relax everything, then write the outputs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/seeds"), help="folder of the checkpoint")
    parser.add_argument("--processes", type=int, default=1, help="relaxations at a time, each on one core")
    parser.add_argument("--seeds-only", action="store_true", help="leave the validation set as it is")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # pymatgen's remarks on its own library
    relaxer = Relaxer(arguments.work / "relaxed.jsonl")
    elements = list(element_jobs())
    jobs = [*elements, *shaken_jobs(elements), *library_jobs(), *textbook_jobs(), *cod_jobs()]
    jobs += known_jobs(jobs)
    relaxer.relax_all(jobs, arguments.processes)
    from assemble_seeds import write_seeds, write_validation  # noqa: PLC0415  # not needed while relaxing

    seeds = write_seeds([(job, relaxer(job)) for job in jobs], relaxer.method, HERE)
    if arguments.seeds_only:
        return
    generated = list(validation_jobs(seeds))
    relaxer.relax_all(generated, arguments.processes)
    write_validation([(job, relaxer(job)) for job in generated], relaxer.method, HERE)


class Relaxer:
    """Knows what crystals relax to with CHGNet, and remembers every outcome in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.method = relaxation_method(CHGNetPotential(), SETTINGS)
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, Relaxation] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line an interruption tore
                continue
            if record.pop("method") == self.method.label:
                start = record.pop("start")
                self.known[start] = _relaxation(record)

    def __call__(self, job: Job) -> Relaxation:
        """Look the outcome up."""
        return self.known[job.crystal.id]

    def relax_all(self, jobs: Sequence[Job], processes: int) -> None:
        """Relax what is not known yet, small cells first."""
        waiting = {job.crystal.id: job for job in jobs if job.crystal.id not in self.known}
        ordered = sorted(waiting.values(), key=lambda job: job.crystal.n_atoms)
        report(f"{len(ordered)} of {len(jobs)} crystals to relax")
        with multiprocessing.get_context("spawn").Pool(processes, initializer=_load) as pool:
            for job, outcome in pool.imap_unordered(_relax, ordered):
                self._keep(job, outcome)

    def _keep(self, job: Job, outcome: Relaxation) -> None:
        self.known[job.crystal.id] = outcome
        with self.path.open("a") as file:
            file.write(json.dumps({"start": job.crystal.id, "method": self.method.label, **_record(outcome)}) + "\n")
        state = f"{outcome.energy_per_atom:.4f} eV/atom" if outcome.converged else f"{outcome.failure}: {outcome.message}"
        seconds = outcome.cost_seconds
        report(
            f"{len(self.known):5d} {job.source}: {job.crystal.n_atoms} atoms, {outcome.n_steps} steps, {seconds:.1f} s, {state}"
        )


def _load() -> None:
    """Load CHGNet once a process."""
    global _calculator  # noqa: PLW0603 - what a pool's process keeps
    warnings.simplefilter("ignore")
    _calculator = CHGNetPotential().calculator()


def _relax(job: Job) -> tuple[Job, Relaxation]:
    started = time.process_time()
    outcome = relax(job.crystal, _calculator, SETTINGS, elements=CHGNetPotential.elements)
    return job, replace(outcome, cost_seconds=time.process_time() - started)


def report(line: str) -> None:
    """Print at once, so that a log can be followed."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _record(outcome: Relaxation) -> dict[str, object]:
    crystal = None if outcome.crystal is None else outcome.crystal.to_dict()
    plain = {
        name: getattr(outcome, name) for name in ("failure", "message", "energy_per_atom", "max_force", "n_steps", "cost_seconds")
    }
    return {**plain, "crystal": crystal}


def _relaxation(record: dict[str, object]) -> Relaxation:
    crystal, failure = record.pop("crystal"), record.pop("failure")
    return Relaxation(
        crystal=Crystal.from_dict(crystal) if crystal else None,
        failure=Failure(failure) if failure else None,
        **record,
    )


def library_jobs() -> Iterator[Job]:
    """Yield the real structures that pymatgen's prototype library carries, those of at most 20 atoms."""
    for entry in AFLOW_PROTOTYPE_LIBRARY:
        structure, tags = entry["snl"].structure, entry["tags"]
        if len(structure) <= MAX_LIBRARY_ATOMS and structure.is_ordered:
            mineral = f" ({tags['mineral']})" if tags.get("mineral") else ""
            yield Job(
                from_structure(structure), f"prototype library: {structure.composition.reduced_formula} {tags['aflow']}{mineral}"
            )


def cod_jobs() -> Iterator[Job]:
    """Yield the crystals of the Crystallography Open Database that Debian's libavogadro-data carries.

    Zeolites are left out, and what has more than 20 atoms.
    """
    if not COD_FOLDER.is_dir():
        raise SystemExit(f"{COD_FOLDER} is not there: apt-get install libavogadro-data")
    for path in sorted(path for path in COD_FOLDER.rglob("*.cif") if path.parent.name != "zeolites"):
        for item in read_crystals(path):
            if isinstance(item, ReadCrystal) and set(item.crystal.composition) <= CHGNetPotential.elements:
                crystal = primitive_crystal(item.crystal)
                if crystal.n_atoms <= MAX_LIBRARY_ATOMS:
                    yield Job(crystal, f"COD, from libavogadro-data: {crystal.reduced_formula} {path.stem}")


def known_jobs(jobs: Sequence[Job]) -> Iterator[Job]:
    """Yield structures of the compounds of known_compounds.csv that no other job is one of, in the likeness of those that others are."""
    have = {job.crystal.reduced_formula for job in jobs}
    named = [formula for row in _rows("known_compounds.csv") for formula in row["formulas"].split()]
    wanted = [formula for formula in dict.fromkeys(named) if reduced_formula(parse_formula(formula)) not in have]
    templates = [(job.crystal, job.source) for job in jobs if job.crystal.n_atoms <= MAX_ISOTYPE_ATOMS]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ensemble = StructuralEnsemble.load(HERE / "ensembles" / "structural.safetensors", device)
    ensemble = replace(ensemble, members=ensemble.members[:2])  # to choose what is tried, two say enough
    for formula, found in isotypes(wanted, templates, ensemble, most=STRUCTURES_TRIED).items():
        report(f"{formula}: {len(found)} structures to try")
        for crystal, template in found:
            yield Job(crystal, f"known compound: {formula} as {template}")


def textbook_jobs() -> Iterator[Job]:
    """Yield the compounds of textbook_compounds.csv."""
    for row in _rows("textbook_compounds.csv"):
        yield Job(_built(row), f"textbook: {row['formula']} {row['structure_type']}")


def element_jobs() -> Iterator[Job]:
    """Yield the observed forms of the elements, then forms that are tried so that the reference is the lowest of several."""
    volumes: dict[str, float] = {}
    for row in _rows("textbook_elements.csv"):
        crystal = _built(row)
        volumes.setdefault(row["formula"], crystal.volume_per_atom)
        observed = not row["source"].startswith("not observed")
        yield Job(crystal, f"element: {row['formula']} {row['structure_type']}", observed)
    for entry in AFLOW_PROTOTYPE_LIBRARY:
        structure = entry["snl"].structure
        if len(structure.composition.elements) == 1:
            volumes.setdefault(structure.composition.elements[0].symbol, structure.volume / len(structure))
    known = {(row["formula"], row["structure_type"]) for row in _rows("textbook_elements.csv")}
    for symbol, volume in sorted(volumes.items(), key=lambda item: SYMBOLS.index(item[0])):
        for kind in _OPEN_SOLIDS.get(symbol, ()) if symbol in _MOLECULAR | set(_OPEN_SOLIDS) else tuple(_CLOSE_PACKED):
            if (symbol, kind) not in known and (kind != "dhcp" or 57 <= SYMBOLS.index(symbol) <= 71):
                yield Job(_tried(symbol, kind, volume), f"element, form tried: {symbol} {kind}", observed=False)


def shaken_jobs(elements: Sequence[Job]) -> Iterator[Job]:
    """Yield molecular elements packed anew: doubled cells of their known forms with molecules pushed about.

    A potential packs molecules in its own way, and the reference is to be the lowest form that it has.
    """
    for symbol in _PACKED_ANEW:
        forms = [job for job in elements if set(job.crystal.symbols) == {symbol} and job.crystal.n_atoms <= 8]
        for k in range(PACKINGS_TRIED if forms else 0):
            form = forms[k % len(forms)]
            rng = np.random.default_rng([SYMBOLS.index(symbol), k])
            repeats = np.array([(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1)][(k // len(forms)) % 4])
            pushed = _pushed(form.crystal, repeats, rng).scaled(1.0 if k < PACKINGS_TRIED // 2 else 0.75)
            if is_valid(pushed):
                yield Job(pushed, f"element, form tried: {symbol} packed anew {k} from {form.source}", observed=False)


def _pushed(crystal: Crystal, repeats: np.ndarray, rng: np.random.Generator) -> Crystal:
    """A supercell whose cell is strained and whose molecules, atoms within 1.3 bond lengths, move as one."""
    cells = np.array(list(np.ndindex(*repeats)))
    coords = ((crystal.frac_coords[None] + cells[:, None]) / repeats).reshape(-1, 3)
    lattice = crystal.lattice * repeats[:, None]
    whole = Crystal(lattice, np.tile(crystal.atomic_numbers, len(cells)), coords)
    contacts = shortest_contacts(whole)
    bonded = contacts < 1.3 * contacts.min()
    molecules = connected_components(bonded)[1]
    moves = rng.normal(scale=0.35, size=(molecules.max() + 1, 3))[molecules]
    strain = rng.normal(scale=0.08, size=(3, 3))
    return Crystal(
        np.round(lattice @ (np.eye(3) + (strain + strain.T) / 2), 6),
        whole.atomic_numbers,
        np.round(whole.frac_coords + moves @ np.linalg.inv(lattice), 6),
    )


def _tried(symbol: str, kind: str, volume: float) -> Crystal:
    if kind in _CLOSE_PACKED:
        n_atoms, ratio = _CLOSE_PACKED[kind]
        area = 1.0 if not ratio else ratio * np.sqrt(3) / 2
        a = float((volume * n_atoms / area) ** (1 / 3))
        return from_structure(build(symbol, kind, a, c=a * ratio))
    crystal = from_structure(build(symbol, kind, 4.4, c={"A7": 11.0, "A8": 5.5}[kind]))
    return crystal.scaled(volume / crystal.volume_per_atom)


def _rows(name: str) -> list[dict[str, str]]:
    with (HERE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def _built(row: dict[str, str]) -> Crystal:
    lengths = {axis: float(row[axis] or 0) for axis in "abc"}
    free = float(row["x"]) if row["x"] else None
    return from_structure(build(row["formula"], row["structure_type"], **lengths, x=free))


def validation_jobs(seeds: list[Crystal]) -> Iterator[Job]:
    """Yield crystals as a generator would propose them: elements replaced by alike ones, sites exchanged, cells strained, atoms moved.

    Only those with formulas of the validation buckets, which no shipped ensemble was trained on.
    """
    rng = np.random.default_rng(20240601)
    parents = [crystal for crystal in seeds if 2 <= crystal.n_atoms <= VALIDATION_MAX_ATOMS and len(crystal.composition) >= 2]
    seen: set[str] = set()
    for _ in range(VALIDATION_ATTEMPTS):
        parent = parents[rng.integers(len(parents))]
        kind = rng.choice(["substitution", "double substitution", "exchange", "rattle"], p=[0.4, 0.25, 0.1, 0.25])
        child = parent
        for _ in range({"substitution": 1, "double substitution": 2}.get(str(kind), 0)):
            child = _substituted(child, rng)
        if kind == "exchange":
            child = child.with_atomic_numbers(rng.permutation(child.atomic_numbers))
        child = _moved(child, rng, strong=kind == "rattle")
        if child.id not in seen and split_bucket(child.reduced_formula) in VALIDATION_BUCKETS:
            seen.add(child.id)
            yield Job(child, json.dumps({"generator": str(kind), "parent": parent.id}), observed=False)


def _substituted(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """Replace one element by one of its kin, scaling the volume with the cube of the summed covalent radii."""
    old = int(rng.choice(sorted(crystal.composition)))
    kin = sorted(
        {symbol for group in _ALIKE if SYMBOLS[old] in group for symbol in group} - {SYMBOLS[z] for z in crystal.composition}
    )
    if not kin:
        return crystal
    numbers = np.where(crystal.atomic_numbers == old, SYMBOLS.index(str(rng.choice(kin))), crystal.atomic_numbers)
    radii = np.array(COVALENT_RADIUS)
    factor = (radii[numbers].sum() / radii[crystal.atomic_numbers].sum()) ** 3
    return crystal.with_atomic_numbers(numbers).scaled(float(factor))


def _moved(crystal: Crystal, rng: np.random.Generator, *, strong: bool) -> Crystal:
    strain = rng.normal(scale=0.04 if strong else 0.01, size=(3, 3))
    lattice = crystal.lattice @ (np.eye(3) + (strain + strain.T) / 2)
    moved = crystal.cart_coords + rng.normal(scale=0.12 if strong else 0.02, size=(crystal.n_atoms, 3))
    coords = moved @ np.linalg.inv(crystal.lattice)
    volume = rng.uniform(0.85, 1.2) if strong else 1.0
    return Crystal(np.round(lattice, 6), crystal.atomic_numbers, np.round(coords, 6)).scaled(float(volume))


if __name__ == "__main__":
    main()
