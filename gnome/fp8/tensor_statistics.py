"""How well the numbers of a model fit the formats they are stored in: a row for every tensor, a table and a plot."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gnome.fp8.automatic_scale import AutomaticScale
from gnome.fp8.formats import E4M3
from gnome.fp8.gradients import GradientStore
from gnome.fp8.linear import Linear
from gnome.fp8.optimizer import AdamW
from gnome.fp8.scaled_tensor import ScaledTensor
from gnome.fp8.watch import Watch


@dataclass(frozen=True)
class TensorStatistics:
    """One tensor: share of its non-zero numbers flushed to zero and saturated, %, signal to quantisation noise, dB, and its scale."""

    name: str
    tensor: str
    format: str
    underflow: float
    saturated: float
    sqnr: float
    scale: float


@dataclass(frozen=True)
class Statistics:
    """All rows, and counts of the whole run; `mu` holds the automatic scaling factor of each gradient where FP8-LM's reduction is used."""

    rows: tuple[TensorStatistics, ...]
    steps: int
    skipped_steps: int
    gradient_norm: float
    mu: tuple[float, ...] = ()

    def table(self) -> str:
        """Return a Markdown table, worst SQNR first."""
        lines = ["| layer | tensor | format | underflow % | saturated % | SQNR dB | scale |", "|---|---|---|---|---|---|---|"]
        lines += [
            f"| {r.name} | {r.tensor} | {r.format} | {r.underflow:.3f} | {r.saturated:.3f} | {r.sqnr:.1f} | {r.scale:.4g} |"
            for r in sorted(self.rows, key=lambda r: (math.isnan(r.sqnr), r.sqnr))
        ]
        lines.append("")
        lines.append(f"{self.steps} steps, {self.skipped_steps} skipped, gradient norm {self.gradient_norm:.4g}")
        if self.mu:
            lines.append(f"mu from {min(self.mu):.4g} to {max(self.mu):.4g}")
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        """Draw SQNR, underflow and saturation of every layer to a picture file; needs matplotlib."""
        from matplotlib.figure import Figure  # noqa: PLC0415 - drawing is optional

        tensors = sorted({row.tensor for row in self.rows})
        names = list(dict.fromkeys(row.name for row in self.rows))
        figure = Figure(figsize=(8, 7), layout="constrained")
        panels = figure.subplots(3, 1, sharex=True)
        for panel, quantity, label in zip(
            panels, ("sqnr", "underflow", "saturated"), ("SQNR / dB", "flushed to zero / %", "saturated / %"), strict=True
        ):
            for tensor in tensors:
                rows = [row for row in self.rows if row.tensor == tensor]
                panel.plot(
                    [names.index(row.name) for row in rows], [getattr(row, quantity) for row in rows], "o-", ms=3, label=tensor
                )
            panel.set_ylabel(label)
            panel.grid(alpha=0.3)
        panels[0].legend(fontsize=8, ncols=4)
        if len(names) <= 60:
            panels[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        else:
            panels[-1].set_xlabel("layer")
        figure.savefig(path, dpi=150)


def statistics(model: nn.Module, optimizer: AdamW | None = None, automatic_scales: Sequence[AutomaticScale] = ()) -> Statistics:
    """Read what `watching` recorded, look at the weights' FP8 copies and the stored gradients, and count steps.

    This waits for the device.
    """
    rows: list[TensorStatistics] = []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            rows += _of_layer(name or "model", layer)
    if optimizer is None:
        return Statistics(tuple(rows), 0, 0, float("nan"))
    for arena, store in zip(optimizer.arenas, optimizer.stores, strict=True):
        for index, parameter in enumerate(arena.parameters):
            if store.filled[index]:
                rows.append(_of_gradient(names.get(id(parameter), f"parameter {index}"), store, index))
    mu = tuple(float(m) for scale in automatic_scales for m in scale.mu.tolist())
    counts = int(optimizer.step_count), int(optimizer.skipped_steps)
    return Statistics(tuple(rows), *counts, float(optimizer.gradient_norm), mu)


def _of_layer(name: str, layer: Linear) -> list[TensorStatistics]:
    rows = []
    for tensor, scaling in (("input", layer.input_scaling), ("output gradient", layer.gradient_scaling)):
        watch = layer.watches.get(tensor)
        if watch is not None and watch.sums is not None:
            rows.append(_row(name, tensor, scaling.format.name, watch))
    dense = layer.dense_weight()
    if dense.numel():
        watch = Watch()
        cast = ScaledTensor.quantize(dense, E4M3)
        watch.record(dense, cast.scale, E4M3)
        rows.append(_row(name, "weight", E4M3.name, watch))
    return rows


def _row(name: str, tensor: str, fmt: str, watch: Watch) -> TensorStatistics:
    if watch.sums is None or watch.scale is None:
        raise ValueError("nothing was recorded")
    real, flushed, saturated, signal, noise = watch.sums.tolist()
    exact = noise == 0 or signal == 0  # NaN is neither
    sqnr = math.inf if exact else 10 * math.log10(signal / noise) if signal / noise > 0 else math.nan
    return TensorStatistics(
        name, tensor, fmt, 100 * flushed / max(real, 1), 100 * saturated / max(real, 1), sqnr, float(watch.scale)
    )


def _of_gradient(name: str, store: GradientStore, index: int) -> TensorStatistics:
    """Describe a stored gradient: its own rounding is past, so that zeros and saturated bytes are all that can be seen."""
    payload: Tensor = store.layout.part(store.payload, index).view(torch.uint8) & 0x7F
    scale = store.scale[store.layout.blocks(index)].median() if store.scaling == "block" else store.scale[index]
    zero, top = (payload == 0).double().mean(), (payload == 0x7E).double().mean()
    return TensorStatistics(name, "weight gradient", E4M3.name, 100 * float(zero), 100 * float(top), float("nan"), float(scale))
