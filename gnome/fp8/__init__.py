"""Training in eight bits: FP8 products, gradients, optimizer states and collectives (FP8-LM, arXiv 2310.18313, and past it).

Depends on torch alone, and on Triton where there is a GPU; knows nothing of crystals.  docs/fp8.md says what is stored in which format.
"""

from gnome.fp8.collectives import reduce_gradients
from gnome.fp8.convert import ConversionReport, convert_to_fp8
from gnome.fp8.formats import E4M3, E5M2, FP16, Format
from gnome.fp8.fused import GatedMLP, NormLinear
from gnome.fp8.layout import lay_out
from gnome.fp8.levels import LEVELS, Level
from gnome.fp8.linear import Linear, LinearSettings
from gnome.fp8.memory import StateBytes, state_bytes
from gnome.fp8.optimizer import AdamW
from gnome.fp8.scaled_tensor import ScaledTensor

__all__ = [
    "E4M3",
    "E5M2",
    "FP16",
    "LEVELS",
    "AdamW",
    "ConversionReport",
    "Format",
    "GatedMLP",
    "Level",
    "Linear",
    "LinearSettings",
    "NormLinear",
    "ScaledTensor",
    "StateBytes",
    "convert_to_fp8",
    "lay_out",
    "reduce_gradients",
    "state_bytes",
]
