"""Potentials that misbehave, for worker processes to import."""

import ctypes
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT

from gnome.errors import EvaluatorUnavailable
from gnome.stability.method import Method
from gnome.stability.references import ElementalReferences


class Misbehaving(EMT):
    """EMT for copper; every other metal has a fault of its own."""

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = None) -> None:
        symbols = set(atoms.get_chemical_symbols())
        if "Ni" in symbols:
            time.sleep(3600)
        if "Pd" in symbols:
            hoard = [np.ones(2**24) for _ in range(10_000)]  # 128 MiB each
            del hoard
        if "Ag" in symbols:
            ctypes.string_at(0)
        if "Al" in symbols:
            raise RuntimeError("the wave function walked out\nand more")
        super().calculate(atoms, properties, system_changes)
        if "Pt" in symbols:
            self.results["forces"] = self.results["forces"] * np.nan


class Collapsing(Calculator):
    """Pulls every crystal together without end, and counts how often it was asked."""

    implemented_properties = ("energy", "forces", "stress")  # type: ignore[assignment]
    n_calls = 0

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = None) -> None:
        super().calculate(atoms, properties, system_changes)
        type(self).n_calls += 1
        self.results = {
            "energy": 0.01 * atoms.get_volume(),
            "forces": np.zeros((len(atoms), 3)),
            "stress": np.array([5.0, 5.0, 5.0, 0.0, 0.0, 0.0]),
        }


@dataclass(frozen=True)
class FakePotential:
    """Misbehaving EMT as a potential."""

    name: str = "fake"
    unusable: bool = False
    dies_at_start: bool = False

    @cached_property
    def method(self) -> Method:
        return Method(code="fake", functional="none")

    @property
    def elements(self) -> frozenset[int]:
        return frozenset({13, 28, 29, 46, 47, 78, 79})

    def calculator(self) -> Calculator:
        if self.unusable:
            raise EvaluatorUnavailable("weights are missing")
        if self.dies_at_start:
            raise SystemExit("no licence")
        return Misbehaving()


def fake_references(label: str) -> ElementalReferences:
    return ElementalReferences(method=label, energies=dict.fromkeys((13, 28, 29, 46, 47, 78, 79), 0.0))
