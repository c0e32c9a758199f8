"""Networks that answer for formulas together, and what is known of their errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from gnome.errors import InvalidCheckpoint, InvalidInput
from gnome.models.calibration import ErrorCalibration, LogitCalibration
from gnome.models.compositional import ANSWERS, TARGETS, CompositionalNetwork
from gnome.models.ensemble import Ensemble, load_kind, median_and_spread
from gnome.models.formula_graph import FormulaGraphNetwork
from gnome.models.formulas import PackedFormulas
from gnome.models.linear import Precision, autocast
from gnome.quantities import Quantity

Array = NDArray[np.float64]
FormulaNetwork = CompositionalNetwork | FormulaGraphNetwork

MAX_FORMULAS_PER_BATCH = 1024
"""Formulas in one forward pass on a CPU, which keeps activations in its cache; a GPU takes 64 times as many, to be filled."""

STABLE = "stable"
"""Key of the calibration of stable-or-not in a card; the others are those of `TARGETS`."""


@dataclass(frozen=True)
class FormulaAnswers:
    """What an ensemble says of formulas under a method, arrays (n,), eV/atom; NaN where its networks did not learn it.

    Medians over the members; the inter-quartile ranges of e_form_per_atom (`spread`); half widths of the intervals around both medians
    that hold 68 % of the truths, from residuals on held-out formulas; and the probability of a decomposition energy of at most 0.
    """

    e_form_per_atom: Array
    spread: Array
    e_form_uncertainty: Array
    decomposition_energy: Array
    decomposition_uncertainty: Array
    p_stable: Array
    method: str


class CompositionalEnsemble(Ensemble[FormulaNetwork]):
    """Implements `FormulaModel` with networks of one kind and shape, under the first label scheme of its card."""

    kinds: ClassVar[tuple[str, ...]] = (CompositionalNetwork.kind, FormulaGraphNetwork.kind)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Self:
        """Load from disk; raises InvalidCheckpoint as `load_ensemble` does, and for weights of another kind."""
        members, card = load_kind(path, "compositional", cls.kinds, device)
        networks = [member for member in members if isinstance(member, FormulaNetwork)]
        schemes, known = card.get("schemes", []), networks[0].settings.n_schemes
        named = isinstance(schemes, list) and all(isinstance(x, dict) and _is_name(x.get("method")) for x in schemes)
        if schemes and not (named and len(schemes) == known):
            raise InvalidCheckpoint(f"{path.with_suffix('.json')}: schemes must name a method each, {known} in all")
        loaded = cls(networks, card)
        try:
            _ = loaded._calibrations
        except (AttributeError, TypeError, ValueError) as error:
            advice = "take the file anew, or train it with this version"
            raise InvalidCheckpoint(f"{path.with_suffix('.json')}: its calibration cannot be read ({error}); {advice}") from None
        return loaded

    @property
    def schemes(self) -> list[str]:
        """Methods of the label schemes that it learnt, in order; the first is its own."""
        return [str(scheme["method"]) for scheme in self.card.get("schemes", [])] or [self.method]

    @property
    def stability_scheme(self) -> int:
        """Number of the first scheme with decomposition energies, else 0."""
        known = self._knows(TARGETS[1])
        return known.index(True) if any(known) else 0

    def scheme_of(self, method: str) -> int:
        """Number of the scheme of a method; raises InvalidInput when the ensemble did not learn it."""
        if method not in self.schemes:
            raise InvalidInput(f"method {method!r}: the ensemble learnt {', '.join(self.schemes)}")
        return self.schemes.index(method)

    def _knows(self, target: Quantity) -> list[bool]:
        """Whether each scheme had labels of a target; formation energies unless its card denies it, the other only where it says so."""
        usual = target == TARGETS[0]
        return [bool(scheme.get(str(target), usual)) for scheme in self.card.get("schemes", [])] or [usual]

    @cached_property
    def _calibrations(self) -> list[dict[str, ErrorCalibration | LogitCalibration]]:
        kept = [scheme.get("calibration", {}) for scheme in self.card.get("schemes", [])] or [{}]
        return [
            {name: (LogitCalibration if name == STABLE else ErrorCalibration)(**numbers) for name, numbers in own.items()}
            for own in kept
        ]

    def member_energies(self, compositions: Sequence[Mapping[int, float]]) -> Array:
        """Predict eV/atom, shape (members, compositions); raises InvalidCheckpoint where it learnt no formation energies."""
        if not self._knows(TARGETS[0])[0]:
            raise InvalidCheckpoint(
                f"the ensemble {self.model_id} learnt decomposition energies alone; formation energies are needed"
            )
        return self.member_answers(PackedFormulas.from_compositions(compositions))[:, :, 0]

    def answers(self, compositions: Sequence[Mapping[int, float]], *, scheme: int | None = None) -> FormulaAnswers:
        """Answer all that the members have learnt under a scheme, that with decomposition energies unless named.

        Only proportions count.
        """
        scheme = self.stability_scheme if scheme is None else scheme
        found = self.member_answers(PackedFormulas.from_compositions(compositions, [scheme] * len(compositions)))
        e_form, spread = median_and_spread(found[:, :, 0])
        unknown = np.full(len(compositions), np.nan)
        decomposition, p_stable, uncertainties = unknown, unknown, [unknown, unknown]
        calibration = self._calibrations[scheme]
        knows = [self._knows(target)[scheme] for target in TARGETS[: found.shape[2]]]
        for column, (name, known) in enumerate(zip(TARGETS, knows, strict=False)):
            own = calibration.get(name)
            if known and isinstance(own, ErrorCalibration):
                uncertainties[column] = own.half_widths(error_widths(found, column))
        if not knows[0]:
            e_form, spread = unknown, unknown
        if knows[1:] == [True]:
            decomposition = np.median(found[:, :, 1], axis=0)
            stable = calibration.get(STABLE)
            line = stable if isinstance(stable, LogitCalibration) else LogitCalibration(slope=1.0, intercept=0.0)
            p_stable = line.probabilities(found[:, :, -1].mean(axis=0))
        return FormulaAnswers(e_form, spread, uncertainties[0], decomposition, uncertainties[1], p_stable, self.schemes[scheme])

    def probabilities_stable(self, compositions: Sequence[Mapping[int, float]]) -> Array:
        """Probabilities (n,) that the best crystal of each formula is stable; NaN where its networks did not learn it."""
        return self.answers(compositions).p_stable

    @torch.inference_mode()
    def member_answers(self, formulas: PackedFormulas, *, precision: Precision = "fp32") -> Array:
        """Return (members, formulas, answers of a network), each formula under the scheme that it names."""
        n_answers = ANSWERS if isinstance(self.members[0], CompositionalNetwork) else 1
        device = next(self.members[0].parameters()).device
        out = torch.empty(len(self.members), len(formulas), n_answers, device=device)
        most = MAX_FORMULAS_PER_BATCH * (1 if device.type == "cpu" else 64)
        for rows, batch in formulas.to(device).by_size(most):
            for m, member in enumerate(self.members):
                with autocast(precision, device):
                    out[m, rows] = member(batch).float().reshape(len(rows), n_answers)
        return np.asarray(out.cpu().double().numpy())


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def error_widths(answers: Array, column: int) -> Array:
    """How much the members (members, n, answers) doubt an energy, eV/atom: by what they say of its error, and how far they differ.

    The standard deviation of the mixture of their distributions (Lakshminarayanan et al., arXiv 1612.01474, section 2.4), which for
    networks that give an energy alone is that of the energies.
    """
    variances = answers[:, :, column].var(axis=0)
    if answers.shape[2] > 1:
        variances = variances + np.exp(2 * answers[:, :, len(TARGETS) + column]).mean(axis=0)
    return np.asarray(np.sqrt(variances))


def calibrate_formulas(answers: Array, targets: Array) -> dict[str, dict[str, float]]:
    """Learn from an ensemble's answers (members, n, answers) for held-out formulas, and their labels (n, targets), how far it is off.

    Returns what a label scheme of a card keeps as `calibration`; what there are too few labels for is left out.
    """
    medians = np.median(answers, axis=0)
    found: dict[str, dict[str, float]] = {}
    for column, name in enumerate(TARGETS[: min(answers.shape[2], len(TARGETS))]):
        known = np.isfinite(targets[:, column])
        errors = targets[known, column] - medians[known, column]
        made = ErrorCalibration.fit(errors, error_widths(answers, column)[known])
        if made is not None:
            found[str(name)] = dict(vars(made))
    if answers.shape[2] > 1:
        known = np.isfinite(targets[:, 1])
        line = LogitCalibration.fit(answers[:, known, -1].mean(axis=0), targets[known, 1] <= 0)
        if line is not None:
            found[STABLE] = dict(vars(line))
    return found
