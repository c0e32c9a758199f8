"""Potentials: what gives energies, forces and stresses to the relaxer.

A `Potential` is light and can be sent to a worker process; `calculator()` does the loading, in the process that will use it.
"""

import contextlib
import hashlib
import io
import warnings
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Protocol

import chgnet
import torch
from ase.calculators.calculator import Calculator
from chgnet.model.dynamics import CHGNetCalculator
from chgnet.model.model import CHGNet

from gnome.errors import EvaluatorUnavailable
from gnome.stability.method import Method

MPTRJ_ELEMENTS: Final = frozenset(range(1, 95)) - {84, 85, 86, 87, 88}
"""The 89 elements of the MPtrj data; CHGNet answers for Po, At, Rn, Fr and Ra as well, but with numbers that mean nothing."""

CHGNET_VERSION: Final = "0.3.0"
_CHGNET_FILE: Final = "chgnet_0.3.0_e29f68s314m37.pth.tar"
_CHGNET_SHA256: Final = "d14ab7c0f093efe64b60a7bcd540bca10e74fb7f46c86108a079af60524659d1"


class Potential(Protocol):
    """Energies, forces and stresses of crystals, through ASE's calculator interface."""

    @property
    def name(self) -> str:
        """Short name."""
        ...

    @property
    def method(self) -> Method:
        """What labels its energies, without the relaxation's settings."""
        ...

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers it was made for."""
        ...

    def calculator(self) -> Calculator:
        """Load it in this process; energies in eV, forces in eV/angstrom, stress in eV/angstrom^3."""
        ...


class _QuietCalculator(CHGNetCalculator):
    """CHGNet's calculator without torch's remark on how CHGNet 0.4.2 takes the volumes."""

    def calculate(self, *args: Any, **kwargs: Any) -> None:
        """Calculate as CHGNet does."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad", UserWarning)
            super().calculate(*args, **kwargs)


class CHGNetPotential:
    """CHGNet 0.3.0 from the weights inside its own package (Deng et al., Nat. Mach. Intell. 5, 1031 (2023)).

    Its labels are Materials Project energies (PBE and PBE+U) with the MP2020 corrections already in them, so nothing is to be added.
    """

    name = "chgnet"
    elements = MPTRJ_ELEMENTS

    @cached_property
    def method(self) -> Method:
        """CHGNet by version and hash of its weights."""
        return Method(
            code="chgnet",
            functional=CHGNET_VERSION,
            settings={"weights_sha256": _CHGNET_SHA256, "labels": "MPtrj: PBE and PBE+U, MP2020 corrections included"},
            versions={"chgnet": version("chgnet"), "ase": version("ase")},
        )

    def calculator(self) -> Calculator:
        """Load on the CPU with one thread, so that the same crystal gets the same answer in every process.

        Raises EvaluatorUnavailable when the weights are missing or are not the known file: they are a pickle, so nothing else is opened.
        """
        check_sha256(Path(chgnet.__file__).parent / "pretrained" / CHGNET_VERSION / _CHGNET_FILE, _CHGNET_SHA256)
        torch.set_num_threads(1)
        with contextlib.redirect_stdout(io.StringIO()):  # both print a line about the device
            model = CHGNet.load(model_name=CHGNET_VERSION, use_device="cpu", verbose=False)
            return _QuietCalculator(model=model, use_device="cpu", on_isolated_atoms="error")


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a weights file that is missing or altered."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise EvaluatorUnavailable(f"weights {path} cannot be read ({error}); reinstall chgnet") from None
    if digest != expected:
        raise EvaluatorUnavailable(
            f"weights {path} have sha256 {digest[:12]}..., expected {expected[:12]}...; not loaded, reinstall chgnet 0.4.2"
        )
