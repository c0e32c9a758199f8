"""Files in, predictions or evaluations out, one row an input in its order; what is refused says why."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flows.device import device_of
from flows.evaluating import answers
from flows.known_phases import KnownPhases, known_phases
from flows.progress import Listener
from flows.settings import Settings
from flows.workspace import current_weights, evaluator_of
from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.formats import ReadCrystal, Refusal, read_crystals
from gnome.crystals.writers import check_target, write_crystals
from gnome.errors import InvalidInput
from gnome.models.ensemble import StructuralEnsemble
from gnome.quantities import Quantity
from pipelines.cascade import AS_GUESSED
from pipelines.screening import (
    EnsembleEnergies,
    ScreeningSettings,
    implausible,
    plausible_energies,
    predict_energies,
    probabilities_stable,
)

Row = dict[str, Any]

ANSWERED = (
    Quantity.ID,
    Quantity.REDUCED_FORMULA,
    Quantity.E_FORM_PER_ATOM,
    Quantity.SPREAD,
    Quantity.E_FORM_UNCERTAINTY,
    Quantity.DECOMPOSITION_ENERGY,
    Quantity.E_ABOVE_HULL,
    Quantity.P_STABLE,
    Quantity.NO_P_STABLE,
    Quantity.N_COMPETING,
    Quantity.SUPPORTED,
    "hull",
    Quantity.NOTE,
    Quantity.REFUSED,
)
"""What a predicted crystal's row has, None where it could not be answered."""


def read_rows(files: Sequence[Path]) -> tuple[list[Row], list[tuple[Row, Crystal]]]:
    """Read every input into a row; the second list pairs rows with the crystals that could be read."""
    rows: list[Row] = []
    usable: list[tuple[Row, Crystal]] = []
    for path in files:
        for item in read_crystals(path):
            row: Row = {"input": item.label}
            rows.append(row)
            if isinstance(item, Refusal):
                row[Quantity.REFUSED] = f"{item.reason}: {item.message}"
            else:
                row |= {
                    Quantity.ID: item.crystal.id,
                    Quantity.REDUCED_FORMULA: item.crystal.reduced_formula,
                    Quantity.REFUSED: None,
                }
                usable.append((row, item.crystal))
    return rows, usable


MOST_VOLUMES = 999
"""Volumes of a prediction; GNoME's are 20."""


def predict_files(
    settings: Settings, files: Sequence[Path], *, model: Path | None, volumes: int, hull: Path | None, listener: Listener
) -> list[Row]:
    """Predict every crystal of the files under the method of the model's labels, and whether it is stable against known phases.

    A crystal is judged where the hull has all of its elements: decomposition energy and distance above the hull, through an offset where
    the hull's method is another; how many compounds compete; and whether any does, or the elements alone, in which case the verdict is not
    supported.  For an element, which competes with its reference, that says nothing.

    What is known of the ensemble's errors holds for cells as they are: with several volumes, and no offset fitted at these, neither
    uncertainties nor probabilities are given.
    """
    if not 1 <= volumes <= MOST_VOLUMES or volumes % 2 == 0:
        raise InvalidInput(
            f"--volumes {volumes}: expected an odd number up to {MOST_VOLUMES}, so that the cell as it is is one of them"
        )
    ensemble = StructuralEnsemble.load(model or current_weights(settings, "structural"), device_of(settings))
    scales = AS_GUESSED if volumes == 1 else ScreeningSettings(n_scales=volumes)
    rows, usable = read_rows(files)
    phases = known_phases(settings, ensemble, hull, scales, listener)
    known = []
    for row, crystal in usable:
        if lacking := sorted(set(crystal.composition) - ensemble.elements):
            row[Quantity.REFUSED] = (
                f"unsupported_element: the ensemble was not trained on {', '.join(SYMBOLS[z] for z in lacking)}"
            )
        else:
            known.append((row, crystal))
    energies = predict_energies(ensemble, [crystal for _, crystal in known], scales)
    calibration = ensemble.calibration if volumes == 1 else None
    for row in rows:
        row.update({name: row.get(name) for name in ANSWERED})
    believed = plausible_energies(energies.e_form_per_atom, energies.spread)
    for i in np.flatnonzero(~believed).tolist():
        known[i][0][Quantity.REFUSED] = f"implausible_energy: {implausible(energies.e_form_per_atom[i], energies.spread[i])}"
    plausible = np.flatnonzero(believed).tolist()
    known, energies = [known[i] for i in plausible], energies.of(plausible)
    for i, (row, _) in enumerate(known):
        row[Quantity.E_FORM_PER_ATOM] = float(energies.e_form_per_atom[i])
        row[Quantity.SPREAD] = float(energies.spread[i])
        if calibration is not None:
            row[Quantity.E_FORM_UNCERTAINTY] = float(calibration.half_widths(energies.spread[i : i + 1])[0])
        row[Quantity.VOLUME_SCALE] = float(energies.volume_scale[i])
        row[Quantity.METHOD] = ensemble.method
        row["model"] = ensemble.model_id
    _add_notes(known, ensemble)
    if phases is not None:
        _judge(known, energies, phases)
        if volumes == 1 or phases.offset is not None:
            _add_probabilities(known, energies, ensemble, phases)
    for row, crystal in known:
        row[Quantity.NO_P_STABLE] = _why_no_probability(row, crystal, phases, volumes)
    return rows


def _add_notes(known: Sequence[tuple[Row, Crystal]], ensemble: StructuralEnsemble) -> None:
    """Say where the networks saw no neighbours, and that elements are measured against their own lowest form."""
    lonely = ensemble.lonely_atoms([crystal for _, crystal in known])
    for (row, crystal), n in zip(known, lonely.tolist(), strict=True):
        notes = []
        if n:
            which = "no atom has" if n == crystal.n_atoms else f"{n} of {crystal.n_atoms} atoms have no"
            rests = "the composition alone" if n == crystal.n_atoms else "the others' surroundings"
            seen = f"{which} a neighbour" if n == crystal.n_atoms else f"{which} neighbour"
            notes.append(f"{seen} within the network's {ensemble.cutoff:g} angstrom: the energy rests on {rests}")
        if len(crystal.composition) == 1:
            notes.append("element: its lowest form is the reference, 0 by convention")
        row[Quantity.NOTE] = "; ".join(notes) or None


def _judge(known: Sequence[tuple[Row, Crystal]], energies: EnsembleEnergies, phases: KnownPhases) -> None:
    """Add where crystals lie against a hull that has their elements, and what competes there."""
    judged = [i for i, (_, crystal) in enumerate(known) if set(crystal.composition) <= phases.hull.elements]
    compositions = [known[i][1].composition for i in judged]
    corrections = [phases.offset.correction(composition) if phases.offset else 0.0 for composition in compositions]
    e_forms = energies.e_form_per_atom[judged] + np.array(corrections)
    decomposition = phases.hull.decomposition_energies(compositions, e_forms)
    above = phases.hull.e_above_hulls(compositions, e_forms)
    for place, i in enumerate(judged):
        row, composition = known[i][0], compositions[place]
        row["hull"] = phases.hull.method
        row[Quantity.DECOMPOSITION_ENERGY] = float(decomposition[place])
        row[Quantity.E_ABOVE_HULL] = float(above[place])
        if len(composition) > 1:
            row[Quantity.N_COMPETING] = phases.hull.n_competing(composition)
            row[Quantity.SUPPORTED] = row[Quantity.N_COMPETING] > 0


def _why_no_probability(row: Row, crystal: Crystal, phases: KnownPhases | None, volumes: int) -> str | None:
    """Say why a predicted crystal has no probability; None where it has one."""
    if row[Quantity.P_STABLE] is not None:
        return None
    if phases is not None and phases.offset is not None and row["hull"] is not None:
        return f"too few evaluations under {row['hull']} to calibrate the errors: run more rounds"
    if volumes != 1:
        return "several volumes are tried, for which the ensemble's errors are not known"
    if phases is None:
        return "no known phases have the elements: run a round, import crystals, or give --hull"
    if row["hull"] is None:
        lacking = ", ".join(SYMBOLS[z] for z in sorted(set(crystal.composition) - phases.hull.elements))
        return f"no known phases have the elements: the hull of {phases.hull.method} lacks {lacking}; import crystals, or give --hull"
    return "the ensemble's errors were never measured: its card has no calibration"


def _add_probabilities(
    known: Sequence[tuple[Row, Crystal]], energies: EnsembleEnergies, ensemble: StructuralEnsemble, phases: KnownPhases
) -> None:
    """Add the probability of lying on or below the hull, where the hull has all elements."""
    judged = [i for i, (_, crystal) in enumerate(known) if set(crystal.composition) <= phases.hull.elements]
    found = probabilities_stable(
        ensemble, phases.hull, energies.of(judged), [known[i][1].composition for i in judged], phases.offset
    )
    for place, i in enumerate(judged if found is not None else ()):
        assert found is not None  # noqa: S101 - else there is no place
        known[i][0][Quantity.P_STABLE] = float(found[place])


def evaluate_files(
    settings: Settings, files: Sequence[Path], *, evaluator: str, out: Path | None, listener: Listener
) -> list[Row]:
    """Relax every crystal of the files; an interruption writes what was relaxed."""
    if out is not None:
        check_target(out)
    runner = evaluator_of(settings, evaluator)
    rows, usable = read_rows(files)
    waiting = {f"{i}": crystal for i, (_, crystal) in enumerate(usable)}
    relaxed: dict[int, Crystal] = {}
    try:
        with listener.stage("evaluating", len(waiting), "crystals") as count:
            for evaluation in answers(runner, waiting):
                count()
                row, _ = usable[int(evaluation.id)]
                row |= {
                    Quantity.METHOD: evaluation.method.label,
                    Quantity.ENERGY_PER_ATOM: evaluation.energy_per_atom,
                    Quantity.E_FORM_PER_ATOM: evaluation.e_form_per_atom,
                    "converged": evaluation.converged,
                    "n_steps": evaluation.n_steps,
                }
                if evaluation.crystal is not None and evaluation.converged:
                    relaxed[int(evaluation.id)] = evaluation.crystal
                    row["crystal"] = evaluation.crystal.to_dict()
                if evaluation.failure is not None:
                    row[Quantity.REFUSED] = f"{evaluation.failure}: {evaluation.message}"
    finally:  # an interruption keeps what was relaxed
        if out is not None and relaxed:
            _write(out, [(usable[i][0], relaxed[i]) for i in sorted(relaxed)])
        runner.close()
    return rows


def _write(out: Path, relaxed: Sequence[tuple[Row, Crystal]]) -> None:
    names = (Quantity.ENERGY_PER_ATOM, Quantity.E_FORM_PER_ATOM, Quantity.METHOD)
    items = (
        ReadCrystal(label=str(row["input"]), crystal=crystal, fields={str(name): row[name] for name in names})
        for row, crystal in relaxed
    )
    write_crystals(out, items, kind=None if out.suffix else "cif")
