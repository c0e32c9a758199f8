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
    Quantity.P_STABLE,
    "hull",
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
    if phases is not None and (volumes == 1 or phases.offset is not None):
        _add_probabilities(known, energies, ensemble, phases)
    return rows


def _add_probabilities(
    known: Sequence[tuple[Row, Crystal]], energies: EnsembleEnergies, ensemble: StructuralEnsemble, phases: KnownPhases
) -> None:
    """Add the probability of lying on or below the hull, where the hull has all elements, and the label of its method."""
    judged = [i for i, (_, crystal) in enumerate(known) if set(crystal.composition) <= phases.hull.elements]
    found = probabilities_stable(
        ensemble, phases.hull, energies.of(judged), [known[i][1].composition for i in judged], phases.offset
    )
    for place, i in enumerate(judged):
        known[i][0]["hull"] = phases.hull.method
        if found is not None:
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
        close = getattr(runner, "close", None)
        if close is not None:
            close()
    return rows


def _write(out: Path, relaxed: Sequence[tuple[Row, Crystal]]) -> None:
    names = (Quantity.ENERGY_PER_ATOM, Quantity.E_FORM_PER_ATOM, Quantity.METHOD)
    items = (
        ReadCrystal(label=str(row["input"]), crystal=crystal, fields={str(name): row[name] for name in names})
        for row, crystal in relaxed
    )
    write_crystals(out, items, kind=None if out.suffix else "cif")
