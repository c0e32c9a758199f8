"""One plain training loop for every network here: seeded, resumable, FP32, BF16 or FP8.

Adam with decoupled weight decay, learning rate falling linearly to zero, gradients clipped; the mean absolute error is the loss, unless
a network has an `objective` of its own.  Every epoch's order is a function of (seed, epoch) alone, so a resumed run repeats the broken
one exactly.  The weights of the best validation epoch win.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gnome.atomic_write import atomic_write
from gnome.errors import InvalidCheckpoint, InvalidInput
from gnome.fp8 import AdamW, convert_to_fp8, restore_linear
from gnome.models.linear import Precision, autocast


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train one network.

    `warm_up`: part of the steps over which the learning rate rises from zero.  `ema_decay`: what validation sees, and what is kept, are
    the weights averaged with this decay a step; none when 0.
    `volume_jitter`: in training each structure's volume is multiplied by a factor drawn evenly from 1 - jitter to 1 + jitter.
    `fraction_jitter`: in training each amount of a formula is multiplied by exp(jitter times a normal number).
    `precision` "fp8": FP8 products, FP16 master weights, and gradients and moments in eight bits while training (docs/fp8.md); the
    trained network is FP32 again.  `eval_batch_size` affects speed only.
    """

    epochs: int = 60
    batch_size: int = 256
    learning_rate: float = 5.55e-4
    weight_decay: float = 1e-4
    gradient_clip: float = 1.0
    warm_up: float = 0.0
    ema_decay: float = 0.0
    volume_jitter: float = 0.0
    fraction_jitter: float = 0.0
    seed: int = 0
    precision: Precision = "fp32"
    eval_batch_size: int = 1024
    save_every: int = 5

    def __post_init__(self) -> None:
        if not (0 <= self.ema_decay < 1 and 0 <= self.warm_up < 1):
            raise InvalidInput(f"ema_decay {self.ema_decay} and warm_up {self.warm_up}: expected at least 0 and below 1")
        if self.ema_decay and self.precision == "fp8":
            raise InvalidInput("weights kept in FP8 training have scales that change; they are not averaged: set ema_decay to 0")


class Inputs(Protocol):
    """Packed inputs of a network: `PackedGraphs`, `PackedFormulas`."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batch(self, indices: Tensor) -> Any:
        """Select examples."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move to a device."""
        ...


@dataclass(frozen=True)
class Labelled:
    """Inputs with their targets (n,), or (n, targets) with NaN where one is not known, eV/atom, on one device."""

    inputs: Inputs
    targets: Tensor


@dataclass(frozen=True)
class EpochRecord:
    """What is logged after every epoch; errors in eV/atom."""

    epoch: int
    learning_rate: float
    train_mae: float
    validation_mae: float


def absolute_error(predicted: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the absolute error of each example (B,), which here are one."""
    error = (predicted - targets).abs()
    return error, error


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Yield index batches of one epoch's order, a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    yield from torch.randperm(n, generator=generator).split(batch_size)


@torch.no_grad()
def predict(network: nn.Module, inputs: Inputs, *, batch_size: int = 1024, precision: Precision = "fp32") -> Tensor:
    """Predict all examples in order: what the network answers, (n,) or (n, answers)."""
    network.eval()
    device = next(network.parameters()).device
    out = []
    for indices in torch.arange(len(inputs), device=device).split(batch_size):
        with autocast(precision, device):
            out.append(network(inputs.batch(indices)).float())
    return torch.cat(out) if out else torch.zeros(0, device=device)


def fit(
    network: nn.Module,
    train: Labelled,
    validation: Labelled,
    settings: TrainSettings,
    *,
    state_path: Path | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    compile_network: bool = False,
) -> list[EpochRecord]:
    """Train in place and leave the best validation epoch's weights in the network.

    With `state_path` the run is saved every few epochs and picked up from there when called again with the same settings, data and
    initial weights.
    """
    trainer = _Trainer(network, train, validation, settings, compile_network=compile_network)
    if state_path is not None and state_path.exists():
        trainer.load(state_path)
    while trainer.epoch < settings.epochs:
        record = trainer.run_epoch()
        if on_epoch is not None:
            on_epoch(record)
        last = trainer.epoch == settings.epochs
        if state_path is not None and (last or trainer.epoch % settings.save_every == 0):
            trainer.save(state_path)
    network.load_state_dict(trainer.best_weights)
    if settings.precision == "fp8":
        restore_linear(network)
    return trainer.history


class _Trainer:
    """The state of a run: everything that a resumed run must have back."""

    def __init__(
        self, network: nn.Module, train: Labelled, validation: Labelled, settings: TrainSettings, *, compile_network: bool
    ) -> None:
        self.network, self.train, self.validation, self.settings = network, train, validation, settings
        self.device = next(network.parameters()).device
        self.key = self._run_key()
        if settings.precision == "fp8":
            convert_to_fp8(network, weights="fp16")
        self.forward = torch.compile(network, dynamic=True) if compile_network else network
        decayed = [p for p in network.parameters() if p.ndim > 1]
        plain = [p for p in network.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer: torch.optim.Optimizer
        if settings.precision == "fp8":
            self.optimizer = AdamW(groups, lr=settings.learning_rate, gradient_clip=settings.gradient_clip, seed=settings.seed)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
        self.objective = getattr(network, "objective", absolute_error)
        self.average = (
            AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay)) if settings.ema_decay else None
        )
        self.steps_per_epoch = math.ceil(len(train.inputs) / settings.batch_size)
        self.epoch = 0
        self.history: list[EpochRecord] = []
        self.best_mae = float("inf")
        self.best_weights = self._copy_weights()

    def run_epoch(self) -> EpochRecord:
        """Train one epoch and validate."""
        settings = self.settings
        self.network.train()
        torch.manual_seed(
            settings.seed * 104_729 + self.epoch
        )  # of dropout, so that a resumed run draws what an unbroken one does
        jitter = torch.Generator().manual_seed(settings.seed * 7_919 + self.epoch)
        total_error = torch.zeros((), device=self.device, dtype=torch.float64)
        total_steps = self.steps_per_epoch * settings.epochs
        batches = epoch_batches(len(self.train.inputs), settings.batch_size, settings.seed, self.epoch)
        rate = settings.learning_rate
        for step, indices in enumerate(batches, start=self.epoch * self.steps_per_epoch):
            rate = settings.learning_rate * (1 - step / total_steps)
            if step < settings.warm_up * total_steps:
                rate *= (step + 1) / (settings.warm_up * total_steps + 1)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            total_error += self._step(indices, jitter)
        self.epoch += 1
        predicted = predict(
            self.judged, self.validation.inputs, batch_size=settings.eval_batch_size, precision=settings.precision
        )
        validation_mae = float(self.objective(predicted, self.validation.targets)[1].mean()) if len(predicted) else float("nan")
        record = EpochRecord(self.epoch, rate, float(total_error) / len(self.train.inputs), validation_mae)
        self.history.append(record)
        if validation_mae < self.best_mae or not len(predicted):
            self.best_mae, self.best_weights = validation_mae, self._copy_weights()
        return record

    def _step(self, indices: Tensor, jitter: torch.Generator) -> Tensor:
        """Take one optimizer step; returns the summed absolute error."""
        settings = self.settings
        factors = 1 + settings.volume_jitter * (2 * torch.rand(len(indices), generator=jitter) - 1)
        indices = indices.to(self.device)
        batch = self.train.inputs.batch(indices)
        if settings.volume_jitter:
            batch = batch.scaled(factors.to(self.device))
        if settings.fraction_jitter:
            noise = torch.randn(batch.fractions.shape, generator=jitter)
            batch = batch.jittered(settings.fraction_jitter * noise.to(self.device))
        with autocast(settings.precision, self.device):
            predicted = self.forward(batch)
        loss, error = self.objective(predicted, self.train.targets[indices])
        self.optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        if settings.precision != "fp8":  # there the optimizer clips, which has the gradients
            nn.utils.clip_grad_norm_(self.network.parameters(), settings.gradient_clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        return error.detach().sum()

    @property
    def judged(self) -> nn.Module:
        """The network whose weights validation sees and the run keeps."""
        return self.network if self.average is None else self.average.module

    def _copy_weights(self) -> dict[str, Tensor]:
        return _copy_of(self.judged)

    def _run_key(self) -> str:
        """Digest of all that decides the run: settings, initial weights, targets, and the first inputs."""
        own: dict[str, Any] = getattr(
            self.network, "config", dict
        )()  # what leaves no trace in the weights: dropout, scales, weights of losses
        digest = hashlib.sha256(json.dumps([asdict(self.settings), own], sort_keys=True).encode())
        tensors = [*self.network.state_dict().values(), self.train.targets, self.validation.targets]
        if len(self.train.inputs):
            first = self.train.inputs.batch(torch.arange(min(len(self.train.inputs), 256), device=self.device))
            tensors += [getattr(first, field.name) for field in fields(first)]
        for tensor in tensors:
            digest.update(tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the run's state; the file appears whole or not at all."""
        state = {
            "run": self.key,
            "weights": _copy_of(self.network),
            "average": None if self.average is None else self.average.state_dict(),
            "best_weights": self.best_weights,
            "best_mae": self.best_mae,
            "optimizer": self.optimizer.state_dict(),
            "history": [asdict(record) for record in self.history],
        }
        blob = io.BytesIO()  # a full disk must be an OSError, which torch's own writer does not raise
        torch.save(state, blob)
        with atomic_write(path) as temporary:
            temporary.write_bytes(blob.getbuffer())

    def load(self, path: Path) -> None:
        """Take up a saved run; raises InvalidCheckpoint when the file is damaged or was saved under other settings."""
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            if state["run"] != self.key:
                raise InvalidCheckpoint(f"{path} was saved by a run with other settings or data; delete it to start anew")
            self.network.load_state_dict(state["weights"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.best_weights, self.best_mae = state["best_weights"], state["best_mae"]
            self.history = [EpochRecord(**record) for record in state["history"]]
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, EOFError, UnpicklingError) as error:
            reason = str(error).split("\n", 1)[0][:200]
            raise InvalidCheckpoint(f"{path} cannot be resumed ({reason}); delete it to start anew") from error
        self.epoch = len(self.history)


def _copy_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
