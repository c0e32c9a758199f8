"""Candidates from formulas alone: enumerate, filter by the compositional ensemble, search for structures.

Source: Merchant et al., Nature 624, 80 (2023), Methods, "Compositional models".  The search is the costly part, so only the formulas
that the ensemble puts nearest to the hull, or below it, are searched.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from gnome.crystals.formula import reduced_formula
from gnome.models.energy_model import FormulaModel
from gnome.quantities import NEAR_HULL_TOLERANCE
from pipelines.candidate import Candidate, Lineage
from pipelines.compositions import Composition, FormulaSettings, enumerate_formulas
from pipelines.formula_screening import FormulaPrediction, screen_formulas, select_formulas
from pipelines.offset import Hull, Offset
from pipelines.random_structures import RandomStructures


@dataclass(frozen=True, kw_only=True)
class CompositionalSettings:
    """Sizes of a search.

    `n_enumerated` formulas are made and predicted, of which `n_formulas` are searched with `n_structures` random structures each.
    Only formulas predicted within `threshold` (eV/atom) of the hull are, unless `fill` lets the next best make up the number.
    """

    n_enumerated: int = 5_000
    n_formulas: int = 20
    n_structures: int = 10
    threshold: float = NEAR_HULL_TOLERANCE
    fill: bool = True
    formulas: FormulaSettings = field(default_factory=FormulaSettings)


@dataclass(frozen=True, kw_only=True)
class FormulaChoice:
    """The formulas to search, best first, and how many were enumerated and predicted on the way; `offset_note` as in screening."""

    chosen: tuple[FormulaPrediction, ...]
    n_enumerated: int
    n_predicted: int
    offset_note: str = ""


class CompositionalPipeline:
    """From elements to candidates, in two steps that can be run apart: `choose_formulas` and `propose`.

    What could not be made is in `failures` after `propose` has been run through, in words.
    """

    name = "compositional"

    def __init__(self, structures: RandomStructures, settings: CompositionalSettings | None = None) -> None:
        """Remember what draws the structures; closing it is the caller's."""
        self.structures = structures
        self.settings = settings or CompositionalSettings()
        self.failures: list[str] = []

    def choose_formulas(
        self,
        elements: Iterable[int],
        model: FormulaModel,
        hull: Hull,
        *,
        seed: int,
        known_formulas: frozenset[str] = frozenset(),
        offset: Offset | None = None,
    ) -> FormulaChoice:
        """Enumerate formulas of elements that model and hull know, skip the known ones, and keep the most promising."""
        usable = frozenset(elements) & model.elements & hull.elements
        enumerated = list(
            enumerate_formulas(
                usable,
                limit=self.settings.n_enumerated,
                seed=seed,
                known_formulas=known_formulas,
                settings=self.settings.formulas,
            )
        )
        predicted = screen_formulas(enumerated, model, hull, offset)
        chosen = select_formulas(predicted, self.settings.n_formulas, threshold=self.settings.threshold, fill=self.settings.fill)
        return FormulaChoice(
            chosen=tuple(chosen),
            n_enumerated=len(enumerated),
            n_predicted=len(predicted),
            offset_note=offset.note if offset is not None and model.method != hull.method else "",
        )

    def propose(self, compositions: Sequence[Composition], *, limit: int, seed: int) -> Iterator[Candidate]:
        """Yield at most `limit` random crystals of the compositions, formula by formula in the order given.

        The same compositions, limit and seed give the same candidates when the structures are reproducible.
        """
        self.failures = []
        seen: set[str] = set()
        for composition in compositions:
            if limit <= 0:
                return
            search = self.structures.search(composition, n=min(self.settings.n_structures, limit), seed=seed)
            self.failures += search.failures
            for structure in search.structures:
                if structure.crystal.id in seen:
                    continue
                seen.add(structure.crystal.id)
                limit -= 1
                parameters = {
                    "structures": self.structures.name,
                    "formula": reduced_formula(composition),
                    "index": structure.index,
                    "formula_units": structure.formula_units,
                    "space_group_number": structure.space_group_number,
                    "volume_factor": structure.volume_factor,
                }
                lineage = Lineage(generator=self.name, parent_id=None, parameters=parameters, seed=seed)
                yield Candidate(crystal=structure.crystal, lineage=lineage)
