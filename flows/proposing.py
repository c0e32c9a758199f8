"""The stages that propose: known crystals and formulas in, candidates out."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from flows.progress import Counter
from flows.records import candidate_record
from flows.settings import RoundSettings
from flows.workspace import Workspace
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.formula import reduced_formula
from gnome.errors import InvalidInput
from gnome.seeds import derived_seed
from gnome.stability.hull import ConvexHull
from pipelines.buildcell import BuildcellStructures, find_buildcell
from pipelines.candidate import Candidate
from pipelines.compositional import CompositionalPipeline, CompositionalSettings
from pipelines.compositions import FormulaSettings
from pipelines.formula_screening import fit_formula_offset
from pipelines.pyxtal_structures import PyXtalStructures
from pipelines.random_structures import RandomStructures, RandomStructureSettings
from pipelines.structural import IonicSubstitution, PartialSubstitution, StructuralSettings, Taken

SCARCE_RADIOACTIVE = frozenset({43, 61, 84, 85, 86, 87, 88, 89, 91, *range(93, 104)})
"""Tc, Pm, Po to Ac, Pa and from Np on: hardly anyone can make a crystal of them; proposed only when named.

Cheetham and Seshadri, Chem. Mater. 2024, count more than 18,000 such compounds among GNoME's.
"""

CHUNK = 500


def allowed_elements(settings: RoundSettings, *known: frozenset[int]) -> frozenset[int]:
    """Intersect the elements asked for with those that models, hull and evaluator know; scarce radioactive ones only when asked for.

    Raises InvalidInput naming a symbol that is no element or that one of them lacks.
    """
    common = frozenset.intersection(*known)
    asked = set()
    for symbol in settings.elements:
        if symbol not in SYMBOLS[1:]:
            raise InvalidInput(f"--elements: {symbol!r} is not an element symbol")
        if SYMBOLS.index(symbol) not in common:
            raise InvalidInput(f"--elements: {symbol} is not known to the ensemble, the hull and the evaluator together")
        asked.add(SYMBOLS.index(symbol))
    return frozenset(asked) or common - SCARCE_RADIOACTIVE


def propose_structural(
    workspace: Workspace, number: int, settings: RoundSettings, hull: ConvexHull, elements: frozenset[int]
) -> dict[str, Any]:
    """Propose by whole and by partial substitution in the crystals known before the round; returns how many by generator."""
    known_crystals = workspace.store.crystals_of(hull.method, before_round=number)
    parents = [stored.crystal for stored in known_crystals if stored.crystal.n_atoms <= settings.max_atoms]
    known = workspace.store.known_formulas(hull.method, before_round=number)
    bounds = StructuralSettings(max_atoms=settings.max_atoms, elements=elements, charge_balanced=settings.charge_balanced)
    generators: tuple[PartialSubstitution | IonicSubstitution, ...] = (
        PartialSubstitution(known_formulas=known, settings=bounds),
        IonicSubstitution(known_formulas=known, settings=bounds),
    )
    n_total = settings.n_candidates // len(settings.pipelines)
    counts: dict[str, int] = {}
    taken: Taken = {}
    with workspace.listener.stage("proposing", n_total, "candidates") as count:
        for i, generator in enumerate(generators):
            share = n_total // 2 if i == 0 else n_total - sum(counts.values())
            proposals = generator.propose(parents, limit=share, seed=derived_seed(settings.seed, number), taken=taken)
            counts[generator.name] = _store(workspace, proposals, number, count)
    return {**counts}


def propose_compositional(
    workspace: Workspace, number: int, settings: RoundSettings, hull: ConvexHull, elements: frozenset[int]
) -> dict[str, Any]:
    """Propose random structures of the formulas that the compositional ensemble puts nearest to the hull."""
    began_with = workspace.store.round(number).settings.get("formula_model")
    model = workspace.formula_model(None if began_with is None else str(began_with))
    structures = random_structures(workspace.settings.workers, RandomStructureSettings(max_atoms=settings.max_atoms))
    formulas = FormulaSettings()
    search = CompositionalSettings(
        n_formulas=settings.n_formulas,
        n_structures=settings.structures_per_formula,
        formulas=replace(formulas, max_atoms=min(formulas.max_atoms, settings.max_atoms)),
    )
    try:
        pipeline = CompositionalPipeline(structures, search)
        offset = None
        if model.method != hull.method:
            lowest = {}
            for entry in sorted(hull.entries, key=lambda entry: -entry.e_form_per_atom):
                lowest[reduced_formula(entry.composition)] = entry
            compositions = [entry.composition for entry in lowest.values()]
            e_forms = [entry.e_form_per_atom for entry in lowest.values()]
            offset = fit_formula_offset(model, compositions, e_forms, method=hull.method)
        choice = pipeline.choose_formulas(
            elements & model.elements,
            model,
            hull,
            seed=derived_seed(settings.seed, number),
            known_formulas=workspace.store.known_formulas(hull.method, before_round=number),
            offset=offset,
        )
        limit = settings.n_formulas * settings.structures_per_formula
        with workspace.listener.stage("random structures", limit, "candidates") as count:
            proposals = pipeline.propose(
                [dict(prediction.composition) for prediction in choice.chosen],
                limit=limit,
                seed=derived_seed(settings.seed, number),
            )
            n = _store(workspace, proposals, number, count)
        return {
            pipeline.name: n,
            "formulas": [prediction.reduced_formula for prediction in choice.chosen],
            "failures": pipeline.failures,
            "offset_note": choice.offset_note,
        }
    finally:
        structures.close()


def random_structures(workers: int, settings: RandomStructureSettings) -> RandomStructures:
    """AIRSS's buildcell where it is installed, else PyXtal in so many processes."""
    program = find_buildcell()
    return PyXtalStructures(settings, workers=workers) if program is None else BuildcellStructures(program, settings)


def _store(workspace: Workspace, proposals: Iterator[Candidate], number: int, count: Counter) -> int:
    n = 0
    while chunk := list(islice(proposals, CHUNK)):
        workspace.store.add_candidates([candidate_record(candidate, number) for candidate in chunk])
        n += len(chunk)  # also those that an interrupted attempt has stored: the shares of the generators hang on it
        count(len(chunk))
    return n
