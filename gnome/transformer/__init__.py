"""Transformer blocks after "Simplifying Transformer Blocks" (He & Hofmann, arXiv 2311.01906), for sequences and for sets.

One core with four blocks: `preln`, `parallel`, `sas` and `sasp`.  Depends on torch alone; knows nothing of crystals or of text.
"""

from gnome.transformer.attention import Attention, Gains, centre, shaped_attention
from gnome.transformer.block import Block
from gnome.transformer.cache import Cache
from gnome.transformer.settings import BLOCKS, TransformerSettings
from gnome.transformer.stack import Transformer, parameter_groups

__all__ = [
    "BLOCKS",
    "Attention",
    "Block",
    "Cache",
    "Gains",
    "Transformer",
    "TransformerSettings",
    "centre",
    "parameter_groups",
    "shaped_attention",
]
