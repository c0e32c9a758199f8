"""Potentials: what gives energies, forces and stresses to the relaxer.

A `Potential` is light and can be sent to a worker process; `calculator()` does the loading, in the process that will use it.
"""

from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import ClassVar, Final, Protocol

from ase.calculators.calculator import Calculator

from gnome.stability.method import Method

MPTRJ_ELEMENTS: Final = frozenset(range(1, 95)) - {84, 85, 86, 87, 88}
"""The 89 elements of the MPtrj data; CHGNet answers for Po, At, Rn, Fr and Ra as well, but with numbers that mean nothing."""

CHGNET_VERSION: Final = "0.3.0"
REFERENCES_VERSION: Final = 2
"""Of the shipped elemental references; part of the method, so that formation energies from other references never meet these."""

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


@dataclass(frozen=True)
class CHGNetPotential:
    """CHGNet 0.3.0 from the weights inside its own package (Deng et al., Nat. Mach. Intell. 5, 1031 (2023)).

    `device` is where it computes, as torch names it; another one changes the last digits of single precision alone, so it is no part of
    the method.

    Its labels are Materials Project energies (PBE and PBE+U) with the MP2020 corrections already in them, so nothing is to be added.
    """

    device: str = "cpu"

    name: ClassVar[str] = "chgnet"
    elements: ClassVar[frozenset[int]] = MPTRJ_ELEMENTS

    @cached_property
    def method(self) -> Method:
        """CHGNet by version and hash of its weights."""
        return Method(
            code="chgnet",
            functional=CHGNET_VERSION,
            settings={
                "weights_sha256": _CHGNET_SHA256,
                "labels": "MPtrj: PBE and PBE+U, MP2020 corrections included",
                "references": REFERENCES_VERSION,
            },
            versions={"chgnet": version("chgnet"), "ase": version("ase")},
        )

    def calculator(self) -> Calculator:
        """Load on the device, with one thread of the CPU, so that the same crystal gets the same answer in every process.

        Raises EvaluatorUnavailable when the device is not there, or the weights are missing or are not the known file: they are a pickle,
        so nothing else is opened.
        """
        from dft_stub.chgnet_calculator import load_calculator  # noqa: PLC0415  # loads torch, which only this potential needs

        return load_calculator(CHGNET_VERSION, _CHGNET_FILE, _CHGNET_SHA256, self.device)
