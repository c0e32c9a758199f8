"""What a cast does to the numbers it sees, counted on a sample and kept on the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gnome.fp8.formats import Format, saturating_cast

SAMPLE = 1 << 16
"""Numbers of a tensor that are looked at, evenly spread."""


@dataclass
class Watch:
    """Sums over the casts of one operand: numbers that are not zero, of those flushed to zero, saturated; squares of values and errors."""

    sums: Tensor | None = field(default=None)
    scale: Tensor | None = field(default=None)

    def record(self, x: Tensor, scale: Tensor, fmt: Format) -> None:
        """Count a cast of x times `scale` to a format; nothing waits for the device."""
        flat = x.detach().reshape(-1)
        if flat.numel() == 0:
            return
        values = flat[:: max(1, flat.numel() // SAMPLE)].float()
        scaled = values * scale
        stored = saturating_cast(scaled, fmt).float()
        real = values != 0
        counts = [
            real.sum(),
            (real & (stored == 0)).sum(),
            (scaled.abs() > fmt.max).sum(),
            values.double().square().sum(),
            (stored / scale - values).double().square().sum(),
        ]
        new = torch.stack([count.double() for count in counts])
        self.sums = new if self.sums is None else self.sums + new
        self.scale = scale.detach().clone()


@contextmanager
def watching(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Record the casts of all FP8 layers of a model while inside; `statistics` reads them.

    Fused casts are taken apart meanwhile, so that there is something to look at: a watched step is slower, the others are not.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "watches")]
    for layer in layers:
        layer.watches = {"input": Watch(), "output gradient": Watch()} if on else layer.watches
        layer.watching = on
    try:
        yield
    finally:
        for layer in layers:
            layer.watching = False
