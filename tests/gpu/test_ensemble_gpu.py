"""Ensembles on a GPU answer as on a CPU."""

import numpy as np
import pytest
import torch

from gnome.crystals.crystal import Crystal
from gnome.models.angular_network import AngularNetwork, AngularSettings
from gnome.models.energy_model import validate_energy_model
from gnome.models.ensemble import CrystalNetwork, StructuralEnsemble
from gnome.models.structural import StructuralNetwork, StructuralSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CARD = {"sha256": "0" * 64, "method": "test", "elements": list(range(1, 90))}


def ensemble(kind: str, device: str) -> StructuralEnsemble:
    torch.manual_seed(0)
    members: list[CrystalNetwork] = [
        AngularNetwork(AngularSettings(width=64, steps=2, cutoff=4.0, channels=4))
        if kind == "angular"
        else StructuralNetwork(StructuralSettings(width=64, cutoff=4.0))
        for _ in range(3)
    ]
    return StructuralEnsemble([member.to(device).eval() for member in members], CARD)


@pytest.mark.parametrize("kind", ["gnome", "angular"])
def test_a_gpu_answers_as_a_cpu_and_keeps_the_contract(kind: str) -> None:
    rng = np.random.default_rng(0)
    crystals = [
        Crystal(np.eye(3) * rng.uniform(3.5, 4.5), rng.integers(1, 80, n), rng.uniform(0, 1, (n, 3)))
        for n in rng.integers(1, 6, 20)
    ]
    there = ensemble(kind, "cuda")
    found = there.member_energies(crystals, (0.9, 1.0, 1.1))
    np.testing.assert_allclose(found, ensemble(kind, "cpu").member_energies(crystals, (0.9, 1.0, 1.1)), rtol=0, atol=1e-4)
    validate_energy_model(there, crystals[:4])
