"""One plain training loop for every network here: seeded, resumable, FP32, BF16 or FP8.

Adam with decoupled weight decay, learning rate falling linearly to zero, gradients clipped; the mean absolute error is the loss, unless
a network has an `objective` of its own.  Every epoch's order is a function of (seed, epoch) alone, so a resumed run repeats the broken
one exactly.  The weights of the best validation epoch win.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from gnome.errors import InvalidInput, TrainingDiverged
from gnome.fp8 import AdamW, convert_to_fp8, restore_linear
from gnome.fp8.edge_block import set_edge_precision
from gnome.models.captured_step import CapturedStep
from gnome.models.deformation import deformed, denoising_error
from gnome.models.linear import Precision, autocast
from gnome.models.training_state import add_examples, digest_of_settings, read_state, write_state


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train one network.

    `warm_up`: part of the steps over which the learning rate rises from zero.  `ema_decay`: what validation sees, and what is kept, are
    the weights averaged with this decay a step, (1 + steps) / (10 + steps) while that is less; none when 0.
    `volume_jitter`: in training each structure's volume is multiplied by a factor drawn evenly from 1 - jitter to 1 + jitter.
    `position_jitter`: in training atoms are moved by normal numbers of that deviation, angstrom, in each direction.
    `strain_jitter`: in training each cell is deformed by the symmetric part of a strain of normal numbers of that deviation.
    `denoising`: weight, beside the energy's loss, of the relative error in the moves of atoms, for networks that answer these too.
    `fraction_jitter`: in training each amount of a formula is multiplied by exp(jitter times a normal number).
    `precision` "fp8": gradients and moments in eight bits while training, edge blocks in FP8, and linear layers of at least
    `fp8_min_features` too, over FP16 master weights; narrower ones are faster in BF16 (docs/fp8.md).  The trained network is FP32 again.
    `eval_batch_size` affects speed only.
    """

    epochs: int = 60
    batch_size: int = 256
    learning_rate: float = 5.55e-4
    weight_decay: float = 1e-4
    gradient_clip: float = 1.0
    warm_up: float = 0.0
    ema_decay: float = 0.0
    volume_jitter: float = 0.0
    position_jitter: float = 0.0
    strain_jitter: float = 0.0
    denoising: float = 0.0
    fraction_jitter: float = 0.0
    seed: int = 0
    precision: Precision = "fp32"
    fp8_min_features: int = 1024
    eval_batch_size: int = 1024
    save_every: int = 5

    def __post_init__(self) -> None:
        below_one = {name: getattr(self, name) for name in ("ema_decay", "warm_up", "volume_jitter")}
        if not all(0 <= value < 1 for value in below_one.values()):
            raise InvalidInput(f"{_listed(below_one)}: expected at least 0 and below 1")
        whole = {name: getattr(self, name) for name in ("epochs", "batch_size", "eval_batch_size", "save_every")}
        if not all(value >= 1 for value in whole.values()):
            raise InvalidInput(f"{_listed(whole)}: expected 1 or more of each")
        rest = ("weight_decay", "position_jitter", "strain_jitter", "denoising", "fraction_jitter")
        others = {name: getattr(self, name) for name in rest}
        if not all(value >= 0 for value in others.values()):
            raise InvalidInput(f"{_listed(others)}: expected at least 0")
        if not (self.learning_rate > 0 and self.gradient_clip > 0):
            raise InvalidInput(f"learning_rate {self.learning_rate}, gradient_clip {self.gradient_clip}: expected more than 0")


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


class Inputs(Protocol):
    """Packed inputs of a network: `PackedGraphs`, `PackedFormulas`."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batch(self, indices: Tensor) -> Any:
        """Select examples."""
        ...

    def fixed(self, batch_size: int, rows: Tensor | None = None) -> "FixedInputs":
        """Return the same examples in batches of one shape, chosen for `rows` of them where only those will be asked for."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move to a device."""
        ...


class FixedInputs(Protocol):
    """Inputs whose batches of one size have the same shapes, whichever examples they hold."""

    def batch(self, indices: Tensor) -> Any:
        """Select examples; the batch may hold more than those, behind them."""
        ...

    def fits(self, order: Tensor) -> list[bool]:
        """For each batch of an order of the examples, whether it can be had in that shape."""
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
    set_edge_precision(network, precision)
    device = next(network.parameters()).device
    out = []
    for indices in torch.arange(len(inputs), device=device).split(batch_size):
        with autocast(precision, device):
            out.append(network(inputs.batch(indices)).float())
    return torch.cat(out) if out else torch.zeros(0, device=device)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A network, what it is trained and validated on, all on one device, and how; `state_path` as of `fit`."""

    network: nn.Module
    train: Labelled
    validation: Labelled
    settings: TrainSettings
    state_path: Path | None = None


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
    run = Run(network=network, train=train, validation=validation, settings=settings, state_path=state_path)
    each = None if on_epoch is None else lambda _, record: on_epoch(record)
    return fit_together([run], on_epoch=each, compile_network=compile_network)[0]


def fit_together(
    runs: Sequence[Run], *, on_epoch: Callable[[int, EpochRecord], None] | None = None, compile_network: bool = False
) -> list[list[EpochRecord]]:
    """Train several networks as `fit` would train each alone, a step of each in turn.

    On a GPU each has a stream of its own, so that networks too small to fill it fill it together.  Before torch 2.13 captured steps share
    the place of their seeds, so that what is drawn within a step (dropout, jitter of positions and strains) of networks trained together
    depends there on how their steps interleave.
    """
    trainers = [_Trainer(run, compile_network=compile_network) for run in runs]
    going: dict[int, Iterator[None]] = {}
    for index, trainer in enumerate(trainers):
        say = None if on_epoch is None else partial(on_epoch, index)
        going[index] = trainer.run_all(say)
    while going:
        for index in list(going):
            with trainers[index].on_own_stream():
                if next(going[index], going) is going:
                    del going[index]
    for trainer in trainers:
        trainer.finish()
    return [trainer.history for trainer in trainers]


class _Trainer:
    """The state of a run: everything that a resumed run must have back."""

    def __init__(self, run: Run, *, compile_network: bool) -> None:
        self.network, self.settings, self.run = run.network, run.settings, run
        self.device = next(self.network.parameters()).device
        self.key = "" if run.state_path is None else self._run_key()
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        fixed_shapes = getattr(self.network, "fixed_shapes", False) and self.stream is not None
        self.fixed = run.train.inputs.fixed(self.settings.batch_size) if fixed_shapes else None
        captured = True
        set_edge_precision(self.network, self.settings.precision)
        if self.settings.precision == "fp8":
            report = convert_to_fp8(self.network, weights="fp16", min_features=self.settings.fp8_min_features)
            if report.converted and self.settings.ema_decay:
                raise InvalidInput("weights of FP8 layers have scales that change; they are not averaged: set ema_decay to 0")
            captured = not report.converted
        self.as_it_is: Callable[[Any], Any] = self._learning_network()
        self.forward = torch.compile(self.as_it_is, dynamic=self.fixed is None) if compile_network else self.as_it_is
        self.optimizer = self._make_optimizer()
        self.objective = getattr(self.network, "objective", absolute_error)
        self.average = deepcopy(self.network).requires_grad_(False) if self.settings.ema_decay else None
        self.ema_rate = torch.zeros((), device=self.device)
        self.fixed_step: Callable[..., Tensor] = partial(self._step, fixed=True)
        if captured:
            self.fixed_step = CapturedStep(self.fixed_step)
        self.steps_per_epoch = math.ceil(len(run.train.inputs) / self.settings.batch_size)
        self.history: list[EpochRecord] = []
        self.best_mae = float("inf")
        self.best_weights = _copy_of(self.judged)
        if run.state_path is not None and run.state_path.exists():
            self.load(run.state_path)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def _learning_network(self) -> Callable[[Any], Any]:
        """Return what is called in a step: the network, or what gives the atoms' moves besides."""
        if not self.settings.denoising:
            return self.network
        denoise: Callable[[Any], Any] | None = getattr(self.network, "denoise", None)
        if denoise is None or not self.settings.position_jitter:
            raise InvalidInput("denoising needs a network that can and atoms that are moved: set denoises and position_jitter")
        return denoise

    def _make_optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        plain = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        rate: float | Tensor = settings.learning_rate
        if self.stream is not None:  # a captured step reads it anew
            rate = torch.tensor(rate, device=self.device)
        if settings.precision == "fp8":
            return AdamW(groups, lr=rate, gradient_clip=settings.gradient_clip, seed=settings.seed)
        if self.stream is None:
            return torch.optim.AdamW(groups, lr=rate)
        return torch.optim.AdamW(groups, lr=rate, fused=True, capturable=True)

    @property
    def epoch(self) -> int:
        """Number of epochs behind."""
        return len(self.history)

    def on_own_stream(self) -> AbstractContextManager[Any]:
        """Context of the run's own stream, on a GPU."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def run_all(self, on_epoch: Callable[[EpochRecord], None] | None) -> Iterator[None]:
        """Train all epochs that are left; yields after every step."""
        while self.epoch < self.settings.epochs:
            yield from self._run_epoch()
            if on_epoch is not None:
                on_epoch(self.history[-1])
            last = self.epoch == self.settings.epochs
            if self.run.state_path is not None and (last or self.epoch % self.settings.save_every == 0):
                self.save(self.run.state_path)

    def finish(self) -> None:
        """Leave the best weights in the network, in FP32; raises TrainingDiverged where no epoch had an error that is a number."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        if len(self.run.validation.inputs) and self.history and not math.isfinite(self.best_mae):
            if self.run.state_path is not None:  # nothing to go on from
                self.run.state_path.unlink(missing_ok=True)
            raise TrainingDiverged(
                f"training diverged: the validation error was a number in none of {self.epoch} epochs, at a learning rate of "
                f"{self.settings.learning_rate:g}; lower it"
            )
        self.network.load_state_dict(self.best_weights)
        if self.settings.precision == "fp8":
            restore_linear(self.network)

    def _run_epoch(self) -> Iterator[None]:
        """Train one epoch, yielding after every step, and validate."""
        settings, train = self.settings, self.run.train
        self.network.train()
        generator = torch.Generator(self.device).manual_seed(settings.seed * 7_919 + self.epoch)
        total_error = torch.zeros((), device=self.device, dtype=torch.float64)
        order = torch.cat(list(epoch_batches(len(train.inputs), settings.batch_size, settings.seed, self.epoch)))
        order = order.to(self.device)
        fits = [False] * self.steps_per_epoch if self.fixed is None else self.fixed.fits(order)
        first, rate = self.epoch * self.steps_per_epoch, settings.learning_rate
        for step, (rows, fit) in enumerate(zip(order.split(settings.batch_size), fits, strict=True), start=first):
            rate = self._set_rates(step)
            jitter = self._draw_jitter(len(rows), generator)
            torch.manual_seed(settings.seed * 104_729 + step)  # Dropout depends on the run and the step alone.
            total_error += (self.fixed_step if fit else self._step)(rows, *jitter)
            yield
        predicted = predict(
            self.judged, self.run.validation.inputs, batch_size=settings.eval_batch_size, precision=settings.precision
        )
        validation_mae = (
            float(self.objective(predicted, self.run.validation.targets)[1].mean()) if len(predicted) else float("nan")
        )
        self.history.append(EpochRecord(self.epoch + 1, rate, float(total_error) / len(train.inputs), validation_mae))
        if validation_mae < self.best_mae or not len(predicted):
            self.best_mae, self.best_weights = validation_mae, _copy_of(self.judged)

    def _set_rates(self, step: int) -> float:
        """Set what changes from step to step; returns the learning rate."""
        settings, total = self.settings, self.steps_per_epoch * self.settings.epochs
        rate = settings.learning_rate * (1 - step / total)
        if step < settings.warm_up * total:
            rate *= (step + 1) / (settings.warm_up * total + 1)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.ema_rate.fill_(1 - min(settings.ema_decay, (1 + step) / (10 + step)))
        return rate

    def _draw_jitter(self, n: int, generator: torch.Generator) -> list[Tensor]:
        """Draw what n examples are changed by, an array for each kind of jitter that is asked for."""
        settings, drawn = self.settings, []
        if settings.volume_jitter:
            drawn.append(1 + settings.volume_jitter * (2 * torch.rand(n, generator=generator, device=self.device) - 1))
        if settings.fraction_jitter:
            one = self.run.train.inputs.batch(torch.zeros(1, dtype=torch.long, device=self.device))
            shape = n, one.fractions.shape[1]
            drawn.append(settings.fraction_jitter * torch.randn(shape, generator=generator, device=self.device))
        return drawn

    def _step(self, rows: Tensor, *jitter: Tensor, fixed: bool = False) -> Tensor:
        """Take one optimizer step, on a batch of fixed shape or as it comes; returns the summed absolute error."""
        settings, left = self.settings, list(jitter)
        batch = (self.fixed if fixed and self.fixed is not None else self.run.train.inputs).batch(rows)
        if settings.volume_jitter:
            batch = batch.scaled(left.pop(0))
        if settings.fraction_jitter:
            batch = batch.jittered(left.pop(0))
        moves = None
        if settings.strain_jitter or settings.position_jitter:
            batch, moves = deformed(batch, settings)
        with autocast(settings.precision, self.device):
            predicted = (self.forward if fixed or self.fixed is None else self.as_it_is)(batch)
        extra: Tensor | float = 0.0
        if settings.denoising and moves is not None:
            predicted, found = predicted
            extra = settings.denoising * denoising_error(found, moves, batch, len(rows))
        loss, error = self.objective(predicted[: len(rows)], self.run.train.targets[rows])
        self.optimizer.zero_grad(set_to_none=True)
        (loss.mean() + extra).backward()
        if settings.precision != "fp8":  # there the optimizer clips, which has the gradients
            nn.utils.clip_grad_norm_(self.network.parameters(), settings.gradient_clip)
        self.optimizer.step()
        if self.average is not None:
            self._follow(self.average)
        return error.detach().sum()

    @torch.no_grad()
    def _follow(self, average: nn.Module) -> None:
        """Move the averaged weights towards the network's."""
        kept: list[Tensor] = list(average.parameters())
        new: list[Tensor] = list(self.network.parameters())
        moves = list(torch._foreach_sub(new, kept))  # noqa: SLF001 - as torch's own averages do, a kernel for many tensors
        torch._foreach_mul_(moves, self.ema_rate)
        torch._foreach_add_(kept, moves)
        for own, current in zip(average.buffers(), self.network.buffers(), strict=True):  # statistics of norms, taken as they are
            own.copy_(current)

    @property
    def judged(self) -> nn.Module:
        """The network whose weights validation sees and the run keeps."""
        return self.network if self.average is None else self.average

    def _run_key(self) -> str:
        digest = digest_of_settings(self.network, asdict(self.settings), self.device)
        for part in (self.run.train, self.run.validation):
            add_examples(digest, part.inputs, part.targets)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the run's state."""
        state = {
            "run": self.key,
            "weights": _copy_of(self.network),
            "average": None if self.average is None else self.average.state_dict(),
            "best_weights": self.best_weights,
            "best_mae": self.best_mae,
            "optimizer": self.optimizer.state_dict(),
            "history": [asdict(record) for record in self.history],
        }
        write_state(path, state)

    def load(self, path: Path) -> None:
        """Take up a saved run; raises InvalidCheckpoint when the file is damaged or was saved under other settings."""
        with read_state(path, self.device, self.key) as state:
            self.network.load_state_dict(state["best_weights"])  # so that those fit too
            self.network.load_state_dict(state["weights"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.best_weights, self.best_mae = state["best_weights"], state["best_mae"]
            self.history = [EpochRecord(**record) for record in state["history"]]


def _copy_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
