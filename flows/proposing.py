"""The stages that propose: known crystals and formulas in, candidates out."""

from collections.abc import Iterator
from itertools import islice

from flows.records import candidate_from, candidate_record
from flows.settings import RoundSettings
from flows.workspace import Workspace
from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.formula import reduced_formula
from gnome.errors import InvalidInput
from gnome.models.ensemble import StructuralEnsemble
from gnome.stability.hull import ConvexHull
from pipelines.buildcell import BuildcellStructures, find_buildcell
from pipelines.candidate import Candidate, Generator
from pipelines.compositional import CompositionalPipeline, CompositionalSettings
from pipelines.formula_screening import fit_formula_offset
from pipelines.pyxtal_structures import PyXtalStructures
from pipelines.random_structures import RandomStructures
from pipelines.structural import IonicSubstitution, PartialSubstitution, StructuralSettings

ATTEMPTS_PER_CANDIDATE = 100
"""Proposals looked at for each candidate kept, where `elements` narrows the choice."""

CHUNK = 500


def allowed_elements(settings: RoundSettings, *known: frozenset[int]) -> frozenset[int]:
    """Intersect the elements asked for with those that models, hull and evaluator know.

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
    return frozenset(asked) or common


def known_formulas(workspace: Workspace, method: str, number: int) -> frozenset[str]:
    """Formulas that need no new proposal: those with a crystal, and those that an earlier round evaluated."""
    return workspace.store.known_formulas(method, before_round=number)


def propose_structural(
    workspace: Workspace, number: int, settings: RoundSettings, hull: ConvexHull, elements: frozenset[int]
) -> dict[str, int]:
    """Propose by whole and by partial substitution in the crystals known before the round; returns how many by generator."""
    parents = [
        stored.crystal
        for stored in workspace.store.crystals_of(hull.method)
        if (stored.row["round"] or 0) < number and stored.crystal.n_atoms <= settings.max_atoms
    ]
    known = known_formulas(workspace, hull.method, number)
    bounds = StructuralSettings(max_atoms=settings.max_atoms)
    generators: list[Generator] = [
        PartialSubstitution(known_formulas=known, settings=bounds),
        IonicSubstitution(known_formulas=known, settings=bounds),
    ]
    n_total = settings.n_candidates // len(settings.pipelines)
    counts = {}
    with workspace.listener.stage("proposing", n_total, "candidates") as count:
        for i, generator in enumerate(generators):
            share = n_total // 2 if i == 0 else n_total - sum(counts.values())
            proposals = _within(generator, parents, elements, n=share, seed=settings.seed + number)
            counts[generator.name] = _store(workspace, proposals, number, count)
    return counts


def _within(generator: Generator, parents: list[Crystal], elements: frozenset[int], *, n: int, seed: int) -> Iterator[Candidate]:
    """Take the first n proposals that consist of the given elements."""
    proposals = generator.propose(parents, limit=n * ATTEMPTS_PER_CANDIDATE, seed=seed)
    return islice((proposal for proposal in proposals if set(proposal.crystal.composition) <= elements), n)


def propose_compositional(
    workspace: Workspace, number: int, settings: RoundSettings, hull: ConvexHull, elements: frozenset[int]
) -> dict[str, int | str | list[str]]:
    """Propose random structures of the formulas that the compositional ensemble puts nearest to the hull."""
    model = workspace.formula_model()
    structures = random_structures()
    try:
        pipeline = CompositionalPipeline(
            structures, CompositionalSettings(n_formulas=settings.n_formulas, n_structures=settings.structures_per_formula)
        )
        lowest: dict[str, tuple[dict[int, int], float]] = {}
        for entry in hull.entries:
            formula = reduced_formula(entry.composition)
            if formula not in lowest or entry.e_form_per_atom < lowest[formula][1]:
                lowest[formula] = (dict(entry.composition), entry.e_form_per_atom)
        compositions, e_forms = zip(*lowest.values(), strict=True)
        offset = None
        if model.method != hull.method:
            offset = fit_formula_offset(model, compositions, e_forms, method=hull.method)
        choice = pipeline.choose_formulas(
            elements & model.elements,
            model,
            hull,
            seed=settings.seed + number,
            known_formulas=known_formulas(workspace, hull.method, number),
            offset=offset,
        )
        limit = settings.n_formulas * settings.structures_per_formula
        with workspace.listener.stage("random structures", limit, "candidates") as count:
            proposals = pipeline.propose(
                [prediction.composition for prediction in choice.chosen], limit=limit, seed=settings.seed + number
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


def random_structures() -> RandomStructures:
    """AIRSS's buildcell where it is installed, else PyXtal."""
    program = find_buildcell()
    return PyXtalStructures() if program is None else BuildcellStructures(program)


def candidates_of(workspace: Workspace, number: int) -> list[Candidate]:
    """Every candidate of a round, by id."""
    return [candidate_from(record) for record in workspace.store.candidates_of_round(number)]


def screenable_elements(workspace: Workspace, model: StructuralEnsemble, hull: ConvexHull) -> frozenset[int]:
    """Elements for which there is a model, a reference and an evaluator."""
    return frozenset.intersection(model.elements, hull.elements, workspace.evaluator().elements)


def _store(workspace: Workspace, proposals: Iterator[Candidate], number: int, count: object) -> int:
    n = 0
    while chunk := list(islice(proposals, CHUNK)):
        workspace.store.add_candidates([candidate_record(candidate, number) for candidate in chunk])
        n += len(chunk)
        count(len(chunk))  # type: ignore[operator]
    return n
