"""Do ensembles of formulas say truly how far they are off?  What their cards keep of it, on formulas that nothing was learnt from."""

import numpy as np

from gnome.models.calibration import (
    ErrorCalibration,
    LogitCalibration,
    coverage,
    coverage_by_width,
    expected_calibration_error,
)
from gnome.models.compositional import TARGETS
from gnome.models.formula_ensemble import STABLE, error_widths
from gnome.models.metrics import auc, best_threshold, f1


def check_errors(calibration: dict, answers: np.ndarray, targets: np.ndarray) -> dict:
    """Part of the truths within the intervals that should hold so many; the 68 % ones also from narrow to wide, a fifth each."""
    medians = np.median(answers, axis=0)
    found: dict = {}
    for column, name in enumerate(name for name in TARGETS if name in calibration):
        errors, widths = targets[:, column] - medians[:, column], error_widths(answers, column)
        own = ErrorCalibration(**calibration[name])
        found[name] = {f"within {level}": coverage(errors, own.half_widths(widths, level)) for level in (0.5, 0.68, 0.9, 0.95)}
        found[name]["within 0.68, by width"] = coverage_by_width(errors, own.half_widths(widths))
    return found


def check_stable(calibration: dict, chosen_by: tuple, reported: tuple) -> dict:
    """How well stable formulas are told from others, and how reliable the probabilities are; the threshold is chosen on held-out ones."""
    line = LogitCalibration(**calibration[STABLE])
    plain = LogitCalibration(slope=1.0, intercept=0.0)
    (held, held_true), (logits, true) = (
        (answers[:, :, -1].mean(0), targets[:, 1] <= 0) for answers, targets in (chosen_by, reported)
    )
    threshold = best_threshold(line.probabilities(held), held_true)
    return {
        "auc": auc(logits, true),
        "threshold": threshold,
        "f1": f1(line.probabilities(logits) > threshold, true),
        "expected calibration error": expected_calibration_error(line.probabilities(logits), true),
        "expected calibration error before": expected_calibration_error(plain.probabilities(logits), true),
    }
