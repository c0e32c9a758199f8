"""How the GPT of `gpt.py` is trained: its text, the order of its batches, the arms that differ in precision, and its validation loss."""

import json
import lzma
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gpt import GPT, Shape
from numpy.typing import NDArray
from torch import Tensor, nn

from gnome.fp8 import AdamW, Linear, convert_to_fp8, state_bytes

ARMS = ("bf16", "default", "fp8lm")
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0

MAX_EPOCHS = 4
"""Repeating text more often than this is worth much less than new text (Muennighoff et al., arXiv 2305.16264)."""


@dataclass(frozen=True)
class Text:
    """Tokens of both splits, on the device, int32; `bytes_per_token` of the validation split."""

    train: Tensor
    val: Tensor
    vocabulary: int
    bytes_per_token: float

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> "Text":
        """Read what `prepare_books.py` wrote."""
        about = json.loads((folder / "about.json").read_text())
        train, val = (_unpack(folder / f"{split}.xz") for split in ("train", "val"))
        for split, tokens in (("train", train), ("val", val)):
            if len(tokens) != about[f"{split}_tokens"]:
                raise SystemExit(f"{folder / split}.xz has {len(tokens)} tokens, about.json says {about[f'{split}_tokens']}")
        ratio = about["val_bytes"] / about["val_tokens"]
        return cls(*(torch.from_numpy(t.astype(np.int32)).to(device) for t in (train, val)), int(about["vocabulary"]), ratio)

    @classmethod
    def random(cls, vocabulary: int, n_tokens: int, device: torch.device) -> "Text":
        """Make tokens of a Markov chain in which each has four successors: their entropy is 1.2 nats a token, which can be learnt."""
        rng = np.random.default_rng(0)
        successors = rng.integers(vocabulary, size=(vocabulary, 4))
        chains = np.zeros((64, n_tokens // 64 + 1), dtype=np.int32)
        for position in range(1, chains.shape[1]):
            choice = rng.choice(4, size=len(chains), p=[0.5, 0.25, 0.15, 0.1])
            chains[:, position] = successors[chains[:, position - 1], choice]
        tokens = torch.from_numpy(chains.reshape(-1)).to(device)
        return cls(tokens[n_tokens // 20 :], tokens[: n_tokens // 20], vocabulary, 1.0)


def _unpack(path: Path) -> NDArray[np.uint16]:
    """Read tokens stored as all low bytes, then all high bytes."""
    planes = np.frombuffer(lzma.decompress(path.read_bytes()), dtype=np.uint8).reshape(2, -1)
    return planes[0].astype(np.uint16) | (planes[1].astype(np.uint16) << 8)


def window_starts(n_tokens: int, context: int, count: int, seed: int) -> Tensor:
    """Where the training sequences of a run begin, in order: every epoch all windows once, shuffled, cut at another place."""
    starts: list[NDArray[np.int64]] = []
    epoch = 0
    while sum(map(len, starts)) < count:
        if epoch == MAX_EPOCHS:
            raise SystemExit(f"{count * context:,} tokens are more than {MAX_EPOCHS} epochs of {n_tokens:,}")
        rng = np.random.default_rng([seed, epoch])
        windows = (n_tokens - context - 1) // context
        starts.append(rng.integers(context) + context * rng.permutation(windows))
        epoch += 1
    return torch.from_numpy(np.concatenate(starts)[:count])


def sequences(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Return windows of tokens and the tokens that follow them, both (sequences, context) int64."""
    index = starts.to(tokens.device)[:, None] + torch.arange(context + 1, device=tokens.device)
    windows = tokens[index].long()
    return windows[:, :-1], windows[:, 1:]


def learning_rate(step: int, steps: int, *, peak: float, floor: float, warm_up: int) -> float:
    """Linear warm-up from zero, then a cosine from peak to floor at the last step."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(steps - 1 - warm_up, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class Arm:
    """A model, its optimizer, and what differs between them: who clips, who counts steps that were not finite."""

    model: GPT
    optimizer: torch.optim.Optimizer
    not_finite: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    @classmethod
    def make(cls, name: str, model: GPT, seed: int) -> "Arm":
        """Convert the model in place and make its optimizer; `default-fp32` is `default` with FP32 master weights."""
        if name != "bf16":
            convert_to_fp8(model.blocks, weights="as they are" if name == "default-fp32" else "fp16")
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        if name == "bf16":
            return cls(model, torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True))
        states = "fp8lm" if name == "fp8lm" else "block"
        return cls(model, AdamW(groups, lr=0.0, betas=BETAS, states=states, gradient_clip=CLIP, seed=seed))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss under BF16 autocast."""
        with torch.autocast(tokens.device.type, torch.bfloat16):
            return self.model(tokens, targets)

    def step(self, tokens: Tensor, targets: Tensor, lr: float, micro_batch: int) -> None:
        """Accumulate the gradient of a batch over pieces of `micro_batch` sequences, and update."""
        for part in zip(tokens.split(micro_batch), targets.split(micro_batch), strict=True):
            (self.loss(*part) * (len(part[0]) / len(tokens))).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not isinstance(self.optimizer, AdamW):
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.not_finite = self.not_finite.to(norm.device) + (~torch.isfinite(norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def skipped_steps(self) -> int:
        """Steps that a gradient that was not finite made void; torch's AdamW takes them all the same."""
        return int(self.optimizer.skipped_steps if isinstance(self.optimizer, AdamW) else self.not_finite)

    @property
    def bytes_per_parameter(self) -> float:
        """Master weights, gradients and moments."""
        if isinstance(self.optimizer, AdamW):
            return state_bytes(self.optimizer).per_parameter
        moments = sum(t.nbytes for own in self.optimizer.state.values() for t in own.values() if t.ndim)
        return (moments + 2 * sum(p.nbytes for p in self.model.parameters())) / sum(p.numel() for p in self.model.parameters())


@torch.no_grad()
def validation_losses(arm: Arm, val: Tensor, *, windows: int | None = None, at_once: int = 32) -> Tensor:
    """Losses of evenly spread windows of the validation split (all by default), a mean for every `at_once` of them, float64."""
    context = arm.model.shape.context
    n_windows = (len(val) - 1) // context
    chosen = torch.arange(n_windows)
    if windows is not None and windows < n_windows:
        chosen = torch.linspace(0, n_windows - 1, windows).long()
    arm.model.eval()
    whole = chosen[: max(len(chosen) // at_once, 1) * at_once]  # the same shape every time: compiled once
    losses = [arm.loss(*sequences(val, part * context, context)) for part in whole.split(at_once)]
    arm.model.train()
    return torch.stack(losses).double().cpu()


@torch.no_grad()
def plain_weights(model: GPT) -> dict[str, Tensor]:
    """Return a copy of all parameters as FP32 values, of FP8 layers too, for an unconverted model to load."""
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    return {
        name: (layers[name].dense_weight() if name in layers else parameter.detach().float()).clone()
        for name, parameter in model.named_parameters()
    }


FULL = {"width": 768, "heads": 12, "hidden": 2048, "layers": 12}
TOY = {"width": 64, "heads": 2, "hidden": 160, "layers": 2}


def shape_for(text: Text, context: int, *, toy: bool) -> Shape:
    """Sizes of GPT-2 small: 12 layers of 768, the gated MLP with as many weights as GPT-2's; or a toy's."""
    return Shape(**(TOY if toy else FULL), context=context, vocabulary=text.vocabulary)
