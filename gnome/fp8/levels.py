"""How much is kept in few bits, as one setting: FP8-LM's levels and this package's own.

| level | weights | gradients | moments | reduction |
|---|---|---|---|---|
| `O1` | FP16, scaled | E4M3 by tensor | FP32 | FP8 all-reduce, shared scale |
| `O2` | FP16, scaled | E4M3 by tensor | E4M3 and FP16 by tensor | the same |
| `O3` | E4M3, with an FP16 master where it is updated | E4M3 by tensor | E4M3 and FP16 by tensor | the same |
| `default` | FP16, scaled, stochastic rounding | E4M3 by block | E4M3 and E4M3 root by block | FP8 all-to-all, FP32 sums |

Products are FP8 in all of them.  Sources: FP8-LM, arXiv 2310.18313, section 2; MS-AMP's optimization levels.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from gnome.errors import InvalidInput
from gnome.fp8.convert import ConversionReport, Filter, Weights, convert_to_fp8
from gnome.fp8.gradients import GradientScaling
from gnome.fp8.linear import LinearSettings
from gnome.fp8.optimizer import AdamW
from gnome.fp8.optimizer_state import States


@dataclass(frozen=True)
class Level:
    """Storage of weights, gradients and moments."""

    name: str
    weights: Weights
    gradients: GradientScaling
    states: States


LEVELS = {
    level.name: level
    for level in (
        Level("O1", "fp16", "tensor", "fp32"),
        Level("O2", "fp16", "tensor", "fp8lm"),
        Level("O3", "e4m3", "tensor", "fp8lm"),
        Level("default", "fp16", "block", "block"),
    )
}


def prepare(
    model: nn.Module,
    level: str = "default",
    *,
    filter: Filter | None = None,  # noqa: A002 - as in convert_to_fp8
    settings: LinearSettings | None = None,
    **optimizer: Any,
) -> tuple[AdamW, ConversionReport]:
    """Convert a model in place and make its optimizer, at one level; `optimizer` goes to `AdamW`.

    Weight decay is for matrices: vectors get none.
    """
    if level not in LEVELS:
        raise InvalidInput(f"no level {level!r}; there are {', '.join(LEVELS)}")
    chosen = LEVELS[level]
    report = convert_to_fp8(model, filter, settings=settings, weights=chosen.weights)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, states=chosen.states, gradients=chosen.gradients, **optimizer), report
