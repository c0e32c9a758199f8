"""A network like CrabNet (Wang et al., npj Comput. Mater. 7, 77 (2021)), from its description, to compare with: not its code.

Elements as one-hot embeddings with sine and cosine encodings of fraction and log fraction, a post-norm transformer encoder (width 512, 3
layers, 4 heads, feed-forward 2048, dropout 0.1), a residual MLP for each element, and a mean over elements gated by a sigmoid; robust L1
loss.  It sees fractions as features only: attention and mean count every element once.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gnome.crystals.elements import MAX_ATOMIC_NUMBER
from gnome.models.formulas import FormulaBatch


@dataclass(frozen=True, kw_only=True)
class CrabNetLikeSettings:
    """Shape; scale and shift of the answer, eV/atom."""

    width: int = 512
    depth: int = 3
    heads: int = 4
    hidden: int = 2048
    dropout: float = 0.1
    scale: float = 1.0
    shift: float = 0.0


class ResidualMLP(nn.Module):
    """Layers of falling width, each with a linear skip connection."""

    def __init__(self, widths: tuple[int, ...], n_out: int) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairs])
        self.skips = nn.ModuleList([nn.Linear(a, b, bias=False) if a != b else nn.Identity() for a, b in pairs])
        self.out = nn.Linear(widths[-1], n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension."""
        for layer, skip in zip(self.layers, self.skips, strict=True):
            x = nn.functional.leaky_relu(layer(x)) + skip(x)
        return self.out(x)


class CrabNetLike(nn.Module):
    """Answers (B, 2) for a `FormulaBatch`: the energy (eV/atom) and the logarithm of its scale in units of `scale`."""

    fixed_shapes = True

    def __init__(self, settings: CrabNetLikeSettings) -> None:
        super().__init__()
        self.settings = settings
        width = settings.width
        self.embed = nn.Embedding(MAX_ATOMIC_NUMBER + 1, width)
        self.weights = nn.Parameter(torch.zeros(3))
        layer = nn.TransformerEncoderLayer(width, settings.heads, settings.hidden, settings.dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, settings.depth, enable_nested_tensor=False)
        self.out = ResidualMLP((width, 1024, 512, 256, 128), 3)

    def forward(self, batch: FormulaBatch) -> Tensor:
        """Answer."""
        padding = batch.atomic_numbers == 0
        linear, log = (
            encoding(batch.fractions, self.settings.width // 2),
            encoding(log_place(batch.fractions), self.settings.width // 2),
        )
        scales = 2.0 ** (1 - torch.exp(self.weights)) ** 2
        x = self.embed(batch.atomic_numbers) * scales[0]
        x = x + torch.cat([linear * scales[1], log * scales[2]], -1)
        x = self.encoder(x, src_key_padding_mask=padding)
        answer, log_scale, gate = self.out(x).float().masked_fill(padding[..., None], 0.0).unbind(-1)
        count = (~padding).sum(1)
        energy = (answer * torch.sigmoid(gate)).sum(1) / count
        return torch.stack([energy * self.settings.scale + self.settings.shift, log_scale.sum(1) / count], 1)

    def objective(self, answers: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Robust L1: the negative log likelihood of a Laplace distribution; and the absolute error."""
        error = (answers[:, 0] - targets).abs()
        return math.sqrt(2) * error / self.settings.scale * torch.exp(-answers[:, 1]) + answers[:, 1], error


def log_place(fractions: Tensor) -> Tensor:
    """Map fractions to 0 to 1 along their logarithm."""
    return (0.0025 * torch.log2(fractions.clamp(min=1e-4)).square()).clamp(max=1.0)


def encoding(place: Tensor, width: int) -> Tensor:
    """Sines and cosines of places (B, T) from 0 to 1, at a resolution of 5000, as positions of a transformer."""
    half = width // 2
    rates = 50.0 ** (-torch.arange(half, device=place.device) / half)
    angles = (place * 5000).round()[..., None] * rates / 50
    return torch.cat([angles.sin(), angles.cos()], -1)
