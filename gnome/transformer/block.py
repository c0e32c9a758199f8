"""The four blocks, which differ in two things: whether attention stands in a skip connection, and whether the MLP comes after it.

| block | output |
|---|---|
| `preln` | y = x + MHA(N(x)),  y + MLP(N(y)) |
| `parallel` | x + MHA(N(x)) + MLP(N(x))  (Wang & Komatsuzaki, GPT-J, 2021) |
| `sas` | y = b_SA SHA(N(x)),  a_FF y + b_FF MLP(N(y)) |
| `sasp` | b_SA SHA(N(x)) + b_FF MLP(N(x)), no skip connection at all |

SHA is shaped attention without value and output matrices; the gains are trained (He & Hofmann, arXiv 2311.01906, section 4).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from gnome.transformer.attention import INITIAL_DEVIATION, Attention
from gnome.transformer.cache import LayerCache
from gnome.transformer.settings import TransformerSettings


class MLP(nn.Module):
    """Two linear layers without biases and what is between them; `swiglu` gates one half of the first by the other (arXiv 2002.05202)."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        self.activation = settings.activation
        self.up = nn.Linear(settings.width, settings.mlp_width * (2 if self.activation == "swiglu" else 1), bias=False)
        self.down = nn.Linear(settings.mlp_width, settings.width, bias=False)
        self.dropout = nn.Dropout(settings.dropout)
        nn.init.normal_(self.up.weight, std=INITIAL_DEVIATION)
        joins = 1.0 if settings.skipless else (2 * settings.depth) ** -0.5  # where it is added to a stream that is kept
        nn.init.normal_(self.down.weight, std=INITIAL_DEVIATION * joins)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension."""
        h = self.up(x)
        if self.activation == "swiglu":
            gate, h = h.chunk(2, dim=-1)
            h = functional.silu(gate) * h
        else:
            h = functional.relu(h) if self.activation == "relu" else functional.gelu(h)
        return self.down(self.dropout(h))


class Block(nn.Module):
    """One block of a transformer; see the module's text."""

    def __init__(self, settings: TransformerSettings, *, first: bool) -> None:
        super().__init__()
        self.settings = settings
        self.norm = make_norm(settings)
        self.attention = Attention(settings, first=first)
        self.mlp_norm = make_norm(settings) if settings.sequential else None
        self.mlp = MLP(settings)
        self.attention_gain = nn.Parameter(torch.ones(())) if settings.skipless else None
        self.mlp_gain = nn.Parameter(torch.full((), settings.first_mlp_gain)) if settings.skipless else None
        self.skip_gain = nn.Parameter(torch.ones(())) if settings.block == "sas" else None

    def forward(
        self,
        x: Tensor,
        weights: Tensor | None = None,
        turn: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
        seen: int = 0,
    ) -> Tensor:
        """Apply to (B, T, width); the other arguments are attention's."""
        normed = self.norm(x)
        y = times(self.attention_gain, self.attention(normed, weights, turn, cache, seen))
        if not self.settings.skipless:
            y = x + y
        if self.mlp_norm is None:
            return y + times(self.mlp_gain, self.mlp(normed))
        return times(self.skip_gain, y) + times(self.mlp_gain, self.mlp(self.mlp_norm(y)))


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang & Sennrich, arXiv 1910.07467), in x's precision whatever the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension."""
        return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(settings: TransformerSettings) -> nn.Module:
    """Return the norm that stands before attention and MLP."""
    return RMSNorm(settings.width, eps=settings.eps) if settings.norm == "rms" else nn.Identity()


def times(gain: Tensor | None, x: Tensor) -> Tensor:
    """Multiply by a gain, where there is one, in x's own precision."""
    return x if gain is None else gain.to(x.dtype) * x
