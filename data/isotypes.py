"""Starting structures of known compounds whose own structure is not at hand: those of other compounds of the same kind of formula.

Elements take the places of a template by amount and, where amounts are equal, by electronegativity; the cell is scaled by additive atomic
volumes.  Of all that comes out, the structural ensemble names the few that are worth a relaxation; the lowest after relaxation stands for
the compound, so its energy is an upper bound of the true one.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import gcd

import numpy as np
from pymatgen.core import Element

from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.formula import parse_formula
from gnome.crystals.identity import prototype_label
from gnome.crystals.validity import is_valid
from gnome.models.energy_model import EnergyModel
from pipelines.cascade import AS_GUESSED
from pipelines.screening import predict_energies
from pipelines.volumes import estimated_volume, fit_atomic_volumes

TEMPLATES_OF_PROTOTYPE = 3

Template = tuple[Crystal, str]
"""A crystal, and where it comes from."""


def isotypes(
    formulas: Sequence[str], templates: Iterable[Template], model: EnergyModel, *, most: int
) -> dict[str, list[tuple[Crystal, str]]]:
    """Find starting structures for each formula, the most hopeful of at most `most` prototypes, with the label of its template."""
    by_amounts: dict[tuple[int, ...], dict[str, list[Template]]] = defaultdict(lambda: defaultdict(list))
    kept = [(crystal, label) for crystal, label in templates if is_valid(crystal)]
    for crystal, label in kept:
        by_amounts[_amounts(crystal.composition)][_prototype(crystal) or label].append((crystal, label))
    volumes = fit_atomic_volumes([crystal for crystal, _ in kept])
    found: dict[str, list[tuple[Crystal, str]]] = {}
    for formula in formulas:
        composition = parse_formula(formula)
        made = [
            (child, label)
            for of_prototype in by_amounts[_amounts(composition)].values()
            for crystal, label in _most_alike(of_prototype, composition, volumes)
            if is_valid(child := _decorated(crystal, composition, volumes))
        ]
        found[formula] = _best(made, model, most) if set(composition) <= model.elements else []
    return found


def _amounts(composition: dict[int, int]) -> tuple[int, ...]:
    divisor = gcd(*composition.values())
    return tuple(sorted(amount // divisor for amount in composition.values()))


def _roles(composition: dict[int, int]) -> list[int]:
    """Elements by amount, those of equal amounts by electronegativity."""
    return sorted(composition, key=lambda z: (composition[z], np.nan_to_num(Element(SYMBOLS[z]).X, nan=5.0), z))


def _prototype(crystal: Crystal) -> str:
    return prototype_label(crystal).split(":", 1)[0]


def _most_alike(templates: Sequence[Template], composition: dict[int, int], volumes: np.ndarray) -> list[Template]:
    """The templates of one prototype whose atoms have sizes in ratios like those of the compound's."""
    wanted = np.log(volumes[_roles(composition)])

    def unlikeness(template: Template) -> float:
        sizes = np.log(volumes[_roles(template[0].composition)]) - wanted
        return float(np.ptp(sizes))

    return sorted(templates, key=unlikeness)[:TEMPLATES_OF_PROTOTYPE]


def _decorated(template: Crystal, composition: dict[int, int], volumes: np.ndarray) -> Crystal:
    places = dict(zip(_roles(template.composition), _roles(composition), strict=True))
    child = template.with_atomic_numbers(np.array([places[int(z)] for z in template.atomic_numbers]))
    before, after = estimated_volume(template.composition, volumes), estimated_volume(child.composition, volumes)
    return child.scaled(after / before)


def _best(made: list[tuple[Crystal, str]], model: EnergyModel, most: int) -> list[tuple[Crystal, str]]:
    """The lowest by the ensemble, one a prototype."""
    if not made:
        return []
    energies = predict_energies(model, [crystal for crystal, _ in made], AS_GUESSED).e_form_per_atom
    chosen: dict[str, tuple[Crystal, str]] = {}
    for i in np.argsort(energies, kind="stable").tolist():
        label = _prototype(made[i][0]) or made[i][1]
        chosen.setdefault(label, made[i])
        if len(chosen) == most:
            break
    return list(chosen.values())
