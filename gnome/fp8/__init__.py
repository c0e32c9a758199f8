"""Training in eight bits: FP8 products, gradients, optimizer states and collectives (FP8-LM, arXiv 2310.18313, and past it).

Depends on torch alone, and on Triton where there is a GPU; knows nothing of crystals.  docs/fp8.md says what is stored in which format.
"""

from gnome.fp8.automatic_scale import AutomaticScale
from gnome.fp8.collectives import reduce_gradients
from gnome.fp8.convert import ConversionReport, convert_to_fp8, restore_linear
from gnome.fp8.edge_block import EdgeBlock, EdgeOrder
from gnome.fp8.formats import E4M3, E5M2, FP16, Format
from gnome.fp8.fused import GatedMLP, NormLinear
from gnome.fp8.layout import lay_out
from gnome.fp8.levels import LEVELS, Level, prepare
from gnome.fp8.linear import Linear, LinearSettings
from gnome.fp8.memory import StateBytes, state_bytes
from gnome.fp8.optimizer import AdamW
from gnome.fp8.scaled_tensor import ScaledTensor
from gnome.fp8.tensor_statistics import Statistics, statistics
from gnome.fp8.watch import watching

__all__ = [
    "E4M3",
    "E5M2",
    "FP16",
    "LEVELS",
    "AdamW",
    "AutomaticScale",
    "ConversionReport",
    "EdgeBlock",
    "EdgeOrder",
    "Format",
    "GatedMLP",
    "Level",
    "Linear",
    "LinearSettings",
    "NormLinear",
    "ScaledTensor",
    "StateBytes",
    "Statistics",
    "convert_to_fp8",
    "lay_out",
    "prepare",
    "reduce_gradients",
    "restore_linear",
    "state_bytes",
    "statistics",
    "watching",
]
