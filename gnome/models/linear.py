"""One place where linear layers and their initial values are made, so that a precision is one setting for every network."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16", "fp8"]

SWISH_GAIN = 2.75**0.5
"""Gain of the orthogonal initial values before a swish (GNoME release, `INITIALIZER`)."""


def make_linear(n_in: int, n_out: int, *, bias: bool = True) -> nn.Linear:
    """Make a linear layer; for FP8 training `gnome.fp8.convert_to_fp8` replaces it."""
    return nn.Linear(n_in, n_out, bias=bias)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Context in which matrix products run in 16 bits, or fewer where the layers are FP8 ones; reductions stay FP32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != "fp32")


def at_least_fp32(x: Tensor) -> Tensor:
    """Widen half precisions; sums over many rows need it."""
    return x.float() if x.dtype in {torch.bfloat16, torch.float16} else x


class BetaSwish(nn.Module):
    """x sigmoid(beta x) with a learned beta for each feature (GNoME release, `BetaSwish`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise; the last dimension is the feature."""
        return x * torch.sigmoid(self.beta.to(x.dtype) * x)


class SplitLinear(nn.Module):
    """A linear layer on the concatenation of several inputs that never builds the concatenation.

    Each input may have its own number of rows; `rows[i]` says which row of input i every output row uses (None: the same row).  The
    product is taken before the rows are repeated, so node features are multiplied once a node, not once an edge.  The joined weight
    (n_out, sum of n_ins) starts orthogonal.
    """

    def __init__(self, n_ins: Sequence[int], n_out: int, *, gain: float) -> None:
        super().__init__()
        layers = [make_linear(n_in, n_out, bias=i == 0) for i, n_in in enumerate(n_ins)]
        joined = nn.init.orthogonal_(torch.empty(n_out, sum(n_ins)), gain)
        with torch.no_grad():
            for layer, weight in zip(layers, joined.split(list(n_ins), dim=1), strict=True):
                layer.weight.copy_(weight)
            layers[0].bias.zero_()
        self.parts = nn.ModuleList(layers)

    def forward(self, inputs: Sequence[Tensor], rows: Sequence[Tensor | None]) -> Tensor:
        """Sum the parts' products, gathered to the output rows."""
        out: Tensor | None = None
        for part, x, row in zip(self.parts, inputs, rows, strict=True):
            y = part(x) if row is None else part(x).index_select(0, row)
            out = y if out is None else out + y
        assert out is not None  # noqa: S101 - for the type checker; there is always a part
        return out


class MLP(nn.Module):
    """Layers of one width with learned swish between them and a last layer without (GNoME release, `MLP`).

    Initial values: orthogonal with the swish gain, then variance-scaling (fan in) for the last layer.
    """

    def __init__(self, n_ins: Sequence[int], widths: Sequence[int], n_out: int) -> None:
        super().__init__()
        self.first = SplitLinear(n_ins, widths[0], gain=SWISH_GAIN)
        self.activations = nn.ModuleList([BetaSwish(width) for width in widths])
        hidden = [make_linear(a, b) for a, b in zip(widths, [*widths[1:], n_out], strict=True)]
        for layer in hidden:
            nn.init.zeros_(layer.bias)
            nn.init.orthogonal_(layer.weight, SWISH_GAIN)
        nn.init.normal_(hidden[-1].weight, std=widths[-1] ** -0.5)
        self.hidden = nn.ModuleList(hidden)

    def forward(self, inputs: Sequence[Tensor], rows: Sequence[Tensor | None]) -> Tensor:
        """Apply to gathered inputs; see `SplitLinear`."""
        x = self.first(inputs, rows)
        for activation, layer in zip(self.activations, self.hidden, strict=True):
            x = layer(activation(x))
        return x
