"""Whole runs: the networks that ship, how they are trained, and the training of an ensemble's members."""

from ast import literal_eval
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from gnome.errors import InvalidInput
from gnome.models.angular_network import AngularNetwork, AngularSettings
from gnome.models.checkpoint import Network
from gnome.models.compositional import CompositionalNetwork, CompositionalSettings
from gnome.models.formula_graph import FormulaGraphNetwork, FormulaGraphSettings
from gnome.models.structural import StructuralNetwork, StructuralSettings
from gnome.models.training import EpochRecord, Labelled, Run, TrainSettings, fit_together
from gnome.seeds import derived_seed

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

NetworkSettings = StructuralSettings | AngularSettings | CompositionalSettings | FormulaGraphSettings


FORMULA_NETWORK = CompositionalSettings(
    depth=5, width=192, activation="swiglu", hidden=384, target_weights=(8.0, 1.0), stable_weight=1.0
)
"""Shape of the formula networks that ship: ten in FP16 are 38 MB."""

FORMULA_TRAIN = TrainSettings(
    epochs=50, batch_size=1024, learning_rate=4e-3, weight_decay=0.3, warm_up=0.05, ema_decay=0.999, fraction_jitter=0.02,
    eval_batch_size=8192,
)  # fmt: skip
"""How they are trained on some 2e5 labelled formulas."""


STRUCTURE_NETWORK = AngularSettings(width=256, hidden=256, steps=5, cutoff=3.5, denoises=True)
"""Shape of structure networks: ten in FP16 are 59 MB."""

STRUCTURE_TRAIN = TrainSettings(
    epochs=130, batch_size=512, learning_rate=2e-3, weight_decay=0.3, warm_up=0.05, ema_decay=0.999, volume_jitter=0.1,
    position_jitter=0.1, denoising=0.05,
)  # fmt: skip
"""How they are trained on some 2e5 labelled crystals."""

PLAIN_TRAIN = replace(STRUCTURE_TRAIN, learning_rate=1e-3, weight_decay=0.01, position_jitter=0.0, denoising=0.0)
"""How networks are that tell no moves of atoms."""

STRUCTURE_RECIPES: dict[str, tuple[StructuralSettings | AngularSettings, TrainSettings]] = {
    "angular": (STRUCTURE_NETWORK, STRUCTURE_TRAIN),
    "gnome": (StructuralSettings(), PLAIN_TRAIN),
}
"""Structure networks by name, and how each is trained."""


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings:
    """Shape of the members, how each is trained, and how many there are; each member's seed is derived from `train.seed`."""

    network: NetworkSettings
    train: TrainSettings = field(default_factory=TrainSettings)
    members: int = 5


_Shape = TypeVar("_Shape", bound="DataclassInstance")


def varied(network: _Shape, train: TrainSettings, words: Sequence[str]) -> tuple[_Shape, TrainSettings]:
    """Change settings by words such as `width=128`, of the training where it has such a setting, else of the network.

    Raises InvalidInput naming a word that is none or names no setting.
    """
    of_training, of_network = ({field.name for field in fields(one)} for one in (train, network))
    changes: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in of_training | of_network:
            raise InvalidInput(f"{word!r} changes no setting of {type(network).__name__} or of training")
        try:
            changes[name not in of_training][name] = literal_eval(value)
        except (ValueError, SyntaxError):
            raise InvalidInput(f"{word!r}: {value!r} is no number, truth or quoted word") from None
    return replace(network, **changes[1]), replace(train, **changes[0])


def untrained(settings: NetworkSettings) -> Network:
    """Build the network that the settings are of."""
    if isinstance(settings, StructuralSettings):
        return StructuralNetwork(settings)
    if isinstance(settings, AngularSettings):
        return AngularNetwork(settings)
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
    given = None if initial is None else [initial]
    return train_members(
        [index], settings, train, validation,
        initial=given, state_folder=state_folder, on_epoch=on_epoch, compile_network=compile_network,
    )[0]  # fmt: skip


def train_members(
    indices: Sequence[int],
    settings: EnsembleSettings,
    train: Labelled,
    validation: Labelled,
    *,
    initial: Sequence[Network] | None = None,
    state_folder: Path | None = None,
    on_epoch: Callable[[int, EpochRecord], None] | None = None,
    compile_network: bool = False,
) -> list[Network]:
    """Train some members together, as `train_member` would train each alone; on a GPU small ones fill it so."""
    networks, runs = [], []
    for place, index in enumerate(indices):
        seed = derived_seed(settings.train.seed, index)
        torch.manual_seed(seed)
        network = untrained(settings.network)
        if initial is not None:
            network.load_state_dict(initial[place].state_dict())
        networks.append(network.to(train.targets.device))
        path = None if state_folder is None else state_folder / f"member{index}.pt"
        own = replace(settings.train, seed=seed)
        runs.append(Run(network=network, train=train, validation=validation, settings=own, state_path=path))
    say = None if on_epoch is None else lambda place, record: on_epoch(indices[place], record)
    fit_together(runs, on_epoch=say, compile_network=compile_network)
    return networks
