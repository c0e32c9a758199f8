"""Two short studies beside `fp8_quality.py`: how far low learning rates still move the weights, and how true an optimizer's updates are.

`tail` goes on from trained BF16 weights with learning rates from 1e-5 down to 1e-6, in each arm on the same batches.  Steps that small
are less than the spacing of FP16: rounded to nearest most of them are lost.  What a run has gained is read from its master weights,
multiplied in BF16 for every arm, so that the arms start from the same loss and the precision of products does not blur the difference.

`wide` gives optimizers the same gradients, whose sizes differ by row and column (log-normal, sigma 0 to 2) and fall tenfold half way, and
compares each update with that of Adam in float64.  It takes the optimizer as a whole, storage of gradients included.
"""

import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpt_training import Arm, Text, learning_rate, plain_weights, sequences, validation_losses, window_starts
from gpu_timing import conditions, print_table
from torch import Tensor, nn

from gnome.fp8 import AdamW

Keep = Callable[[dict[str, Any]], None]
MakeArm = Callable[[str, dict[str, Tensor]], Arm]

TAIL_STEPS, TAIL_SEQUENCES = 150, 32
TAIL_FROM, TAIL_TO = 1e-5, 1e-6
TAIL_ARMS = (
    ("bf16", "FP32"),
    ("default-fp32", "FP32, products and states in FP8"),
    ("default", "FP16, stochastic rounding"),
    ("fp8lm", "FP16, to nearest"),
)

WIDE_SHAPE = (64, 1024)
WIDE_SIGMAS = (0.0, 1.0, 2.0)
WIDE_STEPS, WIDE_AVERAGED = 2000, 100
WIDE_GRADIENT = 1e-3
"""Median size of the gradients before they fall: far above Adam's epsilon, as in training."""


def tail(make: MakeArm, weights: dict[str, Tensor], text: Text, settings: dict[str, Any], keep: Keep) -> None:
    """Print, for each arm, the loss gained and how far the weights went beside the FP32 master's."""
    steps = TAIL_STEPS // 10 if settings["toy"] else TAIL_STEPS
    reader = make("bf16", weights)
    losses = validation_losses(reader, text.val)
    gains: dict[str, Tensor] = {}
    moves: dict[str, dict[str, Tensor]] = {}
    rows = []
    for name, master in TAIL_ARMS:
        arm = make(name, weights)
        start = plain_weights(arm.model)
        _low_rates(arm, text, settings["context"], steps)
        end = plain_weights(arm.model)
        moves[name] = {key: end[key] - start[key] for key in end if key.startswith("blocks.") and end[key].ndim > 1}
        reader.model.load_state_dict(end)
        gains[name] = losses - validation_losses(reader, text.val)
        gain, error = _mean_and_error(gains[name])
        behind, behind_error = _mean_and_error(gains[name] - gains["bf16"])
        along, length = _beside(moves[name], moves["bf16"])
        row = {
            "gain": gain,
            "error": error,
            "beside_bf16": behind,
            "beside_error": behind_error,
            "along": along,
            "length": length,
        }
        about = {"study": "tail", "name": name, "start": float(losses.mean()), "steps": steps, "skipped": arm.skipped_steps}
        keep({**conditions(), **about, "toy": settings["toy"], **row})
        rows.append(
            (name, master, f"{gain:.5f} ± {error:.5f}", f"{behind:+.5f} ± {behind_error:.5f}", along, length, arm.skipped_steps)
        )
        del arm, start, end
        gc.collect()
    rates = f"learning rate {TAIL_FROM:g} to {TAIL_TO:g}"
    print(f"\ntail: {steps} steps of {TAIL_SEQUENCES} sequences, {rates}, from loss {losses.mean():.4f}")
    print_table(
        ("arm", "master weights", "loss gained", "beside bf16", "along bf16's move", "length of the move", "skipped"), rows
    )


def _low_rates(arm: Arm, text: Text, context: int, steps: int) -> None:
    """Train at the study's learning rates, on the same batches in every arm."""
    starts = window_starts(len(text.train), context, steps * TAIL_SEQUENCES, seed=1000).to(text.train.device)
    for step in range(steps):
        lr = learning_rate(step, steps, peak=TAIL_FROM, floor=TAIL_TO, warm_up=0)
        own = starts[step * TAIL_SEQUENCES : (step + 1) * TAIL_SEQUENCES]
        arm.step(*sequences(text.train, own, context), lr, TAIL_SEQUENCES)


def _mean_and_error(x: Tensor) -> tuple[float, float]:
    """Mean over parts of the validation text, and its standard error."""
    return float(x.mean()), float(x.std() / math.sqrt(len(x))) if len(x) > 1 else float("nan")


def _beside(move: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, float]:
    """Projection of a move of all weights on the reference, and its length, both in units of the reference."""
    along = sum(float((move[key].double() * reference[key].double()).sum()) for key in reference)
    own, base = (sum(float(m.double().square().sum()) for m in moves.values()) for moves in (move, reference))
    return along / base, math.sqrt(own / base)


class Candidate:
    """An optimizer of one FP32 matrix, which is set to zero before every step, so that the step's outcome is minus the update.

    The learning rate is 1: nothing is lost when the weights take the update up.
    """

    def __init__(self, name: str, beta2: float, device: torch.device) -> None:
        self.weight = nn.Parameter(torch.zeros(WIDE_SHAPE, device=device))
        settings: dict[str, Any] = {"lr": 1.0, "betas": (0.9, beta2), "eps": 1e-8, "weight_decay": 0.0}
        if name == "torchao AdamWFp8":
            from torchao.optim import AdamWFp8

            self.optimizer: torch.optim.Optimizer = AdamWFp8([self.weight], **settings)
        elif name == "torch AdamW":
            self.optimizer = torch.optim.AdamW([self.weight], **settings)
        else:
            self.optimizer = AdamW([self.weight], states=name.removeprefix("ours, "), **settings)  # type: ignore[arg-type]

    def update(self, gradient: Tensor) -> Tensor:
        """Return what one step subtracts from the weights."""
        with torch.no_grad():
            self.weight.zero_()
        self.optimizer.zero_grad(set_to_none=True)
        (self.weight * gradient).sum().backward()  # the way that hooks see a gradient
        self.optimizer.step()
        return -self.weight.detach()


class ExactAdam:
    """Adam in float64 (Kingma & Ba, arXiv 1412.6980, algorithm 1)."""

    def __init__(self, beta2: float, device: torch.device) -> None:
        self.beta2, self.step = beta2, 0
        self.first, self.second = (torch.zeros(WIDE_SHAPE, dtype=torch.float64, device=device) for _ in range(2))

    def update(self, gradient: Tensor) -> Tensor:
        """Return what one step subtracts from the weights, over the learning rate."""
        g = gradient.double()
        self.step += 1
        self.first.mul_(0.9).add_(g, alpha=0.1)
        self.second.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        root = (self.second / (1 - self.beta2**self.step)).sqrt()
        return self.first / (1 - 0.9**self.step) / (root + 1e-8)


def gradients(sigma: float, steps: int, device: torch.device) -> Iterator[Tensor]:
    """Yield a fixed mean and noise of twice its size, spread by row and column; tenfold smaller from half way on."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rows, columns = WIDE_SHAPE
    spread = torch.exp(sigma * (normal(rows, 1) + normal(1, columns)))
    mean = 0.5 * normal(rows, columns)
    for step in range(steps):
        level = WIDE_GRADIENT * (1.0 if step < steps // 2 else 0.1)
        yield level * spread * (mean + normal(rows, columns))


def wide(device: torch.device, keep: Keep, *, toy: bool) -> None:
    """Print how true every optimizer's updates are just before the gradients fall, and at the end."""
    steps = WIDE_STEPS // 10 if toy else WIDE_STEPS
    averaged = min(WIDE_AVERAGED, steps // 10)
    names = ["ours, block", "ours, fp8lm", "ours, fp32", "torch AdamW"]
    if _importable("torchao AdamWFp8", device):
        names.append("torchao AdamWFp8")
    header = [f"{what} {when}" for when in ("before", "at the end") for what in ("error", "gain", "median")]
    for sigma in WIDE_SIGMAS:
        for beta2 in (0.95, 0.999):
            found = _compare(names, sigma, beta2, steps, averaged, device)
            rows = []
            for name in names:
                own = {when: [float(x) for x in found[when][name]] for when in found}
                rows.append((name, *(value for values in own.values() for value in values)))
                about = {"study": "wide", "name": name, "sigma": sigma, "beta2": beta2, "steps": steps, "toy": toy}
                keep({**conditions(), **about, **own})
            print(
                f"\nwide: sigma {sigma:g}, beta2 {beta2:g}, {steps} steps, means over {averaged}; gain and median are 1 if exact"
            )
            print_table(("optimizer", *header), rows)


def _importable(name: str, device: torch.device) -> bool:
    try:
        Candidate(name, 0.95, device).update(torch.ones(WIDE_SHAPE, device=device))
    except Exception as error:  # absent, or of another release: the study goes on without it
        print(f"{name} is left out: {error}")
        return False
    return True


def _compare(
    names: list[str], sigma: float, beta2: float, steps: int, averaged: int, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """Mean of `_trueness` (3,) by stretch of steps and optimizer."""
    stretches = {"before": steps // 2 - averaged, "end": steps - averaged}
    exact = ExactAdam(beta2, device)
    candidates = {name: Candidate(name, beta2, device) for name in names}
    sums = {when: {name: torch.zeros(3, dtype=torch.float64, device=device) for name in names} for when in stretches}
    for step, gradient in enumerate(gradients(sigma, steps, device)):
        truth = exact.update(gradient)
        own = {name: candidate.update(gradient).double() for name, candidate in candidates.items()}
        for when, start in stretches.items():
            if start <= step < start + averaged:
                for name, update in own.items():
                    sums[when][name] += _trueness(update, truth)
    return {when: {name: total / averaged for name, total in each.items()} for when, each in sums.items()}


def _trueness(update: Tensor, truth: Tensor) -> Tensor:
    """Relative L2 error, gain (projection on the truth), and the median over numbers of update / truth, which no outlier moves."""
    square = truth.square().sum()
    return torch.stack(
        [((update - truth).square().sum() / square).sqrt(), (update * truth).sum() / square, (update / truth).median()]
    )
