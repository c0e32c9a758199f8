"""Whole runs: train the members of an ensemble, one after the other or one of them alone, and measure the result."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from gnome.models.checkpoint import Network
from gnome.models.compositional import CompositionalNetwork, CompositionalSettings
from gnome.models.formula_graph import FormulaGraphNetwork, FormulaGraphSettings
from gnome.models.structural import StructuralNetwork, StructuralSettings
from gnome.models.training import EpochRecord, Labelled, TrainSettings, fit
from gnome.seeds import derived_seed

NetworkSettings = StructuralSettings | CompositionalSettings | FormulaGraphSettings


FORMULA_NETWORK = CompositionalSettings(depth=5, width=192, activation="swiglu", hidden=384)
"""Shape of the formula networks that ship: ten in FP16 are 38 MB."""

FORMULA_TRAIN = TrainSettings(
    epochs=100, batch_size=1024, learning_rate=2e-3, weight_decay=1e-2, warm_up=0.05, ema_decay=0.999, fraction_jitter=0.02,
    eval_batch_size=8192,
)  # fmt: skip
"""How they are trained on some 2e5 labelled formulas."""


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings:
    """Shape of the members, how each is trained, and how many there are; each member's seed is derived from `train.seed`."""

    network: NetworkSettings
    train: TrainSettings = field(default_factory=TrainSettings)
    members: int = 5


def untrained(settings: NetworkSettings) -> Network:
    """Build the network that the settings are of."""
    if isinstance(settings, StructuralSettings):
        return StructuralNetwork(settings)
    if isinstance(settings, CompositionalSettings):
        return CompositionalNetwork(settings)
    return FormulaGraphNetwork(settings)


def train_member(
    index: int,
    settings: EnsembleSettings,
    train: Labelled,
    validation: Labelled,
    *,
    initial: Network | None = None,
    state_folder: Path | None = None,
    on_epoch: Callable[[int, EpochRecord], None] | None = None,
    compile_network: bool = False,
) -> Network:
    """Train one member on the device of its data, from `initial`'s weights when given (they are not changed)."""
    seed = derived_seed(settings.train.seed, index)
    torch.manual_seed(seed)
    network = untrained(settings.network)
    if initial is not None:
        network.load_state_dict(initial.state_dict())
    network.to(train.targets.device)
    fit(
        network,
        train,
        validation,
        replace(settings.train, seed=seed),
        state_path=None if state_folder is None else state_folder / f"member{index}.pt",
        on_epoch=None if on_epoch is None else lambda record: on_epoch(index, record),
        compile_network=compile_network,
    )
    return network
