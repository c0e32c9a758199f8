"""Evaluators by name, as the command line gives them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from dft_stub.evaluator import Evaluator
from gnome.errors import EvaluatorUnavailable, InvalidInput

EVALUATORS: Final = {
    "chgnet": "CHGNet 0.3.0, a machine-learned potential; works offline",
    "recorded:PATH": "answers from a file of evaluations",
    "emt": "ASE's effective-medium potential for seven metals; for trying things out",
    "gpaw": "DFT with GPAW, which has to be installed",
    "PACKAGE.MODULE.CLASS": "any calculator class with ASE's interface",
}
"""Names and what they are, for help texts."""

_GPAW_KEYWORDS: Final = {"mode": {"name": "pw", "ecut": 400}, "xc": "PBE", "kpts": {"density": 3.0, "gamma": True}}


def make_evaluator(name: str, **options: Any) -> Evaluator:
    """Make the evaluator of that name.

    Options: `workers` for all; `device` (as torch names it) for potentials that are networks; `settings` (RelaxSettings) and `limits`
    (WorkerLimits) for all that relax; `keywords`, `silent_keywords`, `references_path`, `ground_states` for ASE calculators; `wait` for
    recorded answers.
    Raises InvalidInput for a name or option that does not exist, EvaluatorUnavailable when what it needs is not there.
    """
    try:
        return _maker(name)(**options)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise InvalidInput(f"evaluator {name!r}: {error}") from None


def _maker(name: str) -> Callable[..., Evaluator]:
    if name == "chgnet":
        from dft_stub.chgnet import CHGNetEvaluator  # noqa: PLC0415  # loads torch

        return CHGNetEvaluator
    if name.startswith("recorded:"):
        return lambda **options: _recorded(name.removeprefix("recorded:"), **options)
    if name in {"emt", "gpaw"} or "." in name:
        return lambda **options: _ase(name, **options)
    known = ", ".join(EVALUATORS)
    raise InvalidInput(f"no evaluator is called {name!r}; there are {known}")


def _recorded(path: str, *, wait: bool = False, workers: int | None = None) -> Evaluator:  # noqa: ARG001  # looking up needs none
    from dft_stub.recorded import RecordedEvaluator  # noqa: PLC0415

    if not path:
        raise InvalidInput("recorded: needs the path of its file, as in recorded:answers.jsonl")
    return RecordedEvaluator(Path(path), wait=wait)


def _ase(
    name: str, *, references_path: Path | None = None, ground_states: Any = None, keywords: Any = None, silent_keywords: Any = None,
    **options: Any,
) -> Evaluator:  # fmt: skip
    from dft_stub.ase_codes import ASEEvaluator, ASEPotential  # noqa: PLC0415  # loads torch, by way of the relaxer
    from dft_stub.references import shipped_ground_states  # noqa: PLC0415

    if references_path is None:
        raise InvalidInput(f"evaluator {name!r} needs references_path, a JSON file to keep its elemental references in")
    if name == "gpaw":
        keywords = _GPAW_KEYWORDS | dict(keywords or {})
        silent_keywords = {"txt": "gpaw.txt"} | dict(silent_keywords or {})
    try:
        potential = ASEPotential(calculator_name=name, keywords=keywords or {}, silent_keywords=silent_keywords or {})
        forms = shipped_ground_states() if ground_states is None else ground_states
        return ASEEvaluator(potential, references_path=Path(references_path), ground_states=forms, **options)
    except OSError as error:
        raise EvaluatorUnavailable(f"evaluator {name!r}: {error}") from None
