"""Small labelled data and small networks."""

import numpy as np
import pytest
import torch
from small_networks import SMALL

from gnome.crystals.crystal import Crystal
from gnome.graphs.crystal_graph import PackedGraphs
from gnome.models.training import Labelled


@pytest.fixture(scope="session")
def crystals() -> list[Crystal]:
    rng = np.random.default_rng(0)
    return [
        Crystal(
            np.diag(rng.uniform(3.0, 5.0, 3)), rng.integers(3, 30, 3), np.array([[0, 0, 0], [0.5, 0.5, 0.1], [0.2, 0.5, 0.6]])
        )
        for _ in range(48)
    ]


@pytest.fixture(scope="session")
def labelled(crystals: list[Crystal]) -> Labelled:
    """Energies that depend on elements and volume, so that there is something to learn."""
    energies = [-0.05 * crystal.atomic_numbers.mean() - 0.02 * (crystal.volume_per_atom - 20) for crystal in crystals]
    return Labelled(PackedGraphs.from_crystals(crystals, SMALL.cutoff), torch.tensor(energies, dtype=torch.float32))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors on many threads spend their time waiting for each other."""
    torch.set_num_threads(1)
